"""What the gradient is taken on: rollouts, followed by the answer that the estimator asks for."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from qlog.records import Rollouts, Trajectories


@functools.partial(jax.jit, static_argnames=("length",))
def with_gold_answer(rollouts: Rollouts, gold: Array, gold_lengths: Array, length: int):
    """Trajectories of `length` tokens: each rationale followed by the gold answer [B, A]."""
    slots = jnp.arange(length)
    ends = rollouts.rationale_lengths[..., None]
    own = _fit(rollouts.tokens, length)
    offset = jnp.clip(slots - ends, 0, gold.shape[1] - 1)
    answer = jnp.take_along_axis(
        jnp.broadcast_to(gold[:, None], (*ends.shape[:2], gold.shape[1])), offset, -1
    )
    in_rationale = slots < ends
    rationale_mask = _fit(rollouts.is_sampled, length) & in_rationale
    return Trajectories(
        tokens=jnp.where(in_rationale, own, answer),
        rationale_mask=rationale_mask,
        answer_mask=~in_rationale & (slots < ends + gold_lengths[:, None, None]),
        old_log_probs=_fit(rollouts.log_probs, length),
        was_sampled=rationale_mask,
        lengths=rollouts.rationale_lengths + gold_lengths[:, None],
    )


@functools.partial(jax.jit, static_argnames=("length",))
def with_sampled_answer(rollouts: Rollouts, length: int) -> Trajectories:
    """Trajectories of `length` tokens: the rollouts as they were sampled."""
    in_rationale = jnp.arange(length) < rollouts.rationale_lengths[..., None]
    sampled = _fit(rollouts.is_sampled, length)
    return Trajectories(
        tokens=_fit(rollouts.tokens, length),
        rationale_mask=sampled & in_rationale,
        answer_mask=sampled & ~in_rationale,
        old_log_probs=_fit(rollouts.log_probs, length),
        was_sampled=sampled,
        lengths=rollouts.lengths,
    )


def annotated(rationale: Array, rationale_lengths: Array) -> Rollouts:
    """Annotated rationales [B, R] in the place of sampled ones, M = 1 (supervised fine-tuning)."""
    lengths = rationale_lengths[:, None]
    is_token = jnp.arange(rationale.shape[1]) < lengths[..., None]
    no = jnp.zeros(lengths.shape, bool)
    return Rollouts(
        tokens=rationale[:, None],
        log_probs=jnp.zeros(is_token.shape),
        is_sampled=is_token,
        rationale_lengths=lengths,
        lengths=lengths,
        forced=no,
        ended_early=no,
        complete=no,
    )


def _fit(x: Array, length: int) -> Array:
    """x [B, M, R] cut or zero-padded to [B, M, length]."""
    x = x[..., :length]
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[-1])))
