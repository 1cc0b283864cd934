"""Parts that edit any estimator's coefficients: normalise, zero, clip, average over tokens."""

import jax.numpy as jnp
from jax.typing import ArrayLike

from qlog.losses import group_stats
from qlog.losses.checks import check_choice, check_integer, check_number
from qlog.losses.compose import stateless
from qlog.losses.types import LossTransform

AGGREGATIONS = ("sum", "sequence_mean", "token_mean", "constant")


def normalize_by_bound(q: ArrayLike) -> LossTransform:
    """Divides by M^q, the bound of w_m / wbar^q, so that effective rewards lie in [0, 1].

    Algorithms 1 and 2 do this; it rescales the learning rate by a constant that depends on q.
    """
    check_number("q", q, 0, 1)

    def function(coefficients, scores, **_):
        bound = q * jnp.log(group_stats.num_valid(scores))
        return coefficients._replace(log_scale=coefficients.log_scale - bound)

    return stateless(function)


def zero_pathwise() -> LossTransform:
    """Sets the path coefficient to 0: the ablation of the pathwise term that the paper asks for."""

    def function(coefficients, scores, **_):
        return coefficients._replace(path=jnp.zeros_like(coefficients.path))

    return stateless(function)


def clip_coefficients(limit: float) -> LossTransform:
    """Clips the effective rewards, M times the true coefficients, to [-limit, limit]."""
    check_number("limit", limit, 0, float("inf"))

    def function(coefficients, scores, **_):
        log_bound = (
            jnp.log(jnp.float32(limit) / group_stats.num_valid(scores)) - coefficients.log_scale
        )
        bound = jnp.exp(log_bound)
        return coefficients._replace(
            score=jnp.clip(coefficients.score, -bound, bound),
            path=jnp.clip(coefficients.path, -bound, bound),
        )

    return stateless(function)


def aggregate(mode: str = "sum", max_tokens: int | None = None) -> LossTransform:
    """How tokens are averaged: scales a sequence's coefficients, and so each of its tokens.

    With A_m the coefficient times M, L_m the sequence's tokens, and the mean over prompts outside:
      'sum'            1/M sum_m A_m sum_t log p_t: the policy gradient itself.
      'sequence_mean'  1/M sum_m A_m / L_m sum_t log p_t: GRPO as published.
      'token_mean'     all tokens of the batch weigh the same (DAPO).
      'constant'       1/(M max_tokens) sum_m A_m sum_t log p_t (Dr. GRPO).
    """
    check_choice("aggregation", mode, AGGREGATIONS)
    if mode == "constant":
        if max_tokens is None:
            raise ValueError("aggregation='constant' needs max_tokens, an integer of at least 1")
        check_integer("max_tokens", max_tokens)
    elif max_tokens is not None:
        raise ValueError(f"max_tokens={max_tokens!r} is not read with aggregation={mode!r}")

    def function(coefficients, scores, *, axis_name, **_):
        if mode == "sum":
            return coefficients
        if mode == "constant":
            factor = 1 / jnp.float32(max_tokens)
        else:
            num_tokens = scores.require("num_tokens", f"aggregate({mode!r})")
            length = jnp.where(scores.is_valid, num_tokens, 0).astype(jnp.float32)
        if mode == "sequence_mean":
            factor = 1 / jnp.maximum(length, 1.0)
        elif mode == "token_mean":
            is_group = jnp.any(scores.is_valid, 1)
            prompts = group_stats.batch_sum(is_group.astype(jnp.float32), axis_name)
            tokens = jnp.maximum(group_stats.batch_sum(length, axis_name), 1.0)
            factor = group_stats.num_valid(scores) * prompts / tokens
        return coefficients._replace(
            score=coefficients.score * factor,
            path=coefficients.path * factor,
            token_weight=coefficients.token_weight * factor,
        )

    return stateless(function)
