"""What the theory of the family predicts, as pure functions to plot and to check against.

float32 arrays that broadcast; probabilities are given as logs where they may be tiny.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from qlog.losses import tsallis
from qlog.losses.checks import check_integer, check_number

_PANELS = 256


def escape_rate(log_p: ArrayLike, q: ArrayLike, score_norm: ArrayLike = 1.0) -> jax.Array:
    """dp/dt = p^(2-q) ||s||^2 under gradient flow (eq 6), s the gradient of log p."""
    check_number("q", q, 0, 1)
    return jnp.exp((2 - q) * jnp.asarray(log_p, jnp.float32)) * jnp.square(score_norm)


def sigmoid_escape_time(log_p0: ArrayLike, log_p1: ArrayLike, q: ArrayLike) -> jax.Array:
    """Time for p = sigmoid(theta) to flow from p0 to p1: integral of du/(u^(2-q)(1-u)^2) (eq 15).

    Gauss-Legendre in logit u, 256 panels: relative error below 1e-4 for 1e-30 <= p0, p1 <= 0.999.
    Raises ValueError unless p0 <= p1 < 1 where these are concrete.
    """
    check_number("q", q, 0, 1)
    check_number("log_p1", log_p1, -float("inf"), -1e-6)
    log_p0, log_p1, q = jnp.broadcast_arrays(
        *(jnp.asarray(x, jnp.float32) for x in (log_p0, log_p1, q))
    )
    if not isinstance(log_p0, Tracer) and bool(jnp.any(log_p0 > log_p1)):
        raise ValueError(f"log_p0 must be at most log_p1 = {log_p1}, got {log_p0}")
    nodes, weights = (jnp.asarray(x, jnp.float32) for x in np.polynomial.legendre.leggauss(4))
    # In logit x of u: du = u (1-u) dx, so the integrand is u^(q-1) / (1-u), smooth at both ends.
    logit = lambda log_u: log_u - jnp.log(-jnp.expm1(log_u))
    start, stop = logit(log_p0)[..., None, None], logit(log_p1)[..., None, None]
    position = (jnp.arange(_PANELS)[:, None] + (nodes + 1) / 2) / _PANELS
    x = start + (stop - start) * position
    log_integrand = (q[..., None, None] - 1) * jax.nn.log_sigmoid(x) - jax.nn.log_sigmoid(-x)
    width = (stop - start)[..., 0, 0] / _PANELS / 2
    return width * jnp.sum(weights * jnp.exp(log_integrand), (-2, -1))


def escape_time_order(log_p0: ArrayLike, q: ArrayLike) -> jax.Array:
    """(p0^-(1-q) - 1) / (1-q), log(1/p0) at q = 1: order of the escape time (Theorems 5.1, 5.2)."""
    return tsallis.log_q(-jnp.asarray(log_p0, jnp.float32), q)


def escort(log_alpha: ArrayLike, q: ArrayLike) -> jax.Array:
    """The minimiser of sum_j alpha_j (-log_q theta_j) over distributions: theta_j ~ alpha_j^(1/q).

    Theorem 3.1. `log_alpha` [..., J]; at q = 0 all mass is on the largest alpha, shared among ties.
    """
    check_number("q", q, 0, 1)
    log_alpha = jnp.asarray(log_alpha, jnp.float32)
    gap = log_alpha - jnp.max(log_alpha, -1, keepdims=True)
    q = jnp.maximum(jnp.asarray(q, jnp.float32), 1e-30)
    return jax.nn.softmax(jnp.maximum(gap / q[..., None], -1e30), axis=-1)


def dispersion(log_p: ArrayLike, q: ArrayLike) -> dict[str, jax.Array]:
    """The price of unequal P over examples [N] (Prop B.1): J_Q >= -log_q(mean P).

    Returns float32 scalars by name: 'j_q', 'bound' = -log_q(mean P), 'excess' = their difference,
    and 'second_order', the expansion of the excess, q/2 Pbar^(-q-1) Var(P). Equality at q = 0.
    """
    log_p = jnp.asarray(log_p, jnp.float32)
    if log_p.ndim != 1:
        raise ValueError(f"log_p must have shape [N], got {log_p.shape}")
    log_mean = jax.nn.logsumexp(log_p) - jnp.log(log_p.size)
    j_q, bound = tsallis.j_q(log_p, q), tsallis.loss(log_mean, q)
    relative = jnp.mean(jnp.square(jnp.expm1(log_p - log_mean)))
    second_order = jnp.asarray(q / 2 * jnp.exp((1 - q) * log_mean) * relative)
    return dict(j_q=j_q, bound=bound, excess=j_q - bound, second_order=second_order)


def noise_rate(eta: ArrayLike, noise: ArrayLike, q: ArrayLike) -> jax.Array:
    """d eta/dt = eps eta^-q - (1-eps) (1-eta)^-q, eta the probability given to a wrong label.

    Gradient flow, in the probability itself, of (1-eps) l_q(1-eta) + eps l_q(eta): a share
    eps = `noise` of an example's labels is wrong (Prop C.2). At q = 0 it is 2 eps - 1 < 0.
    """
    check_number("q", q, 0, 1)
    check_number("noise", noise, 0, 0.5)
    eta = jnp.asarray(eta, jnp.float32)
    wrong = tsallis.amplification(jnp.log(eta), q)
    right = tsallis.amplification(jnp.log1p(-eta), q)
    return jnp.asarray(noise * wrong - (1 - noise) * right)


def noise_fitting_time(eta: ArrayLike, noise: ArrayLike, q: ArrayLike) -> jax.Array:
    """eta^(q+1) / ((q+1) eps): time from 0 to eta, far below equilibrium (Prop C.2)."""
    check_number("q", q, 0, 1)
    check_number("eta", eta, 0, 1)
    check_number("noise", noise, 1e-30, 0.5)
    return jnp.asarray(eta, jnp.float32) ** (q + 1) / ((q + 1) * noise)


def noise_equilibrium(noise: ArrayLike, q: ArrayLike) -> jax.Array:
    """eta at rest: eta / (1-eta) = (eps / (1-eps))^(1/q) (Prop C.2); 0 at q = 0."""
    check_number("noise", noise, 0, 0.5)
    noise = jnp.asarray(noise, jnp.float32)
    return escort(jnp.stack([jnp.log(noise), jnp.log1p(-noise)], -1), q)[..., 0]


def gradient_flow(
    loss: Callable[[jax.Array], jax.Array],
    start: ArrayLike,
    num_steps: int,
    step: float = 0.02,
    max_dt: float = float("inf"),
) -> tuple[jax.Array, jax.Array]:
    """Integrates d theta/dt = -grad loss(theta) by Runge-Kutta 4: (times [T+1], thetas [T+1, ...]).

    Args:
      loss: of theta, a scalar.
      start: theta at time 0.
      num_steps: T.
      step: the distance that theta moves in one step. It is not a time, since plateaus last for
        a time of 1/p0.
      max_dt: limits the time of a step near a point of rest.
    """
    check_integer("num_steps", num_steps)
    check_number("step", step, 1e-6, 10)
    start = jnp.asarray(start, jnp.float32)
    velocity = lambda theta: -jax.grad(loss)(theta)

    def advance(carry, _):
        time, theta = carry
        k1 = velocity(theta)
        dt = jnp.minimum(step / jnp.maximum(jnp.linalg.norm(k1), 1e-30), max_dt)
        k2 = velocity(theta + dt / 2 * k1)
        k3 = velocity(theta + dt / 2 * k2)
        k4 = velocity(theta + dt * k3)
        after = (time + dt, theta + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
        return after, after

    first = (jnp.zeros(()), start)
    _, (times, thetas) = jax.lax.scan(advance, first, length=num_steps)
    join = lambda one, rest: jnp.concatenate([one[None], rest])
    return join(first[0], times), join(first[1], thetas)


def noise_flow(noise: float, q: float, eta0: float, num_steps: int) -> tuple[jax.Array, jax.Array]:
    """Integrates `noise_rate` from eta0 with steps that grow with eta: (times, etas), each [T+1].

    From eta0 above the equilibrium it decays: at q = 0 contamination never grows.
    """
    check_number("eta0", eta0, 1e-20, 1 - 1e-6)
    check_integer("num_steps", num_steps)

    def advance(carry, _):
        time, eta = carry
        rate = lambda e: noise_rate(jnp.clip(e, 1e-20, 1 - 1e-6), noise, q)
        k1 = rate(eta)
        # eta moves by 2% of itself at most, and by 1/50 of the slowest time scale near rest.
        dt = jnp.minimum(
            0.02 * eta / jnp.maximum(jnp.abs(k1), 1e-30), 0.02 * eta ** (q + 1) / noise
        )
        k2 = rate(eta + dt / 2 * k1)
        after = (time + dt, jnp.clip(eta + dt * k2, 1e-20, 1 - 1e-6))
        return after, after

    first = (jnp.zeros(()), jnp.float32(eta0))
    _, (times, etas) = jax.lax.scan(advance, first, length=num_steps)
    return jnp.append(first[0], times), jnp.append(first[1], etas)
