"""Compiling for a TPU that is not here; needs libtpu (the extra `tpu`), else skips."""

import functools

import jax
import pytest
import tiny

from qlog import experiment
from qlog.aot import compile_run, run_cost
from qlog.aot.compiler import CompiledProgram
from qlog.aot.hlo_cost import Cost, DataLoop, SlicedArray
from qlog.aot.programs import StepLoops
from qlog.errors import ConfigError
from qlog.parallel.chips import CHIPS

V5E = CHIPS["TPU v5 lite"]


def test_what_does_not_fit_names_the_setting_to_change():
    fits = CompiledProgram(1.0, 1.0, 2.0, Cost(197e12), 2)
    large = fits._replace(peak=20 * 2**30, cost=None)
    config = tiny.config()
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
    output = capsys.readouterr().out
    for program in (
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
