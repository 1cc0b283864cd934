"""The exceptions that a user is meant to read, and the exit status of each."""

import os
import signal
import traceback


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
    return " ".join(str(error).split())[:300] or type(error).__name__
