"""Estimators against the exact gradient of a latent-variable model that can be enumerated."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlog import losses
from qlog.losses.theory import exact

QS = (0.0, 0.25, 0.5, 0.75, 1.0)
MODEL = exact.LatentModel(jnp.array([0.0, 1.0, -0.5]), jnp.array([-3.0, -1.0, 1.0]))  # P = 0.28


def size(vector):
    return np.linalg.norm(vector)


def spread(moments):
    return np.trace(moments.covariance)


def test_exact_gradient_is_that_of_the_marginal():
    """Finite differences of -log_q P, in float64."""

    def loss(vector, q):
        prior = np.exp(vector[:3]) / np.sum(np.exp(vector[:3]))
        p = prior @ (1 / (1 + np.exp(-vector[3:])))
        return -np.log(p) if q == 1 else (1 - p ** (1 - q)) / (1 - q)

    point = exact.flat(MODEL)
    for q in QS:
        steps = 1e-5 * np.eye(6)
        slope = [(loss(point + h, q) - loss(point - h, q)) / 2e-5 for h in steps]
        np.testing.assert_allclose(exact.exact_gradient(MODEL, q), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_rollouts", [2, 3, 8])
def test_q_0_is_unbiased_for_every_m(num_rollouts):
    gradient = exact.exact_gradient(MODEL, 0.0)
    for transform in (
        losses.rb_reinforce(),
        losses.rb_rloo(),
        losses.garl(0.0, correction="jackknife"),
    ):
        mean = exact.moments(MODEL, transform, num_rollouts).mean
        assert size(mean - gradient) < 2e-6 * size(gradient)


@pytest.mark.parametrize("q", QS[1:])
def test_bias_is_theorem_6_1(q):
    """Slope -1 in M, and the leading coefficient, vector against vector, to O(1/M)."""
    gradient = exact.exact_gradient(MODEL, q)
    transform = losses.garl(q, "none")
    sizes, errors = [], []
    for num_rollouts in (16, 64):
        bias = exact.moments(MODEL, transform, num_rollouts).mean - gradient
        leading = exact.leading_bias(MODEL, q, num_rollouts)
        sizes.append(size(bias))
        errors.append(size(bias - leading) / size(leading))
    slope = np.log(sizes[1] / sizes[0]) / np.log(4)
    assert -1.02 < slope < -0.98
    assert errors[1] < 0.006 and errors[1] < 0.35 * errors[0]


@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("num_rollouts", [2, 8])
def test_rloo_keeps_the_mean_and_lowers_the_variance(q, num_rollouts):
    """Proposition 6.2: exactly the same mean for every M >= 2."""
    plug_in = exact.moments(MODEL, losses.garl(q, "none"), num_rollouts)
    centred = exact.moments(MODEL, losses.garl(q), num_rollouts)
    assert size(centred.mean - plug_in.mean) < 1e-6 * size(plug_in.mean)
    assert spread(centred) < 0.9 * spread(plug_in)


@pytest.mark.parametrize("q", [0.5, 1.0])
def test_jackknife_cuts_the_bias(q):
    """Its bias falls as 1/M^2 and is far below the plug-in's, for a few per cent of variance."""
    gradient = exact.exact_gradient(MODEL, q)
    bias = {}
    for num_rollouts in (16, 32):
        for correction in ("none", "jackknife"):
            moments = exact.moments(MODEL, losses.garl(q, correction=correction), num_rollouts)
            bias[correction, num_rollouts] = size(moments.mean - gradient)
            bias[correction, "spread"] = spread(moments)
    assert bias["jackknife", 32] < 0.02 * bias["none", 32]
    assert bias["jackknife", 32] < 0.3 * bias["jackknife", 16]
    assert bias["jackknife", "spread"] < 1.05 * bias["none", "spread"]


def pool_of(log_w):
    return losses.Scores(log_w=jnp.asarray(log_w, jnp.float32)[None])


def run_once(transform, scores, **extra):
    return losses.coefficients(transform, scores, transform.init(scores), **extra)[0]


@functools.cache
def paft_draws(k, method="multinomial"):
    """`f(q, scores)` runs PAFT 4000 times on one group: coefficients [4000, M]."""
    keys = jax.random.split(jax.random.key(0), 4000)

    def run(q, scores):
        paft = losses.paft(q, k, method)
        return jax.vmap(lambda key: run_once(paft, scores, key=key).path[0])(keys)

    return jax.jit(run)


@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("k", [None, 2])
def test_paft_given_the_pool_is_garl(q, k):
    """Proposition D.3 by enumeration of all resamples; the code draws those, at those frequencies.

    Proposition D.4 follows: given the pool, PAFT has GARL as its mean and a variance of its own.
    """
    pool = pool_of([-0.3, -2.0, -1.0])
    garl = run_once(losses.garl(q, "none"), pool)
    w = np.exp(np.asarray(pool.log_w[0], np.float64))
    draws = 3 if k is None else k
    outcomes = {}
    for picks in itertools.product(range(3), repeat=draws):
        counts = tuple(picks.count(m) for m in range(3))
        outcomes[counts] = outcomes.get(counts, 0) + np.prod((w / w.sum())[list(picks)])
    values = {counts: w.mean() ** (1 - q) * np.array(counts) / draws for counts in outcomes}
    mean = sum(p * values[counts] for counts, p in outcomes.items())
    np.testing.assert_allclose(mean, garl.path[0], rtol=1e-5)

    drawn = np.asarray(paft_draws(k)(q, pool), np.float64)
    seen = np.round(drawn / w.mean() ** (1 - q) * draws).astype(int)
    np.testing.assert_allclose(drawn, w.mean() ** (1 - q) * seen / draws, rtol=1e-5)
    for counts, probability in outcomes.items():
        share = np.mean(np.all(seen == counts, 1))
        assert abs(share - probability) < 4.5 * math.sqrt(probability / len(seen)), counts
    assert np.all(np.var(drawn, 0) > 0)


def test_systematic_resampling_keeps_the_mean_and_lowers_the_variance():
    w = np.array([0.4, 0.05, 0.3, 0.2, 0.01])
    pool, q = pool_of(np.log(w)), 0.5
    garl = run_once(losses.garl(q, "none"), pool)
    drawn = {name: np.asarray(paft_draws(8, name)(q, pool)) for name in losses.RESAMPLING}
    for name, path in drawn.items():
        error = path.std(0) / math.sqrt(len(path))
        assert np.all(np.abs(path.mean(0) - garl.path[0]) < 4.5 * error), name
    assert drawn["systematic"].var(0).sum() < 0.25 * drawn["multinomial"].var(0).sum()
    counts = drawn["systematic"] / w.mean() ** (1 - q) * 8
    assert np.all(np.abs(counts - 8 * w / w.sum()) < 1 + 1e-4)


def estimate_groups(transform, num_groups, num_rollouts, sampled):
    """Gradient estimates [N, 2Z] of sampled groups; `sampled` answers are drawn and graded."""
    rng = np.random.default_rng(3)
    prior, w = (np.exp(np.asarray(x, np.float64)) for x in exact.log_probs(MODEL))
    rationales = rng.choice(3, size=(num_groups, num_rollouts), p=prior / prior.sum())
    right = rng.uniform(size=rationales.shape) < w[rationales]
    scores = exact.scores_of(MODEL, rationales)._replace(reward=jnp.asarray(right, jnp.float32))
    result = run_once(transform, scores, key=jax.random.key(4))
    if not sampled:
        return exact.gradient_estimates(MODEL, rationales, result)
    # grad log(1-w) = -w/(1-w) grad log w: a wrong answer's gradient in terms of the right one's.
    factor = np.where(right, 1.0, -(w / (1 - w))[rationales])
    return exact.gradient_estimates(
        MODEL, rationales, result._replace(path=np.asarray(result.path) * factor)
    )


@pytest.mark.parametrize("q", [0.25, 1.0])
def test_paft_varies_more_than_garl(q):
    """Proposition D.4, over 4096 groups of 8: the plug-in's exact variance lies below PAFT's."""
    plug_in = exact.moments(MODEL, losses.garl(q, "none"), 8)
    paft = np.var(estimate_groups(losses.paft(q), 4096, 8, sampled=False), 0).sum()
    assert paft > 1.2 * spread(plug_in)


P = float(jnp.exp(exact.log_p(MODEL)))
# name, transform, exact q of the limit, its factor, whether Theorem 6.1 gives the remaining bias
LIMITS = [
    ("garl", losses.garl(0.5), 0.5, 1.0, True),
    ("garl_plug_in", losses.garl(0.75, "none"), 0.75, 1.0, True),
    ("garl_jackknife", losses.garl(0.75, correction="jackknife"), 0.75, 1.0, False),
    (
        "garl_normalized",
        losses.chain(losses.garl(0.5), losses.normalize_by_bound(0.5)),
        0.5,
        1 / 16,
        True,
    ),
    ("paft", losses.paft(0.5), 0.5, 1.0, True),
    ("paft_systematic", losses.paft(0.75, resampling="systematic"), 0.75, 1.0, True),
    ("rb_rloo", losses.rb_rloo(), 0.0, 1.0, True),
    ("iwae", losses.iwae(), 1.0, 1.0, True),
    ("trice", losses.trice(), 1.0, 1.0, True),
    ("star_at_q_0", losses.star(0.0), 0.0, 1.0, False),
    ("rloo", losses.rloo(), 0.0, 1.0, False),
    ("grpo_unscaled", losses.grpo(scale_by_std=False), 0.0, 1 - 1 / 256, False),
]


@pytest.mark.parametrize("name, transform, q, factor, has_bias", LIMITS, ids=[x[0] for x in LIMITS])
def test_mean_over_groups_converges_to_the_exact_gradient(name, transform, q, factor, has_bias):
    """2048 groups of 256: within 4.5 standard errors (of 6 numbers) plus 5% of the known bias."""
    sampled = name in ("rloo", "grpo_unscaled")
    estimates = estimate_groups(transform, 2048, 256, sampled)
    expected = factor * exact.exact_gradient(MODEL, q)
    bias = factor * exact.leading_bias(MODEL, q, 256) if has_bias else np.zeros(6)
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert size(error) < 0.01 * size(expected)  # the bounds mean something
    slack = 0.05 * np.abs(bias) + 1e-4 * size(expected)
    assert np.all(np.abs(estimates.mean(0) - expected - bias) < 4.5 * error + slack)


@pytest.mark.parametrize(
    "name, transform, q, factor",
    [
        ("star", losses.star(), 1.0, 1.0),
        ("maxrl", losses.maxrl(), 1.0, 1.0),
        ("grpo", losses.grpo(), 0.0, 1 / math.sqrt(P * (1 - P))),
    ],
)
def test_self_normalised_estimators_converge_within_two_per_cent(name, transform, q, factor):
    """Their bias at M = 256 is O(1/(M P)), about 1%. STaR, MaxRL: grad l_1; GRPO: of grad l_0."""
    estimates = estimate_groups(transform, 2048, 256, sampled=name != "star")
    expected = factor * exact.exact_gradient(MODEL, q)
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert size(estimates.mean(0) - expected) < 0.02 * size(expected) + 4.5 * size(error)
