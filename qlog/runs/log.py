"""What a run leaves behind and shows: metrics, rollouts, events, a progress line, a table."""

import json
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping

import jax
from rich.console import Console
from rich.table import Table

from qlog.storage import paths, strict_json
from qlog.console import ProgressLine
from qlog.console import clock


class RunLog:
    """Writers of one run's workdir; on processes other than the first, all of it is silent.

    metrics.jsonl: one object per event, {"step", "phase", name: value}. rollouts.jsonl: one per
    rollout. events.out.tfevents.*: the same scalars for TensorBoard. A resumed run first drops
    the lines of steps that will be done again, and writes an evaluation done again only once.

    On a disk each line is there as soon as it is written. In a bucket, where nothing can be
    appended, the lines are in segments: metrics/000050.jsonl begins with a row of step 50, and
    the next one after the next `flush`. A thread uploads what is new, every minute and at once
    when flushed. `read_jsonl(workdir / "metrics.jsonl")` reads either.

    Args:
      workdir: an existing folder, or one in a bucket.
      start_step: the step that training resumes from.
      total_steps: for the time left.
      is_lost: whether another run has the workdir by now: then nothing is uploaded any more.
    """

    def __init__(
        self,
        workdir: paths.Path | pathlib.Path,
        start_step: int,
        total_steps: int,
        is_lost: Callable[[], bool] = lambda: False,
    ):
        self._active = jax.process_index() == 0
        self._total, self._first = total_steps, start_step
        self._started, self._line = (
            None,
            ProgressLine(),
        )  # when the first step was done: it compiles
        if not self._active:
            return
        from tensorboardX import SummaryWriter  # slow to import; only the first process writes

        self._uploads = _Uploads(is_lost) if paths.is_remote(workdir) else None
        kind = _File if self._uploads is None else _Segments
        self._files, rows = {}, []
        for name in ("rollouts", "metrics"):
            rows = _drop_from(workdir / f"{name}.jsonl", start_step)
            self._files[name] = kind(workdir / f"{name}.jsonl", self._uploads)
        # Evaluations of the checkpoint that training resumes from.
        self._known = {
            (row["step"], row["phase"])
            for row in rows
            if row["step"] == start_step - 1 and row["phase"] != "train"
        }
        self._scratch = None
        if self._uploads is None:
            self._events = SummaryWriter(os.fspath(workdir), purge_step=start_step, flush_secs=60)
        else:
            self._scratch = pathlib.Path(tempfile.mkdtemp(prefix="qlog_events_"))
            self._events = SummaryWriter(str(self._scratch), purge_step=start_step)
            self._uploads.follow(self._scratch, workdir, self._events.flush)

    def scalars(self, step: int, phase: str, values: Mapping[str, float]):
        """Numbers of one step; `phase` is train or an evaluation split."""
        if not self._active or (step, phase) in self._known:
            return
        self._write("metrics", {"step": step, "phase": phase, **values})
        for name, value in values.items():
            self._events.add_scalar(f"{phase}/{name}", value, step)

    def rollouts(self, step: int, rows: Iterable[Mapping]):
        """Rollouts of one step, as text."""
        if self._active:
            for row in rows:
                self._write("rollouts", {"step": step, **row})

    def progress(self, step: int, text: str):
        """The line of the run, `ProgressLine`."""
        if not self._active:
            return
        now, done = time.monotonic(), step + 1 - self._first
        self._started = self._started or now
        line = f"step {step + 1}/{self._total}  {text}"
        if done > 1:
            left = (now - self._started) / (done - 1) * (self._total - step - 1)
            line += f"  {clock(left)} left"
        self._line.show(line, force=done == 1 or step + 1 == self._total)

    def flush(self):
        """All that was written is in the workdir, or, of a bucket that fails for a minute, is kept and
        tried again; call it before a checkpoint is saved."""
        if self._active:
            for file in self._files.values():
                file.flush()
            self._events.flush()
            if self._uploads:
                self._uploads.flush()

    def close(self):
        if self._active:
            for file in self._files.values():
                file.close()
            self._events.close()
            if self._uploads:
                self._uploads.close()
                shutil.rmtree(self._scratch, ignore_errors=True)

    def _write(self, name: str, row: Mapping):
        line = strict_json.dumps(row, ensure_ascii=False) + "\n"
        self._files[name].write(row["step"], line)


# ---- Lines on a disk, and in a bucket ----


class _File:
    """Lines appended to a file on a disk; another process sees each at once."""

    def __init__(self, path: paths.Path | pathlib.Path, uploads: None):
        self._file = open(path, "a", encoding="utf-8", buffering=1)

    def write(self, step: int, line: str):
        self._file.write(line)

    def flush(self):
        self._file.flush()

    def close(self):
        self._file.close()


class _Segments:
    """Lines in a bucket: whole objects FOLDER/STEP.jsonl, the last of them open."""

    def __init__(self, path: paths.Path, uploads: "_Uploads"):
        self._folder, self._uploads = path.with_suffix(""), uploads
        self._name, self._lines, self._is_open = "", [], False
        names = paths.names(self._folder)
        if names:  # the next rows may be of the same step
            self._name, self._lines = names[-1], [paths.read(self._folder / names[-1])]

    def write(self, step: int, line: str):
        name = f"{step:06d}.jsonl"
        if not self._is_open and name != self._name:
            self._name, self._lines = name, []
        self._is_open = True
        self._lines.append(line)
        self._uploads.put(self._folder / self._name, self._lines)

    def flush(self):
        self._is_open = False

    def close(self):
        self.flush()


class _Uploads:
    """Uploads objects from a thread, the newest content of each; what fails is kept and tried again."""

    INTERVAL = 60.0  # seconds between uploads that nobody waits for
    PATIENCE = 60.0  # seconds that `flush` waits

    def __init__(self, is_lost: Callable[[], bool]):
        self._is_lost = is_lost
        self._lock = threading.Condition()
        self._new: dict[paths.Path, list[str]] = {}  # lists that others append to
        self._followed, self._sizes = None, {}
        self._asked = self._done = 0  # flushes
        self._is_ill = self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def put(self, path: paths.Path, lines: list[str]) -> None:
        """`lines` is the content, now and after whatever is appended to it."""
        with self._lock:
            self._new[path] = lines

    def follow(self, folder: pathlib.Path, target: paths.Path, flush) -> None:
        """Files of a local folder go along whenever they have grown."""
        self._followed = folder, target, flush

    def flush(self) -> bool:
        """Uploads all; whether that was done in time."""
        with self._lock:
            self._asked += 1
            wanted = self._asked
            self._lock.notify_all()
            return self._lock.wait_for(lambda: self._done >= wanted, self.PATIENCE)

    def close(self) -> None:
        """Uploads all and ends; what the bucket still refuses is kept in a local folder."""
        done = self.flush()
        with self._lock:
            self._is_closed = True
            self._lock.notify_all()
        if done:
            self._thread.join()
            return
        with self._lock:
            left = {path: "".join(lines) for path, lines in self._new.items()}
        if left:
            kept = pathlib.Path(tempfile.mkdtemp(prefix="qlog_unsent_"))
            for path, text in left.items():
                (kept / f"{path.parent.name}_{path.name}").write_text(text, encoding="utf-8")
            say(f"{', '.join(map(str, left))} could not be uploaded: kept in {kept}")

    def _work(self):
        while True:
            with self._lock:
                self._lock.wait_for(
                    lambda: self._asked > self._done or self._is_closed, self.INTERVAL
                )
                wanted = self._asked
                if self._is_closed and wanted == self._done:
                    return
            try:
                self._upload()
            except Exception as error:  # each client has its own; a run does not end for its log
                if not self._is_ill:
                    say(
                        f"uploading fails ({type(error).__name__}: {error}); what was logged is kept, trying on"
                    )
                self._is_ill = True
                if self._is_closed:
                    return
                time.sleep(1.0)
                continue
            if self._is_ill:
                say("uploading works again")
            self._is_ill = False
            with self._lock:
                self._done = wanted
                self._lock.notify_all()

    def _upload(self):
        with self._lock:
            new = {path: (lines, len(lines)) for path, lines in self._new.items()}
        for path, (lines, count) in new.items():
            if self._is_lost():  # its objects have the names of ours
                return
            paths.write(path, "".join(lines[:count]))
            with self._lock:
                if len(lines) == count and self._new.get(path) is lines:
                    del self._new[path]
        if self._followed and not self._is_lost():
            folder, target, flush = self._followed
            flush()
            for file in folder.iterdir():
                data = file.read_bytes()
                if len(data) != self._sizes.get(file):
                    paths.write(target / file.name, data)
                    self._sizes[file] = len(data)


def read_jsonl(path: paths.Path | pathlib.Path) -> list[dict]:
    """Rows of a JSON-lines file, or of its segments in a bucket; [] where there is neither. A last
    line cut short by a crash is left out."""
    path = paths.Path(path)
    try:
        return _parse(paths.read(path))
    except FileNotFoundError:
        pass
    folder = path.with_suffix("")
    return [row for name in paths.names(folder) for row in _parse(paths.read(folder / name))]


def _parse(text: str) -> list[dict]:
    rows = []
    for line in text.split("\n"):  # str.splitlines would also split at U+2028
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the end, or a line cut short
    return rows


def _drop_from(path: paths.Path | pathlib.Path, step: int) -> list[dict]:
    """Keeps the rows of earlier steps, since a resumed run writes the others again; the rows kept, of
    a bucket those of the last segment."""
    path = paths.Path(path)
    if not paths.is_remote(path):
        kept = [row for row in read_jsonl(path) if row["step"] < step]
        if paths.exists(path):
            paths.write(path, _text(kept))
        return kept
    folder = path.with_suffix("")
    for name in reversed(paths.names(folder)):
        rows = _parse(paths.read(folder / name)) if int(name.partition(".")[0]) < step else []
        kept = [row for row in rows if row["step"] < step]
        if not kept:
            paths.remove(folder / name)
            continue
        if len(kept) < len(rows):  # a checkpoint was missed, or an evaluation came after it
            paths.write(folder / name, _text(kept))
        return kept
    return []


def _text(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
