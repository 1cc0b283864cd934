"""Memory, tokens and time by arithmetic: what cannot be held is refused, and nothing else is."""

import jax
import pytest
import tiny

from qlog import train_metrics
from qlog.errors import ConfigError
from qlog.experiment import cost, duration, phases, prepare, prepare_shapes
from qlog.parallel import chips, memory
from qlog.parallel.memory import Room

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
    largest = max(phases.phases(run, True, True), key=lambda phase: phase.bytes)
    assert largest.name == "decode"
    # 32 x 32 rollouts of 3,072 slots, keys and values of 2 layers with 1 head of 8 float32 numbers.
    assert largest.of_batch["caches"] == pytest.approx(32 * (32 * 3072 + 24) * 2 * 2 * 8 * 4)
    assert largest.bytes < memory.of_device(run.mesh).bytes
    table = train_metrics.describe(run, "x", 0)
    assert "MB per device, for decoding; this host has" in table["memory"]
    assert table["tokens per step"].startswith("at most 3,014,656,")


def test_a_variable_says_what_a_device_has(monkeypatch):
    """A way past a refusal that would be false."""
    changes, field, _ = TOO_LARGE["rollouts"]
    config = tiny.config(**changes)
    with pytest.raises(ConfigError, match=r"QLOG_MEMORY=BYTES sets what one device has"):
        prepare(config, ONE)
    run = prepare_shapes(config, ONE)
    monkeypatch.setenv("QLOG_MEMORY", "1e15")
    cost.check(run, True, False)
    assert "QLOG_MEMORY says 1,000,000.0 GB" in cost.describe(run, False)["memory"]
    monkeypatch.setenv("QLOG_MEMORY", "1000000")
    with pytest.raises(ConfigError, match=r"needs at least .*, and QLOG_MEMORY says 1.0 MB"):
        cost.check(run, True, False)
    monkeypatch.setenv("QLOG_MEMORY", "64GB")
    with pytest.raises(ConfigError, match="QLOG_MEMORY = '64GB' is no number of bytes"):
        cost.check(run, True, False)


def test_a_checkpoint_must_fit_the_host_next_to_accelerators(monkeypatch):
    run = prepare_shapes(tiny.config(), ONE)
    state = run.abstract_state()
    # float32 parameters, both moments of each, and a few counters.
    params = 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert 3 * params <= cost.host_bytes(run) < 3 * params + 100
    # Devices of a CPU: there is no other memory than theirs.
    assert "host memory" not in cost.describe(run, False)
    monkeypatch.setattr(memory, "of_host", lambda mesh: Room(1e12, "this host has 1,000.0 GB"))
    cost.check(run, True, False)
    assert cost.describe(run, False)["host memory"].endswith("; this host has 1,000.0 GB")
    monkeypatch.setattr(
        memory, "of_host", lambda mesh: Room(3 * params - 1, "this host has little")
    )
    cost.check(run, False, True)  # saves nothing
    with pytest.raises(
        ConfigError, match=r"config.model = .* checkpoint .* QLOG_HOST_MEMORY=BYTES"
    ):
        cost.check(run, True, False)


# ---- Time ----


def _seconds(monkeypatch, peaks, **changes):
    run = prepare_shapes(tiny.config(**changes), jax.devices()[: changes.get("devices", 1)])
    monkeypatch.setattr(chips, "peaks", lambda kind: peaks)
    return run, duration.estimate(run)


def test_time_is_arithmetic_at_the_peaks(monkeypatch):
    """Where memory is fast a step takes its FLOPs, and where it is slow what decoding reads."""
    changes = {
        "train": {"prompts_per_step": 4, "steps": 10},
        "rollout": {"rollouts_per_prompt": 8, "rationale_budget": 100},
        # Wide, so that attention is little.
        "architecture": {"width": 512, "mlp_width": 1024},
    }
    never = 1e30
    run, by_flops = _seconds(monkeypatch, chips.Gpu(1e9, 1, never), **changes)
    shape, sampled = run.policy.config, run.sampling.max_length
    weights = sum(leaf.size for leaf in jax.tree.leaves(run.abstract_params()))
    tokens = 4 * 8 * sampled
    # Sampling is 2 FLOPs per weight and token, learning 6; prompts and attention come to them.
    assert 8 * weights * tokens / 1e9 * 0.9 < by_flops.step
    assert by_flops.step < 8 * weights * tokens / 1e9 * 1.6
    assert by_flops.whole == 10 * by_flops.step and by_flops.num_evaluations == 0

    run, by_bytes = _seconds(monkeypatch, chips.Gpu(never, 1, 1e9), **changes)
    # Each step reads the weights once, and of each rollout what it has so far (float32, 2 layers).
    slot = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4
    caches = 4 * 8 * slot * sampled * (sampled + 1) / 2
    assert by_bytes.step == pytest.approx((4 * weights * sampled + caches) / 1e9, rel=0.05)
    # ---- Twice the waves read the weights twice ----
    run, waves = _seconds(
        monkeypatch,
        chips.Gpu(never, 1, 1e9),
        **{**changes, "rollout": changes["rollout"] | {"prompts_per_wave": 2}},
    )
    assert waves.step - by_bytes.step == pytest.approx(4 * weights * sampled / 1e9, rel=0.05)


def test_evaluations_take_their_time(monkeypatch):
    monkeypatch.setattr(chips, "peaks", lambda kind: chips.Gpu(1e12, 1, 1e9))
    config = tiny.config(train={"steps": 7}, evaluation={"every": 3})
    run = prepare(config, ONE)
    found = duration.estimate(run)
    assert found.num_evaluations == 3 and found.evaluation > 0
    assert found.whole == 7 * found.step + 3 * found.evaluation
    assert "7 steps of" in cost.describe(run, True)["time"]
    assert "3 evaluations of" in cost.describe(run, True)["time"]


def test_without_peaks_nothing_is_said_of_time():
    run = prepare_shapes(tiny.config(), ONE)
    assert duration.estimate(run) is None and "time" not in cost.describe(run, False)
