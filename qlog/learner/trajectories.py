"""What the gradient is taken on: rollouts, followed by the answer that the estimator asks for.

sampled      z_1 ... z_n </think> y_1 ... y_k <eos>           the rollout as it is
gold         z_1 ... z_n </think> y*_1 ... y*_a <eos>         its rationale, then the gold answer
annotated    z*_1 ... z*_n </think> y*_1 ... y*_a <eos>       both come with the data

`with_sampled_answer` and `with_gold_answer` make the trajectories. `annotated` makes `Rollouts` of
the data's rationales, which `with_gold_answer` then treats as sampled ones.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from qlog.records import Golds, Rollouts, Trajectories


@functools.partial(jax.jit, static_argnames=("length",))
def with_gold_answer(rollouts: Rollouts, golds: Golds, length: int) -> Trajectories:
    """Each rationale followed by its prompt's gold answer.

    Args:
      rollouts: [B, M]; what comes after their rationales is not read.
      golds: of the same B prompts.
      length: R of the result, at least the longest rationale plus A.
    """
    num_answer_tokens = golds.tokens.shape[1]
    slots = jnp.arange(length)
    ends = rollouts.rationale_lengths[..., None]  # [B, M, 1], where the answer begins
    # Slot r holds token r - end of the answer. Inside the rationale, and behind the answer, the
    # index is clipped to the answer, and no mask has the slot.
    index = jnp.clip(slots - ends, 0, num_answer_tokens - 1)  # [B, M, R]
    # [B, A] -> [B, M, A]: the gold answer of the prompt, for each of its rollouts.
    answers = jnp.broadcast_to(golds.tokens[:, None], (*rollouts.lengths.shape, num_answer_tokens))
    answer = jnp.take_along_axis(answers, index, -1)  # [B, M, R]
    in_rationale = slots < ends
    # A forced closing was not drawn from the policy: it carries no log-probability.
    rationale_mask = _fit(rollouts.is_sampled, length) & in_rationale
    return Trajectories(
        tokens=jnp.where(in_rationale, _fit(rollouts.tokens, length), answer),
        rationale_mask=rationale_mask,
        answer_mask=~in_rationale & (slots < ends + golds.lengths[:, None, None]),
        # Behind the rationale these may be of a sampled answer. The gold one was not sampled, so
        # `was_sampled` hides them.
        old_log_probs=_fit(rollouts.log_probs, length),
        was_sampled=rationale_mask,
        lengths=rollouts.rationale_lengths + golds.lengths[:, None],
    )


@functools.partial(jax.jit, static_argnames=("length",))
def with_sampled_answer(rollouts: Rollouts, length: int) -> Trajectories:
    """The rollouts as they were sampled, [B, M, `length`]."""
    in_rationale = jnp.arange(length) < rollouts.rationale_lengths[..., None]
    # Forced tokens (the closing of a spent budget) are in neither mask: no probability chose them.
    is_sampled = _fit(rollouts.is_sampled, length)
    return Trajectories(
        tokens=_fit(rollouts.tokens, length),
        rationale_mask=is_sampled & in_rationale,
        answer_mask=is_sampled & ~in_rationale,
        old_log_probs=_fit(rollouts.log_probs, length),
        was_sampled=is_sampled,
        lengths=rollouts.lengths,
    )


def annotated(rationale: Array, rationale_lengths: Array) -> Rollouts:
    """Annotated rationales in the place of sampled ones, M = 1 (supervised fine-tuning).

    Args:
      rationale: int32 [B, R], right-padded.
      rationale_lengths: int32 [B].

    Returns:
      [B, 1]; they have no answer yet.
    """
    lengths = rationale_lengths[:, None]  # [B, 1]
    is_token = jnp.arange(rationale.shape[1]) < lengths[..., None]  # [B, 1, R]
    # The flags tell how sampling ended, and nothing was sampled.
    no = jnp.zeros(lengths.shape, bool)
    return Rollouts(
        tokens=rationale[:, None],
        log_probs=jnp.zeros(is_token.shape),
        is_sampled=is_token,  # so that every token carries its log-probability
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
