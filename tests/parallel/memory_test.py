"""What JAX, the kernel and control groups say of the memory that there is."""

import math
import os
import types
from typing import NamedTuple

import numpy as np
import pytest

from qlog.errors import ConfigError
from qlog.parallel import memory, sharding

GB = 10**9
_V1 = 9223372036854771712  # what version 1 holds where there is no limit


class Host(NamedTuple):
    """Files below / of a made host with 8 GB of swap, and the bytes of its tightest group."""

    groups: str  # /proc/self/cgroup
    files: dict[str, int | str]  # below /sys/fs/cgroup
    limit: float


HOSTS = {
    "no control groups": Host("", {}, math.inf),
    "version 2": Host("0::/a\n", {"a/memory.max": 2 * GB, "a/memory.swap.max": 1 * GB}, 3 * GB),
    "version 2, no swap": Host("0::/a\n", {"a/memory.max": 2 * GB, "a/memory.swap.max": 0}, 2 * GB),
    "version 2, any swap": Host(
        "0::/a\n", {"a/memory.max": 2 * GB, "a/memory.swap.max": "max"}, 10 * GB
    ),
    "version 2, more swap than there is": Host(
        "0::/a\n", {"a/memory.max": 2 * GB, "a/memory.swap.max": 99 * GB}, 10 * GB
    ),
    "version 2, swap is not counted": Host("0::/a\n", {"a/memory.max": 2 * GB}, 10 * GB),
    "version 2, no limit": Host(
        "0::/a\n", {"a/memory.max": "max", "a/memory.swap.max": 0}, math.inf
    ),
    "version 2, nested": Host(
        "0::/a/b/c\n",
        {
            "a/memory.max": 2 * GB,
            "a/memory.swap.max": 0,
            "a/b/memory.max": "max",
            "a/b/c/memory.max": 1 * GB,
            "a/b/c/memory.swap.max": "max",
        },
        2 * GB,
    ),
    "version 2, inside a container": Host(
        "0::/../../pod\n", {"memory.max": 2 * GB, "memory.swap.max": 0}, 2 * GB
    ),
    "version 1": Host(
        "4:cpu,memory:/a\n1:cpuset:/b\n",
        {
            "memory/a/memory.limit_in_bytes": 2 * GB,
            "memory/a/memory.memsw.limit_in_bytes": 3 * GB,
            "cpuset/b/memory.limit_in_bytes": 1,
        },
        3 * GB,
    ),
    "version 1, memory only": Host(
        "4:memory:/a\n",
        {
            "memory/a/memory.limit_in_bytes": 2 * GB,
            "memory/a/memory.memsw.limit_in_bytes": _V1,
        },
        10 * GB,
    ),
    "version 1, swap is not counted": Host(
        "4:memory:/a\n", {"memory/a/memory.limit_in_bytes": 2 * GB}, 10 * GB
    ),
    "version 1, no limit": Host(
        "4:memory:/a\n", {"memory/a/memory.limit_in_bytes": _V1}, float(_V1)
    ),
    "garbled": Host("0::/a\nx\n", {"a/memory.max": "x", "a/memory.swap.max": ""}, math.inf),
}


@pytest.mark.parametrize("name", HOSTS)
def test_the_limits_of_control_groups(name, tmp_path):
    host = HOSTS[name]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(host.groups)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 5 kB\nSwapTotal:  7812500 kB\n")
    for file, content in host.files.items():
        place = tmp_path / "sys/fs/cgroup" / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{content}\n")
    of_host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + 8 * GB
    assert memory.host_memory(tmp_path) == min(of_host, host.limit)


def test_a_host_without_proc_and_sys_has_its_memory(tmp_path):
    of_host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory.host_memory(tmp_path) == of_host


class Accelerator(NamedTuple):
    """An accelerator as JAX tells of it."""

    device_kind: str
    stats: dict[str, int] | None

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats


H100, UNKNOWN = "NVIDIA H100 80GB HBM3", "NVIDIA X1"
_GROWS = [
    {"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async"},
    {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
    {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
]


def test_what_jax_may_allocate_on_an_accelerator(monkeypatch):
    for variables in _GROWS:
        for name in variables:
            monkeypatch.delenv(name, raising=False)
    share = {"bytes_limit": 60 * GB}
    # ---- JAX takes its share at the start, and no more ----
    assert memory.device_memory(Accelerator(H100, share)) == 60 * GB
    assert memory.device_memory(Accelerator(UNKNOWN, share)) == 60 * GB
    # ---- JAX does not tell: what the maker says ----
    for stats in (None, {}, {"bytes_limit": 0}):
        assert memory.device_memory(Accelerator(H100, stats)) == 80 * 2**30
        assert memory.device_memory(Accelerator("TPU v5 lite", stats)) == 16 * 2**30
        assert memory.device_memory(Accelerator(UNKNOWN, stats)) is None
    # ---- The share is no limit ----
    for variables in _GROWS:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert memory.device_memory(Accelerator(H100, share)) == 80 * 2**30
            assert memory.device_memory(Accelerator(H100, {"bytes_limit": 99 * GB})) == 99 * GB
            assert memory.device_memory(Accelerator(UNKNOWN, share)) is None


class Mesh(NamedTuple):
    """The devices of a mesh, as `of_host` looks at them."""

    devices: np.ndarray


def _mesh(platform):
    devices = [types.SimpleNamespace(process_index=0, platform=platform)]
    return Mesh(np.array(devices, object))


def test_a_host_has_memory_of_its_own_next_to_accelerators_only(monkeypatch):
    assert memory.of_host(_mesh("cpu")) is None
    assert memory.of_host(_mesh("tpu")).bytes == memory.host_memory()
    monkeypatch.setenv("QLOG_HOST_MEMORY", "5e9")
    assert memory.of_host(_mesh("gpu")) == (5e9, "QLOG_HOST_MEMORY says 5.0 GB")


@pytest.mark.parametrize("variable", [memory.VARIABLE, memory.HOST_VARIABLE])
def test_a_variable_says_what_there_is(variable, monkeypatch):
    told = memory._told
    assert told(variable, "one device") is None
    monkeypatch.setenv(variable, "1e15")
    assert told(variable, "one device") == (1e15, f"{variable} says 1,000,000.0 GB")
    for wrong in ("x", "0", "-1", "nan", "inf", "64GB"):
        monkeypatch.setenv(variable, wrong)
        with pytest.raises(ConfigError, match=f"{variable} = '{wrong}' is no number of bytes"):
            told(variable, "one device")


def test_the_memory_of_this_host_is_known():
    total = memory.host_memory()
    assert total and 2**28 < total < 2**50
    assert memory.of_device(sharding.make_mesh(-1, 1, 1)).bytes == pytest.approx(total / 8)
