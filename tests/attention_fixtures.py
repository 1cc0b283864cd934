"""Attention problems for any kernel, and the answer of one of them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import jit

from qlog.models.attention import blocks


def rollouts_of(lengths, window=None, groups=1):
    """Start and stop [1, N] of rollouts packed into one row, each causal, with a sliding window."""
    ends = np.cumsum(lengths)
    tokens = np.arange(ends[-1])
    start = np.repeat(ends - lengths, lengths)
    if window:
        start = np.maximum(start, tokens + 1 - window)
    return tuple(x.repeat(groups)[None].astype(np.int32) for x in (start, tokens + 1))


def random_intervals(rng, batch, rows, slots, at_least):
    start, stop = np.sort(rng.integers(0, slots - at_least + 1, (2, batch, rows)), axis=0)
    return start.astype(np.int32), (stop + at_least).astype(np.int32)


def up_to(lengths, rows):
    stop = np.broadcast_to(np.array(lengths, np.int32)[:, None], (len(lengths), rows))
    return np.zeros_like(stop), stop


def patterns():
    """{name: [(T, start, stop) per segment]} for 2 prompts."""
    rng = np.random.default_rng(0)
    return {
        "causal": [(20, *rollouts_of([20]))],
        "packed over a prefix": [
            (33, *up_to([33, 5], 42)),
            (21, *rollouts_of([3, 9, 9], groups=2)),
        ],
        "window": [(40, *rollouts_of([30, 10], window=5))],
        "all parts, some unseen": [
            (24, *up_to([17, 0], 19)),
            (40, *random_intervals(rng, 2, 19, 40, 0)),
            (19, *random_intervals(rng, 1, 19, 19, 1)),
        ],
        "every slot seen": [(32, *up_to([32, 32], 16))],
    }


def arrays(pattern, heads=2, size=4, dtype=np.float32):
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    rows = pattern[0][1].shape[1]
    queries, cotangent = normal(2, heads, rows, size), normal(2, heads, rows, size)
    caches = [(normal(2, heads, n, size), normal(2, heads, n, size)) for n, *_ in pattern]
    return queries, cotangent, caches


def value_and_gradients(attend, pattern, queries, cotangent, caches):
    def run(queries, caches):
        return attend(
            queries,
            [blocks.Segment(*c, *ends[1:]) for c, ends in zip(caches, pattern, strict=True)],
        )

    def both(queries, caches):
        out, back = jax.vjp(run, queries, caches)
        return out, back(cotangent)

    return jax.tree.leaves(jit(both)(queries, caches))
