"""Costs read off optimized HLO, against counts by hand: on text, and on programs made for a TPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.experimental import pallas as pl
from places import TESTDATA

from qlog import models
from qlog.aot.compiler import compile_program, topology_devices
from qlog.aot.hlo import Module
from qlog.aot.hlo_cost import Cost, DataLoop, SlicedArray, module_cost
from qlog.parallel import sharding
from qlog.parallel.chips import CHIPS


def _module(name, **words):
    """The module in testdata/hlo, with its words in capitals replaced."""
    text = (TESTDATA / "hlo" / f"{name}.hlo").read_text()
    for word, value in words.items():
        text = text.replace(word, value)
    return Module(text)


@pytest.mark.parametrize(
    "first, note, trips",
    [(0, "", 28), (3, "", 25), (0, 'backend_config={"known_trip_count":{"n":"7"}}', 7)],
)
def test_a_loop_counts_as_often_as_it_runs(first, note, trips):
    cost = module_cost(_module("loop", FIRST=str(first), NOTE=note))
    assert cost.flops == trips * 2 * 64 * 32 * 48
    result = 64 * 48 * 4
    # A layer's weights are read into scratch memory and used there; x is read, y written, and the
    # sum reads and writes. The condition writes a byte and reads two numbers.
    moved = 32 * 48 * 2 + (64 * 32 * 2 + result) + 2 * result
    assert abs(cost.bytes / trips - moved) < 16
    assert cost.sent == {"all-reduce": trips * 2 * 3 / 4 * result}


def test_a_loop_that_the_data_end_counts_as_often_as_one_says():
    """The loop ends by more than a counter; its name and the array that it slices tell the rest."""
    module = _module("data_loop")
    once = 2 * 64 * 32 * 48
    assert module_cost(module).flops == 28 * once  # the weights, one layer at a time, to their end
    asked = []

    def half(loop):
        asked.append(loop)
        return loop.array.num_slices / 2

    assert module_cost(module, half).flops == 14 * once
    assert asked == [DataLoop("layers", SlicedArray((28, 32, 48), 28, 1))]


@pytest.mark.parametrize(
    "line, kind, sent",
    [
        (
            "bf16[8,128]{1,0} all-gather(%x), replica_groups={{0,1},{2,3}}",
            "all-gather",
            64 * 128 * 2,
        ),
        (
            "f32[8,128]{1,0} reduce-scatter(%x), replica_groups=[2,8]<=[16]",
            "reduce-scatter",
            64 * 128 * 2 * 7 / 8,
        ),
        (
            "bf16[64,128]{1,0} collective-permute(%x), source_target_pairs={{0,1}}",
            "collective-permute",
            64 * 128 * 2,
        ),
        (
            "bf16[64,128]{1,0} all-to-all(%x), replica_groups=mesh['a'=8] {'a':(2)4}",
            "all-to-all",
            64 * 128 * 2 * 3 / 4,
        ),
    ],
)
def test_bytes_that_a_chip_sends(line, kind, sent):
    assert module_cost(_module("collective", LINE=line)).sent == {kind: sent}


@pytest.mark.parametrize("flops", [None, 12345])
def test_a_kernel_counts_as_it_says(slice_, flops):
    estimate = flops and pl.CostEstimate(flops=flops, transcendentals=7, bytes_accessed=6789)

    def double(x):
        def kernel(x, out):
            out[...] = x[...] * 2

        return pl.pallas_call(kernel, out_shape=x, cost_estimate=estimate)(x)

    spec = jax.sharding.PartitionSpec(("data", "fsdp", "tensor"))
    mapped = jax.shard_map(double, mesh=slice_, in_specs=spec, out_specs=spec, check_vma=False)
    cost = _compiled(mapped, slice_, (64, 128), spec=(("data", "fsdp", "tensor"),))
    own = 2 * 16 * 128 * 2
    assert (
        cost == Cost(12345.0, 6789.0, {}) if flops else cost == Cost(0.0, own, {}, is_whole=False)
    )
    assert (cost.plus(Cost(), 3).is_whole, Cost().plus(cost).is_whole) == (bool(flops),) * 2


def test_the_roofline_is_the_slowest_resource():
    chip = CHIPS["TPU v5 lite"]
    cost = Cost(197e12, 2 * 819e9, {"all-gather": 100e9, "all-reduce": 50e9})
    assert cost.times(chip) == {"arithmetic": 1.0, "memory": 2.0, "interconnect": 0.75}
    assert cost.seconds(chip) == 2.0
    assert cost.plus(cost, 2).sent == {"all-gather": 300e9, "all-reduce": 150e9}


@pytest.fixture(scope="module")
def slice_():
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install libtpu (the extra 'tpu')")
    return sharding.make_mesh(2, 1, 2, devices=topology_devices("v5e:2x2"))


def _compiled(function, slice_, *shapes, spec=()):
    place = jax.sharding.NamedSharding(slice_, jax.sharding.PartitionSpec(*spec))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
    return module_cost(Module(jax.jit(function).lower(*arguments).compile().as_text()))


@pytest.mark.parametrize(
    "equation, a, b, flops",
    [
        ("md,df->mf", (256, 128), (128, 384), 2 * 256 * 128 * 384),
        ("bmc,bnc->bmn", (6, 128, 64), (6, 256, 64), 2 * 6 * 128 * 256 * 64),
        ("bkmrc,bkpc->bkmrp", (2, 3, 4, 64, 128), (2, 3, 256, 128), 2 * 2 * 3 * 4 * 64 * 256 * 128),
    ],
)
def test_matrix_products_as_a_tpu_writes_them(slice_, equation, a, b, flops):
    cost = _compiled(functools.partial(jnp.einsum, equation), slice_, a, b)
    assert cost.flops == flops


def test_a_models_flops_are_those_counted_by_hand(slice_):
    """Six layers in a loop, two prompts over two chips, heads over two more."""
    shape = models.DecoderConfig(
        vocab_size=256,
        num_layers=6,
        width=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_width=256,
    )
    policy = tiny.Policy(shape, 255, jnp.bfloat16, False, slice_)
    shapes = models.shapes(shape)
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        sharding.param_shardings(slice_, shapes),
    )
    rows = sharding.batch_sharding(slice_)
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32, sharding=rows)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=rows)

    @jax.jit
    def forward(params, tokens, lengths):
        prefix = models.prefill(
            params, policy.config, tokens, lengths, models.Execution(policy.dtype)
        )
        return sharding.constrain_prefix(policy.mesh, prefix)

    program = compile_program(forward.lower(params, tokens, lengths))
    heads, kv, mlp = 4 * 64, 2 * 64, 256
    projections = 2 * 64 * 128 * (heads + 2 * kv + heads + 3 * mlp)
    attention = 2 * 2 * 64 * 64 * heads
    # The last layer's keys and values are wanted, what follows them is not; XLA may know it.
    per_chip = (projections + attention) / 2
    assert 5 * per_chip < program.cost.flops <= 6 * per_chip
    assert program.cost.sent.keys() == {"all-reduce"}  # of the heads' and the MLP's halves
    assert program.cost.bytes > 4 * sum(x.size for x in jax.tree.leaves(shapes["layers"])) / 2


def test_an_attention_kernel_counts_what_it_visits():
    """Its estimate is for all queries with all keys: 1024 slots, of which a quarter is seen."""
    module = _module("attention_kernel")
    assert module_cost(module) == Cost(800.0, 400.0, {})
    asked = []

    def a_quarter(loop):
        asked.append(loop)
        return loop.array.num_slices / 4

    assert module_cost(module, a_quarter) == Cost(200.0, 100.0, {})
    assert asked == [DataLoop("attention_blocks", SlicedArray((1, 2, 1024, 128), 1024, 512))]
