"""Estimators against the gradient of the objective that each is named for, in two exact steps.

Step one is arithmetic in float64, without the code: the formula of a recipe, as README.md prints
it, has the objective's gradient as its mean. All ordered groups of M rollouts of a small model are
enumerated, with all their sampled answers, and the gradient of the objective is a complex step; the
two agree to 1e-9. Step two: the code computes that formula, to float32's rounding.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlog import losses

M = 4
LOGITS = np.array([0.2, 1.0, -0.5])  # of three rationales
ANSWER_LOGITS = np.array([-3.0, -1.0, 1.0])  # of the gold answer after each
Z = len(LOGITS)
THETA = np.concatenate([LOGITS, ANSWER_LOGITS])


def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(p(z), w(z)), each [Z]; complex if `theta` is."""
    prior = np.exp(theta[:Z])
    return prior / prior.sum(), 1 / (1 + np.exp(-theta[Z:]))


def gradient(objective: Callable[[np.ndarray], complex]) -> np.ndarray:
    """[2Z] by complex steps: exact to the last bits of float64."""
    return np.array([objective(THETA + 1e-30j * unit).imag for unit in np.eye(2 * Z)]) / 1e-30


def groups(size: int) -> np.ndarray:
    """[N, size] all ordered groups of rationales."""
    return np.array(list(itertools.product(range(Z), repeat=size)))


def mean_over_groups(value: Callable[[np.ndarray], np.ndarray], size: int = M):
    """The objective E value(w) of groups of `size` weights, as a function of theta."""

    def objective(theta: np.ndarray) -> complex:
        prior, w = model(theta)
        z = groups(size)
        return np.sum(prior[z].prod(1) * value(w[z]))

    return objective


def mean_estimate(formula: Callable[..., tuple[np.ndarray, np.ndarray]], sampled: bool):
    """[2Z] the mean of sum_m (score_m grad log p(z_m) + path_m grad log p(answer | z_m))."""
    prior, w = model(THETA)
    z = groups(M)
    right = np.array(list(itertools.product((0, 1), repeat=M))) if sampled else np.ones((1, M), int)
    z, right = (x.reshape(-1, M) for x in np.broadcast_arrays(z[:, None], right[None]))
    probability = prior[z].prod(1)
    if sampled:
        probability = probability * np.where(right, w[z], 1 - w[z]).prod(1)
    score, path = formula(right if sampled else w[z])
    # grad of log p(z): a unit vector minus the prior. Of log w: 1 - w; of log(1 - w): -w.
    of_rationale = np.eye(Z)[z] - prior
    of_answer = np.eye(Z)[z] * (right - w[z])[..., None]
    total = (score[..., None] * of_rationale).sum(1), (path[..., None] * of_answer).sum(1)
    return probability @ np.concatenate(total, 1)


def others(x: np.ndarray) -> np.ndarray:
    """[N, M] the mean over the other rollouts."""
    return (x.sum(1, keepdims=True) - x) / (x.shape[1] - 1)


def log_q(u, q):
    return np.log(u) if q == 1 else (u ** (1 - q) - 1) / (1 - q)


def over_subsets(x: np.ndarray, size: int, value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[N, M] for each rollout the mean of `value` over subsets of `size` of the others, listed."""
    means = []
    for m in range(x.shape[1]):
        rest = [j for j in range(x.shape[1]) if j != m]
        means.append(np.mean([value(x[:, s]) for s in itertools.combinations(rest, size)], 0))
    return np.stack(means, 1)


class Case(NamedTuple):
    """A recipe, its formula and its objective."""

    recipe: str
    arguments: dict
    formula: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # of w, or of 0 and 1, [N, M]
    objective: Callable[[np.ndarray], complex]  # of theta
    sampled: bool = False
    # What the coefficients are multiplied with first: for estimators with a std below.
    times: Callable[[np.ndarray], np.ndarray] = lambda _: np.ones(1)


def jensen(q):
    def formula(w):
        mean = w.mean(1, keepdims=True)
        return log_q(mean, q) - log_q(others(w), q), mean ** (1 - q) * w / w.sum(1, keepdims=True)

    return formula


def success(theta):
    prior, w = model(theta)
    return prior @ w


def same(coefficient):
    return coefficient, coefficient


def log_prob(w):
    a = np.log(w)
    return (a - others(a)) / M, np.full_like(w, 1 / M)


def log_prob_of_fixed_w(theta):
    return model(theta)[0] @ np.log(model(THETA)[1])


def tempered(t):
    return lambda w: ((w**t - others(w**t)) / M, t * w**t / M)


def failures(w, size):
    return over_subsets(w, size, lambda s: np.prod(1 - s, 1))


def rb_pass_at_k(k, baseline):
    def formula(w):
        factor = k / M * failures(w, k - 1)
        return factor * (w - others(w) * (baseline != "none")), factor * w

    return formula


def rb_maxrl(order, baseline):
    def formula(w):
        each = [rb_pass_at_k(k, baseline)(w) for k in range(1, order + 1)]
        return tuple(sum(x[i] / (k + 1) for k, x in enumerate(each)) for i in (0, 1))

    return formula


def pass_at(k):
    return lambda theta: 1 - (1 - success(theta)) ** k


def likelihood_to_order(order):
    return lambda theta: -sum((1 - success(theta)) ** k / k for k in range(1, order + 1))


def pkpo(k, baseline):
    def formula(r):
        if k == 1:
            return same((r - others(r) * (baseline != "none")) / M)
        # Subsets of all M that hold rollout m, each worth its best, less the best of its others.
        best = lambda s: s.max(1)
        value = np.stack(
            [
                over_subsets(
                    r,
                    k - 1,
                    lambda s, m=m: np.maximum(r[:, m], best(s)) - (baseline != "none") * best(s),
                )[:, m]
                for m in range(M)
            ],
            1,
        )
        return same(k / M * value)

    return formula


def centered(r):
    return same((r - r.mean(1, keepdims=True)) / M)


CASES = [
    Case("log_prob", {}, log_prob, mean_over_groups(lambda w: np.log(w[:, 0]), 1)),
    Case("latro", {}, log_prob, mean_over_groups(lambda w: np.log(w[:, 0]), 1)),
    Case("vr_cli", {}, lambda w: (log_prob(w)[0], 0 * w), log_prob_of_fixed_w),
    # The model's answer stands for one of three tokens in all: |y| = 3.
    Case(
        "average_log_prob",
        {},
        lambda w: tuple(x / 3 for x in log_prob(w)),
        mean_over_groups(lambda w: np.log(w[:, 0]) / 3, 1),
    ),
    *(
        Case(
            "tempered",
            {"exponent": t},
            tempered(t),
            mean_over_groups(lambda w, t=t: w[:, 0] ** t, 1),
        )
        for t in (0.25, 1.0, 2.0)
    ),
    *(
        Case("rb_pass_at_k", {"k": k, "baseline": b}, rb_pass_at_k(k, b), pass_at(k))
        for k in range(1, M + 1)
        for b in ("none", "leave_one_out")
    ),
    *(
        Case("rb_maxrl", {"order": t, "baseline": b}, rb_maxrl(t, b), likelihood_to_order(t))
        for t in (1, 3, M)
        for b in ("none", "leave_one_out")
    ),
    *(
        Case("pkpo", {"k": k, "baseline": b}, pkpo(k, b), pass_at(k), sampled=True)
        for k in range(1, M + 1)
        for b in ("none", "leave_one_out")
    ),
    # Their standard deviation taken out, these have (1 - 1/M) of the gradient of P.
    *(
        Case(
            name,
            {"aggregation": "sum", "eps": 0.0},
            centered,
            lambda theta: (1 - 1 / M) * success(theta),
            sampled=True,
            times=lambda r: np.maximum(r.std(1, keepdims=True), 1e-9),
        )
        for name in ("grpo", "lite_ppo", "reinforce_plus_plus")
    ),
    *(
        Case(
            "jensen",
            {"q": q, "normalize": False},
            jensen(q),
            mean_over_groups(lambda w, q=q: log_q(w.mean(1), q)),
        )
        for q in (0.0, 0.3, 0.75, 1.0)
    ),
    Case("jensen", {"q": 0.0}, lambda w: ((w - others(w)) / M, w / M), success),
    Case("jepo", {}, jensen(1.0), mean_over_groups(lambda w: np.log(w.mean(1)))),
]
NAMES = [f"{case.recipe}-{case.arguments}" for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_formula_has_the_gradient_of_the_objective_as_its_mean(case):
    expected = gradient(case.objective)
    assert np.abs(expected).max() > 0.01
    found = mean_estimate(case.formula, case.sampled)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_code_computes_the_formula(case):
    _, w = model(THETA)
    z = groups(M)
    rng = np.random.default_rng(0)
    right = rng.integers(0, 2, z.shape)
    scores = losses.Scores(
        log_w=jnp.asarray(np.log(w)[z], jnp.float32), reward=jnp.asarray(right, jnp.float32)
    )
    scores = scores._replace(  # three tokens, and one that is behind the end
        gold_log_probs=jnp.repeat(scores.log_w[..., None] / 3, 4, -1),
        gold_mask=jnp.broadcast_to(jnp.arange(4) < 3, (*z.shape, 4)),
    )
    transform = losses.build(case.recipe, **case.arguments).transform
    # Every group is a batch for itself: some recipes read statistics of the batch.
    state = transform.init(losses.abstract_scores(1, M))
    alone = jax.tree.map(lambda x: x[:, None], scores)
    compute = jax.vmap(lambda one: losses.coefficients(transform, one, state)[0])
    got = jax.tree.map(lambda x: np.asarray(x, np.float64)[:, 0], jax.jit(compute)(alone))
    score, path = case.formula(right if case.sampled else w[z])
    times = case.times(right)
    np.testing.assert_allclose(got.score * times, score, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(got.path * times, path, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("level", [-0.1, -30.0, -690.8, -1e4])
def test_the_jensen_bound_is_stable_for_tiny_weights(level):
    """w down to 1e-300 and below, near q = 1 and at it, against float64 in logs."""
    log_w = (level - np.random.default_rng(0).exponential(size=(3, 8))).astype(np.float32)
    scores = losses.Scores(log_w=jnp.asarray(log_w))
    exact = log_w.astype(np.float64)
    relative = np.exp(exact - exact.max())  # the ratios of weights are those of any scale
    for q in (1.0, 1 - 1e-6):
        transform = losses.jensen(q)
        got, _ = losses.coefficients(transform, scores, transform.init(scores))
        power = np.exp((1 - float(np.float32(q))) * exact.max())
        score, path = (power * x for x in jensen(float(np.float32(q)))(relative))
        np.testing.assert_allclose(got.score, score, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(got.path, path, rtol=1e-3, atol=1e-5)


def test_a_group_with_one_weight_or_none_stays_finite():
    log_w = jnp.array([[-3.0, -jnp.inf, -jnp.inf], [-jnp.inf] * 3, [-1.0, -jnp.inf, -2.0]])
    scores = losses.Scores(log_w=log_w)
    for q in (0.0, 0.75, 1.0):
        transform = losses.jensen(q)
        got, _ = losses.coefficients(transform, scores, transform.init(scores))
        assert np.all(np.isfinite(got.score)) and got.score[0, 0] > 0
        np.testing.assert_array_equal(got.score[1], 0)


@pytest.mark.parametrize("num_rollouts", [6, 40])
def test_max_at_k_takes_any_rewards_and_any_padding(num_rollouts):
    """Against listed subsets, with ties, negative rewards and NaN on padding."""
    rng = np.random.default_rng(1)
    reward = rng.choice([-1.5, 0.25, 0.25, 3.0, 1e3], (3, 6))
    padded = np.full((3, num_rollouts), np.nan)
    padded[:, :6] = reward
    scores = losses.Scores(
        reward=jnp.asarray(padded, jnp.float32), valid=jnp.asarray(~np.isnan(padded))
    )
    for k in (2, 3, 6):
        transform = losses.pkpo(k)
        got, _ = losses.coefficients(transform, scores, transform.init(scores))
        for m in range(6):
            gain = lambda s, m=m: np.maximum(reward[:, m] - s.max(1), 0)
            expected = k / 6 * over_subsets(reward, k - 1, gain)[:, m]
            np.testing.assert_allclose(got.score[:, m], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(got.score[:, 6:], 0)


def test_subsets_of_large_groups_do_not_overflow():
    """C(255, 127) is far beyond float32; with equal weights every mean is a power."""
    scores = losses.Scores(log_w=jnp.full((1, 256), jnp.log(0.01)))
    for k in (128, 256):
        transform = losses.rb_pass_at_k(k, "none")
        got, _ = losses.coefficients(transform, scores, transform.init(scores))
        np.testing.assert_allclose(got.path, k / 256 * 0.01 * 0.99 ** (k - 1), rtol=1e-4)
    reward = losses.Scores(reward=jnp.arange(256.0)[None])
    transform = losses.pkpo(128)
    got, _ = losses.coefficients(transform, reward, transform.init(reward))
    assert np.all(np.isfinite(got.score)) and np.all(np.diff(got.score[0]) >= 0)


def test_maxrl_of_order_m_comes_close_to_the_likelihood():
    """T = 1 is RL; T = M rises to grad log P as M grows, geometrically, without bias of its own."""
    prior, w = model(THETA)
    p = prior @ w
    for order in (1, 4, 16):
        factor = sum((1 - p) ** j for j in range(order))  # of grad P: 1 at T = 1, 1/P in the limit
        np.testing.assert_allclose(factor, (1 - (1 - p) ** order) / p)
    np.testing.assert_allclose(
        gradient(likelihood_to_order(200)), gradient(lambda t: np.log(success(t)))
    )


def test_rs_grpo_converges_to_its_objective_as_1_over_m():
    """One parameter, the logit of P: the mean over all numbers of right answers, in float64."""
    p, beta = 0.3, 2.0
    expected = np.exp(beta) * p * (1 - p) / (p * np.exp(beta) + 1 - p) - p * (1 - p) / (
        p * np.exp(beta) + 1 - p
    )
    biases = []
    for num in (16, 64, 256):
        right = np.arange(num + 1)
        log_choose = [
            math.lgamma(num + 1) - math.lgamma(c + 1) - math.lgamma(num - c + 1) for c in right
        ]
        probability = np.exp(log_choose + right * np.log(p) + (num - right) * np.log(1 - p))
        reward = jnp.asarray(np.arange(num) < right[:, None], jnp.float32)
        scores = losses.Scores(reward=reward)
        transform = losses.rs_grpo(beta)
        got, _ = losses.coefficients(transform, scores, transform.init(scores))
        # d log p(r) / d logit = r - p
        estimate = (np.asarray(got.score, np.float64) * (np.asarray(reward) - p)).sum(1)
        biases.append(probability @ estimate - expected / beta)
    assert abs(biases[0]) < 0.2 * abs(expected / beta)
    np.testing.assert_allclose(np.divide(biases[1:], biases[:-1]), 0.25, rtol=0.15)


def test_the_reward_of_an_impossible_answer_is_finite():
    scores = losses.Scores(log_w=jnp.array([[-3.0, -jnp.inf, -5.0], [-jnp.inf] * 3]))
    transform = losses.log_prob()
    got, _ = losses.coefficients(transform, scores, transform.init(scores))
    assert np.all(np.isfinite(got.score))
    np.testing.assert_allclose(got.path, [[1 / 3, 0, 1 / 3], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(got.score[1], 0)


def test_statistics_of_the_batch():
    """Lite PPO: the group's mean, the batch's std. REINFORCE++: both of the batch."""
    reward = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], np.float64)
    scores = losses.Scores(reward=jnp.asarray(reward, jnp.float32))
    run = lambda transform: losses.coefficients(transform, scores, transform.init(scores))[0].score
    std = reward.std()
    expected = (reward - reward.mean(1, keepdims=True)) / std / 4
    np.testing.assert_allclose(run(losses.lite_ppo()), expected, rtol=1e-5, atol=1e-6)
    expected = (reward - reward.mean()) / std / 4
    np.testing.assert_allclose(run(losses.reinforce_plus_plus()), expected, rtol=1e-5, atol=1e-6)
    # Equal over the whole batch: nothing to learn, exactly.
    scores = losses.Scores(reward=jnp.full((5, 7), 0.1))
    for transform in (losses.lite_ppo(), losses.reinforce_plus_plus(), losses.lite_ppo(eps=0.0)):
        np.testing.assert_array_equal(run(transform), 0)


def test_rewards_of_gold_tokens_by_hand():
    rng = np.random.default_rng(0)
    log_probs = -rng.exponential(size=(2, 5, 4))
    log_probs[:, :, 1] = -0.3  # a token on which all rationales agree says nothing to R3
    mask = np.broadcast_to(np.arange(4) < np.array([4, 3])[:, None, None], log_probs.shape)
    scores = losses.Scores(
        log_w=jnp.asarray(log_probs.sum(-1), jnp.float32),
        gold_log_probs=jnp.asarray(np.where(mask, log_probs, np.nan), jnp.float32),
        gold_mask=jnp.asarray(mask),
    )
    lengths = np.array([[30, 4, 30, 100, 2], [9, 9, 1, 50, 20]])
    scores = scores._replace(num_tokens=jnp.asarray(lengths + mask.sum(-1), jnp.int32))
    spread = log_probs.std(1, keepdims=True) * mask[:, :1]
    assert np.all(spread[:, 0, 1] < 1e-12)
    rewards = {
        "rlpr": np.where(mask, np.exp(log_probs), 0).sum(-1) / mask.sum(-1),
        "nover": _ranks(log_probs.sum(-1), lengths, efficiency=1.0),
        "r3": np.where(mask, spread / spread.sum(-1, keepdims=True) * log_probs, 0).sum(-1),
    }
    for name, reward in rewards.items():
        transform = losses.build(name).transform
        got, _ = losses.coefficients(transform, scores, transform.init(scores))
        expected = (reward - reward.mean(1, keepdims=True)) / reward.std(1, keepdims=True) / 5
        np.testing.assert_allclose(got.score, expected, rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(got.path, 0)


def _ranks(log_w, lengths, efficiency):
    """NOVER's rewards, by sorting and by going through the pairs."""
    rewards = np.zeros(log_w.shape)
    value = log_w / np.maximum(1, 1 + np.log10(lengths))
    for b, row in enumerate(value):
        n = len(row)
        for place, m in enumerate(np.argsort(row)):
            rewards[b, m] = (place + 1) / n
        for m in range(n):
            beaten = [row[m] > row[j] and lengths[b, m] < lengths[b, j] for j in range(n)]
            rewards[b, m] += efficiency * sum(beaten) / (n - 1)
    return rewards


def test_equal_ones_share_their_rank_and_padding_has_none():
    scores = losses.Scores(
        log_w=jnp.array([[-1.0, -jnp.inf, -jnp.inf, jnp.nan]]),
        valid=jnp.array([[True, True, True, False]]),
        num_tokens=jnp.array([[6, 6, 600, 6]], jnp.int32),
        gold_log_probs=jnp.zeros((1, 4, 2)),
        gold_mask=jnp.ones((1, 4, 2), bool),
    )
    transform = losses.from_perplexity_ranks(efficiency=0.0)
    got, _ = losses.coefficients(transform, scores, transform.init(scores))
    np.testing.assert_allclose(got.score, [[1 / 3, 0.5 / 3, 0.5 / 3, 0]], rtol=1e-6)
