"""Averages over the subsets of a group: unbiased estimates of pass@k and of what is made of it.

Of a group's n valid rollouts, rollout m has C(n-1, j) subsets of j others. A mean over all of them
needs no subset to be drawn or listed: for products a recurrence over the rollouts gives it, for
maxima the order of the rewards.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qlog.losses import group_stats
from qlog.losses.checks import check_integer
from qlog.losses.compose import stateless
from qlog.losses.group_stats import Weight
from qlog.losses.types import Coefficients, LossTransform, Scores

# --- Products of failures: pass@k on w -----------------------------------------------------------


def pass_at_k(k: int, weight: Weight = group_stats.log_likelihood) -> LossTransform:
    """Multiplies by k times the mean of prod (1 - w_j) over all subsets of k - 1 others.

    After `rao_blackwell` the mean is the gradient of pass@k, 1 - (1-P)^k, for every M >= k (PKPO,
    2505.15201, with w for r). The factor does not depend on z_m, so a baseline may come before it.
    A group with fewer than k valid rollouts gets zeros.
    """
    check_integer("k", k)
    return _by_failures([0.0] * (k - 1) + [float(k)], weight)


def truncated_likelihood(order: int, weight: Weight = group_stats.log_likelihood) -> LossTransform:
    """Multiplies by sum_{k <= T} of the mean of prod (1 - w_j) over subsets of k - 1 others.

    After `rao_blackwell` the mean is the gradient of -sum_{k <= T} (1-P)^k / k, the expansion of
    log P to order T (MaxRL, 2602.02710, with w for r), for every M >= T.

    Args:
      order: T.
      weight: maps scores to log w.
    """
    check_integer("order", order)
    return _by_failures([1.0] * order, weight)


def _by_failures(factors: Sequence[float], weight: Weight) -> LossTransform:
    """Multiplies by sum_j factors[j] * (mean over subsets of j others of prod (1 - w))."""

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        failure = -jnp.expm1(weight(scores))  # [B, M] 1 - w, exact for w near 0 and near 1
        means = _mean_products(failure, scores.is_valid, len(factors))
        factor = jnp.sum(means * jnp.array(factors, jnp.float32), -1)
        return coefficients._replace(
            score=coefficients.score * factor, path=coefficients.path * factor
        )

    return stateless(function, min_rollouts=len(factors))


def _mean_products(values: jax.Array, is_valid: jax.Array, num_orders: int) -> jax.Array:
    """[B, M, J] entry j: the mean over subsets of j other valid rollouts of the values' product.

    0 where there are fewer than j others. An elementary symmetric polynomial over C(i, j) is such
    a mean: it stays in [0, 1], while the two grow beyond float32. With one more value u,

        mean_j(i) = ((i - j) mean_j(i-1) + j u mean_{j-1}(i-1)) / i,

    sums of positive terms, in which nothing cancels.
    """
    num_rollouts = values.shape[1]
    order = jnp.arange(num_orders, dtype=jnp.float32)

    def add(carry: tuple[jax.Array, jax.Array], rollout: jax.Array):
        means, size = carry  # [B, M, J]; [B, M, 1] how many values each entry has seen
        # Every rollout m has a recurrence of its own, which passes over m itself.
        is_other = (jnp.arange(num_rollouts) != rollout) & is_valid[:, rollout, None]  # [B, M]
        larger = size + 1
        lower = jnp.pad(means[..., :-1], ((0, 0), (0, 0), (1, 0)))
        value = values[:, rollout, None, None]
        grown = jnp.maximum(larger - order, 0.0) * means + order * value * lower
        is_other = is_other[..., None]
        return (
            jnp.where(is_other, grown / larger, means),
            jnp.where(is_other, larger, size),
        ), None

    # The mean over the one subset of no values is the empty product, 1.
    empty = jnp.zeros((*values.shape, num_orders)).at[..., 0].set(1.0)
    values = jnp.where(is_valid, values, 0.0)
    # Under shard_map a carry must vary over devices as what is added to it does.
    start = empty + 0.0 * values[..., None], 0.0 * values[..., None]
    (means, _), _ = jax.lax.scan(add, start, jnp.arange(num_rollouts))
    return means


# --- Maxima of rewards: max@k --------------------------------------------------------------------


def max_at_k(k: int, baseline: bool = True) -> LossTransform:
    """score = path = k/M times the mean over subsets S of k - 1 others of max(r_m, max S).

    Its mean is the gradient of the expected best of k rewards, for every M >= k: pass@k for rewards
    of 0 and 1 (PKPO, 2505.15201). With the baseline each subset's term is max(r_m, max S) - max S,
    what r_m adds to it: max S does not depend on rollout m. k = 1 has no such subset, and the mean
    of the others as its baseline.
    """
    check_integer("k", k)

    def function(coefficients: Coefficients, scores: Scores, **_) -> Coefficients:
        reward = jnp.where(
            scores.is_valid, scores.require("reward", "max_at_k"), 0.0
        )  # what padding holds, NaN too, must not reach the products below
        n = group_stats.num_valid(scores)
        # [B, M, M] over pairs (m, j): how often j is the best of S, and the term if it is.
        share = _share_of_best(reward, scores, k - 1)
        mine, best = reward[:, :, None], reward[:, None, :]
        term = jnp.maximum(mine - best, 0.0) if baseline else jnp.maximum(mine, best)
        value = k / n * jnp.sum(share * term, -1)
        return coefficients._replace(score=value, path=value, log_scale=jnp.zeros_like(value))

    return stateless(function, min_rollouts=k)


def _share_of_best(reward: jax.Array, scores: Scores, size: int) -> jax.Array:
    """[B, M, M] entry (m, j): the share of subsets of `size` rollouts other than m that j tops."""
    num_rollouts = reward.shape[1]
    # Places in ascending order, padding last. Ties are broken by index: either gives the same max.
    ordered = jnp.argsort(jnp.where(scores.is_valid, reward, jnp.inf), 1, stable=True)
    place = jnp.argsort(ordered, 1)  # [B, M]
    # Among the rollouts other than m, j has one fewer below it if m is below it.
    below = place[:, None, :] - (place[:, :, None] < place[:, None, :])  # [B, M, M]
    num_valid = jnp.sum(scores.is_valid, 1)  # [B]
    shares = jnp.asarray(_best_shares(num_rollouts, size))[num_valid]  # [B, M], by place
    found = jnp.take_along_axis(shares[:, None, :], below, -1)
    is_pair = scores.is_valid[:, :, None] & scores.is_valid[:, None, :]
    return jnp.where(is_pair & ~jnp.eye(num_rollouts, dtype=bool), found, 0.0)


@functools.cache
def _best_shares(num_rollouts: int, size: int) -> np.ndarray:
    """[M+1, M] C(place, size-1) / C(n-1, size) for n valid rollouts: float32, from float64.

    The share of the subsets of `size` of n - 1 rollouts whose best is at `place`, from 0.
    """
    shares = np.zeros((num_rollouts + 1, num_rollouts))
    for n in range(size + 1, num_rollouts + 1):
        # From the top place down: C(p-1, s-1) = C(p, s-1) (p-s+1) / p. The top one has s / (n-1).
        shares[n, n - 2] = size / (n - 1)
        for place in range(n - 2, size - 1, -1):
            shares[n, place - 1] = shares[n, place] * (place - size + 1) / place
    return shares.astype(np.float32)
