"""Memory and tokens by arithmetic: what cannot be held is refused, and nothing else is."""

import re

import jax
import pytest
import tiny

from qlog import train_metrics
from qlog.config import schema
from qlog.errors import ConfigError
from qlog.experiment import cost, phases, prepare, prepare_shapes
from qlog.parallel import memory
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
        {"architecture": {"num_layers": 2**16, "width": 2**15}},
        "architecture.num_layers = 65536",
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
    _check_remedies(tiny.config(**changes), text)


def _check_remedies(config, text, room=None):
    """Each field is named once, and with each value that is named the phase fits."""
    name = {verb: name for name, verb in cost._VERBS.items()}[
        text.split(": ")[1].split(" needs")[0]
    ]
    told = dict(re.findall(r"([a-z_.]+) to (\d+)\b", text))
    assert all(text.split(": ", 1)[1].count(field) == 1 for field in told)
    for field, value in told.items():
        section, key = field.split(".")
        run = prepare_shapes(schema.merge(config, {section: {key: int(value)}}), ONE)
        found = {
            phase.name: phase.bytes
            for phase in phases.phases(run, name != "evaluate", name == "evaluate")
        }
        assert found[name] <= (room or memory.of_device(run.mesh).bytes), field
    return told


@pytest.mark.parametrize("room, batch", [(400e3, "4"), (200e3, "2")], ids=["400 kB", "200 kB"])
def test_evaluation_names_only_what_would_help(room, batch, monkeypatch):
    """A batch of 64 is one of all 16 questions: 32 would change nothing, 8 and less do."""
    config = tiny.config(
        evaluation={
            "every": 1,
            "prompts": 16,
            "prompts_per_batch": 64,
            "rollouts_per_prompt": 16,
        }
    )
    monkeypatch.setenv("QLOG_MEMORY", str(room))
    with pytest.raises(ConfigError) as caught:
        prepare(config, ONE)
    text = str(caught.value)
    assert text.startswith("config.evaluation.prompts_per_batch = 64: evaluation needs at least ")
    told = _check_remedies(config, text, room)
    assert told["evaluation.prompts_per_batch"] == batch


def test_what_is_cut_as_small_as_can_be_is_not_named(monkeypatch):
    """One prompt at a time cannot be less; and as a mesh of one device has no axis to raise."""
    config = tiny.config(rollout={"prompts_per_wave": 1, "rationale_budget": 500})
    # The state alone is 57 kB.
    monkeypatch.setenv("QLOG_MEMORY", "200e3")
    with pytest.raises(ConfigError) as caught:
        prepare(config, ONE)
    text = str(caught.value)
    assert "decoding needs" in text and "prompts_per_wave" not in text
    assert "or take more devices and raise mesh.fsdp = 1" in text
    assert _check_remedies(config, text, 200e3)


def test_fields_that_do_not_suffice_alone_are_named_together():
    """With 1 kB besides the state no field helps enough, but all that help are named."""
    run = prepare_shapes(tiny.config(), ONE)
    (needs,) = (each for each in phases.phases(run, True, False) if each.name == "decode")
    state = sum(needs.of_model.values())
    found = cost._lowerings(run, needs, state + 1000)
    # 4 prompts of 4 rollouts: half of each. The answer is not sampled: its reserve changes nothing.
    assert {each.field: (each.value, each.is_enough) for each in found} == {
        "rollout.prompts_per_wave": (2, False),
        "train.prompts_per_step": (2, False),
        "rollout.rollouts_per_prompt": (2, False),
        "rollout.rationale_budget": (2, False),
    }
    text = cost._lower_text(found, "train.prompts_per_step")
    assert text.startswith("lower train.prompts_per_step (to 2 or less) and rollout.prompts_per_wa")


def test_programs_that_do_not_fit_name_what_makes_them_smaller():
    usual, cut = (
        prepare_shapes(
            tiny.config(
                rollout={"prompts_per_wave": wave},
                train={"prompts_per_microbatch": wave, "rollouts_per_microbatch": wave},
                evaluation={"prompts_per_batch": wave or 4},
                mesh={"data": 2},
            ),
            jax.devices()[:2],
        )
        for wave in (0, 1)
    )
    fields = {"decode": "rollout.prompts_per_wave = 0 (0 is all)", "score": "rollout.prompts"}
    fields |= {"gradient": "train.prompts_per_microbatch = 0"}
    fields |= {"evaluate": "evaluation.prompts_per_batch = 4"}
    for name, field in fields.items():
        assert field in cost.remedy(name, usual)
        assert "lower" not in cost.remedy(name, cut)
        assert "raise mesh.fsdp = 1" in cost.remedy(name, cut)
    assert cost.remedy("update", cut) == "raise mesh.fsdp = 1 or mesh.tensor = 1"


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
    monkeypatch.setenv("QLOG_MEMORY", "1")
    with pytest.raises(ConfigError, match=r"needs at least .* kB .*, and QLOG_MEMORY says 1 byte:"):
        cost.check(prepare_shapes(tiny.config(), ONE), True, False)
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
