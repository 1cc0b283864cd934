"""How q moves over steps: schedules that a config can describe, and a controller that follows P."""

from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from qlog.losses import group_stats
from qlog.losses.checks import check_choice, check_integer, check_number
from qlog.losses.compose import inject_hyperparams, stateful, update
from qlog.losses.types import LossState, LossTransform, Scores

SCHEDULES = ("constant", "linear", "cosine", "step", "adaptive")


class ControllerState(NamedTuple):
    """State of `adaptive_q`."""

    count: jax.Array  # int32 scalar, updates so far
    average: jax.Array  # float32 scalar, moving average of the batches' q, not yet debiased
    inner: LossState  # of the transform that is made for each step's q


def schedule(name: str, q: float, q_end: float, q_steps: int) -> optax.Schedule:
    """q as a function of the step: from `q` at step 0 to `q_end` at step `q_steps` and after.

    'linear' and 'cosine' move gradually; 'step' holds q for `q_steps` steps and then q_end, so that
    q = 1, q_end = 0 is SFT-then-RL as one run.

    Raises:
      TypeError, ValueError: an unknown name, or a value out of range.
    """
    check_choice("q_schedule", name, SCHEDULES[1:4])
    check_number("q", q, 0, 1)
    check_number("q_end", q_end, 0, 1)
    check_integer("q_steps", q_steps)
    if name == "linear":
        return optax.linear_schedule(q, q_end, q_steps)
    if name == "step":
        return lambda step: jnp.where(jnp.asarray(step) < q_steps, q, q_end)

    def cosine(step):
        progress = jnp.clip(step / q_steps, 0.0, 1.0)
        return q_end + (q - q_end) * (1 + jnp.cos(jnp.pi * progress)) / 2

    return cosine


def scheduled(factory: Callable[[jax.Array], LossTransform], q: optax.Schedule) -> LossTransform:
    """`factory(q(step))`; the step is counted in the state, by optax's `inject_hyperparams`."""

    def build(q):  # optax finds what to schedule by the argument's name
        return factory(q)

    return inject_hyperparams(build, hyperparam_dtype=jnp.float32)(q=q)


def q_for_pace(log_p: jax.Array, pace: float) -> jax.Array:
    """The q at which the attenuation P^(1-q) equals `pace`: q = 1 - log(pace) / log P, in [0, 1].

    Then eq 6 reads dp/dt = p^(2-q) ||s||^2 = pace p ||s||^2: a cold start is left in time
    O(log(1/p0) / pace), in the order of q = 1. Once P reaches `pace`, q is 0, which is RL. At P = 0
    it is 1.
    """
    # At P = 1 the ratio is 0/0; any P above `pace` asks for q = 0.
    return jnp.clip(1 - jnp.log(pace) / jnp.minimum(log_p, jnp.log(pace)), 0.0, 1.0)


def adaptive_q(
    factory: Callable[[jax.Array], LossTransform],
    pace: float = 0.8,
    low: float = 0.0,
    high: float = 1.0,
    decay: float = 0.9,
) -> LossTransform:
    """`factory(q)` with q chosen at every step from the batch's estimates of P.

    q is the mean over groups of `q_for_pace`, averaged over steps with `decay` (debiased) and kept
    within [low, high]: high while P is tiny, low once P exceeds `pace`. It reads `scores.log_w`
    whatever weight the estimator uses; a group without any weight asks for q = 1.
    """
    check_number("q_pace", pace, 1e-6, 1 - 1e-6)
    check_number("low", low, 0, 1)
    check_number("high", high, low, 1)
    check_number("decay", decay, 0, 1 - 1e-6)

    def init(scores: Scores) -> ControllerState:
        zero = jnp.zeros((), jnp.float32)
        return ControllerState(jnp.zeros((), jnp.int32), zero, factory(zero).init(scores))

    def update_at_q(coefficients, state, scores, *, key=None, axis_name=None):
        log_p = group_stats.log_mean(group_stats.log_likelihood(scores), scores)[:, 0]
        # The mean of the groups' q, not the q of their mean P: a few easy prompts would hide all
        # the hard ones.
        wanted = q_for_pace(log_p, pace)
        batch_q = group_stats.batch_mean(wanted, jnp.any(scores.is_valid, 1), axis_name)
        # The average starts from 0, so it is divided by the sum of its weights, 1 - decay^count.
        count = cast(jax.Array, optax.safe_increment(state.count))
        average = decay * state.average + (1 - decay) * batch_q
        q = jnp.clip(average / (1 - jnp.float32(decay) ** count), low, high)
        # q is traced here, so the transform is made inside the program; its state does not depend
        # on q, which is why init could make it at q = 0.
        result, inner_state = update(
            factory(q), coefficients, state.inner, scores, key=key, axis_name=axis_name
        )
        return result, ControllerState(count, average, inner_state)

    return stateful(init, update_at_q)
