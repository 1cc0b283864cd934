"""What a process sets up before it computes."""

import os
import subprocess
import sys

import jax
import pytest
from places import ROOT

from qlog.errors import PassingError
from qlog.parallel import process

_PROGRAM = """
import jax
from qlog.parallel import process

process.set_up()
print(jax.jit(lambda x: 3 * x)(14))
"""


def test_a_restart_compiles_nothing_not_even_what_is_quick(tmp_path):
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS"))
    }
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def programs():
        command = [sys.executable, "-c", _PROGRAM]
        assert subprocess.check_output(command, env=environment, text=True).strip() == "42"
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "qlog/xla").glob("*-cache")}

    first = programs()
    assert first and programs() == first


_FLAG = "--xla_backend_optimization_level=0"
_SETTINGS = """
import jax
from qlog.parallel import process

process.set_up()
print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
"""

_HITS = f"""
import jax
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("cache_hits")))
{_PROGRAM}
print(sum(hits))
"""


def test_a_bucket_keeps_compiled_programs(tmp_path):
    """A second process on another machine finds what the first one compiled, in GCS's emulator."""
    from gcp_storage_emulator import server

    emulator = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    emulator.start()
    try:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_PERS")} | {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{emulator._api._httpd.server_address[1]}",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "JAX_COMPILATION_CACHE_DIR": "gs://bucket/xla",
            "PYTHONPATH": str(ROOT),
        }

        def output(program, **more):
            command = [sys.executable, "-c", program]
            return subprocess.run(
                command,
                env=environment | more,
                text=True,
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            ).stdout

        assert output(_SETTINGS).split() == ["gs://bucket/xla", "1.0"]
        missing = output(
            _SETTINGS, JAX_COMPILATION_CACHE_DIR="gs://none/xla", XDG_CACHE_HOME=str(tmp_path)
        )
        assert missing.startswith(
            "qlog: JAX_COMPILATION_CACHE_DIR=gs://none/xla cannot be used (FileNotFound"
        )
        assert missing.split()[-2:] == [f"{tmp_path}/qlog/xla", "0.0"]
        every = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        assert output(_HITS, **every).split() == ["42", "0"]
        assert output(_HITS, **every).split() == ["42", "1"]
    finally:
        emulator.stop()


def test_only_gpus_are_told_to_measure_kernels_alone(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", _FLAG)
    process._compile_alone()
    assert os.environ["XLA_FLAGS"] == _FLAG, "no GPU's plug-in is installed here"
    monkeypatch.setattr(process.extras, "is_installed", lambda name: "cuda12" in name)
    process._compile_alone()
    process._compile_alone()
    assert os.environ["XLA_FLAGS"] == f"{_FLAG} --xla_gpu_shard_autotuning=false"
    # An unknown flag would end the process when the backend starts.
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], check=True)


def test_programs_are_forgotten_when_they_are_many():
    program = jax.jit(lambda x: x + 1)
    program(1.0)
    assert program._cache_size() == 1
    assert not process.forget_programs(most_mappings=10**6) and program._cache_size() == 1
    assert process.forget_programs(most_mappings=0) == (sys.platform == "linux")
    assert program._cache_size() == (0 if sys.platform == "linux" else 1)
    assert program(1.0) == 2


@pytest.mark.parametrize(
    "platforms, command",
    [
        ("cuda", ["qlog.main", "--mode=export"]),
        ("foo,cpu", ["qlog.main"]),
        ("foo", ["qlog.main", "--mode=compile", "--topology=v5e:2x2"]),
        ("cpu,", ["qlog.benchmark"]),
        ("foo", ["qlog.benchmark.balance"]),
        ("foo", ["qlog.benchmark.uneven"]),
        ("foo", ["qlog.commands.show"]),
        ("cuda", ["qlog.commands.doctor", f"--workdir={os.devnull}"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_platforms_that_are_not_here_are_a_sentence(platforms, command):
    if any(map(process.extras.is_installed, process._GPU_PLUGINS)):
        pytest.skip("what drives a GPU is installed here")
    config = str(ROOT / "configs/quickstart.py")
    config = config if command[0] == "qlog.commands.show" else f"--config={config}"
    done = subprocess.run(
        [sys.executable, "-m", command[0], config, *command[1:]],
        env=os.environ | {"JAX_PLATFORMS": platforms, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2, done.stderr
    (told,) = done.stderr.splitlines()
    assert told.startswith(f"qlog: JAX_PLATFORMS={platforms}, but JAX cannot use it here")
    assert "cuda13" in told and told.endswith("or unset JAX_PLATFORMS.")


def test_a_device_that_another_process_holds_may_be_free_later(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'tpu': ABORTED: The TPU is already in use")

    monkeypatch.setattr(process.jax, "devices", devices)
    with pytest.raises(PassingError, match="the device cannot be had now .*already in use"):
        process.look_for_devices()
