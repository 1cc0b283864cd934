"""What a run's workdir says of it, for launchers: `python -m qlog.commands.run_status WORKDIR`.

Prints one line of JSON, without starting JAX:

    {"finished": false, "checkpoint": 40, "beat": {"step": 43, "phase": "train", "time": 1.7e9}}
"""

import json
import signal
import sys
from typing import Any, TypedDict

from qlog.console import versions
from qlog.errors import QLOG_ERRORS, PassingError
from qlog.storage import paths, strict_json

_COMMITTED = "commit_success.txt"  # what Orbax writes last into a checkpoint on gs://
_PATIENCE = 60  # seconds for a store to answer


class Status(TypedDict):
    """What can be told of a run without asking its process."""

    finished: bool  # training has ended
    checkpoint: int | None  # step of the newest one that is whole
    # What the run last wrote about itself: owner.json with its step, its phase, the time in
    # seconds since the epoch; None of a run that has given its workdir back
    beat: dict[str, Any] | None


def of(workdir: paths.Path) -> Status:
    """The status of the run in `workdir`. A folder that does not exist is a run not yet begun.

    Raises:
      OSError: the workdir cannot be read.
    """
    return {
        "finished": paths.retried((workdir / "results.json").exists),
        "checkpoint": paths.retried(lambda: _newest(workdir / "checkpoints")),
        "beat": _beat(workdir / "owner.json"),
    }


def _newest(folder: paths.Path) -> int | None:
    if not paths.exists(folder):
        return None
    # An unfinished save has another name than a number or, on gs://, lacks its last file.
    steps = sorted(
        (int(path.name) for path in folder.iterdir() if path.name.isdecimal()), reverse=True
    )
    committed = (
        step
        for step in steps
        if not str(folder).startswith("gs://") or (folder / str(step) / _COMMITTED).exists()
    )
    return next(committed, None)


def _beat(file: paths.Path) -> dict[str, Any] | None:
    try:
        beat = json.loads(paths.read(file))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return beat if isinstance(beat, dict) and not beat.get("released") else None


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    if argv[1:] in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    if argv[1:] == ["--version"]:
        print(versions())
        return 0
    if len(argv) != 2 or argv[1].startswith("-"):
        print("usage: python -m qlog.commands.run_status WORKDIR", file=sys.stderr)
        return 2
    signal.alarm(_PATIENCE)  # ends this process: the launcher that asks cannot wait without end
    try:
        print(strict_json.dumps(of(paths.parse(argv[1], "WORKDIR"))))
    except QLOG_ERRORS as error:
        print(error, file=sys.stderr)
        return error.status
    except OSError as error:
        print(f"{argv[1]} cannot be read: {error}", file=sys.stderr)
        return PassingError.status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
