"""Lower bounds of a run's memory, against what the compiler needs."""

import itertools

import jax
import pytest
import tiny

from qlog.aot.compiler import compile_lowered
from qlog.aot.programs import step_programs
from qlog.config import schema
from qlog.experiment import phases, prepare_shapes
from qlog.losses import RECIPES

ONE = jax.devices()[:1]

MESHES = {
    "one device": {"data": 1},
    "fsdp and tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}


def _compiled_cases():
    """Each value of each axis once by default: a case compiles three programs."""
    caches = [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "int8")]
    usual = {
        ("bfloat16", "int8", "garl", "one device"),
        ("float32", "auto", "grpo", "fsdp and tensor"),
        ("bfloat16", "auto", "garl", "fsdp and tensor"),
    }
    for (dtype, cache), loss, mesh in itertools.product(caches, ("garl", "grpo"), MESHES):
        case = (dtype, cache, loss, mesh)
        yield pytest.param(*case, marks=[] if case in usual else pytest.mark.slow)


@pytest.mark.parametrize("dtype, cache, loss, mesh", _compiled_cases())
def test_bounds_are_below_what_the_compiler_needs(dtype, cache, loss, mesh):
    """And not far below: most of what is left out are temporaries of the backward pass."""
    devices = jax.devices() if mesh != "one device" else ONE
    config = tiny.config(
        dtype=dtype,
        # Batches of a run without data have the least widths, so these are them.
        data={"max_prompt_tokens": 16},
        rollout={
            "rollouts_per_prompt": 8,
            "rationale_budget": 500,
            "answer_reserve": 16,
            "cache": cache,
        },
        train={"prompts_per_step": 8, "remat": "full"},
        evaluation={"every": 1, "prompts_per_batch": 1},
        mesh=MESHES[mesh],
    )
    config.loss = schema.loss(loss)
    config.architecture = dict(
        vocab_size=512,
        num_layers=6,
        width=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        mlp_width=128,
    )
    run = prepare_shapes(config, devices)
    bounds = {phase.name: phase.bytes for phase in phases.phases(run, True, True)}
    assert set(bounds) == {"decode", "gradient", "evaluate"}
    for program in step_programs(run):
        if program.name in bounds:
            memory = compile_lowered(program.lowered).memory_analysis()
            results = memory.output_size_in_bytes - memory.alias_size_in_bytes
            needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
            needed += program.resident
            assert bounds[program.name] <= needed, program.name
            assert bounds[program.name] > 0.1 * needed, program.name


@pytest.mark.parametrize("loss", RECIPES)
def test_every_loss_has_its_phases(loss):
    config = tiny.config(rollout={"rollouts_per_prompt": 1 if loss == "sft" else 4})
    config.loss = schema.loss(loss)
    run = prepare_shapes(config, ONE)
    names = [phase.name for phase in phases.phases(run, True, False)]
    assert names == (["gradient"] if loss == "sft" else ["decode", "gradient"])
    assert [phase.name for phase in phases.phases(run, False, True)] == ["evaluate"]
    assert [phase.name for phase in phases.phases(run, False, False)] == ["load"]


def test_int8_makes_the_caches_of_decoding_smaller_and_no_others():
    def caches(cache):
        run = prepare_shapes(tiny.config(dtype="bfloat16", rollout={"cache": cache}), ONE)
        return {
            phase.name: phase.of_batch["caches"]
            for phase in phases.phases(run, True, True)
            if "caches" in phase.of_batch
        }

    full, small = caches("auto"), caches("int8")
    # Heads of 8: a byte per number and 4 per vector, of 16 in bfloat16.
    assert small["decode"] == full["decode"] * 12 / 16
    assert small["gradient"] == full["gradient"]


def test_the_pool_holds_no_scores():
    """log w and the gold answers' log-probabilities lie only where rollouts are that are done."""
    config = tiny.config(rollout={"answer_reserve": 100})
    config.loss = schema.loss("r3")
    run = prepare_shapes(config, ONE)
    length, scores = run.sampling.max_length, 1 + run.sampling.gold_tokens
    assert scores == 101
    # Per token its id, its log-probability and whether it was sampled; two lengths, three flags.
    each = length * (4 + 4 + 1) + 2 * 4 + 3
    decode = phases.phases(run, True, False)[0]
    assert decode.of_batch["rollouts"] == 2 * 16 * each + 16 * scores * 4
