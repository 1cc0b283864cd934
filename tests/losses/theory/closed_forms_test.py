"""Theory: integrals against simulation, minimisers against search, bounds against samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlog import losses
from qlog.losses.theory import closed_forms

QS = (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.mark.parametrize("p0, p1", [(1e-2, 0.5), (1e-6, 0.9), (0.1, 0.2)])
def test_escape_time_closed_forms(p0, p1):
    """Equation 15 at q = 0, 1/2 and 1, integrated by partial fractions in float64."""
    at = lambda f: f(p1) - f(p0)
    odds = lambda u: np.log(u / (1 - u))
    exact = {
        0.0: at(lambda u: -1 / u + 1 / (1 - u) + 2 * odds(u)),
        1.0: at(lambda u: odds(u) + 1 / (1 - u)),
        # With v = sqrt(u): integral of 2 dv / (v^2 (1-v^2)^2).
        0.5: at(lambda u: -2 / u**0.5 + u**0.5 / (1 - u) + 3 * np.arctanh(u**0.5)),
    }
    for q, expected in exact.items():
        got = closed_forms.sigmoid_escape_time(np.log(p0), np.log(p1), q)
        np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize("q", QS)
def test_gradient_flow_reproduces_equation_15_within_one_per_cent(q):
    p0, p1 = 1e-3, 0.8
    loss = lambda theta: losses.j_q(jax.nn.log_sigmoid(theta), q)
    times, thetas = closed_forms.gradient_flow(loss, np.log(p0 / (1 - p0)), 450)
    simulated = np.interp(np.log(p1 / (1 - p1)), thetas, times)
    assert thetas[-1] > np.log(p1 / (1 - p1))
    expected = closed_forms.sigmoid_escape_time(np.log(p0), np.log(p1), q)
    np.testing.assert_allclose(simulated, expected, rtol=0.01)


def test_escape_rate_is_the_flow_of_p():
    """Equation 6 on the sigmoid model, s = 1 - p: dp/dt = (dp/dtheta)(-d loss/d theta)."""
    theta = jnp.float32(-3.0)
    p = jax.nn.sigmoid(theta)
    loss = lambda x, q: losses.j_q(jax.nn.log_sigmoid(x), q)
    for q in QS:
        slope = jax.grad(loss)(theta, q)
        rate = closed_forms.escape_rate(jnp.log(p), q, 1 - p)
        np.testing.assert_allclose(-slope * p * (1 - p), rate, rtol=1e-5)


def test_escape_times_have_their_orders():
    """Theorems 5.1 and 5.2: the ratio to p0^-(1-q)/(1-q), or log 1/p0, tends to 1."""
    log_p0 = np.log([1e-4, 1e-8, 1e-16, 1e-30])
    for q in QS:
        exact = closed_forms.sigmoid_escape_time(log_p0, np.log(0.5), q)
        ratio = np.asarray(exact / closed_forms.escape_time_order(log_p0, q))
        assert np.all(np.diff(np.abs(ratio - 1)) <= 1e-4)
        assert abs(ratio[-1] - 1) < (0.02 if q == 1 else 1e-3)


def test_escort_minimises_the_loss():
    """Theorem 3.1: no better point among many near ones; alpha itself at q = 1, the mode at 0."""
    alpha = np.array([0.5, 0.3, 0.2])
    rng = np.random.default_rng(0)
    loss = lambda x, q: np.asarray(-losses.log_q(np.log(x), q) @ alpha)
    for q in (0.25, 0.5, 1.0):
        theta = np.asarray(closed_forms.escort(np.log(alpha), q), np.float64)
        np.testing.assert_allclose(theta, alpha ** (1 / q) / np.sum(alpha ** (1 / q)), rtol=1e-5)
        near = np.exp(np.log(theta) + 0.3 * rng.normal(size=(200, 3)))
        near /= near.sum(1, keepdims=True)
        assert np.all(loss(near, q) >= loss(theta, q) - 1e-6)
    np.testing.assert_array_equal(closed_forms.escort(np.log(alpha), 0.0), [1, 0, 0])
    np.testing.assert_array_equal(closed_forms.escort(jnp.zeros(4), 0.0), [0.25] * 4)


def test_dispersion_bound_and_its_second_order():
    """Proposition B.1."""
    rng = np.random.default_rng(1)
    p = np.clip(0.4 + 0.02 * rng.normal(size=500), 0.01, 1)
    for q in QS:
        got = closed_forms.dispersion(jnp.log(p), q)
        assert got["excess"] >= -1e-6
        np.testing.assert_allclose(
            got["second_order"], q / 2 * p.mean() ** (-q - 1) * p.var(), rtol=2e-3, atol=1e-9
        )
        np.testing.assert_allclose(got["excess"], got["second_order"], rtol=0.05, atol=2e-7)
    wide = closed_forms.dispersion(jnp.log(rng.uniform(0.001, 1, 500)), 1.0)
    assert wide["excess"] > 0.1


@pytest.mark.parametrize("q", [0.25, 0.5, 1.0])
def test_noise_fitting_exponents(q):
    """Proposition C.2: time eta^(q+1) / ((q+1) eps) far below equilibrium, then rest."""
    noise = 0.3
    rest = float(closed_forms.noise_equilibrium(noise, q))
    odds = (noise / (1 - noise)) ** (1 / q)
    np.testing.assert_allclose(rest, odds / (1 + odds), rtol=1e-5)
    eta = rest * 0.01 ** (1 / q) * np.array([0.25, 1.0])  # where the right labels' pull is below 1%
    start = eta[0] / 10
    times, etas = closed_forms.noise_flow(noise, q, start, 3000)
    np.testing.assert_allclose(etas[-1], rest, rtol=0.01)
    times = times + closed_forms.noise_fitting_time(start, noise, q)
    time = np.interp(eta, etas, times)
    slope = np.log(time[1] / time[0]) / np.log(4)
    assert abs(slope - (q + 1)) < 0.02
    np.testing.assert_allclose(
        time[1], closed_forms.noise_fitting_time(eta[1], noise, q), rtol=0.03
    )


def test_noise_is_never_fitted_at_q_0():
    times, etas = closed_forms.noise_flow(0.3, 0.0, 0.2, 300)
    assert np.all(np.diff(etas) <= 0) and etas[-1] < 1e-3
    assert closed_forms.noise_equilibrium(0.3, 0.0) == 0
    np.testing.assert_allclose(closed_forms.noise_rate(0.2, 0.3, 0.0), 2 * 0.3 - 1, rtol=1e-6)


def test_noise_rate_is_the_gradient_of_the_mixed_loss():
    right, wrong = lambda eta: jnp.log1p(-eta), jnp.log
    loss = lambda eta, q: -0.9 * losses.log_q(right(eta), q) - 0.1 * losses.log_q(wrong(eta), q)
    for q in QS:
        slope = jax.grad(loss)(jnp.float32(0.05), q)
        np.testing.assert_allclose(closed_forms.noise_rate(0.05, 0.1, q), -slope, rtol=1e-4)


def test_errors_of_theory():
    with pytest.raises(ValueError, match="log_p0 must be at most log_p1"):
        closed_forms.sigmoid_escape_time(-1.0, -2.0, 0.5)
    with pytest.raises(ValueError, match=r"noise must be in \[0, 0.5\], got 0.7"):
        closed_forms.noise_equilibrium(0.7, 0.5)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        closed_forms.gradient_flow(jnp.square, 1.0, 0)
    with pytest.raises(ValueError, match=r"log_p must have shape \[N\]"):
        closed_forms.dispersion(jnp.zeros((2, 2)), 0.5)
