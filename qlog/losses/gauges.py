"""Measurements that transforms keep in their state, by name."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qlog.losses import group_stats
from qlog.losses.compose import stateful
from qlog.losses.types import Coefficients, LossTransform


class Measured(NamedTuple):
    """State of a measuring part: scalars of the latest batch."""

    values: dict[str, jax.Array]


def measure(function: Callable[..., dict[str, jax.Array]]) -> LossTransform:
    """Keeps `function(coefficients, scores, axis_name)`, a dict of scalars, in state.

    The coefficients pass unchanged: put it anywhere in a chain to see them there.
    """

    def evaluate(coefficients, scores, axis_name):
        values = function(coefficients, scores, axis_name)
        return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}

    def init(scores):
        blank = Coefficients(*[jnp.zeros(scores.shape)] * 4)
        shapes = jax.eval_shape(lambda c, s: evaluate(c, s, None), blank, scores)
        return Measured({name: jnp.zeros((), jnp.float32) for name in shapes})

    def update(coefficients, state, scores, *, key, axis_name):
        return coefficients, Measured(evaluate(coefficients, scores, axis_name))

    return stateful(init, update)


def measurements(state) -> dict[str, jax.Array]:
    """All measurements kept in a loss state, name -> scalar; later parts win over earlier ones."""
    found = {}
    is_leaf = lambda node: isinstance(node, Measured)
    for node in jax.tree.leaves(state, is_leaf=is_leaf):
        if is_leaf(node):
            found.update(node.values)
    return found


def measure_groups(
    q: ArrayLike | None,
    normalized: bool = True,
    weight: group_stats.Weight | None = group_stats.log_likelihood,
) -> LossTransform:
    """The standard measurements of an estimator, over the batch's valid groups.

    q: the commitment of this step, when the estimator has one.
    p_hat, log_p_hat: means over groups of wbar and of log wbar (the latter where wbar > 0).
    ess: mean effective sample size of the weights, (sum w)^2 / sum w^2, in [1, M].
    no_signal: share of groups all of whose coefficients are zero in float32.
    effective_reward, effective_reward_max: mean and maximum over groups of max_m c_m / M^q, with
      c_m = M times the score coefficient, the centred weight of GARL (the paper's Figure 3).
    """

    def function(coefficients, scores, axis_name):
        is_group = jnp.any(scores.is_valid, 1)
        n = group_stats.num_valid(scores)
        values = {} if q is None else {"q": q}
        if weight is not None:
            log_weights = weight(scores)
            mean = group_stats.log_mean(log_weights, scores)[:, 0]
            alive = is_group & ~jnp.isneginf(mean)
            share = group_stats.normalized(log_weights)
            ess = 1 / jnp.where(alive, jnp.sum(jnp.square(share), 1), 1.0)
            values["p_hat"] = group_stats.batch_mean(jnp.exp(mean), is_group, axis_name)
            values["log_p_hat"] = group_stats.batch_mean(mean, alive, axis_name)
            values["ess"] = group_stats.batch_mean(ess, alive, axis_name)
        scale = jnp.exp(coefficients.log_scale)
        largest = jnp.maximum(jnp.abs(coefficients.score), jnp.abs(coefficients.path)) * scale
        silent = is_group & (jnp.max(jnp.where(scores.is_valid, largest, 0.0), 1) == 0)
        values["no_signal"] = group_stats.batch_mean(
            silent.astype(jnp.float32), is_group, axis_name
        )
        bound = 1.0 if q is None or normalized else n**q
        effective = jnp.where(scores.is_valid, coefficients.score * scale * n / bound, -jnp.inf)
        top = jnp.where(is_group, jnp.max(effective, 1), -jnp.inf)
        values["effective_reward"] = group_stats.batch_mean(
            group_stats.finite(top), is_group, axis_name
        )
        values["effective_reward_max"] = group_stats.finite(group_stats.batch_max(top, axis_name))
        return values

    return measure(function)
