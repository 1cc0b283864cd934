"""Tables as text: Markdown for people, CSV and JSON for programs, LaTeX rows for papers."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from qlog.console import count_text, markdown_table
from qlog.report.records import Cell, Estimate, Paired
from qlog.report.tables import PUBLISHED
from qlog.storage import strict_json

_DATASETS = {"finqa": "FinQA", "hotpotqa": "HotPotQA", "musique": "MuSiQue"}
_LEGEND = """\
Ours (the paper's). Ours is in percent: mean over seeds ± standard deviation [95% interval]. The
interval of one run is a bootstrap over questions, marked q; that of several seeds a bootstrap over
seeds, marked s (of few seeds it is too narrow). An answer is right under the paper's rule (the gold
string is a substring of it); the details have our rule of whole words next to it. The numbers are
those of the test split, of the checkpoint with the highest validation m@k under
config.evaluation.grader. Against GRPO: mean difference over the questions that both have answered,
its 95% bootstrap interval over questions, and the p-value of a paired sign-flip permutation test.
No p-value is corrected for the number of cells."""


def markdown(cells: Sequence[Cell]) -> str:
    """The tables as the paper prints them, then a line of details per row and dataset."""
    parts = []
    for table in dict.fromkeys(cell.table for cell in cells):
        mine = [cell for cell in cells if cell.table == table]
        title = PUBLISHED["tables"][str(table)]["title"]
        parts += [f"## Table {table}: {title}", _printed(mine), "### Details", _details(mine)]
    if not parts:
        return "(no table was asked for)\n"
    return "\n\n".join([*parts, _LEGEND, *PUBLISHED["notes"], PUBLISHED["source"]]) + "\n"


def _printed(cells: Sequence[Cell]) -> str:
    return markdown_table(
        [
            {first: row, **{column: _number(cell) for column, cell in columns.items()}}
            for first, row, columns in _layout(cells)
        ]
    )


def _layout(cells: Sequence[Cell]) -> list[tuple[str, str, dict[str, Cell]]]:
    """(name of the first column, row, cells by column) of a printed table.

    With one metric the datasets are columns (Table 3), else each dataset has rows of its own.
    """
    one_metric = len({cell.metric for cell in cells}) == 1
    several = len({cell.dataset for cell in cells}) > 1
    lines: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        row, column = cell.row, cell.metric
        if one_metric:
            column = f"{_DATASETS[cell.dataset]} {cell.metric}"
        elif several:
            row = f"{_DATASETS[cell.dataset]}, {cell.style}: {cell.row}"
        lines.setdefault(row, {})[column] = cell
    return [("method", row, columns) for row, columns in lines.items()]


def _number(cell: Cell) -> str:
    published = "" if cell.published is None else f" ({cell.published:g})"
    return (estimate(cell.ours) if cell.ours else cell.state) + published


def estimate(value: Estimate | None) -> str:
    """38.1 ± 0.8 [37.2, 39.0] s; of one run without the ±."""
    if value is None:
        return "-"
    spread = "" if math.isnan(value.spread) else f" ± {value.spread:.1f}"
    interval = ""
    if not math.isnan(value.low):
        interval = f" [{value.low:.1f}, {value.high:.1f}] {value.over[0]}"
    return f"{value.mean:.1f}{spread}{interval}"


def paired(value: Paired | None) -> str:
    """+14.4 [11.0, 17.9], p = 0.0001, 343 questions."""
    if value is None:
        return "-"
    return (
        f"{value.difference:+.1f} [{value.low:+.1f}, {value.high:+.1f}], p = {value.p_value:.2g}, "
        f"{count_text(value.num_questions, 'question')}"
    )


def _details(cells: Sequence[Cell]) -> str:
    lines = []
    for cell in cells:
        lines.append(
            {
                "cell": f"{_DATASETS[cell.dataset]}, {cell.style}, {cell.row}, {cell.metric}",
                "state": cell.detail,
                "whole words": estimate(cell.strict),
                "against GRPO": paired(cell.against),
                "notes": "; ".join(cell.notes) or "-",
            }
        )
    return markdown_table(lines)


# ---- For programs ----


def json_text(cells: Sequence[Cell]) -> str:
    """All that is known of the cells, in percent; numbers that are not finite are text."""
    return strict_json.dumps([_as_dict(cell) for cell in cells], indent=2) + "\n"


def _as_dict(cell: Cell) -> dict[str, Any]:
    found = cell._asdict()
    for name in ("ours", "strict", "against"):
        if found[name] is not None:
            found[name] = found[name]._asdict()
    return found


def csv_text(cells: Sequence[Cell]) -> str:
    """A line per cell; what is not known is empty."""
    text = io.StringIO()
    header = [
        *("table", "dataset", "style", "row", "metric", "published", "state"),
        *("mean", "spread", "low", "high", "interval_over", "seeds"),
        *("whole_words_mean", "whole_words_low", "whole_words_high"),
        *("against_grpo", "against_grpo_low", "against_grpo_high", "p_value", "questions"),
        *("detail", "folders", "notes"),
    ]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for cell in cells:
        ours, strict, against = cell.ours, cell.strict, cell.against
        writer.writerow(
            [
                *(cell.table, cell.dataset, cell.style, cell.row, cell.metric),
                *(_plain(cell.published), cell.state),
                *((_plain(each) for each in ours[:4]) if ours else [""] * 4),
                *((ours.over, len(ours.values)) if ours else ("", 0)),
                *(
                    (_plain(strict.mean), _plain(strict.low), _plain(strict.high))
                    if strict
                    else [""] * 3
                ),
                *((_plain(each) for each in against) if against else [""] * 5),
                *(cell.detail, "; ".join(cell.folders), "; ".join(cell.notes)),
            ]
        )
    return text.getvalue()


def _plain(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.6g}"


# ---- LaTeX ----

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{each: "\\" + each for each in "&%$#_{}"},
}


def latex(cells: Sequence[Cell]) -> str:
    """The rows of the printed tables, for a tabular; ours with its spread, the paper's behind."""
    parts = []
    for table in dict.fromkeys(cell.table for cell in cells):
        layout = _layout([cell for cell in cells if cell.table == table])
        columns = " & ".join(_escaped(column) for column in layout[0][2])
        parts.append(f"% Table {table}: ours (the paper's), in percent")
        parts.append(f"method & {columns} \\\\\n\\midrule")
        for _, row, mine in layout:
            numbers = " & ".join(_latex_number(cell) for cell in mine.values())
            parts.append(f"{_escaped(row)} & {numbers} \\\\")
    return "\n".join(parts) + "\n"


def _latex_number(cell: Cell) -> str:
    text = _escaped(cell.state)
    if cell.ours:
        spread = "" if math.isnan(cell.ours.spread) else rf"_{{\pm {cell.ours.spread:.1f}}}"
        text = f"${cell.ours.mean:.1f}{spread}$"
    return text + ("" if cell.published is None else f" ({cell.published:g})")


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(each, each) for each in text)
