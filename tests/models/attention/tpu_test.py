"""The TPU kernels give what the blockwise attention gives, and Mosaic compiles them."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_fixtures import (
    arrays,
    patterns,
    value_and_gradients,
)
from jax import jit

from qlog.aot.compiler import topology_devices
from qlog.models.attention import blocks, tpu
from qlog.parallel import sharding

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}


interpreted = functools.partial(tpu.attend, interpret=True, blocks=tpu.Blocks(8, 16))


@pytest.mark.parametrize("name", patterns())
def test_the_kernels_equal_the_blockwise_attention_in_value_and_gradients(name):
    pattern = patterns()[name]
    given = arrays(pattern)
    found = value_and_gradients(interpreted, pattern, *given)
    for one, other in zip(found, value_and_gradients(blocks.attend, pattern, *given), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_bfloat16_stays_close():
    pattern = patterns()["packed over a prefix"]
    given = arrays(pattern, size=32, dtype=jnp.bfloat16)
    exact = value_and_gradients(blocks.attend, pattern, *jax.tree.map(np.float32, given))
    for one, other in zip(value_and_gradients(interpreted, pattern, *given), exact, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(one), other, atol=0.02 * np.abs(other).max())


def test_blocks_that_no_row_sees_are_not_visited():
    """What lies there is not a number, and shows nowhere."""
    rows = 16  # rows 0-7 see slots 16-31, rows 8-15 slots 48-63, of 5 blocks of 16
    start = np.repeat([16, 48], rows // 2)[None].astype(np.int32)
    pattern = [(80, start, start + np.arange(1, 17, dtype=np.int32))]
    queries, cotangent, caches = arrays(pattern)
    unseen = np.isin(np.arange(80) // 16, [0, 2, 4])[:, None]
    spoilt = [tuple(jnp.where(unseen, jnp.nan, x) for x in cache) for cache in caches]
    found = value_and_gradients(interpreted, pattern, queries, cotangent, spoilt)
    expected = value_and_gradients(blocks.attend, pattern, queries, cotangent, caches)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("heads", [2, 3], ids=["heads split", "heads do not divide"])
def test_shards_give_what_one_device_gives(heads):
    mesh = sharding.make_mesh(2, 1, 2, devices=jax.devices()[:4])
    pattern = patterns()["packed over a prefix"]
    given = arrays(pattern, heads=heads)
    found = value_and_gradients(functools.partial(interpreted, mesh=mesh), pattern, *given)
    for one, other in zip(found, value_and_gradients(blocks.attend, pattern, *given), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def compiled(topology, sizes, attend=tpu.attend, mesh_sizes=(-1, 1, 1)):
    """Forward and backward for a TPU slice, from shapes (B, K, N, (T, ...), C, dtype)."""
    mesh = sharding.make_mesh(*mesh_sizes, devices=topology_devices(topology))
    batch, heads, rows, slots, size, dtype = sizes

    def shape(*dims, dtype=dtype):
        place = jax.NamedSharding(mesh, tpu._spec(mesh, jax.ShapeDtypeStruct(dims, dtype)))
        return jax.ShapeDtypeStruct(dims, dtype, sharding=place)

    def both(queries, caches, intervals, cotangent):
        segments = lambda caches: [
            blocks.Segment(*c, *i) for c, i in zip(caches, intervals, strict=True)
        ]
        run = lambda queries, caches: attend(queries, segments(caches), mesh)
        out, back = jax.vjp(run, queries, caches)
        return out, back(cotangent)

    queries, ends = shape(batch, heads, rows, size), shape(batch, rows, dtype=jnp.int32)
    caches = [(shape(batch, heads, n, size),) * 2 for n in slots]
    return jit(both).lower(queries, caches, [(ends, ends)] * len(slots), queries).compile()


def largest_array(program):
    """Elements of the largest float32 array of a compiled program."""
    found = re.findall(r"\bf32\[([\d,]+)\]", program.as_text())
    return max(math.prod(map(int, dims.split(","))) for dims in found)


CASES = [("v5e", 128, "bfloat16")] + [
    pytest.param(chip, size, dtype, marks=pytest.mark.slow)
    for chip in TOPOLOGIES
    for size, dtype in [(64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (256, "float32")]
    if (chip, size) != ("v5e", 128)
]


@pytest.mark.parametrize("chip, size, dtype", CASES)
def test_tpu_compiler_accepts_the_kernels(chip, size, dtype):
    """Lengths that fill no block; nothing as large as rows times slots is stored."""
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install libtpu (the extra 'tpu')")
    program = compiled(TOPOLOGIES[chip], (4, 2, 3000, (1500, 3000), size, jnp.dtype(dtype)))
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 6
    assert largest_array(program) <= 2 * 3072 * size < 3000 * 1500
    assert program.memory_analysis().temp_size_in_bytes < 2**26


@pytest.mark.slow
@pytest.mark.parametrize("mesh_sizes", [(4, 1, 1), (1, 1, 4)], ids=["data", "tensor"])
def test_tpu_program_of_8_rollouts_of_3200_tokens_fits(mesh_sizes):
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install libtpu (the extra 'tpu')")
    sizes = (4, 4, 51_200, (3_072, 25_600), 128, jnp.bfloat16)
    program = compiled("v5e:2x2", sizes, mesh_sizes=mesh_sizes)
    assert largest_array(program) <= 4 * 51_200 * 128 < 51_200 * 3_072
    assert program.memory_analysis().temp_size_in_bytes < 2**30
