"""The run report: one HTML file per run or comparison, which needs no network and no build step.

page.html has the style and the script. All that a run wrote goes into it as JSON, and the script
puts it on the page as text: a rollout may hold any markup, and none of it is ever read as such.
"""

import html
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from qlog.config import schema
from qlog.grading import graders
from qlog.report import groups, health, read, texts
from qlog.report.figures import COLOURS
from qlog.report.records import Cell, Run
from qlog.storage import strict_json

_TEMPLATE = pathlib.Path(__file__).parent / "page.html"
_POINTS = 400  # of a curve, at most: more are not seen at this size
_BYTES = 12_000_000  # of all rollouts of a page, at most; the browser keeps them in memory
_RUNS = 12  # of which rollouts are shown
_LONGEST = 20_000  # characters of a text that are shown

# Titles of the charts, and what is drawn in each: (phase, metrics). {k}: samples per question.
_CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("effective reward, max c_m / M^q (Figure 3)", "train", ("effective_reward",)),
    ("mean log P", "train", ("log_p",)),
    ("validation p@1", "evaluation", ("p@1",)),
    ("validation p@{k}", "evaluation", ("p@{k}",)),
    ("validation m@{k} (Figure 4)", "evaluation", ("m@{k}",)),
    ("reward", "train", ("reward",)),
    ("tokens of a rationale", "train", ("rationale_length",)),
    ("rationales forced to end", "train", ("budget_hits",)),
    ("rationales that ended early", "train", ("ended_early",)),
    ("answers cut", "train", ("truncated_answers",)),
    ("entropy of a rationale's tokens, nats", "train", ("entropy/rationale",)),
    ("entropy of a sampled answer's tokens, nats", "train", ("entropy/answer",)),
    ("4-grams of a rationale that occurred before", "train", ("repetition",)),
    ("different answers in a group", "train", ("distinct_answers",)),
    ("different answers to a validation question, share", "evaluation", ("answer/distinct",)),
    ("effective sample size", "train", ("ess",)),
    ("groups without a gradient", "train", ("no_signal",)),
    ("gradient norm", "train", ("grad_norm",)),
    ("gradient norm, score term", "train", ("terms/score_norm",)),
    ("gradient norm, pathwise term", "train", ("terms/path_norm",)),
    ("guard: 1 while the fallback has the word", "train", ("guard",)),
    ("sampler against learner, nats per token", "train", ("mismatch",)),
    ("tokens per second, decoding", "train", ("tokens_per_s/decode",)),
    ("tokens per second, training", "train", ("tokens_per_s/train",)),
    ("decoding in vain, lane-steps per token", "train", ("decode_waste",)),
    ("learning in vain, packs per pack that is needed", "train", ("learn_waste",)),
    ("loss", "train", ("loss",)),
)


def build(
    runs: Sequence[Run], title: str, cells: Sequence[Cell] = (), *, is_live: bool = False
) -> str:
    """The page as one HTML text.

    Args:
      runs: one, or several that are compared.
      title: of the page.
      cells: of the paper's tables, shown above the runs.
      is_live: whether the page asks its server for `data.json` again and again.
    """
    template = _TEMPLATE.read_text(encoding="utf-8")
    content = script_json(data(runs, title, cells, is_live=is_live))
    # In one pass, or a title could hold the mark of the data.
    head, _, rest = template.partition("__TITLE__")
    middle, _, end = rest.partition("__DATA__")
    return head + html.escape(title) + middle + content + end


def script_json(value: Any) -> str:
    """JSON for the inside of a script element: no text in it can end the element."""
    text = strict_json.dumps(value, ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def data(
    runs: Sequence[Run], title: str, cells: Sequence[Cell] = (), *, is_live: bool = False
) -> dict[str, Any]:
    """What the script of the page shows, as JSON values."""
    usual = groups.defaults()
    labels = _labels(runs)
    # Rollouts of dozens of runs are gigabytes to read.
    readable = runs[:_RUNS]
    share = _BYTES // max(1, len(readable))
    shown = [_rollouts(run, share) for run in readable]
    shown += [([], f"only the first {_RUNS} runs show theirs: name fewer")] * len(runs[_RUNS:])
    return {
        "title": title,
        "written": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "live": is_live,
        "colours": list(COLOURS),
        "tables": _tables(cells),
        "runs": [_run(run, label, usual) for run, label in zip(runs, labels, strict=True)],
        "charts": _charts(runs),
        "rollouts": [rollouts for rollouts, _ in shown],
        "cut": [note for _, note in shown],
    }


def _labels(runs: Sequence[Run]) -> list[str]:
    """The run's name, its method, and which of the others it starts from."""
    labels = []
    for run in runs:
        origin = groups.origin(run, runs)
        label = f"{run.name}: {groups.method(run.config)}"
        labels.append(label + (f" (starts from {origin.name})" if origin else ""))
    return labels


def _run(run: Run, label: str, usual: dict[str, Any]) -> dict[str, Any]:
    # The loss in its arguments, each next to the default of that loss.
    fields = {
        name: (usual.get(name), value) for name, value in schema.from_json(run.config).items()
    }
    del fields["loss"]
    fields |= groups.loss_fields(run.config)
    state = f"{run.state.kind}, step {run.state.step} of {run.state.steps}"
    final = None
    if run.final is not None:
        final = {
            "what": f"{run.final.split}, {run.final.source}",
            "metrics": _metrics(run.final.metrics),
        }
    return {
        "label": label,
        "folder": str(run.folder),
        "state": state + (f": {run.state.why}" if run.state.why else ""),
        "notes": list(run.notes),
        "health": [verdict._asdict() for verdict in health.verdicts(run)],
        "config": [
            {
                "field": name,
                "value": json.dumps(value),
                "default": json.dumps(default),
                # The method is always shown.
                "changed": value != default or name in ("loss.name", "loss.q"),
            }
            for name, (default, value) in sorted(fields.items())
        ],
        "final": final,
    }


def _metrics(metrics: dict[str, Any]) -> list[list[Any]]:
    """[name, value, its interval as text or ''], the paper's rule first."""
    order = {"substring": 0, "contains": 1}
    names = [name for name in metrics if name.rpartition("/")[2] not in ("low", "high", "errors")]
    names.sort(key=lambda name: order.get(name.partition("/")[0], 2))
    found = []
    for name in names:
        ends = [metrics.get(f"{name}/{end}") for end in ("low", "high")]
        is_known = all(isinstance(end, int | float) for end in ends)
        found.append([name, metrics[name], "{:.4f} to {:.4f}".format(*ends) if is_known else ""])
    return found


def _tables(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The paper's cells as rows of text."""
    return [
        {
            "cell": f"Table {cell.table}: {cell.dataset}, {cell.style}, {cell.row}, {cell.metric}",
            "ours": texts.estimate(cell.ours) if cell.ours else cell.state,
            "paper": "" if cell.published is None else f"{cell.published:g}",
            "whole words": texts.estimate(cell.strict),
            "against GRPO": texts.paired(cell.against),
            "runs": cell.detail,
            "notes": "; ".join(cell.notes),
        }
        for cell in cells
    ]


# ---- Curves ----


def _charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Charts that at least one run has points for."""
    # Runs may have evaluated different numbers of samples: each k has charts of its own.
    sizes = sorted({run.config["evaluation"].get("rollouts_per_prompt", 16) for run in runs})
    found = []
    for title, phase, metrics in _CHARTS:
        for k in sizes if "{k}" in title else sizes[:1]:
            series = []
            for index, run in enumerate(runs):
                rows = run.steps if phase == "train" else run.evaluations
                for metric in metrics:
                    points = _points(rows, metric.format(k=k))
                    if points:
                        series.append({"run": index, "points": points})
            if series:
                found.append({"title": title.format(k=k), "series": series})
    return found


def _points(rows: Sequence[dict[str, Any]], metric: str) -> list[list[float]]:
    """[[steps done, value], ...], at most some _POINTS of them, the last one always."""
    points = [
        [row["step"] + 1, row[metric]] for row in rows if isinstance(row.get(metric), int | float)
    ]
    stride = math.ceil(len(points) / _POINTS) or 1
    # From the last one backwards, so that a run under way shows where it is.
    return points[::-1][::stride][::-1]


# ---- Rollouts ----


def _rollouts(run: Run, most_bytes: int) -> tuple[list[dict[str, Any]], str]:
    """Groups of rollouts, one per step and prompt, and a sentence if not all are shown."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for line in read.rollouts(run.folder):
        key = (line.get("step", 0), str(line.get("id", "")))
        gold = str(line.get("gold", ""))
        group = found.setdefault(
            key,
            {
                "step": line.get("step", 0) + 1,
                "id": key[1],
                "prompt": _cut(str(line.get("prompt", ""))),
                "gold": _cut(gold),
                "rollouts": [],
            },
        )
        answer = str(line.get("answer", ""))
        group["rollouts"].append(
            {
                "rollout": line.get("rollout", len(group["rollouts"])),
                "rationale": _cut(str(line.get("rationale", ""))),
                "answer": _cut(answer),
                "right": bool(answer) and graders.contains(answer, gold) >= 0.5,
                "log_w": line.get("log_w"),
                # Runs of an older version did not write coefficients.
                "coefficient": line.get("coefficient"),
                "path_coefficient": line.get("path_coefficient"),
                "reward": line.get("reward"),
                "forced": bool(line.get("forced")),
            }
        )
    return _within(list(found.values()), most_bytes)


def _cut(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]} ... (cut: {len(text):,} characters)"


def _within(found: list[dict[str, Any]], most_bytes: int) -> tuple[list[dict[str, Any]], str]:
    """Every n-th step, n the least with which they are no more bytes; the last step always."""
    sizes: dict[int, int] = {}
    for group in found:
        sizes[group["step"]] = sizes.get(group["step"], 0) + len(json.dumps(group))
    steps = sorted(sizes)
    for stride in range(1, len(steps) + 1):
        kept = set(steps[::-1][::stride])
        if sum(sizes[step] for step in kept) <= most_bytes:
            break
    else:
        kept = set(steps[-1:])
    shown = [group for group in found if group["step"] in kept]
    if len(kept) == len(steps):
        return shown, ""
    return shown, f"{len(kept)} of the {len(steps)} steps in rollouts.jsonl are shown"
