"""Parts of estimators: transforms of coefficients, to be chained as optax transforms are.

Each part is an `optax.GradientTransformationExtraArgs` whose updates are `Coefficients` and whose
params are `Scores`: `init(scores) -> state`, `update(coefficients, state, scores, *, key, axis_name)`.
Notation: a_m = log w_m, A = log of the group's mean weight wbar (an unbiased estimate of P), A_{-m}
the same over the other rollouts, n the group's valid rollouts (M unless some are padding).
`weight` maps scores to log-weights [B, M]: the gold answer's likelihood unless said otherwise.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from qlog.losses import reduce
from qlog.losses.types import (
    Coefficients,
    LossTransform,
    Scores,
    check_choice,
    check_count,
    check_number,
    check_scores,
)

chain = optax.chain
named_chain = optax.named_chain
AGGREGATIONS = ("sum", "sequence_mean", "token_mean", "constant")
RESAMPLING = ("multinomial", "systematic")


def seed(scores: Scores) -> Coefficients:
    """The coefficients a chain starts from: 1/n for every valid rollout, 0 for padding."""
    check_scores(scores)
    uniform = scores.valid / reduce.num_valid(scores)
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
    result, state = transform.update(seed(scores), state, scores, key=key, axis_name=axis_name)
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

    This is all that a new part needs. `min_rollouts` refuses smaller M, with a ValueError from init.
    """

    def init(scores):
        check_scores(scores)
        if scores.log_w.shape[1] < min_rollouts:
            raise ValueError(
                f"M, the rollouts per prompt, must be at least {min_rollouts} for a leave-one-out "
                f"baseline, got {scores.log_w.shape[1]}"
            )
        return optax.EmptyState()

    def update(coefficients, state, scores=None, *, key=None, axis_name=None, **ignored):
        init(scores)
        return function(coefficients, scores, key=key, axis_name=axis_name), state

    return optax.GradientTransformationExtraArgs(init, update)


# --- What a group's rollouts are worth -----------------------------------------------------------


def rao_blackwell(weight=reduce.log_likelihood) -> LossTransform:
    """score = path = w_m / M: the gradient of l_0 = 1 - P, with the answer summed out (eq 9, q = 0).

    Kept as w_m / sum w with log_scale A.
    """

    def function(coefficients, scores, **_):
        log_weights = weight(scores)
        share = reduce.normalized(log_weights)
        scale = reduce.finite(reduce.log_mean(log_weights, scores))
        return coefficients._replace(
            score=share, path=share, log_scale=jnp.broadcast_to(scale, share.shape)
        )

    return stateless(function)


def resample_posterior(
    k: int | None = None,
    method: str = "multinomial",
    salt: int = 0,
    weight=reduce.log_likelihood,
) -> LossTransform:
    """score = path = n_m / K, n the counts of K draws from Categorical(w / sum w): grad l_1 (eq 14).

    Args:
      k: draws per group; None draws as many as the group has valid rollouts.
      method: 'multinomial' (independent draws, as in the paper) or 'systematic' (one uniform number
        for all draws: the same mean, |n_m - K w_m / sum w| < 1, hence less variance).
      salt: distinguishes random parts of one chain, which are all handed the same key.
    """
    check_choice("method", method, RESAMPLING)
    if k is not None:
        check_count("k", k)

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
        share = reduce.normalized(weight(scores))
        count = reduce.num_valid(scores)[:, 0] if k is None else jnp.full(share.shape[:1], float(k))
        groups = reduce.group_index(scores, axis_name)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, salt), groups)
        frequency = jax.vmap(draw)(keys, share, count)
        frequency = jnp.where(jnp.sum(share, 1, keepdims=True) > 0, frequency, 0.0)
        return coefficients._replace(
            score=frequency, path=frequency, log_scale=jnp.zeros_like(share)
        )

    return stateless(function)


def uniform() -> LossTransform:
    """score = path = 1 / M: every rollout is a demonstration."""
    return stateless(lambda coefficients, scores, **_: seed(scores))


def from_reward() -> LossTransform:
    """score = path = r_m / M, r the reward of the sampled answer (REINFORCE)."""

    def function(coefficients, scores, **_):
        share = jnp.where(scores.valid, scores.reward, 0.0) / reduce.num_valid(scores)
        return coefficients._replace(score=share, path=share, log_scale=jnp.zeros_like(share))

    return stateless(function)


# --- Powers of P (Prop 4.1) ----------------------------------------------------------------------


def amplify(q: ArrayLike, weight=reduce.log_likelihood) -> LossTransform:
    """Multiplies by wbar^(-q): from the gradient of l_0 to that of l_q (Prop 4.1)."""
    check_number("q", q, 0, 1)

    def function(coefficients, scores, **_):
        scale = reduce.finite(reduce.log_mean(weight(scores), scores))
        return coefficients._replace(log_scale=coefficients.log_scale - q * scale)

    return stateless(function)


def attenuate(q: ArrayLike, weight=reduce.log_likelihood) -> LossTransform:
    """Multiplies by wbar^(1-q): from the gradient of l_1 to that of l_q (Prop 4.1)."""
    check_number("q", q, 0, 1)

    def function(coefficients, scores, **_):
        scale = reduce.finite(reduce.log_mean(weight(scores), scores))
        return coefficients._replace(log_scale=coefficients.log_scale + (1 - q) * scale)

    return stateless(function)


# --- Baselines and normalisation within a group ----------------------------------------------------


def leave_one_out_baseline(q: ArrayLike, weight=reduce.log_likelihood) -> LossTransform:
    """Subtracts wbar_{-m}^(1-q) / M from the score coefficient (eq 12, Algorithm 1).

    The baseline does not depend on z_m, so the mean is unchanged (Prop 6.2). It is 1/M at q = 1.
    Groups whose weights are all zero keep zero coefficients. M = 1 is a ValueError.
    """
    check_number("q", q, 0, 1)

    def function(coefficients, scores, **_):
        log_weights = weight(scores)
        mean = reduce.log_mean(log_weights, scores)
        scale = reduce.finite(mean)
        others = jnp.maximum(reduce.log_mean_others(log_weights, scores), reduce.LEAST)
        # wbar_{-m}^(1-q) as (wbar_{-m}/wbar)^(1-q) times wbar^(1-q): both close to the coefficients.
        log_baseline = (1 - q) * (others - scale) + (scale - q * scale - coefficients.log_scale)
        baseline = jnp.exp(log_baseline) / reduce.num_valid(scores)
        alive = scores.valid & ~jnp.isneginf(mean)
        return coefficients._replace(score=coefficients.score - jnp.where(alive, baseline, 0.0))

    return stateless(function, min_rollouts=2)


def center() -> LossTransform:
    """Subtracts the group's mean from both coefficients."""

    def function(coefficients, scores, **_):
        shift = lambda x: jnp.where(scores.valid, x - reduce.group_mean(x, scores), 0.0)
        return coefficients._replace(
            score=shift(coefficients.score), path=shift(coefficients.path)
        )

    return stateless(function)


def center_leave_one_out() -> LossTransform:
    """Subtracts the mean of the *other* rollouts from both coefficients: n/(n-1) times `center`."""
    centre = center()

    def function(coefficients, scores, **_):
        centred, _ = centre.update(coefficients, optax.EmptyState(), scores)
        n = reduce.num_valid(scores)
        factor = n / jnp.maximum(n - 1, 1)
        return centred._replace(score=centred.score * factor, path=centred.path * factor)

    return stateless(function, min_rollouts=2)


def scale_by_group_std(eps: float = 1e-6) -> LossTransform:
    """Divides by the population standard deviation of the group's rewards plus `eps` (GRPO)."""
    check_number("eps", eps, 0, 1)

    def function(coefficients, scores, **_):
        deviation = scores.reward - reduce.group_mean(scores.reward, scores)
        std = jnp.sqrt(reduce.group_mean(jnp.square(deviation), scores)) + eps
        factor = 1 / jnp.where(std > 0, std, 1.0)
        return coefficients._replace(
            score=coefficients.score * factor, path=coefficients.path * factor
        )

    return stateless(function)


def normalize_by_bound(q: ArrayLike) -> LossTransform:
    """Divides by M^q, the bound of w_m / wbar^q, so that effective rewards lie in [0, 1].

    Algorithms 1 and 2 do this; it rescales the learning rate by a constant that depends on q.
    """
    check_number("q", q, 0, 1)

    def function(coefficients, scores, **_):
        bound = q * jnp.log(reduce.num_valid(scores))
        return coefficients._replace(log_scale=coefficients.log_scale - bound)

    return stateless(function)


# --- Edits ---------------------------------------------------------------------------------------


def zero_pathwise() -> LossTransform:
    """Sets the path coefficient to 0: the ablation of the pathwise term that the paper asks for."""

    def function(coefficients, scores, **_):
        return coefficients._replace(path=jnp.zeros_like(coefficients.path))

    return stateless(function)


def clip_coefficients(limit: float) -> LossTransform:
    """Clips the effective rewards, M times the true coefficients, to [-limit, limit]."""
    check_number("limit", limit, 0, float("inf"))

    def function(coefficients, scores, **_):
        log_bound = jnp.log(jnp.float32(limit) / reduce.num_valid(scores)) - coefficients.log_scale
        bound = jnp.exp(log_bound)
        return coefficients._replace(
            score=jnp.clip(coefficients.score, -bound, bound),
            path=jnp.clip(coefficients.path, -bound, bound),
        )

    return stateless(function)


def aggregate(mode: str = "sum", max_tokens: int | None = None) -> LossTransform:
    """How tokens are averaged: scales a sequence's coefficients, and so each of its tokens.

    With A_m the coefficient times M, L_m the sequence's tokens, and the mean over prompts outside:
      'sum'            1/M sum_m A_m sum_t log p_t: the policy gradient itself.
      'sequence_mean'  1/M sum_m A_m / L_m sum_t log p_t: GRPO as published.
      'token_mean'     all tokens of the batch weigh the same (DAPO).
      'constant'       1/(M max_tokens) sum_m A_m sum_t log p_t (Dr. GRPO).
    """
    check_choice("aggregation", mode, AGGREGATIONS)
    if mode == "constant":
        if max_tokens is None:
            raise ValueError("aggregation='constant' needs max_tokens, an integer of at least 1")
        check_count("max_tokens", max_tokens)

    def function(coefficients, scores, *, axis_name, **_):
        length = jnp.where(scores.valid, scores.num_tokens, 0).astype(jnp.float32)
        if mode == "sum":
            return coefficients
        if mode == "sequence_mean":
            factor = 1 / jnp.maximum(length, 1.0)
        elif mode == "constant":
            factor = 1 / jnp.float32(max_tokens)
        else:
            prompts = reduce.batch_sum(jnp.any(scores.valid, 1).astype(jnp.float32), axis_name)
            tokens = jnp.maximum(reduce.batch_sum(length, axis_name), 1.0)
            factor = reduce.num_valid(scores) * prompts / tokens
        return coefficients._replace(
            score=coefficients.score * factor,
            path=coefficients.path * factor,
            token_weight=coefficients.token_weight * factor,
        )

    return stateless(function)


def where_groups(
    predicate: Callable[[Scores], jax.Array], then: LossTransform, otherwise: LossTransform
) -> LossTransform:
    """`then` for the groups where `predicate(scores)`, bool [B], is True, `otherwise` elsewhere.

    Both run on the whole batch and keep their own state. Example: PAFT where P is above a threshold,
    GARL elsewhere: `where_groups(p_hat_above(0.1), paft(0.75), garl(0.75))`.
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


def p_hat_above(threshold: float, weight=reduce.log_likelihood) -> Callable[[Scores], jax.Array]:
    """A predicate for `where_groups`: the groups whose estimate of P is above `threshold`."""
    check_number("threshold", threshold, 0, 1)
    return lambda scores: reduce.log_mean(weight(scores), scores)[:, 0] > jnp.log(threshold)
