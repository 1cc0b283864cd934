"""Runs with a workdir in a bucket (object stores on loopback): equal to runs on a disk."""

import json
import os
import signal
import subprocess
import sys

import buckets
import jax
import pytest
import tiny
import trees
from places import ROOT, TESTS

from qlog.config import schema
from qlog.experiment import prepare
from qlog.runs import checkpoint_reader
from qlog.runs.log import read_jsonl
from qlog.storage import paths

_LOCAL = (sys.executable, str(ROOT / "launch/local"))
_MAIN = (sys.executable, "-m", "qlog.main")


def get_config(kind="run"):
    """Of all runs here; this file is their config file."""
    tree = tiny.config(
        train={"steps": 4, "rollouts_prompts": 2},
        evaluation={"every": 2},
        checkpoint={"every": 2},
        loss=schema.loss("garl", q=0.75),
    )
    tree.architecture.num_layers = 1
    if kind == "sweep":
        tree.train.steps = 2
        tree.runs = {"first": {}, "second": {"init_from": "first"}}
    return tree


CONFIG = f"--config={TESTS / 'runs/buckets_test.py'}"


@pytest.fixture(scope="module")
def store(compilation_cache):
    """(proxy, environment of a client of the store and of all runs here)."""
    with buckets.google() as (proxy, clients), pytest.MonkeyPatch.context() as patch:
        for name, value in clients.items():
            patch.setenv(name, value)
        yield (
            proxy,
            os.environ
            | {
                "PYTHONPATH": f"{ROOT}:{TESTS}",
                "JAX_NUM_CPU_DEVICES": "2",
                "JAX_COMPILATION_CACHE_DIR": compilation_cache,
                "PYTHONUNBUFFERED": "1",
            },
        )


def _run(command, environment, status=0):
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr


_KILLED = """
import os, signal, sys, time
from qlog import main
from qlog.commands import entry
from qlog.runs import log
from qlog.storage import paths
workdir = paths.parse(sys.argv[-1].partition("=")[2])

def progress(self, step, text):
    if step == 2:
        while not paths.exists(workdir / "checkpoints" / "2" / "commit_success.txt"):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)

log.RunLog.progress = progress
entry.run(main.main)
"""
_UNSHARED = """
import os, sys
from qlog import main
from qlog.commands import entry
sys.argv[-1] += os.environ["JAX_PROCESS_ID"]
entry.run(main.main)
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    for name, text in (("killed", _KILLED), ("unshared", _UNSHARED)):
        (folder / f"{name}.py").write_text(text)
    return folder


def _bucket(name):
    return paths.parse(f"gs://{buckets.BUCKET}/{name}")


@pytest.fixture(scope="module")
def on_disk(store, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("disk")
    _run([*_MAIN, CONFIG, f"--workdir={workdir}"], store[1])
    return workdir


@pytest.fixture(scope="module")
def in_bucket(store, programs):
    """Killed outright at step 3, resumed through 503s, cuts, lost answers and silence."""
    proxy, environment = store
    flags = [CONFIG, "--workdir=gs://bucket/one"]
    _run([sys.executable, programs / "killed.py", *flags], environment, -signal.SIGKILL)
    assert _checkpoints(_bucket("one")) == ["2"]
    for kind in ("503", "cut", "lost", "503"):
        proxy.spoil(kind, 1, "POST .*(metrics|rollouts|samples|upload)")
        proxy.spoil(kind, 1, "checkpoints")
    proxy.spoil("silence", 1, "checkpoints", 5.0)
    said = _run([*_MAIN, *flags], environment)
    proxy.heal()
    assert "resumed from step 2" in said and "took gs://bucket/one over from the run on" in said
    assert len(proxy.spoiled) >= 7, proxy.spoiled
    return _bucket("one")


def _checkpoints(workdir):
    return [name for name in paths.names(workdir / "checkpoints") if name.isdigit()]


def _assert_same_run(workdir, on_disk):
    """Parameters, metrics but for times, rollouts and samples, bit for bit."""
    experiment = prepare(get_config(), jax.devices()[:1])
    one, two = (
        checkpoint_reader.load_params(w, experiment.abstract_params()) for w in (workdir, on_disk)
    )
    trees.assert_equal(one, two)
    assert _timeless(workdir) == _timeless(on_disk)
    for name in ("rollouts.jsonl", "samples/step_000002.jsonl", "samples/step_000004.jsonl"):
        assert read_jsonl(workdir / name) == read_jsonl(paths.Path(on_disk) / name) != []
    assert paths.read(workdir / "config.json") == (on_disk / "config.json").read_text()
    _assert_same_numbers("results.json", workdir, on_disk)


def _assert_same_numbers(name, workdir, on_disk):
    ours, theirs = (json.loads(paths.read(paths.Path(d) / name)) for d in (workdir, on_disk))
    assert str(workdir) in ours.pop("source") and str(on_disk) in theirs.pop("source")
    assert ours == theirs


def _timeless(workdir):
    per_run = ("seconds", "tokens_per_s", "compilations", "memory")
    return [
        {k: v for k, v in row.items() if not k.startswith(per_run)}
        for row in read_jsonl(paths.Path(workdir) / "metrics.jsonl")
    ]


def test_a_killed_and_resumed_run_in_a_bucket_equals_one_on_a_disk(in_bucket, on_disk):
    _assert_same_run(in_bucket, on_disk)
    # A segment ends at each checkpoint and after each evaluation, whose row is of the step before.
    assert paths.names(in_bucket / "metrics") == [f"{step:06d}.jsonl" for step in range(4)]
    names = paths.names(in_bucket)
    assert sum("tfevents" in name for name in names) == 2
    assert json.loads(paths.read(in_bucket / "owner.json"))["released"]
    assert not [name for name in names if name.startswith(".")]


def test_the_other_commands_read_and_write_there(in_bucket, on_disk, store):
    for workdir in (in_bucket, on_disk):
        for mode in ("evaluate", "export"):
            _run([*_MAIN, CONFIG, f"--workdir={workdir}", f"--mode={mode}"], store[1])
    assert "gold" in _run([*_MAIN, CONFIG, f"--workdir={in_bucket}", "--mode=sample"], store[1])
    _assert_same_numbers("evaluation_validation.json", in_bucket, on_disk)
    assert (
        paths.read(in_bucket / "samples/validation.jsonl")
        == (on_disk / "samples/validation.jsonl").read_text()
    )
    tensors = "export/model.safetensors"
    assert (in_bucket / tensors).read_bytes() == (on_disk / tensors).read_bytes()


@pytest.mark.slow
def test_two_processes_killed_and_resumed_equal_one_on_a_disk(store, programs, on_disk):
    _, environment = store
    one_device = ["--processes=2", "--devices=1"]
    flags = ["--distributed=on", CONFIG, "--workdir=gs://bucket/two"]
    result = subprocess.run(
        [*_LOCAL, *one_device, "--", programs / "killed.py", *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 128 + signal.SIGKILL, result.stdout + result.stderr
    said = _run([*_LOCAL, *one_device, *flags[1:]], environment)
    assert "resumed from step 2" in said
    # Sums of two parts, added by gloo as one process adds them: the same bits here.
    _assert_same_run(_bucket("two"), on_disk)


def test_a_sweep_and_its_report(store):
    _, environment = store
    command = [*_MAIN, f"{CONFIG}:sweep", "--workdir=gs://bucket/sweep"]
    assert "p@1" in _run(command, environment)
    workdir = _bucket("sweep")
    files = {"report.md", "report.json", "report.html", "escape.png", "escape.svg"}
    assert {"first", "second"} | files == set(paths.names(workdir))
    assert "| second |" in paths.read(workdir / "report.md")
    assert _run(command, environment).count("finished before") == 2


def test_a_workdir_that_is_not_shared_is_refused_by_all(store, programs, tmp_path):
    result = subprocess.run(
        [
            *_LOCAL,
            "--processes=2",
            "--",
            programs / "unshared.py",
            "--distributed=on",
            CONFIG,
            f"--workdir={tmp_path / 'run'}",
        ],
        env=store[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2, result.stdout + result.stderr
    for process in (0, 1):
        assert (
            f"[{process}] qlog: --workdir = {tmp_path}/run{process} is not shared: process 1 on"
            in (result.stdout)
        )


@pytest.mark.parametrize("bucket", ["nowhere", buckets.FORBIDDEN])
def test_a_bucket_that_is_missing_or_forbidden_ends_in_a_sentence(bucket, store):
    said = _run([*_MAIN, CONFIG, f"--workdir=gs://{bucket}/run"], store[1], status=2)
    wrong = {
        "nowhere": "there is no bucket gs://nowhere",
        "forbidden": "this account may not write in",
    }
    assert wrong[bucket] in said and "Traceback" not in said


def test_checkpoints_in_s3_are_refused_in_a_sentence(store):
    said = _run([*_MAIN, CONFIG, "--workdir=s3://bucket/run"], store[1], status=2)
    assert (
        "Orbax keeps no checkpoints in s3:// buckets; give gs://" in said
        and "Traceback" not in said
    )
