"""Timing, the machine's measured peaks, memory, and how much arithmetic and traffic work needs."""

import pathlib
import resource
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qlog.models import DecoderConfig


class Times(NamedTuple):
    """Seconds: of the first call, which compiles, and of the repeats after a warm-up."""

    first: float
    median: float
    shortest: float
    longest: float
    repeats: int


class Peaks(NamedTuple):
    """FLOP/s of a large matrix product in the activations' dtype; bytes/s read and written in place."""

    flops: float
    bandwidth: float


class Need(NamedTuple):
    """FLOPs and bytes of the work when M rollouts share their prompt, logits where they are used.

    Prompts count as whole forward passes, as is usual, though of their last layer only keys and
    values are needed.
    """

    flops: float
    bytes: float = 0.0


def repeat(call: Callable[[], object], repeats: int) -> Times:
    """Times `call`, which must return or wait for what it computes."""

    def once():
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    first = once()
    once()
    seconds = [once() for _ in range(repeats)]
    return Times(first, statistics.median(seconds), min(seconds), max(seconds), repeats)


def measure_peaks(dtype, size: int = 2048) -> Peaks:
    """The best of several runs on one device, with square matrices of `size` and a vector of 16 as many
    elements as one."""
    one = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    seconds = repeat(lambda: product(one, one), 5).shortest
    vector = [jnp.zeros(16 * size * size, jnp.float32)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def add_in_place():
        vector[0] = add(vector[0])
        return vector[0]

    moved = 2 * vector[0].nbytes
    return Peaks(2 * size**3 / seconds, moved / repeat(add_in_place, 5).shortest)


def peak_memory() -> tuple[str, float]:
    """What was counted, and bytes: the fullest device's memory, else this process's."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("peak_bytes_in_use" in s for s in stats):
        return "device", max(s["peak_bytes_in_use"] for s in stats)
    return "process", process_peak_memory()


def process_peak_memory() -> int:
    """Bytes that this process has taken at most.

    Linux's maximum of resource.getrusage begins with what the process that started this one held.
    """
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prefill_need(config: DecoderConfig, prompts: int, length: int) -> Need:
    """Prompts of `length` tokens; no logits."""
    return Need(prompts * (2 * _body(config) * length + _attention(config, 0, length)))


def continuation_need(config: DecoderConfig, count: int, start: int, length: int) -> Need:
    """`count` continuations of `length` tokens after `start` others, with logits."""
    weights = _body(config) + _head(config)
    return Need(count * (2 * weights * length + _attention(config, start, start + length)))


def decode_need(
    config: DecoderConfig, prompts: int, rollouts: int, start: int, length: int, itemsize: int
) -> Need:
    """As `continuation_need`; each step reads the weights, each group's prompt and each rollout's
    own keys and values once."""
    flops = continuation_need(config, prompts * rollouts, start, length).flops
    per_slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    slots = prompts * start * length + prompts * rollouts * length * (length + 1) / 2
    weights = (_body(config) + _head(config)) * length
    return Need(flops, itemsize * (weights + per_slot * slots))


def train_need(config: DecoderConfig, prompts: int, rollouts: int, start: int, length: int) -> Need:
    """Forward and backward, three times the forward pass: prompts once, continuations each."""
    forward = prefill_need(config, prompts, start).flops
    forward += continuation_need(config, prompts * rollouts, start, length).flops
    return Need(3 * forward)


def _body(config: DecoderConfig) -> float:
    """Weights of the layers' matrices."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    per_layer = config.width * (heads * config.head_dim + 3 * config.mlp_width)
    return config.num_layers * per_layer


def _head(config: DecoderConfig) -> float:
    return config.vocab_size * config.width


def _attention(config: DecoderConfig, first: int, last: int) -> float:
    """Scores and mix of causal queries at positions first to last - 1."""
    keys = (last - first) * (first + 1 + last) / 2
    return 4 * config.num_layers * config.num_heads * config.head_dim * keys
