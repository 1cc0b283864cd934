"""How sampled rollouts differ from each other and from themselves: what a collapse shows first."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from qlog.records import Rollouts

NGRAM = 4  # tokens whose recurrence counts as repetition: seq-rep-4 of Welleck et al., 1908.04319


@functools.partial(jax.jit, static_argnames=("with_answer",))
def measure(rollouts: Rollouts, with_answer: bool) -> dict[str, Array]:
    """Metrics of a batch of sampled rollouts, float32 scalars.

    Measured:
      entropy/rationale: mean of -log p over the sampled tokens of rationales, in nats per token:
        an estimate, without bias, of the mean entropy of the distributions that they are drawn
        from, which no pass over the vocabulary is needed for.
      entropy/answer: the same over the sampled tokens of answers.
      repetition: mean over rationales of the share of their 4-grams that occurred in them before.
        Rationales of fewer tokens do not count.
      distinct_answers: mean over groups of the number of different sampled answers, in [1, M].

    Args:
      rollouts: [B, M, ...].
      with_answer: whether answers were sampled; without them two of the metrics are left out.
    """
    place = jnp.arange(rollouts.tokens.shape[-1])
    is_rationale = place < rollouts.rationale_lengths[..., None]  # [B, M, R]
    found = {
        "entropy/rationale": _entropy(rollouts, is_rationale),
        "repetition": _repetition(rollouts.tokens, rollouts.rationale_lengths),
    }
    if with_answer:
        found["entropy/answer"] = _entropy(rollouts, ~is_rationale)
        found["distinct_answers"] = _distinct_answers(rollouts, is_rationale)
    return found


def _entropy(rollouts: Rollouts, where: Array) -> Array:
    counted = rollouts.is_sampled & where
    total = jnp.sum(jnp.where(counted, -rollouts.log_probs, 0.0))
    return total / jnp.maximum(counted.sum(), 1)


def _repetition(tokens: Array, lengths: Array) -> Array:
    # Hashes of 31 bits, sorted, bring equal n-grams together: time grows as R log R. Two different
    # ones share a hash once in 2^31 pairs, which no mean shows.
    grams = jnp.zeros(tokens.shape, jnp.uint32)
    for offset in range(NGRAM):
        grams = _mix(grams ^ jnp.roll(tokens, -offset, axis=-1).astype(jnp.uint32))
    number = jnp.maximum(lengths - NGRAM + 1, 0)  # [B, M], n-grams that lie in the rationale
    place = jnp.arange(tokens.shape[-1])
    is_gram = place < number[..., None]
    last = jnp.uint32(2**32 - 1)  # greater than any hash, so that what is no n-gram comes last
    ordered = jnp.sort(jnp.where(is_gram, grams >> 1, last), axis=-1)
    is_repeat = (ordered == jnp.roll(ordered, 1, axis=-1)) & is_gram & (place > 0)
    share = is_repeat.sum(-1) / jnp.maximum(number, 1)
    has_grams = number > 0
    return jnp.sum(jnp.where(has_grams, share, 0.0)) / jnp.maximum(has_grams.sum(), 1)


def _distinct_answers(rollouts: Rollouts, is_rationale: Array) -> Array:
    place = jnp.arange(rollouts.tokens.shape[-1])
    is_answer = ~is_rationale & (place < rollouts.lengths[..., None])
    # An answer's hash is a sum over its tokens, each mixed with its place in the answer.
    at = (place - rollouts.rationale_lengths[..., None]).astype(jnp.uint32)
    mixed = _mix(_mix(rollouts.tokens.astype(jnp.uint32)) ^ at)
    answers = jnp.sum(jnp.where(is_answer, mixed, 0), axis=-1, dtype=jnp.uint32)  # [B, M]
    ordered = jnp.sort(answers, axis=-1)
    is_new = ordered[:, 1:] != ordered[:, :-1]
    return 1 + is_new.sum(-1).mean()


def _mix(x: Array) -> Array:
    """uint32 to uint32, one to one, every bit of x changing about half of the bits (murmur3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return (x ^ (x >> 16)) + jnp.uint32(0x9E3779B9)
