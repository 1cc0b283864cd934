"""Which checkpoints a run keeps, which of them is the best, and what a finished run leaves."""

import contextlib
import json

import damage
import jax
import pytest
import tiny

from qlog.config import schema
from qlog.errors import ConfigError
from qlog.experiment import prepare
from qlog.runs import checkpoint_reader, checkpoints

ONE = jax.devices()[:1]
experiment = damage.experiment  # a fixture


def steps(workdir):
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").glob("[0-9]*"))


def test_the_latest_and_the_best_are_kept_though_scores_come_after_the_save(experiment, tmp_path):
    state = experiment.init_state(experiment.init_params())
    text = schema.to_json(experiment.config)
    scores = {1: 0.2, 2: 0.5, 3: 0.5, 4: 0.1}
    with contextlib.closing(checkpoints.Checkpoints(tmp_path, keep=2)) as saved:
        for step in range(1, 7):
            saved.save(state, step=step, config=text)
            if step in scores:
                saved.score(step, scores[step], "m@4")
    assert steps(tmp_path) == [2, 5, 6]  # 2 and 3 are equally good: the first, which trained less
    find = checkpoint_reader.find_checkpoint
    assert find(tmp_path, "--workdir").name == "2"
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as again:
        assert again.latest_step == 6
        assert {step: score["value"] for step, score in again.scores.items()} == scores
        again.score(6, 0.3, "m@2")  # of other settings: not compared with those before
    assert find(tmp_path, "--workdir").name == "6"


def test_a_finished_run_may_leave_the_best_parameters_only(tmp_path):
    config = tiny.config(
        train={"steps": 4},
        evaluation={"every": 2},
        checkpoint={"every": 1, "finished": "best_params"},
    )
    outcome = tiny.run(config, tmp_path, ONE)
    scores = json.loads((tmp_path / "scores.json").read_text())
    (step,) = steps(tmp_path)
    assert scores[str(step)]["value"] == max(score["value"] for score in scores.values())
    assert scores[str(step)]["of"] == "m@4 of 6 questions, validation, temperature 1.0, contains"
    assert not (tmp_path / "checkpoints" / str(step) / "training").exists()
    abstract = prepare(config, ONE, train=False).abstract_params()
    checkpoint_reader.load_params(tmp_path, abstract)
    assert tiny.run(config, tmp_path, ONE).metrics == outcome.metrics
    with pytest.raises(ConfigError, match="begin another with --config.init_from="):
        tiny.run(schema.merge(config, {"train": {"steps": 5}}), tmp_path, ONE)


def test_minutes_save_between_steps(tmp_path):
    config = tiny.config(train={"steps": 3}, checkpoint={"every": 100, "minutes": 1e-6, "keep": 9})
    tiny.run(config, tmp_path, ONE)
    assert steps(tmp_path) == [1, 2, 3]


def test_chosen_steps_are_traced(tmp_path):
    tiny.run(tiny.config(train={"steps": 2}, profile={"steps": (2,)}), tmp_path, ONE)
    assert [folder.name for folder in (tmp_path / "profile").iterdir()] == ["step_000002"]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
