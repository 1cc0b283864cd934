"""Attention of grouped queries over a shared prefix, a private suffix and themselves.

Axes: B prompts, K key/value heads, M rollouts, G query heads per key/value head, R new tokens,
P prefix slots, S suffix slots, C head size. The prefix is stored once per prompt: its scores are
one matrix product of M * G * R queries with P keys, whatever M is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

_MASKED = -1e30  # finite, so that a query with no visible key gives zeros rather than NaN
# Scores of one query block may take this many elements before queries are processed in blocks.
_MAX_SCORES = 1 << 26


class Segment(NamedTuple):
    """Keys and values that the queries may see.

    keys, values: [B, K, P, C] when all rollouts of a prompt share them, else [B, K, M, S, C].
    visible: bool, broadcastable to [B, 1, M, 1, R, P or S].
    positions: int32, broadcastable to [B, 1, M, 1, 1, P or S]; read where there is a horizon.
    """

    keys: Array
    values: Array
    visible: Array
    positions: Array | None = None


def attend(queries: Array, segments: list[Segment], horizon: Array | None = None) -> Array:
    """Softmax attention over the union of `segments`.

    Args:
      queries: [B, K, M, G, R, C], already scaled.
      segments: what the queries may see; at least one.
      horizon: int32 [B, 1, M, 1, R, 1], the first position inside each query's sliding window;
        None when the layer has no window.

    Returns:
      [B, K, M, G, R, C] in the dtype of `queries`; the softmax runs in float32.
    """
    num_slots = sum(segment.keys.shape[-2] for segment in segments)
    rows = queries.size // queries.shape[-1]
    length = queries.shape[4]
    block = length
    while block > 64 and block % 2 == 0 and rows // length * block * num_slots > _MAX_SCORES:
        block //= 2
    if block == length:
        return _attend_block(queries, segments, horizon)

    @jax.checkpoint
    def one_block(index):
        start = index * block

        def take(x, axis):
            if x.shape[axis] == 1:
                return x
            return jax.lax.dynamic_slice_in_dim(x, start, block, axis)

        local = [s._replace(visible=take(s.visible, 4)) for s in segments]
        return _attend_block(
            take(queries, 4), local, None if horizon is None else take(horizon, 4)
        )

    blocks = jax.lax.map(one_block, jnp.arange(length // block))
    return jnp.moveaxis(blocks, 0, 4).reshape(queries.shape)


def _attend_block(queries: Array, segments: list[Segment], horizon: Array | None) -> Array:
    scores = []
    for keys, _, visible, positions in segments:
        if horizon is not None:
            visible = visible & (positions >= horizon)
        equation = "bkmgrc,bkpc->bkmgrp" if keys.ndim == 4 else "bkmgrc,bkmpc->bkmgrp"
        score = jnp.einsum(equation, queries, keys, preferred_element_type=jnp.float32)
        scores.append(jnp.where(visible, score, _MASKED))
    # One softmax over all segments, without laying their keys side by side.
    top = scores[0].max(-1, keepdims=True)
    for score in scores[1:]:
        top = jnp.maximum(top, score.max(-1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    total, out = 0.0, 0.0
    for score, segment in zip(scores, segments):
        values = segment.values
        weights = jnp.exp(score - top)
        total += weights.sum(-1, keepdims=True)
        equation = "bkmgrp,bkpc->bkmgrc" if values.ndim == 4 else "bkmgrp,bkmpc->bkmgrc"
        out += jnp.einsum(
            equation, weights.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
    return (out / total).astype(queries.dtype)
