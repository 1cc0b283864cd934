"""Where the numbers of a run are shown while it trains: TensorBoard, and Weights & Biases.

`RunLog` keeps the numbers themselves (metrics.jsonl); what is here only shows them. Process 0 has
trackers, other processes have none.
"""

import enum
import importlib
import json
import os
import pathlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ml_collections import ConfigDict

from qlog.config import schema
from qlog.console import say
from qlog.errors import summary
from qlog.runs.uploads import Uploads
from qlog.storage import paths, strict_json

if TYPE_CHECKING:
    import wandb


class Ending(enum.Enum):
    """How a start of a run ended."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"  # a signal: what was done is saved, and the same command resumes
    FAILED = "failed"  # an exception


class Tracker(Protocol):
    """What shows the numbers of a run. Steps count from 0, as in metrics.jsonl."""

    def scalars(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        """Numbers of one step; `phase` is train or an evaluation split."""
        ...

    def rollouts(self, step: int, rollouts: Sequence[Mapping[str, Any]]) -> None:
        """Rollouts of one step, as text: lines of rollouts.jsonl."""
        ...

    def flush(self) -> None:
        """Writes what is held back."""
        ...

    def close(self, ending: Ending) -> None:
        """Ends the writing."""
        ...


class TensorBoard:
    """Event files in the workdir.

    Written here and not in a thread of a library: such a thread dies at a full disk, and the run
    would wait for it without end.

    Args:
      uploads: of a workdir in a bucket; None of one on a disk.

    Raises:
      PassingError: of each method: the disk does not take it.
    """

    _INTERVAL = 60.0  # seconds in which events may be held back

    def __init__(self, workdir: paths.Path, start_step: int, uploads: Uploads | None):
        # Slow to import; only process 0 needs it.
        from tensorboardX.event_file_writer import EventsWriter

        # (Its names are made when it is imported, which no reader of types sees.)
        self._messages = importlib.import_module("tensorboardX.proto.event_pb2")

        # The writer appends, which a bucket cannot: there a local file is uploaded again.
        self._scratch: pathlib.Path | None = None
        if uploads is not None:
            self._scratch = pathlib.Path(tempfile.mkdtemp(prefix="qlog_events_"))
        self._folder = self._scratch or pathlib.Path(workdir)
        self._flushed = 0.0  # when, by time.monotonic(); the first events are shown at once
        self._is_closed = False
        with paths.writing(self._folder):
            self._events = EventsWriter(str(self._folder / "events"))
            # Hides what an earlier start wrote of the steps that are done again.
            started = self._messages.SessionLog(status=self._messages.SessionLog.START)
            self._events.write_event(self._messages.Event(step=start_step, session_log=started))
        if uploads is not None:
            uploads.follow(self._folder, workdir, self.flush)

    def scalars(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        event = self._messages.Event(step=step, wall_time=time.time())
        for name, value in values.items():
            event.summary.value.extend(scalar(f"{phase}/{name}", value).value)
        with paths.writing(self._folder):
            self._events.write_event(event)
        if time.monotonic() - self._flushed > self._INTERVAL:
            self.flush()

    def rollouts(self, step: int, rollouts: Sequence[Mapping[str, Any]]) -> None:
        """Shows none: they are in rollouts.jsonl."""

    def flush(self) -> None:
        self._flushed = time.monotonic()
        # The last upload comes after the writer was closed, which has written all.
        if not self._is_closed:
            with paths.writing(self._folder):
                self._events.flush()

    def close(self, ending: Ending) -> None:
        self._is_closed = True
        with paths.writing(self._folder):
            self._events.close()

    def remove_scratch(self) -> None:
        """Removes the local files of a bucket's events; after the last upload."""
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)


# ---- Weights & Biases ----

PATIENCE = 30.0  # seconds for an answer of W&B's server at the start of a run
_AT_THE_END = 10.0  # seconds for the last uploads: a preempted host may have little more
_FLUSH = 1.0  # seconds between writes of W&B's file


class WandB:
    """One W&B run, which the starts of a qlog run continue. What fails here never ends training.

    A phase (train, validation, rollouts) has its own step metric, PHASE/step: an evaluation is
    logged after the step that it evaluates, and W&B drops what comes late by its own counter.

    A resumed run does again the steps after its checkpoint. Their rows are in W&B already, where
    rows cannot be taken back, so they are not sent a second time. They hold the same numbers, since
    a run resumes bit for bit.

    The other way round, `RunLog` offers all lines that it keeps, and what W&B has not got is sent:
    rows that a kill cost, or those of a run that began without W&B. How far W&B got is what its
    server says (the run's summary), and offline, where no server can tell, the record in the
    workdir's wandb.json; there a kill may cost the rows of the last second.

    Args:
      project: "project" or "entity/project".
      start_step: the step that training resumes from. From 0 it is a new W&B run, since without a
        checkpoint the config may be another one.
      save: writes the text of wandb.json.
    """

    def __init__(
        self,
        project: str,
        workdir: paths.Path,
        start_step: int,
        config: ConfigDict,
        save: Callable[[str], None],
    ):
        self._save = save
        entity, _, name = project.rpartition("/")
        record = _read_record(workdir / "wandb.json") if start_step else None
        # In another project it is another run.
        if record is None or record["project"] != project:
            record = {"project": project, "id": uuid.uuid4().hex[:8], "steps": {}}
        self._record = record
        self._save(json.dumps(record))  # before anything is sent: a kill must not orphan the run
        # W&B appends to its files, so they are on a disk.
        self._scratch: str | None = None
        folder = os.environ.get("WANDB_DIR")
        if not folder and paths.is_remote(workdir):
            folder = self._scratch = tempfile.mkdtemp(prefix="qlog_wandb_")
        resolved = json.loads(schema.to_json(config))
        self._run = _start(
            project=name,
            entity=entity or None,
            id=record["id"],
            resume="allow",
            dir=folder or os.fspath(workdir),
            name=workdir.name,
            tags=[str(resolved[section]["name"])[:64] for section in ("data", "loss")],
            config=resolved | {"workdir": str(workdir)},
            allow_val_change=True,  # of what may change in a resumed run
        )
        # {phase: its last step in W&B}, of earlier starts of this run
        self._done: dict[str, int] = dict(record["steps"])
        if not self._run.offline:
            known = dict(self._run.summary)
            self._done = {
                key.removesuffix("/step"): int(value)
                for key, value in known.items()
                if key.endswith("/step") and isinstance(value, (int, float))
            }
        self._phases: set[str] = set()  # whose step metric is defined
        if self._run.disabled:
            say("W&B: disabled by WANDB_MODE")
        elif self._run.offline:
            where = pathlib.Path(self._run.dir).parent
            say(f"W&B: offline, in {where}: `wandb sync {where}` uploads it")
        else:
            say(f"W&B: {self._run.url}")

    def scalars(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        self._log(step, phase, lambda: values)

    def rollouts(self, step: int, rollouts: Sequence[Mapping[str, Any]]) -> None:
        if rollouts:
            self._log(step, "rollouts", lambda: {"table": _table(rollouts)})

    def flush(self) -> None:
        """W&B's own process writes and uploads at once."""

    def close(self, ending: Ending) -> None:
        if ending is Ending.INTERRUPTED:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if ending is Ending.FINISHED else 1)
        if self._scratch and not self._run.offline:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _log(self, step: int, phase: str, values: Callable[[], Mapping[str, Any]]) -> None:
        if step <= self._done.get(phase, -1):
            return
        if phase not in self._phases:
            self._phases.add(phase)
            self._run.define_metric(f"{phase}/step", hidden=True)
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        row = {f"{phase}/{name}": value for name, value in values().items()}
        self._run.log({**row, f"{phase}/step": step})
        self._record["steps"][phase] = step
        self._save(json.dumps(self._record))


class Harmless:
    """A tracker that is turned off, with one sentence, as soon as it raises.

    Args:
      make: opens the tracker.
      name: for the sentence.
    """

    def __init__(self, make: Callable[[], Tracker], name: str):
        self._name = name
        self._tracker: Tracker | None = None

        def open_tracker() -> None:
            self._tracker = make()

        self._try(open_tracker)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever it is, the run is worth more
            self._tracker = None
            say(
                f"{self._name} failed ({type(error).__name__}: {summary(error)}) and is off for "
                "this start of the run; metrics.jsonl has everything."
            )

    def scalars(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        if tracker := self._tracker:
            self._try(lambda: tracker.scalars(step, phase, values))

    def rollouts(self, step: int, rollouts: Sequence[Mapping[str, Any]]) -> None:
        if tracker := self._tracker:
            self._try(lambda: tracker.rollouts(step, rollouts))

    def flush(self) -> None:
        if tracker := self._tracker:
            self._try(tracker.flush)

    def close(self, ending: Ending) -> None:
        if tracker := self._tracker:
            self._try(lambda: tracker.close(ending))


def _start(**arguments: Any) -> "wandb.Run":
    """`wandb.init`, silent. Offline where the server does not answer or no key is configured."""
    import wandb  # seconds, and only where it is asked for

    def settings() -> wandb.Settings:
        # Without capturing the console: it has our progress line.
        return wandb.Settings(
            console="off",
            silent=True,
            quiet=True,
            save_code=False,
            init_timeout=PATIENCE,
            finish_timeout=_AT_THE_END,
            # W&B's own process ends with ours. A kill costs what it had not written, at most this.
            x_transaction_log_flush_interval=_FLUSH,
        )

    wandb.setup(settings=settings())
    is_online = os.environ.get("WANDB_MODE", "online") not in ("offline", "dryrun", "disabled")
    # Asked first: on a terminal, `wandb.init` would wait for somebody who types a key.
    if is_online and (fault := _login_fault()):
        say(f"{fault}: set WANDB_API_KEY, or run `wandb login`.")
        return wandb.init(**arguments, mode="offline", settings=settings())
    try:
        return wandb.init(**arguments, settings=settings())
    except Exception as error:
        if not is_online:
            raise
        say(f"W&B does not answer ({summary(error)}): the next start of this run tries again.")
        wandb.teardown()  # the run that did not begin holds its id
        return wandb.init(**arguments, mode="offline", settings=settings())


def _login_fault() -> str:
    """Why the API key that is configured here cannot be used; '' if it can."""
    import wandb

    try:
        return "" if wandb.login(prompt=False, verify=False) else "W&B has no API key here"
    except Exception as error:  # a key that W&B refuses by its form
        return f"W&B refuses its API key ({summary(error)})"


def _read_record(path: paths.Path) -> dict[str, Any] | None:
    """wandb.json of an earlier start; None where there is none that can be read."""
    try:
        record = json.loads(paths.read(path))
        return {"project": record["project"], "id": record["id"], "steps": dict(record["steps"])}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _table(rollouts: Sequence[Mapping[str, Any]]) -> "wandb.Table":
    """Lines of rollouts.jsonl as a table: prompt, rationale, answer, gold, reward, log_w, ..."""
    import wandb

    # Lines may have different keys: those of all lines, in the order in which they come first.
    columns: list[str | int] = [*dict.fromkeys(name for line in rollouts for name in line)]
    rows = [[strict_json.finite(line.get(str(name))) for name in columns] for line in rollouts]
    # A log w of -inf is text among numbers.
    return wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
