"""One owner of a workdir at a time, among real processes, on a disk and in a bucket."""

import json
import os
import signal
import subprocess
import sys
import time

import buckets
import pytest
from places import ROOT

from qlog.commands import run_status
from qlog.errors import PassingError, TrainingError
from qlog.runs import ownership
from qlog.storage import paths

_OWNER = """
import sys, time
from qlog.runs import ownership
from qlog.storage import paths
ownership.Claim.INTERVAL = 0.1
with ownership.claim(paths.parse(sys.argv[1])) as claim:
    claim.beat(step=7, phase="train")
    print("owns", flush=True)
    time.sleep(float(sys.argv[2]))
    claim.check()
print("released", flush=True)
"""


@pytest.fixture(scope="module")
def store():
    with buckets.google() as (proxy, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield proxy


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path):
    if request.param == "disk":
        return paths.parse(tmp_path / "run")
    request.getfixturevalue("store")
    return paths.parse(f"gs://{buckets.BUCKET}/{tmp_path.name}")


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(ownership.Claim, "INTERVAL", 0.1)


def _start(workdir, seconds=60.0):
    process = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(workdir), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "owns\n"
    return process


def _change(workdir, **fields):
    owner = json.loads(paths.read(workdir / ownership.FILE))
    paths.write(workdir / ownership.FILE, json.dumps(owner | fields))
    return owner


def test_the_owner_refuses_a_second_and_leaves_nothing_behind(workdir, monkeypatch):
    with ownership.claim(workdir) as claim:
        claim.beat(step=3)
        with pytest.raises(
            PassingError, match=rf"process {os.getpid()}, since .* still runs: wait"
        ):
            with ownership.claim(workdir):
                pass
        monkeypatch.setattr(ownership, "_machine", lambda: "another machine")
        with pytest.raises(PassingError, match="at step 3"):
            with ownership.claim(workdir):
                pass
        claim.check()
    assert paths.names(workdir) == [ownership.FILE]
    with ownership.claim(workdir):
        assert paths.names(workdir) == [ownership.FILE]


def test_a_dead_owner_is_followed_at_once_here_and_by_watching_elsewhere(
    workdir, monkeypatch, capsys
):
    process = _start(workdir)
    with pytest.raises(PassingError, match=f"process {process.pid}"):
        with ownership.claim(workdir):
            pass
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and stays a zombie
    with ownership.claim(workdir):
        assert f"process {process.pid}" in capsys.readouterr().out
        owner = json.loads(paths.read(workdir / ownership.FILE))
        assert owner["pid"] == os.getpid()
    process.wait()
    paths.write(
        workdir / ownership.FILE, json.dumps(owner | {"owner": "x", "machine": "elsewhere"})
    )
    with ownership.claim(workdir):
        told = capsys.readouterr().out
    assert "s to see whether it still runs" in told and "which is gone" in told
    assert paths.names(workdir) == [ownership.FILE]


def test_an_owner_that_was_taken_over_stops_and_removes_nothing(workdir):
    process = _start(workdir, 1.0)
    process.send_signal(signal.SIGSTOP)
    _change(workdir, machine="elsewhere")
    with ownership.claim(workdir):
        process.send_signal(signal.SIGCONT)
        assert process.wait(30) == 1  # PassingError, and no command line that gives its status
        assert json.loads(paths.read(workdir / ownership.FILE))["pid"] == os.getpid()


def test_a_beat_that_fails_is_made_up_for(store, tmp_path, capsys):
    workdir = paths.parse(f"gs://{buckets.BUCKET}/{tmp_path.name}")
    with ownership.claim(workdir) as claim:
        store.spoil("503", 2, ownership.FILE)
        store.spoil("cut", 1, "upload")
        # As a second start looks: the emulator may show an object that is only half written.
        look = lambda: ownership._look(workdir / ownership.FILE)
        before = look()["beat"]
        claim.beat(step=9)
        deadline = time.monotonic() + 60
        while (look().get("beat") or 0) < before + 3 or look().get("step") != 9:
            assert time.monotonic() < deadline
        claim.check()


def test_a_run_that_failed_leaves_why_and_the_next_goes_on_at_once(tmp_path, capsys):
    workdir = paths.parse(tmp_path)
    with pytest.raises(TrainingError), ownership.claim(workdir):
        raise TrainingError("sampler and learner disagree")
    left = json.loads(paths.read(workdir / ownership.FILE))
    assert (
        left["released"] and left["status"] == 3 and left["error"] == "sampler and learner disagree"
    )
    assert run_status.of(workdir)["beat"] is None
    with ownership.claim(workdir):
        assert "released" not in json.loads(paths.read(workdir / ownership.FILE))
    left = json.loads(paths.read(workdir / ownership.FILE))
    assert left["released"] and left["status"] == 0 and "took" not in capsys.readouterr().out
