"""What a run's workdir says of it, for launchers: `python -m qlog.commands.run_status WORKDIR`.

Prints one line of JSON, without starting JAX:

    {"finished": false, "checkpoint": 40, "beat": {"step": 43, "phase": "decode", "time": 1764115200.0}}
"""

import json
import signal
import sys
from typing import TypedDict

from qlog.errors import QLOG_ERRORS
from qlog.storage import paths

_COMMITTED = "commit_success.txt"  # what Orbax writes last into a checkpoint on gs://

_PATIENCE = 60  # seconds


class Status(TypedDict):
    """finished: whether training ended; checkpoint: the newest whole one's step; beat: what the
    run last wrote of itself (owner.json: step, phase, time in seconds since the epoch, ...)."""

    finished: bool
    checkpoint: int | None
    beat: dict | None


def of(workdir: paths.Path) -> Status:
    """The status of the run in `workdir`; of a folder that is not there, one that has not begun."""
    return {
        "finished": paths.retried((workdir / "results.json").exists),
        "checkpoint": paths.retried(lambda: _newest(workdir / "checkpoints")),
        "beat": _beat(workdir / "owner.json"),
    }


def _newest(folder: paths.Path) -> int | None:
    if not folder.exists():
        return None
    # A save under way has a name that is no number, or on gs:// no last file yet.
    steps = sorted(
        (int(path.name) for path in folder.iterdir() if path.name.isdecimal()), reverse=True
    )
    committed = (
        step
        for step in steps
        if not str(folder).startswith("gs://") or (folder / str(step) / _COMMITTED).exists()
    )
    return next(committed, None)


def _beat(file: paths.Path) -> dict | None:
    try:
        beat = json.loads(paths.read(file))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return beat if isinstance(beat, dict) and not beat.get("released") else None


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print("usage: python -m qlog.commands.run_status WORKDIR", file=sys.stderr)
        return 2
    signal.alarm(_PATIENCE)  # ends this process: whoever asks has something to decide
    try:
        print(json.dumps(of(paths.parse(argv[1], "WORKDIR"))))
    except QLOG_ERRORS as error:
        print(error, file=sys.stderr)
        return error.status
    except OSError as error:
        print(f"{argv[1]} cannot be read: {error}", file=sys.stderr)
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
