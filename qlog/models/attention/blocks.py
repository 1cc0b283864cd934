"""Attention in blocks: no array of queries by keys is ever stored, forward or backward.

Axes: B prompts, K key/value heads, N query rows (rollouts, tokens and the query heads of a
key/value head, flattened in this order), T key slots, C head size.

Every mask is an interval: a query row sees the slots `start <= slot < stop` of a segment. Causality,
padding, sliding windows, rollouts packed into one row and the rollouts of a group side by side are
all of this form, and blocks of keys that no row of a block sees are never visited. So the shared
prefix is one matrix product of all rollouts' queries with one copy of the keys, and private keys
cost what is visible of them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from qlog.models.attention.segment import ATTENTION, Segment

_MASKED = -1e30  # finite, so that a row with no visible key gives numbers rather than NaN


class Blocks(NamedTuple):
    """Sizes of blocks: query rows, key slots, and private key slots in a decode step, where few are
    visible at first."""

    rows: int
    slots: int
    step_slots: int


BLOCKS = Blocks(512, 256, 128)  # for CPUs, whose caches hold them; TPUs decode in them, too


class _Partial(NamedTuple):
    """A softmax under way, float32: largest score and sum of weights [..., N], mix [..., N, C]."""

    top: Array
    total: Array
    mix: Array


def attend(queries: Array, segments: list[Segment], blocks: Blocks | None = None) -> Array:
    """Softmax attention over all segments together; differentiable in queries, keys and values.

    The backward pass recomputes the scores block by block (Dao et al., arXiv 2205.14135).

    Args:
      queries: [B, K, N, C], already scaled.
      segments: what they may see; every row must see a slot, or its result means nothing.
      blocks: None is `BLOCKS`.

    Returns:
      [B, K, N, C] in the dtype of `queries`; the softmax runs in float32.
    """
    blocks, count = blocks or BLOCKS, queries.shape[2]
    run = count // max(segment.runs for segment in segments)
    # Runs shorter than a block are visited several at a time, each with its own slots alone.
    is_short = run < count and run <= blocks.rows
    rows = run * min(count // run, blocks.rows // run) if is_short else min(blocks.rows, count)
    padding = -count % rows
    caches, visible = [], []
    for segment in segments:
        cache = segment.keys, segment.values
        ends = tuple(_pad(x[:, None], padding) for x in (segment.start, segment.stop))
        if is_short and segment.runs > 1:
            cache, ends = _by_run(cache, ends, segment.runs, run)
        caches.append(cache)
        visible.append(ends)
    return _attend(_pad(queries, padding), caches, visible, rows, blocks.slots)[:, :, :count]


def attend_step(
    queries: Array, prefix: Segment, suffix: Segment, blocks: Blocks | None = None
) -> Array:
    """One query token of each rollout over a shared prefix and its own suffix; no gradient.

    Args:
      queries: [B, K, M, G, C], already scaled; G query heads per key/value head.
      prefix: keys [B, K, P, C], start and stop [B, 1].
      suffix: keys [B, K, M, S, C], start [B or 1, M or 1], stop alike.
      blocks: None is `BLOCKS`.

    Returns:
      [B, K, M, G, C].
    """
    blocks = blocks or BLOCKS

    def run(rows, segment, axes, slots):
        start, stop = (jnp.expand_dims(x, axes) for x in (segment.start, segment.stop))
        size = min(slots, segment.keys.shape[-2])
        seen = segment.start.min() // size, -(-segment.stop.max() // size)
        return _forward(rows, [(segment.keys, segment.values)], [(start, stop)], [seen], slots)

    own = run(queries, suffix, (1, 3), blocks.step_slots)
    rows = queries.reshape(*queries.shape[:2], -1, queries.shape[-1])
    shared = run(rows, prefix, 1, blocks.slots)
    shared = jax.tree.map(lambda x, like: x.reshape(like.shape), shared, own)
    return _finish(_merge(own, shared), queries.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(queries, caches, visible, rows, slots):
    return _attend_forward(queries, caches, visible, rows, slots)[0]


def _attend_forward(queries, caches, visible, rows, slots):
    shared, private = _shared_and_private(caches, queries, rows)

    def block(inputs):
        block_queries, block_visible, seen, its_own = inputs
        state = _forward(block_queries, _either(shared, its_own), block_visible, seen, slots)
        return _finish(state, queries.dtype), state.top + jnp.log(_positive(state.total))

    inputs = (
        _split(queries, rows),
        *_visible_blocks(caches, visible, queries, rows, slots),
        private,
    )
    out, log_total = (checkpoint_name(_join(x), ATTENTION) for x in jax.lax.map(block, inputs))
    return out, (queries, caches, visible, out, log_total)


def _attend_backward(rows, slots, residuals, cotangent):
    queries, caches, visible, out, log_total = residuals
    shift = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    shared, private = _shared_and_private(caches, queries, rows)
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.mT.shape, jnp.float32), tree)

    def block(shared_grads, inputs):
        *arrays, block_visible, seen, its_own = inputs
        grads = _either(shared_grads, zeros(its_own))
        found = _backward(*arrays, _either(shared, its_own), block_visible, seen, grads, slots)
        grads, query_grads = found
        return _where(grads, shared), (query_grads, _where(grads, its_own))

    split = [_split(x, rows) for x in (queries, cotangent, log_total, shift)]
    inputs = (*split, *_visible_blocks(caches, visible, queries, rows, slots), private)
    shared_grads, (query_grads, own_grads) = jax.lax.scan(block, zeros(shared), inputs)
    cache_grads = _either(shared_grads, jax.tree.map(_join, own_grads))
    cache_grads = jax.tree.map(lambda grad, x: grad.mT.astype(x.dtype), cache_grads, caches)
    return _join(query_grads).astype(queries.dtype), cache_grads, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(queries, caches, visible, seen, slots) -> _Partial:
    """The softmax of one block of queries [..., N, C] over the visible blocks of every cache."""
    lead = queries.shape[:-1]
    state = _Partial(jnp.full(lead, _MASKED), jnp.zeros(lead), jnp.zeros(queries.shape))
    for (keys, values), interval, (first, last) in zip(caches, visible, seen):
        rows, *state = (_beside(keys, x, lead) for x in (queries, *state))

        def visit(index, state, rows=rows, keys=keys, values=values, interval=interval):
            scores = _scores(rows, keys, interval, index, slots)
            top = jnp.maximum(state.top, scores.max(-1))
            weights = jnp.exp(scores - top[..., None])
            own = _Partial(top, weights.sum(-1), _matmul(weights, _block(values, index, slots)))
            return _merge(state, own, top)

        state = _visit(first, last, visit, _Partial(*state), keys.shape[-2] <= slots)
        state = _Partial(*(x.reshape(*lead, *x.shape[keys.ndim - 1 :]) for x in state))
    return state


def _backward(queries, cotangent, log_total, shift, caches, visible, seen, cache_grads, slots):
    """Gradients of one block of queries; those of keys and values, [..., C, T], are added to
    `cache_grads`: so both factors of their matrix products lie as CPUs want them, twice as fast."""
    lead = queries.shape[:-1]
    query_grads, total = jnp.zeros(queries.shape, jnp.float32), []
    for cache, interval, (first, last), grads in zip(caches, visible, seen, cache_grads):
        query_grads, *arrays = (
            _beside(cache[0], x, lead) for x in (query_grads, queries, cotangent, log_total, shift)
        )
        columns = [x.mT for x in arrays[:2]]

        def visit(index, carry, arrays=arrays, columns=columns, cache=cache, interval=interval):
            query_grads, *grads = carry
            rows, cotangent, log_total, shift = arrays
            keys, values = (_block(x, index, slots) for x in cache)
            scores = _scores(rows, cache[0], interval, index, slots)
            weights = jnp.exp(scores - log_total[..., None])
            weight_grads = jnp.einsum(
                "...nc,...tc->...nt", cotangent, values, preferred_element_type=jnp.float32
            )
            score_grads = (weights * (weight_grads - shift[..., None])).astype(rows.dtype)
            parts = map(_matmul, columns, (score_grads, weights.astype(rows.dtype)))
            grads = (_add_block(grad, part, index) for grad, part in zip(grads, parts))
            return query_grads + _matmul(score_grads, keys), *grads

        carry = query_grads, *grads
        query_grads, *grads = _visit(first, last, visit, carry, cache[0].shape[-2] <= slots)
        query_grads = query_grads.reshape(queries.shape)
        total.append(tuple(grads))
    return total, query_grads


@jax.named_scope("attention_blocks")  # qlog.aot finds the loop by this name
def _visit(first, last, visit, state, is_single):
    """`visit` of every visible block; a single one is visited in any case, without a loop, whose end
    GPUs would have to tell the host before it goes on."""
    return visit(0, state) if is_single else jax.lax.fori_loop(first, last, visit, state)


def _scores(queries, keys, interval, index, slots) -> Array:
    """[..., N, slots of block `index`], masked where the interval does not reach."""
    start, stop = interval
    block = _block(keys, index, slots)
    scores = jnp.einsum("...nc,...tc->...nt", queries, block, preferred_element_type=jnp.float32)
    size, count = block.shape[-2], keys.shape[-2]
    numbers = jnp.minimum(index * size, count - size) + jnp.arange(size)
    # The last block may overlap the one before it: what that one saw is not seen twice.
    start = jnp.maximum(start, index * size)
    is_visible = (start[..., None] <= numbers) & (numbers < stop[..., None])
    return jnp.where(is_visible, scores, _MASKED)


def _block(x: Array, index, slots: int) -> Array:
    """Block `index` of `slots` slots, axis -2; a last one that would not be full begins earlier."""
    size = min(slots, x.shape[-2])
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=-2)


def _add_block(x: Array, part: Array, index) -> Array:
    """`part` added to x [..., C, T] where `_block` takes it from."""
    size = part.shape[-1]
    start = jnp.minimum(index * size, x.shape[-1] - size)
    total = jax.lax.dynamic_slice_in_dim(x, start, size, axis=-1) + part
    return jax.lax.dynamic_update_slice_in_dim(x, total, start, axis=-1)


def _matmul(one: Array, other: Array) -> Array:
    """float32 product [..., I, J] @ [..., J, K] of factors in the dtype of `other`."""
    one = one.astype(other.dtype)
    return jnp.matmul(one, other, preferred_element_type=jnp.float32)


def _merge(one: _Partial, other: _Partial, top: Array | None = None) -> _Partial:
    """Both softmaxes as one. With `top` given, it is the largest score and that of `other`."""
    if top is None:
        top = jnp.maximum(one.top, other.top)
        other = _rescale(other, top)
    one = _rescale(one, top)
    return _Partial(top, one.total + other.total, one.mix + other.mix)


def _rescale(state: _Partial, top: Array) -> _Partial:
    factor = jnp.exp(state.top - top)
    return _Partial(top, state.total * factor, state.mix * factor[..., None])


def _finish(state: _Partial, dtype) -> Array:
    return (state.mix / _positive(state.total)[..., None]).astype(dtype)


def _positive(total: Array) -> Array:
    return jnp.maximum(total, 1e-30)


def _split(x: Array, rows: int) -> Array:
    """[B, K, N, ...] -> [N / rows, B, K, rows, ...]."""
    x = x.reshape(*x.shape[:2], -1, rows, *x.shape[3:])
    return jnp.moveaxis(x, 2, 0)


def _join(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _by_run(cache, ends, runs: int, run: int):
    """Keys and values [B, K, runs * T, C] -> [B, K, runs, T, C], with empty runs for padded rows; and
    intervals [B or 1, 1, N] in them -> [B or 1, 1, runs, run], in the slots of each row's own run."""
    padded = ends[0].shape[2] // run
    cache = [x.reshape(*x.shape[:2], runs, -1, x.shape[3]) for x in cache]
    before = cache[0].shape[3] * (jnp.arange(padded * run) // run)
    ends = (jnp.maximum(x - before, 0).reshape(len(x), 1, padded, run) for x in ends)
    return tuple(_pad(x, padded - runs) for x in cache), tuple(ends)


def _pad(x: Array, size: int) -> Array:
    """Zeros behind axis 2."""
    return jnp.pad(x, [(0, size if axis == 2 else 0) for axis in range(x.ndim)])


def _beside(keys: Array, x: Array, lead: tuple[int, ...]) -> Array:
    """x [*lead, ...] with the leading axes of keys [..., T, C], then rows."""
    return x.reshape(*keys.shape[:-2], -1, *x.shape[len(lead) :])


def _shared_and_private(caches, queries: Array, rows: int):
    """Caches that all rows may see, and those in runs [blocks of rows, B, K, runs of a block, T, C];
    two lists, each with None in the other's places."""
    blocks = queries.shape[2] // rows
    split = lambda x: _split(x, x.shape[2] // blocks)
    shared = [None if keys.ndim > 4 else (keys, values) for keys, values in caches]
    return shared, [tuple(map(split, c)) if c[0].ndim > 4 else None for c in caches]


def _either(shared, private):
    return [private if mine is None else mine for mine, private in zip(shared, private)]


def _where(values, there):
    return [None if one is None else value for value, one in zip(values, there)]


def _visible_blocks(caches, visible, queries: Array, rows: int, slots: int):
    """Every block of rows: its intervals, and of every cache the first block of slots that one of
    its rows sees, and the one after the last, int32 [N / rows] each."""
    count = queries.shape[2] // rows
    intervals, found = [], []
    for (keys, _), ends in zip(caches, visible):
        intervals.append(tuple(_split(x, x.shape[2] // count) for x in ends))
        start, stop = (x.reshape(count, -1) for x in intervals[-1])
        size = min(slots, keys.shape[-2])
        first = start.min(1) // size
        last = -(-stop.max(1) // size)
        found.append((first, jnp.maximum(first, last)))
    return intervals, found
