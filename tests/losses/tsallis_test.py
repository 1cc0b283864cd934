"""The q-logarithm: limits, accuracy near q = 1, range, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlog import losses

LOG_P = np.array([0.0, -1e-6, -0.1, -1.0, -30.0, -300.0, -1e4], np.float32)
QS = np.array([0.0, 1e-7, 0.25, 0.5, 0.75, 1 - 1e-3, 1 - 1e-6, 1.0], np.float32)


def reference_log_q(log_p, q):
    """Float64, with the exact limit at 1."""
    log_p, s = np.float64(log_p), 1 - np.float64(q)
    return np.where(s == 0, log_p, np.expm1(s * log_p) / np.where(s == 0, 1, s))


def test_log_q_matches_float64_from_0_to_minus_1e4():
    got = losses.log_q(LOG_P[:, None], QS)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, reference_log_q(LOG_P[:, None], QS), rtol=1e-5, atol=0)


def test_log_q_limits_are_exact():
    np.testing.assert_array_equal(losses.log_q(LOG_P, 1.0), LOG_P)
    np.testing.assert_array_equal(losses.log_q(LOG_P, 0.0), jnp.expm1(LOG_P))
    np.testing.assert_array_equal(
        losses.log_q(-jnp.inf, jnp.array([0.0, 0.5, 1.0])), [-1, -2, -np.inf]
    )


def test_gradients_of_log_q():
    each = lambda argnum: jax.vmap(jax.vmap(jax.grad(losses.log_q, argnum), (None, 0)), (0, None))
    s = 1 - np.float64(QS)
    slopes = np.exp(s * np.float64(LOG_P)[:, None])
    np.testing.assert_allclose(each(0)(LOG_P, QS), slopes, rtol=1e-3, atol=1e-37)
    # d/dq by Gauss-Legendre of its integral form: -l^2 int_0^1 t e^(s t l) dt.
    t, weight = np.polynomial.legendre.leggauss(400)
    t, weight = (t + 1) / 2, weight / 2
    for i, log_p in enumerate(np.float64(LOG_P[:-1])):
        expected = [-(log_p**2) * np.sum(weight * t * np.exp(x * t * log_p)) for x in s]
        np.testing.assert_allclose(each(1)(LOG_P, QS)[i], expected, rtol=1e-4)
    assert np.all(np.isfinite(each(1)(LOG_P, QS)))


def test_exp_q_inverts_log_q():
    log_p = np.array([0.0, -1e-3, -0.5, -3.0], np.float32)
    for q in (0.0, 0.5, 1 - 1e-6, 1.0):
        value = losses.log_q(log_p, q)
        np.testing.assert_allclose(losses.log_exp_q(value, q), log_p, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(losses.exp_q(value, q), np.exp(log_p), rtol=1e-4)
    slope = jax.grad(losses.exp_q)(jnp.float32(-0.25), 1.0)
    np.testing.assert_allclose(slope, np.exp(-0.25), rtol=1e-5)


def test_amplification_and_attenuation():
    np.testing.assert_allclose(losses.amplification(np.log(0.01), 0.5), 10.0, rtol=1e-5)
    np.testing.assert_allclose(losses.attenuation(np.log(0.01), 0.5), 0.1, rtol=1e-5)
    np.testing.assert_array_equal(losses.log_amplification(-jnp.inf, 0.0), 0.0)
    np.testing.assert_array_equal(losses.log_attenuation(-jnp.inf, 1.0), 0.0)
    np.testing.assert_array_equal(losses.log_amplification(-1e4, 0.75), 7.5e3)
    assert losses.attenuation(-jnp.inf, 0.5) == 0.0


def test_proposition_4_1_gradients_have_one_direction():
    """grad l_q = P^(-q) grad l_0 = P^(1-q) grad l_1, by automatic differentiation."""
    loss = lambda theta, q: losses.j_q(jax.nn.log_sigmoid(theta), q)
    theta, log_p = jnp.float32(-4.0), jax.nn.log_sigmoid(-4.0)
    for q in (0.25, 0.5, 0.9):
        slope = jax.grad(loss)(theta, q)
        amplified = losses.amplification(log_p, q) * jax.grad(loss)(theta, 0.0)
        attenuated = losses.attenuation(log_p, q) * jax.grad(loss)(theta, 1.0)
        np.testing.assert_allclose([amplified, attenuated], slope, rtol=1e-5)


def test_j_q_counts_only_valid_examples():
    log_p = jnp.log(jnp.array([0.5, 0.25, 1e-9]))
    np.testing.assert_allclose(losses.j_q(log_p, 0.0), 1 - 0.25, rtol=1e-6)
    np.testing.assert_allclose(
        losses.j_q(log_p, 1.0, valid=[True, True, False]), 1.5 * np.log(2), rtol=1e-6
    )


@pytest.mark.parametrize("q", [-0.1, 1.5])
def test_q_outside_its_range_is_refused(q):
    with pytest.raises(ValueError, match=rf"q must be in \[0, 1\], got {q}"):
        losses.log_q(-1.0, q)
    with pytest.raises(TypeError, match="q must be a number"):
        losses.log_q(-1.0, "half")
