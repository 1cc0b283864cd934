"""Attention on CUDA GPUs: cuDNN's fused kernels where there is one, else blocks of a GPU's size.

cuDNN serves training and the prompts of sampling. A prompt is causal attention. Rollouts are
attention with a mask: each pack of rollouts has its own keys next to a copy of its prompt's keys,
so that prefix and suffix are one softmax. (Two softmaxes would have to be merged by their
log-sum-exps, which `jax.nn.dot_product_attention` rounds to 16 bits and cannot differentiate.)

Scores are never stored. A layer stores the mask instead: 2 T S bytes for each pack of T tokens
over S slots, shared by all heads. JAX up to version 0.10 stores as much again, for a gradient of
the mask that nothing reads. The copies of the prompt's keys and values come on top. All of it
shrinks with the number of packs in a microbatch.

Blocks serve everything else: float32, decoding, prompts under sliding windows, quantised caches,
and gold answers scored on the rollouts' caches, whose queries are too few to be worth copies of the
keys.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from qlog.models.attention import blocks
from qlog.models.attention.blocks import Blocks
from qlog.models.attention.segment import ATTENTION, Segment

# Few and large: a block is half a dozen GPU kernels, each of which takes microseconds to start, and
# after each block the device tells the host whether there is another one. 2048 slots are a single
# block for most prompts. Not measured on a GPU.
_BLOCKS = Blocks(rows=512, slots=2048, step_slots=1024)
_LARGEST_HEAD = 128  # of cuDNN on every GPU that it serves
_FEWEST_TOKENS = 128  # of a rollout, to be worth a copy of its prompt's keys
_TILE = 64  # tokens and slots come in multiples of it: before 9.5, cuDNN's masks take no others


def attend(
    queries: Array,
    segments: list[Segment],
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:
    """Softmax attention over all segments together; differentiable in queries, keys and values.

    Args:
      queries: [B, K, N, C], already scaled; bfloat16 or float16, or cuDNN is not used.
      segments: what they may see; every row must see a slot, or its result means nothing. The query
        heads of a token see the same. Causal attention is known as such if `start` and `stop` are
        NumPy arrays.
      implementation: of `jax.nn.dot_product_attention`; "xla" runs on every device, for tests.

    Returns:
      [B, K, N, C] in the dtype of `queries`; the softmax runs in float32.
    """
    is_causal = _is_causal(queries, segments)
    is_served = is_causal or _are_rollouts(queries, segments)
    is_served = is_served and not any(segment.is_quantised for segment in segments)
    if not is_served or (implementation == "cudnn" and not _fits(queries)):
        return blocks.attend(queries, segments, _BLOCKS)
    return _attend_by_run(queries, segments, implementation, is_causal)


def attend_step(queries: Array, prefix: Segment, suffix: Segment) -> Array:
    """`blocks.attend_step` in blocks of a GPU's size."""
    return blocks.attend_step(queries, prefix, suffix, _BLOCKS)


def _is_causal(queries: Array, segments: list[Segment]) -> bool:
    """Whether the rows are known to be the tokens of one sequence, each seeing all up to itself."""
    keys, _, start, stop, _ = segments[0]
    num_rows, slots = queries.shape[2], keys.shape[2]
    if len(segments) > 1 or num_rows % slots:
        return False
    if not (isinstance(start, np.ndarray) and isinstance(stop, np.ndarray)):
        return False  # traced: known only when the program runs
    groups = num_rows // slots  # query heads of a token, next to each other
    return bool(np.all(start == 0) and np.all(stop == np.arange(num_rows) // groups + 1))


def _are_rollouts(queries: Array, segments: list[Segment]) -> bool:
    """Whether the last segment holds the queries' own tokens, and all others are shared.

    At least one shared segment is needed. On a mesh JAX splits the mask as it splits the queries
    only if the mask differs between prompts, and intervals of own tokens may be the same for all.
    """
    *shared, own = segments
    slots = own.keys.shape[2]
    is_own = queries.shape[2] % slots == 0 and slots // own.runs >= _FEWEST_TOKENS
    return is_own and bool(shared) and all(segment.runs == 1 for segment in shared)


def _fits(queries: Array) -> bool:
    """Whether cuDNN has a kernel for this dtype and head size."""
    size = queries.shape[-1]
    return queries.dtype in (jnp.bfloat16, jnp.float16) and size % 8 == 0 and size <= _LARGEST_HEAD


class _Grid(NamedTuple):
    """The axes of query rows by run, in the order of `attend`'s rows."""

    batch: int  # B
    heads: int  # K, key/value heads
    runs: int
    tokens: int  # T of each run
    groups: int  # G, query heads per key/value head
    size: int  # C


def _attend_by_run(
    queries: Array,
    segments: list[Segment],
    implementation: Literal["cudnn", "xla"],
    is_causal: bool,
) -> Array:
    """cuDNN's batch axis is the runs of the last segment, [B * runs]: each run has T tokens of
    K * G query heads, over S slots, those that all runs see and its own."""
    *shared, own = segments
    batch, heads, slots, size = own.keys.shape
    grid = _Grid(
        batch, heads, own.runs, slots // own.runs, groups=queries.shape[2] // slots, size=size
    )
    # [B, K, N, C] -> [B, K, runs, T, G, C] -> [B, runs, T, K, G, C]
    rows = queries.reshape(grid).transpose(0, 2, 3, 1, 4, 5)

    def next_to_own(shared_parts: list[Array], own_part: Array) -> Array:
        """Keys or values, [B * runs, S, K, C]: copies of the shared ones, then the run's own."""
        copies = [
            jnp.broadcast_to(x[:, :, None], (batch, heads, grid.runs, *x.shape[2:]))
            for x in shared_parts
        ]
        parts = [*copies, own_part.reshape(batch, heads, grid.runs, grid.tokens, size)]
        parts = [x.astype(queries.dtype).transpose(0, 2, 3, 1, 4) for x in parts]
        return _pad_to_tiles(_runs_as_batch(jnp.concatenate(parts, 2)), 1)

    mask = None if is_causal else _pad_to_tiles(_pad_to_tiles(_mask(segments, grid), 2), 3)
    mixed = jax.nn.dot_product_attention(
        # [B * runs, T, K * G, C]
        _pad_to_tiles(_runs_as_batch(rows).reshape(batch * grid.runs, grid.tokens, -1, size), 1),
        next_to_own([segment.arrays[0] for segment in shared], own.arrays[0]),
        next_to_own([segment.arrays[1] for segment in shared], own.arrays[1]),
        mask=mask,
        scale=1.0,  # queries are scaled already
        is_causal=is_causal,
        implementation=implementation,
    )[:, : grid.tokens]
    # Back to [B, runs, T, K, G, C], and to the order of rows.
    mixed = mixed.reshape(rows.shape).transpose(0, 3, 1, 2, 4, 5).reshape(queries.shape)
    return checkpoint_name(mixed, ATTENTION)


def _mask(segments: list[Segment], grid: _Grid) -> Array:
    """bool [B * runs, 1, T, S]: what each run's tokens see of all segments, one after another."""
    parts = []
    for segment in segments:
        num_slots = segment.keys.shape[2] // segment.runs  # of a run, or all of a shared segment
        first = num_slots * jnp.arange(segment.runs)[:, None]  # slot of each run
        numbers = (first + jnp.arange(num_slots))[:, None]  # [runs or 1, 1, S]
        # The query heads of a token see the same, so the first of them speaks for all.
        start, stop = (
            jnp.asarray(x).reshape(-1, grid.runs, grid.tokens, grid.groups)[..., :1]
            for x in (segment.start, segment.stop)
        )
        sees = (start <= numbers) & (numbers < stop)
        parts.append(jnp.broadcast_to(sees, (grid.batch, grid.runs, grid.tokens, num_slots)))
    return _runs_as_batch(jnp.concatenate(parts, 3))[:, None]


def _runs_as_batch(x: Array) -> Array:
    """[B, runs, ...] -> [B * runs, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _pad_to_tiles(x: Array, axis: int) -> Array:
    """Zeros behind the axis, up to whole tiles: slots that no token sees, tokens to be cut off."""
    padding = -x.shape[axis] % _TILE
    return jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)])
