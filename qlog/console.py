"""Lines for the user, from process 0 only."""

import sys
import time
from collections.abc import Mapping, Sequence

import jax
from rich.console import Console
from rich.table import Table


class ProgressLine:
    """A line about work under way: on a terminal rewritten in place, elsewhere printed at times.

    Args:
      every: seconds between printed lines.
    """

    def __init__(self, every: float = 10.0):
        self._every, self._printed = every, time.monotonic()

    def show(self, text: str, force: bool = False) -> None:
        """Shows the line; with `force` also if the last one was printed just now, and for good."""
        if jax.process_index():
            return
        now = time.monotonic()
        if sys.stdout.isatty():
            # To the line's start, and clear it: the next text comes over this one, unless forced.
            print(f"\r\x1b[2K{text}", end="\n" if force else "", flush=True)
        elif force or now - self._printed >= self._every:
            self._printed = now
            print(text, flush=True)


def clock(seconds: float) -> str:
    """Seconds as text: 75 -> '1:15'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def say(text: str) -> None:
    """A line for the user; it takes the place of a progress line."""
    if jax.process_index() == 0:
        print(f"\r\x1b[2K{text}" if sys.stdout.isatty() else text, flush=True)


def show_table(title: str, facts: Mapping[str, object]) -> None:
    """A table of names and values for the user."""
    if jax.process_index() == 0:
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in facts.items():
            table.add_row(name, str(value))
        # Without a terminal there is no width to fit: a fixed one.
        Console(width=None if sys.stdout.isatty() else 110).print(table)


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of cells as a Markdown table.

    Args:
      rows: at least one. All keys are the header, in the order in which they are first met; a
        row without one of them has a dash there.
    """
    header = list(dict.fromkeys(key for row in rows for key in row))
    lines = [header, *([row.get(key, "-") for key in header] for row in rows)]
    # A bar would end the cell, and a line break the row.
    texts = [
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |"
        for line in lines
    ]
    return "\n".join([texts[0], "|" + "---|" * len(header), *texts[1:]])
