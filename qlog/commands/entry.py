"""What the commands share: flags in, and a mistake out, in one sentence."""

import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags

from qlog.config import command_line
from qlog.console import output, printable
from qlog.errors import QLOG_ERRORS, ConfigError, PassingError, Stop
from qlog.storage import paths


def run(main: Callable[[list[str]], int | None]) -> None:
    """`app.run(main)`, with mistakes told in one sentence on stderr instead of a traceback.

    A wrong flag ends with status 2, an exception of `qlog.errors` with its own status. The command
    has defined its --config by `command_line.define`.
    """
    try:
        with output():
            app.run(main, flags_parser=_parse)
    except QLOG_ERRORS as error:
        _fail(str(error), error.status)
    except Stop as stop:
        sys.exit(stop.status)
    except KeyboardInterrupt:  # Ctrl-C before the command listens to signals: it still imports
        sys.exit(130)
    except Exception as error:
        if reason := paths.sentence(error):  # a store, a network or a disk failed
            _fail(reason, PassingError.status)
        raise


def _parse(argv: list[str]) -> list[str]:
    """What is left of the command line when the flags are read."""
    try:
        return command_line.parse(argv)
    except (ConfigError, flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
        _fail(sentence(error))


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
    print(f"qlog: {printable(text)}", file=sys.stderr)
    sys.exit(status)
