"""The attention of `attention.attend` on CUDA GPUs: cuDNN's kernels, where there is one.

cuDNN serves training and the prompts of sampling. Prompts are its causal attention. Rollouts are its
attention with a mask: each packed row beside a copy of its prompt's keys, so that prefix and suffix
are one softmax. (Two, merged, would need their log-sum-exps, which `jax.nn.dot_product_attention`
rounds to 16 bits and has no gradient through.) Scores are not stored; what a layer holds for it of T
tokens over S slots is the mask, 2 T S bytes a row, one for all heads, in JAX up to 0.10 as much again
for a gradient of it that nobody reads, and the copies. Fewer rows in a microbatch take less.

Everything else stays in blocks: float32, decoding, prompts under sliding windows, and gold answers
on the rollouts' caches, whose queries are too few to copy keys for.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from qlog.models.attention import blocks
from qlog.models.attention.blocks import Blocks
from qlog.models.attention.segment import ATTENTION, Segment

# A block is half a dozen GPU kernels, each of which takes microseconds to start, and after each block
# the device tells the host whether there is another: few and large ones, and one for most prompts.
# Not measured on a GPU.
_BLOCKS = Blocks(512, 2048, 1024)
_LARGEST_HEAD = 128  # of cuDNN on every GPU that it serves
_FEWEST_TOKENS = 128  # of a rollout, to be worth a copy of its prompt's keys
_TILE = 64  # tokens and slots come in multiples of it: before 9.5, cuDNN's masks take no others


def attend(queries: Array, segments: list[Segment], implementation: str = "cudnn") -> Array:
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
    if not is_served or implementation == "cudnn" and not _fits(queries):
        return blocks.attend(queries, segments, _BLOCKS)
    return _attend_by_run(queries, segments, implementation, is_causal)


def attend_step(queries: Array, prefix: Segment, suffix: Segment) -> Array:
    """`attention.attend_step` in blocks of a GPU's size."""
    return blocks.attend_step(queries, prefix, suffix, _BLOCKS)


def _is_causal(queries: Array, segments: list[Segment]) -> bool:
    """Whether the rows are known to be the tokens of one sequence, each seeing all up to itself."""
    keys, _, start, stop, _ = segments[0]
    rows, slots = queries.shape[2], keys.shape[2]
    if len(segments) > 1 or rows % slots or not isinstance(start, np.ndarray):
        return False
    return bool(np.all(start == 0) and np.all(stop == np.arange(rows) // (rows // slots) + 1))


def _are_rollouts(queries: Array, segments: list[Segment]) -> bool:
    """Whether the last segment is the queries' own tokens, and the ones before are nobody's own.

    Without one before, on a mesh, JAX would not split the mask as it splits the queries: intervals
    of the own tokens alone may be the same for all prompts."""
    *shared, own = segments
    slots = own.keys.shape[2]
    is_own = queries.shape[2] % slots == 0 and slots // own.runs >= _FEWEST_TOKENS
    return is_own and bool(shared) and all(segment.runs == 1 for segment in shared)


def _fits(queries: Array) -> bool:
    """Whether cuDNN has a kernel for these numbers."""
    size = queries.shape[-1]
    return queries.dtype in (jnp.bfloat16, jnp.float16) and size % 8 == 0 and size <= _LARGEST_HEAD


def _attend_by_run(queries, segments, implementation, is_causal):
    """The runs of the last segment, T tokens with G query heads each, are the batch: [B * runs, T,
    K * G, C] over what all see and their own, [B * runs, S, K, C]."""
    *shared, own = segments
    batch, heads, slots, size = own.keys.shape
    runs, tokens = own.runs, slots // own.runs
    grid = batch, heads, runs, tokens, queries.shape[2] // slots, size  # [B, K, runs, T, G, C]
    rows = queries.reshape(grid).transpose(0, 2, 3, 1, 4, 5)

    def beside(copied, its_own):
        copied = (jnp.broadcast_to(x[:, :, None], (*grid[:3], *x.shape[2:])) for x in copied)
        parts = [*copied, its_own.reshape(*grid[:4], size)]
        parts = [x.astype(queries.dtype).transpose(0, 2, 3, 1, 4) for x in parts]
        return _whole_tiles(_by_run(jnp.concatenate(parts, 2)), 1)

    mixed = jax.nn.dot_product_attention(
        _whole_tiles(_by_run(rows).reshape(batch * runs, tokens, -1, size), 1),
        beside([segment.keys for segment in shared], own.keys),
        beside([segment.values for segment in shared], own.values),
        mask=None if is_causal else _whole_tiles(_whole_tiles(_mask(segments, grid), 2), 3),
        scale=1.0,
        is_causal=is_causal,
        implementation=implementation,
    )[:, :tokens]
    mixed = mixed.reshape(rows.shape).transpose(0, 3, 1, 2, 4, 5).reshape(queries.shape)
    return checkpoint_name(mixed, ATTENTION)


def _mask(segments: list[Segment], grid) -> Array:
    """bool [B * runs, 1, T, S]: what the tokens of each run see of all segments, side by side."""
    batch, _, runs, tokens, groups, _ = grid
    parts = []
    for segment in segments:
        count = segment.keys.shape[2] // segment.runs
        first = count * jnp.arange(segment.runs)[:, None]  # slot of each run
        numbers = (first + jnp.arange(count))[:, None]  # [runs or 1, 1, S]
        start, stop = (
            jnp.asarray(x).reshape(-1, runs, tokens, groups)[..., :1]
            for x in (segment.start, segment.stop)
        )
        sees = (start <= numbers) & (numbers < stop)
        parts.append(jnp.broadcast_to(sees, (batch, runs, tokens, count)))
    return _by_run(jnp.concatenate(parts, 3))[:, None]


def _by_run(x: Array) -> Array:
    """[B, runs, ...] -> [B * runs, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _whole_tiles(x: Array, axis: int) -> Array:
    """Zeros behind the axis up to whole tiles: slots that nobody sees, tokens that nobody asks for."""
    padding = -x.shape[axis] % _TILE
    return jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)])
