"""Estimators against the gradient of the objective that each is named for, in two exact steps.

Step one is arithmetic in float64, without the code: the formula of a recipe, as README.md prints
it, has the objective's gradient as its mean. All ordered groups of M rollouts of a small model are
enumerated, with all their sampled answers, and the gradient of the objective is a complex step; the
two agree to 1e-9. Step two: the code computes that formula, to float32's rounding.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from qlog import losses

M = 4
LOGITS = np.array([0.2, 1.0, -0.5])  # of three rationales
ANSWER_LOGITS = np.array([-3.0, -1.0, 1.0])  # of the gold answer after each
Z = len(LOGITS)
THETA = np.concatenate([LOGITS, ANSWER_LOGITS])
REWARDS = np.array([0.1, 0.7])  # of a wrong and of a right answer, where any number will do


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


class Case(NamedTuple):
    """A recipe, its formula and its objective."""

    recipe: str
    arguments: dict
    formula: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # of w, or of 0 and 1, [N, M]
    objective: Callable[[np.ndarray], complex]  # of theta
    sampled: bool = False


def jensen(q):
    def formula(w):
        mean = w.mean(1, keepdims=True)
        return log_q(mean, q) - log_q(others(w), q), mean ** (1 - q) * w / w.sum(1, keepdims=True)

    return formula


def success(theta):
    prior, w = model(theta)
    return prior @ w


CASES = [
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
    transform = losses.build(case.recipe, **case.arguments).transform
    got, _ = losses.coefficients(transform, scores, transform.init(scores))
    score, path = case.formula(right if case.sampled else w[z])
    np.testing.assert_allclose(got.score, score, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(got.path, path, rtol=2e-5, atol=2e-6)


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
