"""From logits to tokens: the law that is sampled, and its log-probabilities."""

import jax
import jax.numpy as jnp
from jax import Array


def draw(
    logits: Array, keys: Array, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Array, Array]:
    """Draw a token from softmax(logits / temperature) by inverting its distribution function.

    Two levels, a block of the vocabulary and then a token in it: one uniform number each, instead
    of the V random numbers per token that `jax.random.categorical` makes.

    Args:
      logits: float32 [B, M, V]; -inf is never drawn. keys: [B, M]. temperature: 0 is greedy.
      top_k, top_p: as in `Sampling`; applied after the temperature, top_k first.

    Returns:
      int32 [B, M], and their log-probabilities, float32 [B, M], under the law that was sampled.
    """
    if temperature == 0.0:
        token = jnp.argmax(logits, axis=-1)
        return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[..., None], -1)[..., 0]
    scaled = truncate(logits / temperature, top_k, top_p)
    top = scaled.max(-1, keepdims=True)
    weights = jnp.exp(scaled - top)
    uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (2,))))(keys)
    size = max(16, 1 << (logits.shape[-1].bit_length() // 2))
    padding = -logits.shape[-1] % size
    weights = jnp.pad(weights, ((0, 0), (0, 0), (0, padding)))
    blocks = weights.reshape(*logits.shape[:2], -1, size)
    sums = blocks.sum(-1)
    block = _invert(sums, uniform[..., 0])
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=2)[..., 0, :]
    token = block * size + _invert(inside, uniform[..., 1])
    picked = jnp.take_along_axis(scaled, token[..., None], axis=-1)
    return token, (picked - top)[..., 0] - jnp.log(sums.sum(-1))


def truncate(logits: Array, top_k: int, top_p: float) -> Array:
    """-inf for tokens outside the nucleus, logits [..., V]; ties with its last token stay inside."""
    if top_k == 0 and top_p == 1.0:
        return logits
    size = logits.shape[-1]
    ordered, _ = jax.lax.top_k(logits, min(top_k, size) or size)
    law = jax.nn.softmax(ordered)
    is_inside = jnp.cumsum(law, axis=-1) - law < top_p  # the first always is
    last = jnp.take_along_axis(ordered, is_inside.sum(-1, keepdims=True) - 1, axis=-1)
    return jnp.where(logits >= last, logits, -jnp.inf)


def _invert(weights: Array, uniform: Array) -> Array:
    """Index i with probability weights[i] / sum; uniform in [0, 1 - 2^-23] never rounds to 1."""
    cumulative = jnp.cumsum(weights, axis=-1)
    target = uniform[..., None] * cumulative[..., -1:]
    return (cumulative <= target).sum(-1).astype(jnp.int32)
