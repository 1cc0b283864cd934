"""Several processes against one with as many devices, through launch/local."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
import tiny
import trees
from places import ROOT, TESTS

from qlog.config import schema
from qlog.errors import ConfigError
from qlog.experiment import prepare
from qlog.parallel import distributed
from qlog.runs import checkpoint_reader
from qlog.runs.log import read_jsonl

# Sums of eight parts, added up in another order by gloo; Adam's eps keeps its first steps smooth.
CLOSE = dict(rtol=1e-4, atol=1e-5)


def get_config(steps=2):
    """Of the run in both tests; this file is its config file."""
    tree = tiny.config(
        train={"steps": steps, "prompts_per_step": 8, "rollouts_prompts": 1},
        evaluation={"every": 2, "prompts": 11, "prompts_per_batch": 1},
        loss=schema.loss(tiny.graded_garl, q=0.75),
        # Long enough that pools shrink, and that rollouts of several waves meet.
        rollout={
            "reward": [("exact_match", 1.0), (words, 0.5)],
            "rationale_budget": 90,
            "prompts_per_wave": 1,
        },
        optimizer={"eps": 1e-3},
        mesh={"data": 4, "fsdp": 2},
    )
    tree.architecture.num_layers = 1
    return tree


def words(rationale):
    """A reward; notes each of its calls."""
    if file := os.environ.get("TEST_CALLS"):
        with open(file, "a") as calls:
            calls.write("called\n")
    return len(rationale.split())


_LOCAL = (sys.executable, str(ROOT / "launch/local"), "--processes=2")
# Processes, devices of each, the mesh. In the first layout a tensor group spans two processes: they
# have the same prompts, and parts of the same parameters. In the last fsdp does so, too.
LAYOUTS = {
    "two of one": (2, 1, {"data": 1, "fsdp": 1, "tensor": 2}),
    "two of four": (2, 4, {"data": 4, "fsdp": 2, "tensor": 1}),
    "four of one": (4, 1, {"data": 1, "fsdp": 2, "tensor": 2}),
}
_USUAL = "two of one"  # the others are slow
_PATH = {"PYTHONPATH": f"{ROOT}:{TESTS}"}


def _local(*arguments, **environment):
    return subprocess.run(
        [*_LOCAL, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | _PATH | environment,
    )


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[] if n == _USUAL else pytest.mark.slow) for n in LAYOUTS],
)
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def several(layout, tmp_path_factory, compilation_cache):
    """The workdir and the output of several processes."""
    workdir = tmp_path_factory.mktemp("several")
    processes, devices, mesh = LAYOUTS[layout]
    result = _local(
        f"--processes={processes}",
        f"--devices={devices}",
        f"--config={TESTS / 'parallel/distributed_test.py'}",
        f"--workdir={workdir}",
        *[f"--config.mesh.{axis}={size}" for axis, size in mesh.items()],
        JAX_COMPILATION_CACHE_DIR=compilation_cache,
        TEST_CALLS=str(workdir / "calls"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return workdir, result.stdout


@pytest.fixture(scope="module")
def one(layout, tmp_path_factory):
    """The workdir of one process with the same mesh."""
    workdir = tmp_path_factory.mktemp("one")
    processes, devices, mesh = LAYOUTS[layout]
    tiny.run(
        schema.merge(get_config(), {"mesh": mesh}), workdir, jax.devices()[: processes * devices]
    )
    return workdir


def test_several_processes_give_the_metrics_of_one(several, one):
    ours, theirs = (read_jsonl(d / "metrics.jsonl") for d in (several[0], one))
    assert [(row["step"], row["phase"]) for row in ours] == [
        (0, "train"),
        (1, "train"),
        (1, "validation"),
    ]
    for a, b in zip(theirs, ours, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            timed = any(word in name for word in ("seconds", "per_s", "compilations"))
            if isinstance(a[name], float) and not timed:
                np.testing.assert_allclose(b[name], a[name], **CLOSE, err_msg=name)


def test_several_processes_evaluate_every_question_once_in_order(several, one):
    ours, theirs = (read_jsonl(d / "samples" / "step_000002.jsonl") for d in (several[0], one))
    assert len(theirs) == 11
    for a, b in zip(theirs, ours, strict=True):
        assert (a["id"], a["answers"], a["rationales"]) == (b["id"], b["answers"], b["rationales"])
        np.testing.assert_allclose(b["log_w"], a["log_w"], rtol=1e-3)


def test_several_processes_draw_the_rollouts_of_one(several, one):
    ours, theirs = (read_jsonl(d / "rollouts.jsonl") for d in (several[0], one))
    assert len(theirs) == 2 * 1 * 4
    for a, b in zip(theirs, ours, strict=True):
        for name in ("step", "id", "prompt", "rationale", "answer", "reward", "forced"):
            assert a[name] == b[name]


def test_each_rollout_is_scored_by_one_process(several):
    """Also where several hold its prompt: a function may say something else the second time."""
    calls = (several[0] / "calls").read_text().splitlines()
    assert len(calls) == 2 * 8 * 4  # steps, prompts, rollouts


def test_only_the_first_process_writes(several, layout):
    workdir, output = several
    assert len(list(workdir.glob("events.out.tfevents.*"))) == 1
    processes = LAYOUTS[layout][0]
    assert output.count("step 2/2  loss") == 1
    assert f"{processes} processes, by JAX_NUM_PROCESSES={processes}" in output


def test_one_process_reads_and_continues_the_checkpoint_of_several(several, one):
    workdir, _ = several
    abstract = prepare(get_config()).abstract_params()
    ours, theirs = (checkpoint_reader.load_params(d, abstract) for d in (workdir, one))
    trees.assert_close(ours, theirs, **CLOSE)
    tiny.run(schema.merge(get_config(3), {"evaluation": {"every": 0}}), workdir)
    rows = [row for row in read_jsonl(workdir / "metrics.jsonl") if row["phase"] == "train"]
    assert [row["step"] for row in rows] == [0, 1, 2]


_ONE_FAILS = """
    import jax
    from qlog.parallel import distributed

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
        if name.startswith(
            ("JAX_COORDINATOR", "JAX_NUM_PROC", "JAX_PROCESS", "SLURM", "OMPI", "TPU")
        ):
            monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match="--distributed=on was asked.*could not be connected"):
        with distributed.processes("on"):
            pass
    with distributed.processes("auto"), distributed.processes("off"):
        assert jax.process_count() == 1
    rows = [{"id": "a", "log_w": [-np.inf]}]
    assert distributed.gather(rows) == rows and json.dumps(rows)
