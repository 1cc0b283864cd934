"""Token level: how coefficients meet log-probabilities.

A surrogate is called on one microbatch of b of the batch's B groups:

    surrogate(coefficients, tokens) -> sums

`coefficients` are those groups' rows [b, M] of what `losses.coefficients` returned, constants for
differentiation; `tokens` a `TokenLogProbs` [b, M, R], differentiated with respect to `tokens.new`.
The `Sums` of microbatches add up to those of the batch.
"""

import functools

import jax
import jax.numpy as jnp

from qlog.losses.checks import check_choice, check_number
from qlog.losses.types import Coefficients, Sums, Surrogate, TokenLogProbs, check_tokens

KL_KINDS = ("k1", "k2", "k3")


def _per_token(coefficients: Coefficients, tokens: TokenLogProbs) -> jax.Array:
    """[b, M, R] the coefficient of every token: score on the rationale, path on the answer."""
    per_token = jnp.where(tokens.rationale_mask, coefficients.score[..., None], 0.0)
    per_token += jnp.where(tokens.answer_mask, coefficients.path[..., None], 0.0)
    return jax.lax.stop_gradient(per_token)


def _total(values: jax.Array | float, mask: jax.Array) -> jax.Array:
    """Sum over the masked tokens, float32 scalar; what the others hold, NaN too, has no effect."""
    return jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32)


@functools.cache  # one object per setting: jit treats surrogates as static
def linear() -> Surrogate:
    """-sum (score * rationale_mask + path * answer_mask) * new: its gradient is the estimator."""

    def surrogate(coefficients: Coefficients, tokens: TokenLogProbs) -> Sums:
        check_tokens(coefficients, tokens)
        is_token = tokens.is_token
        gain = _per_token(coefficients, tokens) * tokens.new.astype(jnp.float32)
        zero = jnp.zeros((), jnp.float32)
        return Sums(
            loss=-_total(gain, is_token), tokens=_total(1.0, is_token), clipped=zero, kl=zero
        )

    return surrogate


@functools.cache  # one object per setting: jit treats surrogates as static
def clipped(clip_low: float = 0.2, clip_high: float = 0.2) -> Surrogate:
    """PPO's clipped ratio: -sum min(ratio c, clip(ratio, 1 - clip_low, 1 + clip_high) c).

    ratio = exp(new - old) per token, so tokens of an older policy are corrected; on policy its
    gradient is that of `linear`. `clip_high > clip_low` is DAPO's clip-higher. Reads `tokens.old`.
    """
    check_number("clip_low", clip_low, 0, 1)
    check_number("clip_high", clip_high, 0, float("inf"))

    def surrogate(coefficients: Coefficients, tokens: TokenLogProbs) -> Sums:
        check_tokens(coefficients, tokens)
        is_token = tokens.is_token
        per_token = _per_token(coefficients, tokens)
        difference = tokens.new.astype(jnp.float32) - tokens.require("old", "the clipped ratio")
        # Padding's log-probabilities are arbitrary: a ratio of inf there would make NaN gradients.
        ratio = jnp.exp(jnp.where(is_token, difference, 0.0))
        inside = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
        gain = jnp.minimum(ratio * per_token, inside * per_token)
        # Where the ratio left the interval in the direction that the coefficient asks for, the
        # minimum is the constant side: such a token has no gradient.
        was_clipped = inside * per_token < ratio * per_token
        return Sums(
            loss=-_total(gain, is_token),
            tokens=_total(1.0, is_token),
            clipped=_total(1.0, was_clipped),
            kl=jnp.zeros((), jnp.float32),
        )

    return surrogate


def kl_estimate(new: jax.Array, reference: jax.Array, kind: str = "k3") -> jax.Array:
    """Per-token estimate of KL(new || reference) on tokens sampled from `new`, in nats.

    With d = reference - new: k1 = -d (unbiased, may be negative), k2 = d^2 / 2 (biased, but its
    gradient is that of the KL), k3 = e^d - d - 1 (unbiased, never negative).
    """
    check_choice("kl_kind", kind, KL_KINDS)
    difference = reference - new
    if kind == "k1":
        # The derivative of k1 itself has mean zero and would regularise nothing. So the value is
        # k1, and the gradient that of its score-function estimate, k1 * grad new, which is k2's.
        half_square = jnp.square(difference) / 2
        return half_square + jax.lax.stop_gradient(-difference - half_square)
    if kind == "k2":
        return jnp.square(difference) / 2
    return jnp.expm1(difference) - difference


@functools.cache  # one object per setting: jit treats surrogates as static
def add_kl(surrogate: Surrogate, weight: float, kind: str = "k3") -> Surrogate:
    """Adds `weight` * KL to the reference, each token weighing its sequence's `token_weight`.

    Reads `tokens.reference`.
    """
    check_number("kl_weight", weight, 0, float("inf"))
    check_choice("kl_kind", kind, KL_KINDS)

    def with_kl(coefficients: Coefficients, tokens: TokenLogProbs) -> Sums:
        sums = surrogate(coefficients, tokens)
        check_tokens(coefficients, tokens)  # `surrogate` may be a user's, which checks nothing
        is_token = tokens.is_token
        current = jnp.where(is_token, tokens.new.astype(jnp.float32), 0.0)
        target = jnp.where(is_token, tokens.require("reference", "the KL penalty"), 0.0)
        kl = kl_estimate(current, target, kind)
        token_weight = jax.lax.stop_gradient(coefficients.token_weight)[..., None]
        penalty = _total(token_weight * kl, is_token)
        return sums._replace(loss=sums.loss + weight * penalty, kl=_total(kl, is_token))

    return with_kl


def token_measurements(sums: Sums) -> dict[str, jax.Array]:
    """Means per token from summed `Sums`: `clip_fraction` and `kl`, scalars."""
    tokens = jnp.maximum(sums.tokens, 1.0)
    return {"clip_fraction": sums.clipped / tokens, "kl": sums.kl / tokens}
