"""The attention of `attention.attend` as Pallas TPU kernels: scores never leave the chip's VMEM.

Axes and masks are those of `attention`: B prompts, K key/value heads, N query rows, T key slots,
C head size; a row sees the slots `start <= slot < stop` of a segment.

One kernel per segment; their softmaxes are merged by log-sum-exp. The backward pass recomputes the
scores (Dao et al., arXiv 2205.14135): one kernel for the queries' gradient, one for the keys' and
values'. Scores are held transposed, [slots, rows]: what belongs to a row (its interval, largest
score, sum) is then a vector along lanes, [1, rows], which is compact in HBM and cheap to broadcast,
and the softmax reduces over sublanes, without exchanges between lanes.

Blocks that no row of a block of rows sees cost nothing: tables in scalar memory hold the visible
range of each block, the grid's last axis is as long as the longest range, computed at run time,
and past the end of a shorter range the index maps stay on its last block, which is not read again.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from qlog.models.attention.segment import ATTENTION, Segment

_MASKED = -1e30  # finite, so that a row with no visible key gives numbers rather than NaN
# Of a block of queries, and of a block of keys: large, since every block of queries reads its keys
# from HBM anew, but the backward pass holds four such float32 blocks in 16 MiB of VMEM.
_ROWS, _SLOTS = 1024, 512
_LANES = 128  # blocks are multiples of it


class _Plan(NamedTuple):
    """The blocks of a segment that are visible; both tables are read from scalar memory.

    slots: int32 [4, B, row blocks]. Blocks of slots [0] <= block < [1] are seen by some row of the
      block of rows, and blocks [2] <= block < [3] by all its rows in full: they need no mask.
    rows: int32 [2, B, slot blocks]. Only blocks of rows [0] <= block < [1] see the block of slots.
    """

    slots: Array
    rows: Array


class _Blocks(NamedTuple):
    """Sizes of a segment's blocks, and how many of them there are."""

    rows: int
    slots: int
    row_count: int
    slot_count: int


def attend(
    queries: Array, segments: list[Segment], mesh: Mesh | None = None, interpret: bool = False
) -> Array:
    """Softmax attention over all segments together; differentiable in queries, keys and values.

    Args:
      queries: [B, K, N, C], already scaled, bfloat16 or float32.
      segments: what they may see; every row must see a slot, or its result means nothing. Keys and
        values are cast to the dtype of `queries`.
      mesh: with axes "data", "fsdp" and "tensor": B is split over the first two and K over the
        last, where they divide. None: a single device, or inside a shard_map already.
      interpret: run the kernels as plain JAX on any backend, slowly, for tests.

    Returns:
      [B, K, N, C] in the dtype of `queries`; the softmax runs in float32.
    """
    caches = [tuple(x.astype(queries.dtype) for x in (s.keys, s.values)) for s in segments]
    visible = [(segment.start, segment.stop) for segment in segments]
    return _attend(queries, caches, visible, mesh, interpret)


# The shards are inside the derivative rule: of a replicated axis every device then computes the
# whole gradient, where the transpose of shard_map would add up shares of it.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(queries, caches, visible, mesh, interpret):
    return _attend_forward(queries, caches, visible, mesh, interpret)[0]


def _attend_forward(queries, caches, visible, mesh, interpret):
    run = functools.partial(_forward, interpret=interpret)
    like = (queries, jax.ShapeDtypeStruct(queries.shape[:-1], jnp.float32))
    results = _by_shard(mesh, run, like, queries, caches, visible)
    out, log_total = (checkpoint_name(x, ATTENTION) for x in results)
    return out, (queries, caches, visible, out, log_total)


def _attend_backward(mesh, interpret, residuals, cotangent):
    queries, caches, visible, out, log_total = residuals
    run = functools.partial(_backward, interpret=interpret)
    arrays = (queries, caches, visible, out, log_total, cotangent)
    return *_by_shard(mesh, run, (queries, caches), *arrays), None


_attend.defvjp(_attend_forward, _attend_backward)


def _by_shard(mesh: Mesh | None, function, like, *arrays):
    """function(*arrays), whose results have the shapes of `like`, each device with its shard."""
    if mesh is None:
        return function(*arrays)
    specs = jax.tree.map(functools.partial(_spec, mesh), (arrays, like))
    return jax.shard_map(
        function, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False
    )(*arrays)


def _spec(mesh: Mesh, x) -> PartitionSpec:
    """[B or 1, K, ...] or [B or 1, N]: where the axes divide, as caches lie."""
    axes = (("data", "fsdp"), ("tensor",)) if x.ndim > 2 else (("data", "fsdp"),)
    fits = [
        names if length % math.prod(mesh.shape[name] for name in names) == 0 else None
        for names, length in zip(axes, x.shape)
    ]
    return PartitionSpec(*fits)


def _forward(queries, caches, visible, *, interpret):
    """-> [B, K, N, C] and the log of the softmax's denominator, float32 [B, K, N]."""
    count = queries.shape[2]
    rows = _block_size(count, _ROWS)
    queries, dtype = _pad(queries, rows), queries.dtype
    # Parts of a sum stay in float32 until they are added up.
    part_dtype = dtype if len(caches) == 1 else jnp.float32
    parts = []
    for cache, interval in zip(caches, visible):
        setting = _setting(rows, *cache, *interval, queries)
        parts.append(_forward_call(queries, *setting, part_dtype, interpret))
    out, log_total = parts[0]
    if len(parts) > 1:
        log_totals = jnp.stack([its_total for _, its_total in parts])
        log_total = jax.nn.logsumexp(log_totals, 0)
        shares = jnp.exp(log_totals - log_total)
        out = sum(_column(share) * part for share, (part, _) in zip(shares, parts)).astype(dtype)
    return out[:, :, :count], log_total[:, :, 0, :count]


def _backward(queries, caches, visible, out, log_total, cotangent, *, interpret):
    """Gradients of queries and of every segment's keys and values, in their dtypes."""
    count, dtype = queries.shape[2], queries.dtype
    shift = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    rows = _block_size(count, _ROWS)
    queries, cotangent = _pad(queries, rows), _pad(cotangent, rows)
    log_total, shift = (_pad(x[:, :, None], rows, 3) for x in (log_total, shift))
    part_dtype = dtype if len(caches) == 1 else jnp.float32
    query_grads, cache_grads = [], []
    for cache, interval in zip(caches, visible):
        setting = _setting(rows, *cache, *interval, queries)
        inputs = (queries, cotangent, log_total, shift, *setting)
        query_grads.append(_queries_call(*inputs, part_dtype, interpret))
        grads = _cache_call(*inputs, interpret)
        cache_grads.append(tuple(grad[:, :, : cache[0].shape[2]] for grad in grads))
    return sum(query_grads).astype(dtype)[:, :, :count], cache_grads


def _setting(rows, keys, values, start, stop, queries):
    """A segment padded to whole blocks: keys, values, start and stop [B or 1, 1, N], plan, sizes."""
    slots = _block_size(keys.shape[2], _SLOTS)
    stop = jnp.minimum(stop, keys.shape[2])
    keys, values = _pad(keys, slots), _pad(values, slots)
    start, stop = (_pad(x[:, None], rows) for x in (start, stop))
    sizes = _Blocks(rows, slots, queries.shape[2] // rows, keys.shape[2] // slots)
    return keys, values, start, stop, _plan(start, stop, queries.shape[0], sizes), sizes


def _plan(start, stop, batch, sizes) -> _Plan:
    start, stop = jnp.broadcast_arrays(
        *(x.reshape(-1, sizes.row_count, sizes.rows) for x in (start, stop))
    )
    last_slot = sizes.slots * sizes.slot_count - 1
    sees = start < stop
    first = jnp.where(sees, start, last_slot).min(-1) // sizes.slots
    last = jnp.maximum(pl.cdiv(jnp.where(sees, stop, 0).max(-1), sizes.slots), first)
    whole = pl.cdiv(start.max(-1), sizes.slots), stop.min(-1) // sizes.slots
    blocks = jnp.arange(sizes.slot_count)
    seen = (first[..., None] <= blocks) & (blocks < last[..., None])  # [B, row blocks, slot blocks]
    first_row = jnp.argmax(seen, 1)
    last_row = jnp.where(seen.any(1), sizes.row_count - jnp.argmax(seen[:, ::-1], 1), first_row)
    tables = jnp.stack([first, last, *whole]), jnp.stack([first_row, last_row])
    return _Plan(
        *(jnp.broadcast_to(x, (x.shape[0], batch, x.shape[2])).astype(jnp.int32) for x in tables)
    )


def _forward_call(queries, keys, values, start, stop, plan, sizes, dtype, interpret):
    batch, heads, count, size = queries.shape
    row, slot, ends = _specs(sizes, size, start.shape[0], by_rows=True)
    line = _line_spec(sizes, by_rows=True)
    return pl.pallas_call(
        functools.partial(_forward_kernel, sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, sizes.row_count, _steps(plan.slots)),
            in_specs=[row, slot, slot, ends, ends],
            out_specs=[row, line],
            scratch_shapes=[_vmem(1, sizes.rows), _vmem(1, sizes.rows), _vmem(size, sizes.rows)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, count), jnp.float32),
        ],
        compiler_params=_params(),
        cost_estimate=_cost(queries, sizes, products=2),
        interpret=interpret,
        name="attention_forward",
    )(plan.slots, queries, keys, values, start, stop)


def _forward_kernel(
    plan, queries, keys, values, start, stop, out, log_total, top, total, mix, *, sizes
):
    """One block of rows over the blocks of slots that it sees, the grid's last axis."""

    step, is_last = pl.program_id(3), pl.program_id(3) == pl.num_programs(3) - 1

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full_like(top, _MASKED)
        total[...] = jnp.zeros_like(total)
        mix[...] = jnp.zeros_like(mix)

    def visit(mask):
        scores = mask(_dot(keys[...], queries[...], 1, 1), _MASKED)
        new_top = jnp.maximum(top[...], scores.max(0, keepdims=True))
        weights = jnp.exp(scores - new_top)
        factor = jnp.exp(top[...] - new_top)
        total[...] = total[...] * factor + weights.sum(0, keepdims=True)
        mix[...] = mix[...] * factor + _dot(values[...], weights.astype(values.dtype), 0, 0)
        top[...] = new_top

    batch, row_block = pl.program_id(0), pl.program_id(2)
    block = plan[0, batch, row_block] + step
    _visit(visit, plan, (batch, row_block, block), start, stop, sizes)

    @pl.when(is_last)
    def _():
        positive = jnp.maximum(total[...], 1e-30)
        out[...] = (mix[...] / positive).T.astype(out.dtype)
        log_total[...] = top[...] + jnp.log(positive)


def _queries_call(
    queries, cotangent, log_total, shift, keys, values, start, stop, plan, sizes, dtype, interpret
):
    batch, heads, _, size = queries.shape
    row, slot, ends = _specs(sizes, size, start.shape[0], by_rows=True)
    line = _line_spec(sizes, by_rows=True)
    return pl.pallas_call(
        functools.partial(_queries_kernel, sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, sizes.row_count, _steps(plan.slots)),
            in_specs=[row, row, line, line, slot, slot, ends, ends],
            out_specs=row,
            scratch_shapes=[_vmem(size, sizes.rows)],
        ),
        out_shape=jax.ShapeDtypeStruct(queries.shape, dtype),
        compiler_params=_params(),
        cost_estimate=_cost(queries, sizes, products=3),
        interpret=interpret,
        name="attention_queries_gradient",
    )(plan.slots, queries, cotangent, log_total, shift, keys, values, start, stop)


def _queries_kernel(
    plan, queries, cotangent, log_total, shift, keys, values, start, stop, out, total, *, sizes
):
    """The gradient of one block of rows, over the blocks of slots that it sees."""

    step, is_last = pl.program_id(3), pl.program_id(3) == pl.num_programs(3) - 1

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    def visit(mask):
        _, score_grads = _recompute(queries, cotangent, log_total, shift, keys, values, mask)
        total[...] += _dot(keys[...], score_grads.astype(keys.dtype), 0, 0)

    batch, row_block = pl.program_id(0), pl.program_id(2)
    block = plan[0, batch, row_block] + step
    _visit(visit, plan, (batch, row_block, block), start, stop, sizes)

    @pl.when(is_last)
    def _():
        out[...] = total[...].T.astype(out.dtype)


def _cache_call(
    queries, cotangent, log_total, shift, keys, values, start, stop, plan, sizes, interpret
):
    batch, heads, _, size = queries.shape
    row, slot, ends = _specs(sizes, size, start.shape[0], by_rows=False)
    line = _line_spec(sizes, by_rows=False)
    return pl.pallas_call(
        functools.partial(_cache_kernel, sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, sizes.slot_count, _steps(plan.rows)),
            in_specs=[row, row, line, line, slot, slot, ends, ends],
            out_specs=[slot, slot],
            scratch_shapes=[_vmem(sizes.slots, size)] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, values)],
        compiler_params=_params(),
        cost_estimate=_cost(queries, sizes, products=4),
        interpret=interpret,
        name="attention_cache_gradient",
    )(plan.rows, plan.slots, queries, cotangent, log_total, shift, keys, values, start, stop)


def _cache_kernel(
    rows_plan,
    plan,
    queries,
    cotangent,
    log_total,
    shift,
    keys,
    values,
    start,
    stop,
    keys_out,
    values_out,
    keys_total,
    values_total,
    *,
    sizes,
):
    """Gradients of one block of slots, over the blocks of rows that see it."""

    step, is_last = pl.program_id(3), pl.program_id(3) == pl.num_programs(3) - 1

    @pl.when(step == 0)
    def _():
        keys_total[...] = jnp.zeros_like(keys_total)
        values_total[...] = jnp.zeros_like(values_total)

    def visit(mask):
        weights, score_grads = _recompute(queries, cotangent, log_total, shift, keys, values, mask)
        values_total[...] += _dot(weights.astype(cotangent.dtype), cotangent[...], 1, 0)
        keys_total[...] += _dot(score_grads.astype(queries.dtype), queries[...], 1, 0)

    batch, block = pl.program_id(0), pl.program_id(2)
    row_block = rows_plan[0, batch, block] + step

    @pl.when(row_block < rows_plan[1, batch, block])  # beyond, `plan` may have no such row block
    def _():
        _visit(visit, plan, (batch, row_block, block), start, stop, sizes)

    @pl.when(is_last)
    def _():
        keys_out[...] = keys_total[...].astype(keys_out.dtype)
        values_out[...] = values_total[...].astype(values_out.dtype)


def _recompute(queries, cotangent, log_total, shift, keys, values, mask):
    """Softmax weights and the scores' gradients of a block: float32 [slots, rows] each."""
    weights = mask(jnp.exp(_dot(keys[...], queries[...], 1, 1) - log_total[...]), 0.0)
    weight_grads = _dot(values[...], cotangent[...], 1, 1)
    return weights, weights * (weight_grads - shift[...])


def _visit(visit, plan, where, start, stop, sizes):
    """visit(mask) if the block of rows sees the block of slots; mask(scores, value) hides the rest.

    where: (prompt, block of rows, block of slots).
    """
    batch, row_block, block = where
    first, last, whole_first, whole_last = (plan[i, batch, row_block] for i in range(4))
    is_seen = (first <= block) & (block < last)
    is_whole = (whole_first <= block) & (block < whole_last)

    def mask(scores, value):
        numbers = block * sizes.slots + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        return jnp.where((start[...] <= numbers) & (numbers < stop[...]), scores, value)

    pl.when(is_seen & is_whole)(lambda: visit(lambda scores, value: scores))
    pl.when(is_seen & ~is_whole)(lambda: visit(mask))


def _specs(sizes: _Blocks, size: int, visible_batch: int, by_rows: bool):
    """Blocks of [B, K, N, C], [B, K, T, C] and [B or 1, 1, N] for a grid (B, K, blocks, steps)."""

    def row(b, k, block, step, plan, *_):
        return b, k, _row_block(by_rows, b, block, step, plan), 0

    def slot(b, k, block, step, plan, *_):
        return b, k, _at(plan, b, block, step) if by_rows else block, 0

    def ends(b, k, block, step, plan, *_):
        return b if visible_batch > 1 else 0, 0, _row_block(by_rows, b, block, step, plan)

    return (
        pl.BlockSpec((None, None, sizes.rows, size), row),
        pl.BlockSpec((None, None, sizes.slots, size), slot),
        pl.BlockSpec((None, 1, sizes.rows), ends),
    )


def _line_spec(sizes: _Blocks, by_rows: bool):
    """Blocks of [B, K, 1, N]."""

    def line(b, k, block, step, plan, *_):
        return b, k, 0, _row_block(by_rows, b, block, step, plan)

    return pl.BlockSpec((None, None, 1, sizes.rows), line)


def _row_block(by_rows, b, block, step, plan):
    return block if by_rows else _at(plan, b, block, step)


def _at(plan, b, block, step):
    """The block visited in `step`; past the last one it stays there, so that nothing is read."""
    first, last = plan[0, b, block], plan[1, b, block]
    return jnp.minimum(first + step, jnp.maximum(last - 1, first))


def _steps(plan: Array) -> Array:
    """Length of the longest range; at least 1, so that every block of results is written."""
    return jnp.maximum((plan[1] - plan[0]).max(), 1)


def _params():
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
    )


def _cost(queries, sizes: _Blocks, products: int) -> pl.CostEstimate:
    """For the compiler's schedule: `products` matrix products of all rows with all slots. What is
    visible is not known here, so this is the most that it can be."""
    batch, heads, count, size = queries.shape
    pairs = batch * heads * count * sizes.slots * sizes.slot_count
    reads = 2 * pairs // (sizes.rows if products < 4 else sizes.slots)  # of rows of C numbers
    return pl.CostEstimate(
        flops=2 * products * pairs * size,
        transcendentals=pairs,
        bytes_accessed=reads * size * queries.dtype.itemsize,
    )


def _vmem(*shape):
    return pltpu.VMEM(shape, jnp.float32)


def _dot(one, other, one_axis: int, other_axis: int) -> Array:
    """Matrix product that sums over the named axis of each; accumulates in float32."""
    dimensions = (((one_axis,), (other_axis,)), ((), ()))
    return jax.lax.dot_general(one, other, dimensions, preferred_element_type=jnp.float32)


def _block_size(count: int, largest: int) -> int:
    return min(largest, _LANES * pl.cdiv(count, _LANES))


def _pad(x: Array, size: int, axis: int = 2) -> Array:
    """Zeros behind axis `axis`, to a multiple of `size`."""
    padding = -x.shape[axis] % size
    return jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)])


def _column(x: Array) -> Array:
    """[B, K, 1, N] -> [B, K, N, 1]."""
    return x[:, :, 0, :, None]
