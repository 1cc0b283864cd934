"""All of a report: which files it has, from runs that are read."""

import collections
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any

from qlog.console import markdown_table, say, show_markdown, time_text
from qlog.report import figures, groups, health, page, read, tables, texts
from qlog.report.records import Group, Run
from qlog.storage import paths, strict_json

TABLES = (1, 2, 3)
_Files = dict[str, str | bytes]  # content by name


def write(workdir: paths.Path, names: Sequence[str]) -> None:
    """Writes the report of the runs workdir/NAME into workdir, and prints its table.

    report.html has everything. report.md and report.json have the table: p@1, p@k, m@k, p@1 without
    a rationale, the final mean log P and the time of each run that was evaluated. escape.svg and
    escape.png have the curves. Runs that differ in their seed are one line and one curve, with a
    band: then report.md begins with a table of methods by setting for each accuracy, and each
    setting has figures of its own.
    """
    runs = [read.read_run(workdir / name, name) for name in names]
    rows = [row for row in map(_run_row, runs) if row]
    one_by_one, starts = groups.with_origins(_one_by_one(runs))
    table = "\n\n".join([markdown(list(map(_with_time, rows))), *starts])
    text, pictures = table, _pictures("escape", figures.escape(one_by_one))
    alike = groups.group(runs)
    if any(len({run.config.get("seed") for run in group.runs}) > 1 for group in alike):
        _, starts = groups.with_origins(alike)
        text = "\n\n".join([_by_setting(alike), *starts])
        table = f"{text}\n\n{_SUMMARY_LEGEND}\n\n## Every run\n\n{table}"
        pictures = _figures(alike)
    files: _Files = {
        "report.md": table + "\n",
        "report.json": strict_json.dumps(rows, indent=2) + "\n",
        "report.html": page.build(runs, f"qlog: {workdir.name}"),
        **pictures,
    }
    _write_all(workdir, files)
    say("")
    show_markdown(text)
    say(f"\nThe report is {workdir / 'report.html'}: open it in a browser.")
    say(f"Next to it: {', '.join(name for name in files if name != 'report.html')}")


def write_report(runs: Sequence[Run], wanted: Sequence[int], out: paths.Path) -> list[str]:
    """Writes all files about the runs into `out`; returns their names.

    Args:
      wanted: tables of the paper; () are those that a run belongs to.
    """
    alike = groups.group(runs)
    cells = tables.cells(runs, wanted or TABLES)
    if not wanted:
        has_runs = {cell.table for cell in cells if cell.folders}
        cells = [cell for cell in cells if cell.table in has_runs]
    files: _Files = {}
    # ---- Tables ----
    summary = markdown([_group_row(group) for group in alike]) if alike else "(no run)"
    _, starts = groups.with_origins(alike)
    summary = "\n\n".join([summary, *starts])
    files["report.md"] = f"{_verdicts(runs)}{summary}\n\n{_SUMMARY_LEGEND}\n"
    if cells:
        files["report.md"] += "\n" + texts.markdown(cells)
    for table in dict.fromkeys(cell.table for cell in cells):
        mine = [cell for cell in cells if cell.table == table]
        files |= {
            f"table{table}.md": texts.markdown(mine),
            f"table{table}.json": texts.json_text(mine),
            f"table{table}.csv": texts.csv_text(mine),
            f"table{table}.tex": texts.latex(mine),
        }
    files |= _figures(alike)
    # ---- The page ----
    title = "qlog: " + (runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    files["report.html"] = page.build(runs, title, cells)
    _write_all(out, files)
    return list(files)


_SUMMARY_LEGEND = """\
Accuracies are those of config.evaluation.grader, the mean over seeds ± their standard deviation: of
the best checkpoint on the test split where all finished seeds have it, else of the last evaluation
on the split that is named."""


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of rows; a row without one of the columns has a dash there."""
    if not rows:
        return "(no run was evaluated)"
    # The time stays the last column, though the first rows may lack columns that later ones have.
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns.sort(key=lambda key: key == "time")
    return markdown_table([{key: _cell(row.get(key, "-")) for key in columns} for row in rows])


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _write_all(folder: paths.Path, files: _Files) -> None:
    for name, content in files.items():
        paths.write(folder / name, content)


def _pictures(name: str, panels: Sequence[figures.Panel]) -> _Files:
    return {f"{name}.{kind}": content for kind, content in figures.draw(panels).items()}


def _figures(alike: Sequence[Group]) -> _Files:
    """Figures 3 and 4 and the escape, of each dataset, start and setting in turn."""
    # A setting that one method has alone stays in its dataset's figures.
    numbers = collections.Counter(group.setting for group in alike)
    shared = {setting for setting, number in numbers.items() if setting and number > 1}
    apart: dict[str, list[Group]] = {}
    for group in alike:
        section = group.runs[0].config["data"]
        words = [str(section.get("name")), str(section.get("style"))]
        if group.setting in shared:
            words.append(group.setting)
            group = group._replace(label=group.method)  # the file's name says the rest
        name = "-".join(re.sub(r"[^\w.+-]+", "_", word) for word in words)
        if len(name) > 100:  # file names end at 255 bytes
            name = f"{name[:90]}-{zlib.crc32(name.encode()):08x}"
        apart.setdefault(name, []).append(group)
    files: _Files = {}
    for name, members in apart.items():
        mine, _ = groups.with_origins(members)
        k = mine[0].runs[0].config["evaluation"].get("rollouts_per_prompt", 16)
        files |= _pictures(f"figure3-{name}", figures.figure3(mine))
        files |= _pictures(f"figure4-{name}", figures.figure4(mine, k))
        files |= _pictures(f"escape-{name}", figures.escape(mine))
    return files


def _verdicts(runs: Sequence[Run]) -> str:
    """What asks for attention, a line each; '' where nothing does."""
    lines = [
        f"- {run.name}: {verdict.metric}: {' '.join(verdict.text.split())}"
        for run in runs
        for verdict in health.worst(health.verdicts(run))
    ]
    lines += [f"- {run.name}: {note}" for run in runs for note in run.notes]
    return "\n".join([*lines, "", ""]) if lines else ""


# ---- Rows: of a run, and of an experiment ----


def _one_by_one(runs: Sequence[Run]) -> list[Group]:
    """Each run as an experiment of its own, by its name."""
    return [Group(run.name, groups.method(run.config), "", (run,)) for run in runs]


def _run_row(run: Run) -> dict[str, Any] | None:
    """A run's line of the table; None for a run that was not evaluated."""
    results = run.evaluations[-1] if run.evaluations else {}
    k = _most_samples(results)
    if not k:
        return None
    return {
        "run": run.name,
        **_accuracies(results, k),
        "seconds": "-" if run.seconds is None else run.seconds,
    }


def _with_time(row: dict[str, Any]) -> dict[str, Any]:
    """A run's line as people read it: the time it took instead of its seconds."""
    seconds = row["seconds"]
    time = seconds if isinstance(seconds, str) else time_text(seconds)
    return {name: value for name, value in row.items() if name != "seconds"} | {"time": time}


def _accuracies(results: dict[str, Any], k: int) -> dict[str, Any]:
    names = {
        "p@1": "p@1",
        f"p@{k}": f"p@{k}",
        f"m@{k}": f"m@{k}",
        "no_rationale/p@1": "p@1 without rationale",
        "log_p": "mean log P",
    }
    return {shown: results[name] for name, shown in names.items() if name in results}


def _most_samples(results: dict[str, Any]) -> int:
    """k, the largest that was evaluated: the number of samples per prompt; 0 of no evaluation."""
    found = [int(name[2:]) for name in results if name[:2] == "m@" and name[2:].isdigit()]
    return max(found, default=0)


def _group_row(group: Group) -> dict[str, str]:
    """An experiment's line of the summary."""
    config = group.runs[0].config
    states = [run.state for run in group.runs]
    row = {
        "experiment": group.label,
        "data": f"{config['data'].get('name')}, {config['data'].get('style')}",
        "seeds": ", ".join(str(run.config.get("seed", 0)) for run in group.runs),
        "state": "; ".join(
            dict.fromkeys(f"{s.kind} {s.step}/{s.steps} {s.why}".strip() for s in states)
        ),
    }
    row["split"], numbers = _results(group)
    return row | {name: _over_seeds(values) for name, values in numbers.items()}


_Numbers = dict[str, list[float]]  # an accuracy by its name: of the seeds that have it


def _results(group: Group) -> tuple[str, _Numbers]:
    """Split and steps in words, and the accuracies: of the best checkpoints, or of the last."""
    done = [run for run in group.runs if run.state.kind == "finished"]
    finals = [run.final for run in done if run.final is not None]
    if finals and len(finals) == len(done):
        steps = ", ".join(str(final.step) for final in finals)
        return f"{finals[0].split}, best step {steps}", _numbers([f.metrics for f in finals])
    last = [run.evaluations[-1] for run in group.runs if run.evaluations]
    steps = ", ".join(str(each["step"] + 1) for each in last)
    split = group.runs[0].config["evaluation"].get("split")
    return (f"{split}, step {steps}" if last else "-"), _numbers(last)


def _last(group: Group) -> _Numbers:
    """The accuracies of the last evaluations, on the split that chooses the best checkpoint."""
    return _numbers([run.evaluations[-1] for run in group.runs if run.evaluations])


def _numbers(results: Sequence[dict[str, Any]]) -> _Numbers:
    k = max((_most_samples(each) for each in results), default=0)
    columns = [_accuracies(each, k) for each in results]
    names = dict.fromkeys(name for column in columns for name in column)
    numbers = {
        name: [c[name] for c in columns if isinstance(c.get(name), int | float)] for name in names
    }
    return {name: values for name, values in numbers.items() if values}


def _by_setting(alike: Sequence[Group]) -> str:
    """Markdown: for each accuracy a table, with a row per method and a column per setting."""
    # Runs that others begin from, with a setting that no other method has, are no column.
    begun = {str(run.config.get("init_from") or "").rstrip("/") for g in alike for run in g.runs}
    number = collections.Counter(group.setting for group in alike)
    shown = [
        group
        for group in alike
        if number[group.setting] > 1 or not any(str(run.folder) in begun for run in group.runs)
    ]
    parts = _one_by_setting(shown, [_results(group)[1] for group in shown], "")
    if any(run.final is not None for group in shown for run in group.runs):
        last = [_last(group) for group in shown]
        split = shown[0].runs[0].config["evaluation"].get("split")
        parts += _one_by_setting(shown, last, f" of the last step, {split}")
    return "\n\n".join([*parts, *_unlike(shown)]) or markdown([])


def _unlike(shown: Sequence[Group]) -> list[str]:
    """What differs between methods that stand in one column, besides their losses."""
    notes = []
    for setting in dict.fromkeys(group.setting for group in shown):
        column = [group for group in shown if group.setting == setting]
        fields = [groups.flat(groups.numbers(group.runs[0].config)) for group in column]
        for name in dict.fromkeys(name for each in fields for name in each):
            values = [each.get(name) for each in fields]
            if any(value != values[0] for value in values) and not name.startswith("loss."):
                each = "; ".join(
                    f"{group.method} {'another' if name == 'init_from' else value}"
                    for group, value in zip(column, values, strict=True)
                )
                notes.append(f"In the column {setting or 'else'} {name} differs: {each}.")
    return notes


def _one_by_setting(shown: Sequence[Group], numbers: Sequence[_Numbers], what: str) -> list[str]:
    """A table for each accuracy."""
    settings, parts = {group.setting for group in shown}, []
    for name in dict.fromkeys(name for each in numbers for name in each):
        rows: dict[str, dict[str, str]] = {}
        for group, each in zip(shown, numbers, strict=True):
            row = rows.setdefault(group.method, {"method": group.method})
            column = group.setting or (name if len(settings) == 1 else "else")
            row[column] = _over_seeds(each[name]) if name in each else "-"
        parts.append(f"**{name}**{what}\n\n{markdown(list(rows.values()))}")
    return parts


def _over_seeds(values: Sequence[float]) -> str:
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.3f} ± {spread:.3f}"
