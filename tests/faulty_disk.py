"""A disk whose writes fail, for a process of its own: testdata/failing_writes.c, compiled here."""

import errno
import shutil
import subprocess
import sys

import pytest
from places import TESTDATA

ERRORS = {name: getattr(errno, name) for name in ("EDQUOT", "EIO", "ENOSPC", "EROFS")}


def library(folder):
    """The compiled library; skips the test where there is no Linux or no C compiler."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C compiler")
    built = folder / "failing_writes.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", built, TESTDATA / "failing_writes.c", "-ldl"],
        check=True,
    )
    return built


def variables(library, folder, mark, error, first, last=2**40):
    """The environment of a process whose writes below `folder` fail.

    Args:
      library: from `library`.
      mark: a file outside of it, which gets a byte for each write that failed.
      error: a key of ERRORS.
      first, last: which of them, counted from 1.
    """
    return {
        "LD_PRELOAD": str(library),
        "FAULT_FOLDER": str(folder),
        "FAULT_MARK": str(mark),
        "FAULT_ERRNO": str(ERRORS[error]),
        "FAULT_FIRST": str(first),
        "FAULT_LAST": str(last),
    }
