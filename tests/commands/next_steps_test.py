"""What a run says in the end: each command that it names runs as it is printed."""

import errno
import re
import shlex
import shutil
import sys

import processes
import tiny
from places import ROOT, TESTS

from qlog.commands import next_steps
from qlog.storage import json_lines, paths
from qlog.storage.paths import Path

CONFIG = """
import tiny

def get_config(arg=""):
    return tiny.config(train={"steps": 2}, evaluation={"every": 2})
"""


def test_a_finished_run_says_what_it_wrote_and_what_comes_next(tmp_path):
    file = tmp_path / "my config.py"  # a shell needs quotes for it
    file.write_text(CONFIG)
    # No program is on the path: what is printed has to name its own.
    bash = shutil.which("bash")
    env = {"PYTHONPATH": f"{TESTS}:{ROOT}", "JAX_NUM_CPU_DEVICES": "1", "PATH": ""}
    shell = lambda command: processes.run(bash, "-c", command, env=env, cwd=tmp_path)
    workdir = tmp_path / "run"
    words = shlex.join(
        [sys.executable, "-m", "qlog.main", f"--config={file}:x", f"--workdir={workdir}"]
    )
    # A pipe, which is empty when it is read again.
    flags = r"<(printf '%s\n' --config.seed=3 --distributed=off)"
    out = shell(f"{words} --config.train.rollouts_every 2 --flagfile={flags}")
    # What may take long is announced, in the order in which it comes.
    told = [line for line in out.splitlines() if re.match(r"step 1/2  |evaluating", line)]
    for line, begins in zip(
        told,
        (
            "step 1/2  compiling, which later steps do not",
            "step 1/2  decoding: token ",
            "step 1/2  learning",
            "step 1/2  loss ",
            "evaluating: 0/6 questions  step 2",
        ),
        strict=True,
    ):
        assert line.startswith(begins), told
    assert f"Written into {workdir}:" in out
    written = out.partition("Written into")[2].partition("Next:")[0]
    names = re.findall(r"^  (\S+)", written, re.MULTILINE)
    assert {"results.json", "metrics.jsonl", "checkpoints", "config.json"} <= set(names)
    for name in names:
        assert (workdir / name).exists()
    report, evaluate, sample, export = re.findall(
        r"^  (\S.* -m qlog.*)$", out.partition("Next:")[2], re.MULTILINE
    )
    # With the same config, from wherever its flags came.
    for command in (evaluate, sample, export):
        assert {"--config.seed=3", "--config.train.rollouts_every=2", "--distributed=off"} <= set(
            shlex.split(command)
        )
    assert "1 run. The report is" in shell(report)
    assert (tmp_path / "report" / "report.html").exists()
    shell(evaluate)
    assert (workdir / "evaluation_validation.json").exists()
    rows = json_lines.loads((workdir / "samples" / "validation.jsonl").read_bytes())
    assert len(rows) == 6
    shown = shell(sample)
    assert shown.count("--- gold: ") == 6
    assert "answers: 4 to each question, temperature 1, top_k 0, top_p 1; set by --config." in shown
    assert "sampling; 3 answers to each question are shown" in shown
    assert f"exported to {workdir / 'export'}" in shell(export)
    assert (workdir / "export" / "model.safetensors").exists()


def test_a_python_below_the_current_folder_has_a_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first_word = lambda: {
        shlex.split(step.command)[0]
        for step in next_steps.after(tiny.config(), Path(tmp_path / "run"), ["main"])
    }
    for executable, word in (
        (tmp_path / ".venv/bin/python", ".venv/bin/python"),
        (tmp_path / "my env/bin/python", "my env/bin/python"),
        (tmp_path / "python", str(tmp_path / "python")),  # a bare word is looked for elsewhere
        (tmp_path.parent / "python", str(tmp_path.parent / "python")),
    ):
        monkeypatch.setattr(sys, "executable", str(executable))
        assert first_word() == {word}


def test_a_workdir_that_cannot_be_read_at_the_end_is_no_error(tmp_path, capsys, monkeypatch):
    def fail(folder):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(paths, "names", fail)
    next_steps.tell(Path(tmp_path), [next_steps.Step("command", "makes")])
    assert "Next:\n  command\n" in capsys.readouterr().out
