"""Costs read off optimised HLO: against hand counts, on text, and on programs compiled for a TPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.experimental import pallas as pl

from qlog import models
from qlog.aot import compile_run
from qlog.aot.hlo_cost import Cost, Module
from qlog.parallel import sharding
from qlog.parallel.chips import CHIPS

_LOOPS = """
HloModule jit_f, is_scheduled=true

%fused (p.0: bf16[64,32], p.1: bf16[32,48]) -> f32[64,48] {
  %p.0 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[32,48]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %dot = f32[64,48]{1,0:T(8,128)} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (arg: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %arg = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}, /*index=2*/bf16[28,32,48]{2,1,0}) parameter(0)
  %step = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %all = bf16[28,32,48]{2,1,0:T(8,128)} get-tuple-element(%arg), index=2
  %slice = bf16[1,32,48]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all, %step), dynamic_slice_sizes={1,32,48}
  %w = bf16[32,48]{1,0:T(8,128)(2,1)S(1)} bitcast(%slice)
  %y = f32[64,48]{1,0:T(8,128)} fusion(%x, %w), kind=kOutput, calls=%fused
  %sum = f32[64,48]{1,0:T(8,128)} all-reduce(%y), replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  ROOT %out = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}, bf16[28,32,48]{2,1,0}) tuple(%step, %x, %all)
}

%condition (arg: (s32[], bf16[64,32])) -> pred[] {
  %arg = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}, bf16[28,32,48]{2,1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(28)
  %step = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %less = pred[]{:T(512)} compare(%step, %limit), direction=LT
}

ENTRY %main (x: bf16[64,32], w: bf16[28,32,48]) -> bf16[64,32] {
  %x = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[28,32,48]{2,1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(FIRST)
  %init = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}, bf16[28,32,48]{2,1,0}) tuple(%zero, %x, %w)
  %loop = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}, bf16[28,32,48]{2,1,0}) while(%init), condition=%condition, body=%body NOTE
  ROOT %out = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    "first, note, trips",
    [(0, "", 28), (3, "", 25), (0, ', backend_config={"known_trip_count":{"n":"7"}}', 7)],
)
def test_a_loop_counts_as_often_as_it_runs(first, note, trips):
    cost = Module(_LOOPS.replace("FIRST", str(first)).replace(" NOTE", note)).cost()
    assert cost.flops == trips * 2 * 64 * 32 * 48
    result = 64 * 48 * 4
    # A layer's weights are read into scratch memory and used there; x is read, y written, and the
    # sum reads and writes. The condition writes a byte and reads two numbers.
    moved = 32 * 48 * 2 + (64 * 32 * 2 + result) + 2 * result
    assert abs(cost.bytes / trips - moved) < 16
    assert cost.sent == {"all-reduce": trips * 2 * 3 / 4 * result}


def test_a_loop_that_the_data_end_counts_as_often_as_one_says():
    text = _LOOPS.replace("FIRST", "0").replace(" NOTE", "")
    text = text.replace("ROOT %less", "%less").replace(
        "direction=LT", "direction=LT\n  ROOT %both = pred[] and(%less, %less)"
    )
    once = 2 * 64 * 32 * 48
    assert Module(text).cost().flops == 28 * once  # the weights, one layer at a time, to their end
    assert Module(text).cost(lambda sweep: sweep.blocks / 2).flops == 14 * once


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
    text = f"ENTRY %main (x: bf16[64,128]) -> bf16[8,128] {{\n  %x = bf16[64,128]{{1,0}} parameter(0)\n  ROOT %y = {line}\n}}"
    assert Module(text).cost().sent == {kind: sent}


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
    return sharding.make_mesh(2, 1, 2, devices=compile_run.topology_devices("v5e:2x2"))


def _compiled(function, slice_, *shapes, spec=()):
    place = jax.sharding.NamedSharding(slice_, jax.sharding.PartitionSpec(*spec))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
    return Module(jax.jit(function).lower(*arguments).compile().as_text()).cost()


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

    phase = compile_run.compile_phase(forward.lower(params, tokens, lengths))
    heads, kv, mlp = 4 * 64, 2 * 64, 256
    projections = 2 * 64 * 128 * (heads + 2 * kv + heads + 3 * mlp)
    attention = 2 * 2 * 64 * 64 * heads
    # The last layer's keys and values are wanted, what follows them is not; XLA may know it.
    per_chip = (projections + attention) / 2
    assert 5 * per_chip < phase.cost.flops <= 6 * per_chip
    assert phase.cost.sent.keys() == {"all-reduce"}  # of the heads' and the MLP's halves
    assert phase.cost.bytes > 4 * sum(x.size for x in jax.tree.leaves(shapes["layers"])) / 2


def test_an_attention_kernel_counts_what_it_visits():
    """Its estimate is for all queries with all of the keys, 1024 slots of which a quarter is seen."""
    text = """ENTRY %main (q: bf16[1,2,64,128], k: bf16[1,2,1024,128]) -> bf16[1,2,64,128] {
  %plan = s32[4]{0} parameter(0)
  %q = bf16[1,2,64,128]{3,2,1,0} parameter(1)
  %k = bf16[1,2,1024,128]{3,2,1,0} parameter(2)
  ROOT %out = bf16[1,2,64,128]{3,2,1,0} custom-call(%plan, %q, %k, %k), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/attention_forward"}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"800","bytes_accessed":"400"}}}
}"""
    assert Module(text).cost() == Cost(800.0, 400.0, {})
    assert Module(text).cost(lambda sweep: sweep.length / sweep.size / 4) == Cost(200.0, 100.0, {})
