"""The records of the losses: scores in, coefficients out, then token log-probabilities and sums.

Shapes: B prompts, M rollouts per prompt, R tokens of a continuation. All reals are float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from qlog.losses.checks import check_choice, check_integer

Commitment = float | jax.Array  # q in [0, 1]: a number, or a scalar that is traced
AxisName = str | tuple[str, ...] | None  # mapped axes that split the prompts; None under jit
LossState = Any  # the pytree of arrays that a transform keeps between steps


# Of the fields of `Scores`.
_DTYPES = dict(
    log_w=jnp.float32,
    reward=jnp.float32,
    valid=jnp.bool_,
    num_tokens=jnp.int32,
    gold_log_probs=jnp.float32,
    gold_mask=jnp.bool_,
)
_PER_GOLD_TOKEN = ("gold_log_probs", "gold_mask")  # those that have a dimension more


class Scores(NamedTuple):
    """What is known of a batch of groups once its rollouts are sampled and scored.

    A loss transform sees `Scores` where an optax transform sees parameters. Leave out what you do
    not have: a part that reads it says so. At least one field must be there, for B and M.
    """

    log_w: jax.Array | None = None  # [B, M] float32, log p(y*|x*, z_m) <= 0; -inf allowed
    reward: jax.Array | None = None  # [B, M] float32, of the sampled answer (exact match: 0 or 1)
    valid: jax.Array | None = None  # [B, M] bool, False for padding; None: there is no padding
    num_tokens: jax.Array | None = None  # [B, M] int32, tokens of the rationale and the answer
    # [B, M, A] float32, log p of each of the gold answer's tokens y*_t, given x*, z_m, y*_{<t}
    gold_log_probs: jax.Array | None = None
    gold_mask: jax.Array | None = None  # [B, M, A] bool, False behind the gold answer's end

    @property
    def shape(self) -> tuple[int, int]:
        """(B, M), from whichever field is there; ValueError where none is."""
        given = [x for x in self if x is not None]
        if not given:
            raise ValueError("losses.Scores() is empty: pass log_w=, reward= or both, [B, M]")
        num_prompts, num_rollouts, *_ = np.shape(given[0])
        return num_prompts, num_rollouts

    @property
    def is_valid(self) -> jax.Array:
        """[B, M] bool: `valid`, or True everywhere where it was left out."""
        return jnp.ones(self.shape, bool) if self.valid is None else self.valid

    def require(self, field: str, by: str) -> jax.Array:
        """The field; ValueError that names `by`, the part that reads it, if it is None."""
        value = getattr(self, field)
        if value is None:
            shape = "[B, M, A]" if field in _PER_GOLD_TOKEN else "[B, M]"
            raise ValueError(
                f"{by} reads scores.{field}, which is missing: pass losses.Scores({field}=...), "
                f"{_DTYPES[field].__name__} {shape}"
            )
        return value


class Coefficients(NamedTuple):
    """Multipliers of log-probabilities, constants for differentiation.

    The true multipliers are `score * exp(log_scale)` and `path * exp(log_scale)`: weights are kept
    self-normalised and powers of P in logs, so that log w of -1e4 gives neither inf nor NaN.
    """

    score: jax.Array  # [B, M] float32, multiplies log p(z_m | x*), the score-function term
    path: jax.Array  # [B, M] float32, multiplies log p(answer | x*, z_m), the pathwise term
    log_scale: jax.Array  # [B, M] float32, finite; 0 in what `losses.coefficients` returns
    token_weight: jax.Array  # [B, M] float32, weight of a token's penalty (KL); not scaled


class Update(Protocol):
    """Maps the coefficients of a batch of groups, and the state, to new ones."""

    def __call__(
        self,
        coefficients: Coefficients,
        state: LossState,
        scores: Scores,
        *,
        key: jax.Array | None = None,
        axis_name: AxisName = None,
    ) -> tuple[Coefficients, LossState]: ...


class LossTransform(Protocol):
    """An optax transform with `Coefficients` for its updates and `Scores` for its parameters.

    At run time it is an `optax.GradientTransformationExtraArgs`. This is its type: optax's own
    knows of trees of arrays only, not of records.
    """

    @property
    def init(self) -> Callable[[Scores], LossState]: ...

    @property
    def update(self) -> Update: ...


class TokenLogProbs(NamedTuple):
    """Log-probabilities of a microbatch's tokens: b of the B prompts."""

    new: jax.Array  # [b, M, R] float, under the parameters that are differentiated
    rationale_mask: jax.Array  # [b, M, R] bool, True for tokens of the rationale
    answer_mask: jax.Array  # [b, M, R] bool, True for tokens of the answer
    old: jax.Array | None = None  # [b, M, R] float, under the policy that sampled the tokens
    reference: jax.Array | None = None  # [b, M, R] float, under the reference parameters

    @property
    def is_token(self) -> jax.Array:
        """[b, M, R] bool: tokens of a rationale or an answer, which carry a coefficient."""
        return self.rationale_mask | self.answer_mask

    def require(self, field: str, by: str) -> jax.Array:
        """`old` or `reference`, a constant for differentiation; ValueError naming `by` if None."""
        value = getattr(self, field)
        if value is None:
            raise ValueError(
                f"{field} must be log-probabilities of shape {np.shape(self.new)} for {by}, "
                "got None"
            )
        return jax.lax.stop_gradient(value)


class Sums(NamedTuple):
    """Sums over the tokens of a microbatch, float32 scalars. Sums of microbatches add.

    Only `loss` is differentiated; divide it once, by the number of prompts of the whole batch.
    """

    loss: jax.Array  # sum of -(coefficient * log-probability), plus penalties
    tokens: jax.Array  # tokens of rationales and answers
    clipped: jax.Array  # tokens whose ratio was clipped
    kl: jax.Array  # sum over tokens of the KL estimate, in nats (0 without a reference)


# The loss of a microbatch from its coefficients [b, M] and the log-probabilities of its tokens.
Surrogate = Callable[[Coefficients, TokenLogProbs], Sums]

Rationale = Literal["sampled", "annotated"]  # "annotated": they come with the data (SFT)
Answer = Literal["gold", "sampled"]  # the answer that the path coefficient multiplies


@dataclass(frozen=True)
class Estimator:
    """A way to estimate a gradient, and what a trainer must provide for it.

    Hashable, so that jit can take it as a static argument.

    Attributes:
      transform: gives the coefficients of a batch (`losses.coefficients`).
      surrogate: gives the loss of a microbatch from them; hashable.
      rationale: 'sampled' from the policy, or 'annotated': they come with the data (SFT).
      answer: 'gold' or 'sampled', the answer that the path coefficient multiplies.
      reward: name of the grader of sampled answers, such as 'exact_match'; None: no answers are
        sampled and `Scores.reward` stays missing.
      is_reward_weight: whether the transform takes the reward for a weight, such as a probability:
        then a negative one has no meaning, and trainers refuse it.
      reference: whether the surrogate reads log-probabilities under reference parameters.
      gold_log_probs: whether the transform reads `Scores.gold_log_probs` and its mask, which
        trainers keep only then.
      min_rollouts: smallest M for which the estimator is defined.

    Raises:
      TypeError, ValueError: a field of the wrong kind, or fields that contradict each other.
    """

    transform: LossTransform
    surrogate: Surrogate
    rationale: Rationale = "sampled"
    answer: Answer = "gold"
    reward: str | None = None
    is_reward_weight: bool = False
    reference: bool = False
    min_rollouts: int = 1
    gold_log_probs: bool = False

    def __post_init__(self):
        for method in ("init", "update"):
            if not callable(getattr(self.transform, method, None)):
                raise TypeError(
                    "Estimator.transform must be an optax transform with init and update, "
                    f"got {self.transform!r}"
                )
        if not callable(self.surrogate):
            raise TypeError(f"Estimator.surrogate must be a function, got {self.surrogate!r}")
        check_needs("Estimator", self.rationale, self.answer, self.reward)
        for name in ("is_reward_weight", "reference", "gold_log_probs"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"Estimator.{name} must be True or False, got {getattr(self, name)!r}"
                )
        check_integer("Estimator.min_rollouts", self.min_rollouts)
        if self.rationale == "annotated" and self.gold_log_probs:
            raise ValueError(
                "Estimator.gold_log_probs=True contradicts rationale='annotated', after which no "
                "gold answer is scored: leave it False"
            )
        if self.rationale == "annotated" and self.min_rollouts > 1:
            raise ValueError(
                f"Estimator.min_rollouts={self.min_rollouts} contradicts rationale='annotated', "
                "which brings one rationale per prompt: leave it 1"
            )

    def measured(self, scores: Scores) -> Scores:
        """`scores` without what a trainer does not measure for this estimator.

        A part that reads a score which is left out is an error; a zero in its place would not be.
        """
        return scores._replace(
            log_w=scores.log_w if self.rationale == "sampled" else None,
            reward=scores.reward if self.reward else None,
            gold_log_probs=scores.gold_log_probs if self.gold_log_probs else None,
            gold_mask=scores.gold_mask if self.gold_log_probs else None,
        )


def check_needs(owner: str, rationale: str, answer: str, reward: str | None) -> None:
    """Raises unless the three are words that `owner`, a record, knows and mean something together.

    Raises:
      TypeError: a reward that is not a string.
      ValueError: an unknown word, or a contradiction.
    """
    check_choice(f"{owner}.rationale", rationale, get_args(Rationale))
    check_choice(f"{owner}.answer", answer, get_args(Answer))
    if reward is not None and not isinstance(reward, str):
        raise TypeError(f"{owner}.reward must be a string or None, got {reward!r}")
    if reward == "":
        raise ValueError(f"{owner}.reward must name a grader, such as 'exact_match', got ''")
    # Nothing is sampled for an annotated rationale, so there is no sampled answer after it.
    if rationale == "annotated" and answer == "sampled":
        raise ValueError(
            f"{owner}.answer='sampled' contradicts rationale='annotated', which samples nothing: "
            "use answer='gold'"
        )
    if rationale == "annotated" and reward is not None:
        raise ValueError(
            f"{owner}.reward={reward!r} contradicts rationale='annotated', which samples no "
            "answer to grade: use reward=None"
        )
    # Trainers sample an answer only to grade it: without a reward there would be none to train on.
    if answer == "sampled" and reward is None:
        raise ValueError(
            f"{owner}.answer='sampled' needs a reward: name one, such as 'exact_match', "
            "or use answer='gold'"
        )


def abstract_scores(num_prompts: int, num_rollouts: int, num_gold_tokens: int = 1) -> Scores:
    """Shapes and dtypes of scores [B, M], for `transform.init` before anything is sampled.

    Gold tokens have `num_gold_tokens` places, A, on which no state depends.

    The fields are `jax.ShapeDtypeStruct`s: nothing can be computed from them by mistake.
    """
    shape = (num_prompts, num_rollouts)
    fields = {}
    for name, dtype in _DTYPES.items():
        places = (num_gold_tokens,) if name in _PER_GOLD_TOKEN else ()
        fields[name] = jax.ShapeDtypeStruct((*shape, *places), dtype)
    # Like traced arrays they have a shape and a dtype, all that an init reads.
    return Scores(**cast(dict[str, jax.Array], fields))


def check_scores(scores: object) -> Scores:
    """`scores`, if it is `Scores` that hold [B, M] arrays of the right kind, at least one.

    Raises:
      TypeError: not `Scores`, or a field of another dtype.
      ValueError: a field of another shape, one of two that go together, or no field at all.
    """
    if not isinstance(scores, Scores):
        raise TypeError(f"scores must be losses.Scores, got {type(scores).__name__}")
    present = {name: value for name, value in scores._asdict().items() if value is not None}
    if not present:
        raise ValueError(f"scores must have at least one of {', '.join(_DTYPES)}, got none")
    first = next(iter(present))
    shape = np.shape(present[first])[: 2 if first in _PER_GOLD_TOKEN else None]
    if len(shape) != 2:
        raise ValueError(f"scores.{first} must have shape [B, M], got {np.shape(present[first])}")
    if (scores.gold_log_probs is None) != (scores.gold_mask is None):
        raise ValueError(
            "scores.gold_log_probs and scores.gold_mask go together: pass both or neither"
        )
    per_token = None if scores.gold_log_probs is None else np.shape(scores.gold_log_probs)
    for name, value in present.items():
        if name in _PER_GOLD_TOKEN:
            if np.ndim(value) != 3 or np.shape(value)[:2] != shape or np.shape(value) != per_token:
                raise ValueError(
                    f"scores.{name} must have shape [B, M, A] with [B, M] = {shape}, as "
                    f"gold_log_probs, got {np.shape(value)}"
                )
        elif np.shape(value) != shape:
            raise ValueError(
                f"scores.{name} must have {first}'s shape {shape}, got {np.shape(value)}"
            )
        dtype = _DTYPES[name]
        if jnp.result_type(value) != dtype:
            raise TypeError(f"scores.{name} must be {dtype.__name__}, got {jnp.result_type(value)}")
    return scores


def check_tokens(coefficients: Coefficients, tokens: TokenLogProbs) -> None:
    """Raises unless the records have shapes [b, M] and [b, M, R], and bool masks.

    Raises:
      TypeError: other records.
      ValueError: a field of another shape, or a mask of another dtype.
    """
    if not isinstance(coefficients, Coefficients) or not isinstance(tokens, TokenLogProbs):
        raise TypeError(
            "a surrogate takes losses.Coefficients and losses.TokenLogProbs, got "
            f"{type(coefficients).__name__} and {type(tokens).__name__}"
        )
    score, path, _, token_weight = map(np.shape, coefficients)
    if len(score) != 2 or path != score:
        raise ValueError(f"score and path must have one shape [b, M], got {score}, {path}")
    if token_weight != score:
        raise ValueError(f"token_weight must have score's shape {score}, got {token_weight}")
    new = np.shape(tokens.new)
    if len(new) != 3 or new[:2] != score:
        raise ValueError(f"new must have shape [b, M, R] with [b, M] = {score}, got {new}")
    for name in ("rationale_mask", "answer_mask"):
        mask = getattr(tokens, name)
        if np.shape(mask) != new or jnp.result_type(mask) != jnp.bool_:
            raise ValueError(
                f"{name} must be bool {new}, got {jnp.result_type(mask)} {np.shape(mask)}"
            )
    for name in ("old", "reference"):
        value = getattr(tokens, name)
        if value is not None and np.shape(value) != new:
            raise ValueError(
                f"{name} must be log-probabilities of shape {new}, got {np.shape(value)}"
            )
