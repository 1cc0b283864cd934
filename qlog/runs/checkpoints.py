"""Orbax checkpoints of a run: parameters apart from the rest, so that either can be read alone.

A run saves first and evaluates then, so a checkpoint's score comes later: WORKDIR/scores.json has
{step: {"value": ..., "of": metric and settings}} of the steps that were evaluated, and tells which of
the checkpoints is the best. Scores of other settings than the newest one's are not compared with it.
"""

import dataclasses
import json
import os
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from qlog.parallel import distributed
from qlog.storage import paths
from qlog.errors import ConfigError
from qlog.records import TrainState
from qlog.storage.paths import Path

WHICH = "best, latest, base or a step"
_SCORES = "scores.json"
Scores = dict[int, dict[str, Any]]  # by step; see above


class Checkpoints:
    """The checkpoints of the run in `workdir`, one per saved step, written asynchronously.

    Kept: the `keep` latest, and the one with the highest score. The data position is the step
    itself (see data/pipeline.py). On several processes each has one, and all call alike.

    Attributes:
      latest_step: of the newest checkpoint, None without one; the same on every process.
      scores: by step, of those that were evaluated.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 2):
        self._folder = paths.parse(workdir)
        scores = distributed.once_per_run(lambda: _read_scores(self._folder))
        self.scores: Scores = {int(step): score for step, score in scores.items()}
        latest = ocp.training.preservation_policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(
            place(self._folder, "--workdir") / "checkpoints",
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.AnyPreservationPolicy(
                [latest, _Best(self.scores)]
            ),
            cleanup_tmp_directories=True,
        )
        newest = self._checkpointer.latest
        self.latest_step: int | None = distributed.broadcast(newest and newest.step)
        for step in [step for step in self.scores if step > (self.latest_step or 0)]:
            del self.scores[step]  # of checkpoints that were lost: the steps are done again

    def save(
        self, state: TrainState, *, step: int, config: str, identity: dict | None = None
    ) -> None:
        """Starts writing `state` as of `step`; it may be used again as soon as this returns.

        Args:
          config: the resolved config's JSON.
          identity: `experiment.identity`: what the run is made of.
        """
        if self.latest_step is not None and self.latest_step >= step:
            return
        parts = {"params": state.params, "training": state._replace(params=None)._asdict()}
        self._checkpointer.save_checkpointables_async(
            step, parts, custom_metadata={"config": json.loads(config), "identity": identity or {}}
        )
        self.latest_step = step

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._checkpointer.is_saving_in_progress()

    def wait(self) -> None:
        """Until what was saved is on disk."""
        self._checkpointer.wait()

    def score(self, step: int, value: float, what: str) -> None:
        """Notes how good the parameters of `step` are; the best checkpoint is kept by it.

        Args:
          value: the higher, the better.
          what: the metric and the settings that it depends on, in words.
        """
        self.scores[step] = {"value": value, "of": what}
        if jax.process_index() == 0:
            paths.write(self._folder / _SCORES, json.dumps(self.scores))

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest state, placed as `abstract` (ShapeDtypeStructs with shardings) says.

        Raises:
          ConfigError: it was pruned.
        """
        training = self._folder / "checkpoints" / str(self.latest_step) / "training"
        if not distributed.once_per_run(lambda: paths.exists(training)):
            raise ConfigError(
                f"{self._folder} kept parameters only (config.checkpoint.finished = 'best_params'), so the "
                f"run cannot go on: begin another with --config.init_from={self._folder}."
            )
        parts = {"params": abstract.params, "training": abstract._replace(params=None)._asdict()}
        loaded = self._checkpointer.load_checkpointables(self.latest_step, parts)
        return TrainState(**loaded["training"])._replace(params=loaded["params"])

    def made_of(self) -> tuple[dict, dict]:
        """The config and the identity that the newest checkpoint was written under."""
        about = self._checkpointer.checkpointables_metadata(self.latest_step).custom_metadata
        return about["config"], about.get("identity", {})

    def prune(self, what: str) -> None:
        """What a finished run keeps: all, or best_params: the parameters of the best checkpoint (the
        newest, without scores). Pruning what is pruned changes nothing."""
        if what == "all":
            return
        self.wait()
        steps = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
        best = _best(steps, self.scores)
        for step in steps:
            if step != best:
                self._checkpointer.delete(step)
        if jax.process_index() == 0:
            training = self._folder / "checkpoints" / str(best) / "training"
            if paths.exists(training):
                training.rmtree()

    def close(self) -> None:
        """Waits for the write under way; a run must not end before."""
        self._checkpointer.close()


@dataclasses.dataclass
class _Best:
    """Orbax's PreservationPolicy for scores that come after the save."""

    scores: Scores

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        scored = [c.step for c in checkpoints if c.step in self.scores]
        best = _best(scored, self.scores) if scored else None
        return [c.step == best for c in checkpoints]


def load_params(
    folder: str | os.PathLike, abstract_params, field: str = "init_from", which: str = "best"
):
    """Parameters alone, from a checkpoint of another run.

    Args:
      folder, which: as `find_checkpoint` takes them.
      abstract_params: ShapeDtypeStructs with shardings.
      field: the config field that named the folder, for messages.

    Raises:
      ConfigError: nothing there, or parameters of another shape.
    """
    path = find_checkpoint(folder, field, which)
    try:
        return ocp.load_checkpointables(path, {"params": abstract_params})["params"]
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"{field} = {str(folder)!r} holds parameters of another model: {_first_line(error)}"
        ) from error


def find_checkpoint(folder: str | os.PathLike, field: str, which: str = "best") -> Path:
    """The folder of one step, the same on every process.

    Args:
      folder: a run's workdir, its `checkpoints` folder, or one step's folder in it.
      field: what named the folder, for messages.
      which: best (by score; the latest where none was evaluated), latest, or a step's number. Of a
        folder that is one step's, only that.

    Raises:
      ConfigError: no checkpoint there, or not the one that was asked for.
    """
    named, folder = os.fspath(folder), place(folder, field)
    above = distributed.once_per_run(lambda: _above(folder))
    steps = []
    if above:
        with ocp.training.Checkpointer(paths.parse(above)) as checkpointer:  # all: it has barriers
            steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
    return paths.parse(
        distributed.once_per_run(lambda: _choose(folder, above, steps, f"{field} = {named!r}", which))
    )


def _above(folder: Path) -> str:
    """The folder above all steps; '' where there is none, as in one step's."""
    for above in (folder / "checkpoints", folder):
        if above.name == "checkpoints" and paths.exists(above):
            return str(above)
    return ""


def _choose(folder: Path, above: str, steps: list[int], named: str, which: str) -> str:
    if paths.exists(folder / "params"):
        return str(folder)
    if not steps:
        raise ConfigError(f"{named} has no checkpoint: name a run's workdir, or one step's folder.")
    if which == "latest":
        return f"{above}/{steps[-1]}"
    if which == "best":
        return f"{above}/{_best(steps, _read_scores(paths.parse(above).parent))}"
    if which.isdigit() and int(which) in steps:
        return f"{above}/{which}"
    raise ConfigError(
        f"--checkpoint={which}: {named} has the steps {', '.join(map(str, steps))}; ask for {WHICH}."
    )


def _best(steps: list[int], scores: Scores) -> int:
    """The first of the steps with the highest score; the last step where none has one."""
    scored = [step for step in steps if step in scores]
    if not scored:
        return steps[-1]
    what = scores[max(scored)]["of"]
    alike = [step for step in scored if scores[step]["of"] == what]
    return max(alike, key=lambda step: (scores[step]["value"], -step))


def _read_scores(workdir: Path) -> Scores:
    try:
        return {
            int(step): score for step, score in json.loads(paths.read(workdir / _SCORES)).items()
        }
    except FileNotFoundError:
        return {}


def place(folder: str | os.PathLike, field: str) -> Path:
    """`folder` as Orbax takes it: absolute.

    Raises:
      ConfigError: in an S3 bucket: Orbax (0.12.8) neither writes arrays there nor commits a checkpoint
        whole.
    """
    path = paths.parse(folder, field)
    if not paths.is_remote(path):
        return Path(os.path.abspath(path))
    if str(path).startswith("s3://"):
        raise ConfigError(
            f"{field} = {path}: Orbax keeps no checkpoints in s3:// buckets; give gs://BUCKET/... or a "
            "folder that all hosts share (weights, data and assets may be in s3://)."
        )
    return path


def abstract_like(tree, shardings=None):
    """ShapeDtypeStructs of `tree`, with its own shardings or the given ones."""
    if shardings is None:
        shardings = jax.tree.map(lambda x: x.sharding, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
