"""Log-probabilities without [.., T, V] arrays."""

import jax
import jax.numpy as jnp
import numpy as np

from qlog.models import head


def test_log_probs_in_chunks_equal_the_plain_ones_in_value_and_gradient():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 11, 16)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(32, 16)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 29, (2, 11)), jnp.int32)
    temperature = jnp.asarray(rng.uniform(0.5, 2, (2, 11)), jnp.float32)

    def plain(hidden, table):
        logits = (hidden @ table[:29].T) / temperature[..., None]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]

    def chunked(hidden, table):
        return head.token_log_probs(
            hidden, table, targets, valid_vocab=29, temperature=temperature, chunk=4
        )

    np.testing.assert_allclose(chunked(hidden, table), plain(hidden, table), atol=1e-5)
    weight = jnp.asarray(rng.normal(size=(2, 11)), jnp.float32)
    for wanted, got in zip(
        jax.grad(lambda *a: (weight * plain(*a)).sum(), (0, 1))(hidden, table),
        jax.grad(lambda *a: (weight * chunked(*a)).sum(), (0, 1))(hidden, table),
        strict=True,
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
