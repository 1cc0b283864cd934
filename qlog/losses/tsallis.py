"""The q-logarithm and what it does to a gradient, from log-probabilities.

Every function takes log-probabilities (0 down to -1e4 and -inf) rather than probabilities, works
in float32, and is exact at q = 0 and q = 1. `q` is the commitment, a number or array in [0, 1],
possibly traced. All arguments broadcast against each other.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qlog.losses.checks import check_number

_LEAST = -1e18  # a finite log 0 whose square is still a float32


def _prepare(name: str, value: ArrayLike, q: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """`value` and `q` in float32; TypeError or ValueError unless both are real and q in [0, 1]."""
    check_number("q", q, 0, 1)
    for label, argument in ((name, value), ("q", q)):
        if not jnp.issubdtype(jnp.result_type(argument), jnp.number):
            raise TypeError(f"{label} must be real, got {jnp.result_type(argument)}")
    return jnp.asarray(value, jnp.float32), jnp.asarray(q, jnp.float32)


def _psi(x: jax.Array) -> jax.Array:
    """(x e^x - expm1(x)) / x^2, by its Taylor series near 0, where the difference cancels."""
    # Both branches of a jnp.where are computed, and differentiated: each gets an argument at which
    # it is harmless where the other one is chosen.
    near = jnp.abs(x) < 0.5
    far = jnp.where(near, 1.0, x)
    x = jnp.where(near, x, 0.0)
    # sum_k (k+1) x^k / (k+2)!, by Horner's rule from the highest power down.
    series = jnp.zeros_like(x)
    for k, factorial in (
        (7, 362880),
        (6, 40320),
        (5, 5040),
        (4, 720),
        (3, 120),
        (2, 24),
        (1, 6),
        (0, 2),
    ):
        series = series * x + (k + 1) / factorial
    return jnp.where(near, series, (far * jnp.exp(far) - jnp.expm1(far)) / far / far)


# The derivative with respect to q is a difference of two nearly equal numbers around q = 1, and at
# log P = -inf it would be NaN. So both derivatives are written out below.
@jax.custom_jvp
def _log_q(log_p: jax.Array, q: jax.Array) -> jax.Array:
    s = 1 - q
    safe = jnp.where(s == 0, 1.0, s)
    return jnp.where(s == 0, log_p, jnp.expm1(safe * log_p) / safe)


@_log_q.defjvp
def _log_q_jvp(primals, tangents):
    log_p, q = primals
    bounded = jnp.maximum(log_p, _LEAST)
    # With l = log p: d/dl = e^((1-q) l), and d/dq = -l^2 psi((1-q) l).
    x = (1 - q) * bounded
    d_log_p = jnp.exp(x) * tangents[0]
    d_q = -jnp.square(bounded) * _psi(x) * tangents[1]
    return _log_q(log_p, q), d_log_p + d_q


def log_q(log_p: ArrayLike, q: ArrayLike) -> jax.Array:
    """log_q(p) = (p^(1-q) - 1) / (1 - q) (eq 1), log p at q = 1. float32, from log p.

    Derivatives: p^(1-q) with respect to log p, and the analytic one with respect to q.
    """
    log_p, q = jnp.broadcast_arrays(*_prepare("log_p", log_p, q))
    return _log_q(log_p, q)


def log_exp_q(value: ArrayLike, q: ArrayLike) -> jax.Array:
    """log exp_q(v) = log(1 + (1-q) v) / (1 - q): the inverse of `log_q`, as a log-probability."""
    value, q = jnp.broadcast_arrays(*_prepare("value", value, q))
    s = 1 - q
    x = s * value
    # log1p(x) / x, by its series where x is near 0, q = 1 included: value and gradient are exact.
    near = jnp.abs(x) < 1e-4
    far = jnp.where(near, 1.0, x)
    ratio = jnp.where(near, 1 - x / 2 + x * x / 3, jnp.log1p(far) / far)
    return value * ratio


def exp_q(value: ArrayLike, q: ArrayLike) -> jax.Array:
    """exp_q(v) = (1 + (1-q) v)^(1/(1-q)), exp(v) at q = 1: the probability p with log_q(p) = v."""
    return jnp.exp(log_exp_q(value, q))


def loss(log_p: ArrayLike, q: ArrayLike) -> jax.Array:
    """l_q = -log_q P (eq 3), per example: 1 - P at q = 0, -log P at q = 1."""
    return -log_q(log_p, q)


def j_q(log_p: ArrayLike, q: ArrayLike, valid: ArrayLike | None = None) -> jax.Array:
    """J_Q = mean of -log_q P over examples (eq 3); `valid` (bool) marks the examples that count."""
    each = loss(log_p, q)
    return jnp.mean(each) if valid is None else jnp.mean(each, where=jnp.asarray(valid, bool))


def log_amplification(log_p: ArrayLike, q: ArrayLike) -> jax.Array:
    """log of P^(-q), the factor on the RL gradient grad l_0 (Prop 4.1). Finite unless P = 0 < q."""
    log_p, q = _prepare("log_p", log_p, q)
    return jnp.where(q == 0, 0.0, -q * jnp.where(q == 0, 0.0, log_p))


def amplification(log_p: ArrayLike, q: ArrayLike) -> jax.Array:
    """P^(-q) (Prop 4.1); inf where it exceeds float32, hence the log form."""
    return jnp.exp(log_amplification(log_p, q))


def log_attenuation(log_p: ArrayLike, q: ArrayLike) -> jax.Array:
    """log of P^(1-q), the factor on the fine-tuning gradient grad l_1 (Prop 4.1)."""
    log_p, q = _prepare("log_p", log_p, q)
    return jnp.where(q == 1, 0.0, (1 - q) * jnp.where(q == 1, 0.0, log_p))


def attenuation(log_p: ArrayLike, q: ArrayLike) -> jax.Array:
    """P^(1-q) (Prop 4.1), in [0, 1]; 1 at q = 1 whatever P."""
    return jnp.exp(log_attenuation(log_p, q))
