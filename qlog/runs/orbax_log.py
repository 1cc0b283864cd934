"""What Orbax and TensorStore print: saves that failed in the background are known by it.

What they raise as well is not on the screen: a user would read it twice.
"""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

# What went wrong in the background of the last save, in this process. Orbax tells the caller only
# when all processes are done; before that it is in its log, and nowhere else.
failures: list[BaseException] = []


def watch() -> None:
    """From now on `failures` is kept, and their log and late tracebacks are not on the screen."""
    logger = logging.getLogger("absl")
    if _is_not_of_orbax not in logger.filters:
        logger.addFilter(_is_not_of_orbax)
    if getattr(sys.unraisablehook, "func", None) is not _show_unless_late:
        sys.unraisablehook = functools.partial(_show_unless_late, sys.unraisablehook)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """A filter of log records; takes note of failed saves."""
    if record.filename == "async_checkpointer.py" and record.exc_info and record.exc_info[1]:
        failures.append(record.exc_info[1])
    return "orbax" not in record.pathname


def _show_unless_late(
    show: Callable[["sys.UnraisableHookArgs"], Any], dropped: "sys.UnraisableHookArgs"
) -> None:
    """A hook for exceptions that nobody can catch, without those of writes that end too late.

    Where one write of a save fails, Orbax closes its event loop. TensorStore still ends the others,
    and each cannot tell the loop so.

    Args:
      show: the hook before.
    """
    error, frames = dropped.exc_value, dropped.exc_traceback
    is_closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    if not is_closed or frames is None or frames.tb_frame.f_code.co_name != "call_soon_threadsafe":
        show(dropped)
