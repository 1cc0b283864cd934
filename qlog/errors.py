"""The exceptions that a user is meant to read, and the exit status of each."""

import functools
import importlib.util
import os
import pathlib
import signal
import sys
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


# Modules of the extra `train` in setup.cfg: all of qlog needs them, but its losses.
TRAIN_MODULES = (
    "absl",
    "etils",
    "filelock",
    "flax",
    "fsspec",
    "grain",
    "huggingface_hub",
    "importlib_resources",
    "jinja2",
    "matplotlib",
    "ml_collections",
    "orbax",
    "packaging",
    "pyarrow",
    "rich",
    "safetensors",
    "sentencepiece",
    "tensorboardX",
    "tensorflow_datasets",
    "tokenizers",
)


# What can be imported without them.
_WITHOUT_TRAIN = ("losses", "errors", "console")


def check_rooms() -> None:
    """From now on, to import a room of qlog that needs the extra `train` calls `require_train`.

    Without it the first import of a package that is missing would fail, in whichever module that
    stands, with a sentence that names neither the extra nor the remedy.
    """
    sys.meta_path.insert(0, _Rooms())


class _Rooms:
    """A finder of modules that finds none: Python asks it first, and then all others."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        package, _, rest = name.partition(".")
        if package == "qlog" and rest.partition(".")[0] not in _WITHOUT_TRAIN:
            require_train()


@functools.cache  # an import asks for each module; a call that raises asks again
def require_train() -> None:
    """Refuses where the extra `train` is not installed: qlog can be installed for its losses only.

    A command then ends with one sentence and status 2. Other programs, a notebook for example, get
    an exception, which does not end them.

    Raises:
      ImportError: a package is missing, and it is another program that imports.
    """
    # Looked for, not imported: together they would take seconds.
    missing = next((name for name in TRAIN_MODULES if not importlib.util.find_spec(name)), "")
    if not missing:
        return
    # In a clone the extra is most likely there, in the .venv of which this Python is not. Elsewhere
    # pip knows which qlog is meant only where it is installed: in a registry the name is another's.
    clone = pathlib.Path(__file__).parents[1]
    remedy = "run pip install 'qlog[train]' in the environment in which qlog is installed"
    if (clone / "launch/install").exists():
        made = (clone / ".venv/bin/python").exists()
        remedy = f"use {clone / '.venv/bin/python'}" + (
            "" if made else ", which launch/install makes"
        )
    sentence = (
        f"all of qlog but its losses needs the extra train, and its package {missing} is missing "
        f"from {sys.executable}: {remedy}."
    )
    if not _is_command():
        raise ImportError(sentence, name=missing)
    print(f"qlog: {sentence}", file=sys.stderr)
    sys.exit(ConfigError.status)


def _is_command() -> bool:
    """Whether this process was started as a command of qlog."""
    program = sys.argv[0] if sys.argv else ""
    # `python -m qlog.commands.show` imports the package while "-m" stands for the program's name,
    # and later modules while __main__ is show. The script `qlog` bears the name itself.
    module = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "")
    is_script = os.path.splitext(os.path.basename(program))[0] == "qlog"
    return program == "-m" or module.startswith("qlog.") or is_script
