"""Surrogates against formulas worked by hand: two groups of two rollouts of three tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from trees import assert_near

from qlog import losses

RATIONALE = jnp.array([[[1, 1, 0], [1, 0, 0]], [[1, 1, 0], [0, 0, 0]]], bool)
ANSWER = jnp.array([[[0, 0, 1], [0, 1, 0]], [[0, 0, 1], [0, 0, 0]]], bool)
SCORE, PATH = jnp.array([[0.5, -0.25], [1.0, 3.0]]), jnp.array([[0.3, -0.1], [2.0, 3.0]])
WEIGHT = jnp.array([[0.5, 0.5], [1.0, 0.0]])
OLD = -jnp.arange(1, 13, dtype=jnp.float32).reshape(2, 2, 3) / 5
MOVE = jnp.array([[[0.5, -0.5, 0.1], [0.5, -0.5, 0.0]], [[0.05, 0.3, -0.3], [9.0, 9.0, 9.0]]])
IS_TOKEN = np.asarray(RATIONALE | ANSWER)
PER_TOKEN = np.asarray(SCORE[..., None] * RATIONALE + PATH[..., None] * ANSWER)


def call(surrogate, new, old=OLD, reference=None, part=slice(None)):
    coefficients = losses.Coefficients(SCORE, PATH, jnp.zeros((2, 2)), WEIGHT)
    tokens = losses.TokenLogProbs(new, RATIONALE, ANSWER, old, reference)
    return surrogate(*jax.tree.map(lambda x: x[part], (coefficients, tokens)))


def test_linear_surrogate_has_the_estimator_as_gradient():
    slope = jax.grad(lambda new: call(losses.linear(), new).loss)(OLD + MOVE)
    assert_near(slope, -PER_TOKEN)
    assert call(losses.linear(), OLD).tokens == 8


def test_clipped_surrogate_by_hand():
    surrogate = losses.clipped(0.2, 0.28)
    sums = call(surrogate, OLD + MOVE)
    ratio = np.exp(np.asarray(MOVE, np.float64))
    gain = np.minimum(ratio * PER_TOKEN, np.clip(ratio, 0.8, 1.28) * PER_TOKEN)
    assert_near(sums.loss, -np.sum(gain[IS_TOKEN]))
    slope = jax.grad(lambda new: call(surrogate, new).loss)(OLD + MOVE)
    # Clipped: gains above 1.28 with positive, below 0.8 with negative coefficients.
    stopped = ((ratio > 1.28) & (PER_TOKEN > 0)) | ((ratio < 0.8) & (PER_TOKEN < 0))
    assert_near(slope, np.where(stopped | ~IS_TOKEN, 0, -ratio * PER_TOKEN))
    assert sums.clipped == np.sum(stopped & IS_TOKEN) == 3
    on_policy = jax.grad(lambda new: call(surrogate, new).loss)(OLD)
    assert_near(on_policy, -PER_TOKEN)


def test_kl_estimates():
    new, reference = jnp.array([-1.0, -2.0, -0.5]), jnp.array([-1.5, -1.0, -0.5])
    d = np.array([-0.5, 1.0, 0.0])
    value = {"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - d - 1}
    slope = {"k1": -d, "k2": -d, "k3": 1 - np.exp(d)}
    for kind in value:
        assert_near(losses.kl_estimate(new, reference, kind), value[kind])
        total = lambda x, kind: jnp.sum(losses.kl_estimate(x, reference, kind))
        assert_near(jax.grad(total)(new, kind), slope[kind])


def test_kl_estimates_have_the_right_means_and_gradients():
    """Over a distribution of 3 tokens: k1 and k3 have the mean KL, k1 and k2 its gradient."""
    logits, reference = jnp.array([0.3, -0.2, 1.0]), jax.nn.log_softmax(jnp.array([1.0, 0.0, 0.5]))
    kl = lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - reference))
    p = jax.nn.softmax(logits)
    for kind in ("k1", "k3"):
        assert_near(p @ losses.kl_estimate(jnp.log(p), reference, kind), kl(logits))
    for kind in ("k1", "k2"):
        mean = lambda x, kind: p @ losses.kl_estimate(jax.nn.log_softmax(x), reference, kind)
        assert_near(jax.grad(mean)(logits, kind), jax.grad(kl)(logits))


def test_kl_penalty_weighs_tokens_by_token_weight():
    surrogate = losses.add_kl(losses.linear(), 0.1, "k2")
    reference = OLD - 0.2
    sums = call(surrogate, OLD, reference=reference)
    plain = call(losses.linear(), OLD)
    tokens = IS_TOKEN.sum(-1)
    assert_near(sums.loss - plain.loss, 0.1 * 0.02 * np.sum(np.asarray(WEIGHT) * tokens))
    assert_near(sums.kl, 0.02 * 8)
    assert_near(losses.token_measurements(sums)["kl"], 0.02)
    with pytest.raises(ValueError, match="reference must be log-probabilities"):
        call(surrogate, OLD)


@pytest.mark.parametrize("name", ["linear", "clipped", "kl"])
def test_sums_add_over_microbatches_and_ignore_padding(name):
    surrogate = {
        "linear": losses.linear(),
        "clipped": losses.clipped(),
        "kl": losses.add_kl(losses.clipped(), 0.1),
    }[name]
    bad = jnp.where(IS_TOKEN, OLD + MOVE, jnp.nan)
    old, reference = (jnp.where(IS_TOKEN, x, -jnp.inf) for x in (OLD, OLD - 0.1))
    whole = call(surrogate, bad, old, reference)
    halves = [call(surrogate, bad, old, reference, slice(i, i + 1)) for i in (0, 1)]
    added = jax.tree.map(lambda *x: sum(x), *halves)
    trees.assert_close(added, whole, rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda new: call(surrogate, new, old, reference).loss)(bad)
    assert np.all(np.isfinite(slope)) and np.all(np.asarray(slope)[~IS_TOKEN] == 0)


def test_surrogates_check_shapes():
    coefficients = losses.Coefficients(SCORE, PATH, jnp.zeros((2, 2)), WEIGHT)
    tokens = losses.TokenLogProbs(OLD, RATIONALE, ANSWER, OLD)
    linear = losses.linear()
    with pytest.raises(ValueError, match=r"new must have shape \[b, M, R\]"):
        linear(coefficients, tokens._replace(new=OLD[:, :1]))
    with pytest.raises(ValueError, match=r"score and path must have one shape \[b, M\]"):
        linear(coefficients._replace(path=PATH[:1]), tokens)
    with pytest.raises(
        ValueError, match=r"token_weight must have score's shape \(2, 2\), got \(2,"
    ):
        linear(coefficients._replace(token_weight=WEIGHT[:, :1]), tokens)
    with pytest.raises(ValueError, match="rationale_mask must be bool"):
        linear(coefficients, tokens._replace(rationale_mask=RATIONALE.astype(int)))
    with pytest.raises(ValueError, match=r"reference must be log-probabilities of shape .* \(2, 1"):
        linear(coefficients, tokens._replace(reference=OLD[:, :1]))
    with pytest.raises(
        ValueError, match="old must be log-probabilities .* clipped ratio, got None"
    ):
        losses.clipped()(coefficients, tokens._replace(old=None))
    with pytest.raises(TypeError, match="takes losses.Coefficients and losses.TokenLogProbs, got"):
        linear(SCORE, tokens)
