"""Lines for the user, from the first process only."""

import sys
import time

import jax


class ProgressLine:
    """A line about work under way: rewritten in place on a terminal, else printed now and then.

    Args:
      every: seconds between printed lines.
    """

    def __init__(self, every: float = 10.0):
        self._every, self._printed = every, time.monotonic()

    def show(self, text: str, force: bool = False) -> None:
        """force: print it however short the time since the last."""
        if jax.process_index():
            return
        now = time.monotonic()
        if sys.stdout.isatty():
            print(f"\r\x1b[2K{text}", end="\n" if force else "", flush=True)
        elif force or now - self._printed >= self._every:
            self._printed = now
            print(text, flush=True)


def clock(seconds: float) -> str:
    """75 -> '1:15'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
