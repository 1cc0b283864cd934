"""Estimators and aggregation against formulas worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_near

from qlog import losses

LOG_W = jnp.log(jnp.array([[0.5, 0.1, 0.2], [0.02, 0.7, 1e-3]]))
# One prompt with 2 of 4 right, one with 1 of 4, one with none, one with all.
REWARD = jnp.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], jnp.float32)


def run(transform, scores, **extra):
    return losses.coefficients(transform, scores, transform.init(scores), **extra)[0]


def test_iwae_is_autodiff_of_log_mean_exp():
    bound = lambda a: jnp.sum(jax.nn.logsumexp(a, axis=1) - jnp.log(3))
    got = run(losses.iwae(), losses.Scores(LOG_W))
    assert_near(got.path, jax.grad(bound)(LOG_W))
    assert_near(got.score, got.path)
    assert_near(got.path[0], [5 / 8, 1 / 8, 2 / 8])


@pytest.mark.parametrize("q", [0.0, 0.3, 1.0])
def test_plug_in_path_is_autodiff_of_log_q_of_the_mean(q):
    """path_m = d log_q(wbar) / d log w_m = w_m / wbar^q / M (eq 9, 20)."""
    objective = lambda a: jnp.sum(losses.log_q(jax.nn.logsumexp(a, axis=1) - jnp.log(3), q))
    got = run(losses.garl(q), losses.Scores(LOG_W))
    assert_near(got.path, jax.grad(objective)(LOG_W))
    w = np.exp(LOG_W)
    others = (w.sum(1, keepdims=True) - w) / 2
    assert_near(got.score, (w / w.mean(1, keepdims=True) ** q - others ** (1 - q)) / 3)


def test_garl_at_q_1_is_centred():
    """Identity 4: w_m / wbar - 1 sum to zero over the group."""
    got = run(losses.garl(1.0), losses.Scores(LOG_W))
    assert_near(got.score.sum(1), [0, 0])
    w = np.exp(LOG_W)
    assert_near(3 * got.score, w / w.mean(1, keepdims=True) - 1)


def test_maxrl():
    """(r_m - rbar) / rbar / M, zero where none is right."""
    expected = [[0.25, -0.25, -0.25, 0.25], [-0.25, 0.75, -0.25, -0.25], [0] * 4, [0] * 4]
    got = run(losses.maxrl(), losses.Scores(reward=REWARD))
    assert_near(got.score, expected)
    assert_near(got.path, expected)


def test_grpo():
    """(r_m - rbar) / std / M: std is 1/2, then sqrt(3)/4, then 0, where nothing is learnt."""
    s = np.sqrt(3) / 4
    rows = [[1, -1, -1, 1], [-0.25 / s, 0.75 / s, -0.25 / s, -0.25 / s], [0] * 4, [0] * 4]
    got = run(losses.grpo(eps=0.0), losses.Scores(reward=REWARD))
    assert_near(got.score, np.array(rows) / 4)
    assert_near(got.path, got.score)
    # Of a sample: the sum of squares over n - 1.
    sample = run(losses.grpo(eps=0.0, sample_std=True), losses.Scores(reward=REWARD))
    assert_near(sample.score, np.array(rows) / 4 * np.sqrt(3 / 4))
    unscaled = run(losses.grpo(scale_by_std=False), losses.Scores(reward=REWARD))
    assert_near(unscaled.score[0], np.array([0.5, -0.5, -0.5, 0.5]) / 4)


def test_rloo():
    """(r_m - rbar_{-m}) / M: against 1/3 for a right and 2/3 for a wrong rollout of the first."""
    third = 1 / 3
    rows = [
        [2 * third, -2 * third, -2 * third, 2 * third],
        [-third, 1, -third, -third],
        [0] * 4,
        [0] * 4,
    ]
    assert_near(run(losses.rloo(), losses.Scores(reward=REWARD)).score, np.array(rows) / 4)


def test_star_sft_and_the_endpoints():
    star = run(losses.star(), losses.Scores(reward=REWARD))
    assert_near(star.score, [[0.5, 0, 0, 0.5], [0, 1, 0, 0], [0] * 4, [0.25] * 4])
    assert_near(run(losses.star(0.0), losses.Scores(reward=REWARD)).path, REWARD / 4)
    assert_near(run(losses.sft(), losses.Scores(reward=REWARD)).score, np.full((4, 4), 0.25))
    w = np.exp(LOG_W)
    assert_near(run(losses.rb_reinforce(), losses.Scores(LOG_W)).score, w / 3)
    rb_rloo = run(losses.rb_rloo(), losses.Scores(LOG_W))
    assert_near(rb_rloo.score, (w - (w.sum(1, keepdims=True) - w) / 2) / 3)
    assert_near(rb_rloo.path, w / 3)


def test_normalisation_by_the_bound_and_the_ablation_and_clipping():
    scores = losses.Scores(LOG_W)
    plain = run(losses.garl(0.5), scores)
    edited = losses.chain(losses.garl(0.5), losses.normalize_by_bound(0.5), losses.zero_pathwise())
    assert_near(run(edited, scores).score, plain.score / np.sqrt(3))
    assert_near(run(edited, scores).path, np.zeros((2, 3)))
    clipped = run(losses.chain(losses.garl(0.5), losses.clip_coefficients(0.3)), scores)
    assert_near(clipped.score, np.clip(plain.score, -0.1, 0.1))
    assert_near(clipped.path, np.clip(plain.path, -0.1, 0.1))
    assert np.any(np.abs(plain.score) > 0.1)


LENGTHS = jnp.array([[2, 4, 1, 1], [10, 5, 5, 1], [3, 3, 3, 3], [1, 1, 1, 1]], jnp.int32)


@pytest.mark.parametrize(
    "mode, max_tokens",
    [("sum", None), ("sequence_mean", None), ("token_mean", None), ("constant", 16)],
)
def test_aggregation(mode, max_tokens):
    """Each mode as the average it is named for, of sum_t A_m log p_t over tokens."""
    valid = jnp.ones((4, 4), bool).at[1, 3].set(False).at[3].set(False)
    scores = losses.Scores(reward=REWARD, valid=valid, num_tokens=LENGTHS)
    advantage = run(losses.chain(losses.from_reward(), losses.center()), scores).score
    n = np.array([4, 3, 4, 1])[:, None]
    a, length, keep = np.asarray(advantage) * n, np.asarray(LENGTHS, float), np.asarray(valid)
    expected = {
        "sum": a / n,
        "sequence_mean": a / length / n,
        "constant": a / 16 / n,
        # The trainer divides by 3 prompts: so every one of the 8 + 20 + 12 tokens weighs 1/40.
        "token_mean": a * 3 / np.sum(length * keep),
    }[mode]
    transform = losses.chain(
        losses.from_reward(), losses.center(), losses.aggregate(mode, max_tokens)
    )
    got = run(transform, scores)
    assert_near(got.score, np.where(keep, expected, 0))
    assert_near(
        got.token_weight[0, 1],
        {"sum": 1 / 4, "sequence_mean": 1 / 16, "constant": 1 / 64, "token_mean": 3 / 40}[mode],
    )
    assert np.all(np.asarray(got.token_weight)[~keep] == 0)
