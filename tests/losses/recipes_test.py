"""Recipes as configs build them: arguments, errors, schedules, state, measurements, composition."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import trees
from ml_collections import ConfigDict

from qlog import losses

LOG_W = jnp.log(jnp.array([[0.5, 0.1, 0.2], [1e-3, 2e-3, 1e-6]]))
SCORES = losses.Scores(log_w=LOG_W)


def run(transform, scores, steps=1, key=None):
    """Results of the last of some steps on the same scores, jitted once."""
    step = jax.jit(lambda state: losses.coefficients(transform, scores, state, key=key))
    state = transform.init(scores)
    for _ in range(steps):
        result, state = step(state)
    return result, state


def test_every_recipe_builds_from_a_config_of_its_own_arguments():
    for name in losses.RECIPES:
        config = ConfigDict(losses.arguments(name))
        given = json.loads(config.to_json_best_effort())
        estimator = losses.build(name, num_rollouts=4, **given)
        state = estimator.transform.init(losses.abstract_scores(2, 4))
        assert "no_signal" in losses.measurements(state)


def test_what_an_estimator_needs_of_the_trainer():
    fields = ("rationale", "answer", "reward", "reference", "min_rollouts")
    needs = {
        name: tuple(getattr(losses.build(name), field) for field in fields)
        for name in losses.RECIPES
    }
    gold = ("sampled", "gold", None, False)
    graded = ("sampled", "sampled", "exact_match", False)
    assert needs["garl"] == gold + (2,) and needs["paft"] == gold + (1,)
    assert needs["iwae"] == needs["trice"] == needs["rb_reinforce"] == gold + (1,)
    assert needs["rb_rloo"] == gold + (2,)
    assert needs["rloo"] == needs["maxrl"] == needs["grpo"] == graded + (2,)
    assert needs["star"] == ("sampled", "gold", "exact_match", False, 1)
    assert needs["sft"] == ("annotated", "gold", None, False, 1)
    assert losses.build("grpo", kl_weight=0.04).reference
    assert losses.build("garl", baseline="none").min_rollouts == 1


def test_every_recipe_takes_a_penalty_and_importance_weights():
    """KL for all that sample; weights for all whose surrogate has no ratio itself."""
    for name in losses.RECIPES:
        known = losses.arguments(name)
        assert ("kl_weight" in known) == (name != "sft"), name
        has_ratio = "clip_low" in known
        assert ("importance" in known) == (name != "sft" and not has_ratio), name
        if name != "sft":
            assert losses.build(name, kl_weight=0.1).reference
    assert losses.build("latro").reference and not losses.build("log_prob").reference


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("gral", {}, "no loss is called 'gral'; there are average_log_prob, cispo, garl"),
        ("gral", {}, r"vr_cli \(did you mean 'garl'\?\)"),
        ("garl", {"base_line": "none"}, r"max_tokens.* \(did you mean 'baseline'\?\)"),
        ("garl", {"clip_low": 0.2}, "garl: unknown argument clip_low; it reads q, baseline"),
        ("garl", {"q": 1.5}, r"garl: q must be in \[0, 1\], got 1.5"),
        ("garl", {"q": "high"}, r"garl: q must be a number in \[0, 1\], got 'high'"),
        ("garl", {"q": float("nan")}, r"garl: q must be in \[0, 1\], got nan"),
        (
            "garl",
            {"baseline": "mean"},
            "baseline must be one of 'leave_one_out', 'none', got 'mean'",
        ),
        ("garl", {"correction": "bootstrap"}, "correction must be one of 'none', 'jackknife'"),
        ("garl", {"num_rollouts": 1}, "garl needs at least 2 rollouts per prompt .* got 1"),
        ("garl", {"q_schedule": "linear"}, "q_steps must be at least 1, got 0"),
        ("garl", {"q_schedule": "linear", "q_steps": 10, "q_end": -1}, "q_end must be in .*got -1"),
        ("garl", {"q_schedule": "ramp"}, "q_schedule must be one of 'constant', 'linear'"),
        ("garl", {"q_steps": 100}, "q_steps=100 is not read with q_schedule='constant'"),
        ("garl", {"q_schedule": "adaptive", "q_pace": 2.0}, "q_pace must be in .* got 2.0"),
        ("garl", {"q_schedule": "adaptive", "q": 0.2, "q_end": 0.5}, "q_end .* got 0.5"),
        ("garl", {"max_coefficient": -1.0}, r"max_coefficient must be in \[0, inf\], got -1.0"),
        ("paft", {"k": 0}, "paft: k must be at least 1, got 0"),
        ("paft", {"k": 2.5}, "paft: k must be an integer of at least 1, got 2.5"),
        ("paft", {"resampling": "stratified"}, "must be one of 'multinomial', 'systematic'"),
        ("grpo", {"aggregation": "constant"}, "aggregation='constant' needs max_tokens"),
        ("grpo", {"max_tokens": 8}, "max_tokens=8 is not read with aggregation='sequence_mean'"),
        ("grpo", {"aggregation": "mean"}, "aggregation must be one of 'sum', 'sequence_mean'"),
        ("grpo", {"clip_low": 1.5}, r"clip_low must be in \[0, 1\], got 1.5"),
        (
            "grpo",
            {"kl_kind": "k4"},
            "kl_kind must be one of 'k1', 'k2', 'k3', 'sequence', got 'k4'",
        ),
        ("grpo", {"kl_weight": -0.1}, "kl_weight must be in .*got -0.1"),
        ("rloo", {"num_rollouts": 1}, "rloo needs at least 2 rollouts"),
        ("garl", {"importance": "tokens"}, r"importance must be one of .* \(did you mean 'token'"),
        ("paft", {"importance": "token", "max_ratio": 0.5}, r"max_ratio must be in \[1, inf\]"),
        ("grpo", {"importance": "token"}, "grpo: unknown argument importance; it reads"),
        ("sft", {"kl_weight": 0.1}, "sft: unknown argument kl_weight; it reads"),
        ("garl", {"kl_weight": -1.0}, r"garl: kl_weight must be in \[0, inf\], got -1.0"),
        ("rb_pass_at_k", {"k": 8, "num_rollouts": 4}, "needs at least 8 rollouts per prompt"),
        ("rb_maxrl", {"order": 0}, "rb_maxrl: order must be at least 1, got 0"),
        ("pkpo", {"k": 2.0}, "pkpo: k must be an integer of at least 1, got 2.0"),
        ("pkpo", {"baseline": "mean"}, "pkpo: baseline must be one of"),
        ("tempered", {"exponent": 0.0}, r"tempered: exponent must be in \[1e-06, 1000.0\], got 0"),
        ("rs_grpo", {"beta": -1.0}, r"rs_grpo: beta must be in \[0.001, 1000.0\], got -1.0"),
    ],
)
def test_errors_name_the_argument_the_value_and_the_range(name, given, message):
    with pytest.raises(ValueError, match=message):
        losses.build(name, **given)


def test_errors_of_parts_and_scores():
    with pytest.raises(ValueError, match="amplify: argument q needs a default"):
        losses.Recipe(losses.amplify)
    with pytest.raises(ValueError, match="M, the rollouts per prompt, must be at least 2 .* got 1"):
        losses.garl(0.5).init(losses.abstract_scores(4, 1))
    with pytest.raises(TypeError, match="pass key="):
        losses.coefficients(losses.paft(0.5), SCORES, losses.paft(0.5).init(SCORES))
    with pytest.raises(ValueError, match=r"scores.log_w must have shape \[B, M\], got \(3,\)"):
        losses.initial_coefficients(SCORES._replace(log_w=LOG_W[0]))
    with pytest.raises(
        ValueError, match=r"scores.reward must have log_w's shape \(2, 3\), got \(2,\)"
    ):
        losses.initial_coefficients(SCORES._replace(reward=jnp.zeros(2)))
    with pytest.raises(TypeError, match="scores.log_w must be float32, got bfloat16"):
        losses.initial_coefficients(SCORES._replace(log_w=LOG_W.astype(jnp.bfloat16)))
    with pytest.raises(TypeError, match="scores.valid must be bool"):
        losses.initial_coefficients(SCORES._replace(valid=jnp.ones((2, 3))))
    with pytest.raises(TypeError, match="scores must be losses.Scores, got tuple"):
        losses.initial_coefficients(tuple(SCORES))


SCHEDULES = {
    "linear": [1.0, 0.75, 0.5, 0.25, 0.0, 0.0],
    "cosine": [1.0, 0.5 + np.sqrt(0.125), 0.5, 0.5 - np.sqrt(0.125), 0.0, 0.0],
    "step": [1.0, 1.0, 1.0, 1.0, 0.0, 0.0],  # SFT-then-RL
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_q_follows_a_schedule_described_by_arguments(kind):
    estimator = losses.build("garl", q=1.0, q_schedule=kind, q_end=0.0, q_steps=4)

    def step(state, _):
        result, state = losses.coefficients(estimator.transform, SCORES, state)
        return state, (losses.measurements(state)["q"], result.path)

    _, (q, path) = jax.jit(lambda s: jax.lax.scan(step, s, length=6))(
        estimator.transform.init(SCORES)
    )
    np.testing.assert_allclose(q, SCHEDULES[kind], atol=1e-6)
    w = np.exp(LOG_W)
    for t in (0, 2, 5):
        expected = w / w.mean(1, keepdims=True) ** q[t] / 3 / 3 ** q[t]
        np.testing.assert_allclose(path[t], expected, rtol=1e-5)


# ---- A recipe as an object, a function as a loss ----


def _plain(q=0.75, baseline="leave_one_out"):
    return losses.Estimator(losses.garl(q, baseline), losses.linear(), min_rollouts=2)


def _named(q=0.75):
    return losses.build("garl", q=q)


def test_a_recipe_of_ones_own_may_take_several_values():
    def bounded(q=0.5, bounds=(0.1, 0.9)):
        assert len(bounds) == 2
        return losses.garl(q)

    recipe = losses.Recipe(bounded)
    for given in ({}, {"bounds": (0.2, 0.8)}, {"bounds": [0.2, 0.8]}):
        assert recipe(**given).transform is not None


@pytest.mark.parametrize("name", losses.RECIPES)
def test_a_recipe_as_an_object_is_what_its_name_is(name):
    recipe = losses.RECIPES[name]
    assert losses.arguments(recipe) == losses.arguments(name)
    assert losses.argument_types(recipe) == losses.argument_types(name)
    one, other = losses.build(recipe), losses.build(name)
    scores = losses.abstract_scores(2, 4)
    states = [each.transform.init(each.measured(scores)) for each in (one, other)]
    assert losses.measurements(states[0]).keys() == losses.measurements(states[1]).keys()
    assert one.min_rollouts == other.min_rollouts and one.reward == other.reward


def test_labels_tell_recipes_apart():
    recipe = losses.Recipe(losses.paft)
    assert losses.label("paft") == "paft"
    assert losses.label(recipe) == "Recipe(paft)"
    changed = [
        losses.Recipe(losses.garl),
        losses.Recipe(losses.paft, losses.clipped),
        losses.Recipe(losses.paft, normalize=False),
        losses.Recipe(losses.paft, weight=losses.log_reward),
        losses.Recipe(losses.paft, reward="exact_match"),
        losses.Recipe(losses.paft, overrides={"k": 3}),
        losses.Recipe(losses.paft, min_rollouts=3),
        _plain,
    ]
    labels = [losses.label(each) for each in (recipe, *changed)]
    assert len(set(labels)) == len(labels)
    assert losses.label(losses.Recipe(losses.paft)) == labels[0]
    for nameless in (lambda: None, functools.partial(_plain), losses.Recipe(lambda q=1.0: None)):
        with pytest.raises(ValueError, match="has no name that config.json could keep: .* def"):
            losses.label(nameless)


@pytest.mark.parametrize("kind", ["constant", *SCHEDULES, "adaptive"])
def test_a_function_gets_the_schedules_and_measurements_of_a_name(kind):
    steps = {"q_steps": 4} if kind in SCHEDULES else {}
    given = {"q": 1.0, "q_schedule": kind, **steps}
    by_name = losses.build("garl", normalize=False, **given).transform
    own = losses.build(_plain, **given).transform
    for step in (1, 3, 6):
        expected, state = run(by_name, SCORES, step)
        got, own_state = run(own, SCORES, step)
        trees.assert_close(got, expected, rtol=1e-6)
        measured, wanted = map(losses.measurements, (own_state, state))
        assert measured.keys() == wanted.keys() | {"q"}
        for name in ("q", "p_hat", "log_p_hat", "ess", "no_signal"):
            np.testing.assert_allclose(measured[name], wanted[name], rtol=1e-6)


def test_a_function_measures_what_it_returns():
    _, state = run(losses.build(_plain, q=0.0).transform, SCORES)
    result, _ = run(losses.garl(0.0), SCORES)
    largest = (3 * result.score).max(1)
    np.testing.assert_allclose(losses.measurements(state)["effective_reward"], largest.mean())
    # What a recipe inside it has measured already stays as it is.
    _, own = run(losses.build(_named, q=0.5).transform, SCORES)
    _, name = run(losses.build("garl", q=0.5).transform, SCORES)
    assert losses.measurements(own) == losses.measurements(name)
    assert losses.arguments(_plain)["q_schedule"] == "constant"


@pytest.mark.parametrize(
    "given, message",
    [
        ({"base_line": "none"}, r"_plain: unknown argument base_line; .* did you mean 'baseline'"),
        ({"q": 1.5}, r"q must be in \[0, 1\], got 1.5"),
        ({"q_schedule": "linaer"}, r"did you mean 'linear'"),
        ({"q_end": 0.5}, r"q_end=0.5 is not read with q_schedule='constant'"),
        ({"max_coefficient": 1.0}, r"unknown argument max_coefficient"),
        ({"num_rollouts": 1}, r"_plain needs at least 2 rollouts per prompt"),
    ],
    ids=str,
)
def test_errors_of_a_function_are_those_of_a_name(given, message):
    with pytest.raises(ValueError, match=message.replace(" did you", ".*did you")):
        losses.build(_plain, **given)


def test_types_of_arguments():
    types = losses.argument_types("paft")
    assert types["q"] is float and types["k"] == int | None and types["resampling"] is str
    assert types["pathwise"] is bool and types["q_steps"] is int
    assert losses.argument_types(_plain)["baseline"] is str


@pytest.mark.parametrize("kind", ["own", "optax"])
def test_q_may_be_any_optax_schedule(kind):
    schedule = optax.linear_schedule(1.0, 0.0, 2)
    if kind == "own":
        transform = losses.build("garl", q=schedule, normalize=False).transform
    else:
        transform = optax.inject_hyperparams(losses.garl)(q=schedule)
    second, _ = run(transform, SCORES, steps=2)
    expected, _ = run(losses.garl(0.5), SCORES)
    np.testing.assert_allclose(second.score, expected.score, rtol=1e-5)


def test_the_controller_lowers_q_as_p_grows():
    pace, decay = 0.25, 0.9
    transform = losses.adaptive_q(losses.garl, pace=pace, decay=decay)
    assert losses.q_for_pace(-jnp.inf, pace) == 1.0
    np.testing.assert_allclose(losses.q_for_pace(jnp.log(1 / 16), pace), 0.5, rtol=1e-6)
    np.testing.assert_array_equal(
        losses.q_for_pace(jnp.log(jnp.array([0.25, 0.6, 1.0])), pace), 0.0
    )

    recipe = losses.build("garl", q=1.0, q_schedule="adaptive", q_pace=pace).transform
    state, seen = recipe.init(SCORES), []
    step = jax.jit(lambda s, state: losses.coefficients(recipe, s, state))
    p = [1e-6, 1e-4, 1e-2, 0.2, 0.5, 0.9]
    for value in p:
        scores = SCORES._replace(log_w=jnp.full((2, 3), np.log(value), jnp.float32))
        result, state = step(scores, state)
        seen.append(float(losses.measurements(state)["q"]))
    wanted = np.clip(1 - np.log(pace) / np.log(p), 0, 1)
    weights = decay ** np.arange(6)
    expected = [
        np.sum(weights[: t + 1][::-1] * wanted[: t + 1]) / np.sum(weights[: t + 1])
        for t in range(6)
    ]
    np.testing.assert_allclose(seen, expected, rtol=1e-5)
    assert np.all(np.diff(seen) < 0)
    # The coefficients are those of GARL at that q.
    same, _ = run(losses.build("garl", q=seen[-1]).transform, scores)
    np.testing.assert_allclose(result.path, same.path, rtol=1e-5)
    with pytest.raises(ValueError, match="q_pace must be in"):
        losses.adaptive_q(losses.garl, pace=1.0)
    assert transform.init(SCORES).count == 0


def test_state_survives_a_checkpoint(tmp_path):
    transform = losses.build("paft", q=1.0, q_schedule="linear", q_steps=8).transform
    key = jax.random.key(0)
    _, state = run(transform, SCORES, steps=3, key=key)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    expected = losses.coefficients(transform, SCORES, state, key=key)
    got = losses.coefficients(transform, SCORES, restored, key=key)
    trees.assert_equal(got, expected)


def test_where_groups_composes_by_a_mask_of_the_data():
    """PAFT where the group's P is above a threshold, GARL elsewhere."""
    key = jax.random.key(2)
    mixed = losses.where_groups(losses.p_hat_above(0.1), losses.paft(0.75), losses.garl(0.75))
    got, _ = run(mixed, SCORES, key=key)
    paft, _ = run(losses.paft(0.75), SCORES, key=key)
    garl, _ = run(losses.garl(0.75), SCORES)
    np.testing.assert_allclose(got.score[0], paft.score[0])
    np.testing.assert_allclose(got.score[1], garl.score[1], rtol=1e-6)
    wrong = losses.where_groups(lambda s: s.is_valid, losses.garl(0.5), losses.garl(0.5))
    with pytest.raises(ValueError, match=r"predicate must give bool \[B\] = \(2,\)"):
        losses.coefficients(wrong, SCORES, wrong.init(SCORES))


def test_named_chain_is_chain():
    parts = ("rb", losses.rao_blackwell()), ("amplify", losses.amplify(0.5))
    named, state = run(losses.named_chain(*parts), SCORES)
    plain, _ = run(losses.garl(0.5, "none"), SCORES)
    np.testing.assert_allclose(named.score, plain.score, rtol=1e-6)
    assert list(state) == ["rb", "amplify"]


def test_measurements_by_hand():
    log_w = jnp.log(jnp.array([[0.5, 0.1, 0.2], [0, 0, 0], [0.3, 0.3, 0.3], [9, 9, 9]]))
    scores = losses.Scores(log_w=log_w, valid=jnp.ones((4, 3), bool).at[3].set(False))
    result, state = run(losses.build("garl", q=0.5).transform, scores)
    got = {name: float(x) for name, x in losses.measurements(state).items()}
    p = 0.8 / 3
    # The paper's Figure 3: max_m (w_m / wbar^q - wbar_{-m}^(1-q)) / M^q.
    top = (0.5 / np.sqrt(p) - np.sqrt(0.15)) / np.sqrt(3)
    expected = {
        "q": 0.5,
        "p_hat": (p + 0 + 0.3) / 3,
        "log_p_hat": (np.log(p) + np.log(0.3)) / 2,
        "ess": (0.8**2 / 0.3 + 3) / 2,
        "no_signal": 1 / 3,
        "effective_reward": (top + 0 + 0) / 3,
        "effective_reward_max": top,
    }
    assert set(got) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    _, plain = run(losses.build("garl", q=0.5, normalize=False).transform, scores)
    np.testing.assert_allclose(losses.measurements(plain)["effective_reward_max"], top, rtol=1e-4)


def test_groups_without_signal_of_a_graded_estimator():
    reward = jnp.array([[1, 1, 1], [0, 0, 0], [1, 0, 0]], jnp.float32)
    scores = losses.Scores(reward=reward, num_tokens=jnp.ones((3, 3), jnp.int32))
    _, state = run(losses.build("grpo").transform, scores)
    np.testing.assert_allclose(losses.measurements(state)["no_signal"], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(losses.measurements(state)["p_hat"], 4 / 9, rtol=1e-6)


def test_named_measurements_of_ones_own():
    largest = losses.measure(lambda c, s, axis_name: {"largest": jnp.max(c.path)})
    transform = losses.chain(losses.rao_blackwell(), largest, losses.amplify(1.0))
    assert losses.measurements(transform.init(SCORES)) == {"largest": 0.0}
    _, state = run(transform, SCORES)
    np.testing.assert_allclose(losses.measurements(state)["largest"], 2 / 3.001, rtol=1e-4)


def test_the_missing_ablation_is_one_argument():
    with_path, _ = run(losses.build("garl", q=0.25).transform, SCORES)
    without, _ = run(losses.build("garl", q=0.25, pathwise=False).transform, SCORES)
    np.testing.assert_array_equal(without.path, 0)
    np.testing.assert_array_equal(without.score, with_path.score)
    clipped, _ = run(losses.build("garl", q=0.25, max_coefficient=0.1).transform, SCORES)
    np.testing.assert_allclose(
        clipped.score, np.clip(with_path.score, -0.1 / 3, 0.1 / 3), rtol=1e-6
    )


def test_no_gradient_flows_through_coefficients():
    def total(log_w):
        transform = losses.garl(0.5)
        scores = SCORES._replace(log_w=log_w)
        return jnp.sum(losses.coefficients(transform, scores, transform.init(scores))[0].score)

    np.testing.assert_array_equal(jax.grad(total)(LOG_W), 0)


def test_importing_the_losses_needs_jax_and_optax_only():
    code = (
        "import sys; from qlog import losses; losses.build('garl');"
        "print(sorted({'flax', 'orbax', 'grain', 'matplotlib', 'qlog.config'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", losses.RECIPES)
def test_every_argument_of_a_recipe_is_explained(name):
    for argument in losses.arguments(name):
        assert losses.ARGUMENTS[argument].endswith(".")


def test_no_argument_is_explained_that_no_recipe_has():
    known = {argument for name in losses.RECIPES for argument in losses.arguments(name)}
    assert set(losses.ARGUMENTS) == known
