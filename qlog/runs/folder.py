"""The names of what lies in a run's folder, and whether there is room for it."""

import shutil

from qlog.console import say
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


def notice_room(workdir: Path, needed: int, least: int = 0) -> None:
    """Says so where the disk has less room than a run will need; it may be made meanwhile.

    Args:
      needed: bytes.
      least: bytes of one checkpoint.

    Raises:
      ConfigError: the disk is smaller than one checkpoint, however empty it is.
    """
    if paths.is_remote(workdir):
        return
    disk = shutil.disk_usage(workdir)
    if disk.total < least:
        raise ConfigError(
            f"--workdir = {workdir}: its disk has {_size(disk.total)} in all, and one checkpoint "
            f"takes {_size(least)}: give a folder on a larger disk, or take a smaller model."
        )
    if disk.free < needed:
        say(
            f"NOTE: {workdir} has {_size(disk.free)} free, and the run needs about {_size(needed)} "
            "for checkpoints and samples: make room, or lower config.checkpoint.keep."
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 10**8 else f"{num_bytes / 1e6:,.1f} MB"
