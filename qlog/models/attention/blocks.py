"""Attention in blocks: no array of queries by keys is ever stored, forward or backward.

Axes: B prompts, K key/value heads, N query rows (rollouts, tokens and the query heads of a
key/value head, flattened in this order), T key slots, C head size.

Every mask is an interval of slots (see `Segment`), and blocks of keys that no row of a block sees
are never visited. The shared prefix is one matrix product of all rollouts' queries with one copy of
the keys. Private keys cost what is visible of them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from qlog.models.attention import quantised
from qlog.models.attention.quantised import Cached
from qlog.models.attention.segment import ATTENTION, Segment

_MASKED = -1e30  # finite, so that a row with no visible key gives numbers rather than NaN


class Blocks(NamedTuple):
    """Sizes of blocks."""

    rows: int  # query rows
    slots: int  # key slots
    step_slots: int  # private key slots in a decode step, of which few are visible at first


CPU_BLOCKS = Blocks(512, 256, 128)  # whose caches hold them; TPUs decode in these blocks, too


class _Partial(NamedTuple):
    """A softmax under way, float32. All weights are relative to the largest score so far."""

    top: Array  # [..., N], the largest score
    total: Array  # [..., N], the sum of weights
    mix: Array  # [..., N, C], the weighted sum of values


def attend(queries: Array, segments: list[Segment], blocks: Blocks = CPU_BLOCKS) -> Array:
    """Softmax attention over all segments together; differentiable in queries, keys and values.

    The backward pass recomputes the scores block by block (Dao et al., arXiv 2205.14135).

    Args:
      queries: [B, K, N, C], already scaled.
      segments: what they may see; every row must see a slot, or its result means nothing. Where
        some are quantised there is no derivative.
      blocks: sizes of blocks.

    Returns:
      [B, K, N, C] in the dtype of `queries`; the softmax runs in float32.
    """
    num_rows = queries.shape[2]
    run_rows = num_rows // max([segment.runs for segment in segments])  # of each run
    # Rows are ordered by rollout, token, head, so a run's rows lie next to each other. A run that
    # fills blocks needs nothing special: a block of rows then sees slots of one run, and the loop
    # over slots skips the others. Runs shorter than a block would share a block of rows, and every
    # row would be multiplied with the slots of all of them. So these get an axis of their own: a
    # block visits several runs at a time, each with only its own slots, as a batched product.
    is_short = run_rows < num_rows and run_rows <= blocks.rows
    if is_short:
        rows = run_rows * min(num_rows // run_rows, blocks.rows // run_rows)
    else:
        rows = min(blocks.rows, num_rows)
    padding = -num_rows % rows  # padded rows have the interval [0, 0): they see nothing
    caches = []
    for segment in segments:
        start, stop = _pad(segment.start[:, None], padding), _pad(segment.stop[:, None], padding)
        cache = _Cache(segment.keys, segment.values, start, stop)
        if is_short and segment.runs > 1:
            cache = _by_run(cache, segment.runs, run_rows)
        caches.append(cache)
    out: Any = _attend(_pad(queries, padding), caches, rows, blocks.slots)
    return out[:, :, :num_rows]


def attend_step(
    queries: Array, prefix: Segment, suffix: Segment, blocks: Blocks = CPU_BLOCKS
) -> Array:
    """One query token of each rollout over a shared prefix and its own suffix; no gradient.

    Args:
      queries: [B, K, M, G, C], already scaled; G query heads per key/value head.
      prefix: keys [B, K, P, C], start and stop [B, 1].
      suffix: keys [B, K, M, S, C], start [B or 1, M or 1], stop alike.
      blocks: sizes of blocks.

    Returns:
      [B, K, M, G, C].
    """

    def over(rows: Array, segment: Segment, axes: int | tuple[int, ...], slots: int) -> _Partial:
        size = min(slots, segment.keys.shape[-2])
        part = _RowBlock(
            start=jnp.expand_dims(segment.start, axes),
            stop=jnp.expand_dims(segment.stop, axes),
            first=segment.start.min() // size,
            last=_ceil_div(segment.stop.max(), size),
        )
        return _forward(_nothing_seen(rows), rows, segment.keys, segment.values, part, slots)

    # Private keys: a batched product of G rows with each rollout's slots.
    own = over(queries, suffix, (1, 3), blocks.step_slots)
    # Shared keys: one product of all M * G rows with the one copy of the prompt's slots.
    rows = queries.reshape(*queries.shape[:2], -1, queries.shape[-1])
    shared = over(rows, prefix, 1, blocks.slots)
    shared = jax.tree.map(lambda x, like: x.reshape(like.shape), shared, own)
    return _finish(_merge(own, shared), queries.dtype)


class _Cache(NamedTuple):
    """A segment as blocks of rows visit it.

    Shared by all rows: keys and values [B, K, T, C], intervals [B or 1, 1, N].
    Private to runs: keys and values [B, K, runs, T, C], where T slots belong to each run, and
    intervals [B or 1, 1, runs, rows of a run] in the slots of the run.
    """

    keys: Cached  # [B, K, T, C] or [B, K, runs, T, C]
    values: Cached  # as keys
    start: Array  # int32, the first slot that a row sees
    stop: Array  # int32, the slot after the last one that it sees

    @property
    def is_private(self) -> bool:
        return self.keys.ndim > 4


class _RowBlock(NamedTuple):
    """What one block of query rows sees of one cache; or, stacked in front, what all blocks see."""

    start: Array  # int32 [B or 1, 1, rows], or [B or 1, 1, runs of the block, rows of a run]
    stop: Array  # int32, as start
    # int32 scalars: of the blocks of slots that some row sees, the first one and the one after the
    # last. Other blocks are not visited.
    first: Array
    last: Array


# The derivative is written out: JAX would keep every block's scores for the backward pass.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend(queries: Array, caches: list[_Cache], rows: int, slots: int) -> Array:
    return _attend_forward(queries, caches, rows, slots)[0]


def _attend_forward(queries: Array, caches: list[_Cache], rows: int, slots: int):
    def block(inputs):
        block_queries, parts, private = inputs
        state = _nothing_seen(block_queries)
        for i, (cache, part) in enumerate(zip(caches, parts, strict=True)):
            keys, values = private.get(i, (cache.keys, cache.values))
            state = _forward(state, block_queries, keys, values, part, slots)
        return _finish(state, queries.dtype), state.top + jnp.log(_positive(state.total))

    # One block of rows at a time, so that scores of rows x slots exist for one pair of blocks only.
    num_blocks = queries.shape[2] // rows
    inputs = (
        _split(queries, num_blocks),
        _row_blocks(caches, num_blocks, slots),
        _private_caches(caches, num_blocks),
    )
    out, log_total = (checkpoint_name(_join(x), ATTENTION) for x in jax.lax.map(block, inputs))
    return out, (queries, caches, out, log_total)


def _attend_backward(rows: int, slots: int, residuals, cotangent: Array):
    queries, caches, out, log_total = residuals
    # The softmax's gradient subtracts sum_t weight_t * weight_grad_t from every weight_grad; this
    # sum is the product of the output with its cotangent, a number per row.
    shift = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    num_blocks = queries.shape[2] // rows

    def zeros(keys_and_values):  # [..., T, C] -> [..., C, T], see `_backward`
        return jax.tree.map(lambda x: jnp.zeros(x.mT.shape, jnp.float32), keys_and_values)

    def block(shared_grads, inputs):
        row_arrays, parts, private = inputs
        grads = shared_grads | zeros(private)
        query_grads = jnp.zeros(row_arrays.queries.shape, jnp.float32)
        for i, (cache, part) in enumerate(zip(caches, parts, strict=True)):
            keys, values = private.get(i, (cache.keys, cache.values))
            query_grads, grads[i] = _backward(
                query_grads, grads[i], row_arrays, keys, values, part, slots
            )
        # Gradients of shared caches add up over the blocks of rows; each private run belongs to
        # one block of rows, so its gradient is complete.
        shared_grads = {i: grads[i] for i in shared_grads}
        return shared_grads, (query_grads, {i: grads[i] for i in private})

    inputs = (
        _Rows(*(_split(x, num_blocks) for x in (queries, cotangent, log_total, shift))),
        _row_blocks(caches, num_blocks, slots),
        _private_caches(caches, num_blocks),
    )
    shared = {i: (c.keys, c.values) for i, c in enumerate(caches) if not c.is_private}
    shared_grads, (query_grads, private_grads) = jax.lax.scan(block, zeros(shared), inputs)
    grads = shared_grads | jax.tree.map(_join, private_grads)
    cache_grads = []
    for i, cache in enumerate(caches):
        keys_grad, values_grad = (
            grad.mT.astype(x.dtype)
            for grad, x in zip(grads[i], (cache.keys, cache.values), strict=True)
        )
        # None: intervals are integers and have no gradient.
        cache_grads.append(
            cache._replace(keys=keys_grad, values=values_grad, start=None, stop=None)
        )
    return _join(query_grads).astype(queries.dtype), cache_grads


_attend.defvjp(_attend_forward, _attend_backward)


# ---- One block of rows over one cache ----


class _Rows(NamedTuple):
    """What the backward pass needs of query rows."""

    queries: Array  # [..., N, C]
    cotangent: Array  # [..., N, C]
    log_total: Array  # float32 [..., N], log of the softmax's denominator
    shift: Array  # float32 [..., N]


def _forward(
    state: _Partial, queries: Array, keys: Cached, values: Cached, part: _RowBlock, slots: int
) -> _Partial:
    """`state` after one block of queries [..., N, C] has seen its part of a cache."""
    lead = queries.shape[:-1]
    # Private keys have an axis of runs that the rows get, too: [B, K, N] -> [B, K, runs, N / runs].
    rows = _like_keys(queries, keys, lead)
    state = _Partial(*(_like_keys(x, keys, lead) for x in state))

    # The softmax of one more block of slots, merged with that of all blocks before. Each is
    # relative to the largest score it has seen, so nothing overflows, and scores are needed once.
    def visit(index, state: _Partial) -> _Partial:
        scores = _scores(rows, keys, part, index, slots)
        top = jnp.maximum(state.top, scores.max(-1))
        weights = jnp.exp(scores - top[..., None])
        own = _Partial(top, weights.sum(-1), _mix(weights, values, index, slots, queries.dtype))
        return _merge(state, own, top)

    state = _visit(visit, state, part, is_single=keys.shape[-2] <= slots)
    return _Partial(*(x.reshape(*lead, *x.shape[keys.ndim - 1 :]) for x in state))


def _backward(
    query_grads: Array,
    cache_grads: tuple[Array, Array],
    rows: _Rows,
    keys: Array,
    values: Array,
    part: _RowBlock,
    slots: int,
) -> tuple[Array, tuple[Array, Array]]:
    """The gradients of queries, keys and values with those of one block of rows over a cache added.

    Gradients of keys and values are [..., C, T]: so both factors of their matrix products lie as
    CPUs want them, which makes the products twice as fast.
    """
    lead = rows.queries.shape[:-1]
    grads_shape = query_grads.shape
    query_grads = _like_keys(query_grads, keys, lead)
    queries, cotangent, log_total, shift = (_like_keys(x, keys, lead) for x in rows)
    queries_by_column, cotangent_by_column = queries.mT, cotangent.mT

    def visit(index, carry):
        query_grads, keys_grads, values_grads = carry
        keys_block, values_block = (_block(x, index, slots) for x in (keys, values))
        # With the log of the denominator from the forward pass, the weights are final at once:
        # w = exp(s - log_total), and ds = w * (dout . v - shift).
        scores = _scores(queries, keys, part, index, slots)
        weights = jnp.exp(scores - log_total[..., None])
        weight_grads = jnp.einsum(
            "...nc,...tc->...nt", cotangent, values_block, preferred_element_type=jnp.float32
        )
        score_grads = (weights * (weight_grads - shift[..., None])).astype(queries.dtype)
        keys_part = _matmul(queries_by_column, score_grads)
        values_part = _matmul(cotangent_by_column, weights.astype(queries.dtype))
        return (
            query_grads + _matmul(score_grads, keys_block),
            _add_block(keys_grads, keys_part, index),
            _add_block(values_grads, values_part, index),
        )

    carry = query_grads, *cache_grads
    query_grads, keys_grads, values_grads = _visit(
        visit, carry, part, is_single=keys.shape[-2] <= slots
    )
    return query_grads.reshape(grads_shape), (keys_grads, values_grads)


@jax.named_scope("attention_blocks")  # qlog.aot finds the loop by this name
def _visit(visit, state, part: _RowBlock, is_single: bool):
    """state -> visit(index, state) over the visible blocks of slots.

    A cache of a single block is visited in any case, without a loop: a GPU would have to tell the
    host the loop's end before it goes on.
    """
    if is_single:
        return visit(0, state)
    return jax.lax.fori_loop(part.first, part.last, visit, state)


def _scores(queries: Array, keys: Cached, part: _RowBlock, index, slots: int) -> Array:
    """[..., N, slots of block `index`], masked where the interval does not reach."""
    block, scale = quantised.factors(_block(keys, index, slots), queries.dtype)
    scores = jnp.einsum("...nc,...tc->...nt", queries, block, preferred_element_type=jnp.float32)
    scores = scores if scale is None else scores * scale
    size, num_slots = block.shape[-2], keys.shape[-2]
    # `dynamic_slice` moves a block that would reach beyond the end to an earlier start.
    numbers = jnp.minimum(index * size, num_slots - size) + jnp.arange(size)
    # The last block may overlap the one before it: what that one saw is not seen twice.
    start = jnp.maximum(part.start, index * size)
    is_visible = (start[..., None] <= numbers) & (numbers < part.stop[..., None])
    return jnp.where(is_visible, scores, _MASKED)


def _mix(weights: Array, values: Cached, index, slots: int, dtype) -> Array:
    """float32 [..., N, C]: values of block `index` by their weights [..., N, slots]."""
    block, scale = quantised.factors(_block(values, index, slots), dtype)
    return _matmul(weights if scale is None else weights * scale, block)


def _block(x: Any, index, slots: int) -> Any:
    """Block `index` of `slots` slots, axis -2; a last one that would not be full begins earlier."""
    size = min(slots, x.shape[-2])
    take = functools.partial(
        jax.lax.dynamic_slice_in_dim, start_index=index * size, slice_size=size, axis=-2
    )
    return jax.tree.map(take, x)


def _add_block(x: Array, part: Array, index) -> Array:
    """`part` added to x [..., C, T] where `_block` takes it from."""
    size = part.shape[-1]
    start = jnp.minimum(index * size, x.shape[-1] - size)
    # Where the last block overlaps the one before, its scores were masked, and `part` is 0.
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


def _nothing_seen(queries: Array) -> _Partial:
    """The softmax of queries [..., N, C] before the first block of keys."""
    lead = queries.shape[:-1]
    return _Partial(jnp.full(lead, _MASKED), jnp.zeros(lead), jnp.zeros(queries.shape))


# ---- How arrays are cut into blocks ----


def _ceil_div(x, divisor: int):
    return -(-x // divisor)


def _split(x: Array, num_blocks: int) -> Array:
    """[B, K, N, ...] -> [blocks, B, K, N / blocks, ...]."""
    x = x.reshape(*x.shape[:2], num_blocks, x.shape[2] // num_blocks, *x.shape[3:])
    return jnp.moveaxis(x, 2, 0)


def _join(x: Array) -> Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _by_run(cache: _Cache, runs: int, run_rows: int) -> _Cache:
    """A shared cache of `runs` runs, each of `run_rows` rows, as a private one.

    Rows may have been padded to whole blocks; empty runs are added for the padded ones.
    """
    padded_runs = cache.start.shape[2] // run_rows

    def keys_by_run(x: Array) -> Array:
        x = x.reshape(
            *x.shape[:2], runs, -1, x.shape[3]
        )  # [B, K, runs * T, C] -> [B, K, runs, T, C]
        return _pad(x, padded_runs - runs)

    keys, values = jax.tree.map(keys_by_run, (cache.keys, cache.values))
    # Slots were numbered over all runs, and are now numbered within the row's own run. An interval
    # cannot begin before its run, but a padded row's does: hence the maximum.
    before = keys.shape[3] * (jnp.arange(padded_runs * run_rows) // run_rows)

    def by_run(x: Array) -> Array:
        return jnp.maximum(x - before, 0).reshape(len(x), 1, padded_runs, run_rows)

    return _Cache(keys, values, by_run(cache.start), by_run(cache.stop))


def _pad(x: Array | np.ndarray, size: int) -> Array:
    """Zeros behind axis 2."""
    return jnp.pad(x, [(0, size if axis == 2 else 0) for axis in range(x.ndim)])


def _like_keys(x: Array, keys: Cached, lead: tuple[int, ...]) -> Array:
    """x [*lead, ...] with the leading axes of keys [..., T, C], then rows."""
    return x.reshape(*keys.shape[:-2], -1, *x.shape[len(lead) :])


def _private_caches(caches: list[_Cache], num_blocks: int) -> dict[int, tuple[Cached, Cached]]:
    """{number of a private cache: its keys and values, [blocks, B, K, runs of a block, T, C]}.

    Private caches are handed to each block of rows in parts. Shared ones must not be: a scan over
    them would copy them for every block.
    """
    split = functools.partial(_split, num_blocks=num_blocks)
    return {
        i: jax.tree.map(split, (cache.keys, cache.values))
        for i, cache in enumerate(caches)
        if cache.is_private
    }


def _row_blocks(caches: list[_Cache], num_blocks: int, slots: int) -> list[_RowBlock]:
    """For each cache what the blocks of rows see of it, [blocks, ...]."""
    parts = []
    for cache in caches:
        start, stop = _split(cache.start, num_blocks), _split(cache.stop, num_blocks)
        size = min(slots, cache.keys.shape[-2])
        # The range that covers all rows of a block, of all prompts: one loop serves them together.
        first = start.reshape(num_blocks, -1).min(1) // size
        last = _ceil_div(stop.reshape(num_blocks, -1).max(1), size)
        parts.append(_RowBlock(start, stop, first, jnp.maximum(first, last)))
    return parts
