"""Reading the checkpoints of a workdir: which there are, which are whole, which is the best.

Damaged ones are passed over, in a line for the user, and left where they are: nothing here writes,
renames or deletes. Only the run whose workdir it is does that (checkpoints.py).
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from qlog import models
from qlog.console import say
from qlog.errors import ConfigError, summary
from qlog.parallel import distributed
from qlog.runs import digests, orbax_log
from qlog.runs.folder import SCORES
from qlog.storage import paths
from qlog.storage.paths import Path

WHICH = "best, latest, base or a step"
PARAMS, TRAINING = "params", "training"  # the items of a checkpoint
# What a checkpoint says of itself: without its digests it is then damaged, and not only old.
HAS_DIGESTS = "has_digests"
Scores = dict[int, dict[str, Any]]  # by step, see checkpoints.py: {"value": ..., "of": ...}


# ---- One checkpoint: where it is, and what is in it ----


def find_checkpoint(folder: str | os.PathLike, field: str, which: str = "best") -> Path:
    """The folder of one whole step, the same on every process.

    Damaged ones are passed over, in a line for the user.

    Args:
      folder: the workdir of a run, its `checkpoints` folder, or the folder of one step in it.
      field: the flag or the config field that named the folder, for messages.
      which: best (by score; the latest, if none was evaluated), latest, or the number of a step.
        Without effect where `folder` is one step's.

    Raises:
      ConfigError: no checkpoint there, or not the one that was asked for, or it is damaged.
    """
    named, folder = f"{field} = {os.fspath(folder)!r}", place(folder, field)
    if distributed.once_per_run(lambda: _is_step(folder)):
        if reason := fault(folder, (PARAMS,)):
            raise ConfigError(
                f"{named}: the checkpoint is damaged ({reason}): take another step's."
            )
        return folder
    above = paths.parse(distributed.once_per_run(lambda: _above(folder)))
    steps = distributed.once_per_run(lambda: steps_in(above))
    if not steps:
        raise ConfigError(f"{named} has no checkpoint: name a run's workdir, or one step's folder.")
    if digests.is_step(which) and int(which) in steps:
        if reason := fault(above / which, (PARAMS,)):
            raise ConfigError(
                f"--checkpoint={which}: that checkpoint of {named} is damaged ({reason}): take "
                f"another of the steps {', '.join(map(str, steps))}, or ask for best or latest."
            )
        return above / which
    if which not in ("best", "latest"):
        raise ConfigError(
            f"--checkpoint={which}: {named} has the steps {', '.join(map(str, steps))}; "
            f"ask for {WHICH}."
        )
    scores = read_scores(above.parent) if which == "best" else {}
    step, damaged = first_whole(above, steps, lambda left: best_of(left, scores), (PARAMS,))
    for other, reason in damaged.items():
        say(f"{above / str(other)} is damaged ({reason}): step {step} is taken")
    return above / str(step)


def _above(folder: Path) -> str:
    """The folder that has the steps; `folder` itself where nothing is there."""
    above = folder / "checkpoints"
    return str(folder if folder.name == "checkpoints" and not paths.exists(above) else above)


def _is_step(folder: Path) -> bool:
    """Whether the folder is that of one step, as far as it is there."""
    if folder.parent.name == "checkpoints" and digests.is_step(folder.name):
        return paths.exists(folder)
    return paths.exists(folder / PARAMS)


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
      ConfigError: no whole checkpoint there, or its parameters have other names or shapes.
    """
    path = find_checkpoint(folder, field, which)
    named = f"{field} = {os.fspath(folder)!r}"
    difference = distributed.once_per_run(lambda: _difference(path, abstract_params))
    if difference:
        raise ConfigError(f"{named} holds parameters of another model: {difference}.")
    try:
        return ocp.load_checkpointables(path, {PARAMS: abstract_params})[PARAMS]
    except Exception as error:  # what a damaged file makes of Orbax: of any kind
        if paths.is_remote(path) and paths.passes(error):
            raise
        raise ConfigError(
            f"{named}: the checkpoint of step {path.name} cannot be read ({summary(error)}): take "
            "another step's."
        ) from error


def _difference(path: Path, abstract_params: models.Params) -> str:
    """How the parameters of a checkpoint differ from a model's, in words; '' where they do not."""
    there = _shapes(ocp.checkpointables_metadata(path).metadata[PARAMS])
    here = _shapes(abstract_params)
    other = [name for name in here if name in there and there[name] != here[name]]
    texts = [f"{name} is {list(there[name])} there and {list(here[name])} here" for name in other]
    texts += [f"{name} is only there, {list(there[name])}" for name in there if name not in here]
    texts += [f"{name} is only here, {list(here[name])}" for name in here if name not in there]
    more = f", and {len(texts) - 3} more differ" if len(texts) > 3 else ""
    return "; ".join(texts[:3]) + more


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf by its name, such as layers/q_proj/kernel."""
    return {
        "/".join(str(getattr(entry, "key", entry)) for entry in path): tuple(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def made_of(folder: Path) -> tuple[dict, dict]:
    """The config and the identity that `Checkpoints.save` was given for the step in `folder`."""
    return config_and_identity(ocp.checkpointables_metadata(folder))


def config_and_identity(metadata: Any) -> tuple[dict, dict]:
    """`made_of`, from what Orbax has read of the checkpoint: its CheckpointMetadata."""
    about = metadata.custom_metadata or {}
    return about.get("config", {}), about.get("identity", {})


def version(folder: Path) -> dict[str, Any]:
    """What tells a checkpoint from others, wherever it lies. Every process must call.

    Returns:
      {"step": of training (None where it is not known), "about": a digest of config and identity}
    """

    def found() -> dict[str, Any]:
        step = digests.step_of(folder)
        if step is None and digests.is_step(folder.name):
            step = int(folder.name)
        return {"step": step, "about": digests.digest_of(list(made_of(folder)))}

    return distributed.once_per_run(found)


def has_steps(workdir: str | os.PathLike) -> bool:
    """Whether a run has checkpoints, whole or not. Every process must call, and gets the same."""
    steps = place(workdir, "--workdir") / "checkpoints"
    return distributed.once_per_run(lambda: bool(steps_in(steps)))


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


# ---- Which checkpoints are whole ----


def fault(folder: Path, items: Sequence[str] = (PARAMS, TRAINING), content: bool = True) -> str:
    """What is wrong with a checkpoint, in words; '' if it is whole. Every process must call.

    An old checkpoint has no digests. Then only what describes it is read.

    Args:
      folder: of one step.
      items: 'params', 'training': which of them are wanted.
      content: whether all files are read; without, whether they are there with their sizes.
    """
    reason = digests.fault(folder, items, content)
    return reason or distributed.once_per_run(lambda: _described(folder))


def _described(folder: Path) -> str:
    """Why Orbax cannot tell what is in a checkpoint; '' if it can."""
    if not paths.exists(folder):
        return "it is missing"
    if not paths.names(folder):
        return "the folder is empty"
    orbax_log.watch()
    try:
        metadata = ocp.checkpointables_metadata(folder)
        _shapes(metadata.metadata[PARAMS])
    except Exception as error:  # what a damaged file makes of Orbax: of any kind
        if paths.is_remote(folder) and paths.passes(error):
            raise
        return f"its description cannot be read: {type(error).__name__}: {summary(error)}"
    if not isinstance(metadata.custom_metadata, dict) or "config" not in metadata.custom_metadata:
        return "its description has no config"
    if metadata.custom_metadata.get(HAS_DIGESTS) and not digests.exist(folder):
        return f"{digests.FILE} is missing"
    return ""


def steps_in(folder: Path) -> list[int]:
    """The steps whose saves have ended, the oldest first.

    The folder of an unfinished one has another name than a number. In a bucket, where no folder can
    be renamed when it is whole, it lacks a file.
    """
    found = [int(name) for name in paths.names(folder) if digests.is_step(name)]
    return sorted(
        step
        for step in found
        if not paths.is_remote(folder) or paths.exists(folder / str(step) / digests.COMMITTED)
    )


def first_whole(
    folder: Path,
    steps: Sequence[int],
    order: Callable[[list[int]], int],
    items: Sequence[str],
    known: dict[int, str] | None = None,
) -> tuple[int, dict[int, str]]:
    """The first whole step, and {step: what is wrong} of those before it. Every process must call.

    Args:
      folder: has a folder for each step.
      steps: the oldest first.
      order: which of the steps left comes next.
      items: which items must be whole.
      known: other damaged steps, for the message.

    Raises:
      ConfigError: none is whole.
    """
    left, damaged = list(steps), {}
    while left:
        step = order(left)
        reason = fault(folder / str(step), items)
        if not reason:
            return step, damaged
        damaged[step] = reason
        left.remove(step)
    every = (known or {}) | damaged
    if not every:
        raise ConfigError(f"{folder} has no checkpoint: put back what was there.")
    reasons = ", ".join(f"{step}: {reason}" for step, reason in sorted(every.items())[-3:])
    raise ConfigError(
        f"{folder} has no whole checkpoint ({reasons}): put back what was there, or use another "
        "--workdir."
    )


def find_damaged(folder: Path) -> tuple[int, dict[int, str]]:
    """(The newest whole step, {step: what is wrong} of the others). Every process must call.

    Of steps older than that one only the sizes of the files are looked at, since nothing may ever
    read them.

    Args:
      folder: has a folder for each step.

    Returns:
      (0, {}) where there are no checkpoints.

    Raises:
      ConfigError: there are checkpoints, and none is whole.
    """
    steps = distributed.once_per_run(lambda: steps_in(folder))
    if not steps:
        return 0, {}
    # A finished run may have kept parameters only; `Checkpoints.restore` says so.
    newest, damaged = first_whole(folder, steps, lambda left: left[-1], (PARAMS, TRAINING))
    for step in steps:
        if step < newest and (reason := fault(folder / str(step), content=False)):
            damaged[step] = reason
    return newest, damaged


# ---- The best ----


def best_of(steps: list[int], scores: Scores) -> int:
    """The step with the highest score (of equal ones the first); without scores the last step."""
    scored = [step for step in steps if step in scores]
    if not scored:
        return steps[-1]
    what = scores[max(scored)]["of"]
    alike = [step for step in scored if scores[step]["of"] == what]  # under the same settings
    return max(alike, key=lambda step: (scores[step]["value"], -step))


def read_scores(workdir: Path) -> Scores:
    """The scores that can be read; without one a checkpoint is only not known to be the best.

    Every process must call, and gets the same.
    """
    # What travels between processes is JSON, whose keys are text.
    found = distributed.once_per_run(lambda: _scores(workdir))
    return {int(step): score for step, score in found.items()}


def _scores(workdir: Path) -> Scores:
    try:
        found = json.loads(paths.read(workdir / SCORES, errors="replace"))
        return {
            int(step): {"value": value, "of": str(score["of"])}
            for step, score in found.items()
            # Not a NaN, with which `max` takes any.
            if math.isfinite(value := float(score["value"]))
        }
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        say(
            f"{workdir / SCORES} cannot be read ({summary(error)}): the best checkpoint is "
            "unknown, and the newest takes its place until one is evaluated"
        )
        return {}
