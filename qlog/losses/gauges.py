"""Measurements that transforms keep in their state, by name."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qlog.losses import group_stats
from qlog.losses.compose import stateful
from qlog.losses.types import AxisName, Coefficients, Commitment, LossState, LossTransform, Scores

Values = dict[str, jax.Array]  # name to float32 scalar


class Measured(NamedTuple):
    """State of a measuring part."""

    values: Values  # of the latest batch; zeros before the first


def measure(function: Callable[[Coefficients, Scores, AxisName], Values]) -> LossTransform:
    """Keeps `function(coefficients, scores, axis_name)`, a dict of scalars, in its state.

    The coefficients pass unchanged: put it anywhere in a chain to see them there.
    """

    def evaluate(coefficients, scores, axis_name):
        values = function(coefficients, scores, axis_name)
        return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}

    def init(scores: Scores) -> Measured:
        # Only the names are wanted, so nothing is computed. The scores may be shapes only.
        blank = Coefficients(*[jnp.zeros(scores.shape)] * 4)
        names = jax.eval_shape(lambda c, s: evaluate(c, s, None), blank, scores)
        return Measured({name: jnp.zeros((), jnp.float32) for name in names})

    def update(coefficients, state, scores, *, key=None, axis_name=None):
        return coefficients, Measured(evaluate(coefficients, scores, axis_name))

    return stateful(init, update)


def measurements(state: LossState) -> Values:
    """All measurements kept in a loss state, name -> scalar; later parts win over earlier ones."""
    found = {}
    is_leaf = lambda node: isinstance(node, Measured)
    for node in jax.tree.leaves(state, is_leaf=is_leaf):
        if is_leaf(node):
            found.update(node.values)
    return found


# What `measure_groups` measures, where the estimator has it.
OF_GROUPS = frozenset(
    {"p_hat", "log_p_hat", "ess", "no_signal", "effective_reward", "effective_reward_max"}
)


def measure_groups(
    q: Commitment | None,
    normalized: bool = True,
    weight: group_stats.Weight | None = group_stats.log_likelihood,
) -> LossTransform:
    """The standard measurements of an estimator, over the batch's valid groups.

    Measured, float32 scalars:
      q: the commitment of this step, where the estimator has one.
      p_hat: mean over groups of wbar, the group's estimate of P.
      log_p_hat: mean of log wbar, over the groups where wbar > 0.
      ess: mean effective sample size of the weights, (sum w)^2 / sum w^2, in [1, M].
      no_signal: share of groups all of whose coefficients are zero in float32.
      effective_reward: mean over groups of max_m c_m / M^q, with c_m = M times the score
        coefficient, the centred weight of GARL (the paper's Figure 3).
      effective_reward_max: its maximum over groups.

    Args:
      q: as above; None leaves it out.
      normalized: whether the coefficients are divided by M^q already.
      weight: maps scores to log w [B, M]; None leaves out p_hat, log_p_hat and ess.
    """

    def function(coefficients: Coefficients, scores: Scores, axis_name: AxisName) -> Values:
        is_group = jnp.any(scores.is_valid, 1)  # [B], False for prompts that are padding
        n = group_stats.num_valid(scores)
        values = {} if q is None else {"q": jnp.asarray(q)}
        if weight is not None:
            values |= _weight_values(weight(scores), scores, is_group, axis_name)
        scale = jnp.exp(coefficients.log_scale)

        # A group is silent where float32 rounds all of its coefficients to zero.
        largest = jnp.maximum(jnp.abs(coefficients.score), jnp.abs(coefficients.path)) * scale
        silent = is_group & (jnp.max(jnp.where(scores.is_valid, largest, 0.0), 1) == 0)
        values["no_signal"] = group_stats.batch_mean(
            silent.astype(jnp.float32), is_group, axis_name
        )

        # max_m c_m / M^q; the division is done already where the chain normalises.
        bound = 1.0 if q is None or normalized else n**q
        effective = jnp.where(scores.is_valid, coefficients.score * scale * n / bound, -jnp.inf)
        top = jnp.where(is_group, jnp.max(effective, 1), -jnp.inf)
        values["effective_reward"] = group_stats.batch_mean(
            group_stats.finite(top), is_group, axis_name
        )
        values["effective_reward_max"] = group_stats.finite(group_stats.batch_max(top, axis_name))
        return values

    return measure(function)


def _weight_values(
    log_weights: jax.Array, scores: Scores, is_group: jax.Array, axis_name: AxisName
) -> Values:
    """p_hat, log_p_hat and ess of `measure_groups`."""
    mean = group_stats.log_mean(log_weights, scores)[:, 0]
    alive = is_group & ~jnp.isneginf(mean)  # [B], some weight is positive
    share = group_stats.normalized(log_weights)
    ess = 1 / jnp.where(alive, jnp.sum(jnp.square(share), 1), 1.0)
    return {
        "p_hat": group_stats.batch_mean(jnp.exp(mean), is_group, axis_name),
        "log_p_hat": group_stats.batch_mean(mean, alive, axis_name),
        "ess": group_stats.batch_mean(ess, alive, axis_name),
    }
