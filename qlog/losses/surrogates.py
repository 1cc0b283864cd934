"""Token level: how coefficients meet log-probabilities.

A surrogate is called on one microbatch of b groups and returns `Sums`, which add over microbatches:

    surrogate(score, path, token_weight, new, old, reference, rationale_mask, answer_mask) -> Sums

Args, float32 unless said otherwise, M rollouts of R tokens:
  score, path, token_weight: [b, M], from `losses.coefficients`; constants for differentiation.
  new: [b, M, R] log-probabilities under the parameters being differentiated.
  old: [b, M, R] log-probabilities under the policy that sampled the tokens, or None (unused).
  reference: [b, M, R] log-probabilities under the reference parameters, or None (unused).
  rationale_mask, answer_mask: [b, M, R] bool, True for tokens of the rationale and of the answer.
"""

import functools

import jax
import jax.numpy as jnp

from qlog.losses.types import Sums, Surrogate, check_choice, check_number

KL_KINDS = ("k1", "k2", "k3")


def _check_tokens(score, path, new, rationale_mask, answer_mask) -> None:
    if jnp.ndim(score) != 2 or jnp.shape(path) != jnp.shape(score):
        raise ValueError(
            f"score and path must have one shape [b, M], got {jnp.shape(score)}, {jnp.shape(path)}"
        )
    if jnp.ndim(new) != 3 or jnp.shape(new)[:2] != jnp.shape(score):
        raise ValueError(
            f"new must have shape [b, M, R] with [b, M] = {jnp.shape(score)}, got {jnp.shape(new)}"
        )
    for name, mask in (("rationale_mask", rationale_mask), ("answer_mask", answer_mask)):
        if jnp.shape(mask) != jnp.shape(new) or jnp.result_type(mask) != jnp.bool_:
            raise ValueError(
                f"{name} must be bool {jnp.shape(new)}, "
                f"got {jnp.result_type(mask)} {jnp.shape(mask)}"
            )


def _need(name: str, value, new) -> jax.Array:
    if value is None or jnp.shape(value) != jnp.shape(new):
        got = None if value is None else jnp.shape(value)
        raise ValueError(f"{name} must be log-probabilities of shape {jnp.shape(new)}, got {got}")
    return jax.lax.stop_gradient(value)


def _per_token(score, path, rationale_mask, answer_mask) -> jax.Array:
    """[b, M, R] the coefficient of every token."""
    coefficient = jnp.where(rationale_mask, score[..., None], 0.0)
    coefficient += jnp.where(answer_mask, path[..., None], 0.0)
    return jax.lax.stop_gradient(coefficient)


def _total(values, mask) -> jax.Array:
    return jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32)


@functools.cache  # one object per setting: jit treats surrogates as static
def linear() -> Surrogate:
    """-sum (score * rationale_mask + path * answer_mask) * new: its gradient is the estimator."""

    def surrogate(
        score, path, token_weight, new, old, reference, rationale_mask, answer_mask
    ) -> Sums:
        _check_tokens(score, path, new, rationale_mask, answer_mask)
        coefficient = _per_token(score, path, rationale_mask, answer_mask)
        is_token = rationale_mask | answer_mask
        zero = jnp.zeros((), jnp.float32)
        loss = -_total(coefficient * new.astype(jnp.float32), is_token)
        return Sums(loss, _total(1.0, is_token), zero, zero)

    return surrogate


@functools.cache  # one object per setting: jit treats surrogates as static
def clipped(clip_low: float = 0.2, clip_high: float = 0.2) -> Surrogate:
    """PPO's clipped ratio: -sum min(ratio c, clip(ratio, 1 - clip_low, 1 + clip_high) c).

    ratio = exp(new - old) per token, so tokens of an older policy are corrected; on policy its
    gradient is that of `linear`. `clip_high > clip_low` is DAPO's clip-higher.
    """
    check_number("clip_low", clip_low, 0, 1)
    check_number("clip_high", clip_high, 0, float("inf"))

    def surrogate(
        score, path, token_weight, new, old, reference, rationale_mask, answer_mask
    ) -> Sums:
        _check_tokens(score, path, new, rationale_mask, answer_mask)
        is_token = rationale_mask | answer_mask
        coefficient = _per_token(score, path, rationale_mask, answer_mask)
        # Padding's log-probabilities are arbitrary: a ratio of inf there would make NaN gradients.
        log_ratio = jnp.where(is_token, new.astype(jnp.float32) - _need("old", old, new), 0.0)
        ratio = jnp.exp(log_ratio)
        inside = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
        gain = jnp.minimum(ratio * coefficient, inside * coefficient)
        was_clipped = inside * coefficient < ratio * coefficient
        zero = jnp.zeros((), jnp.float32)
        return Sums(-_total(gain, is_token), _total(1.0, is_token), _total(1.0, was_clipped), zero)

    return surrogate


def kl_estimate(new: jax.Array, reference: jax.Array, kind: str = "k3") -> jax.Array:
    """Per-token estimate of KL(new || reference) on tokens sampled from `new`, in nats.

    With d = reference - new: k1 = -d (unbiased, may be negative), k2 = d^2 / 2 (biased, but its
    gradient is that of the KL), k3 = e^d - d - 1 (unbiased, never negative). The derivative of k1
    itself has mean zero and would regularise nothing, so k1 differentiates as the score-function
    estimate k1 * grad new, which is also the gradient of k2.
    """
    check_choice("kl_kind", kind, KL_KINDS)
    difference = reference - new
    if kind == "k1":
        half_square = jnp.square(difference) / 2
        return half_square + jax.lax.stop_gradient(-difference - half_square)
    if kind == "k2":
        return jnp.square(difference) / 2
    return jnp.expm1(difference) - difference


@functools.cache  # one object per setting: jit treats surrogates as static
def add_kl(surrogate: Surrogate, weight: float, kind: str = "k3") -> Surrogate:
    """Adds `weight` * KL to the reference, each token weighing its sequence's `token_weight`."""
    check_number("kl_weight", weight, 0, float("inf"))
    check_choice("kl_kind", kind, KL_KINDS)

    def with_kl(
        score, path, token_weight, new, old, reference, rationale_mask, answer_mask
    ) -> Sums:
        sums = surrogate(
            score, path, token_weight, new, old, reference, rationale_mask, answer_mask
        )
        if jnp.shape(token_weight) != jnp.shape(score):
            raise ValueError(
                f"token_weight must have score's shape {jnp.shape(score)}, "
                f"got {jnp.shape(token_weight)}"
            )
        is_token = rationale_mask | answer_mask
        current = jnp.where(is_token, new.astype(jnp.float32), 0.0)
        target = jnp.where(is_token, _need("reference", reference, new), 0.0)
        kl = kl_estimate(current, target, kind)
        penalty = _total(jax.lax.stop_gradient(token_weight)[..., None] * kl, is_token)
        return sums._replace(loss=sums.loss + weight * penalty, kl=_total(kl, is_token))

    return with_kl


def token_measurements(sums: Sums) -> dict[str, jax.Array]:
    """Means per token from summed `Sums`: `clip_fraction` and `kl`, scalars."""
    tokens = jnp.maximum(sums.tokens, 1.0)
    return {"clip_fraction": sums.clipped / tokens, "kl": sums.kl / tokens}
