"""Signals in every phase of a run, on real processes: noticed at once, nothing lost or doubled."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest
import same_runs
import tiny
from places import ROOT, TESTS

from qlog.runs.log import read_jsonl

STEPS = 4


def run(workdir, point, nth=1, signals="SIGTERM", code=0, launcher=(), cache="", **environment):
    """Starts tests/preempted.py and returns its output."""
    start = launcher or (sys.executable,)
    result = subprocess.run(
        [*start, str(TESTS / "preempted.py"), str(workdir), point, str(nth), signals, str(STEPS)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ
        | {
            "JAX_NUM_CPU_DEVICES": "1",
            "PYTHONPATH": f"{ROOT}:{TESTS}",
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        | environment,
    )
    output = result.stdout + result.stderr
    assert result.returncode == code, output
    return output


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Programs that the processes of this file compile once."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    run(workdir, "never", cache=cache)
    return workdir


def latest(workdir):
    return max(int(folder.name) for folder in (workdir / "checkpoints").iterdir())


def assert_same_run(workdir, whole):
    same_runs.assert_same_run(tiny.config(mesh={"data": 1}), workdir, whole)


# point, the how manieth, the step whose state is saved (None: nothing had to be)
POINTS = {
    "mid-decode": ("decode", 5, 1),
    "mid-gradient": ("gradient", 3, 1),
    "mid-evaluation": ("evaluation", 1, 2),
    "mid-save": ("save", 1, 2),
    "mid-compile": ("compile", 1, None),
    "before the first step": ("weights", 1, None),
}


def _params(*usual):
    """Every point; those that are not named are slow."""
    return [pytest.param(n, marks=[] if n in usual else pytest.mark.slow) for n in POINTS]


@pytest.mark.parametrize("name", _params("mid-decode", "mid-save"))
def test_a_signal_is_noticed_saves_and_loses_nothing(name, uninterrupted, cache, tmp_path):
    point, nth, step = POINTS[name]
    # A second one changes nothing: systemd, SLURM and shells send several.
    output = run(tmp_path, point, nth, "SIGTERM,SIGTERM", cache=cache)
    assert output.count("sending") == (1 if point == "weights" else 2)  # there the first ends it
    assert "Traceback" not in output
    trained = [
        row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl") if row["phase"] == "train"
    ]
    if step is None:
        assert trained == [] and not list((tmp_path / "checkpoints").glob("*"))
    else:
        assert trained == list(range(step)) and latest(tmp_path) == step
        assert f"stopped at step {step}, saved in" in output
    output = run(tmp_path, "never", cache=cache)
    if point == "evaluation":
        assert "evaluation goes on after 2 of 6 questions" in output
    assert_same_run(tmp_path, uninterrupted)


def test_a_signal_in_the_final_evaluation_loses_nothing(cache, tmp_path):
    """The best checkpoint on the test split: what was sampled stays, results.json comes last."""
    whole, workdir = tmp_path / "whole", tmp_path / "interrupted"
    run(whole, "never", cache=cache, FINAL="test")
    # Two evaluations of three batches come before it.
    output = run(workdir, "evaluation", 8, "SIGTERM,SIGTERM", cache=cache, FINAL="test")
    assert f"stopped at step {STEPS}, saved in" in output
    assert not (workdir / "results.json").exists() and not (workdir / "final.json").exists()
    output = run(workdir, "never", cache=cache, FINAL="test")
    assert "evaluation goes on after 4 of 6 questions" in output
    assert_same_run(workdir, whole)
    finals = [json.loads((d / "final.json").read_text()) for d in (workdir, whole)]
    assert finals[0]["metrics"] == finals[1]["metrics"] and finals[0]["split"] == "test"
    texts = [(d / "samples" / "final.jsonl").read_text() for d in (workdir, whole)]
    assert texts[0] == texts[1]


def test_ctrl_c_saves_and_twice_stops_at_once(uninterrupted, cache, tmp_path):
    assert "again to stop at once" in run(tmp_path / "once", "decode", 5, "SIGINT", cache=cache)
    assert latest(tmp_path / "once") == 1
    run(tmp_path / "twice", "decode", 5, "SIGINT,SIGINT", code=130, cache=cache)
    assert not list((tmp_path / "twice" / "checkpoints").glob("[0-9]"))
    run(tmp_path / "twice", "never", cache=cache)
    assert_same_run(tmp_path / "twice", uninterrupted)


def test_a_signal_after_the_last_step_leaves_a_finished_run(uninterrupted, cache, tmp_path):
    run(tmp_path, "finished", cache=cache)
    assert_same_run(tmp_path, uninterrupted)


def test_a_kill_between_an_evaluation_and_its_score_evaluates_again(uninterrupted, cache, tmp_path):
    run(
        tmp_path, "scoring", 2, code=9, cache=cache
    )  # of the last step: nothing may say that it is done
    assert not (tmp_path / "results.json").exists()
    run(tmp_path, "never", cache=cache)
    assert_same_run(tmp_path, uninterrupted)


def test_signals_while_a_run_finishes_wait_for_its_end(uninterrupted, cache, tmp_path):
    run(tmp_path, "pruning", signals="SIGTERM,SIGTERM", cache=cache)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    "point",
    ["closing", *(pytest.param(p, marks=pytest.mark.slow) for p in ("gradient", "finished"))],
)
def test_a_signal_at_the_end_of_a_run_stops_the_sweep(point, cache, tmp_path):
    """In its last step (of two microbatches), while it writes its results, and while it closes."""
    nth = 2 * STEPS if point == "gradient" else 1
    output = run(tmp_path, point, nth, cache=cache, RUNS="one two")
    assert "stopped after run 1/2 one: the same command goes on" in output
    assert not (tmp_path / "two").exists()
    output = run(tmp_path, "never", cache=cache, RUNS="one two")
    assert "stopped" not in output
    for name in ("one", "two"):
        assert json.loads((tmp_path / name / "results.json").read_text())["step"] == STEPS
    assert (tmp_path / "report.md").exists()


def test_an_interrupted_evaluate_says_so_by_its_status_and_goes_on(uninterrupted, cache, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(uninterrupted, workdir)
    output = run(workdir, "evaluation", 1, cache=cache, code=143, MODE="evaluate")
    assert "the same command goes on" in output
    output = run(workdir, "never", cache=cache, MODE="evaluate")
    assert "evaluation goes on after 2 of 6 questions" in output
    best = json.loads((workdir / "evaluation_validation.json").read_text())
    assert best["source"] == f"{workdir}/checkpoints/{best['step']}"
    trained = (workdir / "samples" / f"step_{best['step']:06d}.jsonl").read_text()
    assert (workdir / "samples" / "validation.jsonl").read_text() == trained


@pytest.mark.slow
def test_a_run_that_stands_still_shows_its_stacks_and_ends_for_another_try(
    uninterrupted, cache, tmp_path
):
    output = run(tmp_path, "stall", 7, code=75, cache=cache)
    assert "nothing has happened for" in output and "sleep_for_long" in output
    run(tmp_path, "never", cache=cache)
    assert_same_run(tmp_path, uninterrupted)


def test_sigusr1_shows_the_stacks_and_the_run_goes_on(uninterrupted, cache, tmp_path):
    output = run(tmp_path, "gradient", 3, "SIGUSR1", cache=cache)
    assert "Current thread" in output and "in batch_gradient" in output
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("name", _params("mid-gradient")[:3])
def test_all_processes_stop_at_one_point_when_one_hears_of_it(name, cache, tmp_path):
    """Hosts are preempted one by one; the second is signalled, which writes no metrics."""
    point, nth, step = POINTS[name]
    local = (sys.executable, str(ROOT / "launch/local"), "--processes=2", "--")
    output = run(
        tmp_path, point, nth, "SIGTERM,SIGTERM", launcher=local, cache=cache, SIGNALLED="1"
    )
    assert f"stopped at step {step}, saved in" in output and "exit codes 0: 0, 1: 0" in output
    assert latest(tmp_path) == step
    run(tmp_path, "never", launcher=local, cache=cache)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["phase"]) for row in rows] == [
        (0, "train"),
        (1, "train"),
        (1, "validation"),
        (2, "train"),
        (3, "train"),
        (3, "validation"),
    ]


@pytest.mark.slow
def test_processes_evaluate_the_best_checkpoint_together(cache, tmp_path):
    local = (sys.executable, str(ROOT / "launch/local"), "--processes=2", "--")
    # Two evaluations of two batches come before it. In its first one process is signalled.
    output = run(
        tmp_path,
        "evaluation",
        5,
        "SIGTERM,SIGTERM",
        launcher=local,
        cache=cache,
        SIGNALLED="1",
        FINAL="test",
    )
    assert "exit codes 0: 0, 1: 0" in output and not (tmp_path / "final.json").exists()
    output = run(tmp_path, "never", launcher=local, cache=cache, FINAL="test")
    assert "evaluation goes on after 4 of 6 questions" in output
    final = json.loads((tmp_path / "final.json").read_text())
    assert final["split"] == "test" and final["metrics"]["questions"] == 6
    rows = read_jsonl(tmp_path / "samples" / "final.jsonl")
    assert len({row["id"] for row in rows}) == 6
    assert (tmp_path / "results.json").exists()


def test_hosts_end_together_when_one_hears_of_it_while_a_program_compiles(cache, tmp_path):
    local = (sys.executable, str(ROOT / "launch/local"), "--processes=2", "--")
    output = run(tmp_path, "compile", launcher=local, cache=cache, SIGNALLED="1")
    # Process 0 may still be loading when it hears of it: then it is "ending", not "saving".
    assert re.search(r"\[0\] SIGTERM: (saving|ending)", output)
    assert "exit codes 0: 0, 1: 0" in output
    assert not list((tmp_path / "checkpoints").glob("*"))
    assert json.loads((tmp_path / "owner.json").read_text())["status"] == 0


@pytest.mark.slow
def test_a_save_that_fails_on_one_process_ends_all(cache, tmp_path):
    """`chattr +i`, which binds root too. The others wait in a barrier for the one that failed."""
    local = (sys.executable, str(ROOT / "launch/local"), "--processes=2", "--")
    (tmp_path / "checkpoints").mkdir()
    seal = lambda flag: subprocess.run(
        ["chattr", flag, tmp_path / "checkpoints"], check=False, capture_output=True
    )
    if seal("+i").returncode:
        pytest.skip("this user or this file system has no chattr")
    seal("-i")
    try:
        output = run(tmp_path, "sealed", 2, launcher=local, cache=cache, code=75)
        assert "checkpoint of step 4 could not be written (Operation not permitted)" in output
        assert "step 2 is the newest whole one" in output
    finally:
        seal("-i")
    output = run(tmp_path, "never", launcher=local, cache=cache)
    assert "resumed from step 2" in output


@pytest.mark.slow
def test_a_process_that_is_gone_or_cannot_read_ends_the_others_with_a_sentence(cache, tmp_path):
    local = (sys.executable, str(ROOT / "launch/local"), "--processes=2", "--")
    output = run(
        tmp_path, "gradient", 5, "SIGKILL", launcher=local, cache=cache, code=137, SIGNALLED="1"
    )
    assert "process 0 lost another process of the run" in output and "Traceback" not in output
    step = latest(tmp_path)
    output = run(tmp_path, "unreadable", launcher=local, cache=cache, code=75)
    assert f"checkpoints/{step} cannot be read by process 1" in output
    assert "Traceback" not in output and latest(tmp_path) == step
    output = run(tmp_path, "never", launcher=local, cache=cache)
    assert f"resumed from step {step}" in output


@pytest.mark.slow
def test_a_terminal_that_closes_is_a_signal_like_the_others(uninterrupted, cache, tmp_path):
    read, terminal = pty.openpty()
    command = [sys.executable, str(TESTS / "preempted.py"), str(tmp_path), "gradient", "3"]
    environment = {"PYTHONPATH": f"{ROOT}:{TESTS}", "JAX_COMPILATION_CACHE_DIR": cache}
    process = subprocess.Popen(
        [*command, "SIGHUP", str(STEPS)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        env=os.environ | environment | {"JAX_NUM_CPU_DEVICES": "1"},
    )
    os.close(terminal)
    said = b""
    while b"sending SIGHUP\r\n" not in said:
        said += os.read(read, 1 << 16)
    os.close(read)  # from now on writing to it is an error
    assert process.wait(timeout=200) == 0, said
    assert latest(tmp_path) == 1
    run(tmp_path, "never", cache=cache)
    assert_same_run(tmp_path, uninterrupted)
