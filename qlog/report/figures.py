"""Curves over steps, seeds as bands: the paper's Figures 3 and 4, and the escape of any runs.

Lines may lie on each other for hundreds of steps (at a cold start most of them are flat at zero).
So later lines are thinner than earlier ones, each has dashes and markers of its own, and the
markers of no two lines are at the same step: of lines that coincide all are seen.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from qlog.report.records import Group, Run

# Okabe and Ito's colours without yellow, which white paper swallows: told apart with any kind of
# colour blindness.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
_MARKERS = "osv^DPX"
_WIDEST, _THINNEST = 4.0, 1.2  # points
_NUM_MARKERS = 8  # on each line


class Line(NamedTuple):
    """A quantity of one experiment."""

    label: str
    steps: np.ndarray  # int [T], steps done, those that all its seeds have
    values: np.ndarray  # float [S, T], of S seeds


class Style(NamedTuple):
    """How a line is drawn."""

    colour: str  # "#RRGGBB"
    dash: Any  # as matplotlib takes it
    marker: str  # as matplotlib takes it


class Panel(NamedTuple):
    """One pair of axes."""

    lines: Sequence[Line]
    label: str  # of the vertical axis; mathematics between $


def training_lines(groups: Sequence[Group], quantity: str) -> list[Line]:
    """A metric of training steps, a line per experiment that has it."""
    return _lines(groups, lambda run: run.steps, quantity)


def evaluation_lines(groups: Sequence[Group], quantity: str) -> list[Line]:
    """A metric of evaluations on the validation split, a line per experiment that has it."""
    return _lines(groups, lambda run: run.evaluations, quantity)


def _lines(
    groups: Sequence[Group], rows: Callable[[Run], list[dict[str, Any]]], quantity: str
) -> list[Line]:
    found = []
    for group in groups:
        # The log counts from 0 the step that was done: after it one step more is done.
        curves = [
            {row["step"] + 1: row[quantity] for row in rows(run) if _is_number(row.get(quantity))}
            for run in group.runs
        ]
        curves = [curve for curve in curves if curve]
        if not curves:
            continue
        # A mean over changing sets of seeds would jump where one ends: only steps of all of them.
        steps = sorted(set(curves[0]).intersection(*curves[1:]))
        if not steps:
            continue
        label = group.label + (f" ({len(curves)} seeds)" if len(curves) > 1 else "")
        values = np.array([[curve[step] for step in steps] for curve in curves], float)
        found.append(Line(label, np.array(steps), values))
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def figure3(groups: Sequence[Group]) -> list[Panel]:
    """The paper's Figure 3: max_m c_m / M^q, the mean over groups, against the step."""
    return [Panel(training_lines(groups, "effective_reward"), r"$\max_m c_m / M^q$")]


def figure4(groups: Sequence[Group], k: int) -> list[Panel]:
    """The paper's Figure 4: accuracy of the majority vote on validation against the step."""
    return [Panel(evaluation_lines(groups, f"m@{k}"), f"validation m@{k}")]


def escape(groups: Sequence[Group]) -> list[Panel]:
    """Mean log P, p@1 and Figure 3's quantity: who escapes a cold start, and when."""
    # Runs on annotated rationales have no log P.
    having = [group for group in groups if training_lines([group], "log_p")]
    panels = [Panel(training_lines(having, "log_p"), r"mean $\log P$")]
    accuracy = evaluation_lines(having, "p@1")
    if any(len(line.steps) > 1 for line in accuracy):  # one evaluation is no curve
        panels.append(Panel(accuracy, "validation p@1"))
    return panels + figure3(having)


def draw(panels: Sequence[Panel]) -> dict[str, bytes]:
    """A picture of the panels side by side, as {"svg": ..., "png": ...}; {} without any line.

    A line is the mean over seeds, its band from the lowest to the highest seed.
    """
    if not any(panel.lines for panel in panels):
        return {}
    import matplotlib  # slow to import, and needed here only

    matplotlib.use("Agg")  # draws into memory: hosts have no display
    from matplotlib import pyplot

    # The same runs give the same files: SVG's ids are random, its date is now.
    with matplotlib.rc_context({"svg.hashsalt": "qlog"}):
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False
        )
        labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
        handles: dict[str, Any] = {}
        for axis, panel in zip(axes[0], panels, strict=True):
            for line in panel.lines:
                handles[line.label] = _draw_line(axis, line, labels.index(line.label), len(labels))
            axis.set(xlabel="step", ylabel=panel.label)
            axis.grid(alpha=0.3)
        # Below the axes, so that no curve is hidden behind it.
        shown = [label for label in labels if label in handles]
        figure.legend(
            [handles[label] for label in shown],
            shown,
            fontsize=8,
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            ncols=2 if len(panels) == 1 else 4,
            handlelength=4.5,
        )
        figure.tight_layout()
        pictures = {}
        for kind, metadata in (("svg", {"Date": None}), ("png", None)):
            picture = io.BytesIO()
            figure.savefig(picture, format=kind, dpi=100, bbox_inches="tight", metadata=metadata)
            pictures[kind] = picture.getvalue()
        pyplot.close(figure)
    return pictures


def style_of(index: int) -> Style:
    """The style of line `index`; no two of the first 28 are alike."""
    # With each round of colours dashes and markers go on by one more than they would by themselves.
    rounds = index // len(COLOURS)
    return Style(
        COLOURS[index % len(COLOURS)],
        _DASHES[(index + 2 * rounds) % len(_DASHES)],
        _MARKERS[(index + rounds) % len(_MARKERS)],
    )


def _draw_line(axis: Any, line: Line, index: int, number: int) -> Any:
    """Draws line `index` of `number`; returns what the legend shows."""
    style = style_of(index)
    mean = line.values.mean(axis=0)  # [T]
    if len(line.values) > 1:
        low, high = line.values.min(axis=0), line.values.max(axis=0)
        axis.fill_between(line.steps, low, high, color=style.colour, alpha=0.15, linewidth=0)
    width = _WIDEST - (_WIDEST - _THINNEST) * index / max(1, number - 1)
    # Markers in turns: line i of n has its first one i n-ths of the way to its second.
    every = max(1, len(line.steps) // _NUM_MARKERS)
    return axis.plot(
        line.steps,
        mean,
        label=line.label,
        color=style.colour,
        linestyle=style.dash,
        linewidth=width,
        marker=style.marker,
        markersize=5,
        markevery=(every * index // max(1, number), every),
    )[0]
