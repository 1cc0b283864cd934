"""How parts compose: where a chain starts, how it runs, and choosing between parts by group."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from qlog.losses import group_stats
from qlog.losses.checks import check_number
from qlog.losses.types import (
    AxisName,
    Coefficients,
    LossState,
    LossTransform,
    Scores,
    Update,
    check_scores,
)

# optax's own functions, with the types that they have on loss transforms.
chain = cast(Callable[..., LossTransform], optax.chain)
named_chain = cast(Callable[..., LossTransform], optax.named_chain)
inject_hyperparams = cast(Callable[..., Callable[..., LossTransform]], optax.inject_hyperparams)


def initial_coefficients(scores: Scores) -> Coefficients:
    """The coefficients a chain starts from: 1/n for every valid rollout, 0 for padding."""
    check_scores(scores)
    uniform = scores.is_valid / group_stats.num_valid(scores)
    return Coefficients(uniform, uniform, jnp.zeros_like(uniform), uniform)


def coefficients(
    transform: LossTransform,
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
    # log w may come from the very parameters that the surrogate is differentiated with respect to.
    scores = jax.tree.map(jax.lax.stop_gradient, scores)
    result, state = update(
        transform, initial_coefficients(scores), state, scores, key=key, axis_name=axis_name
    )
    # The one place where powers of P leave the logs: by now score and path are bounded, so that a
    # tiny scale gives zeros and never NaN. A part may leave anything on padding; it ends here.
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
    transform: LossTransform,
    coefficients: Coefficients,
    state: LossState,
    scores: Scores,
    *,
    key: jax.Array | None,
    axis_name: AxisName,
) -> tuple[Coefficients, LossState]:
    """`transform.update`, for a plain optax transform too, which takes no `key` and `axis_name`."""
    supported = cast(LossTransform, optax.with_extra_args_support(cast(Any, transform)))
    return supported.update(coefficients, state, scores, key=key, axis_name=axis_name)


def stateful(init: Callable[[Scores], LossState], update: Update) -> LossTransform:
    """A transform from `init(scores)` and `update(coefficients, state, scores, key=, axis_name=)`.

    Both are called with checked scores only. Those of `init` may be shapes without values.
    """

    def checked_init(scores: Scores) -> LossState:
        return init(check_scores(scores))

    # optax.chain passes three positional arguments, and to every part all that was given by name.
    def checked_update(coefficients, state, scores=None, *, key=None, axis_name=None, **ignored):
        return update(coefficients, state, check_scores(scores), key=key, axis_name=axis_name)

    build = cast(Callable[..., LossTransform], optax.GradientTransformationExtraArgs)
    return build(checked_init, checked_update)


def stateless(function: Callable[..., Coefficients], min_rollouts: int = 1) -> LossTransform:
    """A transform without state from `function(coefficients, scores, key=, axis_name=)`.

    This is all that a new part needs. It reads `scores.is_valid` and, for any other field,
    `scores.require("reward", by="its name")`, so that a missing one is named. Smaller M than
    `min_rollouts` is a ValueError.

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

    def init(scores: Scores) -> optax.EmptyState:
        if scores.shape[1] < min_rollouts:
            raise ValueError(
                f"M, the rollouts per prompt, must be at least {min_rollouts} for statistics of "
                f"groups, got {scores.shape[1]}"
            )
        return optax.EmptyState()

    def update_stateless(coefficients, state, scores, *, key=None, axis_name=None):
        init(scores)  # the state may come from a batch of another M
        return function(coefficients, scores, key=key, axis_name=axis_name), state

    return stateful(init, update_stateless)


def where_groups(
    predicate: Callable[[Scores], jax.Array],
    then: LossTransform,
    otherwise: LossTransform,
) -> LossTransform:
    """`then` for the groups where `predicate(scores)`, bool [B], is True, `otherwise` elsewhere.

    Both run on the whole batch and keep their own state. PAFT where P is above a threshold, GARL
    elsewhere: `where_groups(p_hat_above(0.1), paft(0.75), garl(0.75))`.
    """

    def init(scores: Scores) -> tuple[LossState, LossState]:
        return then.init(scores), otherwise.init(scores)

    def update_both(coefficients, state, scores, *, key=None, axis_name=None):
        mask = predicate(scores)
        if mask.shape != scores.shape[:1] or mask.dtype != jnp.bool_:
            raise ValueError(
                f"predicate must give bool [B] = {scores.shape[:1]}, got {mask.dtype} {mask.shape}"
            )
        run = functools.partial(update, key=key, axis_name=axis_name)
        yes, yes_state = run(then, coefficients, state[0], scores)
        no, no_state = run(otherwise, coefficients, state[1], scores)
        # log_scale is chosen too, so a group's scale belongs to its score and path.
        chosen = jax.tree.map(lambda a, b: jnp.where(mask[:, None], a, b), yes, no)
        return chosen, (yes_state, no_state)

    return stateful(init, update_both)


def p_hat_above(
    threshold: float, weight: group_stats.Weight = group_stats.log_likelihood
) -> Callable[[Scores], jax.Array]:
    """A predicate for `where_groups`: the groups whose estimate of P is above `threshold`."""
    check_number("threshold", threshold, 0, 1)
    return lambda scores: group_stats.log_mean(weight(scores), scores)[:, 0] > jnp.log(threshold)
