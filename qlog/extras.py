"""What is installed: qlog can be, with or without the packages of its extra `train`.

The losses need JAX, NumPy and Optax only. All other rooms of qlog (its folders and modules) need
the extra. Imports no JAX.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import os
import pathlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from qlog.errors import ConfigError

# Modules of the extra `train` in setup.cfg.
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
_WITHOUT_TRAIN = ("losses", "errors", "extras", "console")


def is_installed(module: str) -> bool:
    """Whether there is a top-level module of this name to import."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # it is imported, and was made by hand: a stub of a test or a notebook
        return True


def check_rooms() -> None:
    """From now on, to import a room of qlog that needs the extra `train` ends where it is missing.

    Without it the first import of a package that is missing would fail, in whichever module that
    stands, with a sentence that names neither the extra nor the remedy.
    """
    sys.meta_path.insert(0, _Rooms())


class _Rooms:
    """A finder of modules, which Python asks first: it finds those that cannot be imported."""

    def __init__(self) -> None:
        self._is_complete = False  # whether the extra has been found; each import asks

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, rest = name.partition(".")
        is_free = package != "qlog" or not rest or rest.partition(".")[0] in _WITHOUT_TRAIN
        if is_free or self._is_complete:
            return None
        # Looked for, not imported: together they would take seconds.
        missing = next((name for name in TRAIN_MODULES if not is_installed(name)), "")
        self._is_complete = not missing
        found = importlib.machinery.PathFinder.find_spec(name, path) if missing else None
        if found is None:  # of a mistyped name Python says that there is no such module
            return None
        return importlib.machinery.ModuleSpec(
            name, _Refusing(missing), is_package=found.submodule_search_locations is not None
        )


class _Refusing(importlib.abc.Loader):
    """Loads no module, and says which package is missing. To ask for the module is no mistake."""

    def __init__(self, missing: str):
        self._missing = missing

    def exec_module(self, module: ModuleType) -> NoReturn:
        _refuse(self._missing)

    def get_code(self, name: str) -> NoReturn:
        """What `python -m` asks for."""
        _refuse(self._missing)


def _refuse(missing: str) -> NoReturn:
    """Ends a command with one sentence and status 2.

    Other programs, a notebook for example, get an exception, which does not end them.

    Raises:
      ImportError: it is another program that imports.
    """
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
    if program == "-m":
        module = _module_flag(sys.orig_argv)
    is_script = os.path.splitext(os.path.basename(program))[0] == "qlog"
    return module.partition(".")[0] == "qlog" or is_script


def _module_flag(words: Sequence[str]) -> str:
    """What a command line of Python names by -m, as in `python -X dev -Im qlog.main`."""
    is_value = False  # of -X or -W
    for word, after in itertools.pairwise([*words[1:], ""]):
        if is_value or not word.startswith("-") or word.startswith("--"):
            is_value = False
            continue
        letters = word[1:]
        stop = next((i for i, letter in enumerate(letters) if letter in "mXW"), None)
        if stop is not None and letters[stop] == "m":
            return letters[stop + 1 :] or after
        is_value = stop is not None and stop == len(letters) - 1
    return ""
