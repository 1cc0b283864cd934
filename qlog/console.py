"""Lines for the user, from process 0 only.

On a terminal a progress line is rewritten in place, and some words have a colour. Into a file or a
pipe goes plain text, with a progress line now and then. NO_COLOR turns colours off, FORCE_COLOR
turns them on everywhere, and a terminal with TERM=dumb gets plain text, as those names have it in
other programs.
"""

import contextlib
import io
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TextIO

from qlog import __version__

# Libraries that take long to import are not imported above: a command that only shows its help, or
# refuses a flag, should not wait for them.
if TYPE_CHECKING:
    from rich.console import Console

# What a terminal obeys instead of showing it: control characters (not tab and newline), and marks
# that turn the direction of writing. Records, names and paths may hold them.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_CLEAR = "\r\x1b[2K"  # to the start of the line, and clear it
_BAR = 16  # columns of a progress bar
_PAUSE = 0.1  # seconds between two states of a line: more often would flicker
# Seconds after which a reader wonders whether anything happens: of a terminal, of other output.
_SILENCE_LIVE, _SILENCE = 2.0, 30.0
_STYLES = {"bold": "1", "dim": "2", "red": "1;31", "green": "32", "yellow": "33", "cyan": "36"}
Style = Literal["bold", "dim", "red", "green", "yellow", "cyan"]
_ALARM = re.compile(r"(?:warning:|NOTE:?)(?= )")  # how a line begins that should be noticed


def printable(text: str) -> str:
    """The text with every character that a terminal obeys written out, as \\x1b."""
    return _OBEYED.sub(lambda match: ascii(match[0])[1:-1], text)


# ---- What the terminal can do ----


def is_live(stream: TextIO | None = None) -> bool:
    """Whether lines can be rewritten in place. Of stdout, unless another stream is given."""
    shown: TextIO = sys.stdout if stream is None else stream
    return shown.isatty() and os.environ.get("TERM") != "dumb"


def has_colours(stream: TextIO | None = None) -> bool:
    """Whether colours are wanted. Of stdout, unless another stream is given."""
    if os.environ.get("NO_COLOR"):  # https://no-color.org: set, and not empty
        return False
    return bool(os.environ.get("FORCE_COLOR")) or is_live(stream)


def styled(text: str, style: Style, stream: TextIO | None = None) -> str:
    """The text in a colour or weight, where the stream has colours."""
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if has_colours(stream) else text


def width() -> int:
    """Columns of a line: those of the terminal, or of COLUMNS; 80 where nothing is known."""
    return shutil.get_terminal_size().columns


def is_first_process() -> bool:
    """Whether this is process 0. A process without JAX is the only one."""
    # Not imported here: what was started without JAX (a help page, a report) stays without it.
    jax = sys.modules.get("jax")
    return jax is None or jax.process_index() == 0


@contextlib.contextmanager
def output() -> Iterator[None]:
    """A command's output, which no character and no reader that has gone makes fail.

    Characters that the encoding lacks are written out, as stderr does. Where the reader of a pipe
    has gone (`| head -1`), the command ends quietly with the status that shells have for it; so it
    does after Ctrl-C, where nothing else listens to signals.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:  # a command may end by sys.exit
            ProgressLine.leave()
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends: into nothing, or it would complain.
        discard(sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


# ---- Lines ----


class ProgressLine:
    """A line about work under way: on a terminal rewritten in place, elsewhere printed at times.

    Args:
      every: seconds between printed lines, where they are not rewritten.
      after: seconds until the first one: work that takes less shows none.
    """

    _is_open = False  # whether a line stands on the terminal that the next text takes the place of

    def __init__(self, every: float = 10.0, after: float = 0.0):
        self._every, self._shown = every, time.monotonic()
        self._next = self._shown + after  # when a terminal gets the next one

    def show(self, text: str, share: float | None = None, force: bool = False) -> None:
        """Shows the line.

        Args:
          share: how much of the work is done, from 0 to 1: a terminal draws it as a bar.
          force: shows it also if the last one was printed just now, and for good.
        """
        if not is_first_process():
            return
        now, text = time.monotonic(), printable(text)
        if is_live():
            if now < self._next and not force:
                return
            self._shown, self._next = now, now + _PAUSE
            # A line that wraps could not be cleared: it is cut one column before the edge.
            columns = width() - 1
            bar = ""
            if share is not None and columns >= 4 * _BAR:
                bar, columns = _bar(share) + " ", columns - _BAR - 1
            _print(f"{_CLEAR}{bar}{_cut(text, columns)}", end="\n" if force else "")
            ProgressLine._is_open = not force
        elif force or now - self._shown >= self._every:
            self._shown = now
            print(text, flush=True)

    def begin(self, text: str, share: float | None = None) -> None:
        """Shows what begins and may say nothing for long: elsewhere than on a terminal at once."""
        self.show(text, share, force=not is_live())

    def beat(self, text: str, share: float | None = None) -> None:
        """Shows what is under way, if nothing was shown for so long that a reader wonders."""
        if time.monotonic() - self._shown >= (_SILENCE_LIVE if is_live() else _SILENCE):
            self.begin(text, share)

    @staticmethod
    def clear() -> None:
        """Takes away a line that stands on the terminal."""
        if ProgressLine._is_open:
            ProgressLine._is_open = False
            print(_CLEAR, end="", flush=True)

    @staticmethod
    def leave() -> None:
        """Ends a line that stands on the terminal: what comes next begins below it."""
        if ProgressLine._is_open:
            ProgressLine._is_open = False
            print(flush=True)


def _cut(text: str, columns: int) -> str:
    """As much of a line as fits: whole items, which two spaces divide, if one fits."""
    if len(text) <= columns:
        return text
    return text[: columns + 2].rpartition("  ")[0] or text[:columns]


def _bar(share: float) -> str:
    """A bar of `_BAR` columns, of which `share` is full."""
    full = round(_BAR * min(max(share, 0.0), 1.0))
    has_lines = (sys.stdout.encoding or "").lower().startswith("utf")
    done, left = ("━", "─") if has_lines else ("#", "-")
    return styled(done * full, "green") + styled(left * (_BAR - full), "dim")


def time_text(seconds: float, whole: bool = False) -> str:
    """Seconds as people read them: '38 ms', '4.3 s', '4 min 10 s', '2 h 05 min', '3 d 04 h'.

    Args:
      whole: no parts of a second, for a time that is guessed.
    """
    if not math.isfinite(seconds):
        return f"{seconds} s"
    if (whole and round(seconds) < 60) or not seconds:
        return f"{round(seconds)} s"
    if 0 < seconds < 0.0995:  # in seconds it would show one digit, or none
        return f"{1e3 * seconds:.2g} ms"
    if seconds < 0.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95 and not whole:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {left:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours:02d} h"


def count_text(number: int, name: str, plural: str = "") -> str:
    """'1 step', '3,000 steps', '2 processes'.

    Args:
      name: of one of them.
      plural: where it is another word than `name` with an s.
    """
    return f"{number:,} {name if number == 1 else plural or name + 's'}"


def size_text(num_bytes: float) -> str:
    """Bytes as people read them: '25.2 GB', '3.7 MB', '8.2 kB', '1 byte'."""
    if num_bytes >= 999_950_000:
        return f"{num_bytes / 1e9:,.1f} GB"
    if num_bytes >= 999_950:
        return f"{num_bytes / 1e6:.1f} MB"
    if num_bytes >= 999.5:
        return f"{num_bytes / 1e3:.1f} kB"
    return count_text(round(num_bytes), "byte")


def discard(number: int) -> None:
    """What is written to this file descriptor goes nowhere from now on, instead of failing."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


_outlives_reader = False


def outlive_reader() -> None:
    """From now on output goes nowhere when the reader of the pipe has gone, instead of failing.

    A signal that ends a run also ends the reader of `run | tee log`, and the run saves first.
    """
    global _outlives_reader
    _outlives_reader = True


def _print(text: str, end: str = "\n") -> None:
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        if not _outlives_reader:
            raise
        discard(sys.stdout.fileno())


def put(text: str) -> None:
    """A line in the place of a progress line, as it is, from every process."""
    _print((_CLEAR if is_live() else "") + text)
    ProgressLine._is_open = False


def say(text: str, style: Style | None = None) -> None:
    """A line for the user; it takes the place of a progress line."""
    if not is_first_process():
        return
    text = printable(text)
    if style:
        text = styled(text, style)
    elif alarm := _ALARM.match(text):
        text = styled(alarm[0], "yellow") + text[alarm.end() :]
    put(text)


def complain(text: str) -> None:
    """A line on stderr about what went wrong: 'qlog: ...'. From every process."""
    print(f"{styled('qlog:', 'red', sys.stderr)} {printable(text)}", file=sys.stderr, flush=True)


def versions() -> str:
    """What --version prints: 'qlog 0.1.0, jax 0.10.2, Python 3.11.7'."""
    import importlib.metadata
    import platform

    try:
        jax = importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:  # a build that was not installed
        import jax

        jax = jax.__version__
    return f"qlog {__version__}, jax {jax}, Python {platform.python_version()}"


# ---- Tables ----


def show_table(title: str, facts: Mapping[str, object]) -> None:
    """A table of names and values for the user."""
    if is_first_process():
        from rich.table import Table

        table = Table(title=title, show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column(overflow="fold")  # paths are not cut short
        for name, value in facts.items():
            table.add_row(name, printable(str(value)))
        plain_console().print(table)


def plain_console(width: int = 110) -> "Console":
    """Where tables are printed: [words] and :words: of cells are text, and no orders to rich.

    Args:
      width: columns of a table that goes into a file or a pipe; a terminal has its own.
    """
    from rich.console import Console

    ProgressLine.clear()
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
    colours = "auto" if has_colours() else None
    # Without its highlighter, which colours parts of numbers such as 1,234.
    return Console(width=width, markup=False, emoji=False, highlight=False, color_system=colours)


def show_markdown(text: str) -> None:
    """A page of Markdown for the user: drawn on a terminal, elsewhere as it is."""
    if not is_first_process():
        return
    text = printable(text)
    if not is_live():
        ProgressLine.clear()
        print(text, flush=True)
        return
    from rich.markdown import Markdown

    console = plain_console()
    for paragraph in text.strip().split("\n\n"):
        if paragraph.startswith("| "):
            draw_table(console, _cells_of(paragraph.splitlines()))
        else:
            # What stands in angle brackets is a name here, never HTML, which would not be shown.
            console.print(Markdown(paragraph.replace("<", "\\<")))
            console.print()


def _cells_of(lines: Sequence[str]) -> list[list[str]]:
    """The cells of a table that `markdown_table` made, without the line below its header."""
    # Between the bars at both ends; a bar within a cell has a backslash before it.
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    header, _, *rows = [[cell.replace("\\|", "|") for cell in line] for line in cells]
    return [header, *rows]


def draw_table(
    console: "Console",
    cells: Sequence[Sequence[str]],
    title: str = "",
    justify: Literal["left", "right"] = "left",
) -> None:
    """Prints a table; a list of its rows where the console is too narrow for it.

    Args:
      cells: the header, then the rows; all of one length.
      justify: of all columns but the first.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    header, *rows = cells
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title or None, title_justify="left")
    for index, name in enumerate(header):
        words = [word for line in cells for word in line[index].split()]
        longest = max(map(len, words), default=0)
        # No word is cut.
        table.add_column(name, min_width=longest, justify=justify if index else "left")
    for row in rows:
        table.add_row(*row)
    # Asked without a limit, or the terminal's width would be the answer.
    unlimited = console.options.update(max_width=10_000)
    if console.measure(table, options=unlimited).minimum <= console.width:
        console.print(table)
        return
    if title:
        console.print(title, style="italic")
    for first, *others in rows:
        facts = [f"{name} {cell}" for name, cell in zip(header[1:], others, strict=True)]
        # Lines break between facts only: for that long their spaces are others.
        text = "; ".join(fact.replace(" ", "\xa0") for fact in facts)
        console.print(first, style="bold")
        text = textwrap.indent(textwrap.fill(text, console.width - 2), "  ")
        console.print(text.replace("\xa0", " "))
    console.print()


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
