"""A loss that hands over to a safer one while log P falls, and takes over again when it is back."""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from qlog.losses import group_stats
from qlog.losses.checks import check_number
from qlog.losses.compose import stateful, update
from qlog.losses.gauges import Measured
from qlog.losses.types import AxisName, LossState, LossTransform, Scores

_SLOW = 0.95  # decay of the estimate of how much batches differ: some twenty steps
_FIRST = 5  # steps before anything is compared


class GuardState(NamedTuple):
    """State of `guarded`."""

    count: jax.Array  # int32 scalar, updates so far
    average: jax.Array  # float32 scalar, moving average of the batches' log P, not yet debiased
    last: jax.Array  # float32 scalar, log P of the last batch
    variance: jax.Array  # float32 scalar, moving average of half the squared differences, as above
    best: jax.Array  # float32 scalar, the highest average so far less its error, in nats
    is_on: jax.Array  # bool scalar, whether the fallback has the word
    watched: LossState
    fallback: LossState
    measured: Measured


def guarded(
    watched: LossTransform,
    fallback: LossTransform,
    drop: float = 2.0,
    decay: float = 0.8,
) -> LossTransform:
    """`watched`, and `fallback` while the batches' log P is `drop` nats below its best.

    log P is the mean of log wbar over the groups that have a weight, averaged over steps with
    `decay` (debiased). Since each step has other prompts, that average wavers: its standard error e
    is estimated from what one batch differs from the next. The drop is from the highest
    (average - 3 e) so far to the present (average + 3 e), so that neither a lucky batch before nor
    an unlucky one now counts. Above `drop` nats the fallback gives the coefficients, until half of
    that is made up. Both transforms see every batch, so that a state of theirs goes on.

    Measured, float32 scalars:
      guard: 1 while the fallback has the word.
      guard_drop: the drop, in nats, at least 0.

    Args:
      drop: in nats, above 0.
      decay: of the average, in [0, 1); 0.8 looks back over some five steps.
    """
    check_number("drop", drop, 1e-3, 1e6)
    check_number("decay", decay, 0, 1 - 1e-6)

    def init(scores: Scores) -> GuardState:
        zero = jnp.zeros((), jnp.float32)
        return GuardState(
            count=jnp.zeros((), jnp.int32),
            average=zero,
            last=zero,
            variance=zero,
            best=jnp.full((), -jnp.inf, jnp.float32),
            is_on=jnp.zeros((), bool),
            watched=watched.init(scores),
            fallback=fallback.init(scores),
            measured=Measured({"guard": zero, "guard_drop": zero}),
        )

    def update_both(coefficients, state: GuardState, scores: Scores, *, key=None, axis_name=None):
        # ---- Has log P dropped? ----
        log_p = _batch_log_p(scores, axis_name)
        # A batch that tells nothing changes nothing: neither a NaN may stay in the averages, nor a
        # single answer of probability 0, a thousand nats away, hide the falls of the next steps.
        is_told = jnp.isfinite(log_p)
        log_p = jnp.where(is_told, log_p, state.last)
        count = cast(jax.Array, optax.safe_increment(state.count))
        average = decay * state.average + (1 - decay) * log_p
        now = average / (1 - jnp.float32(decay) ** count)
        # Differences from step to step: a fall of the mean over many steps is no noise.
        half_square = jnp.where(count > 1, jnp.square(log_p - state.last) / 2, 0.0)
        variance = _SLOW * state.variance + (1 - _SLOW) * half_square
        unbiased = variance / (1 - jnp.float32(_SLOW) ** jnp.maximum(count - 1, 1))
        # The squares of the weights of an average with `decay` add up to the fraction.
        error = jnp.sqrt(unbiased * (1 - decay) / (1 + decay))
        # The first steps do not tell yet how much batches differ.
        is_known = count >= _FIRST
        best = jnp.where(is_known, jnp.maximum(state.best, now - 3 * error), state.best)
        lost = jnp.maximum(best - (now + 3 * error), 0.0)
        # A lower threshold to come back, or the two would take turns at every step.
        is_on = lost > jnp.where(state.is_on, drop / 2, drop)

        # ---- The coefficients of the one that has the word ----
        mine, watched_state = update(
            watched, coefficients, state.watched, scores, key=key, axis_name=axis_name
        )
        other, fallback_state = update(
            fallback, coefficients, state.fallback, scores, key=key, axis_name=axis_name
        )
        measured = Measured({"guard": is_on.astype(jnp.float32), "guard_drop": lost})
        seen = GuardState(
            count, average, log_p, variance, best, is_on, watched_state, fallback_state, measured
        )
        before = state._replace(watched=watched_state, fallback=fallback_state)
        after = jax.tree.map(lambda a, b: jnp.where(is_told, a, b), seen, before)
        chosen = jax.tree.map(lambda a, b: jnp.where(after.is_on, a, b), other, mine)
        return chosen, after

    return stateful(init, update_both)


def _batch_log_p(scores: Scores, axis_name: AxisName) -> jax.Array:
    """Mean of log wbar over the batch's groups that have a weight, in nats; NaN where none has."""
    log_mean = group_stats.log_mean(group_stats.log_likelihood(scores), scores)[:, 0]
    alive = jnp.any(scores.is_valid, 1) & jnp.isfinite(log_mean)
    number = group_stats.batch_sum(alive.astype(jnp.float32), axis_name)
    mean = group_stats.batch_mean(log_mean, alive, axis_name)
    return jnp.where(number > 0, mean, jnp.nan)
