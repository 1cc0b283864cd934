"""The records that loss transforms speak: scores in, coefficients out.

Shapes: B prompts, M rollouts per prompt, R tokens of a continuation. All reals are float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

LossTransform = optax.GradientTransformationExtraArgs


class Scores(NamedTuple):
    """What is known of a batch of groups once its rollouts are sampled and scored.

    A loss transform sees `Scores` where an optax transform sees parameters.
    """

    log_w: jax.Array  # [B, M] float32, log p(y*|x*, z_m) <= 0; -inf allowed
    reward: jax.Array  # [B, M] float32, reward of the sampled answer (exact match: 0 or 1)
    valid: jax.Array  # [B, M] bool, False for padding, which never contributes
    num_tokens: jax.Array  # [B, M] int32, tokens that carry a coefficient (rationale + answer)


class Coefficients(NamedTuple):
    """Multipliers of log-probabilities, constants for differentiation.

    The true multipliers are `score * exp(log_scale)` and `path * exp(log_scale)`: weights are kept
    self-normalised and powers of P in logs, so that log w of -1e4 gives neither inf nor NaN.
    """

    score: jax.Array  # [B, M] float32, multiplies log p(z_m | x*), the score-function term
    path: jax.Array  # [B, M] float32, multiplies log p(answer | x*, z_m), the pathwise term
    log_scale: jax.Array  # [B, M] float32, finite
    token_weight: jax.Array  # [B, M] float32, weight of a token's penalty (KL); not scaled


class Sums(NamedTuple):
    """Sums over the tokens of a microbatch, float32 scalars. Sums of microbatches add.

    `loss` is differentiated; divide it once, by the number of prompts of the whole batch.
    """

    loss: jax.Array  # sum of -(coefficient * log-probability), plus penalties
    tokens: jax.Array  # tokens of rationales and answers
    clipped: jax.Array  # tokens whose ratio was clipped
    kl: jax.Array  # sum over tokens of the KL estimate, in nats (0 without a reference)


Surrogate = Callable[..., Sums]


class Estimator(NamedTuple):
    """A way to estimate a gradient, and what a trainer must provide for it."""

    transform: LossTransform
    surrogate: Surrogate
    rationale: str = "sampled"  # or "annotated": rationales come with the data (SFT)
    answer: str = "gold"  # or "sampled": the answer that the path coefficient multiplies
    reward: str | None = None  # or "exact_match": answers must be sampled and graded
    reference: bool = False  # needs log-probabilities under the reference parameters
    min_rollouts: int = 1  # smallest M for which the estimator is defined


def zero_scores(num_prompts: int, num_rollouts: int) -> Scores:
    """Scores of the given shape, to initialise a transform's state with."""
    shape = (num_prompts, num_rollouts)
    real = jnp.zeros(shape, jnp.float32)
    return Scores(real, real, jnp.ones(shape, bool), jnp.ones(shape, jnp.int32))


def check_scores(scores: Scores) -> None:
    """Raises TypeError or ValueError unless `scores` holds four [B, M] arrays of the right kind."""
    if not isinstance(scores, Scores):
        raise TypeError(f"scores must be losses.Scores, got {type(scores).__name__}")
    shape = jnp.shape(scores.log_w)
    if len(shape) != 2:
        raise ValueError(f"scores.log_w must have shape [B, M], got {shape}")
    kinds = dict(log_w=jnp.float32, reward=jnp.float32, valid=jnp.bool_, num_tokens=jnp.int32)
    for name, dtype in kinds.items():
        value = getattr(scores, name)
        if jnp.shape(value) != shape:
            raise ValueError(
                f"scores.{name} must have log_w's shape {shape}, got {jnp.shape(value)}"
            )
        if jnp.result_type(value) != dtype:
            raise TypeError(f"scores.{name} must be {dtype.__name__}, got {jnp.result_type(value)}")


def check_number(name: str, value, low: float, high: float) -> None:
    """Raises unless `value` is traced, or a real number or array with all of it in [low, high]."""
    if isinstance(value, jax.core.Tracer):
        return
    numbers = np.asarray(value)
    if numbers.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be a number in [{low}, {high}], got {value!r}")
    if not np.all((low <= numbers) & (numbers <= high)):
        raise ValueError(f"{name} must be in [{low}, {high}], got {value!r}")


def check_choice(name: str, value, choices) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(name: str, value, low: int = 1) -> None:
    """Raises unless `value` is a Python integer of at least `low`: it fixes a shape or a length."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least {low}, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value!r}")
