"""Parts of estimators: transforms of coefficients, to be chained as optax transforms are.

A part is an optax transform of `Coefficients`: `init(scores) -> state` and
`update(coefficients, state, scores, *, key, axis_name) -> (coefficients, state)`.

Notation in this file:
  a_m     log w_m, the log-weight of rollout m; `weight` maps scores to it, by default
          log p(y* | x*, z_m), the gold answer's likelihood.
  A       log of the group's mean weight wbar, an unbiased estimate of P.
  A_{-m}  the same over the group's other rollouts.
  n       the group's valid rollouts: M unless some are padding.
"""

import jax
import jax.numpy as jnp

from qlog.losses import group_stats, tsallis
from qlog.losses.checks import check_number
from qlog.losses.compose import initial_coefficients, stateless
from qlog.losses.group_stats import Weight
from qlog.losses.types import AxisName, Coefficients, Commitment, LossTransform, Scores

# --- What a group's rollouts are worth -----------------------------------------------------------


def rao_blackwell(weight: Weight = group_stats.log_likelihood) -> LossTransform:
    """score = path = w_m / M: the gradient of l_0 = 1 - P, the answer summed out (eq 9, q = 0)."""

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        log_weights = weight(scores)
        # w_m / M = (w_m / sum w) * wbar: the share in score and path, wbar in the scale.
        share = group_stats.normalized(log_weights)
        scale = group_stats.finite(group_stats.log_mean(log_weights, scores))
        return coefficients._replace(
            score=share, path=share, log_scale=jnp.broadcast_to(scale, share.shape)
        )

    return stateless(function)


def uniform() -> LossTransform:
    """score = path = 1 / M: every rollout is a demonstration."""
    return stateless(lambda coefficients, scores, **_: initial_coefficients(scores))


def from_reward() -> LossTransform:
    """score = path = r_m / M, r the reward of the sampled answer (REINFORCE)."""

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        reward = scores.require("reward", "from_reward")
        share = jnp.where(scores.is_valid, reward, 0.0) / group_stats.num_valid(scores)
        return coefficients._replace(score=share, path=share, log_scale=jnp.zeros_like(share))

    return stateless(function)


def from_log_weight(weight: Weight = group_stats.log_likelihood) -> LossTransform:
    """score = (a_m - the mean of the others) / M, path = 1 / M: the gradient of E log w.

    E log w is Jensen's bound of log P with one sample (JEPO, 2503.19618 eq 5), and log w a reward
    (2602.03979). a_m below e^LEAST_RATIO, such as -inf, counts as that, with a path of 0: one
    impossible answer would make all other rollouts' scores infinite. M = 1 is a ValueError.
    """

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        log_weights = weight(scores)
        n = group_stats.num_valid(scores)
        is_above = scores.is_valid & (log_weights > group_stats.LEAST_RATIO)
        reward = jnp.maximum(log_weights, group_stats.LEAST_RATIO)
        # Minus the mean of the others is n / (n-1) times minus the mean of all.
        score = group_stats.deviation(reward, scores) / jnp.maximum(n - 1, 1)
        return coefficients._replace(
            score=score, path=is_above / n, log_scale=jnp.zeros_like(score)
        )

    return stateless(function, min_rollouts=2)


def per_gold_token() -> LossTransform:
    """Divides by the number of tokens of the gold answer."""

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        mask = scores.require("gold_mask", "per_gold_token")
        factor = 1 / jnp.maximum(jnp.sum(mask, -1), 1)
        return coefficients._replace(
            score=coefficients.score * factor, path=coefficients.path * factor
        )

    return stateless(function)


def from_mean_gold_prob() -> LossTransform:
    """score = path = the mean over the gold answer's tokens of their probabilities, over M.

    A sum where w is a product: one unlikely token does not hide the others.
    """

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        log_probs, mask = _gold_tokens(scores, "from_mean_gold_prob")
        total = jnp.sum(jnp.where(mask, jnp.exp(log_probs), 0.0), -1)
        return _from_values(coefficients, scores, total / jnp.maximum(jnp.sum(mask, -1), 1))

    return stateless(function)


def from_reflective_tokens() -> LossTransform:
    """score = path = sum_t omega_t log p_t / M over the gold answer's tokens.

    omega_t is the group's standard deviation of log p_t, divided by the sum of all. Where no token
    differs all are 0. Log-probabilities below LEAST_RATIO count as that.
    """

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        log_probs, mask = _gold_tokens(scores, "from_reflective_tokens")
        log_probs = jnp.maximum(log_probs, group_stats.LEAST_RATIO)
        of_token = jax.vmap(lambda x: group_stats.deviation(x, scores), -1, -1)
        variance = jnp.sum(jnp.square(of_token(log_probs)), 1, keepdims=True)  # [B, 1, A], times n
        spread = jnp.sqrt(variance)
        total = jnp.sum(spread, -1, keepdims=True)
        omega = spread / jnp.where(total > 0, total, 1.0)
        return _from_values(coefficients, scores, jnp.sum(omega * log_probs, -1))

    return stateless(function, min_rollouts=2)


def from_perplexity_ranks(efficiency: float = 1.0) -> LossTransform:
    """score = path = (rank + `efficiency` * thrift) / M of NOVER (2505.16022).

    Rollouts are compared by log w / N(|z|), the rationale's length entering as N(l) =
    max(1, 1 + log10 l), as in the authors' code; the gold answer's length is the same for all. The
    rank of a rollout is 1 for the best of its group and 1/n for the worst, and equal ones share the
    mean of theirs. Its thrift is the share of the others that are worse and longer.
    """
    check_number("efficiency", efficiency, 0, float("inf"))

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        by = "from_perplexity_ranks"
        log_weights, valid = scores.require("log_w", by), scores.is_valid
        answer = jnp.sum(scores.require("gold_mask", by), -1)  # [B, M]
        length = jnp.maximum(scores.require("num_tokens", by) - answer, 1).astype(jnp.float32)
        value = log_weights / jnp.maximum(1, 1 + jnp.log10(length))  # -inf for any length
        # [B, M, M]: what the rollout of axis 1 is, compared with that of axis 2.
        each, other = (lambda x: x[:, :, None]), (lambda x: x[:, None, :])
        is_pair = each(valid) & other(valid)
        is_better, is_equal = each(value) > other(value), each(value) == other(value)
        count = lambda pairs: jnp.sum(pairs & is_pair, -1)
        n = group_stats.num_valid(scores)
        rank = (count(is_better) + (count(is_equal) + 1) / 2) / n
        thrift = count(is_better & (each(length) < other(length))) / jnp.maximum(n - 1, 1)
        return _from_values(coefficients, scores, rank + efficiency * thrift)

    return stateless(function, min_rollouts=2)


def _gold_tokens(scores: Scores, by: str) -> tuple[jax.Array, jax.Array]:
    """The log-probabilities [B, M, A], 0 where the mask [B, M, A] or the rollout is padding."""
    mask = scores.require("gold_mask", by) & scores.is_valid[..., None]
    return jnp.where(mask, scores.require("gold_log_probs", by), 0.0), mask


def _from_values(coefficients: Coefficients, scores: Scores, values: jax.Array) -> Coefficients:
    share = jnp.where(scores.is_valid, values, 0.0) / group_stats.num_valid(scores)
    return coefficients._replace(score=share, path=share, log_scale=jnp.zeros_like(share))


def multiply(factor: float, score: bool = True, path: bool = True) -> LossTransform:
    """Multiplies the score, the path or both by a positive number."""
    check_number("factor", factor, 0, float("inf"))

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        return coefficients._replace(
            score=coefficients.score * factor if score else coefficients.score,
            path=coefficients.path * factor if path else coefficients.path,
        )

    return stateless(function)


# --- Powers of P (Prop 4.1) ----------------------------------------------------------------------


def amplify(q: Commitment, weight: Weight = group_stats.log_likelihood) -> LossTransform:
    """Multiplies by wbar^(-q): from the gradient of l_0 to that of l_q (Prop 4.1)."""
    check_number("q", q, 0, 1)

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        scale = group_stats.finite(group_stats.log_mean(weight(scores), scores))
        return coefficients._replace(log_scale=coefficients.log_scale - q * scale)

    return stateless(function)


def attenuate(q: Commitment, weight: Weight = group_stats.log_likelihood) -> LossTransform:
    """Multiplies by wbar^(1-q): from the gradient of l_1 to that of l_q (Prop 4.1)."""
    check_number("q", q, 0, 1)

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        scale = group_stats.finite(group_stats.log_mean(weight(scores), scores))
        return coefficients._replace(log_scale=coefficients.log_scale + (1 - q) * scale)

    return stateless(function)


def jackknife(q: Commitment, weight: Weight = group_stats.log_likelihood) -> LossTransform:
    """GARL's plug-in with its 1/M bias removed: n T - (n-1) mean_j T_{-j} (Quenouille's jackknife).

    T is the plug-in estimate, T_{-j} the same without rollout j, so that for both coefficients
        c_m = w_m (wbar^(-q) - 1/n sum_{j != m} wbar_{-j}^(-q)),
    w_m / M at q = 0. The bias left is O(1/M^2); c_m can be negative: c_m M lies in
    [-2 M^q, (1+q) M^q]. Stands for `rao_blackwell` and `amplify` in a chain. M = 1 is a ValueError.
    """
    check_number("q", q, 0, 1)

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        log_weights = weight(scores)
        mean = group_stats.log_mean(log_weights, scores)  # [B, 1] log wbar
        value = _jackknifed(log_weights, mean, scores, q)
        # As `rao_blackwell` and `amplify` would leave it, to the last bit.
        scale = group_stats.finite(mean)
        scale = jnp.broadcast_to(scale - q * scale, value.shape)
        return coefficients._replace(score=value, path=value, log_scale=scale)

    return stateless(function, min_rollouts=2)


def _jackknifed(
    log_weights: jax.Array, mean: jax.Array, scores: Scores, q: Commitment
) -> jax.Array:
    """[B, M] the jackknife's c_m / wbar^(1-q), without differences of large numbers.

    c_m = share_m wbar^(1-q) (1 - sum_{j != m} expm1(x_j)), x_j = -q log(wbar_{-j} / wbar). Every
    x_j is small, unless rollout j dominates the group.
    """
    # Relative to the largest weight: nothing below can overflow, and ratios are unchanged.
    log_weights = log_weights - group_stats.finite(jnp.max(log_weights, 1, keepdims=True))
    share = group_stats.normalized(log_weights)
    log_ratio = group_stats.log_ratio_of_others(log_weights, scores)
    x = jnp.where(scores.is_valid & ~jnp.isneginf(mean), -q * log_ratio, 0.0)

    # Small x: expm1 and a plain sum. Large x: exp(x_j) may exceed float32 although its product
    # with share_m does not, so that product is formed in logs.
    large = x > 1.0
    small = jnp.where(large, 0.0, jnp.expm1(x))
    small = jnp.sum(small, 1, keepdims=True) - small
    total = group_stats.finite(jax.nn.logsumexp(log_weights, 1, keepdims=True))
    log_large = log_weights - total + group_stats.logsumexp_others(jnp.where(large, x, -jnp.inf))
    others_large = jnp.sum(large, 1, keepdims=True) - large  # expm1(x) = exp(x) - 1: the ones
    return share * (1 - small + others_large) - jnp.exp(log_large)


def jensen(q: Commitment, weight: Weight = group_stats.log_likelihood) -> LossTransform:
    """The gradient of E log_q(wbar) over M rollouts: Jensen's lower bound of log_q P.

        score_m = (wbar^(1-q) - wbar_{-m}^(1-q)) / (1-q),    path_m = wbar^(1-q) w_m / sum w

    Unbiased for the bound at every M, and the bound rises to log_q P as 1/M. The path is GARL's;
    the score is the whole group's log_q minus that of the others, which is a baseline, since it
    does not depend on z_m. At q = 1 it is log wbar - log wbar_{-m} (VIMCO with the arithmetic mean,
    JEPO, 2503.19618 eq 6, 7), at q = 0 that of `rao_blackwell` with its baseline. M = 1 is a
    ValueError.
    """
    check_number("q", q, 0, 1)

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        log_weights = weight(scores)
        mean = group_stats.log_mean(log_weights, scores)  # [B, 1] log wbar
        # (wbar^(1-q) - wbar_{-m}^(1-q)) / (1-q) = wbar^(1-q) * -log_q(wbar_{-m} / wbar): the power
        # goes into log_scale, and log_q has a stable limit at q = 1. Others without any weight
        # would make that limit infinite: they count as e^LEAST_RATIO of the mean.
        log_ratio = group_stats.log_ratio_of_others(log_weights, scores)
        score = -tsallis.log_q(jnp.maximum(log_ratio, group_stats.LEAST_RATIO), q)
        alive = scores.is_valid & ~jnp.isneginf(mean) & ~group_stats.are_equal(log_weights, scores)
        return coefficients._replace(
            score=jnp.where(alive, score, 0.0),
            path=group_stats.normalized(log_weights),
            log_scale=jnp.broadcast_to((1 - q) * group_stats.finite(mean), score.shape),
        )

    return stateless(function, min_rollouts=2)


# --- Baselines and normalisation within a group ---------------------------------------------------


def leave_one_out_baseline(
    q: Commitment, weight: Weight = group_stats.log_likelihood
) -> LossTransform:
    """Subtracts wbar_{-m}^(1-q) / M from the score coefficient (eq 12, Algorithm 1).

    The baseline does not depend on z_m, so the mean is unchanged (Prop 6.2). It is 1/M at q = 1.
    Groups whose weights are all zero keep zero coefficients. M = 1 is a ValueError.
    """
    check_number("q", q, 0, 1)

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        log_weights = weight(scores)
        mean = group_stats.log_mean(log_weights, scores)
        scale = group_stats.finite(mean)
        others = jnp.maximum(group_stats.log_mean_others(log_weights, scores), group_stats.LEAST)
        # Equal weights have the group's mean as their baseline, bit for bit: nothing is to learn
        # from them, and rounding must not look like a signal.
        others = jnp.where(group_stats.are_equal(log_weights, scores), scale, others)
        # score holds c / exp(log_scale), so the baseline is divided by that scale too (the rule in
        # `stateless`): wbar_{-m}^(1-q) as (wbar_{-m} / wbar)^(1-q) times wbar^(1-q), which is
        # the usual log_scale, so that the second bracket is 0 then.
        log_baseline = (1 - q) * (others - scale) + (scale - q * scale - coefficients.log_scale)
        baseline = jnp.exp(log_baseline) / group_stats.num_valid(scores)
        alive = scores.is_valid & ~jnp.isneginf(mean)  # [B, M]
        return coefficients._replace(score=coefficients.score - jnp.where(alive, baseline, 0.0))

    return stateless(function, min_rollouts=2)


def center() -> LossTransform:
    """Subtracts the group's mean from both coefficients.

    M = 1 is a ValueError: minus itself, a single rollout teaches nothing.
    """
    centered = lambda coefficients, scores, **_: _centered(coefficients, scores)
    return stateless(centered, min_rollouts=2)


def center_leave_one_out() -> LossTransform:
    """Subtracts the mean of the *other* rollouts from both coefficients: n/(n-1) times `center`."""

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        centered = _centered(coefficients, scores)
        n = group_stats.num_valid(scores)
        factor = n / jnp.maximum(n - 1, 1)
        return centered._replace(score=centered.score * factor, path=centered.path * factor)

    return stateless(function, min_rollouts=2)


def _centered(coefficients: Coefficients, scores: Scores) -> Coefficients:
    # Within a group log_scale is one number, so the mean can be taken before it is applied.
    return coefficients._replace(
        score=group_stats.deviation(coefficients.score, scores),
        path=group_stats.deviation(coefficients.path, scores),
    )


def scale_by_group_std(eps: float = 1e-6, sample_std: bool = False) -> LossTransform:
    """Divides by the standard deviation of the group's rewards plus `eps` (GRPO).

    Args:
      eps: keeps groups of nearly equal rewards from being blown up.
      sample_std: whether the sum of squares is divided by n - 1, as in TRL and verl, and not by n:
        a factor of 1.016 at n = 32.
    """
    check_number("eps", eps, 0, 1)

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        reward = scores.require("reward", "scale_by_group_std")
        variance = group_stats.group_mean(jnp.square(group_stats.deviation(reward, scores)), scores)
        if sample_std:
            n = group_stats.num_valid(scores)
            variance *= n / jnp.maximum(n - 1, 1)
        std = jnp.sqrt(variance) + eps
        # With eps = 0, a group of equal rewards has std 0; its coefficients are 0 already.
        factor = 1 / jnp.where(std > 0, std, 1.0)
        return coefficients._replace(
            score=coefficients.score * factor, path=coefficients.path * factor
        )

    return stateless(function)


def scale_by_own_std(eps: float = 1e-6) -> LossTransform:
    """Divides by the group's standard deviation of M times the score coefficient, plus `eps`.

    As `scale_by_group_std`, for rewards that are not those of sampled answers.
    """
    check_number("eps", eps, 0, 1)

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        value = coefficients.score * group_stats.num_valid(scores)
        variance = group_stats.group_mean(jnp.square(group_stats.deviation(value, scores)), scores)
        std = jnp.sqrt(variance) + eps * jnp.exp(-coefficients.log_scale)
        factor = 1 / jnp.where(std > 0, std, 1.0)
        return coefficients._replace(
            score=coefficients.score * factor,
            path=coefficients.path * factor,
            log_scale=jnp.zeros_like(coefficients.log_scale),
        )

    return stateless(function)


# --- Normalisation over the batch ----------------------------------------------------------------


def center_batch() -> LossTransform:
    """Subtracts the mean over the *batch's* rollouts from both: the baseline of REINFORCE++."""

    def function(
        coefficients: Coefficients, scores: Scores, *, axis_name: AxisName, **_
    ) -> Coefficients:
        # Coefficients contain 1/n of their group: the mean is one of M times the coefficients.
        n = group_stats.num_valid(scores)
        shift = lambda x: group_stats.batch_deviation(x * n, scores, axis_name) / n
        # It is the true coefficients that are averaged: groups may differ in log_scale.
        true = jnp.exp(coefficients.log_scale)
        return coefficients._replace(
            score=shift(coefficients.score * true),
            path=shift(coefficients.path * true),
            log_scale=jnp.zeros_like(true),
        )

    return stateless(function)


def scale_by_batch_std(eps: float = 1e-6) -> LossTransform:
    """Divides by the standard deviation of the *batch's* rewards plus `eps`.

    A group whose rewards hardly differ is then not blown up to the size of the others, which
    `scale_by_group_std` does (Lite PPO, 2508.08221; REINFORCE++, 2501.03262).
    """
    check_number("eps", eps, 0, 1)

    def function(
        coefficients: Coefficients, scores: Scores, *, axis_name: AxisName, **_
    ) -> Coefficients:
        reward = scores.require("reward", "scale_by_batch_std")
        square = jnp.square(group_stats.batch_deviation(reward, scores, axis_name))
        std = jnp.sqrt(group_stats.batch_mean(square, scores.is_valid, axis_name)) + eps
        factor = 1 / jnp.where(std > 0, std, 1.0)
        return coefficients._replace(
            score=coefficients.score * factor, path=coefficients.path * factor
        )

    return stateless(function)
