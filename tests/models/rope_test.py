"""RoPE's frequencies, as transformers computes them (parity_test.py compares them on the spot)."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlog import models
from qlog.errors import ConfigError
from qlog.models import rope

# Qwen2.5 at 131,072 tokens, as its model card asks for it.
YARN = models.RopeScaling(4.0, 32_768, rope_type="yarn")
# transformers' _compute_yarn_parameters (torch 2.13, transformers 5.23): frequency -> radians.
EXPECTED = {
    0: 1.0,
    20: 0.01333521492779255,
    30: 0.0010643609566614032,
    40: 4.4456985051510856e-05,
    63: 3.102344408034696e-07,
}


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones_as_transformers_does():
    got = rope.frequencies(128, 1e6, YARN)
    plain = rope.frequencies(128, 1e6)
    assert got.dtype == np.float32
    assert {number: float(got[number]) for number in EXPECTED} == EXPECTED
    np.testing.assert_array_equal(got[:20], plain[:20])
    np.testing.assert_allclose(got[45:], plain[45:] / 4, rtol=1e-6)
    # Bounds that are not rounded keep the ramp inside of the rounded one.
    exact = rope.frequencies(
        128, 1e6, models.RopeScaling(4.0, 32_768, rope_type="yarn", truncate=False)
    )
    assert np.any(exact != got) and np.all((plain / 4 * 0.999 <= exact) & (exact <= plain))


def test_yarn_multiplies_cos_and_sin():
    positions = jnp.arange(5)[None, None]
    assert YARN.magnitude == 1.138629436111989
    for scaling, magnitude in ((YARN, YARN.magnitude), (models.RopeScaling(4.0), 1.0)):
        cos, sin = rope.rotation(positions, 8, 1e4, scaling)
        np.testing.assert_allclose(cos**2 + sin**2, magnitude**2, rtol=1e-5)
    given = models.RopeScaling(4.0, 16, rope_type="yarn", attention_factor=0.5)
    assert given.magnitude == 0.5
    assert models.RopeScaling(0.5, 16, rope_type="yarn").magnitude == 1.0


def test_a_scaling_says_what_it_stands_for():
    assert models.RopeScaling(8.0).rope_type == "linear"
    assert models.RopeScaling(8.0, 16) == models.RopeScaling(8.0, 16, 1.0, 4.0, "llama3")
    assert YARN == models.RopeScaling(4.0, 32_768, 1.0, 32.0, "yarn") and hash(YARN)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(factor=0.0), "factor = 0.0 must be a number above 0"),
        (dict(factor=10**400), "factor = 10+ must be a number above 0 and at most"),
        (dict(factor=4.0, attention_factor="x"), "attention_factor = 'x' must be a number"),
        (dict(factor="4"), "factor = '4' must be"),
        (dict(factor=4.0, rope_type="dynamic"), "rope_type = 'dynamic': one of 'linear'"),
        (dict(factor=4.0, rope_type="yarn"), "'yarn' needs an original_length"),
        (dict(factor=4.0, original_length=8, rope_type="linear"), "'linear' takes no original"),
        (dict(factor=4.0, original_length=8, truncate=False), "belong to 'yarn'"),
    ],
)
def test_scalings_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        models.RopeScaling(**fields)
