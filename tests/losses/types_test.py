"""What the records refuse: unknown words, contradictions, missing parts that are read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from jax.sharding import AxisType, PartitionSpec

from qlog import losses

LOG_W = jnp.log(jnp.array([[0.5, 0.1, 0.2], [1e-3, 2e-3, 1e-6]]))
REWARD = jnp.array([[1, 0, 0], [0, 1, 1]], jnp.float32)
NUM_TOKENS = jnp.array([[3, 1, 2], [4, 4, 4]], jnp.int32)


def run(transform, scores, key=None):
    return losses.coefficients(transform, scores, transform.init(scores), key=key)[0]


# --- Estimator ------------------------------------------------------------------------------------

NEEDS = [
    ({"rationale": "sampeld"}, "must be one of 'sampled', 'annotated', got 'sampeld' .*'sampled'"),
    ({"answer": "smpled"}, r"must be one of 'gold', 'sampled', got 'smpled' \(did you mean 'samp"),
    ({"answer": "silver"}, "answer must be one of 'gold', 'sampled', got 'silver'$"),
    ({"reward": ""}, "reward must name a grader, such as 'exact_match', got ''"),
    (
        {"rationale": "annotated", "answer": "sampled", "reward": "exact_match"},
        "answer='sampled' contradicts rationale='annotated', which samples nothing",
    ),
    (
        {"rationale": "annotated", "reward": "exact_match"},
        "reward='exact_match' contradicts rationale='annotated'",
    ),
    ({"answer": "sampled"}, "answer='sampled' needs a reward"),
    ({"min_rollouts": 0}, "min_rollouts must be at least 1, got 0"),
]


@pytest.mark.parametrize("given, message", NEEDS)
def test_needs_that_mean_nothing_are_refused_when_built(given, message):
    (name, *_) = [
        name for name in ("answer", "reward", "rationale", "min_rollouts") if name in given
    ]
    with pytest.raises(ValueError, match=message):
        losses.Estimator(losses.garl(), losses.linear(), **given)
    with pytest.raises(ValueError, match=message):
        losses.Recipe(losses.garl, **given)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("transform", losses.garl, "Estimator.transform must be an optax transform .* got <func"),
        ("surrogate", "linear", "Estimator.surrogate must be a function, got 'linear'"),
        ("reward", 1.0, "Estimator.reward must be a string or None, got 1.0"),
        ("reference", "yes", "Estimator.reference must be True or False, got 'yes'"),
        ("min_rollouts", 2.0, "Estimator.min_rollouts must be an integer of at least 1, got 2.0"),
    ],
)
def test_fields_of_the_wrong_kind_are_refused(field, value, message):
    fields = {"transform": losses.garl(), "surrogate": losses.linear()}
    with pytest.raises(TypeError, match=message):
        losses.Estimator(**fields | {field: value})


def test_one_annotated_rationale_leaves_nothing_out():
    with pytest.raises(ValueError, match="min_rollouts=2 contradicts rationale='annotated'"):
        losses.Estimator(losses.sft(), losses.linear(), rationale="annotated", min_rollouts=2)


def test_an_estimator_is_static_under_jit():
    estimator = losses.build("garl", q=0.5)

    @functools.partial(jax.jit, static_argnames="estimator")
    def step(estimator, scores):
        return run(estimator.transform, scores)

    assert hash(estimator) != hash(losses.build("garl", q=0.5))  # other functions inside
    trees.assert_close(
        step(estimator, losses.Scores(LOG_W)),
        run(estimator.transform, losses.Scores(LOG_W)),
        rtol=1e-6,
    )


# --- Recipe ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"q": 0.5}, ValueError, "Recipe.q=0.5 is not read, since garl takes q"),
        ({"overrides": {"corection": "jackknife"}}, ValueError, "did you mean 'correction'"),
        ({"surrogate": "linear"}, TypeError, "Recipe.surrogate must be a function, got 'linear'"),
        ({"weight": 1.0}, TypeError, "Recipe.weight must be a function or None, got 1.0"),
        ({"min_rollouts": 2.5}, TypeError, "Recipe.min_rollouts must be an integer"),
    ],
)
def test_recipes_are_checked_when_written(given, error, message):
    with pytest.raises(error, match=message):
        losses.Recipe(losses.garl, **given)


def test_a_recipe_of_a_fixed_q_is_in_range():
    with pytest.raises(ValueError, match=r"Recipe.q must be in \[0, 1\], got 2.0"):
        losses.Recipe(losses.iwae, q=2.0)


# --- Scores ---------------------------------------------------------------------------------------

MISSING = [
    (losses.grpo(), losses.Scores(LOG_W), "from_reward reads scores.reward, which is missing"),
    (losses.rloo(), losses.Scores(LOG_W), "from_reward reads scores.reward"),
    (losses.scale_by_group_std(), losses.Scores(LOG_W), "scale_by_group_std reads scores.reward"),
    (losses.maxrl(), losses.Scores(LOG_W), "log_reward reads scores.reward"),
    (losses.star(), losses.Scores(LOG_W), "log_reward reads scores.reward"),
    (losses.garl(), losses.Scores(reward=REWARD), "log_likelihood reads scores.log_w"),
    (losses.adaptive_q(losses.star), losses.Scores(reward=REWARD), "reads scores.log_w"),
    (
        losses.aggregate("sequence_mean"),
        losses.Scores(LOG_W),
        r"aggregate\('sequence_mean'\) reads scores.num_tokens, which is missing: pass "
        r"losses.Scores\(num_tokens=...\), int32 \[B, M\]",
    ),
    (losses.aggregate("token_mean"), losses.Scores(LOG_W), r"aggregate\('token_mean'\) reads"),
]


@pytest.mark.parametrize("transform, scores, message", MISSING)
def test_a_part_that_reads_a_missing_score_says_so(transform, scores, message):
    with pytest.raises(ValueError, match=message):
        run(transform, scores)
    with pytest.raises(ValueError, match=message):
        jax.jit(run, static_argnums=0)(transform, scores)


def test_the_grpo_recipe_needs_rewards_and_numbers_of_tokens():
    grpo = losses.build("grpo").transform
    with pytest.raises(ValueError, match="reads scores.reward"):
        run(grpo, losses.Scores(LOG_W, num_tokens=NUM_TOKENS))
    with pytest.raises(ValueError, match="reads scores.num_tokens"):
        run(grpo, losses.Scores(LOG_W, REWARD))
    assert np.abs(run(grpo, losses.Scores(reward=REWARD, num_tokens=NUM_TOKENS)).score).min() > 0.01


def test_what_nothing_reads_may_be_missing():
    """'sum' and 'constant' read no number of tokens, SFT nothing at all."""
    for mode, limit in (("sum", None), ("constant", 8)):
        run(losses.aggregate(mode, limit), losses.Scores(LOG_W))
    valid = jnp.array([[True, True, False]])
    np.testing.assert_allclose(run(losses.sft(), losses.Scores(valid=valid)).score, [[0.5, 0.5, 0]])


def test_without_valid_there_is_no_padding():
    whole = losses.Scores(LOG_W, valid=jnp.ones((2, 3), bool))
    for transform in (losses.garl(0.5), losses.build("paft").transform):
        key = jax.random.key(0)
        trees.assert_equal(run(transform, losses.Scores(LOG_W), key), run(transform, whole, key))


def test_scores_without_a_shape_or_values_are_refused():
    with pytest.raises(ValueError, match="at least one of log_w, reward, valid, num_tokens"):
        run(losses.garl(), losses.Scores())
    with pytest.raises(TypeError, match="abstract_scores are for init only"):
        run(losses.garl(), losses.abstract_scores(2, 3))
    with pytest.raises(TypeError, match="abstract_scores are for init only"):
        run(losses.garl(), losses.abstract_scores(2, 3)._replace(log_w=LOG_W))
    with pytest.raises(ValueError, match=r"scores.num_tokens must have reward's shape \(2, 3\)"):
        run(losses.garl(), losses.Scores(reward=REWARD, num_tokens=NUM_TOKENS[:, :2]))


@pytest.mark.parametrize("name", losses.RECIPES)
def test_shapes_alone_make_the_state_of_real_scores(name):
    tokens = jnp.stack([LOG_W, LOG_W], -1), jnp.ones((2, 3, 2), bool)
    scores = losses.Scores(LOG_W, REWARD, jnp.ones((2, 3), bool), NUM_TOKENS, *tokens)
    scores = jax.tree.map(lambda x: jnp.concatenate([x, x], 1), scores)  # some need four rollouts
    transform = losses.build(name).transform
    trees.assert_equal(transform.init(losses.abstract_scores(2, 6)), transform.init(scores))


def test_missing_scores_pass_through_jit_shard_map_vmap_and_pmap():
    """Two devices, a prompt each."""
    transform = losses.build("garl", aggregation="sequence_mean").transform
    scores = losses.Scores(log_w=LOG_W, num_tokens=NUM_TOKENS)
    state = transform.init(scores)
    expected = jax.jit(lambda s: losses.coefficients(transform, s, state)[0])(scores)

    def step(scores):
        return losses.coefficients(transform, scores, state, axis_name="data")[0]

    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    rows = PartitionSpec("data")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(rows,), out_specs=rows)
    trees.assert_close(jax.jit(mapped)(scores), expected, rtol=1e-6, atol=1e-8)

    split = jax.tree.map(lambda x: x[:, None], scores)
    for mapped in (
        jax.vmap(step, axis_name="data"),
        jax.pmap(step, axis_name="data", devices=jax.devices()[:2]),
    ):
        joined = jax.tree.map(lambda x: x[:, 0], mapped(split))
        trees.assert_close(joined, expected, rtol=1e-6, atol=1e-8)


def test_scores_per_gold_token_are_checked():
    tokens, mask = jnp.zeros((2, 3, 4)), jnp.ones((2, 3, 4), bool)
    transform = losses.rlpr()
    for given, message in (
        ({"gold_log_probs": tokens}, "go together: pass both or neither"),
        (
            {"gold_log_probs": tokens, "gold_mask": mask[..., :2]},
            r"gold_mask must have .* \[B, M, A",
        ),
        ({"gold_log_probs": tokens[:1], "gold_mask": mask[:1]}, r"must have .* = \(2, 3\)"),
        ({"gold_log_probs": LOG_W, "gold_mask": mask}, r"must have shape \[B, M, A\]"),
        ({}, r"reads scores.gold_mask, which is missing: .* bool \[B, M, A\]"),
    ):
        with pytest.raises(ValueError, match=message):
            run(transform, losses.Scores(log_w=LOG_W, **given))
    assert losses.Scores(gold_log_probs=tokens, gold_mask=mask).shape == (2, 3)
    scores = losses.Scores(log_w=LOG_W, gold_log_probs=tokens, gold_mask=mask)
    assert losses.build("rlpr").measured(scores).gold_log_probs is tokens
    assert losses.build("garl").measured(scores).gold_log_probs is None
    with pytest.raises(ValueError, match="gold_log_probs=True contradicts rationale='annotated'"):
        losses.Estimator(
            transform=losses.sft(),
            surrogate=losses.linear(),
            rationale="annotated",
            gold_log_probs=True,
        )


def test_scores_without_any_field_say_so():
    with pytest.raises(ValueError, match="is empty: pass log_w="):
        _ = losses.Scores().shape
