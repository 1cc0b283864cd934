"""The exceptions that a user is meant to read, and the exit status that each stands for."""

import signal


class ConfigError(ValueError):
    """A setting, a file or a device layout that qlog cannot work with: status 2, never tried again.

    The message is one sentence that names the field, its value and the remedy;
    `qlog.commands.entry` prints it without a traceback.
    """

    status = 2


class TrainingError(RuntimeError):
    """Training went wrong and would again, since a run resumes bit for bit: status 3, never tried
    again. Gradients stay non-finite, sampler and learner disagree."""

    status = 3


class PassingError(RuntimeError):
    """Something outside the run that passes: a server, a network, another run in the workdir.
    Status 75 (EX_TEMPFAIL of sysexits.h): launchers try again."""

    status = 75


QLOG_ERRORS = (ConfigError, TrainingError, PassingError)


class Stop(BaseException):
    """A signal asked this run to end. A BaseException: no handler of errors takes it for one.

    Attributes:
      status: what a shell calls a process that the signal ended, 130 or 143; 0 of a training that
        lost nothing.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def summary(error: BaseException) -> str:
    """What a library said, on one line of at most 300 characters, to be part of our sentence.

    The name of its type where it said nothing.
    """
    return " ".join(str(error).split())[:300] or type(error).__name__
