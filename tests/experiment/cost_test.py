"""Memory by arithmetic: what cannot be held is refused in seconds, and nothing else is."""

import jax
import pytest
import tiny

from qlog import train_metrics
from qlog.aot.compiler import compile_lowered
from qlog.aot.programs import step_programs
from qlog.config import schema
from qlog.errors import ConfigError
from qlog.experiment import cost, prepare, prepare_shapes
from qlog.losses import RECIPES
from qlog.parallel import sharding

ONE = jax.devices()[:1]

# What no machine of this kind holds: (changes, the field that is blamed, a part that is named).
TOO_LARGE = {
    "rollouts": (
        {"rollout": {"rollouts_per_prompt": 2**20, "rationale_budget": 4000}},
        "rollout.rollouts_per_prompt = 1048576",
        "caches",
    ),
    "budget": (
        {"rollout": {"rationale_budget": 10**7, "rollouts_per_prompt": 400}},
        "rollout.rationale_budget = 10000000",
        "caches",
    ),
    "prompts": (
        {"train": {"prompts_per_step": 10**6}, "rollout": {"rationale_budget": 4000}},
        "train.prompts_per_step = 1000000",
        "caches",
    ),
    "vocabulary": (
        {"architecture": {"vocab_size": 10**9, "width": 1024}},
        "architecture.vocab_size = 1000000000",
        "moments",
    ),
    "layers": (
        {"architecture": {"num_layers": 10**7, "width": 1024}},
        "architecture.num_layers = 10000000",
        "moments",
    ),
    "model": ({"model": "qwen3_32b", "architecture": {}}, "model = 'qwen3_32b'", "moments"),
    "evaluation": (
        {
            "evaluation": {"every": 1, "rollouts_per_prompt": 2**20},
            "rollout": {"rationale_budget": 4000},
        },
        "evaluation.rollouts_per_prompt = 1048576",
        "caches",
    ),
    "waves": (
        {
            "train": {"prompts_per_step": 2**16},
            "rollout": {"prompts_per_wave": 1, "rollouts_per_prompt": 2**16},
        },
        "train.prompts_per_step = 65536",
        "rollouts",
    ),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_what_this_machine_cannot_hold_is_refused(case):
    changes, field, part = TOO_LARGE[case]
    with pytest.raises(ConfigError) as caught:
        prepare(tiny.config(**changes), ONE)
    text = str(caught.value)
    assert text.startswith(f"config.{field}: "), text
    assert part in text and "this host has" in text and "--mode=compile" in text
    assert "\n" not in text and ("lower" in text or "take a smaller model" in text)


def test_what_fits_is_not_refused():
    """A step of the paper's sizes with a small model takes gigabytes here, and is allowed."""
    config = tiny.config(
        train={"prompts_per_step": 32},
        rollout={"rollouts_per_prompt": 32, "rationale_budget": 2944, "answer_reserve": 128},
        evaluation={"every": 1, "rollouts_per_prompt": 16},
    )
    run = prepare(config, ONE)
    largest = max(cost.phases(run, True, True), key=lambda phase: phase.bytes)
    assert largest.name == "decode"
    # 32 x 32 rollouts of 3,072 slots, keys and values of 2 layers with 1 head of 8 float32 numbers.
    assert largest.of_batch["caches"] == pytest.approx(32 * (32 * 3072 + 24) * 2 * 2 * 8 * 4)
    assert largest.bytes < cost.room(run.mesh).bytes
    table = train_metrics.describe(run, "x", 0)
    assert "GB per device, for decoding; this host has" in table["memory"]
    assert table["tokens per step"].startswith("at most 3,014,656,")


MESHES = {
    "one device": {"data": 1},
    "fsdp and tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("loss", ["garl", "grpo"])
@pytest.mark.parametrize(
    "dtype, cache", [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "int8")]
)
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
    bounds = {phase.name: phase.bytes for phase in cost.phases(run, True, True)}
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
    names = [phase.name for phase in cost.phases(run, True, False)]
    assert names == (["gradient"] if loss == "sft" else ["decode", "gradient"])
    assert [phase.name for phase in cost.phases(run, False, True)] == ["evaluate"]
    assert [phase.name for phase in cost.phases(run, False, False)] == ["load"]


def test_int8_makes_the_caches_of_decoding_smaller_and_no_others():
    def caches(cache):
        run = prepare_shapes(tiny.config(dtype="bfloat16", rollout={"cache": cache}), ONE)
        return {
            phase.name: phase.of_batch["caches"]
            for phase in cost.phases(run, True, True)
            if "caches" in phase.of_batch
        }

    full, small = caches("auto"), caches("int8")
    # Heads of 8: a byte per number and 4 per vector, of 16 in bfloat16.
    assert small["decode"] == full["decode"] * 12 / 16
    assert small["gradient"] == full["gradient"]


def test_the_memory_of_this_host_is_known():
    total = cost.host_memory()
    assert total and 2**28 < total < 2**50
    assert cost.room(sharding.make_mesh(-1, 1, 1)).bytes == pytest.approx(total / 8)
