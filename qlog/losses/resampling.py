"""PAFT's draw: rationales resampled from the posterior, by their weights."""

import functools

import jax
import jax.numpy as jnp

from qlog.losses import group_stats
from qlog.losses.checks import check_choice, check_integer
from qlog.losses.compose import stateless
from qlog.losses.group_stats import Weight
from qlog.losses.types import AxisName, Coefficients, LossTransform, Scores

RESAMPLING = ("multinomial", "systematic")


def resample_posterior(
    k: int | None = None,
    method: str = "multinomial",
    salt: int = 0,
    weight: Weight = group_stats.log_likelihood,
) -> LossTransform:
    """score = path = n_m / K, n counts of K draws from Categorical(w / sum w): grad l_1 (eq 14).

    Args:
      k: draws per group; None draws as many as the group has valid rollouts.
      method: 'multinomial' (independent draws, as in the paper) or 'systematic' (one uniform number
        for all draws: the same mean, |n_m - K w_m / sum w| < 1, hence less variance).
      salt: distinguishes random parts of one chain, which are all handed the same key.
    """
    check_choice("method", method, RESAMPLING)
    if k is not None:
        check_integer("k", k)

    def function(
        coefficients: Coefficients,
        scores: Scores,
        *,
        key: jax.Array | None,
        axis_name: AxisName,
    ) -> Coefficients:
        if key is None:
            raise TypeError("resample_posterior draws at random: pass key=, a jax PRNG key")
        share = group_stats.normalized(weight(scores))
        if k is None:
            num_draws = group_stats.num_valid(scores)[:, 0]
        else:
            num_draws = jnp.full(share.shape[:1], float(k))
        # A key for each group by its place in the batch: any layout over devices draws the same.
        groups = group_stats.group_index(scores, axis_name)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, salt), groups)
        draw = functools.partial(_frequencies, most=k or share.shape[1], method=method)
        frequency = jax.vmap(draw)(keys, share, num_draws)
        # Without any weight there is nothing to draw from; the group keeps zero coefficients.
        frequency = jnp.where(jnp.sum(share, 1, keepdims=True) > 0, frequency, 0.0)
        return coefficients._replace(
            score=frequency, path=frequency, log_scale=jnp.zeros_like(share)
        )

    return stateless(function)


def _frequencies(
    key: jax.Array, share: jax.Array, num_draws: jax.Array, *, most: int, method: str
) -> jax.Array:
    """[M] n_m / K of one group: K = `num_draws` draws from Categorical(`share`), `most` at most.

    By inversion: points in [0, 1), and how many of them fall into each rollout's interval of the
    cumulated shares.
    """
    index = jnp.arange(most, dtype=jnp.float32)
    is_draw = index < num_draws  # the array has `most` places whatever K is
    if method == "systematic":
        points = (index + jax.random.uniform(key)) / num_draws
    else:
        # 2.0 lies beyond every interval; it also sorts behind the points that count.
        points = jnp.sort(jnp.where(is_draw, jax.random.uniform(key, (most,)), 2.0))
    points = jnp.where(is_draw, points, 2.0)

    # Rounding must neither lose a draw nor give one to a rollout of weight zero. So the interval
    # of the last rollout with a weight, and all after it, end above 1 instead of at the sum.
    last = share.shape[0] - 1 - jnp.argmax(share[::-1] > 0)
    upper = jnp.where(jnp.arange(share.shape[0]) >= last, 1.5, jnp.cumsum(share))
    below = jnp.searchsorted(points, upper, side="left")  # [M] points below each upper end
    return jnp.diff(below, prepend=0) / num_draws
