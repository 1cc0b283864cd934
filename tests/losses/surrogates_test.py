"""Surrogates against formulas worked by hand: two groups of two rollouts of three tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from trees import assert_near

from qlog import losses

RATIONALE = jnp.array([[[1, 1, 0], [1, 0, 0]], [[1, 1, 0], [0, 0, 0]]], bool)
ANSWER = jnp.array([[[0, 0, 1], [0, 1, 0]], [[0, 0, 1], [0, 0, 0]]], bool)
SCORE, PATH = jnp.array([[0.5, -0.25], [1.0, 3.0]]), jnp.array([[0.3, -0.1], [2.0, 3.0]])
WEIGHT = jnp.array([[0.5, 0.5], [1.0, 0.0]])
OLD = -jnp.arange(1, 13, dtype=jnp.float32).reshape(2, 2, 3) / 5
MOVE = jnp.array([[[0.5, -0.5, 0.1], [0.5, -0.5, 0.0]], [[0.05, 0.3, -0.3], [9.0, 9.0, 9.0]]])
IS_TOKEN = np.asarray(RATIONALE | ANSWER)
PER_TOKEN = np.asarray(SCORE[..., None] * RATIONALE + PATH[..., None] * ANSWER)


def call(surrogate, new, old=OLD, reference=None, part=slice(None)):
    coefficients = losses.Coefficients(SCORE, PATH, jnp.zeros((2, 2)), WEIGHT)
    tokens = losses.TokenLogProbs(new, RATIONALE, ANSWER, old, reference)
    return surrogate(*jax.tree.map(lambda x: x[part], (coefficients, tokens)))


def test_linear_surrogate_has_the_estimator_as_gradient():
    slope = jax.grad(lambda new: call(losses.linear(), new).loss)(OLD + MOVE)
    assert_near(slope, -PER_TOKEN)
    assert call(losses.linear(), OLD).tokens == 8


def test_clipped_surrogate_by_hand():
    surrogate = losses.clipped(0.2, 0.28)
    sums = call(surrogate, OLD + MOVE)
    ratio = np.exp(np.asarray(MOVE, np.float64))
    gain = np.minimum(ratio * PER_TOKEN, np.clip(ratio, 0.8, 1.28) * PER_TOKEN)
    assert_near(sums.loss, -np.sum(gain[IS_TOKEN]))
    slope = jax.grad(lambda new: call(surrogate, new).loss)(OLD + MOVE)
    # Clipped: gains above 1.28 with positive, below 0.8 with negative coefficients.
    stopped = ((ratio > 1.28) & (PER_TOKEN > 0)) | ((ratio < 0.8) & (PER_TOKEN < 0))
    assert_near(slope, np.where(stopped | ~IS_TOKEN, 0, -ratio * PER_TOKEN))
    assert sums.clipped == np.sum(stopped & IS_TOKEN) == 3
    on_policy = jax.grad(lambda new: call(surrogate, new).loss)(OLD)
    assert_near(on_policy, -PER_TOKEN)


def test_kl_estimates():
    new, reference = jnp.array([-1.0, -2.0, -0.5]), jnp.array([-1.5, -1.0, -0.5])
    d = np.array([-0.5, 1.0, 0.0])
    value = {"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - d - 1}
    slope = {"k1": -d, "k2": -d, "k3": 1 - np.exp(d)}
    for kind in value:
        assert_near(losses.kl_estimate(new, reference, kind), value[kind])
        total = lambda x, kind: jnp.sum(losses.kl_estimate(x, reference, kind))
        assert_near(jax.grad(total)(new, kind), slope[kind])


def test_kl_estimates_have_the_right_means_and_gradients():
    """Over a distribution of 3 tokens: k1 and k3 have the mean KL, k1 and k2 its gradient."""
    logits, reference = jnp.array([0.3, -0.2, 1.0]), jax.nn.log_softmax(jnp.array([1.0, 0.0, 0.5]))
    kl = lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - reference))
    p = jax.nn.softmax(logits)
    for kind in ("k1", "k3"):
        assert_near(p @ losses.kl_estimate(jnp.log(p), reference, kind), kl(logits))
    for kind in ("k1", "k2"):
        mean = lambda x, kind: p @ losses.kl_estimate(jax.nn.log_softmax(x), reference, kind)
        assert_near(jax.grad(mean)(logits, kind), jax.grad(kl)(logits))


def test_kl_penalty_weighs_tokens_by_token_weight():
    surrogate = losses.add_kl(losses.linear(), 0.1, "k2")
    reference = OLD - 0.2
    sums = call(surrogate, OLD, reference=reference)
    plain = call(losses.linear(), OLD)
    tokens = IS_TOKEN.sum(-1)
    assert_near(sums.loss - plain.loss, 0.1 * 0.02 * np.sum(np.asarray(WEIGHT) * tokens))
    assert_near(sums.kl, 0.02 * 8)
    assert_near(losses.token_measurements(sums)["kl"], 0.02)
    with pytest.raises(ValueError, match="reference must be log-probabilities"):
        call(surrogate, OLD)


def test_sequence_ratio_is_gspo():
    """With one coefficient per rollout: autodiff of min(s A, clip(s) A), s the geometric mean."""
    low, high = 0.1, 0.05
    advantage = jnp.array([[0.5, -0.25], [-1.0, 3.0]])
    coefficients = losses.Coefficients(advantage, advantage, jnp.zeros((2, 2)), WEIGHT)
    length = IS_TOKEN.sum(-1)

    def ours(new):
        tokens = losses.TokenLogProbs(new, RATIONALE, ANSWER, OLD)
        return losses.clipped_sequence(low, high)(coefficients, tokens)

    def gspo(new):  # the coefficient of a token is A / L, once per token
        s = jnp.exp(jnp.sum(jnp.where(IS_TOKEN, new - OLD, 0), -1) / np.maximum(length, 1))
        gain = jnp.minimum(s * advantage, jnp.clip(s, 1 - low, 1 + high) * advantage)
        return -jnp.sum(gain * length)

    for new in (OLD, OLD + MOVE / 3, OLD - MOVE / 3, OLD + 0.04):
        assert_near(ours(new).loss, gspo(new))
        assert_near(jax.grad(lambda new: ours(new).loss)(new), jax.grad(gspo)(new))
    on_policy = jax.grad(lambda new: call(losses.clipped_sequence(), new).loss)(OLD)
    assert_near(on_policy, -PER_TOKEN)
    assert ours(OLD - 0.2).clipped == 5 and ours(OLD + 0.2).clipped == 3


def test_truncated_weights_by_hand():
    ratio = np.exp(np.asarray(MOVE, np.float64))
    slope = jax.grad(lambda new: call(losses.truncated("token", 1.3, 0.7), new).loss)(OLD + MOVE)
    assert_near(slope, -np.clip(ratio, 0.7, 1.3) * PER_TOKEN)
    sums = call(losses.cispo(1.0, 0.3), OLD + MOVE)
    assert sums.clipped == np.sum((ratio > 1.3) & IS_TOKEN) == 3
    # Gold answers were not sampled: `old` means nothing there.
    gold = losses.truncated("token", 1.3, 0.7, sampled_answer=False)
    nothing = jnp.where(ANSWER, jnp.nan, OLD)
    slope = jax.grad(lambda new: call(gold, new, nothing).loss)(OLD + MOVE)
    assert_near(slope, -np.where(ANSWER, 1, np.clip(ratio, 0.7, 1.3)) * PER_TOKEN)
    # One weight for the rationale and what follows it: e^0, e^0.5, e^0.35.
    gold = losses.truncated("sequence", 1.5, sampled_answer=False)
    slope = jax.grad(lambda new: call(gold, new, nothing).loss)(OLD + MOVE)
    assert_near(slope, -np.array([[1, 1.5], [np.exp(0.35), 1]])[..., None] * PER_TOKEN)
    for surrogate in (losses.truncated(), losses.truncated("sequence")):
        assert_near(jax.grad(lambda new, f=surrogate: call(f, new).loss)(OLD), -PER_TOKEN)


# Every rationale of two tokens out of three, under two policies: logits [3] of the first token and
# [3, 3] of the second after each.
PAIRS = np.stack(np.meshgrid(range(3), range(3), indexing="ij"), -1).reshape(9, 2)


def policy(seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=3)), jnp.asarray(rng.normal(size=(3, 3)))


def pair_log_probs(logits):
    """[1, 9, 2] log-probabilities of the tokens of every pair."""
    first, second = (jax.nn.log_softmax(x) for x in logits)
    return jnp.stack([first[PAIRS[:, 0]], second[PAIRS[:, 0], PAIRS[:, 1]]], -1)[None]


def mean_slope(surrogate, old, new, coefficient):
    """The gradient at `new` of the surrogate, summed over all pairs by their odds under `old`."""
    odds = jnp.exp(pair_log_probs(old).sum(-1))
    here = jnp.ones((1, 9, 2), bool)

    def loss(logits):
        tokens = losses.TokenLogProbs(
            pair_log_probs(logits), here, ~here, pair_log_probs(old), pair_log_probs(policy(3))
        )
        value = odds * coefficient
        return surrogate(losses.Coefficients(value, value, jnp.zeros_like(value), odds), tokens)

    return jax.grad(lambda logits: loss(logits).loss)(new)


def test_sequence_weights_correct_for_an_older_policy_exactly():
    """The mean over the old policy's rationales is the new one's gradient, whatever its distance;
    weights per token leave out how the first token moves the second."""
    old, new = policy(0), policy(1)
    coefficient = jnp.asarray(np.random.default_rng(2).normal(size=(1, 9)))
    expected = mean_slope(losses.linear(), new, new, coefficient)
    found = mean_slope(losses.truncated("sequence", np.inf), old, new, coefficient)
    trees.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    uncorrected = mean_slope(losses.linear(), old, new, coefficient)
    assert np.abs(uncorrected[0] - expected[0]).max() > 0.1
    by_token = mean_slope(losses.truncated("token", np.inf), old, new, coefficient)
    assert np.abs(by_token[0] - expected[0]).max() > 0.01


def mean_gradient(sampler_logits, learner, **arguments):
    """The mean gradient of `rb_reinforce` over rationales of a sampler that is not the learner.

    Gold answers have w = sigmoid of a parameter per pair. Every pair is a group of one rollout, and
    its coefficients are multiplied by the sampler's odds of it.
    """
    estimator = losses.build("rb_reinforce", **arguments)
    sampled = pair_log_probs(sampler_logits)[0][:, None]  # [9, 1, 2]
    odds = jnp.exp(sampled.sum(-1))
    here = jnp.ones((9, 1, 3), bool).at[..., 2].set(False)
    # The gold answer was not sampled: what stands for it may be anything.
    old = jnp.concatenate([sampled, jnp.full((9, 1, 1), jnp.nan)], -1)
    scores = losses.Scores(log_w=jax.nn.log_sigmoid(learner[1])[:, None])
    state = estimator.transform.init(losses.abstract_scores(9, 1))
    found, _ = losses.coefficients(estimator.transform, scores, state)
    found = jax.tree.map(lambda x: x * odds, found)

    def loss(parameters):
        logits, answers = parameters
        gold = jax.nn.log_sigmoid(answers)[:, None, None]
        new = jnp.concatenate([pair_log_probs(logits)[0][:, None], gold], -1)
        return estimator.surrogate(found, losses.TokenLogProbs(new, here, ~here, old)).loss

    return jax.tree.map(lambda x: -x, jax.grad(loss)(learner))


@pytest.mark.parametrize("distance", [0.01, 1.0], ids=["as int8 caches", "far"])
def test_weights_make_the_gradient_exact_where_the_sampler_is_not_the_learner(distance):
    """A recipe's own option: importance='sequence'. Truncated, it errs by what is cut off only."""
    learner = policy(1), jnp.asarray(np.random.default_rng(4).normal(size=9), jnp.float32)
    moved = jax.tree.map(lambda x, by: x + distance * by, learner[0], policy(0))

    def success(parameters):
        return jnp.exp(pair_log_probs(parameters[0]).sum(-1))[0] @ jax.nn.sigmoid(parameters[1])

    exact = jax.grad(success)(learner)
    uncorrected = mean_gradient(moved, learner)
    corrected = mean_gradient(moved, learner, importance="sequence", max_ratio=np.inf)
    trees.assert_close(corrected, exact, rtol=1e-4, atol=1e-6)
    off = lambda found: max(
        np.abs(one - other).max()
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    )
    assert off(uncorrected) > 100 * off(corrected)
    # Token by token it leaves out how a token moves the odds of those after it.
    by_token = mean_gradient(moved, learner, importance="token", max_ratio=np.inf)
    assert off(corrected) < off(by_token) < off(uncorrected)
    # Truncated: the gradient of sum_z min(most mu(z), pi(z)) w(z) with the odds held fixed.
    most = 1.05 if distance < 0.1 else 1.5
    mu, pi = (jnp.exp(pair_log_probs(x).sum(-1))[0] for x in (moved, learner[0]))
    kept = jnp.minimum(most * mu, pi) * jax.nn.sigmoid(learner[1])

    def held(parameters):
        gain = pair_log_probs(parameters[0]).sum(-1)[0] + jax.nn.log_sigmoid(parameters[1])
        return kept @ gain

    truncated = mean_gradient(moved, learner, importance="sequence", max_ratio=most)
    trees.assert_close(truncated, jax.grad(held)(learner), rtol=1e-4, atol=1e-6)
    lost = jnp.maximum(pi - most * mu, 0).sum()
    assert off(truncated) <= 2 * lost + 1e-6
    assert (lost > 0) == (distance > 0.1)  # int8's differences are never cut off


def test_the_penalty_of_sequences_has_the_gradient_of_their_kl():
    """That of single tokens does not: a first token also decides the KL of the second."""
    new, reference = policy(1), pair_log_probs(policy(3))

    def kl(logits):
        ours = pair_log_probs(logits)
        return jnp.sum(jnp.exp(ours.sum(-1)) * (ours - reference).sum(-1))

    expected = jax.grad(kl)(new)
    found = {
        kind: mean_slope(losses.add_kl(losses.linear(), 1.0, kind), new, new, jnp.zeros((1, 9)))
        for kind in ("sequence", "k2")
    }
    trees.assert_close(found["sequence"], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(found["k2"][0] - expected[0]).max() > 0.01


def test_the_penalty_leaves_gold_answers_out():
    surrogate = losses.add_kl(losses.linear(), 0.1, "k2", sampled_answer=False)
    sums = call(surrogate, OLD, reference=OLD - 0.2)
    assert_near(sums.kl, 0.02 * np.sum(RATIONALE))


@pytest.mark.parametrize(
    "name", ["linear", "clipped", "kl", "kl_sequence", "gspo", "token", "sequence"]
)
def test_sums_add_over_microbatches_and_ignore_padding(name):
    surrogate = {
        "linear": losses.linear(),
        "clipped": losses.clipped(),
        "kl": losses.add_kl(losses.clipped(), 0.1),
        "kl_sequence": losses.add_kl(losses.linear(), 0.1, "sequence"),
        "gspo": losses.clipped_sequence(),
        "token": losses.truncated("token", sampled_answer=False),
        "sequence": losses.truncated("sequence"),
    }[name]
    bad = jnp.where(IS_TOKEN, OLD + MOVE, jnp.nan)
    old, reference = (jnp.where(IS_TOKEN, x, -jnp.inf) for x in (OLD, OLD - 0.1))
    whole = call(surrogate, bad, old, reference)
    halves = [call(surrogate, bad, old, reference, slice(i, i + 1)) for i in (0, 1)]
    added = jax.tree.map(lambda *x: sum(x), *halves)
    trees.assert_close(added, whole, rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda new: call(surrogate, new, old, reference).loss)(bad)
    assert np.all(np.isfinite(slope)) and np.all(np.asarray(slope)[~IS_TOKEN] == 0)


def test_surrogates_check_shapes():
    coefficients = losses.Coefficients(SCORE, PATH, jnp.zeros((2, 2)), WEIGHT)
    tokens = losses.TokenLogProbs(OLD, RATIONALE, ANSWER, OLD)
    linear = losses.linear()
    with pytest.raises(ValueError, match=r"new must have shape \[b, M, R\]"):
        linear(coefficients, tokens._replace(new=OLD[:, :1]))
    with pytest.raises(ValueError, match=r"score and path must have one shape \[b, M\]"):
        linear(coefficients._replace(path=PATH[:1]), tokens)
    with pytest.raises(
        ValueError, match=r"token_weight must have score's shape \(2, 2\), got \(2,"
    ):
        linear(coefficients._replace(token_weight=WEIGHT[:, :1]), tokens)
    with pytest.raises(ValueError, match="rationale_mask must be bool"):
        linear(coefficients, tokens._replace(rationale_mask=RATIONALE.astype(int)))
    with pytest.raises(ValueError, match=r"reference must be log-probabilities of shape .* \(2, 1"):
        linear(coefficients, tokens._replace(reference=OLD[:, :1]))
    with pytest.raises(
        ValueError, match="old must be log-probabilities .* clipped ratio, got None"
    ):
        losses.clipped()(coefficients, tokens._replace(old=None))
    with pytest.raises(TypeError, match="takes losses.Coefficients and losses.TokenLogProbs, got"):
        linear(SCORE, tokens)
