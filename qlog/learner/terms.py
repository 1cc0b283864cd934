"""The two terms of a gradient, measured apart: the score term and the pathwise term."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qlog import models
from qlog.learner.gradient import batch_gradient
from qlog.learner.types import LearnerBatch, Microbatch, Objective, TermNorms
from qlog.policy import Policy


def measure_terms(
    params: models.Params,
    policy: Policy,
    batch: LearnerBatch,
    objective: Objective,
    microbatch: Microbatch,
    grads: models.Params,
    before_each: Callable[[], None] | None = None,
) -> TermNorms:
    """Norms of the two parts of `grads`, by a second backward pass with the path coefficient 0.

    A token's part of the loss has one of the two coefficients, so the gradient is the sum of the
    two terms. A KL penalty counts with the score term.

    Args:
      grads: what `batch_gradient` returned for the same arguments.
      before_each: as `batch_gradient` takes it.
    """
    without_path = batch.coefficients._replace(path=jnp.zeros_like(batch.coefficients.path))
    score, _ = batch_gradient(
        params,
        policy,
        batch._replace(coefficients=without_path),
        objective,
        microbatch,
        before_each,
    )
    return _norms(grads, score)


@jax.jit
def _norms(grads: models.Params, score: models.Params) -> TermNorms:
    path = jax.tree.map(jnp.subtract, grads, score)
    score_norm, path_norm = optax.tree.norm(score), optax.tree.norm(path)
    inner = optax.tree.vdot(score, path)
    product = jnp.asarray(score_norm * path_norm)
    cosine = jnp.asarray(inner) / jnp.where(product > 0, product, 1.0)
    return TermNorms(score_norm, path_norm, cosine)
