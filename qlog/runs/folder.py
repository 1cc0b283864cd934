"""The names of what lies in a run's folder, and whether there is room for it."""

import json
import shutil
from typing import Any

from ml_collections import ConfigDict

from qlog.config import schema
from qlog.config.evaluated import splits_after
from qlog.console import say, size_text
from qlog.errors import ConfigError
from qlog.storage import paths
from qlog.storage.paths import Path

CONFIG = "config.json"  # the resolved config
METRICS = "metrics.jsonl"  # a line per step, and per evaluation
ROLLOUTS = "rollouts.jsonl"  # a line per rollout, as text
SCORES = "scores.json"  # how good each checkpoint is
FINAL = "final.json"  # numbers of the best checkpoint on evaluation.final
RESULTS = "results.json"  # numbers of the last evaluation; written last, when the run has finished
SPLITS = "splits.json"  # the ids of the examples
OWNER = "owner.json"  # which process runs it
_FILES = (CONFIG, METRICS, ROLLOUTS, SCORES, FINAL, RESULTS, SPLITS, OWNER, "seconds.json")
_FOLDERS = ("checkpoints", "samples")
# Of a config, in every version.
_SECTIONS = {"loss", "train", "evaluation", "data", "rollout", "optimizer", "checkpoint"}


def is_config(value: Any) -> bool:
    """Whether what a config.json holds is a config of qlog: models have such a file, too."""
    return isinstance(value, dict) and all(
        isinstance(value.get(section), dict) for section in _SECTIONS
    )


def write_config(workdir: Path, config: ConfigDict, keep: bool = False) -> None:
    """Writes the resolved config, by which a report knows a run.

    Args:
      keep: leaves one that is there already, if it is a config.
    """
    file = workdir / CONFIG
    try:
        is_there = keep and is_config(json.loads(paths.read(file)))
    except (OSError, ValueError, RecursionError):
        is_there = False
    if not is_there:
        paths.write(file, schema.to_json(config))


def questions(samples: Path) -> Path:
    """STEM.questions.json next to STEM.jsonl: each question's accuracy, a hundredth of the size."""
    return samples.with_suffix(".questions.json")


def check_kinds(workdir: Path) -> None:
    """Whether a folder lies where a run writes a file, or a file where it has a folder.

    Raises:
      ConfigError: one does.
    """
    if paths.is_remote(workdir):  # where a name may be both
        return
    for place in (workdir, *(workdir / name for name in _FOLDERS)):
        if paths.exists(place) and not place.is_dir():
            raise ConfigError(
                f"--workdir: {place} is a file, and a run needs a folder there: move it away, or "
                "use another --workdir."
            )
    for name in _FILES:
        if (workdir / name).is_dir():
            raise ConfigError(
                f"--workdir: {workdir / name} is a folder, and a run writes a file there: move it "
                "away, or use another --workdir."
            )


def room_needed(config: ConfigDict, state: int, num_kept: int) -> int:
    """The bytes that a run will still write, about: its checkpoints, samples and rollouts.

    Args:
      state: bytes of a checkpoint.
      num_kept: checkpoints that are there already.
    """
    # The latest ones, the best one, and one that is written before another is deleted.
    left = max(config.checkpoint.keep + 2 - num_kept, 1)
    # A token is about four letters. Of each text there are the tokens and some numbers.
    rollout, evaluated, train = config.rollout, config.evaluation, config.train
    text = 4 * (rollout.rationale_budget + rollout.answer_reserve) + 100
    num_evaluations = len(splits_after(config)) * (1 + evaluated.without_rationale)
    num_answers = num_evaluations * (evaluated.prompts or 1000) * evaluated.rollouts_per_prompt
    num_logged = 0
    if train.rollouts_every:
        prompts = min(train.rollouts_prompts or train.prompts_per_step, train.prompts_per_step)
        num_logged = train.steps // train.rollouts_every * prompts * rollout.rollouts_per_prompt
    return left * state + text * (num_answers + num_logged)


def notice_room(workdir: Path, needed: int) -> None:
    """Says so where the disk has less room than a run will need.

    The run starts all the same: room may be made meanwhile, and checkpoints are compressed.

    Args:
      needed: bytes, before compression, from `room_needed`.
    """
    if paths.is_remote(workdir):
        return
    disk = shutil.disk_usage(workdir)
    # A mounted store (FUSE, some network drives) may report a size of 0: it tells nothing.
    if disk.total and disk.free < needed:
        say(
            f"NOTE: {workdir} has {size_text(disk.free)} free, and the run needs about "
            f"{size_text(needed)} for checkpoints and samples: make room, or lower "
            "config.checkpoint.keep."
        )
