"""Lines for the user, from the first process only."""

import sys
import time
from collections.abc import Mapping, Sequence

import jax
from rich.console import Console
from rich.table import Table


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


def say(text: str):
    """A line for the user, from the first process alone, on a line of its own."""
    if jax.process_index() == 0:
        print(f"\r\x1b[2K{text}" if sys.stdout.isatty() else text, flush=True)


def show_table(title: str, rows: Mapping[str, object]):
    """A two-column table for the user."""
    if jax.process_index() == 0:
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(name, str(value))
        Console(width=None if sys.stdout.isatty() else 110).print(table)


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of cells as a Markdown table.

    Args:
      rows: at least one; all have the same keys in the same order, which are the header.
    """
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    return "\n".join(lines)
