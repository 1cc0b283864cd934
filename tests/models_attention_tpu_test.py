"""The TPU kernels give what the blockwise attention gives, and Mosaic compiles them."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from qlog import aot, sharding
from qlog.models import attention, attention_tpu

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    if "tpu" not in request.node.name.split("[")[0].split("_"):
        monkeypatch.setattr(attention_tpu, "_ROWS", 8)
        monkeypatch.setattr(attention_tpu, "_SLOTS", 16)


def rollouts_of(lengths, window=None, groups=1):
    """Start and stop [1, N] of rollouts packed into one row, each causal, with a sliding window."""
    ends = np.cumsum(lengths)
    tokens = np.arange(ends[-1])
    start = np.repeat(ends - lengths, lengths)
    if window:
        start = np.maximum(start, tokens + 1 - window)
    return tuple(x.repeat(groups)[None].astype(np.int32) for x in (start, tokens + 1))


def random_intervals(rng, batch, rows, slots, at_least):
    start, stop = np.sort(rng.integers(0, slots - at_least + 1, (2, batch, rows)), axis=0)
    return start.astype(np.int32), (stop + at_least).astype(np.int32)


def up_to(lengths, rows):
    stop = np.broadcast_to(np.array(lengths, np.int32)[:, None], (len(lengths), rows))
    return np.zeros_like(stop), stop


def patterns():
    """{name: [(T, start, stop) per segment]} for 2 prompts."""
    rng = np.random.default_rng(0)
    return {
        "causal": [(20, *rollouts_of([20]))],
        "packed over a prefix": [
            (33, *up_to([33, 5], 42)),
            (21, *rollouts_of([3, 9, 9], groups=2)),
        ],
        "window": [(40, *rollouts_of([30, 10], window=5))],
        "all parts, some unseen": [
            (24, *up_to([17, 0], 19)),
            (40, *random_intervals(rng, 2, 19, 40, 0)),
            (19, *random_intervals(rng, 1, 19, 19, 1)),
        ],
        "every slot seen": [(32, *up_to([32, 32], 16))],
    }


def arrays(pattern, heads=2, size=4, dtype=np.float32):
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    rows = pattern[0][1].shape[1]
    queries, cotangent = normal(2, heads, rows, size), normal(2, heads, rows, size)
    caches = [(normal(2, heads, n, size), normal(2, heads, n, size)) for n, *_ in pattern]
    return queries, cotangent, caches


def value_and_gradients(attend, pattern, queries, cotangent, caches):
    def run(queries, caches):
        return attend(
            queries, [attention.Segment(*c, *ends[1:]) for c, ends in zip(caches, pattern)]
        )

    def both(queries, caches):
        out, back = jax.vjp(run, queries, caches)
        return out, back(cotangent)

    return jax.tree.leaves(jit(both)(queries, caches))


interpreted = functools.partial(attention_tpu.attend, interpret=True)


@pytest.mark.parametrize("name", patterns())
def test_the_kernels_equal_the_blockwise_attention_in_value_and_gradients(name):
    pattern = patterns()[name]
    given = arrays(pattern)
    found = value_and_gradients(interpreted, pattern, *given)
    for one, other in zip(
        found, value_and_gradients(attention.attend, pattern, *given), strict=True
    ):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_bfloat16_stays_close():
    pattern = patterns()["packed over a prefix"]
    given = arrays(pattern, size=32, dtype=jnp.bfloat16)
    exact = value_and_gradients(attention.attend, pattern, *jax.tree.map(np.float32, given))
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
    expected = value_and_gradients(attention.attend, pattern, queries, cotangent, caches)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("heads", [2, 3], ids=["heads split", "heads do not divide"])
def test_shards_give_what_one_device_gives(heads):
    mesh = sharding.make_mesh(2, 1, 2, devices=jax.devices()[:4])
    pattern = patterns()["packed over a prefix"]
    given = arrays(pattern, heads=heads)
    found = value_and_gradients(functools.partial(interpreted, mesh=mesh), pattern, *given)
    for one, other in zip(
        found, value_and_gradients(attention.attend, pattern, *given), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def compiled(topology, sizes, attend=attention_tpu.attend, mesh_sizes=(-1, 1, 1)):
    """Forward and backward for a TPU slice, from shapes (B, K, N, (T, ...), C, dtype)."""
    mesh = sharding.make_mesh(*mesh_sizes, devices=aot.topology_devices(topology))
    batch, heads, rows, slots, size, dtype = sizes

    def shape(*dims, dtype=dtype):
        place = jax.NamedSharding(
            mesh, attention_tpu._spec(mesh, jax.ShapeDtypeStruct(dims, dtype))
        )
        return jax.ShapeDtypeStruct(dims, dtype, sharding=place)

    def both(queries, caches, intervals, cotangent):
        segments = lambda caches: [attention.Segment(*c, *i) for c, i in zip(caches, intervals)]
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
