"""Disks that fail under a run: no hang, one sentence, and the same command goes on bit for bit.

The disks are real: a small tmpfs, which the tests mount (they are skipped where this user may not),
and the kernel's limit on the size of a file (RLIMIT_FSIZE), which any user may set.
"""

import resource
import shutil
import subprocess
import sys

import jax
import pytest
import same_runs
import tiny
from places import ROOT

from qlog.errors import ConfigError, PassingError
from qlog.runs.log import RunLog

ONE = jax.devices()[:1]
CONFIG = tiny.config(
    train={"steps": 6}, checkpoint={"every": 2}, evaluation={"every": 3, "prompts": 4}
)


def mount(*words):
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=4m", "none", str(folder)):
        pytest.skip("this user may not mount")
    yield folder
    for place in (folder, folder.with_name("aside")):
        subprocess.run(["umount", "-l", place], check=False, capture_output=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    tiny.run(CONFIG, workdir, ONE)
    return workdir


def at_step(monkeypatch, step, act):
    """Has `act` called when the run tells of that step, from 0; returns what undoes it."""
    show, done = RunLog.progress, []

    def progress(self, now, text):
        show(self, now, text)
        if now == step and not done:
            done.append(step)
            act()

    monkeypatch.setattr(RunLog, "progress", progress)


def fill(disk):
    with open(disk / "filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass


def _full(disk):
    return (lambda: fill(disk)), (lambda: (disk / "filler").unlink()), "no room is left|No space"


def _unmounted(disk):
    aside = disk.with_name("aside")
    aside.mkdir()
    move = lambda one, two: subprocess.run(["mount", "--move", one, two], check=True)
    return (lambda: move(disk, aside)), (lambda: move(aside, disk)), "is gone"


def _moved(disk):
    there, aside = disk / "run", disk / "elsewhere"

    def undo():
        shutil.rmtree(there, ignore_errors=True)  # of what a save under way has made there
        aside.rename(there)

    return (lambda: there.rename(aside)), undo, "is gone|No such file"


def _log_replaced(disk):
    log, aside = disk / "run/metrics.jsonl", disk / "metrics.jsonl"

    def act():
        log.rename(aside)
        log.write_bytes(aside.read_bytes())

    return act, (lambda: None), "metrics.jsonl is gone .*another file has taken its place"


# Before the first save, during one, and with one behind.
@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("fault", [_full, _unmounted, _moved, _log_replaced])
def test_a_disk_that_fails_under_a_run(fault, step, disk, whole, monkeypatch):
    act, undo, said = fault(disk)
    at_step(monkeypatch, step, act)
    with pytest.raises(PassingError, match=said) as raised:
        tiny.run(CONFIG, disk / "run", ONE)
    assert "\n" not in str(raised.value) and "the same command goes on" in str(raised.value)
    undo()
    tiny.run(CONFIG, disk / "run", ONE)
    same_runs.assert_same_run(CONFIG, disk / "run", whole)


def test_checkpoints_that_can_no_longer_be_made(tmp_path, whole, monkeypatch):
    """`chattr +i`, which binds root too, as a disk that has become read-only does."""
    seal = lambda flag: subprocess.run(
        ["chattr", flag, tmp_path / "checkpoints"], check=False, capture_output=True
    )
    (tmp_path / "checkpoints").mkdir()
    if seal("+i").returncode:
        pytest.skip("this user or this file system has no chattr")
    try:
        with pytest.raises(ConfigError, match=r"--workdir = .*/checkpoints cannot be written"):
            tiny.run(CONFIG, tmp_path, ONE)
        seal("-i")
        at_step(monkeypatch, 3, lambda: seal("+i"))  # the evaluation before has waited for step 3
        with pytest.raises(
            PassingError,
            match=r"step 4 could not .*\(Operation not permitted\), step 3 is the newest",
        ):
            tiny.run(CONFIG, tmp_path, ONE)
    finally:
        seal("-i")
    tiny.run(CONFIG, tmp_path, ONE)
    same_runs.assert_same_run(CONFIG, tmp_path, whole)


def test_a_file_may_grow_no_more(tmp_path, whole, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    at_step(monkeypatch, 2, limit)
    try:
        with pytest.raises(PassingError, match=r"\(File too large\)"):
            tiny.run(CONFIG, tmp_path, ONE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tiny.run(CONFIG, tmp_path, ONE)
    same_runs.assert_same_run(CONFIG, tmp_path, whole)


_LATE = """
import asyncio, sys, tensorstore, threading
from qlog.runs import orbax_log

orbax_log.watch()
orbax_log.watch()
promise, future = tensorstore.Promise.new()
loop = asyncio.new_event_loop()

async def waits():
    await future

async def starts():
    global task
    task = asyncio.ensure_future(waits())
    await asyncio.sleep(0.1)

class Other:
    def __del__(self):
        raise RuntimeError("of another kind")

loop.run_until_complete(starts())
loop.close()
promise.set_result(3)  # as a write that ends when the save has failed
task._log_destroy_pending = False
Other()
"""


def test_writes_that_end_after_a_failed_save_print_nothing():
    run = subprocess.run(
        [sys.executable, "-c", _LATE], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0 and "of another kind" in run.stderr, run.stderr
    assert "Event loop is closed" not in run.stderr
