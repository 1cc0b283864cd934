"""The page about the losses: its examples run, its new estimator trains, its commands work."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qlog import losses
from qlog.config import schema
from qlog.errors import ConfigError
from qlog.losses.theory import exact, plots, study

PAGE = pathlib.Path(losses.__file__).with_name("README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_composition_examples(capsys):
    names = {}
    for example in EXAMPLES[:3]:
        exec(example, names)
    assert np.all(np.isfinite(names["coefficients"].score))
    assert names["annealed"].init(names["scores"]).hyperparams["q"] == 1.0
    assert "effective_reward_max" in capsys.readouterr().out
    weights = 3 * names["coefficients"].score + names["coefficients"].path
    np.testing.assert_allclose(names["sums"].loss, 1.5 * np.sum(weights), rtol=1e-5)


def test_the_new_estimator_trains_the_quickstart(tmp_path):
    names = {"__name__": "mine"}
    exec(EXAMPLES[3], names)
    scores = losses.Scores(log_w=jnp.log(jnp.array([[0.1, 0.3]])))
    transform = names["hard_garl"](0.5)
    got, _ = losses.coefficients(transform, scores, transform.init(scores))
    np.testing.assert_allclose(got.path, [[0, 0.3 / 0.2**0.5 / 2]], rtol=1e-5)

    config = names["get_config"]()
    assert list(config.runs) == ["base", "hard"]
    short = {
        "init_from": "",
        "runs": {},
        "train": {"steps": 2, "prompts_per_step": 2},
        "evaluation": {
            "every": 0,
            "prompts": 2,
            "prompts_per_batch": 2,
            "rollouts_per_prompt": 2,
            "without_rationale": False,
        },
    }
    run = schema.merge(schema.merge(config, config.runs.hard), short)
    tiny.run(run, tmp_path, jax.devices()[:1])
    assert '"name": "Recipe(hard_garl)"' in (tmp_path / "config.json").read_text()
    assert '"q": 0.75' in (tmp_path / "metrics.jsonl").read_text()

    # The function of the next example trains it, too, on its schedule.
    exec(EXAMPLES[4], names)
    run = schema.merge(run, {"loss": names["section"], "train": {"steps": 3}})
    tiny.run(run, tmp_path / "careful", jax.devices()[:1])
    rows = map(json.loads, (tmp_path / "careful/metrics.jsonl").read_text().splitlines())
    np.testing.assert_allclose(
        [row["q"] for row in rows if row["phase"] == "train"], [1, 0.99, 0.98]
    )
    with pytest.raises(ConfigError, match="config.loss = .*which began with .*careful"):
        other = schema.merge(run, {"loss": schema.loss(losses.Recipe(names["hard_garl"]))})
        tiny.run(other, tmp_path / "careful", jax.devices()[:1])


def test_the_table_has_every_recipe_and_the_page_every_shared_argument():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(losses.RECIPES)
    shared = losses.recipes.SCHEDULE | losses.recipes.NORMALIZATION
    for name in shared | losses.recipes.PENALTY | losses.recipes.IMPORTANCE:
        assert f"`{name}`" in PAGE, name
    state = losses.build("garl").transform.init(losses.abstract_scores(1, 2))
    for name in losses.measurements(state):
        assert f"`{name}`" in PAGE, name


def test_the_plots_command_draws_five_figures(tmp_path, capsys):
    plots.main([f"--out={tmp_path / 'figures'}"])
    paths = capsys.readouterr().out.split()
    assert len(paths) == 5
    for path in paths:
        image = plots.pyplot.imread(path)
        assert image.shape[0] > 300 and np.std(image) > 0.05


def test_the_study_of_bias_measures_less_bias_with_the_jackknife():
    rows = study.bias_table(num_rollouts=(8,))
    assert len(rows) == 16
    for row in rows:
        assert row["jackknife bias"] < row["plain bias"], row
        if not row["model"].startswith("rare"):
            assert row["jackknife bias"] < 0.25 * row["plain bias"], row


def test_the_study_of_control_trains():
    """From p = 1e-4 at the least, the controller escapes within 60 steps, and q = 0 does not."""
    final = {}
    for name in ("fixed q = 0.0", "adaptive, pace 0.8"):
        transform = losses.build("garl", normalize=False, **study.methods(60)[name]).transform
        run = jax.jit(study.train, static_argnames=("transform", "steps", "examples"))
        right, wrong = run(transform, jax.random.key(0), 1.0, 0.0, 60, 16, -4.0)
        assert np.all(right + wrong <= 1.001)
        final[name] = right[-1]
    assert final["fixed q = 0.0"] < 0.5 < 0.9 < final["adaptive, pace 0.8"]
    table = study.show([{"a": 1.23456, "b": "x"}])
    assert table == "| a | b |\n|---|---|\n| 1.23 | x |"


def test_exact_groups_have_probability_one():
    model = exact.LatentModel(jnp.array([0.3, -1.0, 2.0]), jnp.zeros(3))
    groups, probability = exact.all_groups(model, 6)
    assert groups.shape == (28, 6)
    np.testing.assert_allclose(probability.sum(), 1, rtol=1e-9)
    with pytest.raises(ValueError, match="num_rollouts must be at least 1, got 0"):
        exact.all_groups(model, 0)


def test_the_map_names_every_recipe_and_no_other():
    drawn = re.search(r"## The map\n.*?```text\n(.*?)```", PAGE, re.DOTALL)
    assert drawn
    words = set(re.findall(r"\b[a-z][a-z0-9_]*\b", drawn[1]))
    missing = set(losses.RECIPES) - words
    assert not missing
    for name in re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", drawn[1]):
        assert name in [*losses.RECIPES, *losses.recipes.PENALTY, "log_q"], name


def test_what_the_map_says_of_its_ends():
    """Members that are drawn at one place have one set of coefficients."""
    log_w = jnp.log(jnp.array([[0.5, 0.1, 0.2, 0.02], [1e-3, 2e-3, 1e-6, 0.3]]))
    scores = losses.Scores(log_w=log_w, reward=jnp.array([[1.0, 0, 0, 1], [0, 1, 0, 0]]))

    def run(transform):
        return losses.coefficients(transform, scores, transform.init(scores))[0]

    pairs = [
        (losses.jensen(0.0), losses.rb_rloo()),
        (losses.jensen(1.0), losses.jepo()),
        (losses.garl(0.0), losses.rb_rloo()),
        (losses.tempered(1.0), losses.rb_rloo()),
        (losses.rb_pass_at_k(1), losses.rb_rloo()),
        (losses.rb_maxrl(1), losses.rb_rloo()),
        (losses.pkpo(1), losses.rloo()),
    ]
    for one, other in pairs:
        for name in ("score", "path"):
            np.testing.assert_allclose(
                getattr(run(one), name), getattr(run(other), name), rtol=1e-4, atol=1e-6
            )
    # E log_q w, of one rollout, is that of w^(1-q), over 1 - q; its limit is log_prob.
    limit = run(losses.chain(losses.tempered(1e-4), losses.multiply(1e4)))
    np.testing.assert_allclose(limit.score, run(losses.log_prob()).score, rtol=0.02, atol=1e-3)
    np.testing.assert_allclose(limit.path, run(losses.log_prob()).path, rtol=0.02)
