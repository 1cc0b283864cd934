"""Named estimators that a config can build: `build('garl', q=0.75)`.

A `Recipe` joins a function that makes a loss transform, one that makes a surrogate, and what a
trainer must provide. Its arguments are those of both functions, plus, where the transform takes
`q`, a schedule for it, plus the normalization that every recipe understands.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import optax

from qlog.losses import aliases, gauges, group_stats, normalization, q_schedules, surrogates
from qlog.losses.checks import check_choice, check_integer, check_number, closest
from qlog.losses.compose import chain
from qlog.losses.types import (
    Answer,
    Commitment,
    Estimator,
    LossTransform,
    Rationale,
    Surrogate,
    check_needs,
)

# Arguments with their defaults of recipes that take `q`, and which of them each schedule reads.
SCHEDULE: dict[str, Any] = {"q_schedule": "constant", "q_end": 0.0, "q_steps": 0, "q_pace": 0.8}
_SCHEDULE_READS = {
    "constant": (),
    "linear": ("q_end", "q_steps"),
    "cosine": ("q_end", "q_steps"),
    "step": ("q_end", "q_steps"),
    "adaptive": ("q_end", "q_pace"),
}
# Arguments of every recipe with their defaults: what changes the coefficients of any estimator.
NORMALIZATION: dict[str, Any] = {
    "pathwise": True,
    "max_coefficient": None,
    "aggregation": "sum",
    "max_tokens": None,
}

Arguments = Mapping[str, Any]  # name to value; the part that reads a value checks it


def _defaults(function: Callable) -> dict[str, Any]:
    """The parameters of a function with their defaults, `inspect.Parameter.empty` for none."""
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


@dataclass(frozen=True)
class Recipe:
    """An estimator with arguments; call it with some of them to get an `Estimator`.

    Attributes:
      transform: function of keyword arguments with defaults that returns a loss transform.
      surrogate: function of keyword arguments with defaults that returns a surrogate.
      q: the commitment of a transform that does not take `q`; None where q means nothing.
      normalize: default of the argument that divides by M^q (transforms that take `q` only).
      weight: maps scores to the log-weights [B, M] that are measured; None measures none.
      rationale: as in `Estimator`.
      answer: as in `Estimator`.
      reward: as in `Estimator`.
      is_reward_weight: as in `Estimator`.
      min_rollouts: smallest M that the estimator is defined for, or a function of its arguments, a
        mapping from name to value, that returns it.
      overrides: defaults of arguments, by name, for recipes that differ only in these.

    Raises:
      TypeError, ValueError: a field of the wrong kind, or fields that contradict each other.
    """

    transform: Callable[..., LossTransform]
    surrogate: Callable[..., Surrogate] = surrogates.linear
    q: float | None = None
    normalize: bool = True
    weight: group_stats.Weight | None = group_stats.log_likelihood
    rationale: Rationale = "sampled"
    answer: Answer = "gold"
    reward: str | None = None
    is_reward_weight: bool = False
    min_rollouts: int | Callable[[Arguments], int] = 1
    overrides: Arguments = field(default_factory=dict)

    def __post_init__(self):
        for name, function in (("transform", self.transform), ("surrogate", self.surrogate)):
            if not callable(function):
                raise TypeError(f"Recipe.{name} must be a function, got {function!r}")
            for argument, default in _defaults(function).items():
                if default is inspect.Parameter.empty:
                    raise ValueError(f"{function.__name__}: argument {argument} needs a default")
        if self.weight is not None and not callable(self.weight):
            raise TypeError(f"Recipe.weight must be a function or None, got {self.weight!r}")
        check_needs("Recipe", self.rationale, self.answer, self.reward)
        if not callable(self.min_rollouts):
            check_integer("Recipe.min_rollouts", self.min_rollouts)
        if self.q is not None:
            check_number("Recipe.q", self.q, 0, 1)
            if "q" in _defaults(self.transform):
                raise ValueError(
                    f"Recipe.q={self.q!r} is not read, since {self.transform.__name__} takes q: "
                    "leave it None"
                )
        for name in self.overrides:
            check_choice("a key of Recipe.overrides", name, self._usual)

    @property
    def _usual(self) -> dict[str, Any]:
        """Every argument with its default before `overrides`."""
        own = _defaults(self.transform)
        if "q" in own:
            own |= SCHEDULE | {"normalize": self.normalize}
        return own | _defaults(self.surrogate) | NORMALIZATION

    @property
    def arguments(self) -> dict[str, Any]:
        """Every argument with its default."""
        return self._usual | dict(self.overrides)

    def __call__(self, **given: Any) -> Estimator:
        """The estimator. Raises ValueError or TypeError naming the argument, value and range."""
        arguments = self.arguments
        unknown = sorted(set(given) - set(arguments))
        if unknown:
            raise TypeError(
                f"unknown argument {', '.join(unknown)}; it reads {', '.join(arguments)}"
                + closest(unknown[0], arguments)
            )
        arguments |= given
        # Under a schedule everything that depends on q is built anew at each step, inside jit.
        if "q" in _defaults(self.transform):
            transform = _over_steps(lambda q: self._chain(arguments, q), arguments)
        else:
            transform = self._chain(arguments, self.q)
        surrogate = self.surrogate(**{name: arguments[name] for name in _defaults(self.surrogate)})
        least = self.min_rollouts
        return Estimator(
            transform=transform,
            surrogate=surrogate,
            rationale=self.rationale,
            answer=self.answer,
            reward=self.reward,
            is_reward_weight=self.is_reward_weight,
            reference=bool(arguments.get("kl_weight", 0.0)),
            min_rollouts=least(arguments) if callable(least) else least,
        )

    def _chain(self, arguments: Arguments, q: Commitment | None) -> LossTransform:
        """The whole chain at one commitment q: a number, traced under a schedule, or None."""
        own = {name: arguments[name] for name in _defaults(self.transform)}
        takes_q = "q" in own
        if takes_q:
            own["q"] = q
        parts = [self.transform(**own)]
        if not arguments["pathwise"]:
            parts.append(normalization.zero_pathwise())
        normalize = takes_q and bool(arguments["normalize"])
        if normalize and q is not None:
            parts.append(normalization.normalize_by_bound(q))
        # Measured here: what follows limits and averages, and would hide the effective rewards.
        parts.append(gauges.measure_groups(q, normalize, self.weight))
        if arguments["max_coefficient"] is not None:
            check_number("max_coefficient", arguments["max_coefficient"], 0, float("inf"))
            parts.append(normalization.clip_coefficients(arguments["max_coefficient"]))
        parts.append(normalization.aggregate(arguments["aggregation"], arguments["max_tokens"]))
        return chain(*parts)


def _over_steps(factory: Callable[..., LossTransform], arguments: Arguments) -> LossTransform:
    """`factory(q)`, q a constant, a schedule as a function, or one described by arguments."""
    q, kind = arguments["q"], arguments["q_schedule"]
    check_choice("q_schedule", kind, q_schedules.SCHEDULES)
    for name, default in SCHEDULE.items():
        # A value that the schedule ignores is a misunderstanding: say so instead of training on.
        unread = name != "q_schedule" and name not in _SCHEDULE_READS[kind]
        if unread and arguments[name] != default:
            raise ValueError(
                f"{name}={arguments[name]!r} is not read with q_schedule={kind!r}; "
                f"leave it {default}"
            )
    if callable(q):
        check_choice("q_schedule, with q as a function of the step,", kind, ("constant",))
        return q_schedules.scheduled(factory, cast(optax.Schedule, q))
    check_number("q", q, 0, 1)
    if kind == "constant":
        return factory(q)
    if kind == "adaptive":
        low = arguments["q_end"]
        check_number("q_end (the lower limit of an adaptive q)", low, 0, q)
        return q_schedules.adaptive_q(factory, arguments["q_pace"], low=low, high=q)
    return q_schedules.scheduled(
        factory, q_schedules.schedule(kind, q, arguments["q_end"], arguments["q_steps"])
    )


def _grpo_surrogate(
    clip_low: float = 0.2, clip_high: float = 0.2, kl_weight: float = 0.0, kl_kind: str = "k3"
) -> Surrogate:
    check_choice("kl_kind", kl_kind, surrogates.KL_KINDS)
    check_number("kl_weight", kl_weight, 0, float("inf"))
    surrogate = surrogates.clipped(clip_low, clip_high)
    # Without the penalty no reference parameters are kept in memory.
    return surrogates.add_kl(surrogate, kl_weight, kl_kind) if kl_weight else surrogate


def _garl_min_rollouts(arguments: Arguments) -> int:
    """Both the baseline and the jackknife leave a rollout out: one must remain."""
    plug_in = arguments["baseline"] == arguments["correction"] == "none"
    return 1 if plug_in else 2


RECIPES: dict[str, Recipe] = {
    "garl": Recipe(aliases.garl, min_rollouts=_garl_min_rollouts),
    "paft": Recipe(aliases.paft),
    "rb_reinforce": Recipe(aliases.rb_reinforce, q=0.0),
    "rb_rloo": Recipe(aliases.rb_rloo, q=0.0, min_rollouts=2),
    "iwae": Recipe(aliases.iwae, q=1.0),
    "trice": Recipe(aliases.trice, q=1.0),
    # Gold answers, after the rationales whose sampled answers were right.
    "star": Recipe(
        aliases.star,
        normalize=False,
        reward="exact_match",
        is_reward_weight=True,
        weight=group_stats.log_reward,
    ),
    "maxrl": Recipe(
        aliases.maxrl,
        answer="sampled",
        reward="exact_match",
        is_reward_weight=True,
        weight=group_stats.log_reward,
    ),
    "grpo": Recipe(
        aliases.grpo,
        _grpo_surrogate,
        answer="sampled",
        reward="exact_match",
        weight=group_stats.log_reward,
        overrides={"aggregation": "sequence_mean"},
    ),
    "rloo": Recipe(
        aliases.rloo,
        answer="sampled",
        reward="exact_match",
        weight=group_stats.log_reward,
        min_rollouts=2,
    ),
    "sft": Recipe(aliases.sft, rationale="annotated", weight=None),
}


def _find(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(
            f"no loss is called {name!r}; there are {', '.join(sorted(RECIPES))}"
            + closest(name, RECIPES)
        )
    return RECIPES[name]


def arguments(name: str) -> dict[str, Any]:
    """The arguments of a recipe with their defaults; ValueError for an unknown name."""
    return _find(name).arguments


def build(name: str, *, num_rollouts: int | None = None, **given: Any) -> Estimator:
    """The estimator called `name`, for configs and command lines.

    Args:
      name: a key of `RECIPES`.
      num_rollouts: M, when it is known, so that an estimator undefined for it is refused here.
      given: arguments of the recipe; `arguments(name)` lists them.

    Raises:
      ValueError: the message names the recipe, the argument, its value and the allowed range.
    """
    recipe = _find(name)
    try:
        estimator = recipe(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    if num_rollouts is not None and num_rollouts < estimator.min_rollouts:
        raise ValueError(
            f"{name} needs at least {estimator.min_rollouts} rollouts per prompt for its "
            f"leave-one-out statistics, got {num_rollouts}"
        )
    return estimator
