"""What a run leaves behind and shows: metrics, rollouts, events, a progress line, a table."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Iterable, Mapping

import jax
from rich.console import Console
from rich.table import Table


class RunLog:
    """Writers of one run's workdir; on processes other than the first, all of it is silent.

    metrics.jsonl: one object per event, {"step", "phase", name: value}. rollouts.jsonl: one per
    rollout. events.out.tfevents.*: the same scalars for TensorBoard. A resumed run first drops
    the lines of steps that will be done again.

    Args:
      workdir: an existing folder.
      start_step: the step that training resumes from.
      total_steps: for the time left.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int, total_steps: int):
        self._active = jax.process_index() == 0
        self._total, self._first = total_steps, start_step
        self._started = self._printed = None  # when the first step was done: it compiles
        if not self._active:
            return
        from tensorboardX import SummaryWriter  # slow to import; only the first process writes

        self._files = {}
        for name in ("metrics", "rollouts"):
            path = workdir / f"{name}.jsonl"
            _drop_from(path, start_step)
            self._files[name] = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(workdir), purge_step=start_step)

    def scalars(self, step: int, phase: str, values: Mapping[str, float]):
        """Numbers of one step; `phase` is train or an evaluation split."""
        if not self._active:
            return
        self._write("metrics", {"step": step, "phase": phase, **values})
        for name, value in values.items():
            self._events.add_scalar(f"{phase}/{name}", value, step)

    def rollouts(self, step: int, rows: Iterable[Mapping]):
        """Rollouts of one step, as text."""
        if self._active:
            for row in rows:
                self._write("rollouts", {"step": step, **row})

    def progress(self, step: int, text: str, every: float = 10.0):
        """One line: rewritten in place on a terminal, else printed every `every` seconds."""
        if not self._active:
            return
        now, done = time.monotonic(), step + 1 - self._first
        self._started = self._started or now
        line = f"step {step + 1}/{self._total}  {text}"
        if done > 1:
            left = (now - self._started) / (done - 1) * (self._total - step - 1)
            line += f"  {_clock(left)} left"
        last = step + 1 == self._total
        if sys.stdout.isatty():
            print(f"\r\x1b[2K{line}", end="\n" if last else "", flush=True)
        elif last or done == 1 or now - self._printed >= every:
            self._printed = now
            print(line, flush=True)

    def flush(self):
        if self._active:
            for file in self._files.values():
                file.flush()
            self._events.flush()

    def close(self):
        if self._active:
            for file in self._files.values():
                file.close()
            self._events.close()

    def _write(self, name: str, row: Mapping):
        clean = {k: _finite(v) for k, v in row.items()}
        self._files[name].write(json.dumps(clean, ensure_ascii=False) + "\n")


def say(text: str):
    """A line for the user, from the first process alone, on a line of its own."""
    if jax.process_index() == 0:
        print(f"\r\x1b[2K{text}" if sys.stdout.isatty() else text, flush=True)


def show_table(title: str, rows: Mapping[str, object]):
    """A two-column table for the user."""
    if jax.process_index() == 0:
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(name, str(value))
        Console(width=None if sys.stdout.isatty() else 110).print(table)


def read_jsonl(path: pathlib.Path) -> list[dict]:
    """Rows of a JSON-lines file; a last line cut short by a crash is left out."""
    rows = []
    if path.exists():
        with path.open(encoding="utf-8") as lines:  # str.splitlines would also split at U+2028
            for line in lines:
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    break
    return rows


def _drop_from(path: pathlib.Path, step: int):
    """Keeps the rows of earlier steps: a resumed run writes the others again."""
    if path.exists():
        kept = [row for row in read_jsonl(path) if row["step"] < step]
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
        fresh.replace(path)


def _finite(value):
    """JSON has no NaN or infinity: they become strings, and stay visible."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
