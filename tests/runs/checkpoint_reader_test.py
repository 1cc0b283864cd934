"""Who reads checkpoints: finds the one that was asked for, takes whole ones, changes nothing."""

import json
import shutil

import damage
import jax
import pytest
import tiny
import trees
from damage import STEPS, files, flip

from qlog.errors import ConfigError
from qlog.experiment import prepare
from qlog.runs import checkpoint_reader

ONE = jax.devices()[:1]
# Fixtures.
experiment, states = damage.experiment, damage.states
whole, workdir = damage.whole, damage.workdir


def score(workdir, values, what="m@4"):
    scores = {step: {"value": value, "of": what} for step, value in values.items()}
    file = workdir / "scores.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | {str(step): score for step, score in scores.items()}))


def test_a_checkpoint_is_found_by_score_by_age_and_by_number(workdir):
    find = checkpoint_reader.find_checkpoint
    assert find(workdir, "--workdir").name == "9"  # without scores the newest
    score(workdir, {3: 0.5, 6: 0.5})
    assert find(workdir, "--workdir").name == "3"  # of equally good ones the first
    assert find(workdir / "checkpoints", "--workdir", "latest").name == "9"
    assert find(workdir, "--workdir", "6").name == "6"
    assert find(workdir / "checkpoints" / "6", "--workdir").name == "6"
    with pytest.raises(
        ConfigError, match="has the steps 3, 6, 9; ask for best, latest, base or a step"
    ):
        find(workdir, "--workdir", "5")
    score(workdir, {9: 0.3}, "m@2")  # of other settings: not compared with those before
    assert find(workdir, "--workdir").name == "9"


def test_readers_pass_over_damaged_ones_and_rename_nothing(workdir, experiment, states, capsys):
    score(workdir, {step: 1 / step for step in STEPS})
    flip(max(files(workdir / "checkpoints/3"), key=lambda file: file.stat().st_size), 5000)
    shutil.rmtree(workdir / "checkpoints/9/params/ocdbt.process_0")
    abstract = experiment.abstract_params()
    for which in ("best", "latest"):
        found = checkpoint_reader.load_params(workdir, abstract, "--workdir", which)
        trees.assert_equal(found, states[6].params)
    said = capsys.readouterr().out
    assert "checkpoints/3 is damaged (the content of params/" in said and "step 6 is taken" in said
    assert "checkpoints/9 is damaged (params/" in said and "is missing)" in said
    assert {f.name for f in (workdir / "checkpoints").iterdir()} == {"3", "6", "9"}
    for folder, which in ((workdir, "9"), (workdir / "checkpoints/9", "best")):
        with pytest.raises(ConfigError, match="is damaged .*: take another"):
            checkpoint_reader.find_checkpoint(folder, "--workdir", which)
    # Damage of what is not read does no harm.
    shutil.rmtree(workdir / "checkpoints/6/training")
    assert checkpoint_reader.find_checkpoint(workdir, "--workdir", "6").name == "6"


def test_another_model_is_told_with_the_shapes_of_both_sides(workdir):
    other = tiny.config(architecture={**tiny.config().architecture.to_dict(), "width": 32})
    abstract = prepare(other, ONE, train=False, evaluate=False).abstract_params()
    with pytest.raises(
        ConfigError,
        match=r"another model: embed is \[48, 16\] there and \[48, 32\] here; .* more differ\.",
    ):
        checkpoint_reader.load_params(workdir, abstract, "config.init_from")


def test_a_score_that_is_no_number_is_none(workdir):
    (workdir / "scores.json").write_text(
        '{"3": {"value": NaN, "of": "m@4"}, "6": {"value": 0.5, "of": "m@4"}}'
    )
    assert checkpoint_reader.find_checkpoint(workdir, "--workdir").name == "6"
