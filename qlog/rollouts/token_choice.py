"""From logits to tokens: temperature, top-k, top-p, and one random choice per rollout."""

import jax
import jax.numpy as jnp
from jax import Array


def choose_token(
    logits: Array, keys: Array, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Array, Array]:
    """A token from softmax(logits / temperature), by inverting its cumulative distribution.

    Args:
      logits: float32 [B, M, V]; a token at -inf is never chosen.
      keys: [B, M], one per rollout and step.
      temperature: 0 takes the most probable token.
      top_k, top_p: as in `Sampling`; applied after the temperature, top_k first.

    Returns:
      The tokens, int32 [B, M], and their log-probabilities, float32 [B, M]. These are under the
      distribution that was sampled: temperature and truncation included. Of the most probable
      token (temperature 0) it is the log-probability at temperature 1.
    """
    if temperature == 0.0:
        token = jnp.argmax(logits, axis=-1)
        return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[..., None], -1)[..., 0]
    scaled = truncate(logits / temperature, top_k, top_p)
    top = scaled.max(-1, keepdims=True)
    weights = jnp.exp(scaled - top)  # unnormalised probabilities, the largest is 1

    # `jax.random.categorical` makes V random numbers per token and takes an argmax. Here two
    # uniform numbers choose in two levels: a block of the vocabulary by the blocks' total weights,
    # then a token of that block by its weight. The probability of a token is
    # sum(block) / sum(all) * weight / sum(block) = weight / sum(all), as it should be.
    uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (2,))))(keys)  # [B, M, 2]

    # About sqrt(V) tokens per block, a power of two: then the two cumulative sums are short. Each
    # adds few numbers, so they stay accurate in float32, too.
    size = max(16, 1 << (logits.shape[-1].bit_length() // 2))
    padding = -logits.shape[-1] % size
    weights = jnp.pad(weights, ((0, 0), (0, 0), (0, padding)))
    blocks = weights.reshape(*logits.shape[:2], -1, size)  # [B, M, V / size, size]
    sums = blocks.sum(-1)
    block = _invert(sums, uniform[..., 0])
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=2)[..., 0, :]
    token = block * size + _invert(inside, uniform[..., 1])

    # log softmax at the token only: (logit - max) - log of the sum that is there already.
    picked = jnp.take_along_axis(scaled, token[..., None], axis=-1)
    return token, (picked - top)[..., 0] - jnp.log(sums.sum(-1))


def truncate(logits: Array, top_k: int, top_p: float) -> Array:
    """logits [..., V] with -inf outside the nucleus; ties with its last token stay inside."""
    if top_k == 0 and top_p == 1.0:
        return logits
    size = logits.shape[-1]
    ordered, _ = jax.lax.top_k(logits, min(top_k, size) or size)
    probabilities = jax.nn.softmax(ordered)
    # A token is inside when those before it do not hold top_p yet. So the first always is.
    is_inside = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
    last = jnp.take_along_axis(ordered, is_inside.sum(-1, keepdims=True) - 1, axis=-1)
    return jnp.where(logits >= last, logits, -jnp.inf)


def _invert(weights: Array, uniform: Array) -> Array:
    """Index i with probability weights[i] / sum(weights): int32 [...] of weights [..., K]."""
    cumulative = jnp.cumsum(weights, axis=-1)
    # `uniform` is at most 1 - 2^-23, so the product stays below the last sum after rounding. With
    # `<=` an index of weight 0 is never chosen, not even by a uniform number that is exactly 0.
    target = uniform[..., None] * cumulative[..., -1:]
    return (cumulative <= target).sum(-1).astype(jnp.int32)
