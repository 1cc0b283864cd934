"""The report of several runs: one table, and the escape curves."""

import io
import json
from collections.abc import Sequence
from typing import Any

from qlog.console import markdown_table, say
from qlog.runs.log import read_jsonl
from qlog.storage import paths


def write(workdir: paths.Path, names: Sequence[str]) -> None:
    """Writes report.md, report.json and escape.png of the runs workdir/NAME, and prints the table.

    The table has p@1, p@k, m@k, p@1 without a rationale, the final mean log P and the seconds of
    each run that was evaluated.
    """
    rows = [row for row in (_row(workdir / name, name) for name in names) if row]
    table = markdown(rows)
    paths.write(workdir / "report.md", table + "\n")
    paths.write(workdir / "report.json", json.dumps(rows, indent=2) + "\n")
    curves = {name: read_jsonl(workdir / name / "metrics.jsonl") for name in names}
    draw_escape(curves, workdir / "escape.png")
    say(f"\n{table}\n\nreport.md, report.json and escape.png are in {workdir}")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of rows with equal keys."""
    if not rows:
        return "(no run was evaluated)"
    return markdown_table([{key: _cell(value) for key, value in row.items()} for row in rows])


def draw_escape(curves: dict[str, list[dict[str, Any]]], path: paths.Path) -> None:
    """Two panels against the step: max_m c_m / M^q (the paper's Figure 3), and mean log P.

    Args:
      curves: the lines of metrics.jsonl by run. Runs without log P (supervised ones) are left out.
      path: the PNG file to write.
    """
    import matplotlib  # slow to import, and needed here only

    matplotlib.use("Agg")  # draws into memory: hosts have no display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    panels = (
        ("effective_reward", r"effective reward  $\max_m c_m / M^q$"),
        ("log_p", r"mean $\log P$"),
    )
    for axis, (quantity, label) in zip(axes, panels, strict=True):
        for name, rows in curves.items():
            # Evaluations have their own lines in the same file.
            points = [
                (row["step"], row[quantity])
                for row in rows
                if row["phase"] == "train" and "log_p" in row and quantity in row
            ]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    pyplot.close(figure)
    paths.write(path, picture.getvalue())


def _row(folder: paths.Path, name: str) -> dict[str, Any] | None:
    """A run's line of the table; None for a run that was not evaluated."""
    results = json.loads(paths.read(folder / "results.json"))["metrics"]
    if not results:
        return None
    # The largest k that was evaluated is the number of samples per prompt.
    k = max(int(key[2:]) for key in results if key.startswith("m@") and key[2:].isdigit())
    row = {
        "run": name,
        "p@1": results["p@1"],
        f"p@{k}": results[f"p@{k}"],
        f"m@{k}": results[f"m@{k}"],
    }
    if "no_rationale/p@1" in results:
        row["p@1 without rationale"] = results["no_rationale/p@1"]
    row["mean log P"] = results["log_p"]
    seconds = folder / "seconds.json"  # missing if the process was killed after results.json
    return row | {
        "seconds": round(json.loads(paths.read(seconds)), 1) if paths.exists(seconds) else "-"
    }


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
