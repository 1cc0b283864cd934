"""The log of a run: metrics, rollouts, the trackers that show them, and the progress line.

| on a disk             | in a bucket              | holds                                    |
|-----------------------|--------------------------|------------------------------------------|
| metrics.jsonl         | metrics/STEP.jsonl, ...  | a line per event: {"step", "phase", ...} |
| rollouts.jsonl        | rollouts/STEP.jsonl, ... | a line per rollout, as text              |
| events.out.tfevents.* | the same                 | the metrics, for TensorBoard             |

A line on a disk is there as soon as it is written. Objects in a bucket cannot be appended to, so
there the lines are in segments: metrics/000050.jsonl begins with a line of step 50, and the next
segment begins after the next `flush`. `read_jsonl(workdir / "metrics.jsonl")` reads either. A run
whose folder was copied from the one to the other gets the other form when it goes on.
"""

import contextlib
import errno
import itertools
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from qlog.console import ProgressLine, say, time_text
from qlog.errors import Stop
from qlog.runs.folder import METRICS
from qlog.runs.trackers import Ending, Harmless, TensorBoard, Tracker, WandB
from qlog.runs.uploads import Uploads
from qlog.storage import json_lines, paths, strict_json

_SEGMENT = re.compile(r"\d{6,}\.jsonl")  # the name of one in a bucket


class RunLog:
    """Writes the log of one run; on processes other than process 0 it writes nothing.

    As a context manager it tells the trackers, when it is left, how the run ended.

    A resumed run goes on from a checkpoint, and may do again steps that are in the log already. So
    it first drops the lines of these steps. An evaluation of the checkpoint that it resumes from
    stays, and is not written a second time.

    Args:
      workdir: an existing folder, or one in a bucket.
      start_step: the step that training resumes from.
      config: of the run: its steps, for the time left, and which trackers there are.
      is_lost: whether another run has taken the workdir: then nothing is uploaded any more.
    """

    def __init__(
        self,
        workdir: paths.Path | pathlib.Path,
        start_step: int,
        config: ConfigDict,
        is_lost: Callable[[], bool] = lambda: False,
    ):
        workdir = paths.Path(workdir)
        self._is_active = jax.process_index() == 0
        self._total_steps, self._start_step = config.train.steps, start_step
        self._is_interrupted = False
        self._line = ProgressLine()
        self._step, self._phase = start_step, ""  # what is under way
        # When the first step was done. That step compiles, so the time left is reckoned without it.
        self._started: float | None = None
        if not self._is_active:
            return
        self._uploads = Uploads(is_lost) if paths.is_remote(workdir) else None
        for name in ("rollouts", "metrics"):
            _adopt(workdir / f"{name}.jsonl")
        kept = {
            name: _drop_from(workdir / f"{name}.jsonl", start_step)
            for name in ("rollouts", "metrics")
        }
        self._files: dict[str, _File | _Segments] = {
            name: _File(workdir / f"{name}.jsonl")
            if self._uploads is None
            else _Segments(workdir / name, self._uploads)
            for name in kept
        }
        # Evaluations of the checkpoint that training resumes from, (step, phase).
        self._known = {
            (line["step"], line["phase"])
            for line in kept["metrics"]
            if line["step"] == start_step - 1 and line["phase"] != "train"
        }
        self._tensorboard = TensorBoard(workdir, start_step, self._uploads)
        self._trackers: list[Tracker] = [self._tensorboard]
        if project := config.logging.wandb:
            save = lambda text: self._save(workdir / "wandb.json", text)
            open_ = lambda: WandB(project, workdir, start_step, config, save)
            wandb = Harmless(open_, "W&B")
            # What is in the log already: W&B takes what it has not got. TensorBoard has it all.
            for line in kept["metrics"]:
                wandb.scalars(line["step"], line["phase"], numbers(line))
            for step, lines in itertools.groupby(kept["rollouts"], lambda line: line["step"]):
                wandb.rollouts(step, [_without_step(line) for line in lines])
            self._trackers.append(wandb)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        ending = Ending.FINISHED if kind is None else Ending.FAILED
        if self._is_interrupted or (kind is not None and issubclass(kind, Stop)):
            ending = Ending.INTERRUPTED
        self.close(ending)

    def interrupted(self) -> None:
        """Says that a signal ends this start of the run, without an exception."""
        self._is_interrupted = True

    def scalars(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        """Numbers of one step; `phase` is train or an evaluation split."""
        if not self._is_active or (step, phase) in self._known:
            return
        self._write("metrics", {"step": step, "phase": phase, **values})
        for tracker in self._trackers:
            tracker.scalars(step, phase, values)

    def rollouts(self, step: int, rollouts: Sequence[Mapping[str, Any]]) -> None:
        """Rollouts of one step, as text."""
        if self._is_active:
            for rollout in rollouts:
                self._write("rollouts", {"step": step, **rollout})
            for tracker in self._trackers:
                tracker.rollouts(step, rollouts)

    def begins(self, step: int) -> None:
        """Shows that the first step of this start is under way: it compiles, so it takes long."""
        if self._is_active:
            self._phase = "compiling"
            text = f"step {step + 1}/{self._total_steps}  compiling, which later steps do not"
            self._line.begin(text, share=step / self._total_steps)

    def doing(self, what: str) -> None:
        """Shows what the step under way does, where it takes long.

        Args:
          what: as `Interrupts.beat` takes it.
        """
        if not self._is_active:
            return
        text = f"step {self._step + 1}/{self._total_steps}  {what}"
        phase, before = what.partition(":")[0], self._phase
        self._phase = phase
        # Each phase of the first step compiles, and meanwhile nothing can be said.
        if self._started is None and phase != before:
            self._line.begin(text, share=self._step / self._total_steps)
        else:
            self._line.beat(text, share=self._step / self._total_steps)

    def progress(self, step: int, text: str) -> None:
        """Shows how far the run is; `text` is about its last step."""
        if not self._is_active:
            return
        now, done = time.monotonic(), step + 1 - self._start_step
        self._started, self._step = self._started or now, step + 1
        line = f"step {step + 1}/{self._total_steps}"
        if done > 1 and step + 1 < self._total_steps:
            left = (now - self._started) / (done - 1) * (self._total_steps - step - 1)
            line += f"  {time_text(left, whole=True)} left"
        is_last = step + 1 == self._total_steps
        # The first one for good: it compiled, and shows how the run begins.
        self._line.show(
            f"{line}  {text}", share=(step + 1) / self._total_steps, force=done == 1 or is_last
        )

    def flush(self) -> None:
        """Brings all that was written into the workdir; call it before a checkpoint is saved.

        If a bucket does not take it within a minute, it is kept and tried again.
        """
        if self._is_active:
            for file in self._files.values():
                file.flush()
            for tracker in self._trackers:
                tracker.flush()
            if self._uploads:
                self._uploads.flush()

    def close(self, ending: Ending = Ending.FINISHED) -> None:
        """Flushes, and ends the writers."""
        if self._is_active:
            # A stack, from its end: where one of them fails, on a full disk, all others are closed.
            with contextlib.ExitStack() as stack:
                stack.callback(self._tensorboard.remove_scratch)
                if self._uploads:
                    stack.callback(self._uploads.close)
                for tracker in reversed(self._trackers):
                    stack.callback(tracker.close, ending)
                for file in self._files.values():
                    stack.callback(file.close)

    def _save(self, path: paths.Path, text: str) -> None:
        """Writes a small file; in a bucket with the next upload, so that no step waits for it."""
        if self._uploads is None:
            paths.write(path, text)
        else:
            self._uploads.put(path, [text])

    def _write(self, name: str, line: Mapping[str, Any]) -> None:
        self._files[name].write(line["step"], json_lines.line(strict_json.finite(line)))


# ---- Lines on a disk, and in a bucket ----


class _File:
    """Lines appended to a file on a disk; other processes see each at once (line buffering).

    Raises:
      PassingError: of each method: the disk does not take it, or the file is not there any more.
    """

    def __init__(self, path: paths.Path):
        self._path = path
        with paths.writing(path):
            self._file = open(path, "a", encoding="utf-8", buffering=1)

    def write(self, step: int, line: str) -> None:
        with paths.writing(self._path):
            # An open file can be written after it, or its whole folder, was removed: into nothing.
            if not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
                raise FileNotFoundError(errno.ENOENT, "another file has taken its place")
            self._file.write(line)

    def flush(self) -> None:
        with paths.writing(self._path):
            self._file.flush()

    def close(self) -> None:
        with paths.writing(self._path):
            self._file.close()


class _Segments:
    """Lines in a bucket: whole objects FOLDER/STEP.jsonl, of which the last one is open.

    An open segment is uploaded again, whole, when it has grown. `flush` closes it, so an upload is
    as long as what was logged since the last checkpoint, and not as the whole run.
    """

    def __init__(self, folder: paths.Path, uploads: Uploads):
        self._folder, self._uploads = folder, uploads
        # The last segment, which a resumed run may go on with.
        self._name, self._lines, self._is_open = "", [], False
        names = _segments(folder)
        if names:
            self._name, self._lines = names[-1], [paths.read(folder / names[-1])]

    def write(self, step: int, line: str) -> None:
        name = f"{step:06d}.jsonl"
        # After a flush, lines of the same step (an evaluation's) go to the segment of that name,
        # since a new one would take its place.
        if not self._is_open and name != self._name:
            self._name, self._lines = name, []
        self._is_open = True
        self._lines.append(line)
        self._uploads.put(self._folder / self._name, self._lines)

    def flush(self) -> None:
        self._is_open = False

    def close(self) -> None:
        self.flush()


def _without_step(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "step"}


# ---- Reading, and dropping what will be written again ----


def read_jsonl(path: paths.Path | pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, or of its segments in a bucket; [] where there is neither.

    Lines that are damaged are left out, and so is a last line that a crash has cut short.
    """
    path = paths.Path(path)
    found = []
    with contextlib.suppress(FileNotFoundError):
        found = _read(path).objects
    folder = path.with_suffix("")
    # Both: of a run that was copied, and went on before versions that adopt the other form.
    return found + [line for name in _segments(folder) for line in _read(folder / name).objects]


def read_events(workdir: paths.Path | pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics: {"step", "phase", ...}; [] where there are none."""
    return [line for line in read_jsonl(paths.Path(workdir) / METRICS) if _is_of(line, _EVENT)]


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an event by name, all else left out. Those not finite are text in the log."""
    found = {}
    for name, value in line.items():
        is_number = type(value) in (int, float) or value in ("nan", "inf", "-inf")
        if is_number and name not in _EVENT:
            with contextlib.suppress(OverflowError):  # a whole number of hundreds of digits
                found[name] = float(value)
    return found


# What a line must have: names with their types.
_EVENT: dict[str, type] = {"step": int, "phase": str}
_ROLLOUT: dict[str, type] = {"step": int}


def _is_of(line: Mapping[str, Any], needs: Mapping[str, type]) -> bool:
    """Whether the line has all that `needs` names, each of its type (True is no int)."""
    return all(type(line.get(name)) is kind for name, kind in needs.items())


class _Lines(NamedTuple):
    """What a log holds."""

    objects: list[dict[str, Any]]
    damaged: list[tuple[int, str]]  # number of the line, from 1, and its text


def _read(path: paths.Path, needs: Mapping[str, type] | None = None) -> _Lines:
    """The lines of a file or a segment.

    Args:
      needs: what an object without counts as damaged, as `_is_of` takes it.
    """
    objects, damaged = [], []
    # Bytes that are no UTF-8 stay what they are when they are written again.
    text = paths.read(path, errors="surrogateescape")
    whole = text[: text.rfind("\n") + 1]
    for number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        value = _event(line)
        if value is not None and _is_of(value, needs or {}):
            objects.append(value)
        elif number <= whole.count("\n"):  # else a crash has cut it short
            damaged.append((number, line))
    return _Lines(objects, damaged)


def _event(line: str) -> dict[str, Any] | None:
    """The object of a line; None of one that is damaged."""
    try:
        value = json.loads(line)
        json_lines.line(value).encode()  # surrogates, such as bytes that were no UTF-8
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _segments(folder: paths.Path) -> list[str]:
    """The names of a log's segments in a bucket, in order; other objects there are not ours."""
    return [name for name in paths.names(folder) if _SEGMENT.fullmatch(name)]


def _adopt(path: paths.Path) -> None:
    """Gives a log that was copied between a disk and a bucket the form that it has here.

    Args:
      path: metrics.jsonl and the like, of a run whose steps in one form come before or after all
        those in the other.
    """
    folder = path.with_suffix("")
    names = _segments(folder)
    is_remote = paths.is_remote(path)
    other_form = [path] if is_remote else [folder / name for name in names]
    if not any(map(paths.exists, other_form)):
        return
    adopted = folder / f"{0:06d}.jsonl" if is_remote else path
    parts = [*(folder / name for name in names), path]
    paths.write(adopted, _joined(parts))
    for part in parts:
        if part != adopted:
            paths.remove(part)


def _joined(files: Sequence[paths.Path]) -> bytes:
    """The lines of logs, the earliest step first; damaged ones stay, behind the one before them."""
    placed: list[tuple[int, str]] = []
    for file in filter(paths.exists, files):
        # What another file has, too: this was begun before, and did not come to its end.
        known = {line for _, line in placed}
        step = 0
        for line in json_lines.split(paths.read(file, errors="surrogateescape")):
            if (event := _event(line)) and _is_of(event, _ROLLOUT):
                step = event["step"]
            if line not in known:
                placed.append((step, line))
    placed.sort(key=lambda entry: entry[0])
    return "".join(f"{line}\n" for _, line in placed).encode(errors="surrogateescape")


def _drop_from(path: paths.Path, step: int) -> list[dict[str, Any]]:
    """Drops the lines of `step` and later steps, which a resumed run writes again.

    Damaged lines are set aside, in a file next to it, and named.

    Returns:
      The lines kept; in a bucket, those of the last segment.
    """
    if not paths.is_remote(path):
        return _keep_before(path, path, step) if paths.exists(path) else []
    folder = path.with_suffix("")
    # From the last segment backwards, to the first one with a line that stays: those before it are
    # of earlier steps only, and are not read.
    for name in reversed(_segments(folder)):
        first_step = int(name.partition(".")[0])
        if first_step < step and (kept := _keep_before(path, folder / name, step)):
            return kept
        paths.remove(folder / name)
    return []


def _keep_before(log: paths.Path, file: paths.Path, step: int) -> list[dict[str, Any]]:
    """The lines of a file that are of steps before `step`; it holds them, and no others, then.

    Args:
      log: metrics.jsonl and the like, next to which damaged lines are set aside.
    """
    lines = _read(file, _EVENT if log.name == METRICS else _ROLLOUT)
    kept = [line for line in lines.objects if line["step"] < step]
    if lines.damaged:
        aside = log.with_name(f"{log.name}.damaged")
        before = paths.read(aside, errors="surrogateescape") if paths.exists(aside) else ""
        text = before + "".join(f"{line}\n" for _, line in lines.damaged)
        paths.write(aside, text.encode(errors="surrogateescape"))
        numbers = ", ".join(str(number) for number, _ in lines.damaged[:5])
        more = " and more" if len(lines.damaged) > 5 else ""
        say(f"{file}: no events in line {numbers}{more}: set aside in {aside.name}")
    if not paths.is_remote(file) or lines.damaged or len(kept) < len(lines.objects):
        paths.write(file, "".join(map(json_lines.line, kept)))
    return kept
