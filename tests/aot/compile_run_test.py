"""Compiling for a TPU that is not here; needs libtpu (the extra `tpu`), else skips."""

import functools

import jax
import numpy as np
import pytest
import tiny

from qlog import experiment
from qlog.aot import compile_run, run_cost
from qlog.aot.compiler import CompiledProgram, topology_devices
from qlog.aot.hlo_cost import Cost, DataLoop, SlicedArray
from qlog.aot.move_cost import move_cost
from qlog.aot.programs import StepLoops
from qlog.errors import ConfigError
from qlog.experiment import duration
from qlog.parallel.chips import CHIPS
from qlog.rollouts.balance import Shards
from qlog.rollouts.pool import Level
from qlog.rollouts.schedule import Moved

V5E = CHIPS["TPU v5 lite"]


def test_what_does_not_fit_names_the_setting_to_change():
    fits = CompiledProgram(1.0, 1.0, 2.0, Cost(197e12), 2)
    large = fits._replace(peak=20 * 2**30, cost=None)
    config = experiment.prepare_shapes(tiny.config(), jax.devices()[:1])
    assert fits.seconds(V5E) == 2.0 and large.seconds(V5E) != large.seconds(V5E)
    assert compile_run.remedies({"decode": fits, "gradient": fits}, V5E, config) == []
    (advice,) = compile_run.remedies({"decode": fits, "gradient": large}, V5E, config)
    assert "gradient needs 20.0 of 15.75 GiB: set train.remat=full" in advice
    assert "train.rollouts_per_microbatch = 0" in advice
    (advice,) = compile_run.remedies({"decode": large}, V5E, config)
    assert "raise mesh.fsdp = 1" in advice
    (advice,) = compile_run.remedies({"evaluate": large}, V5E, config)
    assert "lower evaluation.prompts_per_batch = " in advice
    (advice,) = compile_run.remedies({"update": large}, V5E, config)
    assert "mesh.tensor = 1" in advice


def test_a_step_compiles_for_a_slice_and_fits(capsys, tmp_path):
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install libtpu (the extra 'tpu')")
    config = tiny.config(
        train={"prompts_per_step": 8},
        evaluation={"prompts_per_batch": 2},
        mesh={"data": 2, "fsdp": 2},
    )
    config.architecture.num_layers = 1
    assert compile_run.run_compile(config, "v5e:2x2", tmp_path, "python -m x") == 0
    (written,) = run_cost.read_rooflines(tmp_path / "compile_v5e-2x2.json")
    step = run_cost.roofline(config, "v5e:2x2", [written])
    assert step.chips == 4 and 0 < step.decode_share < 1 and written["command"] == "python -m x"
    # Arithmetic leaves out what programs do besides, so they cannot be faster.
    run = experiment.prepare_shapes(config, topology_devices("v5e:2x2"))
    assert 0 < duration.estimate(run).step < step.seconds
    output = capsys.readouterr().out
    for program in (
        "by arithmetic alone",
        "prefill",
        "decode",
        "score",
        "evaluate",
        "gradient",
        "update",
        "step: at least",
        "fits.",
    ):
        assert program in output
    with pytest.raises(ConfigError, match="not known to libtpu"):
        compile_run.compile_run(config, "v5e:7x9")
    assert jax.default_backend() == "cpu"


def test_loops_that_the_data_end_run_as_a_longest_step_has_it():
    config = tiny.config(
        train={"prompts_per_step": 8, "rollouts_per_microbatch": 4},
        evaluation={"prompts_per_batch": 2},
        rollout={"rationale_budget": 1023, "answer_reserve": 128},
        data={"max_prompt_tokens": 512},
        mesh={"data": 8},
    )
    run = experiment.prepare_shapes(config, jax.devices())
    longest = StepLoops.of(run)

    def trips(scope, shape, length, size):
        return longest.trips(DataLoop(scope, SlicedArray(shape, length, size)))

    assert trips("decode_steps", (1, 1, 4, 1024, 8), 1024, 1) == 1024
    assert trips("packs", (1, 4, 1152), 4, 2) == 2  # windows of a group's packs: 2 of 1,152 slots
    attention = functools.partial(trips, "attention_blocks")
    assert attention((1, 1, 512, 8), 512, 128) == 4  # to a full prompt
    assert attention((1, 1, 4, 1024, 8), 1024, 128) == 4.5  # to a rollout's own past
    assert attention((1, 1, 2 * 1152, 8), 2 * 1152, 128) == 5  # two rollouts in one line
    assert trips("", (1, 300), 300, 100) == 3  # a loop without a name: to the end of its array


@pytest.mark.slow
def test_lengths_make_a_step_cheaper_and_moves_have_a_price(tmp_path):
    """Half of the budget takes less than the whole; what a move sends is read from its program."""
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install libtpu (the extra 'tpu')")
    config = tiny.config(
        train={"prompts_per_step": 8, "rollouts_per_microbatch": 4},
        evaluation={"every": 0},
        rollout={"rationale_budget": 1023, "answer_reserve": 128, "prompts_per_wave": 1},
        data={"max_prompt_tokens": 256},
        mesh={"data": 4},
    )
    rollouts = config.rollout.rollouts_per_prompt
    seconds = []
    for lengths in (None, np.full((8, rollouts), 200)):
        programs, chip = compile_run.compile_run(config, "v5e:2x2", lengths)
        seconds.append(compile_run.step_seconds(programs, chip))
    assert seconds[1]["decode"] < 0.5 * seconds[0]["decode"]
    assert seconds[1]["gradient"] < seconds[0]["gradient"]
    with pytest.raises(ConfigError, match="a step has"):
        compile_run.compile_run(config, "v5e:2x2", np.ones((3, 2), int))
    # ---- A move.
    run = experiment.prepare_shapes(config, topology_devices("v5e:2x2"))
    old, new = Level(2, rollouts, 512), Level(2, rollouts // 2, 512)
    shards = Shards(4, 4, rollouts)
    still, sent = (move_cost(run, Moved(8, old, new, (0, 0), rounds), shards) for rounds in (0, 6))
    assert still.sent == {} or not sum(still.sent.values())
    shape = run.policy.config
    rows = -(-old.num_lanes // 16)  # of a round
    lane = rows * shape.num_kv_heads * old.slots * shape.head_dim
    prompt = shape.num_kv_heads * 256 * shape.head_dim
    expected = 6 * 2 * shape.num_layers * (lane + prompt) * 4
    assert sum(sent.sent.values()) == pytest.approx(expected, rel=0.05)
