"""The stand-in for a faulty disk: it tells which runs it has disturbed."""

import errno
import os
import subprocess
import sys

import faulty_disk

_WRITE = """
import sys
for number in range(3):
    try:
        open(f"{sys.argv[1]}/{number}", "x").close()
    except OSError as error:
        print(number, error.errno)
"""


def test_only_writes_that_failed_leave_a_mark(tmp_path):
    library = faulty_disk.library(tmp_path)
    for first, failed in ((2, [1, 2]), (4, [])):  # of three calls: a file is opened with O_CREAT
        folder, mark = tmp_path / f"from{first}", tmp_path / f"mark{first}"
        folder.mkdir()
        faults = faulty_disk.variables(library, folder, mark, "EIO", first)
        done = subprocess.run(
            [sys.executable, "-c", _WRITE, folder],
            env=os.environ | faults,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "".join(f"{number} {errno.EIO}\n" for number in failed)
        assert (mark.read_bytes() if mark.exists() else b"") == b"x" * len(failed)
