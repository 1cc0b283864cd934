"""What the commands share: flags in, and a mistake out, in one sentence."""

import functools
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags

from qlog.errors import QLOG_ERRORS, ConfigError, PassingError, Stop
from qlog.storage import paths


def run(main: Callable[[list[str]], int | None], config: flags.FlagHolder) -> None:
    """`app.run(main)`, with mistakes told in one sentence on stderr instead of a traceback.

    A wrong flag ends with status 2, an exception of `qlog.errors` with its own status.

    Args:
      config: the command's --config.
    """
    try:
        app.run(main, flags_parser=functools.partial(_parse, config))
    except QLOG_ERRORS as error:
        _fail(str(error), error.status)
    except Stop as stop:
        sys.exit(stop.status)
    except Exception as error:
        if reason := paths.sentence(error):  # a store, a network or a disk failed
            _fail(reason, PassingError.status)
        raise


def _parse(config: flags.FlagHolder, argv: list[str]) -> list[str]:
    """What is left of the command line when the flags are read."""
    try:
        rest = flags.FLAGS(argv)
        getattr(config.value, "seed", None)  # a file that did not load raises when it is used
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
        _fail(sentence(error, argv))


def only_flags(argv: list[str]) -> None:
    """Refuses what is left of a command line besides flags.

    Raises:
      ConfigError: something is.
    """
    if len(argv) > 1:
        raise ConfigError(f"what is {argv[1]!r}? Settings are given as --config.section.key=value")


def sentence(error: Exception, argv: list[str]) -> str:
    """What is wrong with the command line, in one sentence.

    Args:
      error: what parsing the flags raised.
      argv: the command line.
    """
    text = str(error)
    if isinstance(error, (AttributeError, KeyError)):
        # --config.train.stepz=3 raises an error whose text begins with the name 'stepz'.
        key = re.match(r"\W*(\w*)", text)[1]
        for flag in argv:
            if key in flag.partition("=")[0].split(".")[1:]:
                similar = re.search(r'Did you mean "(\w+)"', text)
                remedy = "qlog/config/schema.py lists them all."
                if similar:
                    remedy = f"did you mean {similar[1]!r}?"
                return f"{flag}: the config has no field {key!r}; {remedy}"
    # When a config file raises, config_flags puts the traceback into the message of its own error.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    text = lines[-1] if "Traceback" in text else " ".join(lines)
    return text.removeprefix("qlog.errors.ConfigError: ")


def _fail(text: str, status: int = 2) -> NoReturn:
    print(f"qlog: {text}", file=sys.stderr)
    sys.exit(status)
