"""Timing, the machine's measured peaks, and memory."""

import pathlib
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Times(NamedTuple):
    """Seconds of several calls."""

    first: float  # of the first call, which compiles
    median: float  # of the repeats, as the next two; a call for warming up comes before them
    shortest: float
    longest: float
    repeats: int


class Peaks(NamedTuple):
    """What one device does per second at best."""

    flops: float  # of a large matrix product in the activations' dtype
    bandwidth: float  # bytes read and written in place


def repeat(call: Callable[[], object], repeats: int) -> Times:
    """Times `call`, which must return or wait for what it computes."""

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    first = once()
    once()
    seconds = [once() for _ in range(repeats)]
    return Times(first, statistics.median(seconds), min(seconds), max(seconds), repeats)


def measure_peaks(dtype: Any, size: int = 2048) -> Peaks:
    """The best of several runs on one device.

    Args:
      dtype: of the matrices.
      size: rows and columns of the two matrices; a vector of 16 times as many elements as one of
        them is read and written, so that no cache holds it.
    """
    one = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    seconds = repeat(lambda: product(one, one), 5).shortest
    vector = [jnp.zeros(16 * size * size, jnp.float32)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def add_in_place() -> jax.Array:
        vector[0] = add(vector[0])  # the old one is donated: only the new one may be read again
        return vector[0]

    moved = 2 * vector[0].nbytes
    return Peaks(2 * size**3 / seconds, moved / repeat(add_in_place, 5).shortest)


def peak_memory() -> tuple[str, float]:
    """("device", bytes of the fullest device), or ("process", bytes of this process).

    The second on platforms whose devices do not tell their memory, such as CPUs.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("peak_bytes_in_use" in s for s in stats):
        return "device", max(s["peak_bytes_in_use"] for s in stats)
    return "process", process_peak_memory()


def process_peak_memory() -> int:
    """Bytes that this process has taken at most."""
    # On Linux, the maximum of resource.getrusage begins with what the process that started this one
    # held when it did.
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
