"""Lines for the user, from process 0 only."""

import contextlib
import io
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
from rich.console import Console
from rich.table import Table

# What a terminal obeys instead of showing it: control characters (not tab and newline), and marks
# that turn the direction of writing. Records, names and paths may hold them.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with every character that a terminal obeys written out, as \\x1b."""
    return _OBEYED.sub(lambda match: ascii(match[0])[1:-1], text)


@contextlib.contextmanager
def output() -> Iterator[None]:
    """A command's output, which no character and no reader that has gone makes fail.

    Characters that the encoding lacks are written out, as stderr does. Where the reader of a pipe
    has gone (`| head -1`), the command ends quietly with the status that shells have for it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:  # a command may end by sys.exit
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends: into nothing, or it would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


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
        now, text = time.monotonic(), printable(text)
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
    text = printable(text)
    if jax.process_index() == 0:
        print(f"\r\x1b[2K{text}" if sys.stdout.isatty() else text, flush=True)


def show_table(title: str, facts: Mapping[str, object]) -> None:
    """A table of names and values for the user."""
    if jax.process_index() == 0:
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in facts.items():
            table.add_row(name, printable(str(value)))
        # Without a terminal there is no width to fit: a fixed one.
        plain_console(None if sys.stdout.isatty() else 110).print(table)


def plain_console(width: int | None) -> Console:
    """Where tables are printed: [words] and :words: of cells are text, and no orders to rich."""
    return Console(width=width, markup=False, emoji=False)


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
