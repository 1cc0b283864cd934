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

KL_KINDS = ("k1", "k2", "k3", "sequence")
LEVELS = ("token", "sequence")  # of importance weights


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


@functools.cache  # one object per setting: jit treats surrogates as static
def clipped_sequence(clip_low: float = 3e-4, clip_high: float = 4e-4) -> Surrogate:
    """GSPO: PPO's clip with one ratio for a whole rollout, the geometric mean of its tokens'.

    s = exp(mean over tokens of new - old) stands for the ratio of each token in `clipped`, and its
    gradient is that of the token (GSPO-token, 2507.18071): with equal coefficients of rationale and
    answer the sum is GSPO's own. On policy the gradient is that of `linear`. Reads `tokens.old`.
    """
    check_number("clip_low", clip_low, 0, 1)
    check_number("clip_high", clip_high, 0, float("inf"))

    def surrogate(coefficients: Coefficients, tokens: TokenLogProbs) -> Sums:
        check_tokens(coefficients, tokens)
        is_token = tokens.is_token
        per_token = _per_token(coefficients, tokens)
        new = jnp.where(is_token, tokens.new.astype(jnp.float32), 0.0)
        old = jnp.where(is_token, tokens.require("old", "the ratio of sequences"), 0.0)
        constant = jax.lax.stop_gradient(new)
        length = jnp.maximum(jnp.sum(is_token, -1, keepdims=True), 1)
        sequence = jnp.exp(jnp.sum(constant - old, -1, keepdims=True) / length)  # [b, M, 1]
        # Worth s, with the derivative of s times the token's log-probability.
        ratio = sequence * (1 + new - constant)
        inside = jnp.clip(sequence, 1 - clip_low, 1 + clip_high)
        was_clipped = inside * per_token < sequence * per_token
        return Sums(
            loss=-_total(jnp.where(was_clipped, inside, ratio) * per_token, is_token),
            tokens=_total(1.0, is_token),
            clipped=_total(1.0, is_token & was_clipped),
            kl=jnp.zeros((), jnp.float32),
        )

    return surrogate


@functools.cache  # one object per setting: jit treats surrogates as static
def truncated(
    level: str = "token", most: float = 2.0, least: float = 0.0, sampled_answer: bool = True
) -> Surrogate:
    """`linear` with truncated importance weights: -sum clip(ratio, least, most) c * new.

    The weight is a constant for differentiation, so that every token keeps a gradient, where
    `clipped` drops it. It corrects where the policy that sampled is not the learner's: an older
    one, as later updates of a batch have, or one that computes with less precision, as on quantised
    caches (truncated importance sampling). Reads `tokens.old`, of the policy that sampled.

    Args:
      level: 'token', the ratio p_new / p_old of each token (CISPO, 2506.13585); 'sequence', the
        product over the rollout, for all of its tokens: without bias as far as it is not truncated.
      most: the largest weight, at least 1.
      least: the smallest weight, in [0, 1].
      sampled_answer: False for gold answers, which no policy sampled: `tokens.old` is not read
        there. Their tokens have weight 1, or the rationale's with 'sequence'.
    """
    check_choice("level", level, LEVELS)
    check_number("most", most, 1, float("inf"))
    check_number("least", least, 0, 1)

    def surrogate(coefficients: Coefficients, tokens: TokenLogProbs) -> Sums:
        check_tokens(coefficients, tokens)
        is_token = tokens.is_token
        was_sampled = is_token if sampled_answer else tokens.rationale_mask
        new = tokens.new.astype(jnp.float32)
        old = tokens.require("old", "the importance weight")
        # Where nothing was sampled the difference may be anything, and counts as none.
        difference = jnp.where(was_sampled, jax.lax.stop_gradient(new) - old, 0.0)
        if level == "sequence":
            difference = jnp.sum(difference, -1, keepdims=True)  # [b, M, 1]
        ratio = jnp.exp(difference)
        weight = jnp.clip(ratio, least, most)
        gain = weight * _per_token(coefficients, tokens) * new
        return Sums(
            loss=-_total(gain, is_token),
            tokens=_total(1.0, is_token),
            clipped=_total(1.0, is_token & (weight != ratio)),
            kl=jnp.zeros((), jnp.float32),
        )

    return surrogate


def cispo(clip_low: float = 1.0, clip_high: float = 4.0) -> Surrogate:
    """CISPO: `truncated` at [1 - clip_low, 1 + clip_high], by default from above only.

    2506.13585; the bound of 5 is that of ScaleRL, 2510.13786.
    """
    check_number("clip_low", clip_low, 0, 1)
    check_number("clip_high", clip_high, 0, float("inf"))
    return truncated("token", most=1 + clip_high, least=1 - clip_low)


def kl_estimate(new: jax.Array, reference: jax.Array, kind: str = "k3") -> jax.Array:
    """Per-token estimate of KL(new || reference) on tokens sampled from `new`, in nats.

    With d = reference - new: k1 = -d (unbiased, may be negative), k2 = d^2 / 2 (biased, but its
    gradient is that of the KL), k3 = e^d - d - 1 (unbiased, never negative).
    """
    check_choice("kl_kind", kind, [known for known in KL_KINDS if known != "sequence"])
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
def add_kl(
    surrogate: Surrogate, weight: float, kind: str = "k3", sampled_answer: bool = True
) -> Surrogate:
    """Adds `weight` * KL to the reference, each token weighing its sequence's `token_weight`.

    Reads `tokens.reference`.

    Args:
      kind: a token's estimate (`kl_estimate`), which leaves out what a token does to the KL of
        later ones; or 'sequence', the value of k1 with the gradient of the whole sequence's KL:
        every token's log-probability times the sum of new - reference from it on (LaTRO,
        2411.04282).
      sampled_answer: False for gold answers: their tokens are not the policy's own, so no mean
        over them is a KL, and the penalty is on the rationale only.
    """
    check_number("kl_weight", weight, 0, float("inf"))
    check_choice("kl_kind", kind, KL_KINDS)

    def with_kl(coefficients: Coefficients, tokens: TokenLogProbs) -> Sums:
        sums = surrogate(coefficients, tokens)
        check_tokens(coefficients, tokens)  # `surrogate` may be a user's, which checks nothing
        is_token = tokens.is_token if sampled_answer else tokens.rationale_mask
        current = jnp.where(is_token, tokens.new.astype(jnp.float32), 0.0)
        target = jnp.where(is_token, tokens.require("reference", "the KL penalty"), 0.0)
        if kind == "sequence":
            kl = _sequence_kl(current, target)
        else:
            kl = kl_estimate(current, target, kind)
        token_weight = jax.lax.stop_gradient(coefficients.token_weight)[..., None]
        penalty = _total(token_weight * kl, is_token)
        return sums._replace(loss=sums.loss + weight * penalty, kl=_total(kl, is_token))

    return with_kl


def _sequence_kl(current: jax.Array, target: jax.Array) -> jax.Array:
    """[b, M, R] k1 per token, whose gradient is that of the KL of the sequences; 0 on padding."""
    constant = jax.lax.stop_gradient(current)
    # A token changes the odds of what comes after it, never of what came before: the sum from it on
    # has the same mean as the sum over all, and less variance.
    k1 = constant - target
    to_go = jnp.flip(jnp.cumsum(jnp.flip(k1, -1), -1), -1)
    return k1 + to_go * (current - constant)


def token_measurements(sums: Sums) -> dict[str, jax.Array]:
    """Means per token from summed `Sums`: `clip_fraction` and `kl`, scalars."""
    tokens = jnp.maximum(sums.tokens, 1.0)
    return {"clip_fraction": sums.clipped / tokens, "kl": sums.kl / tokens}
