"""The attention of `attention.attend` on CUDA GPUs: cuDNN's kernels where their masks reach.

cuDNN serves causal self-attention, with which prompts are prefilled, in training and in sampling.
Rollouts over a shared prefix stay with `attention.attend`: merging the softmaxes of two segments
takes their log-sum-exps, which `jax.nn.dot_product_attention` rounds to 16 bits and has no gradient
through, and it has no mask for rollouts that are packed into one row.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from qlog.models import attention
from qlog.models.attention import ATTENTION, Segment

_LARGEST_HEAD = 128  # of cuDNN on every GPU that it serves


def attend(queries: Array, segments: list[Segment], implementation: str = "cudnn") -> Array:
    """Softmax attention over all segments together; differentiable in queries, keys and values.

    Args:
      queries: [B, K, N, C], already scaled; bfloat16 or float16, or cuDNN is not used.
      segments: what they may see; every row must see a slot, or its result means nothing. Causal
        attention is known as such if `start` and `stop` are NumPy arrays.
      implementation: of `jax.nn.dot_product_attention`; "xla" runs on every device, for tests.

    Returns:
      [B, K, N, C] in the dtype of `queries`; the softmax runs in float32.
    """
    if not _is_causal(queries, segments) or implementation == "cudnn" and not _fits(queries):
        return attention.attend(queries, segments)
    keys, values = (x.astype(queries.dtype) for x in segments[0][:2])
    return _causal(queries, keys, values, implementation)


def _is_causal(queries: Array, segments: list[Segment]) -> bool:
    """Whether the rows are known to be the tokens of one sequence, each seeing all up to itself."""
    keys, _, start, stop, _ = segments[0]
    rows, slots = queries.shape[2], keys.shape[2]
    if len(segments) > 1 or rows % slots or not isinstance(start, np.ndarray):
        return False
    return bool(np.all(start == 0) and np.all(stop == np.arange(rows) // (rows // slots) + 1))


def _fits(queries: Array) -> bool:
    """Whether cuDNN has a kernel for these numbers."""
    size = queries.shape[-1]
    return queries.dtype in (jnp.bfloat16, jnp.float16) and size % 8 == 0 and size <= _LARGEST_HEAD


def _causal(queries: Array, keys: Array, values: Array, implementation: str) -> Array:
    """Rows are T tokens with their G query heads: [B, K, T * G, C] over [B, K, T, C]."""
    batch, heads, slots, size = keys.shape
    rows = queries.reshape(batch, heads, slots, -1, size).transpose(0, 2, 1, 3, 4)
    mixed = jax.nn.dot_product_attention(
        rows.reshape(batch, slots, -1, size), *(x.transpose(0, 2, 1, 3) for x in (keys, values)),
        scale=1.0, is_causal=True, implementation=implementation,
    )  # fmt: skip
    mixed = mixed.reshape(rows.shape).transpose(0, 2, 1, 3, 4).reshape(queries.shape)
    return checkpoint_name(mixed, ATTENTION)
