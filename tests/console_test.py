"""What is printed is text: no order to rich or to a terminal, in any encoding, into any pipe."""

import os
import re
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


def test_ctrl_c_ends_a_command_quietly():
    code = "from qlog.console import *\nwith output(): print(1); raise KeyboardInterrupt"
    assert run(code, "utf-8") == (130, "1", "")


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.0, "0 s"),
        (0.0004, "0.4 ms"),
        (0.038, "38 ms"),
        (0.0994, "99 ms"),
        (0.0996, "0.10 s"),
        (0.999, "1.0 s"),
        (12.345, "12.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (250.4, "4 min 10 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (48 * 3600 - 40, "47 h 59 min"),
        (48 * 3600 - 20, "2 d 00 h"),
        (76 * 3600, "3 d 04 h"),
        (float("nan"), "nan s"),
        (float("inf"), "inf s"),
    ],
)
def test_times_are_as_people_read_them(seconds, text):
    assert console.time_text(seconds) == text


def test_times_that_are_guessed_have_no_parts_of_a_second():
    whole = [console.time_text(seconds, whole=True) for seconds in (0.0, 0.04, 12.7, 59.6, 250.4)]
    assert whole == ["0 s", "0 s", "13 s", "1 min 00 s", "4 min 10 s"]


def test_numbers_have_the_word_that_belongs_to_them():
    texts = [console.count_text(number, "step") for number in (0, 1, 2, 3000)]
    assert texts == ["0 steps", "1 step", "2 steps", "3,000 steps"]
    assert console.count_text(1, "process", "processes") == "1 process"
    assert console.count_text(2, "process", "processes") == "2 processes"


@pytest.mark.parametrize(
    "size, text",
    [
        (0.5, "0 bytes"),
        (1, "1 byte"),
        (999.4, "999 bytes"),
        (999.6, "1.0 kB"),
        (999_960, "1.0 MB"),
        (999_960_000, "1.0 GB"),
        (1000, "1.0 kB"),
        (41_000, "41.0 kB"),
        (3.7e6, "3.7 MB"),
        (25.2e9, "25.2 GB"),
        (1e15, "1,000,000.0 GB"),
    ],
)
def test_sizes_are_as_people_read_them(size, text):
    assert console.size_text(size) == text


def test_a_pipe_hears_what_begins_and_that_it_goes_on(capsys, monkeypatch):
    line = console.ProgressLine()
    line.begin("step 1/9  compiling", share=0.0)
    line.beat("decoding: token 8", share=0.0)  # a reader does not wonder yet
    assert capsys.readouterr().out == "step 1/9  compiling\n"
    monkeypatch.setattr(console, "_SILENCE", 0.0)
    line.beat("decoding: token 16", share=0.0)
    assert capsys.readouterr().out == "decoding: token 16\n"


PAGE = "**p@1**\n\n| run | seconds |\n|---|---|\n| a_b <lambda> [x] | 3.5 \x1b[2J |\n\nThe end."


def test_a_page_is_as_it_is_in_a_pipe(capsys):
    console.show_markdown(PAGE)
    assert capsys.readouterr().out == PAGE.replace("\x1b", "\\x1b") + "\n"


# ---- What a terminal gets ----


def test_a_page_is_drawn_on_a_terminal():
    out = on_a_terminal(f"from qlog.console import *\nshow_markdown({PAGE!r})", NO_COLOR="1")
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    assert lines[0] == "p@1" and lines[-1] == "The end." and "|" not in out and "\x1b" not in out
    (row,) = (line for line in lines if line.startswith("a_b"))
    assert "<lambda> [x]" in row and "\\x1b[2J" in row
    assert set(lines[2]) == {"─"} and max(map(len, lines)) <= 80


def test_a_page_whose_table_does_not_fit_lists_its_rows():
    code = f"from qlog.console import *\nshow_markdown({PAGE!r})"
    out = on_a_terminal(code, NO_COLOR="1", COLUMNS="17")
    assert "a_b <lambda> [x]\n  seconds 3.5" in out and "─" not in out


def test_a_table_is_as_wide_as_its_terminal():
    code = "from qlog.console import *\nshow_table('run', {'model': 300 * 'x'})"
    for columns in (40, 80, 140):
        out = on_a_terminal(code, COLUMNS=str(columns), NO_COLOR="1")
        assert max(map(len, out.splitlines())) == columns


def test_a_terminal_hears_that_work_goes_on():
    code = "from qlog import console\nconsole._SILENCE_LIVE = {}\n"
    code += "line = console.ProgressLine()\nline.show('at 1')\nline.beat('still at 1')"
    assert "still" not in on_a_terminal(code.format(1000))
    assert "still at 1" in on_a_terminal("import time\n" + code.format("0; console._PAUSE = 0"))


_PTY = """
import os, pty, sys
sys.stdout.flush()
status = pty.spawn([sys.executable, "-c", sys.argv[1]])
sys.exit(os.waitstatus_to_exitcode(status))
"""


def on_a_terminal(code: str, **env: str) -> str:
    """What a program writes on a terminal of 80 columns."""
    hidden = ("NO_COLOR", "FORCE_COLOR", "COLUMNS")
    result = subprocess.run(
        [sys.executable, "-c", _PTY, code],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env={
            **{name: value for name, value in os.environ.items() if name not in hidden},
            "PYTHONPATH": str(ROOT),
            "TERM": "xterm",
            "COLUMNS": "80",
            "PYTHONIOENCODING": "utf-8",
            **env,
        },
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.decode().replace("\r\n", "\n")


LINES = """
from qlog.console import *
with output():
    say("begun"); say("warning: odd"); say("title", "bold")
    ProgressLine().show(200 * "x", share=0.5)
    line = ProgressLine()
    line.show("step 1/2  loss 1  " + 200 * "x", share=0.5)
    line.show("too soon after the last one")
    ProgressLine(after=60).show("too soon after the beginning")
    line.show("step 2/2", share=1.0, force=True)
    ProgressLine().show("evaluating 1/2")
"""


def test_on_a_terminal_a_progress_line_is_rewritten_and_never_wraps():
    out = on_a_terminal(LINES)
    assert "\x1b[33mwarning:\x1b[0m odd" in out and "\x1b[1mtitle\x1b[0m" in out
    # Each text clears the line before it; only what is for good ends with a newline.
    first, cut, second, third = out.split("\x1b[2K")[-4:]
    visible = [re.sub(r"\x1b\[[0-9;]*m", "", each).rstrip("\r") for each in (first, cut)]
    bar = 8 * "━" + 8 * "─"
    # Whole items where one fits. A word of 200 letters is one item, and is cut at the edge.
    assert visible == [f"{bar} {'x' * 62}", f"{bar} step 1/2  loss 1"]
    assert "\n" not in first and second.count("\n") == 1 and 16 * "━" in second
    # What ends a command begins below the line.
    assert third == "evaluating 1/2\n"


@pytest.mark.parametrize(
    "env, colours, rewrites",
    [
        ({"NO_COLOR": "1"}, False, True),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False, True),
        ({"NO_COLOR": ""}, True, True),
        ({"TERM": "dumb"}, False, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, True, False),
    ],
    ids=str,
)
def test_a_terminal_gets_what_its_user_wants(env, colours, rewrites):
    out = on_a_terminal(LINES + 'show_table("run", {"model": "x"})', **env)
    assert ("\x1b[1mtitle" in out) == colours == (re.search(r"\x1b\[\d+m", out) is not None)
    assert ("\x1b[2K" in out) == rewrites == ("\r" in out)


def test_a_pipe_gets_plain_lines_unless_colours_are_forced(monkeypatch, capsys):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    line = console.ProgressLine(every=1000)
    line.show("step 1/9", share=0.1)
    line.show("step 9/9", share=1.0, force=True)
    console.say("warning: odd", "bold")
    assert capsys.readouterr().out == "step 9/9\nwarning: odd\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    console.say("warning: odd")
    console.complain("bad")
    captured = capsys.readouterr()
    assert captured.out == "\x1b[33mwarning:\x1b[0m odd\n"
    assert captured.err == "\x1b[1;31mqlog:\x1b[0m bad\n"


def test_after_a_signal_a_reader_that_is_gone_is_no_failure():
    """`run | tee log`: Ctrl-C ends tee, too, and the run saves and says so."""
    program = (
        "import sys; from qlog import console; sys.stdin.readline()\n"
        "console.outlive_reader(); console.put('saved'); console.put('stopped'); sys.exit(7)"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert run.stdout and run.stdin and run.stderr
    run.stdout.close()
    run.stdin.write("go\n")
    run.stdin.close()
    assert run.wait(60) == 7, run.stderr.read()
