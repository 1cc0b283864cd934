"""Orbax checkpoints of a run.

WORKDIR/checkpoints/STEP/ has two items: `params`, and `training` for the rest of the train state.
So parameters can be read without the optimizer's moments, and moments can be deleted when they are
no longer needed.

A run saves first and evaluates then, so the score of a checkpoint comes later, and not into it:
WORKDIR/scores.json has {step: {"value": ..., "of": metric and settings}} of the steps that were
evaluated. The best checkpoint is the one with the highest value, among those whose "of" is the one
of the newest score: values under other settings cannot be compared with it.

Disks lose bytes, and people move files, so a checkpoint carries digests of its files
(runs/digests.py), and `checkpoint_reader.fault` says whether it is whole. A checkpoint that is not
is passed over, in a line for the user, for the newest one that is whole (or the best). The run
whose workdir it is also sets it aside, as checkpoints/STEP.damaged: nothing deletes it then, and
the run can save that step again. Who only reads a workdir (init_from, evaluate, export) has
checkpoint_reader.py, which renames nothing there. A bucket cannot rename: there each object is
copied by the store and then removed.
"""

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable
from typing import Any, cast

import jax
from orbax.checkpoint import v1 as ocp

from qlog import models
from qlog.console import say
from qlog.errors import ConfigError, PassingError, summary
from qlog.parallel import distributed
from qlog.records import TrainState
from qlog.runs import checkpoint_reader, digests, orbax_log
from qlog.runs.checkpoint_reader import HAS_DIGESTS, PARAMS, TRAINING, Scores
from qlog.runs.folder import SCORES
from qlog.storage import paths
from qlog.storage.paths import Path

_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder on a disk, until it is whole


class Checkpoints:
    """The checkpoints of the run in `workdir`, one per saved step, written asynchronously.

    The position in the data is the step itself (data/pipeline.py). Every process has such an object
    and makes the same calls, since Orbax saves and restores together.

    Args:
      workdir: the folder of the run.
      keep: how many of the latest checkpoints to keep, besides the one with the highest score.

    Attributes:
      latest_step: the step of the newest checkpoint; None without one. The same on every process.
      scores: the score of each step that was evaluated.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 2):
        self._folder = paths.parse(workdir)
        self.scores = checkpoint_reader.read_scores(self._folder)
        self._steps = checkpoint_reader.place(self._folder, "--workdir") / "checkpoints"
        # Tried now: Orbax would find out in the background, at the first save. (A bucket has no
        # folders that could be closed; the workdir was tried when it was claimed.)
        if not paths.is_remote(self._steps):
            distributed.once_per_run(lambda: _check_folder(self._steps))
        self._number = paths.number(self._steps)
        # Before Orbax looks: it would count, and in time delete, what is damaged.
        newest, damaged = checkpoint_reader.find_damaged(self._steps)
        _rename_damaged(self._steps, damaged, newest)
        orbax_log.watch()

        # ---- Orbax ----
        # Kept is what either policy wants. Orbax asks them after each save, and by then `_Best` may
        # know the score of an older checkpoint: it reads the dict that `score` writes to.
        latest = ocp.training.preservation_policies.LatestN(keep)
        self._saving: int | None = None  # the step of the save that began last
        self._about: dict[str, Any] = {}  # what that save says of itself
        self._response: Any = None  # Orbax's, of that save
        self._is_broken = False  # whether other processes wait for a part that will not come
        # (A function: Orbax copies its options deeply, and with a method the object it is of.)
        digesting = ocp.options.AsyncOptions(
            post_finalization_callback=lambda: self._write_digests()
        )
        self._checkpointer = ocp.training.Checkpointer(
            self._steps,
            context=ocp.Context(async_options=digesting),
            # Save whenever asked: the training loop decides when. (The casts: Orbax types its own
            # policies differently from what it takes here.)
            save_decision_policy=cast(
                Any, ocp.training.save_decision_policies.FixedIntervalPolicy(1)
            ),
            preservation_policy=cast(
                Any,
                ocp.training.preservation_policies.AnyPreservationPolicy(
                    [latest, _Best(self.scores)]
                ),
            ),
            cleanup_tmp_directories=True,
        )
        self.latest_step: int | None = self._newest()
        # Scores of checkpoints that were lost: the run does these steps again.
        for step in [step for step in self.scores if step > (self.latest_step or 0)]:
            del self.scores[step]

    def _newest(self) -> int | None:
        # A process that lists the folder a moment later may see another one: process 0 decides.
        newest = self._checkpointer.latest
        return distributed.broadcast(newest and newest.step)

    @property
    def num_kept(self) -> int:
        """How many checkpoints there are now."""
        return len(self._checkpointer.checkpoints)

    # ---- Saving ----

    def save(
        self, state: TrainState, *, step: int, config: str, identity: dict | None = None
    ) -> None:
        """Starts writing `state` as of `step`; does nothing if that step is saved already.

        When this returns the arrays are on the host and may be donated; writing goes on in the
        background.

        Args:
          config: the resolved config, as JSON.
          identity: `experiment.contents.identity`, what the run is made of.

        Raises:
          PassingError: this save or the one before it failed; the checkpoints before it are whole.
        """
        if self.latest_step is not None and self.latest_step >= step:
            return
        self.wait()
        # Two items of one checkpoint, in two folders (see above).
        parts = {PARAMS: state.params, TRAINING: state._replace(params=None)._asdict()}
        about = {"config": json.loads(config), "identity": identity or {}, HAS_DIGESTS: True}

        def start() -> None:
            self._saving, self._about = step, about
            orbax_log.failures.clear()
            self._response = self._checkpointer.save_checkpointables_async(
                step, parts, custom_metadata=about
            )

        self._orbax(start)
        self.latest_step = step

    def _write_digests(self) -> None:
        """Orbax calls it in its thread, on process 0, when all files of a save are written.

        The checkpoint is then still under its first name on a disk, and without the file that says
        that it is whole in a bucket: it becomes whole with its digests or not at all.
        """
        step = self._saving
        assert step is not None, "a save has a step"
        folder = self._steps / str(step)
        if not paths.is_remote(folder):
            begun = [n for n in paths.names(self._steps) if n.startswith(f"{step}{_UNFINISHED}")]
            folder = self._steps / begun[-1]
        digests.write(folder, step, self._about)

    def check(self) -> None:
        """Whether the save under way has failed; costs nothing. Once per step.

        Raises:
          PassingError: it has; the checkpoints before it are whole.
        """
        if self._response is None:
            return
        if not self.is_saving:
            self.wait()
        elif jax.process_count() > 1 and orbax_log.failures:
            # Of several processes, those that did not fail wait in a barrier for this one, and so
            # would Orbax here, for twenty minutes. This one ends, and that ends the others.
            self._is_broken = True
            self._orbax(lambda: _raise(orbax_log.failures[-1]))

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._checkpointer.is_saving_in_progress()

    def wait(self) -> None:
        """Waits until what was saved is in the workdir.

        Raises:
          PassingError: it could not be written; the checkpoints before it are whole.
        """
        while jax.process_count() > 1 and self._response is not None and self.is_saving:
            self.check()
            time.sleep(0.05)
        self._orbax(self._checkpointer.wait)
        self._response = None

    def _orbax(self, call: Callable[[], None]) -> None:
        """Calls Orbax, whose errors have many kinds and hundreds of lines, and one meaning."""
        try:
            call()
        except PassingError:
            raise
        except Exception as error:
            # A later call would raise it again.
            self._response = None
            if paths.number(self._steps) != self._number:  # Orbax may have made another one
                raise PassingError(
                    f"{self._steps} is gone (moved, deleted or unmounted): put it back; the same "
                    "command goes on from its newest checkpoint."
                ) from error
            if reason := distributed.sentence(error):
                raise PassingError(
                    f"{self._steps}: the checkpoint of step {self._saving} was not written: "
                    f"{reason}"
                ) from error
            whole = [
                step for step in checkpoint_reader.steps_in(self._steps) if step != self._saving
            ]
            rest = f"step {whole[-1]} is the newest whole one" if whole else "there is no other"
            remedy = "" if paths.is_remote(self._steps) else "make room or mend the disk; "
            raise PassingError(
                f"{self._steps}: the checkpoint of step {self._saving} could not be written "
                f"({_reason(error)}), {rest}: {remedy}the same command goes on."
            ) from error

    def score(self, step: int, value: float, what: str) -> None:
        """Writes down how good the parameters of `step` are.

        Args:
          value: the higher, the better.
          what: the metric and the settings that it depends on, as text.
        """
        self.scores[step] = {"value": value, "of": what}
        if jax.process_index() == 0:
            paths.write(self._folder / SCORES, json.dumps(self.scores))

    @property
    def best_step(self) -> int:
        """The step of the whole checkpoint with the highest score; without scores of the newest.

        There must be a checkpoint. Every process must ask, and gets the same.

        Raises:
          ConfigError: none is whole.
        """
        steps = distributed.broadcast([c.step for c in self._checkpointer.checkpoints])
        order = lambda left: checkpoint_reader.best_of(left, self.scores)
        step, damaged = checkpoint_reader.first_whole(self._steps, steps, order, (PARAMS,))
        if damaged:
            self._set_aside(damaged, step)
        return step

    def _set_aside(self, damaged: dict[int, str], taken: int) -> None:
        """Renames damaged checkpoints, and lets Orbax look again at what there is."""
        _rename_damaged(self._steps, damaged, taken)
        self._checkpointer.reload()

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest state that can be read; `latest_step` is its step, which may then be earlier.

        Args:
          abstract: ShapeDtypeStructs with the shardings that the state shall have.

        Raises:
          ConfigError: the checkpoint was pruned to its parameters, or none can be read.
        """
        while True:
            step = self.latest_step
            assert step is not None, "there is a checkpoint"
            self._check_not_pruned(step)
            state, reason = self._read(step, abstract)
            # Each process reads its own parts, and all must take the same step.
            reasons = [reason for reason in distributed.gather([reason]) if reason]
            if state is not None and not reasons:
                return state
            # ---- Without digests damage shows only here; the one before it is tried ----
            damaged = {step: reasons[0]}
            before = [c.step for c in self._checkpointer.checkpoints if c.step < step]
            found, more = checkpoint_reader.first_whole(
                self._steps,
                distributed.broadcast(before),
                lambda left: left[-1],
                (PARAMS, TRAINING),
                damaged,
            )
            self._set_aside(damaged | more, found)
            self.latest_step = found
            for scored in [scored for scored in self.scores if scored > found]:
                del self.scores[scored]

    def _check_not_pruned(self, step: int) -> None:
        folder = self._steps / str(step)

        # A kill while files are deleted leaves some of them.
        def is_pruned() -> bool:
            return digests.is_forgotten(folder, TRAINING) or not paths.exists(folder / TRAINING)

        if distributed.once_per_run(is_pruned):
            raise ConfigError(
                f"{self._folder} kept parameters only "
                f"(config.checkpoint.finished = 'best_params'), so the run cannot "
                f"go on: begin another with --config.init_from={self._folder}."
            )

    def _read(self, step: int, abstract: TrainState) -> tuple[TrainState | None, str]:
        """The state of a step, or why it cannot be read.

        Raises:
          PassingError: of several processes this one cannot read its part; ConfigError where the
            checkpoint has no digests, so that it may be damaged for all of them.
        """
        parts = {PARAMS: abstract.params, TRAINING: abstract._replace(params=None)._asdict()}
        try:
            loaded = self._checkpointer.load_checkpointables(step, parts)
        except Exception as error:  # what a damaged file makes of Orbax: of any kind
            if paths.passes(error) and paths.is_remote(self._steps):
                raise
            if jax.process_count() > 1:
                # The others wait for it in Orbax's barrier: it ends, and that ends them.
                self._is_broken = True
                folder = self._steps / str(step)
                kind = PassingError if digests.exist(folder) else ConfigError
                raise kind(
                    f"{folder} cannot be read by process {jax.process_index()} "
                    f"({summary(error)}): mend its disk, or move that folder away; the same "
                    "command goes on."
                ) from error
            return None, summary(error)
        try:
            models.check_finite(loaded[PARAMS], f"the checkpoint of step {step}")
        except ConfigError as error:
            return None, summary(error)
        return TrainState(**loaded[TRAINING])._replace(params=loaded[PARAMS]), ""

    def made_of(self) -> tuple[dict, dict]:
        """The config and the identity that `save` was given for the newest checkpoint."""
        return checkpoint_reader.config_and_identity(
            self._checkpointer.checkpointables_metadata(self.latest_step)
        )

    def prune(self, what: str) -> None:
        """Deletes what a finished run need not keep; a second call changes nothing.

        Args:
          what: what to keep: 'all', or 'best_params', the parameters of the best checkpoint (the
            newest, where no step has a score).
        """
        if what == "all":
            return
        self.wait()
        steps = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
        # Orbax deletes whole steps, and every process must call it. One item of a step is a folder,
        # which process 0 removes.
        best = self.best_step
        for step in steps:
            if step != best:
                self._checkpointer.delete(step)
        if jax.process_index() == 0:
            kept = self._steps / str(best)
            if paths.exists(kept / TRAINING):
                digests.forget(kept, TRAINING)  # first: a kill must not leave it looking damaged
                (kept / TRAINING).rmtree()

    def close(self) -> None:
        """Waits for the save under way; a process that ends before loses it.

        Raises:
          PassingError: as `wait` does.
        """
        if self._is_broken:
            return
        if jax.process_count() > 1:
            self.wait()
        self._orbax(self._checkpointer.close)


def _check_folder(steps: Path) -> None:
    """Whether Orbax can keep checkpoints in a folder on a disk, which is made.

    Raises:
      ConfigError: it cannot, or something there would be taken for a checkpoint, or is a link.
    """
    paths.probe(steps, "--workdir")
    for name in filter(str.isdecimal, paths.names(steps)):
        if int(name) >= 10**18:
            raise ConfigError(f"{steps / name}: there is no such step; move it elsewhere.")
        for place in (steps / name, steps / name / PARAMS, steps / name / TRAINING):
            if os.path.islink(place):
                raise ConfigError(
                    f"{place} is a symbolic link, through which Orbax deletes nothing: move the "
                    f"folder to its place, or make all of {steps} a link."
                )


def _raise(error: BaseException) -> None:
    raise error


def _reason(error: Exception) -> str:
    """Why a write failed, in the words of the operating system if the error has its number."""
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"os_error_code='(\d+)'", str(error))):
        number = int(found[1])  # in a text of TensorStore
    return os.strerror(number) if number else summary(error)


@dataclasses.dataclass
class _Best:
    """A PreservationPolicy of Orbax, for scores that come after the save.

    Attributes:
      scores: those of `Checkpoints`, which change while this policy is in use.
    """

    scores: Scores

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        scored = [c.step for c in checkpoints if c.step in self.scores]
        best = checkpoint_reader.best_of(scored, self.scores) if scored else None
        return [c.step == best for c in checkpoints]


def _rename_damaged(folder: Path, damaged: dict[int, str], taken: int) -> None:
    """Renames checkpoints to STEP.damaged, and says so. Every process must call."""
    for step, reason in sorted(damaged.items()):
        name = distributed.once_per_run(lambda step=step: _rename(folder, step))
        say(
            f"{folder / str(step)} is damaged ({reason}): set aside as {name}; step {taken} is the "
            "newest whole one before it"
            if step > taken
            else f"{folder / str(step)} is damaged ({reason}): set aside as {name}"
        )


def _rename(folder: Path, step: int) -> str:
    """Renames a checkpoint, and returns its new name: 12.damaged, or 12.damaged.2 and so on."""
    taken, name, number = set(paths.names(folder)), f"{step}.damaged", 1
    while name in taken:
        number += 1
        name = f"{step}.damaged.{number}"
    paths.move(folder / str(step), folder / name)
    return name
