"""What is printed is text: no order to rich or to a terminal, in any encoding, into any pipe."""

import os
import subprocess
import sys

import pytest
from places import ROOT

from qlog import console

ODD = "a[/red]b [bold]c :smile: \x1b[2J\x1b]0;title\x07 d\u202ee\r\x00 का é"


def test_orders_to_a_terminal_are_written_out():
    assert console.printable("a\tb\nc é का 东") == "a\tb\nc é का 东"
    assert console.printable("\x1b[31m\r\x07\x00\x9b\u202e") == "\\x1b[31m\\r\\x07\\x00\\x9b\\u202e"


def test_tables_and_lines_show_what_they_are_given(capsys):
    console.show_table("run [/x]", {"workdir": ODD, "[red]": "y"})
    console.say(ODD)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out
    for part in ("run [/x]", "a[/red]b [bold]c :smile: \\x1b[2J", "[red]", "का é"):
        assert part in out


def run(code: str, encoding: str, reader: str = "cat") -> tuple[int, str, str]:
    """The status, output and errors of a command whose output goes through a pipe to `reader`."""
    command = f"{sys.executable} -c '{code}' | {reader}; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)},
        timeout=100,
    )
    *lines, status = result.stdout.decode(encoding).splitlines()
    return int(status), "\n".join(lines), result.stderr.decode()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_will_do(encoding):
    code = 'from qlog.console import *\nwith output(): show_table("x", {"a": "\\u0915é"})'
    status, out, err = run(code, encoding)
    assert status == 0 and "Traceback" not in err
    assert ("\\u0915" in out) == (encoding != "utf-8")


def test_a_reader_that_has_gone_ends_a_command_quietly():
    code = "from qlog.console import *\nwith output():\n  for i in range(10**6): print(i)"
    status, out, err = run(code, "utf-8", "head -1")
    assert (status, out) == (141, "0") and "Traceback" not in err and "BrokenPipe" not in err
    # Also where all of it was in the buffer, and where the command exits by itself.
    code = "import time, sys\nfrom qlog.console import *\n"
    code += "with output():\n  print(1); time.sleep(1); sys.exit(0)"
    status, _, err = run(code, "utf-8", "true")
    assert status == 141 and "BrokenPipe" not in err
