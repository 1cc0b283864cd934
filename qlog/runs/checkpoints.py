"""Orbax checkpoints of a run.

WORKDIR/checkpoints/STEP/ has two items: `params`, and `training` for the rest of the train state.
So parameters can be read without the optimizer's moments, and moments can be deleted when they are
no longer needed.

A run saves first and evaluates then, so the score of a checkpoint comes later, and not into it:
WORKDIR/scores.json has {step: {"value": ..., "of": metric and settings}} of the steps that were
evaluated. The best checkpoint is the one with the highest value, among those whose "of" is the one
of the newest score: values under other settings cannot be compared with it.
"""

import dataclasses
import json
import os
from typing import Any, TypeVar, cast

import jax
from orbax.checkpoint import v1 as ocp

from qlog import models
from qlog.errors import ConfigError, summary
from qlog.parallel import distributed
from qlog.records import TrainState
from qlog.storage import paths
from qlog.storage.paths import Path

WHICH = "best, latest, base or a step"
_SCORES = "scores.json"
_Tree = TypeVar("_Tree")
Scores = dict[int, dict[str, Any]]  # by step; see above


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
        scores = distributed.once_per_run(lambda: _read_scores(self._folder))
        self.scores: Scores = {int(step): score for step, score in scores.items()}
        # Kept is what either policy wants. Orbax asks them after each save, and by then `_Best` may
        # know the score of an older checkpoint: it reads the dict that `score` writes to.
        latest = ocp.training.preservation_policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(
            place(self._folder, "--workdir") / "checkpoints",
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
        # A process that lists the folder a moment later may see another one: process 0 decides.
        newest = self._checkpointer.latest
        self.latest_step: int | None = distributed.broadcast(newest and newest.step)
        # Scores of checkpoints that were lost: the run does these steps again.
        for step in [step for step in self.scores if step > (self.latest_step or 0)]:
            del self.scores[step]

    def save(
        self, state: TrainState, *, step: int, config: str, identity: dict | None = None
    ) -> None:
        """Starts writing `state` as of `step`; does nothing if that step is saved already.

        When this returns the arrays are on the host and may be donated; writing goes on in the
        background.

        Args:
          config: the resolved config, as JSON.
          identity: `experiment.contents.identity`, what the run is made of.
        """
        if self.latest_step is not None and self.latest_step >= step:
            return
        # Two items of one checkpoint, in two folders (see above).
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
        """Waits until what was saved is in the workdir."""
        self._checkpointer.wait()

    def score(self, step: int, value: float, what: str) -> None:
        """Writes down how good the parameters of `step` are.

        Args:
          value: the higher, the better.
          what: the metric and the settings that it depends on, as text.
        """
        self.scores[step] = {"value": value, "of": what}
        if jax.process_index() == 0:
            paths.write(self._folder / _SCORES, json.dumps(self.scores))

    @property
    def best_step(self) -> int:
        """The step of the checkpoint with the highest score; without scores that of the newest.

        There must be a checkpoint. Every process must ask, and gets the same.
        """
        steps = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
        return distributed.broadcast(_best(steps, self.scores))

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest state.

        Args:
          abstract: ShapeDtypeStructs with the shardings that the state shall have.

        Raises:
          ConfigError: the checkpoint was pruned to its parameters.
        """
        training = self._folder / "checkpoints" / str(self.latest_step) / "training"
        if not distributed.once_per_run(lambda: paths.exists(training)):
            raise ConfigError(
                f"{self._folder} kept parameters only "
                f"(config.checkpoint.finished = 'best_params'), so the run cannot "
                f"go on: begin another with --config.init_from={self._folder}."
            )
        parts = {"params": abstract.params, "training": abstract._replace(params=None)._asdict()}
        loaded = self._checkpointer.load_checkpointables(self.latest_step, parts)
        return TrainState(**loaded["training"])._replace(params=loaded["params"])

    def made_of(self) -> tuple[dict, dict]:
        """The config and the identity that `save` was given for the newest checkpoint."""
        return _made_of(self._checkpointer.checkpointables_metadata(self.latest_step))

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
        best = _best(steps, self.scores)
        for step in steps:
            if step != best:
                self._checkpointer.delete(step)
        if jax.process_index() == 0:
            training = self._folder / "checkpoints" / str(best) / "training"
            if paths.exists(training):
                training.rmtree()

    def close(self) -> None:
        """Waits for the save under way; a process that ends before loses it."""
        self._checkpointer.close()


@dataclasses.dataclass
class _Best:
    """A PreservationPolicy of Orbax, for scores that come after the save.

    Attributes:
      scores: those of `Checkpoints`, which change while this policy is in use.
    """

    scores: Scores

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        scored = [c.step for c in checkpoints if c.step in self.scores]
        best = _best(scored, self.scores) if scored else None
        return [c.step == best for c in checkpoints]


def made_of(folder: Path) -> tuple[dict, dict]:
    """The config and the identity that `Checkpoints.save` was given for the step in `folder`."""
    return _made_of(ocp.checkpointables_metadata(folder))


def _made_of(metadata: Any) -> tuple[dict, dict]:
    about = metadata.custom_metadata or {}
    return about.get("config", {}), about.get("identity", {})


def load_params(
    folder: str | os.PathLike,
    abstract_params: models.Params,
    field: str = "init_from",
    which: str = "best",
) -> models.Params:
    """Reads the parameters of a checkpoint of another run.

    Args:
      folder, which: as `find_checkpoint` takes them.
      abstract_params: ShapeDtypeStructs with shardings.
      field: the flag or the config field that named the folder, for messages.

    Raises:
      ConfigError: no checkpoint there, or its parameters have other names or shapes.
    """
    path = find_checkpoint(folder, field, which)
    try:
        return ocp.load_checkpointables(path, {"params": abstract_params})["params"]
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"{field} = {str(folder)!r} holds parameters of another model: {summary(error)}"
        ) from error


def find_checkpoint(folder: str | os.PathLike, field: str, which: str = "best") -> Path:
    """The folder of one step, the same on every process.

    Args:
      folder: the workdir of a run, its `checkpoints` folder, or the folder of one step in it.
      field: the flag or the config field that named the folder, for messages.
      which: best (by score; the latest, if none was evaluated), latest, or the number of a step.
        Without effect where `folder` is one step's.

    Raises:
      ConfigError: no checkpoint there, or not the one that was asked for.
    """
    named, folder = os.fspath(folder), place(folder, field)
    above = distributed.once_per_run(lambda: _above(folder))
    steps = []
    if above:
        # On every process: opening a Checkpointer waits for all of them.
        with ocp.training.Checkpointer(paths.parse(above)) as checkpointer:
            steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
    return paths.parse(
        distributed.once_per_run(
            lambda: _choose(folder, above, steps, f"{field} = {named!r}", which)
        )
    )


def _above(folder: Path) -> str:
    """The folder that has the steps; '' if `folder` is one step's, or nothing is there."""
    for above in (folder / "checkpoints", folder):
        if above.name == "checkpoints" and paths.exists(above):
            return str(above)
    return ""


def _choose(folder: Path, above: str, steps: list[int], named: str, which: str) -> str:
    """The folder of the step that was asked for; `named` is how the user named it."""
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
        f"--checkpoint={which}: {named} has the steps {', '.join(map(str, steps))}; "
        f"ask for {WHICH}."
    )


def _best(steps: list[int], scores: Scores) -> int:
    """The step with the highest score (of equal ones the first); without scores the last step."""
    scored = [step for step in steps if step in scores]
    if not scored:
        return steps[-1]
    what = scores[max(scored)]["of"]
    alike = [step for step in scored if scores[step]["of"] == what]  # under the same settings
    return max(alike, key=lambda step: (scores[step]["value"], -step))


def _read_scores(workdir: Path) -> Scores:
    try:
        scores = json.loads(paths.read(workdir / _SCORES))
    except FileNotFoundError:
        return {}
    return {int(step): score for step, score in scores.items()}  # JSON's keys are text


def place(folder: str | os.PathLike, field: str) -> Path:
    """`folder` as Orbax takes it: absolute.

    Raises:
      ConfigError: the folder is in an S3 bucket.
    """
    # Orbax (0.12.8) cannot write arrays to S3, nor make a checkpoint appear there whole.
    path = paths.parse(folder, field)
    if not paths.is_remote(path):
        return Path(os.path.abspath(path))
    if str(path).startswith("s3://"):
        raise ConfigError(
            f"{field} = {path}: Orbax keeps no checkpoints in s3:// buckets; give gs://BUCKET/... "
            "or a folder that all hosts share (weights, data and assets may be in s3://)."
        )
    return path


def abstract_like(tree: _Tree, shardings: Any = None) -> _Tree:
    """ShapeDtypeStructs of `tree`, with the shardings of its arrays or the given ones."""
    if shardings is None:
        shardings = jax.tree.map(lambda x: x.sharding, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
