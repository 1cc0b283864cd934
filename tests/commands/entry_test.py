"""How every command ends: with its status, whatever threads still do."""

import subprocess
import sys

import pytest
from places import ROOT

# A thread that writes to a store that never answers, and a command that fails.
_STUCK = """
import sys, threading, time
from qlog.commands import entry
from qlog.config import command_line
from qlog.errors import PassingError, Stop

command_line.define()
entry._PATIENCE = 0.5
threading.Thread(target=time.sleep, args=(3600,)).start()

def main(argv):
    raise {error}

entry.run(main)
"""


ENDS = {
    "PassingError('the store does not answer')": 75,
    "Stop(1)": 129,
    "KeyError('the store does not answer')": 1,
}


@pytest.mark.parametrize("error, status", ENDS.items())
def test_a_command_that_failed_waits_for_no_thread(error, status):
    run = subprocess.run(
        [sys.executable, "-c", _STUCK.format(error=error)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == status, run.stderr
    assert ("the store does not answer" in run.stderr) == (status != 129)
