"""Runs from their folders, on a disk or in a bucket, while they may still be writing.

Nothing is written, and no accelerator is touched. A file that is not there yet, or is cut short, is
left out and noted. A run is a folder with qlog's config.json, whatever its name.
"""

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from qlog.errors import ConfigError, summary
from qlog.grading import accuracy
from qlog.report.records import Evaluation, Run, State
from qlog.runs import folder as names
from qlog.runs import ownership
from qlog.runs.log import read_events, read_jsonl
from qlog.storage import json_lines, paths
from qlog.storage.paths import Path

_DEPTH = 4  # folders below a named one in which runs are looked for
# Folders of a run, or of nothing of ours: a walk through them finds no run.
_SKIPPED = {"checkpoints", "samples", "profile", "export", "metrics", "rollouts", "__pycache__"}
_FILES = (".json", ".jsonl", ".md", ".png", ".svg", ".html", ".csv", ".tex", ".txt", ".log")
_SILENT = 120.0  # seconds without a beat (every 10 s) after which a run is called silent
_MOST_DIGITS = 18  # of a step
_STOPS = (0, 129, 130, 143)  # exit status of a run that SIGHUP, Ctrl-C or SIGTERM ended


def find(places: Iterable[str]) -> list[Path]:
    """The folders of all runs in these places, each once, in the order of the places.

    Args:
      places: folders of runs, or folders above them; gs:// and s3:// too.

    Raises:
      ConfigError: a place that cannot be named so, or whose client is not installed.
    """
    found: dict[str, Path] = {}
    for place in places:
        for folder in _walk(paths.parse(place, "WORKDIR"), _DEPTH):
            found.setdefault(str(folder), folder)
    return list(found.values())


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    inside = paths.names(folder)
    if names.CONFIG in inside and names.is_config(_json(folder / names.CONFIG)):
        yield folder
        return
    if depth:
        for name in inside:
            # Asking a bucket whether a name is a folder takes a request: not of what is a file.
            if name not in _SKIPPED and not name.startswith(".") and not name.endswith(_FILES):
                yield from _walk(folder / name, depth - 1)


def read(folders: Sequence[Path]) -> list[Run]:
    """All that is known of the runs in these folders."""
    shown = short_names([str(folder) for folder in folders])
    return [read_run(folder, name) for folder, name in zip(folders, shown, strict=True)]


def short_names(folders: Sequence[str]) -> list[str]:
    """The folders' last parts, as many of them as it takes to tell the folders apart."""
    parts = [folder.rstrip("/").split("/") for folder in folders]
    for length in range(1, max(map(len, parts), default=1) + 1):
        shown = ["/".join(part[-length:]) for part in parts]
        if len(set(shown)) == len(shown):
            return shown
    return list(folders)


def read_run(folder: Path, name: str) -> Run:
    """All that is known of the run in `folder`."""
    notes: list[str] = []
    config = _json(folder / names.CONFIG)
    assert names.is_config(config), f"{folder} holds no run: `find` names the folders that do"
    lines = read_events(folder)
    steps = _once([line for line in lines if line["phase"] == "train"])
    split = config["evaluation"].get("split", "validation")
    evaluations = _once([line for line in lines if line["phase"] == split])
    scores = _scores(folder)
    final = _evaluation(folder, names.FINAL, "final", notes) or _evaluation(
        folder, "evaluation_test.json", "test", notes
    )
    base = _evaluation(folder, "evaluation_test_base.json", "test_base", notes)
    seconds = _json(folder / "seconds.json")
    return Run(
        folder=folder,
        name=name,
        config=config,
        state=_state(folder, config, steps, final is not None or base is not None),
        steps=steps,
        evaluations=evaluations,
        scores=scores,
        final=final,
        base=base,
        seconds=float(seconds) if _is_number(seconds) else None,
        notes=tuple(notes),
    )


def rollouts(folder: Path) -> list[dict[str, Any]]:
    """The rollouts that a run wrote down, as its rollouts.jsonl has them."""
    lines = read_jsonl(folder / names.ROLLOUTS)
    return [line for line in lines if type(line.get("step")) is int]


def _once(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines by step; of a step that was done again (in a bucket, after a kill) the last."""
    by_step = {line["step"]: line for line in lines}
    return [by_step[step] for step in sorted(by_step)]


def _scores(folder: Path) -> dict[int, float]:
    """The scores that compare with the newest one, by step."""
    found = _json(folder / names.SCORES)
    if not isinstance(found, dict):
        return {}
    scores = {
        int(step): score
        for step, score in found.items()
        # `int` raises for texts of many thousand digits; no step has more than these.
        if step.isdecimal()
        and len(step) <= _MOST_DIGITS
        and isinstance(score, dict)
        and _is_number(score.get("value"))
    }
    if not scores:
        return {}
    newest = scores[max(scores)].get("of")
    return {step: score["value"] for step, score in scores.items() if score.get("of") == newest}


def _is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold: JSON has whole numbers of any size."""
    if type(value) is not int and type(value) is not float:
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _whole(value: Any) -> int:
    """A whole number of a file that anything may be in; 0 where it has another type."""
    return int(value) if _is_number(value) else 0


# ---- Where a run is ----


def _state(
    folder: Path, config: dict[str, Any], steps: list[dict[str, Any]], is_evaluated: bool
) -> State:
    total = _whole(config["train"].get("steps"))
    done = steps[-1]["step"] + 1 if steps else 0
    results = _json(folder / names.RESULTS)
    if isinstance(results, dict):
        return State("finished", _whole(results.get("step")) or done, total, "")
    owner = ownership.look(folder)
    done = max(done, _whole(owner.get("step")))
    if not owner:
        return State("evaluated" if is_evaluated and not steps else "new", done, total, "")
    # ---- It has told of its end ----
    if owner.get("released"):
        if owner.get("status", 0) in _STOPS:
            return State("stopped", done, total, "")
        return State("failed", done, total, str(owner.get("error") or "no reason was written"))
    # ---- It has not: it runs, or was killed ----
    if ownership.is_gone(owner):
        return State("failed", done, total, "its process is gone; the same command goes on")
    # Clocks of two hosts may differ, so that minutes are the least that can be told.
    age = time.time() - _whole(owner.get("time"))
    return State("running" if age < _SILENT else "silent", done, total, "")


# ---- Evaluations ----


def _evaluation(folder: Path, file: str, samples: str, notes: list[str]) -> Evaluation | None:
    """The evaluation that FILE has the numbers of; None where there is none, or not yet whole.

    Args:
      samples: stem of its file in samples/.
      notes: gets a sentence for what cannot be read.
    """
    record = _json(folder / file)
    if record is None:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("metrics"), dict):
        notes.append(f"{folder / file} holds no evaluation.")
        return None
    settings = record.get("evaluation")
    settings = settings if isinstance(settings, dict) else {}
    ids, questions = _questions(folder / "samples" / f"{samples}.jsonl", settings, notes)
    return Evaluation(
        split=str(record.get("split", "")),
        step=_whole(record["step"]) if _is_number(record.get("step")) else None,
        source=str(record.get("source", "")),
        settings=settings,
        metrics=record["metrics"],
        ids=ids,
        questions=questions,
    )


def _questions(
    samples: Path, settings: dict[str, Any], notes: list[str]
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Ids and accuracies of the questions: from their own file, or computed from the samples."""
    found = _json(names.questions(samples))
    if isinstance(found, dict) and _are_texts(found.get("ids")):
        size = len(found["ids"])
        values = {name: each for name, each in found.items() if name != "ids"}
        if all(_are_numbers(each, size) for each in values.values()):
            accuracies = {name: np.array(each, float) for name, each in values.items()}
            return tuple(found["ids"]), accuracies
    # An older run, or a file that is being written.
    try:
        rows = [json.loads(line) for line in json_lines.split(paths.read(samples))]
        values = accuracy.per_question(rows, _whole(settings.get("rollouts_per_prompt")) or 16)
    except FileNotFoundError:
        notes.append(f"{samples} is not there: its questions cannot be compared one by one.")
        return (), {}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OSError) as error:
        reason = summary(error)
        notes.append(f"{samples} cannot be read ({reason}): its questions are left out.")
        return (), {}
    return tuple(row["id"] for row in rows), values


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _are_numbers(value: Any, size: int) -> bool:
    return isinstance(value, list) and len(value) == size and all(map(_is_number, value))


def _json(file: Path) -> Any:
    """A file's content; None where there is no such file, or it is not whole."""
    try:
        return json.loads(paths.read(file))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from None
