"""int8 caches: what they keep, and attention over them against attention over what they keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_fixtures import arrays, patterns

from qlog.models.attention import Quantised, Segment, blocks, cudnn, quantised, tpu

KERNELS = {
    "blocks": blocks.attend,
    "small blocks": functools.partial(blocks.attend, blocks=blocks.Blocks(8, 16, 8)),
    "tpu": tpu.attend,
    "cudnn": cudnn.attend,
}


def kept(x):
    return quantised.stored(x, jnp.int8)


def full(x: Quantised):
    """The vectors that the cache stands for."""
    return x.values.astype(jnp.float32) * x.scale


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_number_is_off_by_half_a_step_at_most(dtype):
    rng = np.random.default_rng(0)
    # Vectors of very different sizes: a scale of all would lose the small ones.
    sizes = 10.0 ** rng.integers(-6, 6, (2, 3, 5, 1))
    x = jnp.asarray(sizes * rng.normal(size=(2, 3, 5, 8)), dtype)
    cache = kept(x)
    assert cache.values.dtype == jnp.int8 and cache.scale.dtype == jnp.float32
    assert cache.shape == x.shape and cache.scale.shape == (2, 3, 5, 1) and cache.ndim == 4
    exact = np.asarray(x, np.float64)
    largest = np.abs(exact).max(-1, keepdims=True)
    np.testing.assert_allclose(cache.scale, largest / 127, rtol=1e-6)
    assert (np.abs(np.asarray(cache.values)).max(-1) == 127).all()
    assert np.all(np.abs(full(cache) - exact) <= 0.5001 * largest / 127)
    np.testing.assert_array_equal(kept(-x).values, -cache.values)


def test_zeros_stay_zeros_and_what_is_broken_stays_broken():
    x = jnp.ones((4, 8)).at[0].set(0.0).at[1, 2].set(jnp.nan).at[2, 3].set(jnp.inf)
    found = np.asarray(full(kept(x)))
    np.testing.assert_array_equal(found[0], 0)
    assert not np.isfinite(found[1]).any() and not np.isfinite(found[2]).any()
    np.testing.assert_allclose(found[3], 1)
    np.testing.assert_array_equal(full(quantised.empty((3, 8), jnp.int8)), 0)


def test_other_dtypes_are_kept_as_arrays():
    x = jnp.ones((2, 3))
    for dtype in (jnp.float32, jnp.bfloat16):
        for cache in (quantised.stored(x, dtype), quantised.empty((2, 3), dtype)):
            assert isinstance(cache, jax.Array) and cache.dtype == dtype
    assert quantised.itemsize(jnp.bfloat16, 128) == 2
    assert quantised.itemsize(jnp.float32, 128) == 4
    assert quantised.itemsize(jnp.int8, 128) == 1 + 4 / 128


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", patterns())
def test_attention_over_int8_is_attention_over_what_it_stands_for(name, kernel):
    pattern = patterns()[name]
    queries, _, caches = arrays(pattern, size=8)

    def attend(attend, as_read):
        segments = [
            Segment(*map(as_read, cache), *ends)
            for cache, (_, *ends) in zip(caches, pattern, strict=True)
        ]
        return attend(queries, segments)

    found = jax.jit(lambda: attend(KERNELS[kernel], kept))()
    expected = attend(blocks.attend, lambda x: full(kept(x)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
    exact = attend(blocks.attend, lambda x: x)
    assert 1e-4 < np.abs(found - exact).max() < 0.1  # it is not the full precision, but close


@pytest.mark.parametrize("slots", [4, 128])
def test_a_decode_step_over_int8_is_one_over_what_it_stands_for(slots):
    """Private slots, several blocks of them, next to a shared prompt."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    queries, shared = normal(2, 2, 3, 2, 8), [normal(2, 2, 21, 8) for _ in range(2)]
    own = [normal(2, 2, 3, 11, 8) for _ in range(2)]
    sizes = blocks.Blocks(8, 16, slots)

    def attend(as_read):
        zero = np.zeros((2, 1), np.int32)
        prefix = Segment(*map(as_read, shared), zero, np.array([[21], [6]], np.int32))
        suffix = Segment(*map(as_read, own), zero, np.array([[9]], np.int32))
        return blocks.attend_step(queries, prefix, suffix, sizes)

    found = jax.jit(lambda: attend(kept))()
    np.testing.assert_allclose(found, attend(lambda x: full(kept(x))), rtol=1e-5, atol=2e-6)


def test_runs_shorter_than_a_block_see_their_own_slots():
    """Gold answers: a few rows of each rollout over the rollout's own slots and the prompt's."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    queries, shared = normal(2, 2, 3 * 4, 8), [normal(2, 2, 9, 8) for _ in range(2)]
    own = [normal(2, 2, 3 * 5, 8) for _ in range(2)]
    first = np.repeat(5 * np.arange(3, dtype=np.int32), 4)[None]
    last = first + np.tile(np.arange(2, 6, dtype=np.int32), 3)
    of_prompt = np.zeros((1, 12), np.int32), np.full((1, 12), 7, np.int32)

    def attend(as_read):
        prompt = Segment(*map(as_read, shared), *of_prompt)
        runs = Segment(*map(as_read, own), first, last, runs=3)
        return blocks.attend(queries, [prompt, runs])

    found = jax.jit(lambda: attend(kept))()
    np.testing.assert_allclose(found, attend(lambda x: full(kept(x))), rtol=1e-5, atol=2e-6)
