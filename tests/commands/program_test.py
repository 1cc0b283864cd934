"""The command `qlog`: what `python -m` runs, with its exit status."""

import configparser
import importlib
import platform
import sys

import jax
import processes
import pytest
from places import ROOT

from qlog import __version__
from qlog.commands import program

RUN = "import sys; sys.argv[0] = '/usr/bin/qlog'; from qlog.commands.program import run; run()"


def qlog(*words, code=0):
    return processes.run(sys.executable, "-c", RUN, *words, code=code)


def test_the_installed_command_is_this_function():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, _, place = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = place.partition(":")
    assert name == "qlog"
    assert getattr(importlib.import_module(module), function) is program.run


def test_a_config_file_imports_from_the_current_folder(tmp_path):
    """As with `python -m`; the script itself lies elsewhere, where pip has put it."""
    script = tmp_path / "bin" / "qlog"
    script.parent.mkdir()
    script.write_text("from qlog.commands.program import run\nrun()\n")
    folder = tmp_path / "mine" / "configs_of_mine"
    folder.mkdir(parents=True)
    (folder / "base.py").write_text("from qlog import config\n\nget_config = config.default\n")
    (folder / "small.py").write_text("from configs_of_mine.base import get_config\n")
    words = ["--config=configs_of_mine/small.py", "--help-config=seed"]
    # Of the checkout only qlog itself is on the path.
    env = {"PYTHONPATH": str(ROOT)}
    by_script = processes.run(sys.executable, script, *words, env=env, cwd=folder.parent)
    by_module = [sys.executable, "-m", "qlog.main", *words]
    assert by_script == processes.run(*by_module, env=env, cwd=folder.parent)
    assert "seed" in by_script


def test_without_a_word_it_is_qlog_main():
    assert "--mode=train|evaluate" in qlog("--help")
    assert "Did you mean: workdir" in qlog("--config=configs/quickstart.py", "--wrokdir=x", code=2)
    assert "--config=FILE is needed" in qlog(code=2)


@pytest.mark.parametrize(
    "words, message",
    [
        (["fly"], "there is no command 'fly': qlog --config=FILE trains"),
        (["reprot", "runs/x"], "there is no command 'reprot' (did you mean 'report'?)"),
        (["train", "--config=configs/quickstart.py"], "'train' is a mode: write --mode=train"),
        (["evaluate"], "as in qlog --config=FILE --mode=evaluate."),
        (["--config=configs/quickstart.py", "train.steps=5"], "'train.steps=5' is no flag: "),
    ],
)
def test_a_word_that_is_no_command_is_told_what_there_is(words, message):
    (line,) = qlog(*words, code=2).splitlines()
    assert line.startswith("qlog: ") and message in line
    if "no command" in message:
        assert all(word in line for word in program.SUBCOMMANDS)


@pytest.mark.parametrize("words", [[], *([word] for word in program.SUBCOMMANDS)], ids=str)
def test_every_command_tells_its_version(words):
    expected = f"qlog {__version__}, jax {jax.__version__}, Python {platform.python_version()}\n"
    assert qlog(*words, "--version") == expected


@pytest.mark.parametrize("word", program.SUBCOMMANDS)
def test_a_word_runs_the_module_that_it_names(word):
    page = qlog(word, "--help")
    assert f"python -m {program.SUBCOMMANDS[word]}" in page


def test_a_subcommand_keeps_its_status():
    assert "usage: python -m qlog.commands.run_status" in qlog("status", code=2)
    assert '"finished": false' in qlog("status", "/tmp/no-such-run-of-qlog")
    assert "no run is in" in qlog("report", "/tmp/no-such-run-of-qlog", code=2)
