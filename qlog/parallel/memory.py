"""The memory that devices and their host have: what JAX, the kernel and control groups say."""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import jax
from jax.sharding import Mesh

from qlog.console import size_text
from qlog.errors import ConfigError
from qlog.parallel import chips

# Of the environment: what there is in bytes, whatever is found.
VARIABLE = "QLOG_MEMORY"  # of one device
HOST_VARIABLE = "QLOG_HOST_MEMORY"  # of this host, next to accelerators
_ROOT = pathlib.Path("/")


class Device(Protocol):
    """What is asked of a `jax.Device`."""

    @property
    def device_kind(self) -> str: ...

    def memory_stats(self) -> dict[str, int] | None: ...


class Room(NamedTuple):
    """The memory of one device, or of a host."""

    bytes: float
    where: str  # for messages: "this host has 25.2 GB"


def of_device(mesh: Mesh) -> Room | None:
    """The memory of this process's smallest device; None where that is not known.

    Devices of a CPU share the memory of the host.

    Raises:
      ConfigError: QLOG_MEMORY is no number of bytes.
    """
    here = _devices_here(mesh)
    if not here:
        return None
    if (told := _told(VARIABLE, "one device")) is not None:
        return told
    if here[0].platform == "cpu":
        total = host_memory()
        if total is None:
            return None
        shared = f" for {len(here)} devices" if len(here) > 1 else ""
        return Room(total / len(here), f"this host has {size_text(total)}{shared}")
    found = [limit for device in here if (limit := device_memory(device))]
    if not found:
        return None
    return Room(min(found), f"{here[0].device_kind} has {size_text(min(found))}")


def of_host(mesh: Mesh) -> Room | None:
    """The memory next to this process's accelerators; None where that is not known.

    Where devices are those of a CPU, it is theirs (`of_device`), and this is None.

    Raises:
      ConfigError: QLOG_HOST_MEMORY is no number of bytes.
    """
    here = _devices_here(mesh)
    if not here or here[0].platform == "cpu":
        return None
    if (told := _told(HOST_VARIABLE, "this host")) is not None:
        return told
    total = host_memory()
    return None if total is None else Room(total, f"this host has {size_text(total)}")


def _devices_here(mesh: Mesh) -> list[jax.Device]:
    return [d for d in mesh.devices.flat if d.process_index == jax.process_index()]


def _told(variable: str, of: str) -> Room | None:
    """What a variable of the environment says; None where it is not set.

    Args:
      of: what has the memory, for the message.
    """
    text = os.environ.get(variable)
    if not text:
        return None
    with contextlib.suppress(ValueError):
        if 0 < (told := float(text)) < math.inf:
            return Room(told, f"{variable} says {size_text(told)}")
    raise ConfigError(
        f"{variable} = {text!r} is no number of bytes above 0: set it to the memory of {of} in "
        "bytes, such as 64e9, or unset it."
    )


def device_memory(device: Device) -> float | None:
    """The most that JAX may allocate on an accelerator, in bytes; None where that is not known."""
    peaks = chips.peaks(device.device_kind)
    whole = peaks.hbm if peaks else None
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if not limit:
        return whole
    # By default JAX takes its share of a GPU's memory (three quarters) at the start, and no more
    # later. With these settings it may go on beyond the share, to all that the GPU has.
    grows = os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower() in (
        "cuda_async",
        "platform",
    ) or os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in ("false", "0")
    if not grows:
        return limit
    return max(limit, whole) if whole else None


def host_memory(root: pathlib.Path = _ROOT) -> float | None:
    """Bytes that a process of this host can have, swap included; None where that is not known.

    Args:
      root: the folder that holds proc/ and sys/.
    """
    found = list(_control_groups(root))
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + _swap(root))
    least = min(found, default=math.inf)
    return least if least < math.inf else None


def _swap(root: pathlib.Path) -> float:
    """Bytes of swap that the host has."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("SwapTotal:"):
                return 1024.0 * int(line.split()[1])
    return 0.0


def _control_groups(root: pathlib.Path) -> Iterable[float]:
    """The limits of the control groups that this process is in: containers have one."""
    groups = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            # Version 2 has one tree, version 1 one for memory. Inside a container the tree begins
            # at its own group, so that the path may name nothing: then its root counts.
            tree = groups / "memory" if controllers else groups
            limit_of = _limit_of_first_version if controllers else _limit_of_second_version
            place = tree / name.lstrip("/")
            for group in (place, *place.parents):
                if group == tree or tree in group.parents:
                    yield limit_of(group, _swap(root))


def _limit_of_second_version(group: pathlib.Path, swap: float) -> float:
    """Bytes of memory and swap that a group of version 2 may have; infinite without a limit.

    Args:
      swap: of the host, in bytes. Where the kernel does not count swap, there is no file with a
        limit for it, and a group may have all of it.
    """
    return _number(group / "memory.max") + min(_number(group / "memory.swap.max"), swap)


def _limit_of_first_version(group: pathlib.Path, swap: float) -> float:
    """The same of a group of version 1, whose second limit is of memory and swap together."""
    together = _number(group / "memory.memsw.limit_in_bytes")
    return min(_number(group / "memory.limit_in_bytes") + swap, together)


def _number(file: pathlib.Path) -> float:
    """The number that a file of a control group holds; infinite where it is "max", or is absent."""
    with contextlib.suppress(OSError, ValueError):
        text = file.read_text().strip()
        return math.inf if text == "max" else float(int(text))
    return math.inf
