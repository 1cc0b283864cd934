"""What the commands share: flags in, a page of help out, and a mistake told in one sentence."""

import _thread
import contextlib
import functools
import itertools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from qlog.commands import help_pages
from qlog.config import command_line, schema
from qlog.console import complain, output, versions
from qlog.errors import QLOG_ERRORS, ConfigError, PassingError, Stop, ctrl_c_stays

# What `command_line.parse` raises where a command line is wrong.
MISTAKES = (ConfigError, flags.Error, AttributeError, KeyError, TypeError, OSError)
_HELP = {"--help", "-help", "-h", "-?", "--helpshort"}
_VERSION = {"--version", "-version"}
_PATIENCE = 20.0  # seconds from a failure to the end of the process
_FIELDS = re.compile(r"--?help[-_]config(?:=(.*))?", re.DOTALL)


def run(main: Callable[[list[str]], int | None]) -> None:
    """`app.run(main)`, with mistakes told in one sentence on stderr instead of a traceback.

    A wrong flag ends with status 2, an exception of `qlog.errors` with its own status. The command
    has defined its --config by `command_line.define`. --help prints the docstring of the module
    that was started, and qlog's own flags; --help-config prints the fields of the config, --version
    the versions of qlog and of what it runs on.

    Args:
      main: takes what is left of the command line, and returns the exit status.
    """
    about = sys.modules["__main__"].__doc__ or ""
    sys.unraisablehook = functools.partial(_interrupt_again, sys.unraisablehook)
    with _ending_in_time():
        try:
            with output(), ctrl_c_stays():
                if not show_about(sys.argv, about, flags.FLAGS) and not _show_fields(sys.argv):
                    app.run(main, flags_parser=_parse)
        except QLOG_ERRORS as error:
            _fail(str(error), error.status)
        except Stop as stop:
            sys.exit(stop.status)
        except Exception as error:
            from qlog.storage import paths  # takes a third of a second

            if reason := paths.sentence(error):  # a store, a network or a disk failed
                _fail(reason, PassingError.status)
            raise


def _interrupt_again(
    show: Callable[["sys.UnraisableHookArgs"], Any], dropped: "sys.UnraisableHookArgs"
) -> None:
    """For Ctrl-C in code whose exceptions Python drops: JAX has a hook of the garbage collector.

    A moment later the main thread is elsewhere, and gets it once more.

    Args:
      show: the hook before, for all other exceptions.
    """
    if isinstance(dropped.exc_value, KeyboardInterrupt):
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        show(dropped)


# ---- Help ----


def show_about(argv: Sequence[str], about: str, values: flags.FlagValues) -> bool:
    """Prints the page of a command where --help asks for it, or the versions; whether it did.

    Args:
      argv: the program's name first.
      about: the docstring of the command.
      values: its flags.
    """
    words = set(_before_dashes(argv))
    if _HELP & words:
        for line in help_pages.usage(about, values):
            print(line)
    elif _VERSION & words:
        print(versions())
    else:
        return False
    return True


def _show_fields(argv: Sequence[str]) -> bool:
    """Prints the fields of the config where --help-config asks for it; whether it did."""
    if not any(map(_FIELDS.fullmatch, _before_dashes(argv))):
        return False
    # Without --config the page is of the defaults. Flags that set no field are left over.
    values = flags.FlagValues()
    config = command_line.define(values=values)
    try:
        _, *rest = command_line.parse(argv, values, known_only=True)
    except MISTAKES as error:
        _fail(sentence(error))
    chosen = config.value if config.present else schema.default()
    for line in help_pages.fields(chosen, _wanted(rest)):
        print(line)
    return True


def _wanted(rest: Sequence[str]) -> str:
    """The word of --help-config=WORD or --help-config WORD; '' without one."""
    for word, after in itertools.pairwise([*rest, ""]):
        if match := _FIELDS.fullmatch(word):
            return match[1] or ("" if after.startswith("-") else after)
    return ""


def _before_dashes(argv: Sequence[str]) -> list[str]:
    """The words of a command line that may be flags: behind "--" there are none."""
    words = list(argv[1:])
    return words[: words.index("--")] if "--" in words else words


# ---- Flags ----


def _parse(argv: list[str]) -> list[str]:
    """What is left of the command line when the flags are read.

    `sys.argv` then has the lines of --flagfile in its place, for those who name the command again.
    """
    try:
        sys.argv = command_line.with_flag_files(argv)
        rest = command_line.parse(sys.argv)
    except MISTAKES as error:
        _fail(sentence(error))
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # JAX and Orbax tell their every move at INFO
    return rest


def only_flags(argv: list[str]) -> None:
    """Refuses what is left of a command line besides flags.

    Raises:
      ConfigError: something is.
    """
    if len(argv) > 1:
        raise ConfigError(f"what is {argv[1]!r}? Settings are given as --config.section.key=value")


def sentence(error: Exception) -> str:
    """One sentence from what `command_line.parse` raised."""
    text = str(error)
    if isinstance(error, (AttributeError, KeyError, TypeError)):  # raised by the config file itself
        text = f"--config: {type(error).__name__}: {text}"
    # When a config file raises, config_flags puts the traceback into the message of its own error.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    text = lines[-1] if "Traceback" in text else " ".join(lines)
    return text.removeprefix("qlog.errors.ConfigError: ")


def _fail(text: str, status: int = 2) -> NoReturn:
    complain(text)
    sys.exit(status)


@contextlib.contextmanager
def _ending_in_time() -> Iterator[None]:
    """A process that fails inside ends within `_PATIENCE`, with its status.

    At its end Python waits for all threads. Those that write to a store that does not answer try
    for hours, and a launcher would wait with them.
    """
    status = 1
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if status:
            patience = threading.Timer(_PATIENCE, os._exit, [status])
            patience.daemon = True
            patience.start()
        raise
