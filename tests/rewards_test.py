"""Rewards and metrics of one's own, through whole runs of a tiny model."""

import json
import os
import signal

import jax
import numpy as np
import pytest
import tiny

from qlog import evaluation
from qlog.commands import modes
from qlog.config import schema
from qlog.config.check import check_config
from qlog.errors import ConfigError
from qlog.grading.scorers import ScorerError
from qlog.runs import checkpoints
from qlog.runs.log import read_jsonl
from qlog.storage import paths

ONE = jax.devices()[:1]


def words(rationale, **_):
    return len(rationale.split())


def shortness(*, answer, example, prompt, golds, source):
    assert prompt.startswith(source) and golds[0] == example.answer
    return -len(answer.split())


def config(reward, loss="grpo", **changes):
    tree = tiny.config(
        loss=schema.loss(loss),
        rollout={"reward": reward},
        train={"steps": 2, "rollouts_prompts": 4},
    )
    return schema.merge(tree, changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("rewards")
    tree = config(
        [("exact_match", 1.0), (words, 0.5), (shortness, 0.25)],
        evaluation={"every": 2, "grader": words, "metrics": ["contains", shortness]},
    )
    return tree, workdir, tiny.run(tree, workdir, ONE)


def test_the_reward_is_the_weighted_sum_and_each_part_is_in_the_log(run):
    _, workdir, _ = run
    rows = [r for r in read_jsonl(workdir / "metrics.jsonl") if r["phase"] == "train"]
    rollouts = read_jsonl(workdir / "rollouts.jsonl")
    assert len(rows) == 2 and len(rollouts) == 2 * 4 * 4  # all of both steps
    for row in rows:
        mine = [r for r in rollouts if r["step"] == row["step"]]
        for r in mine:
            assert r["reward/words"] == len(r["rationale"].split())
            assert r["reward/shortness"] == -len(r["answer"].split())
            parts = (r["reward/exact_match"], 0.5 * r["reward/words"], 0.25 * r["reward/shortness"])
            assert r["reward"] == pytest.approx(sum(parts))
        for name in ("reward", "reward/words", "reward/shortness"):
            assert row[name] == pytest.approx(np.mean([r[name] for r in mine]), abs=1e-6)
        assert row["reward/words/errors"] == 0 and np.isfinite(row["loss"])
    assert any(r["reward/words"] for r in rollouts)
    assert json.loads((workdir / "config.json").read_text())["rollout"]["reward"] == [
        ["exact_match", 1.0],
        ["words", 0.5],
        ["shortness", 0.25],
    ]


def test_evaluation_counts_and_measures_by_functions_of_the_config(run):
    tree, workdir, outcome = run
    samples = workdir / "samples/step_000002.jsonl"
    rows = read_jsonl(samples)
    lengths = [[len(a.split()) for a in row["answers"]] for row in rows]
    said = [[bool(r.split()) for r in row["rationales"]] for row in rows]
    assert outcome.metrics["metrics/shortness"] == pytest.approx(-np.mean(lengths))
    assert outcome.metrics["p@1"] == pytest.approx(np.mean(said))
    assert outcome.metrics["p@1"] > 0
    assert 0 <= outcome.metrics["metrics/contains"] <= outcome.metrics["metrics/contains/high"] <= 1
    again = evaluation.recompute(tree, paths.parse(samples))
    assert again == pytest.approx(outcome.metrics)


def test_a_run_resumes_on_the_same_reward_only(run):
    tree, workdir, _ = run
    for reward in ("", [("exact_match", 1.0), (words, 0.5)], words):
        other = schema.merge(tree, {"rollout": {"reward": reward}, "train": {"steps": 3}})
        with pytest.raises(ConfigError, match="rollout.reward = .* differs from the run"):
            tiny.run(other, workdir, ONE)


def test_a_name_is_the_reward_of_the_loss_itself(tmp_path):
    """The same numbers as without `rollout.reward`, which is the loss's own grader."""
    rows = []
    for number, reward in enumerate(("", "exact_match")):
        tiny.run(config(reward), tmp_path / str(number), ONE)
        rows.append(read_jsonl(tmp_path / str(number) / "rollouts.jsonl"))
    assert rows[0] == rows[1]


broken = {"from": 2}  # the step from which `breaks` raises


def breaks(answer, example):
    if breaks.calls >= 16 * broken["from"]:
        raise ZeroDivisionError("scale")
    breaks.calls += 1
    return 1.0


def test_a_reward_that_breaks_stops_the_run_and_loses_no_step(tmp_path, capsys):
    breaks.calls, broken["from"] = 0, 2
    tree = config(breaks, train={"steps": 4})
    tree.rollout.reward_threads = 1
    with pytest.raises(
        ScorerError, match=r"breaks failed on .* ZeroDivisionError: scale \(rewards_test.py:\d+\)"
    ):
        tiny.run(tree, tmp_path, ONE)
    assert checkpoints.Checkpoints(tmp_path).latest_step == 2
    broken["from"] = 100  # mended
    tiny.run(tree, tmp_path, ONE)
    rows = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if r["phase"] == "train"]
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    assert "resumed from step 2" in capsys.readouterr().out


def test_a_metric_that_breaks_keeps_the_samples(tmp_path):
    breaks.calls, broken["from"] = 0, 0
    tree = config("", evaluation={"every": 2, "metrics": [breaks]})
    with pytest.raises(ScorerError, match="config.evaluation.metrics: breaks failed on 24 of 24"):
        tiny.run(tree, tmp_path, ONE)
    samples = tmp_path / "samples/step_000002.jsonl"
    written = samples.read_text()
    assert len(written.splitlines()) == 6
    broken["from"] = 100
    tiny.run(tree, tmp_path, ONE)
    assert samples.read_text() == written
    assert not samples.with_name("step_000002.jsonl.parts").exists()
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1]["metrics/breaks"] == 1.0


def later(answer):
    """-1 from the second step on."""
    later.calls += 1
    return 1.0 if later.calls <= 16 else -1.0


def test_a_negative_reward_is_no_weight_and_no_step_is_lost(tmp_path):
    later.calls = 0
    with pytest.raises(ScorerError, match="rollout.reward gave -1: .*negative; shift the reward"):
        tiny.run(config(later, loss="maxrl"), tmp_path, ONE)
    assert checkpoints.Checkpoints(tmp_path).latest_step == 1


def test_a_huge_sum_is_refused_before_it_is_infinite(tmp_path):
    with pytest.raises(ScorerError, match=r"rollout.reward gave .*e\+\d+, more than 1e\+09: lower"):
        tiny.run(config((words, 1e30)), tmp_path, ONE)


def pulls_the_plug(answer):
    """A signal comes while answers are scored, one after the other."""
    pulls_the_plug.calls += 1
    if pulls_the_plug.calls == 16 + 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return 1.0


def test_a_signal_ends_the_scoring_and_the_run_resumes(tmp_path):
    pulls_the_plug.calls = 0
    tree = config(pulls_the_plug)
    tree.rollout.reward_threads = 1
    outcome = tiny.run(tree, tmp_path, ONE)
    assert outcome.interrupted and checkpoints.Checkpoints(tmp_path).latest_step == 1
    assert pulls_the_plug.calls < 32
    assert not tiny.run(tree, tmp_path, ONE).interrupted


def test_a_metric_says_what_old_samples_lack(run, tmp_path):
    tree, workdir, _ = run
    lines = (workdir / "samples/step_000002.jsonl").read_text().splitlines()
    old = tmp_path / "old.jsonl"
    rows = [{k: v for k, v in json.loads(line).items() if k != "prompt"} for line in lines]
    old.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="old.jsonl: shortness needs the prompt of each row"):
        evaluation.recompute(tree, paths.parse(old))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss": schema.loss("garl")}, "rollout.reward = 'contains' is read by nothing: .*grpo"),
        ({"rollout": {"reward": "contain"}}, "rollout.reward = 'contain' is not a grader"),
        ({"rollout": {"reward": []}}, "rollout.reward = .* names nothing"),
        ({"rollout": {"reward_threads": 0}}, "reward_threads = 0 must be at least 1"),
        ({"evaluation": {"metrics": "contain"}}, "evaluation.metrics = 'contain' is not a grader"),
        ({"evaluation": {"grader": ["contains", "squad_f1"]}}, "evaluation.grader .* one grader"),
        ({"evaluation": {"grader": ()}}, "evaluation.grader .* one grader"),
        (
            {"evaluation": {"metrics": [("contains", 2)]}},
            "weight 2.0 of contains is read by nothing",
        ),
    ],
)
def test_a_config_is_refused_before_anything_compiles(changes, message):
    tree = schema.merge(config("contains"), changes)
    with pytest.raises(ConfigError, match=message):
        check_config(tree)


def test_the_command_tells_it_in_one_sentence(tmp_path):
    breaks.calls, broken["from"] = 0, 0
    with pytest.raises(ScorerError, match="^config.rollout.reward: breaks failed on 32 of 32"):
        modes.run("train", config(breaks, train={"prompts_per_step": 8}), tmp_path)
