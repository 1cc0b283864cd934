"""What a run says in the end: each command that it names runs as it is printed."""

import re
import shlex
import sys

import processes

from qlog.storage import json_lines

CONFIG = """
import tiny

def get_config(arg=""):
    return tiny.config(train={"steps": 2}, evaluation={"every": 2})
"""


def test_a_finished_run_says_what_it_wrote_and_what_comes_next(tmp_path):
    file = tmp_path / "my config.py"  # a shell needs quotes for it
    file.write_text(CONFIG)
    env = {"PYTHONPATH": "tests:.", "JAX_NUM_CPU_DEVICES": "1"}
    workdir = tmp_path / "run"
    words = [f"--config={file}:x", f"--workdir={workdir}", "--config.seed", "3"]
    out = processes.run(sys.executable, "-m", "qlog.main", *words, env=env)
    assert f"Written into {workdir}:" in out
    written = out.partition("Written into")[2].partition("Next:")[0]
    names = re.findall(r"^  (\S+)", written, re.MULTILINE)
    assert {"results.json", "metrics.jsonl", "checkpoints", "config.json"} <= set(names)
    for name in names:
        assert (workdir / name).exists()
    commands = re.findall(r"^  (python -m .*)$", out.partition("Next:")[2], re.MULTILINE)
    assert [command.split()[2] for command in commands] == ["qlog.report", *3 * ["qlog.main"]]
    # The report of the run, and an evaluation of it with the same config.
    report, evaluate, *_ = commands
    _, *words = shlex.split(report)
    assert "1 runs" in processes.run(sys.executable, *words, f"--out={tmp_path / 'report'}")
    _, *words = shlex.split(evaluate)
    assert "--config.seed=3" in words
    processes.run(sys.executable, *words, env=env)
    assert (workdir / "evaluation_validation.json").exists()
    rows = json_lines.loads((workdir / "samples" / "validation.jsonl").read_bytes())
    assert len(rows) == 6
