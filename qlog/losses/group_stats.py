"""Masked statistics of groups `[B, M]` and of batches, on one device or over a named axis."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qlog.losses.types import AxisName, Scores

Weight = Callable[[Scores], jax.Array]  # scores to log-weights [B, M], -inf on padding

LEAST = -1e30  # a finite log 0: times zero it is zero, where -inf would give NaN
LEAST_RATIO = -1e4  # the least log of a probability, or a ratio of two, that a reward is made of


# --- Weights of a rollout -------------------------------------------------------------------------


def log_likelihood(scores: Scores) -> jax.Array:
    """[B, M] log w_m = log p(y*|x*, z_m), -inf on padding."""
    log_w = scores.require("log_w", "log_likelihood")
    return jnp.where(scores.is_valid, log_w, -jnp.inf)


def log_reward(scores: Scores) -> jax.Array:
    """[B, M] log of the reward of the sampled answer, -inf on padding: exact match as a weight."""
    reward = scores.require("reward", "log_reward")
    return jnp.where(scores.is_valid, jnp.log(jnp.maximum(reward, 0.0)), -jnp.inf)


def power_of(weight: Weight, exponent: float) -> Weight:
    """The weight w^t, t = `exponent` > 0."""
    return lambda scores: exponent * weight(scores)


def log_risk(beta: float) -> Weight:
    """The weight e^(beta r) of a reward r, any number."""

    def weight(scores: Scores) -> jax.Array:
        reward = scores.require("reward", "log_risk")
        return jnp.where(scores.is_valid, beta * reward, -jnp.inf)

    return weight


# --- Statistics of a group ------------------------------------------------------------------------


def num_valid(scores: Scores) -> jax.Array:
    """[B, 1] float32 number of valid rollouts of each group, at least 1."""
    return jnp.maximum(jnp.sum(scores.is_valid, 1, keepdims=True), 1).astype(jnp.float32)


def group_mean(values: jax.Array, scores: Scores) -> jax.Array:
    """[B, 1] mean of `values` [B, M] over the valid rollouts of each group."""
    return jnp.sum(jnp.where(scores.is_valid, values, 0.0), 1, keepdims=True) / num_valid(scores)


def are_equal(values: jax.Array, scores: Scores) -> jax.Array:
    """[B, 1] bool: all valid rollouts of the group have the same of `values` [B, M]."""
    largest = jnp.max(jnp.where(scores.is_valid, values, -jnp.inf), 1, keepdims=True)
    smallest = jnp.min(jnp.where(scores.is_valid, values, jnp.inf), 1, keepdims=True)
    return largest <= smallest  # a group without valid rollouts counts as equal


def deviation(values: jax.Array, scores: Scores) -> jax.Array:
    """[B, M] `values` minus the group's mean; exactly 0 where all are equal, and on padding."""
    # The mean of equal numbers is that number only up to rounding: thirty-two times float32(0.1)
    # have a mean that differs in the last bits. What is left of it must not reach a division by
    # their standard deviation, which is as small.
    keep = scores.is_valid & ~are_equal(values, scores)
    return jnp.where(keep, values - group_mean(values, scores), 0.0)


def log_mean(log_weights: jax.Array, scores: Scores) -> jax.Array:
    """[B, 1] log of the mean weight, A = logsumexp(a) - log M; -inf where every weight is 0."""
    return jax.nn.logsumexp(log_weights, 1, keepdims=True) - jnp.log(num_valid(scores))


def finite(log_values: jax.Array) -> jax.Array:
    """`log_values` with -inf replaced by 0: the scale of a group without any weight."""
    return jnp.where(jnp.isneginf(log_values), 0.0, log_values)


def normalized(log_weights: jax.Array) -> jax.Array:
    """[B, M] w_m / sum w, all zero where every weight is 0."""
    peak = finite(jnp.max(log_weights, 1, keepdims=True))
    weights = jnp.exp(log_weights - peak)
    total = jnp.sum(weights, 1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def logsumexp_others(log_weights: jax.Array) -> jax.Array:
    """[B, M] logsumexp over the other rollouts of the group, -inf where they are all -inf.

    Entry m leaves out rollout m. log(total - w_m) would lose all digits where w_m is most of the
    total; this keeps them.
    """
    size = log_weights.shape[1]
    is_top = jnp.argmax(log_weights, 1, keepdims=True) == jnp.arange(size)
    peak = jnp.max(log_weights, 1, keepdims=True)

    # The largest weight is most of the total: subtracting it would leave rounding errors. So the
    # entry of that rollout is a second logsumexp, over all the others.
    rest = jnp.where(is_top, -jnp.inf, log_weights)
    others_of_top = jax.nn.logsumexp(rest, 1, keepdims=True)

    # For any other rollout the largest stays in the sum, with weight 1 relative to the peak. Here
    # w_m is subtracted from the sum of the rest, whose rounding is small compared with that 1.
    relative = jnp.exp(rest - finite(peak))
    without = jnp.maximum(jnp.sum(relative, 1, keepdims=True) - relative, 0.0)
    return jnp.where(is_top, others_of_top, peak + jnp.log1p(without))


def log_mean_others(log_weights: jax.Array, scores: Scores) -> jax.Array:
    """[B, M] A_{-m}: log of the mean weight of the group's other valid rollouts."""
    others = jnp.maximum(num_valid(scores) - 1, 1)
    return logsumexp_others(log_weights) - jnp.log(others)


def log_ratio_of_others(log_weights: jax.Array, scores: Scores) -> jax.Array:
    """[B, M] log(wbar_{-m} / wbar), about `LEAST` where the others have no weight.

    Exact to float32's relative precision where it is near 0, as it is in large groups.
    """
    share = normalized(log_weights)
    n = num_valid(scores)
    log_weights = log_weights - finite(jnp.max(log_weights, 1, keepdims=True))
    # log(wbar_{-m} / wbar) = log(1 - share_m) - log(1 - 1/n): exact where share_m is small, while
    # a difference of two logs would lose its digits. A dominant m has share_m near 1, where the
    # mean of the others must be computed from the others.
    others = jnp.maximum(log_mean_others(log_weights, scores), LEAST)
    return jnp.where(
        share < 0.5,
        jnp.log1p(-jnp.minimum(share, 0.5)) - jnp.log1p(-1 / jnp.maximum(n, 2)),
        others - finite(log_mean(log_weights, scores)),
    )


# --- Statistics of the batch ----------------------------------------------------------------------
# Under jit an array is the whole batch. Under shard_map, pmap and vmap it is a device's part, and
# `axis_name` names the axes to add over.


def batch_sum(values: jax.Array, axis_name: AxisName = None) -> jax.Array:
    """Sum of all `values`, over the devices of `axis_name` too when it is given."""
    total = jnp.sum(values)
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def batch_max(values: jax.Array, axis_name: AxisName = None) -> jax.Array:
    """Maximum of all `values`, over the devices of `axis_name` too when it is given."""
    highest = jnp.max(values)
    return highest if axis_name is None else jax.lax.pmax(highest, axis_name)


def batch_mean(values: jax.Array, where: jax.Array, axis_name: AxisName = None) -> jax.Array:
    """Mean of the `values` where `where` is True, 0 if there are none; over `axis_name` too."""
    total = batch_sum(jnp.where(where, values, 0.0), axis_name)
    # Sum and number are added separately: a mean of the devices' means would weigh them equally.
    return total / jnp.maximum(batch_sum(where.astype(jnp.float32), axis_name), 1.0)


def batch_deviation(values: jax.Array, scores: Scores, axis_name: AxisName = None) -> jax.Array:
    """[B, M] `values` minus the mean over the batch's valid rollouts; see `deviation`."""
    valid = scores.is_valid
    largest = batch_max(jnp.where(valid, values, -jnp.inf), axis_name)
    smallest = -batch_max(jnp.where(valid, -values, -jnp.inf), axis_name)
    mean = batch_mean(values, valid, axis_name)
    return jnp.where(valid & (largest > smallest), values - mean, 0.0)


def group_index(scores: Scores, axis_name: AxisName = None) -> jax.Array:
    """[B] index of each group in the whole batch, so that draws do not depend on its layout."""
    num_groups = scores.shape[0]
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * num_groups
    return first + jnp.arange(num_groups)
