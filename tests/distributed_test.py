"""Two processes of four devices each against one process of eight, through launch/local."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
import tiny

from qlog import checkpoints, distributed, train
from qlog import config as qconfig
from qlog.errors import ConfigError
from qlog.experiment import prepare
from qlog.telemetry import read_jsonl

HERE = pathlib.Path(__file__).parent
# Sums of eight parts, added up in another order by gloo; Adam's eps keeps its first steps smooth.
CLOSE = dict(rtol=1e-4, atol=1e-5)


def get_config(steps=2):
    """Of the run in both tests; this file is its config file."""
    tree = tiny.config(
        train={"steps": steps, "prompts_per_step": 8, "rollouts_prompts": 1},
        evaluation={"every": 2, "prompts": 11, "prompts_per_batch": 8},
        loss=qconfig.loss(tiny.graded_garl, q=0.75), optimizer={"eps": 1e-3}, mesh={"data": 4, "fsdp": 2},
    )  # fmt: skip
    tree.architecture.num_layers = 1
    return tree


_LOCAL = (sys.executable, str(HERE.parent / "launch/local"), "--processes=2")
_PATH = {"PYTHONPATH": f"{HERE.parent}:{HERE}"}


def _local(*arguments, **environment):
    return subprocess.run(
        [*_LOCAL, *arguments], capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | _PATH | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, compilation_cache):
    workdir = tmp_path_factory.mktemp("two")
    result = _local(
        "--devices=4", f"--config={HERE / 'distributed_test.py'}", f"--workdir={workdir}",
        JAX_COMPILATION_CACHE_DIR=compilation_cache,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return workdir, result.stdout


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    train.run(get_config(), workdir)
    return workdir


def test_two_processes_give_the_metrics_of_one(two_processes, one_process):
    workdir, _ = two_processes
    two, one = (read_jsonl(d / "metrics.jsonl") for d in (workdir, one_process))
    assert [(row["step"], row["phase"]) for row in two] == [(0, "train"), (1, "train"), (1, "validation")]
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name in a:
            if isinstance(a[name], float) and "seconds" not in name and "tokens_per_s" not in name:
                np.testing.assert_allclose(b[name], a[name], **CLOSE, err_msg=name)


def test_two_processes_evaluate_every_question_once_in_order(two_processes, one_process):
    two, one = (read_jsonl(d / "samples" / "step_000002.jsonl") for d in (two_processes[0], one_process))
    assert len(one) == len(two) == 11
    for a, b in zip(one, two):
        assert (a["id"], a["answers"], a["rationales"]) == (b["id"], b["answers"], b["rationales"])
        np.testing.assert_allclose(b["log_w"], a["log_w"], rtol=1e-3)


def test_only_the_first_process_writes(two_processes):
    workdir, output = two_processes
    assert len(list(workdir.glob("events.out.tfevents.*"))) == 1
    assert len(read_jsonl(workdir / "rollouts.jsonl")) == 2 * 1 * 4
    assert output.count("step 2/2") == 1 and "2 process(es), by JAX_NUM_PROCESSES=2" in output


def test_one_process_reads_and_continues_the_checkpoint_of_two(two_processes, one_process):
    workdir, _ = two_processes
    abstract = prepare(get_config()).abstract_params()
    two, one = (checkpoints.load_params(d, abstract) for d in (workdir, one_process))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two)):
        np.testing.assert_allclose(b, a, **CLOSE, err_msg=str(path))
    train.run(qconfig.merge(get_config(3), {"evaluation": {"every": 0}}), workdir)
    rows = [row for row in read_jsonl(workdir / "metrics.jsonl") if row["phase"] == "train"]
    assert [row["step"] for row in rows] == [0, 1, 2]


def test_sigterm_on_one_process_saves_on_all_and_ends_with_zero(tmp_path, compilation_cache):
    """A pod's hosts are preempted one by one; here process 1 hears of it, which writes no metrics."""
    workdir, output = tmp_path / "run", tmp_path / "output.txt"
    command = [*_LOCAL, "--devices=4", f"--config={HERE / 'distributed_test.py'}",
               "--config.train.steps=100000", f"--workdir={workdir}"]  # fmt: skip
    environment = os.environ | _PATH | {"JAX_COMPILATION_CACHE_DIR": compilation_cache}
    with output.open("w") as file:
        launcher = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 240
        metrics = workdir / "metrics.jsonl"
        while not (metrics.exists() and read_jsonl(metrics)):
            assert launcher.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)
        ids = re.search(r"process ids 0: (\d+), 1: (\d+)", output.read_text())
        os.kill(int(ids[2]), signal.SIGTERM)
        assert launcher.wait(timeout=60) == 0, output.read_text()
    finally:
        launcher.kill()
    steps = [row["step"] for row in read_jsonl(metrics) if row["phase"] == "train"]
    done = len(steps)
    assert steps == list(range(done))
    assert f"stopped at step {done}, saved in" in output.read_text()
    with contextlib.closing(checkpoints.Checkpoints(workdir / "checkpoints")) as saved:
        assert saved.latest_step == done


_ONE_FAILS = """
    import jax
    from qlog import distributed

    with distributed.processes("auto"):
        if jax.process_index() == 1:
            raise RuntimeError("only here")
        print(distributed.gather([{"from": jax.process_index()}]))
"""


def test_a_failing_process_ends_the_others(tmp_path):
    program = tmp_path / "fails.py"
    program.write_text(textwrap.dedent(_ONE_FAILS))
    result = _local("--", str(program))
    assert result.returncode == 1
    assert "[1] RuntimeError: only here" in result.stdout


def test_auto_says_what_it_saw_and_refuses_half_an_environment():
    seen = distributed.environment
    whole = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    assert seen(whole) == "JAX_NUM_PROCESSES=2"
    assert seen({"SLURM_STEP_NUM_TASKS": "4"}) == "SLURM_STEP_NUM_TASKS=4"
    assert seen({"TPU_WORKER_HOSTNAMES": "a,b"}) == "TPU_WORKER_HOSTNAMES=a,b"
    assert seen({"SLURM_STEP_NUM_TASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"}) == ""
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID not set"):
        seen({"JAX_NUM_PROCESSES": "2"})
    with pytest.raises(ConfigError, match="must be a whole number"):
        seen(whole | {"JAX_PROCESS_ID": "one"})


def test_on_without_peers_is_an_error_not_one_process(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("JAX_COORDINATOR", "JAX_NUM_PROC", "JAX_PROCESS", "SLURM", "OMPI", "TPU")):
            monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match="--distributed=on was asked.*could not be connected"):
        with distributed.processes("on"):
            pass
    with distributed.processes("auto"), distributed.processes("off"):
        assert jax.process_count() == 1
    rows = [{"id": "a", "log_w": [-np.inf]}]
    assert distributed.gather(rows) == rows and json.dumps(rows)
