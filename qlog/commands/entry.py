"""What the commands share: flags in, and a mistake out, in one sentence."""

import functools
import re
import sys
from collections.abc import Callable

from absl import app, flags

from qlog.errors import QLOG_ERRORS, PassingError, Stop
from qlog.storage import paths


def run(main: Callable[[list[str]], int | None], config: flags.FlagHolder) -> None:
    """`app.run(main)`; a wrong flag is one sentence on stderr and status 2, an exception of
    `qlog.errors` one sentence and its own status.

    Args:
      config: of the command's --config.
    """
    try:
        app.run(main, flags_parser=functools.partial(_parse, config))
    except QLOG_ERRORS as error:
        _fail(str(error), error.status)
    except Stop as stop:
        sys.exit(stop.status)
    except Exception as error:
        if reason := paths.sentence(error):
            _fail(reason, PassingError.status)
        raise


def _parse(config: flags.FlagHolder, argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        getattr(config.value, "seed", None)  # a file that did not load says so when it is read
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
        _fail(sentence(error, argv))


def sentence(error: Exception, argv: list[str]) -> str:
    """What is wrong with the flags `argv`, in one sentence, from what parsing them raised."""
    text = str(error)
    # An override of a key that does not exist arrives as an error of its name.
    key = re.match(r"\W*(\w*)", text)[1]
    for flag in argv:
        if (
            isinstance(error, (AttributeError, KeyError))
            and key in flag.partition("=")[0].split(".")[1:]
        ):
            similar = re.search(r'Did you mean "(\w+)"', text)
            remedy = (
                f"did you mean {similar[1]!r}?"
                if similar
                else "qlog/config/schema.py lists them all."
            )
            return f"{flag}: the config has no field {key!r}; {remedy}"
    # config_flags folds the traceback of a config file into its message.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    text = lines[-1] if "Traceback" in text else " ".join(lines)
    return text.removeprefix("qlog.errors.ConfigError: ")


def _fail(text: str, status: int = 2):
    print(f"qlog: {text}", file=sys.stderr)
    sys.exit(status)
