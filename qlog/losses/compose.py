"""How parts compose: where a chain starts, how it runs, and choosing between parts by group."""

from collections.abc import Callable
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import optax

from qlog.losses import group_stats
from qlog.losses.checks import check_number
from qlog.losses.types import Coefficients, LossState, LossTransform, Scores, check_scores

chain = optax.chain
named_chain = optax.named_chain
inject_hyperparams = optax.inject_hyperparams

AxisName = str | tuple[str, ...] | None  # mapped axes that split the prompts; None under jit


class Update(Protocol):
    """A part's update: its coefficients and new state, for a batch of groups."""

    def __call__(
        self,
        coefficients: Coefficients,
        state: LossState,
        scores: Scores,
        *,
        key: jax.Array | None,
        axis_name: AxisName,
    ) -> tuple[Coefficients, LossState]: ...


def initial_coefficients(scores: Scores) -> Coefficients:
    """The coefficients a chain starts from: 1/n for every valid rollout, 0 for padding."""
    check_scores(scores)
    uniform = scores.is_valid / group_stats.num_valid(scores)
    return Coefficients(uniform, uniform, jnp.zeros_like(uniform), uniform)


def coefficients(
    transform: optax.GradientTransformation,
    scores: Scores,
    state: LossState,
    *,
    key: jax.Array | None = None,
    axis_name: AxisName = None,
) -> tuple[Coefficients, LossState]:
    """Runs `transform` on a batch: `(Coefficients with log_scale folded in, new state)`.

    Args:
      scores: arrays [B, M]; global ones under jit, local ones under shard_map, pmap or vmap.
      state: from `transform.init(scores)` or the previous call.
      key: a PRNG key, new for every step; needed by estimators that draw (PAFT).
      axis_name: mapped axis (or axes) over which the batch's prompts are split, None under jit.

    No gradient flows through the result; padding has coefficient 0.

    Raises:
      TypeError: scores of a wrong dtype or without values, or a needed key is missing.
      ValueError: scores of a wrong shape, or a part reads a field of `scores` that is missing.
    """
    check_scores(scores)
    if any(isinstance(value, jax.ShapeDtypeStruct) for value in scores):
        raise TypeError("scores must hold arrays, got shapes: abstract_scores are for init only")
    scores = jax.tree.map(jax.lax.stop_gradient, scores)
    result, state = update(
        transform, initial_coefficients(scores), state, scores, key=key, axis_name=axis_name
    )
    scale = jnp.exp(result.log_scale)
    keep = lambda x: jnp.where(scores.is_valid, x, 0.0)
    folded = Coefficients(
        score=keep(result.score * scale),
        path=keep(result.path * scale),
        log_scale=jnp.zeros_like(scale),
        token_weight=keep(result.token_weight),
    )
    return folded, state


def update(
    transform: optax.GradientTransformation,
    coefficients: Coefficients,
    state: LossState,
    scores: Scores,
    **extra: Any,
) -> tuple[Coefficients, LossState]:
    """`transform.update` with the types of losses, for parts that run another part.

    `extra` is `key` and `axis_name`; a plain optax transform, which reads neither, may be given.
    """
    run = optax.with_extra_args_support(transform).update
    # optax's types know trees of arrays only; every part maps Coefficients to Coefficients.
    return cast(tuple[Coefficients, LossState], run(coefficients, state, scores, **extra))


def stateful(init: Callable[[Scores], LossState], update: Update) -> LossTransform:
    """A transform from `init(scores)` and `update(coefficients, state, scores, key=, axis_name=)`.

    Both are called with checked scores only; `init` may get shapes in place of arrays.
    """

    def checked_init(scores):
        check_scores(scores)
        return init(scores)

    def checked_update(updates, state, params=None, *, key=None, axis_name=None, **ignored):
        check_scores(params)
        return update(updates, state, params, key=key, axis_name=axis_name)

    return LossTransform(checked_init, checked_update)


def stateless(function: Callable[..., Coefficients], min_rollouts: int = 1) -> LossTransform:
    """A transform without state from `function(coefficients, scores, key=, axis_name=)`.

    This is all that a new part needs. Smaller M than `min_rollouts` is a ValueError from init.

        +------------------------------------------------------------------------------------+
        | The rule of log_scale. What a part receives stands for                             |
        |                                                                                    |
        |     c = score * exp(log_scale)      and      d = path * exp(log_scale).            |
        |                                                                                    |
        | To multiply both by a factor f > 0 that may be tiny or huge, such as a power of P, |
        | add log f to log_scale. To multiply by numbers near 1, or to change score and path |
        | differently, change them and leave log_scale. To add a to the true c, add          |
        | a * exp(-log_scale) to score; to compare c with a bound, scale the bound likewise. |
        | log_scale stays finite: a coefficient of zero is score = 0, not log_scale = -inf.  |
        | `losses.coefficients` multiplies once, at the end of the chain.                    |
        +------------------------------------------------------------------------------------+
    """

    def init(scores):
        if scores.shape[1] < min_rollouts:
            raise ValueError(
                f"M, the rollouts per prompt, must be at least {min_rollouts} for leave-one-out "
                f"statistics, got {scores.shape[1]}"
            )
        return optax.EmptyState()

    def update(coefficients, state, scores, *, key, axis_name):
        init(scores)  # a state may come from a batch of another M
        return function(coefficients, scores, key=key, axis_name=axis_name), state

    return stateful(init, update)


def where_groups(
    predicate: Callable[[Scores], jax.Array],
    then: optax.GradientTransformation,
    otherwise: optax.GradientTransformation,
) -> LossTransform:
    """`then` for the groups where `predicate(scores)`, bool [B], is True, `otherwise` elsewhere.

    Both run on the whole batch and keep their own state. PAFT where P is above a threshold, GARL
    elsewhere: `where_groups(p_hat_above(0.1), paft(0.75), garl(0.75))`.
    """

    def init(scores):
        return then.init(scores), otherwise.init(scores)

    def update_both(coefficients, state, scores, **extra):
        mask = predicate(scores)
        if mask.shape != scores.shape[:1] or mask.dtype != jnp.bool_:
            raise ValueError(
                f"predicate must give bool [B] = {scores.shape[:1]}, got {mask.dtype} {mask.shape}"
            )
        yes, yes_state = update(then, coefficients, state[0], scores, **extra)
        no, no_state = update(otherwise, coefficients, state[1], scores, **extra)
        # log_scale is chosen with the rest, so each group keeps the scale of its own estimator.
        chosen = jax.tree.map(lambda a, b: jnp.where(mask[:, None], a, b), yes, no)
        return chosen, (yes_state, no_state)

    return stateful(init, update_both)


def p_hat_above(
    threshold: float, weight: group_stats.Weight = group_stats.log_likelihood
) -> Callable[[Scores], jax.Array]:
    """A predicate for `where_groups`: the groups whose estimate of P is above `threshold`."""
    check_number("threshold", threshold, 0, 1)
    return lambda scores: group_stats.log_mean(weight(scores), scores)[:, 0] > jnp.log(threshold)
