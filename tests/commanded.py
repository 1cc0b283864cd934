"""The command of a tiny run, as a user starts it, and whether two runs are one."""

import os
import subprocess
import sys

import pytest
import same_runs
import tiny
from places import ROOT, TESTS

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
    """Whether the runs of two workdirs are one, bit for bit.

    Args:
      num_layers: of the model, where it is another one than that of `CHANGES`.
    """
    config = tiny.config(**CHANGES, mesh={"data": 1})
    config.architecture.num_layers = num_layers or config.architecture.num_layers
    same_runs.assert_same_run(config, workdir, whole)


# ---- Fixtures; a test file that wants them writes `cache = commanded.cache` and so on ----


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for compiled programs, empty at first."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A config file of `CHANGES`."""
    return config_file(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, file, cache):
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    status, out, err = run(file, workdir, cache)
    assert status == 0, out + err
    return workdir
