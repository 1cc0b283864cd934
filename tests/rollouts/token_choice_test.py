"""Tokens against the distribution that they are chosen from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlog.rollouts.token_choice import choose_token


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_follow_the_softmax(temperature):
    num_tokens, vocab = 40_000, 50
    logits = jnp.asarray(np.random.default_rng(0).normal(size=vocab) * 2, jnp.float32)
    logits = logits.at[40:].set(-jnp.inf)
    keys = jax.random.split(jax.random.key(0), (num_tokens, 1))
    tokens, log_probs = jax.jit(choose_token, static_argnums=2)(
        jnp.broadcast_to(logits, (num_tokens, 1, vocab)), keys, temperature
    )
    probabilities = np.array(jax.nn.softmax(logits / temperature))
    counts = np.bincount(np.array(tokens).ravel(), minlength=vocab)
    assert not counts[40:].any()
    chi_square = (
        (counts[:40] - num_tokens * probabilities[:40]) ** 2 / (num_tokens * probabilities[:40])
    ).sum()
    assert chi_square < 39 + 5 * np.sqrt(2 * 39)  # five standard deviations
    np.testing.assert_allclose(
        log_probs[:, 0], np.log(np.maximum(probabilities, 1e-30))[tokens[:, 0]], atol=1e-5
    )


@pytest.mark.parametrize(
    ("top_k", "top_p", "inside"),
    [(3, 1.0, 4), (0, 0.6, 2), (20, 0.9, 4), (2, 0.5, 1), (0, 1e-6, 1)],
)
def test_truncated_tokens_follow_the_renormalised_distribution(top_k, top_p, inside):
    probabilities = np.array([0.05, 0.3, 0.4, 0.1, 0.1, 0.05])  # the two of 0.1 tie
    logits = jnp.log(jnp.broadcast_to(probabilities, (20_000, 1, 6))).astype(jnp.float32) * 0.5
    keys = jax.random.split(jax.random.key(1), (20_000, 1))
    tokens, log_probs = choose_token(logits, keys, 0.5, top_k, top_p)
    kept = np.where(np.isin(np.arange(6), [2, 1, 3, 4][:inside]), probabilities, 0)
    kept /= kept.sum()
    shares = np.bincount(np.array(tokens).ravel(), minlength=6) / 20_000
    assert np.abs(shares - kept).max() < 0.02 and not shares[kept == 0].any()
    np.testing.assert_allclose(log_probs[:, 0], np.log(kept[tokens[:, 0]]), atol=1e-5)


def test_greedy_takes_the_most_likely_token():
    logits = jnp.array([[[0.0, 3.0, 1.0]]])
    token, log_prob = choose_token(logits, jax.random.split(jax.random.key(0), (1, 1)), 0.0)
    assert token[0, 0] == 1
    np.testing.assert_allclose(log_prob[0, 0], jax.nn.log_softmax(logits)[0, 0, 1])
