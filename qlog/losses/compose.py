"""How parts compose: where a chain starts, how it runs, and choosing between parts by group."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qlog.losses import group_stats
from qlog.losses.types import Coefficients, LossTransform, Scores, check_number, check_scores

chain = optax.chain
named_chain = optax.named_chain
inject_hyperparams = optax.inject_hyperparams


def initial_coefficients(scores: Scores) -> Coefficients:
    """The coefficients a chain starts from: 1/n for every valid rollout, 0 for padding."""
    check_scores(scores)
    uniform = scores.valid / group_stats.num_valid(scores)
    return Coefficients(uniform, uniform, jnp.zeros_like(uniform), uniform)


def coefficients(
    transform: LossTransform, scores: Scores, state, *, key=None, axis_name=None
) -> tuple[Coefficients, object]:
    """Runs `transform` on a batch: `(Coefficients with log_scale folded in, new state)`.

    Args:
      scores: arrays [B, M]; global ones under jit, local ones under shard_map, pmap or vmap.
      state: what `transform.init(scores)` or the previous call gave.
      key: a PRNG key, new for every step; needed by estimators that draw (PAFT).
      axis_name: mapped axis (or axes) over which the batch's prompts are split, None under jit.

    No gradient flows through the result; padding has coefficient 0. Raises TypeError or ValueError
    for scores of wrong shape or dtype, and TypeError where a needed key is missing.
    """
    check_scores(scores)
    scores = jax.tree.map(jax.lax.stop_gradient, scores)
    result, state = transform.update(
        initial_coefficients(scores), state, scores, key=key, axis_name=axis_name
    )
    scale = jnp.exp(result.log_scale)
    keep = lambda x: jnp.where(scores.valid, x, 0.0)
    folded = Coefficients(
        keep(result.score * scale),
        keep(result.path * scale),
        jnp.zeros_like(scale),
        keep(result.token_weight),
    )
    return folded, state


def stateless(function: Callable[..., Coefficients], min_rollouts: int = 1) -> LossTransform:
    """A transform without state from `function(coefficients, scores, key=, axis_name=)`.

    This is all that a new part needs. Smaller M than `min_rollouts` is a ValueError from init.
    """

    def init(scores):
        check_scores(scores)
        if scores.log_w.shape[1] < min_rollouts:
            raise ValueError(
                f"M, the rollouts per prompt, must be at least {min_rollouts} for leave-one-out "
                f"statistics, got {scores.log_w.shape[1]}"
            )
        return optax.EmptyState()

    def update(coefficients, state, scores=None, *, key=None, axis_name=None, **ignored):
        init(scores)
        return function(coefficients, scores, key=key, axis_name=axis_name), state

    return optax.GradientTransformationExtraArgs(init, update)


def where_groups(
    predicate: Callable[[Scores], jax.Array], then: LossTransform, otherwise: LossTransform
) -> LossTransform:
    """`then` for the groups where `predicate(scores)`, bool [B], is True, `otherwise` elsewhere.

    Both run on the whole batch and keep their own state. PAFT where P is above a threshold, GARL
    elsewhere: `where_groups(p_hat_above(0.1), paft(0.75), garl(0.75))`.
    """

    def init(scores):
        check_scores(scores)
        return (then.init(scores), otherwise.init(scores))

    def update(coefficients, state, scores=None, **extra):
        check_scores(scores)
        mask = predicate(scores)
        if mask.shape != scores.log_w.shape[:1] or mask.dtype != jnp.bool_:
            raise ValueError(
                f"predicate must give bool [B] = {scores.log_w.shape[:1]}, "
                f"got {mask.dtype} {mask.shape}"
            )
        yes, yes_state = optax.with_extra_args_support(then).update(
            coefficients, state[0], scores, **extra
        )
        no, no_state = optax.with_extra_args_support(otherwise).update(
            coefficients, state[1], scores, **extra
        )
        chosen = jax.tree.map(lambda a, b: jnp.where(mask[:, None], a, b), yes, no)
        return chosen, (yes_state, no_state)

    return optax.GradientTransformationExtraArgs(init, update)


def p_hat_above(
    threshold: float, weight=group_stats.log_likelihood
) -> Callable[[Scores], jax.Array]:
    """A predicate for `where_groups`: the groups whose estimate of P is above `threshold`."""
    check_number("threshold", threshold, 0, 1)
    return lambda scores: group_stats.log_mean(weight(scores), scores)[:, 0] > jnp.log(threshold)
