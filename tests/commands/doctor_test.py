"""The checks before a run, on eight virtual devices: what they find, and how they name a fault."""

import os
import subprocess
import sys

import jax
import pytest
import tiny
from places import GOLDEN, ROOT

from qlog.commands import doctor
from qlog.parallel import process

QWEN3 = GOLDEN / "qwen3"


def _of(config, workdir):
    found = {check.name: check for check in doctor.checks(config, str(workdir))}
    assert list(found)[0] == "versions"
    return found


def test_a_healthy_machine_passes_every_check(tmp_path, capsys):
    config = tiny.config(mesh={"data": 2, "fsdp": 2, "tensor": 2})
    assert doctor.run(config, str(tmp_path / "new" / "run")) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())  # lines as they were
    assert "failed" not in shown
    for text in (
        f"jax {jax.__version__}",
        "8 x cpu",
        "data 2, fsdp 2, tensor 2",
        "8 devices, 16 MiB each",
        "written, read, removed",
        "4 checkpoints of 0.00e9",
        "random, 2 layers",
        "48 rows of the model",
    ):
        assert text in shown, shown
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_each_fault_is_named_with_its_remedy_and_the_others_still_run(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("no folder")
    empty = tmp_path / "weights"
    empty.mkdir()
    (empty / "config.json").write_bytes((QWEN3 / "config.json").read_bytes())
    config = tiny.config(mesh={"data": 3}, weights=str(empty), train={"steps": 0})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: _Usage)
    found = _of(config, file)
    wrong = {name: check.text for name, check in found.items() if not check.is_ok}
    assert set(found) - set(wrong) == {"versions", "devices", "all-reduce"}
    assert "config.train.steps = 0 must be at least 1" in wrong["config"]
    assert "does not fit the 8 devices here" in wrong["mesh"]
    assert "give a folder that this user may write" in wrong["workdir"]
    assert "0.0 GB free" in wrong["free disk"] and "config.checkpoint.keep" in wrong["free disk"]
    assert "holds no *.safetensors" in wrong["weights"]


class _Usage:
    free = 1000


def test_weights_and_tokenizer_of_a_folder(shared, tmp_path):
    config = tiny.config(weights=str(QWEN3), model=str(QWEN3), architecture={})
    found = _of(config, tmp_path)
    assert found["weights"].is_ok and "1 file, " in found["weights"].text
    told = "answers end with <eos> (1); chat template: none (style 'cold')"
    assert found["tokenizer"].is_ok and told in found["tokenizer"].text
    config.init_from = str(tmp_path / "nothing")
    assert "config.init_from" in _of(config, tmp_path)["weights"].text


def test_a_collective_that_never_ends_is_reported(monkeypatch):
    monkeypatch.setattr(doctor, "_PATIENCE", 0.0)
    check = doctor._check("all-reduce", doctor._all_reduce)
    assert not check.is_ok and "on every host of the slice" in check.text


def test_an_accelerator_that_jax_does_not_use_is_named(monkeypatch, tmp_path):
    device = tmp_path / "accel0"
    device.touch()
    monkeypatch.setattr(process, "_HARDWARE", {str(device): "tpu"})
    monkeypatch.delenv("JAX_PLATFORMS")
    check = doctor._check("devices", doctor._devices)
    assert not check.is_ok and "run launch/install tpu, or set JAX_PLATFORMS=cpu" in check.text
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    check = doctor._check("devices", doctor._devices)
    assert (
        not check.is_ok and "JAX_PLATFORMS=tpu,cpu, and no tpu device is visible here" in check.text
    )
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert doctor._check("devices", doctor._devices).is_ok


@pytest.mark.parametrize(
    "flags, status, text",
    [
        (
            ["--config=configs/quickstart.py", "--config.mesh.tensor=3"],
            1,
            "mesh.tensor=3 does not fit",
        ),
        (["--confg=x"], 2, "Unknown command line flag 'confg'"),
    ],
)
def test_the_command_ends_with_the_status(flags, status, text, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "qlog.commands.doctor", f"--workdir={tmp_path}", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env=os.environ,
    )
    assert result.returncode == status, result.stdout + result.stderr
    assert text in " ".join((result.stdout + result.stderr).replace("│", " ").split())
