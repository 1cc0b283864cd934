"""A latent-variable model small enough to enumerate: exact gradients, exact means and variances.

Z rationales with probabilities softmax(logits), and p(y* | z) = sigmoid(answer_logits_z). The
gradient of every loss of the family is automatic differentiation of the exact marginal, and an
estimator's mean and variance are sums over all multisets of M rationales: no sampling error. Used
by tests, plots and `qlog.losses.theory.study`. There are C(M + Z - 1, M) such groups, so Z and M
must be small.
"""

import itertools
import math
from typing import NamedTuple

import jax
import numpy as np

from qlog.losses import compose, tsallis
from qlog.losses.checks import check_integer
from qlog.losses.types import Coefficients, LossTransform, Scores


class LatentModel(NamedTuple):
    """Parameters of the model."""

    logits: jax.Array  # [Z] float32, of the rationales
    answer_logits: jax.Array  # [Z] float32, of the gold answer after each rationale


class Moments(NamedTuple):
    """Of the gradient estimate from one group, exact."""

    mean: np.ndarray  # [2Z] float64
    covariance: np.ndarray  # [2Z, 2Z] float64


def log_probs(model: LatentModel) -> tuple[jax.Array, jax.Array]:
    """(log p(z | x*), log p(y* | x*, z)), each [Z]."""
    return jax.nn.log_softmax(model.logits), jax.nn.log_sigmoid(model.answer_logits)


def log_p(model: LatentModel) -> jax.Array:
    """log P = log sum_z p(z | x*) p(y* | x*, z), by enumeration."""
    return jax.nn.logsumexp(sum(log_probs(model)))


def flat(model: LatentModel) -> np.ndarray:
    """[2Z] float64: parameters or a gradient as one vector."""
    return np.concatenate([np.asarray(leaf, np.float64) for leaf in model])


def exact_gradient(model: LatentModel, q: float) -> np.ndarray:
    """[2Z] gradient of l_q = -log_q P (eq 3) by automatic differentiation of the marginal."""
    return flat(_loss_gradient(model, q))


@jax.jit
def _loss_gradient(model: LatentModel, q: float) -> LatentModel:
    return jax.grad(lambda model: tsallis.loss(log_p(model), q))(model)


def jacobians(model: LatentModel) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of log p(z) and of log p(y*|z), each [Z, 2Z]: row z is that of rationale z."""
    prior, answer = (
        np.concatenate([np.asarray(x, np.float64) for x in both], 1) for both in _jacobians(model)
    )
    return prior, answer


_jacobians = jax.jit(jax.jacobian(log_probs))


def scores_of(model: LatentModel, rationales: np.ndarray) -> Scores:
    """Scores of groups of sampled rationales, int [B, M]: log w only."""
    return Scores(log_w=log_probs(model)[1][rationales])


def gradient_estimates(
    model: LatentModel, rationales: np.ndarray, coefficients: Coefficients
) -> np.ndarray:
    """[B, 2Z] float64 gradient of the surrogate -sum_m (score log p(z_m) + path log p(y*|z_m))."""
    # A rollout's gradient depends on its rationale z only: add up the coefficients of each z first.
    prior, answer = jacobians(model)
    size = prior.shape[0]
    score, path = (np.asarray(x, np.float64) for x in (coefficients.score, coefficients.path))
    estimates = np.zeros((len(rationales), 2 * size))
    for z in range(size):
        here = rationales == z
        estimates -= np.outer(np.sum(score * here, 1), prior[z])
        estimates -= np.outer(np.sum(path * here, 1), answer[z])
    return estimates


def all_groups(model: LatentModel, num_rollouts: int) -> tuple[np.ndarray, np.ndarray]:
    """Every multiset of M rationales, int [N, M], and its probability [N] (float64)."""
    check_integer("num_rollouts", num_rollouts)
    size = len(model.logits)
    groups = np.array(
        list(itertools.combinations_with_replacement(range(size), num_rollouts)), np.int32
    )
    # A multiset of counts k_z has probability M! prod_z prior_z^k_z / k_z!, computed in logs.
    counts = np.stack([np.sum(groups == z, 1) for z in range(size)], 1)
    log_factorial = np.array([math.lgamma(k + 1) for k in range(num_rollouts + 1)])
    log_prior = np.asarray(log_probs(model)[0], np.float64)
    log_prior -= np.log(np.sum(np.exp(log_prior)))  # float32 sums to 1 within 1e-7 only
    log_probability = log_factorial[-1] - np.sum(log_factorial[counts], 1) + counts @ log_prior
    return groups, np.exp(log_probability)


def moments(model: LatentModel, transform: LossTransform, num_rollouts: int) -> Moments:
    """Exact mean and covariance of the estimate by a `transform` that draws nothing itself."""
    # All groups are one batch, so the estimator itself is run once, in float32; sums are float64.
    groups, probability = all_groups(model, num_rollouts)
    scores = scores_of(model, groups)
    result, _ = compose.coefficients(transform, scores, transform.init(scores))
    estimates = gradient_estimates(model, groups, result)
    mean = probability @ estimates
    return Moments(mean, (estimates - mean).T @ (probability[:, None] * (estimates - mean)))


def leading_bias(model: LatentModel, q: float, num_rollouts: int) -> np.ndarray:
    """[2Z] the bias of plug-in GARL to first order in 1/M (Theorem 6.1).

    q / (M P^(q+1)) [(q+1)/2 grad l_1 Var(w) - Cov(g, w)], g_m = -w_m grad log p(z_m, y* | x*).
    """
    log_prior, log_w = (np.asarray(x, np.float64) for x in log_probs(model))
    prior, w = np.exp(log_prior), np.exp(log_w)
    p = prior @ w
    g = -w[:, None] * sum(jacobians(model))
    variance = prior @ np.square(w - p)
    covariance = (prior * (w - p)) @ g
    inner = (q + 1) / 2 * exact_gradient(model, 1.0) * variance - covariance
    return q / (num_rollouts * p ** (q + 1)) * inner
