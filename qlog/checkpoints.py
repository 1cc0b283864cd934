"""Orbax checkpoints of a run: parameters apart from the rest, so that either can be read alone."""

import json
import pathlib

import jax
from orbax.checkpoint import v1 as ocp

from qlog.errors import ConfigError
from qlog.learner import TrainState

_PRESERVE = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints in `folder`, one per saved step, written asynchronously.

    Kept: the `keep` latest, and the one with the highest score, if any was saved with one. The
    data position is the step itself (see data/pipeline.py).
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 2):
        best = _PRESERVE.BestN(
            get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False
        )
        policies = [_PRESERVE.LatestN(keep), best]
        self._checkpointer = ocp.training.Checkpointer(
            pathlib.Path(folder).absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_PRESERVE.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, *, step: int, config: str, score: float | None = None):
        """Starts writing `state` as of `step`.

        Args:
          config: the resolved config's JSON.
          score: by which the best checkpoint is kept; None when the step was not evaluated.
        """
        if self.latest_step is not None and self.latest_step >= step:
            return
        parts = {"params": state.params, "training": state._replace(params=None)._asdict()}
        self._checkpointer.save_checkpointables_async(
            step, parts, metrics=None if score is None else {"score": score},
            custom_metadata={"config": json.loads(config)},
        )

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """The whole state, placed as `abstract` (ShapeDtypeStructs with shardings) says."""
        parts = {"params": abstract.params, "training": abstract._replace(params=None)._asdict()}
        loaded = self._checkpointer.load_checkpointables(step, parts)
        return TrainState(**loaded["training"])._replace(params=loaded["params"])

    def config(self, step: int | None = None) -> dict:
        """The resolved config that the checkpoint was written under."""
        return self._checkpointer.checkpointables_metadata(step).custom_metadata["config"]

    def close(self):
        """Waits for the write under way; a run must not end before."""
        self._checkpointer.close()


def load_params(folder: str | pathlib.Path, abstract_params, field: str = "init_from"):
    """Parameters alone, from the best (else the latest) checkpoint of another run.

    Args:
      folder: a run's workdir, its `checkpoints` folder, or one step's folder in it.
      abstract_params: ShapeDtypeStructs with shardings.
      field: the config field that named the folder, for messages.

    Raises:
      ConfigError: nothing there, or parameters of another shape.
    """
    path = find_checkpoint(folder, field)
    try:
        return ocp.load_checkpointables(path, {"params": abstract_params})["params"]
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"{field} = {str(folder)!r} holds parameters of another model: {_first_line(error)}"
        ) from error


def find_checkpoint(folder: str | pathlib.Path, field: str) -> pathlib.Path:
    """The step's folder to read: the one with the best metric, else the latest; or ConfigError."""
    named, folder = str(folder), pathlib.Path(folder).absolute()
    if (folder / "params").is_dir():
        return folder
    for candidate in (folder / "checkpoints", folder):
        if candidate.is_dir():
            with ocp.training.Checkpointer(candidate) as checkpointer:
                found = list(checkpointer.checkpoints)
            if found:
                scored = [checkpoint for checkpoint in found if checkpoint.metrics]
                best = max(scored, key=lambda c: _score(c.metrics)) if scored else found[-1]
                return candidate / str(best.step)
    raise ConfigError(
        f"{field} = {named!r} has no checkpoint: name a run's workdir, or one step's folder."
    )


def abstract_like(tree, shardings=None):
    """ShapeDtypeStructs of `tree`, with its own shardings or the given ones."""
    if shardings is None:
        shardings = jax.tree.map(lambda x: x.sharding, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _score(metrics: dict) -> float:
    return metrics["score"]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
