"""What holds for every input: finite, bounded, equivariant, and the same in any layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qlog import losses

WIDTH = 1024  # groups are padded to it, so that every M shares one compilation

LOG_W = st.one_of(
    st.sampled_from([0.0, -1e4, -float("inf"), -1e-7, -88.0, -104.0, -300.0]),
    st.floats(-1e4, 0.0, width=32),
)
GROUPS = st.tuples(
    st.integers(2, WIDTH), st.lists(LOG_W, min_size=1, max_size=8), st.integers(0, 2**31 - 1)
)
Q = st.one_of(st.sampled_from([0.0, 1.0, 1 - 1e-6, 1e-6]), st.floats(0, 1, width=32))


def batch(num_rollouts, levels, seed, width=WIDTH):
    """Two groups: rollouts at the given levels, and the same moved up and down by up to 1."""
    rng = np.random.default_rng(seed)
    log_w = np.full((2, width), np.nan, np.float32)  # padding may hold anything
    log_w[:, :num_rollouts] = rng.choice(np.array(levels, np.float32), (2, num_rollouts))
    log_w[1] = np.clip(log_w[1] + rng.uniform(-1, 1, width), None, 0)
    valid = np.arange(width) < num_rollouts
    return losses.Scores(
        jnp.asarray(log_w),
        jnp.asarray(rng.integers(0, 2, (2, width)), jnp.float32),
        jnp.asarray(np.broadcast_to(valid, (2, width))),
        jnp.asarray(rng.integers(1, 9, (2, width)), jnp.int32),
    )


FACTORIES = {
    "garl": losses.garl,
    "plug_in": lambda q: losses.garl(q, "none"),
    "jackknife": lambda q: losses.garl(q, correction="jackknife"),
    "paft": losses.paft,
    "systematic": lambda q: losses.paft(q, resampling="systematic"),
    "star": losses.star,
    "jensen": losses.jensen,
}


@functools.cache
def compiled(name):
    """`f(scores, q)`, q traced: coefficients of the named estimator."""

    def run(scores, q):
        transform = FACTORIES[name](q)
        state = transform.init(scores)
        return losses.coefficients(transform, scores, state, key=jax.random.key(0))[0]

    return jax.jit(run)


def run(transform, scores, key=None):
    return losses.coefficients(transform, scores, transform.init(scores), key=key)[0]


@pytest.mark.parametrize("name", FACTORIES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(group=GROUPS, q=Q)
@example(group=(2, [-float("inf")], 0), q=1.0)
@example(group=(1024, [-1e4], 0), q=0.5)
@example(group=(3, [0.0, -1e4, -float("inf")], 1), q=0.0)
def test_finite_bounded_and_of_the_right_sign(name, group, q):
    scores = batch(*group)
    num_rollouts = group[0]
    got = compiled(name)(scores, q)
    valid = np.asarray(scores.valid)
    for array in got:
        assert np.all(np.isfinite(array))
        assert np.all(np.asarray(array)[~valid] == 0)
    score, path = (np.asarray(x, np.float64) * num_rollouts for x in (got.score, got.path))
    bound = num_rollouts**q
    if name == "jackknife":
        assert np.all(-2.001 * bound <= path) and np.all(path <= (1 + q) * bound * 1.001)
        return
    assert np.all(path >= 0)
    if name == "jensen":  # log_q between M^-1 and 1: at most log M
        assert np.all(np.abs(score) <= num_rollouts * 1e4)
        assert np.all(path <= num_rollouts * 1.001)
        return
    if name in ("paft", "systematic"):
        assert np.all(path <= num_rollouts * 1.001)
    else:
        assert np.all(path <= bound * 1.001)
    if name == "garl":
        # The baseline lies in [0, 1]; the best rollout is reinforced, the worst is not.
        assert np.all(score <= path) and np.all(score >= path - 1.001)
        log_w = np.where(valid, scores.log_w, -np.inf)
        best, worst = np.argmax(log_w, 1), np.argmin(np.where(valid, log_w, np.inf), 1)
        assert np.all(score[[0, 1], best] >= -2e-3) and np.all(score[[0, 1], worst] <= 2e-3)
    else:
        np.testing.assert_array_equal(score, path)
    if name == "garl" and q == 1.0:
        assert np.all(np.abs(score.sum(1)) < 1e-3 * num_rollouts)


@pytest.mark.parametrize("name", ["garl", "plug_in", "jackknife", "star"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(group=GROUPS, q=Q)
def test_permuting_the_rollouts_permutes_the_coefficients(name, group, q):
    scores = batch(*group)
    order = np.random.default_rng(group[2]).permutation(WIDTH)
    moved = jax.tree.map(lambda x: x[:, order], scores)
    expected = jax.tree.map(lambda x: x[:, order], compiled(name)(scores, q))
    got = compiled(name)(moved, q)
    tolerance = 1e-4 * max(1e-6, float(np.max(np.abs(expected.score))))
    np.testing.assert_allclose(got.score, expected.score, rtol=1e-4, atol=tolerance)
    np.testing.assert_allclose(got.path, expected.path, rtol=1e-4, atol=tolerance)


def test_padding_rollouts_changes_nothing_and_jit_is_eager():
    """Every estimator, PAFT's draws included: padded to width 8 under jit as unpadded and eager."""
    num_rollouts = 5
    levels = [-0.5, -3.0, -40.0, -float("inf")]
    wide = batch(num_rollouts, levels, 5, 8)
    narrow = jax.tree.map(lambda x: x[:, :num_rollouts], wide)

    def everything(scores):
        return {
            name: run(factory(0.75), scores, jax.random.key(1))
            for name, factory in FACTORIES.items()
        }

    jitted = jax.tree.map(lambda x: x[:, :num_rollouts], jax.jit(everything)(wide))
    assert_same(everything(narrow), jitted)


def test_tiny_weights_keep_their_signal():
    """log w of -800 and below: exact where float32 can hold the result."""
    scores = losses.Scores(log_w=jnp.array([[-800.0, -805.0, -900.0]]))
    softmax = np.exp([0, -5, -100]) / np.sum(np.exp([0, -5, -100]))
    np.testing.assert_allclose(
        run(losses.garl(1.0), scores).path[0], softmax, rtol=1e-4, atol=1e-30
    )
    got = run(losses.garl(0.9), scores).path[0, 0]
    log_mean = -800 + np.log1p(np.exp(-5)) - np.log(3)
    np.testing.assert_allclose(np.log(got), -800 - 0.9 * log_mean - np.log(3), rtol=1e-5)


def test_leave_one_out_does_not_cancel():
    """One rollout of weight 1 above others of 1e-12: its baseline is their mean, not rounding."""
    scores = losses.Scores(log_w=jnp.log(jnp.array([[1.0, 1e-12, 2e-12, 3e-12]])))
    got = run(losses.garl(0.5), scores)
    baseline = np.float64(got.path[0] - got.score[0]) * 4
    others = np.array([2e-12, (1 + 5e-12) / 3, (1 + 4e-12) / 3, (1 + 3e-12) / 3])
    np.testing.assert_allclose(baseline[1:], np.sqrt(others[1:]), rtol=1e-5)
    tiny = scores._replace(log_w=scores.log_w.at[0, 0].set(-60.0))
    got = run(losses.garl(0.5), tiny)
    baseline = np.float64(got.path[0] - got.score[0]) * 4
    np.testing.assert_allclose(baseline[0], np.sqrt(2e-12), rtol=1e-3)


# Rewards whose mean over a group is not the reward itself in float32, and ordinary ones.
LEVELS = (0.1, 0.3, -0.7, 1.0, 1e-3, 123.456, 1e5, -1e-30)
EQUAL = {
    "grpo": losses.grpo(),
    "grpo_without_eps": losses.grpo(eps=0.0),
    "grpo_unscaled": losses.grpo(scale_by_std=False),
    "rloo": losses.rloo(),
    "maxrl": losses.maxrl(),
    "rb_rloo": losses.rb_rloo(),
    "garl": losses.garl(0.75),
    "garl_at_q_1": losses.garl(1.0),
    "jackknife": losses.garl(0.3, correction="jackknife"),
    "jensen": losses.jensen(0.75),
    "jepo": losses.jepo(),
    "log_prob": losses.log_prob(),
    "tempered": losses.tempered(0.3),
    "rb_pass_at_k": losses.rb_pass_at_k(3),
    "rb_maxrl": losses.rb_maxrl(5),
    "pkpo": losses.pkpo(3),
    "rs_grpo": losses.rs_grpo(),
    "lite_ppo": losses.lite_ppo(),
    "average_log_prob": losses.average_log_prob(),
    "rlpr": losses.rlpr(),
    "r3": losses.r3(eps=0.0),
    "nover": losses.nover(eps=0.0),
}


@pytest.mark.parametrize("name", EQUAL)
@pytest.mark.parametrize("width", [7, 32, 40])
def test_equal_rewards_have_a_score_of_exactly_zero(name, width):
    """Alone and in a batch, with and without padding, eager and compiled."""
    for num_rollouts in {2, 7, 32} & set(range(width + 1)):
        valid = jnp.broadcast_to(jnp.arange(width) < num_rollouts, (len(LEVELS), width))
        level = jnp.broadcast_to(jnp.array(LEVELS, jnp.float32)[:, None], valid.shape)
        scores = losses.Scores(
            log_w=jnp.where(valid, -jnp.abs(level), jnp.nan),
            reward=jnp.where(valid, level, jnp.nan),
            valid=valid,
            num_tokens=jnp.where(valid, 7, 0),
            # Three gold tokens of one probability, the last of them behind the answer's end.
            gold_log_probs=jnp.where(valid, -jnp.abs(level), jnp.nan)[..., None] * jnp.ones(3),
            gold_mask=jnp.broadcast_to(jnp.arange(3) < 2, (*valid.shape, 3)),
        )
        one = jax.tree.map(lambda x: x[:1], scores)
        compute = jax.jit(lambda scores: run(EQUAL[name], scores))
        # w^t is an exponential, which XLA may compute in two places, each with its own rounding.
        rounding = 1e-7 * np.exp(-0.3 * 123.456) if name == "tempered" else 0.0
        for got in (run(EQUAL[name], scores), compute(scores), compute(one)):
            np.testing.assert_allclose(got.score, 0, atol=rounding)


def test_one_reward_that_differs_is_a_signal():
    reward = jnp.full((1, 32), 0.1, jnp.float32).at[0, 3].set(0.2)
    got = run(losses.grpo(), losses.Scores(reward=reward)).score[0]
    np.testing.assert_allclose(got[3] * 32, np.sqrt(31), rtol=1e-4)
    np.testing.assert_allclose(got[0] * 32, -1 / np.sqrt(31), rtol=1e-4)


# --- Layouts: eight devices, one prompt each or more ---------------------------------------------

ESTIMATORS = {
    **{name: losses.build(name).transform for name in losses.RECIPES},
    "token_mean": losses.build("garl", aggregation="token_mean").transform,
    "adaptive": losses.build("paft", q_schedule="adaptive", q=1.0).transform,
    "linear": losses.build("garl", q_schedule="linear", q=1.0, q_steps=4).transform,
    "by_group": losses.where_groups(losses.p_hat_above(0.1), losses.paft(0.75), losses.garl(0.75)),
}


KEY = jax.random.key(7)
FEW = ("garl", "paft", "token_mean", "adaptive")


def layout_scores():
    """16 groups of 5, some rollouts and one whole prompt padding."""
    rng = np.random.default_rng(0)
    log_w = -rng.exponential(3.0, (16, 5)).astype(np.float32)
    valid = rng.uniform(size=(16, 5)) < 0.9
    valid[3] = False
    return losses.Scores(
        jnp.asarray(log_w),
        jnp.asarray(rng.integers(0, 2, (16, 5)), jnp.float32),
        jnp.asarray(valid),
        jnp.asarray(rng.integers(1, 9, (16, 5)), jnp.int32),
        jnp.asarray(-rng.exponential(1.0, (16, 5, 3)), jnp.float32),
        jnp.asarray(np.broadcast_to(np.arange(3) < rng.integers(1, 4, (16, 1, 1)), (16, 5, 3))),
    )


def step(scores, states, axis_name=None):
    """One step of every estimator that has a state: name -> (coefficients, state)."""
    return {
        name: losses.coefficients(ESTIMATORS[name], scores, state, key=KEY, axis_name=axis_name)
        for name, state in states.items()
    }


def only(names, results):
    return {name: results[name] for name in names}


@pytest.fixture(scope="module")
def layouts():
    """(scores, states after one step, results of the next), on global arrays under jit."""
    scores = layout_scores()
    run_step = jax.jit(step)
    states = {name: transform.init(scores) for name, transform in ESTIMATORS.items()}
    states = {name: result[1] for name, result in run_step(scores, states).items()}
    return scores, states, run_step(scores, states)


def mesh_of(*sizes):
    names = ("data", "fsdp")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


def assert_same(expected, got):
    trees.assert_close(got, expected, rtol=2e-5, atol=1e-6)


def test_every_estimator_gives_a_signal(layouts):
    """So that the comparisons below compare something."""
    _, _, results = layouts
    for name, (coefficients, _) in results.items():
        assert np.max(np.abs(coefficients.score)) > 0.01, name


@pytest.mark.parametrize("sizes, axis_name", [((8,), "data"), ((4, 2), ("data", "fsdp"))])
def test_shard_map_over_eight_devices_is_the_global_result(layouts, sizes, axis_name):
    """All estimators over one axis, some over two; draws and measurements included."""
    scores, states, expected = layouts
    if len(sizes) == 2:
        states, expected = only(FEW, states), only(FEW, expected)
    rows, all_of_it = PartitionSpec(axis_name), PartitionSpec()
    mapped = jax.shard_map(
        functools.partial(step, axis_name=axis_name),
        mesh=mesh_of(*sizes),
        in_specs=(rows, all_of_it),
        out_specs=dict.fromkeys(states, (rows, all_of_it)),
    )
    assert_same(expected, jax.jit(mapped)(scores, states))


def test_pmap_is_the_global_result(layouts):
    scores, states, expected = layouts
    split = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), scores)
    mapped = jax.pmap(
        functools.partial(step, axis_name="data"), axis_name="data", in_axes=(0, None)
    )
    for name, (result, state) in mapped(split, only(FEW, states)).items():
        joined = jax.tree.map(lambda x: np.asarray(x).reshape(16, 5), result)
        assert_same(expected[name], (joined, jax.tree.map(lambda x: np.asarray(x)[0], state)))


def test_vmap_over_an_axis_name_is_the_global_result(layouts):
    scores, states, expected = layouts
    split = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), scores)
    mapped = jax.jit(
        jax.vmap(functools.partial(step, axis_name="data"), (0, None), axis_name="data")
    )
    for name, (result, _) in mapped(split, only(FEW, states)).items():
        assert_same(expected[name][0], jax.tree.map(lambda x: x.reshape(16, 5), result))


def test_vmap_over_batches_is_each_batch_alone(layouts):
    scores, states, _ = layouts
    states = only(FEW[1:3], states)
    split = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), scores)
    together = jax.jit(jax.vmap(step, (0, None)))(split, states)
    alone = jax.jit(step)(jax.tree.map(lambda x: x[1], split), states)
    assert_same(alone, jax.tree.map(lambda x: x[1], together))


def test_sharded_arrays_under_jit_stay_sharded(layouts):
    """Prompts over 'data' and 'fsdp' together."""
    scores, states, expected = layouts
    sharding = NamedSharding(mesh_of(4, 2), PartitionSpec(("data", "fsdp")))
    got = jax.jit(step)(jax.device_put(scores, sharding), only(FEW, states))
    assert_same(only(FEW, expected), got)
    assert got["garl"][0].score.sharding.is_equivalent_to(sharding, 2)
