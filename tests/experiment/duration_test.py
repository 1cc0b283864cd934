"""Time by arithmetic: passes of a step, waves of decoding, evaluations, what a resumed run has.

The model of `tiny.config` has few enough numbers to count them by hand.
"""

import jax
import pytest
import tiny

from qlog import train
from qlog.aot import run_cost
from qlog.config import schema
from qlog.config.evaluated import splits_after
from qlog.experiment import cost, duration, prepare, prepare_shapes
from qlog.parallel import chips

ONE = jax.devices()[:1]
NEVER = 1e30  # a peak at which nothing takes time
BY_FLOPS = chips.Gpu(1e9, 1, NEVER)
BY_BYTES = chips.Gpu(NEVER, 1, 1e9)

# ---- `tiny.config`, by hand: 2 layers, width 16, 2 heads and 1 of keys of 8 numbers, MLP 24 ----
BODY = 2 * 16 * (6 * 8 + 3 * 24)  # weights of the layers
HEAD = 48 * 16  # of the vocabulary
SLOT = 2 * 2 * 8 * 4  # bytes of a token's keys and values: 2 layers, float32
PAIR = 4 * 2 * 2 * 8  # FLOPs of attention between two tokens, all heads of all layers
PROMPT = 24  # tokens
# A rationale of 4, its closing of 1 and an answer of 8 tokens have 16 slots, in whole tiles.
PROMPT_PASS = {"body": 2 * BODY * PROMPT, "attention": PAIR * 300}  # 1 + ... + 24
ROLLOUT_PASS = {
    "body": 2 * BODY * 16,
    "attention": PAIR * 520,  # 25 + ... + 40
    "head": 2 * HEAD * 16,
}


def _estimate(monkeypatch, peaks, start=0, devices=1, loss=None, **changes):
    config = tiny.config(**changes)
    if loss:
        config.loss = loss
    run = prepare_shapes(config, jax.devices()[:devices])
    monkeypatch.setattr(chips, "peaks", lambda kind: peaks)
    return duration.estimate(run, start)


# ---- Steps ----


def _forward(prompts, rollouts, *parts):
    """FLOPs of passes over prompts and all their rollouts; of some parts, or of all."""
    passes = [(prompts, PROMPT_PASS), (prompts * rollouts, ROLLOUT_PASS)]
    return sum(n * of[part] for n, of in passes for part in parts or of if part in of)


def test_a_gradient_is_a_forward_and_a_backward_pass_and_what_is_computed_again(monkeypatch):
    sft = {"loss": schema.loss("sft"), "rollout": {"rollouts_per_prompt": 1}}
    # An annotated rationale of 7 tokens has 16 slots with its answer, too.
    sft["rollout"] |= {"rationale_budget": 7}
    flops = {
        remat: 1e9 * _estimate(monkeypatch, BY_FLOPS, **sft, train={"remat": remat}).step
        for remat in ("none", "dots", "attention", "full")
    }
    forward = _forward(4, 1)
    assert flops["none"] == flops["dots"] == pytest.approx(3 * forward)
    assert flops["attention"] == pytest.approx(3 * forward + _forward(4, 1, "body"))
    assert flops["full"] == pytest.approx(3 * forward + _forward(4, 1, "body", "attention"))


def test_long_rollouts_compute_their_logits_again(monkeypatch):
    """Chunks of logits are not kept: with any `train.remat` the head passes four times."""
    config = tiny.config(
        train={"prompts_per_step": 64},
        rollout={"rollouts_per_prompt": 1, "rationale_budget": 2040},
    )
    config.architecture.vocab_size = 2**16
    config.loss = schema.loss("sft")
    run = prepare_shapes(config, ONE)
    assert run.policy.logits_chunk < 64 * 2048
    monkeypatch.setattr(chips, "peaks", lambda kind: BY_FLOPS)
    head = 2 * 2**16 * 16 * 64 * 2048
    rest = 3 * 64 * (2 * BODY * (24 + 2048) + PAIR * (24 + 2048) * (24 + 2049) / 2)
    assert 1e9 * duration.estimate(run).step == pytest.approx(4 * head + rest)


def test_the_reference_takes_a_forward_pass_of_its_own(monkeypatch):
    seconds = [
        _estimate(monkeypatch, BY_FLOPS, loss=schema.loss("grpo", kl_weight=weight)).step
        for weight in (0.0, 0.1)
    ]
    assert 1e9 * (seconds[1] - seconds[0]) == pytest.approx(_forward(4, 4))


def test_the_terms_take_a_second_gradient_now_and_then(monkeypatch):
    """Steps 0, 3, 6 of 7 measure them, of the first of two updates; of the last 4 steps 3 and 6."""
    usual = {"steps": 7, "updates_per_batch": 2}
    plain, measured = (
        _estimate(monkeypatch, BY_FLOPS, train={**usual, "terms_every": every}) for every in (0, 3)
    )
    assert 1e9 * (measured.whole - plain.whole) == pytest.approx(3 * 3 * _forward(2, 4))
    plain, measured = (
        _estimate(monkeypatch, BY_FLOPS, 3, train={**usual, "terms_every": every})
        for every in (0, 3)
    )
    assert 1e9 * (measured.whole - plain.whole) == pytest.approx(2 * 3 * _forward(2, 4))


def test_a_step_is_all_of_its_passes(monkeypatch):
    """Prompts, 5 decoded tokens, 8 scored ones of the gold answer, and the gradient."""
    flops = 1e9 * _estimate(monkeypatch, BY_FLOPS).step
    decoded = 2 * (BODY + HEAD) * 5 + PAIR * (25 + 26 + 27 + 28 + 29)
    scored = 2 * (BODY + HEAD) * 8 + PAIR * sum(range(30, 38))
    sampled = 4 * sum(PROMPT_PASS.values()) + 16 * (decoded + scored)
    assert flops == pytest.approx(sampled + 3 * _forward(4, 4))


# ---- Decoding ----


def _read(steps, prompts, lanes):
    """Bytes that a wave reads: all weights at each step, prompts, and rollouts of t tokens."""
    caches = prompts * PROMPT * steps + lanes * steps * (steps + 1) / 2
    return 4 * (BODY + HEAD) * steps + SLOT * caches


def test_waves_are_those_of_the_sampler(monkeypatch):
    at_once = _estimate(monkeypatch, BY_BYTES).step
    assert 1e9 * at_once == pytest.approx(_read(5, 4, 16))
    waves = _estimate(monkeypatch, BY_BYTES, rollout={"prompts_per_wave": 1}).step
    assert 1e9 * waves == pytest.approx(4 * _read(5, 1, 4))


def test_twice_the_prompts_start_together_where_slots_allow_it(monkeypatch):
    """Memory for 1 of 2 prompts at 1,024 slots starts both with 384, then one after the other."""
    found = _estimate(
        monkeypatch,
        BY_BYTES,
        train={"prompts_per_step": 2},
        rollout={"rationale_budget": 1023, "prompts_per_wave": 1},
    )
    later = _read(1024, 1, 4) - _read(384, 1, 4)
    assert 1e9 * found.step == pytest.approx(_read(384, 2, 8) + 2 * later)


def test_caches_that_do_not_divide_are_read_by_each_device(monkeypatch):
    """Two devices halve the weights; the one head of keys and values is on both."""
    alone = _estimate(monkeypatch, BY_BYTES).step
    both = _estimate(monkeypatch, BY_BYTES, devices=2, mesh={"data": 1, "tensor": 2}).step
    assert 1e9 * (alone - both) == pytest.approx(4 * (BODY + HEAD) * 5 / 2)


# ---- Evaluations ----


@pytest.mark.parametrize("final", ["", "test"])
def test_evaluations_are_those_that_training_makes(final):
    """And the price of a sweep counts the same."""
    step = run_cost.Roofline(1, 1.0, 1.0)
    for steps in range(1, 9):
        for every in range(5):
            config = tiny.config(
                train={"steps": steps}, evaluation={"every": every, "final": final}
            )
            for start in range(steps + 1):
                due = [n for n in range(start + 1, steps + 1) if train.due(n, every, steps)]
                expected = ["validation"] * (len(due) if every else 0) + ["test"] * bool(final)
                assert splits_after(config, start) == expected
            assert run_cost.estimate(config, "train", step).evaluations == len(splits_after(config))


def test_evaluations_take_their_time(monkeypatch):
    """6 questions in batches of 4 are two waves; answers follow the rationales: 13 tokens."""
    of = lambda **evaluation: _estimate(
        monkeypatch, BY_BYTES, train={"steps": 7}, evaluation={"every": 3, **evaluation}
    )
    found = of()
    assert found.num_evaluations == 3 and found.final == 0
    assert 1e9 * found.evaluation == pytest.approx(2 * _read(13, 4, 16))
    assert found.whole == 7 * found.step + 3 * found.evaluation
    # ---- Without rationales they are 9 tokens, the closing included ----
    bare = of(without_rationale=True)
    assert 1e9 * (bare.evaluation - found.evaluation) == pytest.approx(2 * _read(9, 4, 16))
    # ---- The best step's comes last ----
    final = of(final="test")
    assert final.num_evaluations == 3 and final.final == final.evaluation == found.evaluation
    assert final.whole == found.whole + final.final


def test_the_run_table_says_what_is_left(monkeypatch):
    monkeypatch.setattr(chips, "peaks", lambda kind: BY_BYTES)
    config = tiny.config(train={"steps": 7}, evaluation={"every": 3, "final": "test"})
    run = prepare(config, ONE)
    assert run.final_data is not None
    text = cost.describe(run, True)["time"]
    assert ": 7 steps of " in text and " + 3 evaluations of " in text
    assert " + the best step's on test of " in text and "left" not in text
    text = cost.describe(run, True, start=6)["time"]
    assert " left: 1 step of " in text and " + 1 evaluation of " in text
    # Nothing but the last evaluation.
    text = cost.describe(run, True, start=7)["time"]
    assert " left: the best step's on test of " in text and "step of" not in text
    # Parts of an experiment's own: nothing is evaluated.
    trains = prepare(config, ONE, evaluate=False)
    assert duration.estimate(trains).num_evaluations == 0


def test_without_peaks_nothing_is_said_of_time():
    run = prepare_shapes(tiny.config(), ONE)
    assert duration.estimate(run) is None and "time" not in cost.describe(run, False)
