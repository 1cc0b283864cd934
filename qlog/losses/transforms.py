"""Parts of estimators: transforms of coefficients, to be chained as optax transforms are.

Each part is an `optax.GradientTransformationExtraArgs` whose updates are `Coefficients` and whose
params are `Scores`: `init(scores) -> state` and
`update(coefficients, state, scores, *, key, axis_name) -> (coefficients, state)`.
Notation: a_m = log w_m, A = log of the group's mean weight wbar (an unbiased estimate of P), A_{-m}
the same over the other rollouts, n the group's valid rollouts (M unless some are padding).
`weight` maps scores to log-weights [B, M]: the gold answer's likelihood unless said otherwise.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qlog.losses import group_stats
from qlog.losses.checks import check_choice, check_integer, check_number
from qlog.losses.compose import initial_coefficients, stateless
from qlog.losses.types import Coefficients, LossTransform, Scores

RESAMPLING = ("multinomial", "systematic")


# --- What a group's rollouts are worth -----------------------------------------------------------


def rao_blackwell(weight=group_stats.log_likelihood) -> LossTransform:
    """score = path = w_m / M: the gradient of l_0 = 1 - P, the answer summed out (eq 9, q = 0).

    Kept as w_m / sum w with log_scale A.
    """

    def function(coefficients, scores, **_):
        log_weights = weight(scores)
        share = group_stats.normalized(log_weights)
        scale = group_stats.finite(group_stats.log_mean(log_weights, scores))
        return coefficients._replace(
            score=share, path=share, log_scale=jnp.broadcast_to(scale, share.shape)
        )

    return stateless(function)


def resample_posterior(
    k: int | None = None,
    method: str = "multinomial",
    salt: int = 0,
    weight=group_stats.log_likelihood,
) -> LossTransform:
    """score = path = n_m / K, n counts of K draws from Categorical(w / sum w): grad l_1 (eq 14).

    Args:
      k: draws per group; None draws as many as the group has valid rollouts.
      method: 'multinomial' (independent draws, as in the paper) or 'systematic' (one uniform number
        for all draws: the same mean, |n_m - K w_m / sum w| < 1, hence less variance).
      salt: distinguishes random parts of one chain, which are all handed the same key.
    """
    check_choice("method", method, RESAMPLING)
    if k is not None:
        check_integer("k", k)

    def draw(key, share, count):
        size = share.shape[0] if k is None else k
        index = jnp.arange(size, dtype=jnp.float32)
        if method == "systematic":
            points = (index + jax.random.uniform(key)) / count
        else:
            points = jnp.sort(jnp.where(index < count, jax.random.uniform(key, (size,)), 2.0))
        last = share.shape[0] - 1 - jnp.argmax(share[::-1] > 0)
        # Rounding must neither lose a draw nor give one to a rollout of weight zero.
        upper = jnp.where(jnp.arange(share.shape[0]) >= last, 1.5, jnp.cumsum(share))
        below = jnp.searchsorted(jnp.where(index < count, points, 2.0), upper, side="left")
        return jnp.diff(below, prepend=0) / count

    def function(coefficients, scores, *, key, axis_name):
        if key is None:
            raise TypeError("resample_posterior draws at random: pass key=, a jax PRNG key")
        share = group_stats.normalized(weight(scores))
        count = (
            group_stats.num_valid(scores)[:, 0]
            if k is None
            else jnp.full(share.shape[:1], float(k))
        )
        groups = group_stats.group_index(scores, axis_name)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, salt), groups)
        frequency = jax.vmap(draw)(keys, share, count)
        frequency = jnp.where(jnp.sum(share, 1, keepdims=True) > 0, frequency, 0.0)
        return coefficients._replace(
            score=frequency, path=frequency, log_scale=jnp.zeros_like(share)
        )

    return stateless(function)


def uniform() -> LossTransform:
    """score = path = 1 / M: every rollout is a demonstration."""
    return stateless(lambda coefficients, scores, **_: initial_coefficients(scores))


def from_reward() -> LossTransform:
    """score = path = r_m / M, r the reward of the sampled answer (REINFORCE)."""

    def function(coefficients, scores, **_):
        reward = scores.require("reward", "from_reward")
        share = jnp.where(scores.is_valid, reward, 0.0) / group_stats.num_valid(scores)
        return coefficients._replace(score=share, path=share, log_scale=jnp.zeros_like(share))

    return stateless(function)


# --- Powers of P (Prop 4.1) ----------------------------------------------------------------------


def amplify(q: ArrayLike, weight=group_stats.log_likelihood) -> LossTransform:
    """Multiplies by wbar^(-q): from the gradient of l_0 to that of l_q (Prop 4.1)."""
    check_number("q", q, 0, 1)

    def function(coefficients, scores, **_):
        scale = group_stats.finite(group_stats.log_mean(weight(scores), scores))
        return coefficients._replace(log_scale=coefficients.log_scale - q * scale)

    return stateless(function)


def attenuate(q: ArrayLike, weight=group_stats.log_likelihood) -> LossTransform:
    """Multiplies by wbar^(1-q): from the gradient of l_1 to that of l_q (Prop 4.1)."""
    check_number("q", q, 0, 1)

    def function(coefficients, scores, **_):
        scale = group_stats.finite(group_stats.log_mean(weight(scores), scores))
        return coefficients._replace(log_scale=coefficients.log_scale + (1 - q) * scale)

    return stateless(function)


def jackknife(q: ArrayLike, weight=group_stats.log_likelihood) -> LossTransform:
    """GARL's plug-in with its 1/M bias removed: n T - (n-1) mean_j T_{-j} (Quenouille's jackknife).

    T is the plug-in estimate, T_{-j} the same without rollout j, so that for both coefficients
        c_m = w_m (wbar^(-q) - 1/n sum_{j != m} wbar_{-j}^(-q)),
    w_m / M at q = 0. The bias left is O(1/M^2); c_m can be negative: c_m M lies in
    [-2 M^q, (1+q) M^q]. Stands for `rao_blackwell` and `amplify` in a chain. M = 1 is a ValueError.
    """
    check_number("q", q, 0, 1)

    def function(coefficients, scores, **_):
        log_weights = weight(scores)
        mean = group_stats.log_mean(log_weights, scores)
        log_weights = log_weights - group_stats.finite(jnp.max(log_weights, 1, keepdims=True))
        share = group_stats.normalized(log_weights)
        n = group_stats.num_valid(scores)
        others = jnp.maximum(group_stats.log_mean_others(log_weights, scores), group_stats.LEAST)
        # c_m = share_m wbar^(1-q) (1 - sum_{j != m} expm1(x_j)), x_j = -q log(wbar_{-j} / wbar):
        # a sum of n small numbers, so each is computed from share_j unless j dominates the group.
        log_ratio = jnp.where(
            share < 0.5,
            jnp.log1p(-jnp.minimum(share, 0.5)) - jnp.log1p(-1 / jnp.maximum(n, 2)),
            others - group_stats.finite(group_stats.log_mean(log_weights, scores)),
        )
        x = jnp.where(scores.is_valid & ~jnp.isneginf(mean), -q * log_ratio, 0.0)
        # A dominant rollout's x_j may exceed float32's exp where share_m falls below it: in logs.
        large = x > 1.0
        small = jnp.where(large, 0.0, jnp.expm1(x))
        small = jnp.sum(small, 1, keepdims=True) - small
        total = group_stats.finite(jax.nn.logsumexp(log_weights, 1, keepdims=True))
        log_large = (
            log_weights - total + group_stats.logsumexp_others(jnp.where(large, x, -jnp.inf))
        )
        others_large = jnp.sum(large, 1, keepdims=True) - large
        value = share * (1 - small + others_large) - jnp.exp(log_large)
        scale = jnp.broadcast_to((1 - q) * group_stats.finite(mean), share.shape)
        return coefficients._replace(score=value, path=value, log_scale=scale)

    return stateless(function, min_rollouts=2)


# --- Baselines and normalisation within a group ---------------------------------------------------


def leave_one_out_baseline(q: ArrayLike, weight=group_stats.log_likelihood) -> LossTransform:
    """Subtracts wbar_{-m}^(1-q) / M from the score coefficient (eq 12, Algorithm 1).

    The baseline does not depend on z_m, so the mean is unchanged (Prop 6.2). It is 1/M at q = 1.
    Groups whose weights are all zero keep zero coefficients. M = 1 is a ValueError.
    """
    check_number("q", q, 0, 1)

    def function(coefficients, scores, **_):
        log_weights = weight(scores)
        mean = group_stats.log_mean(log_weights, scores)
        scale = group_stats.finite(mean)
        others = jnp.maximum(group_stats.log_mean_others(log_weights, scores), group_stats.LEAST)
        # wbar_{-m}^(1-q) as (wbar_{-m}/wbar)^(1-q) times wbar^(1-q), which is the usual log_scale.
        log_baseline = (1 - q) * (others - scale) + (scale - q * scale - coefficients.log_scale)
        baseline = jnp.exp(log_baseline) / group_stats.num_valid(scores)
        alive = scores.is_valid & ~jnp.isneginf(mean)
        return coefficients._replace(score=coefficients.score - jnp.where(alive, baseline, 0.0))

    return stateless(function, min_rollouts=2)


def center() -> LossTransform:
    """Subtracts the group's mean from both coefficients."""
    return stateless(lambda coefficients, scores, **_: _centered(coefficients, scores))


def center_leave_one_out() -> LossTransform:
    """Subtracts the mean of the *other* rollouts from both coefficients: n/(n-1) times `center`."""

    def function(coefficients, scores, **_):
        centered = _centered(coefficients, scores)
        n = group_stats.num_valid(scores)
        factor = n / jnp.maximum(n - 1, 1)
        return centered._replace(score=centered.score * factor, path=centered.path * factor)

    return stateless(function, min_rollouts=2)


def _centered(coefficients: Coefficients, scores: Scores) -> Coefficients:
    shift = lambda x: jnp.where(scores.is_valid, x - group_stats.group_mean(x, scores), 0.0)
    return coefficients._replace(score=shift(coefficients.score), path=shift(coefficients.path))


def scale_by_group_std(eps: float = 1e-6) -> LossTransform:
    """Divides by the population standard deviation of the group's rewards plus `eps` (GRPO)."""
    check_number("eps", eps, 0, 1)

    def function(coefficients, scores, **_):
        reward = scores.require("reward", "scale_by_group_std")
        deviation = reward - group_stats.group_mean(reward, scores)
        std = jnp.sqrt(group_stats.group_mean(jnp.square(deviation), scores)) + eps
        factor = 1 / jnp.where(std > 0, std, 1.0)
        return coefficients._replace(
            score=coefficients.score * factor, path=coefficients.path * factor
        )

    return stateless(function)
