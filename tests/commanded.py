"""The command of a tiny run, as a user starts it, and whether two runs are one."""

import json
import os
import subprocess
import sys

import jax
import tiny
import trees
from places import ROOT, TESTS

from qlog.experiment import prepare
from qlog.runs import checkpoint_reader
from qlog.runs.log import read_jsonl

_FILE = """
import tiny

def get_config():
    return tiny.config(**{changes!r})
"""
# Two evaluations, and checkpoints in between.
CHANGES = {
    "train": {"steps": 4},
    "checkpoint": {"every": 1},
    "evaluation": {"every": 2, "prompts": 6, "prompts_per_batch": 2},
    "rollout": {"rationale_budget": 20},
}
_TIMED = ("seconds", "per_s", "compilations", "steps_since", "utilization", "memory")


def config_file(folder):
    """A config file of `CHANGES`."""
    file = folder / "small.py"
    file.write_text(_FILE.format(changes=CHANGES))
    return file


def start(file, workdir, cache, environment=None, flags=(), **options):
    """A process of the command."""
    command = [sys.executable, "-m", "qlog.main", f"--config={file}", f"--workdir={workdir}"]
    variables = {
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": f"{ROOT}:{TESTS}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [*command, *flags],
        env=os.environ | variables | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        **options,
    )


def run(file, workdir, cache, environment=None, flags=(), timeout=240):
    """(exit status, stdout, stderr) of the command."""
    process = start(file, workdir, cache, environment, flags)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"it stands still: {out}{err}") from None
    return process.returncode, out, err


def assert_same_run(workdir, whole, num_layers=None):
    """Parameters, metrics, samples, results: bit for bit, each row once.

    Args:
      num_layers: of the model, where it is another one than that of `CHANGES`.
    """
    config = tiny.config(**CHANGES, mesh={"data": 1})
    config.architecture.num_layers = num_layers or config.architecture.num_layers
    abstract = prepare(config, jax.devices()[:1], train=False, evaluate=False).abstract_params()
    load = lambda folder: checkpoint_reader.load_params(folder, abstract, which="latest")
    trees.assert_equal(load(workdir), load(whole))
    assert _rows(workdir) == _rows(whole)
    for name in ("rollouts.jsonl", "samples/step_000002.jsonl", "samples/step_000004.jsonl"):
        assert (workdir / name).read_text() == (whole / name).read_text(), name
    assert not list((workdir / "samples").glob("*.parts"))
    results = [json.loads((d / "results.json").read_text())["metrics"] for d in (workdir, whole)]
    assert results[0] == results[1]


def _rows(workdir):
    return [
        {k: v for k, v in row.items() if not any(t in k for t in _TIMED)}
        for row in read_jsonl(workdir / "metrics.jsonl")
    ]
