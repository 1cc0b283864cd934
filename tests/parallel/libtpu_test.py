"""Without a TPU its runtime stays quiet; with one, or where a user has set it, all stays."""

import importlib.util
import os
import subprocess
import sys

import pytest
from places import ROOT

from qlog.parallel import libtpu

VARIABLES = {*libtpu._QUIET, *libtpu._VARIABLES}
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.fixture(autouse=True)
def no_tpu(monkeypatch):
    """A machine with libtpu, without devices of a TPU, where the environment says nothing."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(libtpu.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(libtpu.extras, "is_installed", lambda name: True)
    yield
    for name in libtpu._QUIET:  # what a test has set itself
        os.environ.pop(name, None)


def test_without_a_tpu_it_is_quiet():
    assert not libtpu.may_have_tpu()
    libtpu.keep_quiet()
    assert {name: os.environ[name] for name in libtpu._QUIET} == libtpu._QUIET


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "")
    libtpu.keep_quiet()
    assert os.environ["TPU_WORKER_HOSTNAMES"] == ""


@pytest.mark.parametrize("name", libtpu._VARIABLES)
def test_what_a_tpu_vm_sets_is_enough_to_change_nothing(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    libtpu.keep_quiet()
    assert set(libtpu._QUIET) & set(os.environ) <= {name}


@pytest.mark.parametrize("device", ["/dev/accel0", "/dev/vfio/0"])
def test_a_device_is_enough_to_change_nothing(device, monkeypatch):
    import fnmatch

    monkeypatch.setattr(libtpu.glob, "glob", lambda pattern: fnmatch.filter([device], pattern))
    libtpu.keep_quiet()
    assert not set(libtpu._QUIET) & set(os.environ)


def test_a_tpu_on_the_bus_is_seen(tmp_path, monkeypatch):
    (tmp_path / "vendor").write_text("0x1ae0\n")
    found = lambda pattern: [str(tmp_path / "vendor")] if pattern.endswith("vendor") else []
    monkeypatch.setattr(libtpu.glob, "glob", found)
    assert libtpu.may_have_tpu()


def test_a_user_who_asks_for_a_tpu_hears_what_is_wrong_with_it(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    libtpu.keep_quiet()
    assert not set(libtpu._QUIET) & set(os.environ)


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs the extra tpu")
@pytest.mark.parametrize(
    "words",
    [
        ["-m", "qlog.commands.doctor", "--workdir={}"],
        ["-m", "qlog.commands.show", "configs/quickstart.py:", "--examples=0"],
        # Programs of one's own, which import JAX first or last.
        ["-c", "import jax, qlog; jax.devices()"],
        ["-c", "from qlog import losses; import jax; jax.devices()"],
    ],
    ids=lambda words: words[1],
)
def test_programs_leave_stderr_empty(words, tmp_path):
    """With JAX_PLATFORMS unset JAX asks libtpu for devices."""
    hidden = {"JAX_PLATFORMS", "XLA_FLAGS", *VARIABLES}
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    result = subprocess.run(
        [sys.executable, *(word.format(tmp_path) for word in words)],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stderr == "" and result.returncode == 0, result.stderr + result.stdout


@pytest.mark.parametrize("stub", ["types.ModuleType('libtpu')", "None"])
def test_a_stub_in_its_place_does_no_harm(stub):
    program = f"import sys, types; sys.modules['libtpu'] = {stub}; import qlog; print('there')"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "there\n", run.stderr
