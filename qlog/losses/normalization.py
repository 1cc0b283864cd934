"""Normalising any estimator's coefficients: the division by M^q, clipping, averages over tokens."""

import jax
import jax.numpy as jnp

from qlog.losses import group_stats
from qlog.losses.checks import check_choice, check_integer, check_number
from qlog.losses.compose import stateless
from qlog.losses.types import AxisName, Coefficients, Commitment, LossTransform, Scores

AGGREGATIONS = ("sum", "sequence_mean", "token_mean", "constant")


def normalize_by_bound(q: Commitment) -> LossTransform:
    """Divides by M^q, the bound of w_m / wbar^q, so that effective rewards lie in [0, 1].

    Algorithms 1 and 2 do this; it rescales the learning rate by a constant that depends on q.
    """
    check_number("q", q, 0, 1)

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        # A factor that all rollouts of a group share goes into `log_scale`, as a logarithm.
        bound = q * jnp.log(group_stats.num_valid(scores))
        return coefficients._replace(log_scale=coefficients.log_scale - bound)

    return stateless(function)


def zero_pathwise() -> LossTransform:
    """Sets the path coefficient to 0: the ablation of the pathwise term that the paper asks for."""

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        return coefficients._replace(path=jnp.zeros_like(coefficients.path))

    return stateless(function)


def zero_score() -> LossTransform:
    """Sets the score coefficient to 0, so that only the answer learns: `zero_pathwise` reversed."""

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        return coefficients._replace(score=jnp.zeros_like(coefficients.score))

    return stateless(function)


def clip_coefficients(limit: float) -> LossTransform:
    """Clips the effective rewards, M times the true coefficients, to [-limit, limit]."""
    check_number("limit", limit, 0, float("inf"))

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        # score and path are compared before log_scale is applied, so the bound is divided by it.
        log_limit = jnp.log(jnp.float32(limit) / group_stats.num_valid(scores))
        bound = jnp.exp(log_limit - coefficients.log_scale)
        return coefficients._replace(
            score=jnp.clip(coefficients.score, -bound, bound),
            path=jnp.clip(coefficients.path, -bound, bound),
        )

    return stateless(function)


def aggregate(mode: str = "sum", max_tokens: int | None = None) -> LossTransform:
    """How tokens are averaged: scales a sequence's coefficients, and so each of its tokens.

    A_m is the coefficient times M, L_m the sequence's number of tokens. The trainer takes the mean
    over prompts.

    Args:
      mode: 'sum', 1/M sum_m A_m sum_t log p_t: the policy gradient itself.
        'sequence_mean', 1/M sum_m A_m / L_m sum_t log p_t: GRPO as published.
        'token_mean': all tokens of the batch weigh the same (DAPO).
        'constant', 1/(M max_tokens) sum_m A_m sum_t log p_t (Dr. GRPO).
      max_tokens: for 'constant' only.

    Raises:
      ValueError: another mode, or max_tokens missing or not read; from update, scores without
        `num_tokens` where the mode reads it.
    """
    check_choice("aggregation", mode, AGGREGATIONS)
    if mode == "constant":
        if max_tokens is None:
            raise ValueError("aggregation='constant' needs max_tokens, an integer of at least 1")
        check_integer("max_tokens", max_tokens)
    elif max_tokens is not None:
        raise ValueError(f"max_tokens={max_tokens!r} is not read with aggregation={mode!r}")

    def function(
        coefficients: Coefficients, scores: Scores, *, axis_name: AxisName, **_
    ) -> Coefficients:
        if mode == "sum":
            return coefficients
        if mode == "constant":
            factor = 1 / jnp.float32(max_tokens)
        else:
            num_tokens = scores.require("num_tokens", f"aggregate({mode!r})")
            length = jnp.where(scores.is_valid, num_tokens, 0).astype(jnp.float32)
            average = _sequence_mean if mode == "sequence_mean" else _token_mean
            factor = average(length, scores, axis_name)
        return coefficients._replace(
            score=coefficients.score * factor,
            path=coefficients.path * factor,
            token_weight=coefficients.token_weight * factor,
        )

    return stateless(function)


def _sequence_mean(length: jax.Array, scores: Scores, axis_name: AxisName) -> jax.Array:
    """[B, M] 1 / L_m; a sequence without tokens has nothing to scale."""
    return 1 / jnp.maximum(length, 1.0)


def _token_mean(length: jax.Array, scores: Scores, axis_name: AxisName) -> jax.Array:
    """[B, 1] what turns 1/M of each sequence into 1/tokens of the batch.

    Coefficients contain 1/n, and the trainer divides by the number of prompts: both are undone.
    """
    is_group = jnp.any(scores.is_valid, 1)
    prompts = group_stats.batch_sum(is_group.astype(jnp.float32), axis_name)
    tokens = jnp.maximum(group_stats.batch_sum(length, axis_name), 1.0)
    # [B, 1] * scalar / scalar
    return group_stats.num_valid(scores) * prompts / tokens
