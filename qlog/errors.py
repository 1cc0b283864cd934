"""The exceptions that a user is meant to read with their exit status, and those of users' code."""

import contextlib
import os
import signal
import threading
import traceback
from collections.abc import Iterator


class ConfigError(ValueError):
    """A setting, a file or a device layout that qlog cannot work with: status 2, not tried again.

    The message is one sentence that names the field, its value and the remedy;
    `qlog.commands.entry` prints it without a traceback.
    """

    status = 2


class TrainingError(RuntimeError):
    """Training went wrong, and would again, since a run resumes bit for bit: status 3.

    Examples: gradients stay non-finite; sampler and learner disagree.
    """

    status = 3


class PassingError(RuntimeError):
    """A fault outside the run that passes: a server, a network, another run in the workdir.

    Status 75 (EX_TEMPFAIL of sysexits.h): launchers try again.
    """

    status = 75


QLOG_ERRORS = (ConfigError, TrainingError, PassingError)


class Stop(BaseException):
    """A signal asked this run to end. A BaseException, so `except Exception` does not catch it.

    Args:
      number: of the signal.

    Attributes:
      status: the exit status: 128 + number, as shells have it; 0 of a training that lost nothing.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def last_line(error: BaseException) -> str:
    """Where an exception was raised: "mine.py:12"."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "?"


def summary(error: BaseException) -> str:
    """What a library said, on one line of at most 300 characters, to be part of our sentence.

    The name of its type where it said nothing.
    """
    try:
        text = str(error)
    except Exception:  # a class of a user's, which cannot say what it is
        text = ""
    return " ".join(text.split())[:300] or type(error).__name__


# ---- Exceptions of users' code: config files, and functions that a config names ----


def let_signals_pass(error: BaseException) -> None:
    """Raises what is no fault of a user's code that `except BaseException` stands around.

    That is a signal, also where another exception has taken its place, and a generator's end. All
    else is the code's: sys.exit(0) in it would end the run as if it had succeeded.
    """
    each, seen = error, set()
    while each is not None and id(each) not in seen:
        if isinstance(each, (KeyboardInterrupt, Stop)):
            raise each
        seen.add(id(each))
        each = each.__cause__ or each.__context__
    if isinstance(error, GeneratorExit):
        raise error


class _Noted:
    """A handler of SIGINT that raises KeyboardInterrupt, as Python's own, and remembers it."""

    came = False

    def __call__(self, number, frame) -> None:
        self.came = True
        signal.default_int_handler(number, frame)


@contextlib.contextmanager
def ctrl_c_stays() -> Iterator[None]:
    """Whatever exception Ctrl-C leads to in here, KeyboardInterrupt leaves.

    An extension in C that is interrupted while it is imported raises an ImportError that does not
    say why; JAX has several. Does nothing outside the main thread, or where a handler is set.
    """
    before = signal.getsignal(signal.SIGINT)
    is_pythons = before is signal.default_int_handler or isinstance(before, _Noted)
    if not is_pythons or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = _Noted()
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    except Exception as error:
        if handler.came:
            raise KeyboardInterrupt from error
        raise
    finally:
        if signal.getsignal(signal.SIGINT) is handler:
            signal.signal(signal.SIGINT, before)
