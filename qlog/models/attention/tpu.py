"""The attention of `blocks.attend` as Pallas TPU kernels: scores never leave the chip's VMEM.

Axes and masks are those of `blocks`: B prompts, K key/value heads, N query rows, T key slots,
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
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from qlog.models.attention import blocks as plain
from qlog.models.attention.segment import ATTENTION, Segment

_MASKED = -1e30  # finite, so that a row with no visible key gives numbers rather than NaN


class Blocks(NamedTuple):
    """The largest blocks; multiples of a chip's 128 lanes."""

    rows: int  # query rows of a block
    slots: int  # key slots of a block


# Large, since every block of query rows reads its keys from HBM anew; but the backward pass holds
# four float32 arrays of [slots, rows] in 16 MiB of VMEM.
_BLOCKS = Blocks(1024, 512)
_LANES = 128


class _Plan(NamedTuple):
    """Which blocks of a segment are visible; both tables are read from scalar memory."""

    # int32 [4, B, row blocks]. Blocks of slots [0] <= block < [1] are seen by some row of the block
    # of rows, and blocks [2] <= block < [3] by all its rows in full: they need no mask.
    slots: Array
    # int32 [2, B, slot blocks]. Only blocks of rows [0] <= block < [1] see the block of slots.
    rows: Array


class _Sizes(NamedTuple):
    """Sizes of a segment's blocks, and how many of them there are."""

    rows: int  # query rows of a block
    slots: int  # key slots of a block
    num_row_blocks: int  # N / rows, after padding
    num_slot_blocks: int  # T / slots, after padding


class _Problem(NamedTuple):
    """One segment for the kernels, padded to whole blocks, and how it is cut up."""

    keys: Array  # [B, K, T, C]
    values: Array  # [B, K, T, C]
    start: Array  # int32 [B or 1, 1, N]
    stop: Array  # int32 [B or 1, 1, N]
    plan: _Plan
    sizes: _Sizes


class _Rows(NamedTuple):
    """What the backward pass needs of query rows, padded to whole blocks."""

    queries: Array  # [B, K, N, C]
    cotangent: Array  # [B, K, N, C]
    log_total: Array  # float32 [B, K, 1, N], log of the softmax's denominator
    shift: Array  # float32 [B, K, 1, N], sum over C of output x cotangent


def attend(
    queries: Array,
    segments: list[Segment],
    mesh: Mesh | None = None,
    interpret: bool = False,
    blocks: Blocks = _BLOCKS,
) -> Array:
    """Softmax attention over all segments together; differentiable in queries, keys and values.

    Args:
      queries: [B, K, N, C], already scaled, bfloat16 or float32.
      segments: what they may see; every row must see a slot, or its result means nothing. Keys and
        values are cast to the dtype of `queries`. Of quantised ones `blocks.attend` takes all: a
        cast would make a whole cache anew, and gold answers, which alone are scored on such caches,
        are a small part of a step.
      mesh: with axes "data", "fsdp" and "tensor": B is split over the first two and K over the
        last, where they divide. None: a single device, or inside a shard_map already.
      interpret: run the kernels as plain JAX on any backend, slowly, for tests.
      blocks: the largest blocks.

    Returns:
      [B, K, N, C] in the dtype of `queries`; the softmax runs in float32.
    """
    if any(segment.is_quantised for segment in segments):
        return plain.attend(queries, segments)
    caches = [tuple(x.astype(queries.dtype) for x in segment.arrays) for segment in segments]
    visible = [(segment.start, segment.stop) for segment in segments]
    return _attend(queries, caches, visible, _Options(mesh, interpret, blocks))


class _Options(NamedTuple):
    """What the kernels know at compile time."""

    mesh: Mesh | None  # over which prompts and heads are split; None: a single device
    interpret: bool  # run as plain JAX, for tests
    blocks: Blocks  # the largest blocks


# The shards are inside the derivative rule: of a replicated axis every device then computes the
# whole gradient, where the transpose of shard_map would add up shares of it.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(queries: Array, caches, visible, options: _Options) -> Array:
    return _attend_forward(queries, caches, visible, options)[0]


def _attend_forward(queries: Array, caches, visible, options: _Options):
    run = functools.partial(_forward, options=options)
    like = (queries, jax.ShapeDtypeStruct(queries.shape[:-1], jnp.float32))
    results = _by_shard(options.mesh, run, like, queries, caches, visible)
    out, log_total = (checkpoint_name(x, ATTENTION) for x in results)
    return out, (queries, caches, visible, out, log_total)


def _attend_backward(options: _Options, residuals, cotangent: Array):
    queries, caches, visible, out, log_total = residuals
    run = functools.partial(_backward, options=options)
    arrays = (queries, caches, visible, out, log_total, cotangent)
    # None: intervals are integers and have no gradient.
    return *_by_shard(options.mesh, run, (queries, caches), *arrays), None


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
        for names, length in zip(axes, x.shape[: len(axes)], strict=True)
    ]
    return PartitionSpec(*fits)


def _forward(queries: Array, caches, visible, *, options: _Options) -> tuple[Array, Array]:
    """-> [B, K, N, C] and the log of the softmax's denominator, float32 [B, K, N]."""
    num_rows, dtype = queries.shape[2], queries.dtype
    rows = _block_size(num_rows, options.blocks.rows)
    queries = _pad(queries, rows)
    # Parts of a sum stay in float32 until they are added up.
    part_dtype = dtype if len(caches) == 1 else jnp.float32
    parts = []
    for cache, interval in zip(caches, visible, strict=True):
        problem = _problem(queries, cache, interval, rows, options.blocks.slots)
        parts.append(_run(_FORWARD, (queries,), problem, part_dtype, options.interpret))
    out, log_total = parts[0]
    if len(parts) > 1:
        # Each part is a softmax over its own segment. Its share of the whole softmax is its
        # denominator over the sum of all denominators.
        log_totals = jnp.stack([part_log_total for _, part_log_total in parts])
        log_total = jax.nn.logsumexp(log_totals, 0)
        shares = jnp.exp(log_totals - log_total)
        weighted = [_column(share) * part for share, (part, _) in zip(shares, parts, strict=True)]
        out = sum(weighted[1:], weighted[0]).astype(dtype)
    return out[:, :, :num_rows], log_total[:, :, 0, :num_rows]


def _backward(
    queries: Array,
    caches,
    visible,
    out: Array,
    log_total: Array,
    cotangent: Array,
    *,
    options: _Options,
):
    """Gradients of queries and of every segment's keys and values, in their dtypes."""
    num_rows, dtype = queries.shape[2], queries.dtype
    shift = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    rows = _block_size(num_rows, options.blocks.rows)
    inputs = _Rows(
        _pad(queries, rows),
        _pad(cotangent, rows),
        _pad(log_total[:, :, None], rows, 3),
        _pad(shift[:, :, None], rows, 3),
    )
    part_dtype = dtype if len(caches) == 1 else jnp.float32
    query_grads, cache_grads = [], []
    for cache, interval in zip(caches, visible, strict=True):
        problem = _problem(inputs.queries, cache, interval, rows, options.blocks.slots)
        (query_grad,) = _run(_QUERIES, inputs, problem, part_dtype, options.interpret)
        query_grads.append(query_grad)
        grads = _run(_CACHE, inputs, problem, part_dtype, options.interpret)
        cache_grads.append(tuple(grad[:, :, : cache[0].shape[2]] for grad in grads))
    total = sum(query_grads[1:], query_grads[0])
    return total.astype(dtype)[:, :, :num_rows], cache_grads


def _problem(
    queries: Array,
    cache: tuple[Array, Array],
    interval: tuple[Array, Array],
    rows: int,
    most_slots: int,
) -> _Problem:
    """A segment for padded queries, which are cut into blocks of `rows`."""
    (keys, values), (start, stop) = cache, interval
    slots = _block_size(keys.shape[2], most_slots)
    stop = jnp.minimum(stop, keys.shape[2])  # padded slots are seen by no row
    keys, values = _pad(keys, slots), _pad(values, slots)
    start, stop = (_pad(x[:, None], rows) for x in (start, stop))
    sizes = _Sizes(rows, slots, queries.shape[2] // rows, keys.shape[2] // slots)
    plan = _plan(start, stop, queries.shape[0], sizes)
    return _Problem(keys, values, start, stop, plan, sizes)


def _plan(start: Array, stop: Array, batch: int, sizes: _Sizes) -> _Plan:
    # [B or 1, row blocks, rows of a block]
    start, stop = jnp.broadcast_arrays(
        *(x.reshape(-1, sizes.num_row_blocks, sizes.rows) for x in (start, stop))
    )
    # Blocks of slots by block of rows: rows that see nothing must not widen the range.
    last_slot = sizes.slots * sizes.num_slot_blocks - 1
    sees = start < stop
    first = jnp.where(sees, start, last_slot).min(-1) // sizes.slots
    last = jnp.maximum(pl.cdiv(jnp.where(sees, stop, 0).max(-1), sizes.slots), first)
    whole = pl.cdiv(start.max(-1), sizes.slots), stop.min(-1) // sizes.slots
    # Blocks of rows by block of slots: the same relation, transposed.
    blocks = jnp.arange(sizes.num_slot_blocks)
    seen = (first[..., None] <= blocks) & (blocks < last[..., None])  # [B, row blocks, slot blocks]
    first_row = jnp.argmax(seen, 1)
    after_last_row = sizes.num_row_blocks - jnp.argmax(seen[:, ::-1], 1)
    last_row = jnp.where(seen.any(1), after_last_row, first_row)
    tables = jnp.stack([first, last, *whole]), jnp.stack([first_row, last_row])
    return _Plan(
        *(jnp.broadcast_to(x, (x.shape[0], batch, x.shape[2])).astype(jnp.int32) for x in tables)
    )


# ---- The three kernels ----
#
# Each has the grid (B, K, blocks, steps). Its results belong to the blocks of the third axis, rows
# or slots. The last axis walks through the blocks of the other kind that are visible from there;
# results are accumulated in VMEM scratch and written at the last step.


class _Kernel(NamedTuple):
    """One of the three kernels. Arrays and accumulators are named by what they belong to.

    "row": [B, K, N, C], in scratch a block's transpose [C, rows]; "line": float32 [B, K, 1, N], in
    scratch [1, rows]; "slot": [B, K, T, C], in scratch [slots, C].
    """

    # Takes references to the plan's tables, the inputs, keys, values, start, stop, the results and
    # the scratch, in this order.
    body: Callable[..., None]
    name: str  # by which profiles and qlog.aot know it
    # Whether results belong to blocks of rows, and steps walk through blocks of slots; or the other
    # way round.
    by_rows: bool
    inputs: tuple[str, ...]  # what each input belongs to: "row", "line" or "slot"
    results: tuple[str, ...]  # what each result belongs to
    scratch: tuple[str, ...]  # what each accumulator in VMEM belongs to, float32
    num_products: int  # matrix products per pair of blocks


def _run(
    kernel: _Kernel,
    inputs: tuple[Array, ...],
    problem: _Problem,
    dtype: jnp.dtype,
    interpret: bool,
) -> list[Array]:
    """The kernel's results over one segment; those that belong to rows in `dtype`."""
    queries, sizes, plan = inputs[0], problem.sizes, problem.plan
    batch, heads, num_rows, size = queries.shape
    specs, ends = _specs(sizes, size, problem.start.shape[0], kernel.by_rows)
    if kernel.by_rows:
        num_blocks, tables = sizes.num_row_blocks, (plan.slots,)
    else:
        num_blocks, tables = sizes.num_slot_blocks, (plan.rows, plan.slots)
    shapes = {
        "row": jax.ShapeDtypeStruct(queries.shape, dtype),
        "line": jax.ShapeDtypeStruct((batch, heads, 1, num_rows), jnp.float32),
        "slot": jax.ShapeDtypeStruct(problem.keys.shape, problem.keys.dtype),
    }
    scratch = {
        "row": pltpu.VMEM((size, sizes.rows), jnp.float32),
        "line": pltpu.VMEM((1, sizes.rows), jnp.float32),
        "slot": pltpu.VMEM((sizes.slots, size), jnp.float32),
    }
    return pl.pallas_call(
        functools.partial(kernel.body, sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(batch, heads, num_blocks, _num_steps(tables[0])),
            in_specs=[
                *(specs[kind] for kind in kernel.inputs),
                specs["slot"],
                specs["slot"],
                ends,
                ends,
            ],
            out_specs=[specs[kind] for kind in kernel.results],
            scratch_shapes=[scratch[kind] for kind in kernel.scratch],
        ),
        out_shape=[shapes[kind] for kind in kernel.results],
        # Accumulators live through the steps of the last axis, so only these keep their order.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(queries, sizes, kernel),
        interpret=interpret,
        name=kernel.name,
    )(*tables, *inputs, problem.keys, problem.values, problem.start, problem.stop)


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
        # Transposed: [slots, rows]. Rows lie along lanes, so a maximum over slots needs no
        # exchange between lanes.
        scores = mask(_dot(keys[...], queries[...], 1, 1), _MASKED)
        new_top = jnp.maximum(top[...], scores.max(0, keepdims=True))
        weights = jnp.exp(scores - new_top)
        # What was added up relative to the old largest score, relative to the new one.
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

    # Steps past the end of this block's range: `plan` may have no such block of rows.
    @pl.when(row_block < rows_plan[1, batch, block])
    def _():
        _visit(visit, plan, (batch, row_block, block), start, stop, sizes)

    @pl.when(is_last)
    def _():
        keys_out[...] = keys_total[...].astype(keys_out.dtype)
        values_out[...] = values_total[...].astype(values_out.dtype)


_FORWARD = _Kernel(
    _forward_kernel,
    "attention_forward",
    by_rows=True,
    inputs=("row",),
    results=("row", "line"),
    scratch=("line", "line", "row"),
    num_products=2,
)
_QUERIES = _Kernel(
    _queries_kernel,
    "attention_queries_gradient",
    by_rows=True,
    inputs=("row", "row", "line", "line"),
    results=("row",),
    scratch=("row",),
    num_products=3,
)
_CACHE = _Kernel(
    _cache_kernel,
    "attention_cache_gradient",
    by_rows=False,
    inputs=("row", "row", "line", "line"),
    results=("slot", "slot"),
    scratch=("slot", "slot"),
    num_products=4,
)


def _recompute(queries, cotangent, log_total, shift, keys, values, mask):
    """Softmax weights and the scores' gradients of a block: float32 [slots, rows] each."""
    weights = mask(jnp.exp(_dot(keys[...], queries[...], 1, 1) - log_total[...]), 0.0)
    weight_grads = _dot(values[...], cotangent[...], 1, 1)
    return weights, weights * (weight_grads - shift[...])


def _visit(visit, plan, where, start, stop, sizes: _Sizes) -> None:
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

    # Most visible blocks are seen in full, and comparing slots costs more than the exponential.
    pl.when(is_seen & is_whole)(lambda: visit(lambda scores, value: scores))
    pl.when(is_seen & ~is_whole)(lambda: visit(mask))


def _specs(
    sizes: _Sizes, size: int, visible_batch: int, by_rows: bool
) -> tuple[dict[str, pl.BlockSpec], pl.BlockSpec]:
    """For a grid (B, K, blocks, steps): the blocks of each kind of array (see `_Kernel`), and those
    of start and stop, [B or 1, 1, N]."""

    def row(b, k, block, step, plan, *_):
        return b, k, _row_block(by_rows, b, block, step, plan), 0

    def line(b, k, block, step, plan, *_):
        return b, k, 0, _row_block(by_rows, b, block, step, plan)

    def slot(b, k, block, step, plan, *_):
        return b, k, _at(plan, b, block, step) if by_rows else block, 0

    def ends(b, k, block, step, plan, *_):
        return b if visible_batch > 1 else 0, 0, _row_block(by_rows, b, block, step, plan)

    # None: an axis that a block has one index of, and the kernel does not see.
    specs = {
        "row": pl.BlockSpec((None, None, sizes.rows, size), row),
        "line": pl.BlockSpec((None, None, 1, sizes.rows), line),
        "slot": pl.BlockSpec((None, None, sizes.slots, size), slot),
    }
    return specs, pl.BlockSpec((None, 1, sizes.rows), ends)


def _row_block(by_rows, b, block, step, plan):
    return block if by_rows else _at(plan, b, block, step)


def _at(plan, b, block, step):
    """The block visited in `step`; past the last one it stays there, so that nothing is read."""
    first, last = plan[0, b, block], plan[1, b, block]
    return jnp.minimum(first + step, jnp.maximum(last - 1, first))


def _num_steps(plan: Array) -> Array:
    """Length of the longest range; at least 1, so that every block of results is written."""
    return jnp.maximum((plan[1] - plan[0]).max(), 1)


def _cost(queries: Array, sizes: _Sizes, kernel: _Kernel) -> pl.CostEstimate:
    """For the compiler's schedule: matrix products of all rows with all slots.

    What is visible is not known here, so this is the most that it can be.
    """
    batch, heads, num_rows, size = queries.shape
    pairs = batch * heads * num_rows * sizes.slots * sizes.num_slot_blocks
    # Every block of results reads all blocks of the other kind anew.
    reads = 2 * pairs // (sizes.rows if kernel.by_rows else sizes.slots)  # of C numbers each
    return pl.CostEstimate(
        flops=2 * kernel.num_products * pairs * size,
        transcendentals=pairs,
        bytes_accessed=reads * size * queries.dtype.itemsize,
    )


def _dot(one, other, one_axis: int, other_axis: int) -> Array:
    """Matrix product that sums over the named axis of each; accumulates in float32."""
    dimensions = (((one_axis,), (other_axis,)), ((), ()))
    return jax.lax.dot_general(one, other, dimensions, preferred_element_type=jnp.float32)


def _block_size(length: int, largest: int) -> int:
    return min(largest, _LANES * pl.cdiv(length, _LANES))


def _pad(x: Array, size: int, axis: int = 2) -> Array:
    """Zeros behind axis `axis`, to a multiple of `size`."""
    padding = -x.shape[axis] % size
    return jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)])


def _column(x: Array) -> Array:
    """[B, K, 1, N] -> [B, K, N, 1]."""
    return x[:, :, 0, :, None]
