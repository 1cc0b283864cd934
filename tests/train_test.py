"""End to end on a tiny model: what a run leaves behind, exact resume, every estimator, signals."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback

import jax
import numpy as np
import pytest
import tiny
import trees
from places import ROOT, TESTS

from qlog import data, losses, train
from qlog.commands import modes
from qlog.config import schema
from qlog.config.check import check_same_run
from qlog.errors import ConfigError, PassingError, TrainingError
from qlog.experiment import prepare
from qlog.experiment.files import data_limits
from qlog.report import read
from qlog.runs import checkpoint_reader
from qlog.runs.log import read_jsonl
from qlog.storage import paths

ONE = jax.devices()[:1]
NAMES = ("amy", "bea", "cal", "dan")


def _params(config, workdir):
    abstract = prepare(config, ONE).abstract_params()
    return checkpoint_reader.load_params(workdir, abstract)


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    config = tiny.config(train={"steps": 6}, evaluation={"every": 3})
    workdir = tmp_path_factory.mktemp("six")
    return config, workdir, tiny.run(config, workdir, ONE)


def test_a_run_leaves_everything_behind(six_steps):
    config, workdir, outcome = six_steps
    assert json.loads((workdir / "config.json").read_text())["loss"]["q"] == 0.75
    rows = read_jsonl(workdir / "metrics.jsonl")
    trained = [row for row in rows if row["phase"] == "train"]
    assert [row["step"] for row in trained] == list(range(6))
    gauges = {
        "loss",
        "log_p",
        "effective_reward",
        "q",
        "ess",
        "no_signal",
        "budget_hits",
        "ended_early",
        "entropy/rationale",
        "repetition",
        "mismatch",
        "mismatch_max",
        "mult_prob_error",
        "skipped_updates",
        "grad_norm",
        "tokens_per_s/decode",
        "decode_waste",
        "tokens_per_s/train",
        "learn_waste",
        "seconds/train",
    }
    assert gauges <= set(trained[0])
    assert all(row["mismatch_max"] < 1e-4 for row in trained)
    assert [row["step"] for row in rows if row["phase"] == "validation"] == [2, 5]
    rollouts = read_jsonl(workdir / "rollouts.jsonl")
    known = {"prompt", "rationale", "answer", "log_w", "coefficient", "forced", "gold"}
    assert known <= set(rollouts[0])
    assert len(rollouts) == 6 * 2 * 4
    assert list(workdir.glob("events.out.tfevents.*"))
    samples = read_jsonl(workdir / "samples" / "step_000006.jsonl")
    assert len(samples) == 6 and all(len(row["answers"]) == 4 for row in samples)
    results = json.loads((workdir / "results.json").read_text())
    assert results["metrics"] == outcome.metrics and results["step"] == 6
    assert results["source"] == f"{workdir}, step 6" and results["split"] == "validation"
    assert not outcome.interrupted


def test_nothing_compiles_after_the_second_step(six_steps):
    """Prompts and rationales of other lengths included."""
    _, workdir, _ = six_steps
    trained = [row for row in read_jsonl(workdir / "metrics.jsonl") if row["phase"] == "train"]
    assert len({row["rationale_length"] for row in trained}) > 1
    assert trained[0]["compilations"] > 0
    assert [row["compilations"] for row in trained[2:]] == [0] * 4


def test_three_and_three_steps_equal_six_bit_for_bit(six_steps, tmp_path):
    config, whole, _ = six_steps
    # Measuring the gradient's terms changes nothing either.
    tiny.run(schema.merge(config, {"train": {"steps": 3, "terms_every": 2}}), tmp_path, ONE)
    tiny.run(config, tmp_path, ONE)
    rows = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if r["phase"] == "train"]
    assert [r["step"] for r in rows if "terms/score_norm" in r] == [0, 2]
    for row in rows[0], rows[2]:
        score, path, cosine = (row[f"terms/{x}"] for x in ("score_norm", "path_norm", "cosine"))
        squared = score**2 + path**2 + 2 * score * path * cosine
        assert row["grad_norm"] ** 2 == pytest.approx(squared, rel=1e-3)
    trees.assert_equal(_params(config, tmp_path), _params(config, whole))
    ids = [[row["id"] for row in read_jsonl(d / "rollouts.jsonl")] for d in (tmp_path, whole)]
    assert ids[0] == ids[1] and len(set(ids[0])) == 12
    losses_ = [
        [row["loss"] for row in read_jsonl(d / "metrics.jsonl") if row["phase"] == "train"]
        for d in (tmp_path, whole)
    ]
    assert losses_[0] == losses_[1]


def test_a_run_does_not_resume_under_another_config(six_steps):
    config, workdir, _ = six_steps
    for changes in (
        {"loss": schema.loss("garl", q=0.5)},
        {"seed": 1},
        {"train": {"prompts_per_step": 2}},
    ):
        with pytest.raises(ConfigError, match="differs from the run in --workdir"):
            tiny.run(schema.merge(config, changes), workdir, ONE)


def test_a_step_after_which_the_parameters_overflow_ends_the_run():
    """Its gradient may be finite; what comes after it is not, so nothing of it is saved."""
    values = {"param_norm": float("inf"), "skipped_in_a_row": 0.0}
    with pytest.raises(TrainingError, match="step 7: the norm of the parameters is inf, and they"):
        train._check_health(tiny.config(), 7, values)


def test_a_schedule_keeps_the_number_of_its_steps(six_steps):
    before = json.loads(schema.to_json(six_steps[0]))
    more = schema.merge(six_steps[0], {"train": {"steps": 9}})
    check_same_run(before, more)
    for schedule in ("linear", "cosine"):
        with pytest.raises(ConfigError, match=r"config\.train\.steps = 9 differs from the run"):
            of_schedule = {"optimizer": {"schedule": schedule}}
            before = json.loads(schema.to_json(schema.merge(six_steps[0], of_schedule)))
            check_same_run(before, schema.merge(more, of_schedule))


def test_a_finished_run_started_again_does_nothing(six_steps):
    config, workdir, outcome = six_steps
    before = (workdir / "metrics.jsonl").read_text()
    assert tiny.run(config, workdir, ONE).metrics == outcome.metrics
    assert (workdir / "metrics.jsonl").read_text() == before


def test_the_best_checkpoint_is_evaluated_on_the_test_split(six_steps, tmp_path):
    """Not the last one, and not on the split that chose it."""
    changes = {"train": {"steps": 4}, "evaluation": {"every": 1, "final": "test"}}
    config = schema.merge(six_steps[0], changes)
    tiny.run(config, tmp_path, ONE)
    scores = json.loads((tmp_path / "scores.json").read_text())
    best = min(scores, key=lambda step: (-scores[step]["value"], int(step)))
    final = json.loads((tmp_path / "final.json").read_text())
    assert (final["split"], final["step"]) == ("test", int(best))
    rows = read_jsonl(tmp_path / "samples" / "final.jsonl")
    validation = read_jsonl(tmp_path / "samples" / "step_000004.jsonl")
    assert not {row["id"] for row in rows} & {row["id"] for row in validation}
    # The command that evaluates the best checkpoint gives the same samples.
    again = schema.merge(config, {"evaluation": {"split": "test"}})
    modes.run("evaluate", again, tmp_path)
    # (On other devices: the last bits of log w differ.)
    again_rows = read_jsonl(tmp_path / "samples" / "test.jsonl")
    assert [row["answers"] for row in again_rows] == [row["answers"] for row in rows]
    run = read.read_run(paths.Path(tmp_path), "run")
    assert run.final and run.final.ids == tuple(row["id"] for row in rows)
    for name, values in run.final.questions.items():
        assert run.final.metrics[name] == pytest.approx(values.mean())
    # The model before training, in a folder without a run: row Base.
    modes.run("evaluate", again, tmp_path / "base", checkpoint="base")
    base = read.read_run(paths.Path(tmp_path / "base"), "base")
    assert base.base and base.final is None and base.state.kind == "evaluated"
    assert len(base.base.ids) == len(rows)
    # A longer run has another end: what was final is removed.
    longer = schema.merge(config, {"train": {"steps": 5}})
    tiny.run(longer, tmp_path, ONE)
    assert json.loads((tmp_path / "results.json").read_text())["step"] == 5
    assert (tmp_path / "final.json").exists()


def test_the_split_that_chooses_cannot_be_the_one_that_is_reported(tmp_path):
    config = tiny.config(evaluation={"split": "test", "final": "test"})
    with pytest.raises(ConfigError, match="config.evaluation.final = 'test' is also"):
        tiny.run(config, tmp_path, ONE)
    with pytest.raises(ConfigError, match="config.evaluation.final = 'tset' is unknown: use ''"):
        tiny.run(tiny.config(evaluation={"final": "tset"}), tmp_path, ONE)


_KILLED = """
import sys, jax
sys.path.insert(0, sys.argv[1])
import tiny
tiny.run(tiny.config(train={"steps": 100_000}, checkpoint={"every": 100_000}), sys.argv[2])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_cleanly_and_the_run_resumes(number, tmp_path, compilation_cache):
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": compilation_cache,
        "PYTHONPATH": str(ROOT),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(TESTS), str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 240
    while process.poll() is None and len(read_jsonl(tmp_path / "metrics.jsonl")) < 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "saved in" in output and "Traceback" not in output
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    done = len(rows)
    assert done >= 1
    config = tiny.config(train={"steps": done + 1}, checkpoint={"every": 100_000})
    tiny.run(config, tmp_path, ONE)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(done + 1))
    whole = tmp_path / "uninterrupted"
    tiny.run(config, whole, ONE)
    trees.assert_equal(_params(config, tmp_path), _params(config, whole))
    ids = [[row["id"] for row in read_jsonl(d / "rollouts.jsonl")] for d in (tmp_path, whole)]
    assert ids[0] == ids[1]


SETTINGS = {
    "garl": {},
    "guarded_garl": {},
    "paft": {},
    "jensen": {"q": 1.0},
    "jepo": {},
    "grpo": {"kl_weight": 0.1},
    "rloo": {},
    "star": {},
    "maxrl": {},
    "sft": {},
    "iwae": {},
    "trice": {},
    "rb_rloo": {},
    "rb_reinforce": {},
    "log_prob": {"importance": "sequence"},
    "vr_cli": {},
    "latro": {},
    "average_log_prob": {},
    "rlpr": {},
    "r3": {},
    "nover": {},
    "tempered": {"importance": "token", "kl_weight": 0.1},
    "rb_pass_at_k": {},
    "rb_maxrl": {},
    "pkpo": {},
    "rs_grpo": {},
    "gspo": {},
    "cispo": {},
    "lite_ppo": {},
    "reinforce_plus_plus": {"kl_weight": 0.1, "kl_kind": "sequence"},
}


def test_every_recipe_has_a_run():
    assert set(SETTINGS) == set(losses.RECIPES)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_estimator_trains(name, tmp_path):
    changes = {"train": {"steps": 1}, "loss": schema.loss(name, **SETTINGS[name])}
    if name == "sft":
        changes["rollout"] = {"rollouts_per_prompt": 1, "rationale_budget": 6}
    tiny.run(tiny.config(**changes), tmp_path, ONE)
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert np.isfinite(row["loss"]) and row["skipped_updates"] == 0
    if name in ("garl", "paft", "iwae", "trice", "sft", "jensen", "jepo"):
        assert row["grad_norm"] > 0
    if name in ("grpo", "rloo", "maxrl", "star"):
        assert row["reward"] == 0 and row["no_signal"] == 1  # nothing is ever right at first
        assert "truncated_answers" in row


def test_several_updates_from_one_batch_train_on_every_prompt(tmp_path):
    loss = schema.loss("garl", q=1.0, normalize=False)
    once = tiny.config(train={"steps": 1}, loss=loss)
    twice = schema.merge(once, {"train": {"updates_per_batch": 2}})
    tiny.run(once, tmp_path / "once", ONE)
    tiny.run(twice, tmp_path / "twice", ONE)
    rows = [read_jsonl(tmp_path / d / "metrics.jsonl")[0] for d in ("once", "twice")]
    assert rows[0]["log_p"] == rows[1]["log_p"]
    different = jax.tree.map(
        lambda a, b: np.abs(a - b).max(),
        _params(once, tmp_path / "once"),
        _params(twice, tmp_path / "twice"),
    )
    assert max(jax.tree.leaves(different)) > 1e-3


def test_a_loss_composed_by_the_user_trains(tmp_path):
    config = tiny.config(train={"steps": 1}, loss=schema.loss(_composed, scale=2.0))
    tiny.run(config, tmp_path, ONE)
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["grad_norm"] > 0
    assert json.loads((tmp_path / "config.json").read_text())["loss"]["name"].endswith("_composed")


def _composed(scale):
    transform = losses.chain(
        losses.garl(0.75),
        losses.normalize_by_bound(0.75),
        losses.clip_coefficients(scale),
        losses.zero_pathwise(),
    )
    return losses.Estimator(transform=transform, surrogate=losses.linear())


@pytest.mark.parametrize("rollouts_per_microbatch, most", [(0, 8), (2, 9)])
def test_a_mistake_in_a_loss_is_near_the_command(rollouts_per_microbatch, most, tmp_path):
    """The traceback that its author reads has few lines of qlog."""
    changes = {"rollouts_per_microbatch": rollouts_per_microbatch, "prompts_per_step": 8}
    config = tiny.config(train=changes, loss=schema.loss(_broken))
    with pytest.raises(RuntimeError, match="a mistake") as caught:
        modes.run("train", config, tmp_path)
    folder = str(ROOT / "qlog")
    names = [
        f"{frame.filename}: {frame.name}"
        for frame in traceback.extract_tb(caught.value.__traceback__)
        if frame.filename.startswith(folder) and frame.name != "<lambda>"
    ]
    assert len(names) <= most, names


def _broken():
    return dataclasses.replace(losses.build("garl", q=0.75), surrogate=_raise)


def _raise(coefficients, tokens):
    raise RuntimeError("a mistake")


def test_it_trains_on_data_that_a_caller_brings(tmp_path):
    """One seam: an experiment whose parts were replaced trains like any other."""
    config = tiny.config(train={"steps": 2})
    experiment = prepare(config, ONE)
    source = [data.Example(f"mine {i}", f"ask {name}", "bob") for i, name in enumerate(NAMES)]
    mine = data.open_dataset(source, experiment.formatter, data_limits(config, rationales=False))
    train.run(dataclasses.replace(experiment, train_data=mine), tmp_path)
    ids = {row["id"] for row in read_jsonl(tmp_path / "rollouts.jsonl")}
    assert ids <= {example.id for example in source} and len(ids) == 4
    assert np.isfinite(read_jsonl(tmp_path / "metrics.jsonl")[-1]["loss"])


def test_parts_that_do_not_fit_are_refused(tmp_path):
    """Else GRPO would train on rewards of answers that were never sampled, all of them 0."""
    experiment = prepare(tiny.config(), ONE)
    for name in ("grpo", "sft"):
        with pytest.raises(ValueError, match="does not fit the other parts"):
            dataclasses.replace(experiment, estimator=losses.build(name))
    with pytest.raises(ValueError, match="train_data is None"):
        train.run(prepare(tiny.config(), ONE, train=False), tmp_path / "a")
    with train.claimed(experiment.config, tmp_path / "a") as claim:
        with pytest.raises(ValueError, match="claim is of"):
            train.run(experiment, tmp_path / "b", claim)


def test_a_workdir_is_claimed_before_anything_is_read(tmp_path, monkeypatch):
    """Of two starts the second is refused at once; a wrong config touches no workdir."""
    config = tiny.config(train={"steps": 1})
    with train.claimed(config, tmp_path / "taken"):
        with pytest.raises(PassingError, match="which still runs"):
            with train.claimed(config, tmp_path / "taken"):
                raise AssertionError("two owners")
    with pytest.raises(ConfigError, match="train.steps = 0"):
        tiny.run(schema.merge(config, {"train": {"steps": 0}}), tmp_path / "new", ONE)
    assert not (tmp_path / "new").exists()


def test_what_is_due():
    assert [step for step in range(1, 9) if train.due(step, 3, 8)] == [3, 6, 8]
    assert [step for step in range(1, 9) if train.due(step, 0, 8)] == [8]


def test_the_reference_of_a_resumed_run_is_the_one_that_it_began_with(six_steps, tmp_path):
    """The best checkpoint of another run changes while that run goes on."""
    _, source, _ = six_steps
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    first, *_, last = checkpoint_reader.steps_in(paths.Path(copy / "checkpoints"))
    assert first < last

    def make_best(step):
        (copy / "scores.json").write_text(json.dumps({step: {"value": 1.0, "of": "x"}}))

    make_best(last)
    loss = schema.loss("grpo", kl_weight=0.1)
    config = tiny.config(train={"steps": 1}, init_from=str(copy), loss=loss)
    tiny.run(config, tmp_path / "run", ONE)
    make_best(first)
    config = schema.merge(config, {"train": {"steps": 2}})
    with pytest.raises(ConfigError, match=rf"step {last} when .* step {first} now: name"):
        train.run(prepare(config, ONE, begins=False), tmp_path / "run")
    named = schema.merge(config, {"init_from": f"{copy}/checkpoints/{last}"})
    train.run(prepare(named, ONE, begins=False), tmp_path / "run")


def test_a_run_that_goes_on_needs_no_more_what_it_began_from(six_steps, tmp_path):
    _, source, _ = six_steps
    config = tiny.config(train={"steps": 2}, init_from=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="no checkpoint"):
        prepare(config, ONE)
    assert prepare(config, ONE, begins=False).begins_from is None
    with_reference = schema.merge(config, {"loss": schema.loss("grpo", kl_weight=0.1)})
    with pytest.raises(ConfigError, match="no checkpoint"):
        prepare(with_reference, ONE, begins=False)


def test_base_checkpoint_seeds_another_run(six_steps, tmp_path):
    _, workdir, _ = six_steps
    config = tiny.config(train={"steps": 1}, init_from=str(workdir))
    start = prepare(config, ONE).init_params()
    trees.assert_equal(start, _params(config, workdir))
    with pytest.raises(ConfigError, match="no checkpoint"):
        prepare(tiny.config(init_from=str(tmp_path / "nowhere")), ONE)
    other = schema.merge(config, {"architecture": dict(config.architecture, width=24)})
    with pytest.raises(ConfigError, match="another model"):
        prepare(other, ONE).init_params()
