"""Estimators that a config can build: `build('garl', q=0.75)`, by name, object or function.

A `Recipe` joins a function that makes a loss transform, one that makes a surrogate, and what a
trainer must provide. Its arguments are those of both functions, plus, where the transform takes
`q`, a schedule for it, plus the normalization that every recipe understands.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast, get_args, get_type_hints

import numpy as np
import optax

from qlog.losses import aliases, gauges, group_stats, normalization, q_schedules, surrogates
from qlog.losses.checks import check_choice, check_integer, check_number, closest
from qlog.losses.compose import chain
from qlog.losses.resampling import RESAMPLING
from qlog.losses.types import (
    Answer,
    Commitment,
    Estimator,
    LossTransform,
    Rationale,
    Surrogate,
    abstract_scores,
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
    "score": True,
    "max_coefficient": None,
    "aggregation": "sum",
    "max_tokens": None,
}
# Arguments of every recipe whose rationales the policy samples: a penalty on the distance from the
# policy that training began with.
PENALTY: dict[str, Any] = {"kl_weight": 0.0, "kl_kind": "k3"}
# Arguments of those among them whose surrogate has no ratio itself: weights that correct for a
# sampler that computes otherwise than the learner (a quantised cache), and for the
# updates since the rollouts were sampled.
IMPORTANCE: dict[str, Any] = {"importance": "none", "max_ratio": 2.0}


def _one_of(words: Iterable[str]) -> str:
    return f"One of {', '.join(words)}."


# What the arguments of all recipes mean, with the values that they take.
ARGUMENTS: dict[str, str] = {
    "q": "The commitment, from 0 (the answer's probability) to 1 (its logarithm); with a schedule "
    "its first value.",
    "q_schedule": "How q moves over the steps. " + _one_of(q_schedules.SCHEDULES),
    "q_end": "Where a schedule ends, from 0 to 1; the lower limit of an adaptive q.",
    "q_steps": "How many steps a schedule takes, at least 1.",
    "q_pace": "The P^(1-q) that an adaptive q holds, between 0 and 1.",
    "normalize": "Whether to divide by M^q, the largest factor that q brings.",
    "pathwise": "False leaves out the term that raises the gold answer's probability.",
    "score": "False leaves out the term that raises the probability of good rationales.",
    "max_coefficient": "M times a coefficient is clipped to it, at least 0. None clips nothing.",
    "aggregation": "How tokens are averaged. " + _one_of(normalization.AGGREGATIONS),
    "max_tokens": "With the aggregation 'constant': what it divides by, at least 1. Else None.",
    "kl_weight": "The weight of the distance from the first policy, at least 0. 0 keeps no "
    "reference in memory.",
    "kl_kind": "How that distance is estimated. " + _one_of(surrogates.KL_KINDS),
    "importance": "Weights p_new / p_old, for several updates per batch. "
    + _one_of(("none", *surrogates.LEVELS)),
    "max_ratio": "The largest of these weights, at least 1.",
    "clip_low": "The ratio p_new / p_old is clipped below 1 - clip_low; from 0 to 1.",
    "clip_high": "The ratio p_new / p_old is clipped above 1 + clip_high; at least 0.",
    "baseline": "What the score subtracts. " + _one_of(aliases.BASELINES),
    "correction": "What removes the bias of finite M. " + _one_of(aliases.CORRECTIONS),
    "k": "Of paft and trice: posterior draws per group, None is M. Of others: the k of pass@k, at "
    "most M.",
    "resampling": "How posterior draws are made. " + _one_of(RESAMPLING),
    "drop": "How far log P may fall below its best, in nats, before paft takes over; above 0.",
    "decay": "Of the average of log P that is watched, from 0 to below 1.",
    "scale_by_std": "Whether to divide by the standard deviation of the group's rewards.",
    "sample_std": "Whether that divides by M - 1 instead of M.",
    "eps": "Added to a standard deviation that divides.",
    "efficiency": "The weight of being short, next to the rank.",
    "exponent": "t of E w^t, from 1e-6 to 1000.",
    "order": "How many terms of log P's series there are, at most M.",
    "beta": "How much the best reward counts, from 0.001 to 1000.",
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
      gold_log_probs: as in `Estimator`.

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
    gold_log_probs: bool = False

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
        own |= _defaults(self.surrogate)
        if self.rationale == "sampled":
            own |= {} if self._has_own_penalty else PENALTY
            if self.surrogate is surrogates.linear:
                own |= IMPORTANCE
        return own | NORMALIZATION

    @property
    def _has_own_penalty(self) -> bool:
        """Whether the surrogate adds a KL penalty itself."""
        return "kl_weight" in _defaults(self.surrogate)

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
        for name, value in given.items():
            if isinstance(arguments[name], (list, tuple, Mapping)):  # of your own recipe
                continue
            if isinstance(value, (list, tuple)) or hasattr(value, "keys"):  # of ConfigDicts, too
                shown = "a section" if hasattr(value, "keys") else repr(value)
                raise TypeError(f"{name} must be one value, got {shown}")
            # Text such as "no" would count as True.
            if isinstance(arguments[name], bool) and not isinstance(value, (bool, np.bool_)):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        arguments |= given
        # Under a schedule everything that depends on q is built anew at each step, inside jit.
        if "q" in _defaults(self.transform):
            transform = _over_steps(lambda q: self._chain(arguments, q), arguments)
        else:
            transform = self._chain(arguments, self.q)
        least = self.min_rollouts
        return Estimator(
            transform=transform,
            surrogate=self._token_loss(arguments),
            rationale=self.rationale,
            answer=self.answer,
            reward=self.reward,
            is_reward_weight=self.is_reward_weight,
            reference=bool(arguments.get("kl_weight", 0.0)),
            min_rollouts=least(arguments) if callable(least) else least,
            gold_log_probs=self.gold_log_probs,
        )

    def _token_loss(self, arguments: Arguments) -> Surrogate:
        """The surrogate, with importance weights and the KL penalty where they are asked for."""
        surrogate = self.surrogate(**{name: arguments[name] for name in _defaults(self.surrogate)})
        if self.rationale == "annotated":
            return surrogate
        is_sampled = self.answer == "sampled"
        level, most = (arguments.get(name, usual) for name, usual in IMPORTANCE.items())
        check_choice("importance", level, ("none", *surrogates.LEVELS))
        check_number("max_ratio", most, 1, float("inf"))
        if level != "none":
            surrogate = surrogates.truncated(level, most, sampled_answer=is_sampled)
        if self._has_own_penalty:
            return surrogate
        weight, kind = arguments["kl_weight"], arguments["kl_kind"]
        check_choice("kl_kind", kind, surrogates.KL_KINDS)
        check_number("kl_weight", weight, 0, float("inf"))
        # Without the penalty no reference parameters are kept in memory.
        return surrogates.add_kl(surrogate, weight, kind, is_sampled) if weight else surrogate

    def _chain(self, arguments: Arguments, q: Commitment | None) -> LossTransform:
        """The whole chain at one commitment q: a number, traced under a schedule, or None."""
        own = {name: arguments[name] for name in _defaults(self.transform)}
        takes_q = "q" in own
        if takes_q:
            own["q"] = q
        parts = [self.transform(**own)]
        if not arguments["pathwise"]:
            parts.append(normalization.zero_pathwise())
        if not arguments["score"]:
            parts.append(normalization.zero_score())
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


def _garl_min_rollouts(arguments: Arguments) -> int:
    """Both the baseline and the jackknife leave a rollout out: one must remain."""
    plug_in = arguments["baseline"] == arguments["correction"] == "none"
    return 1 if plug_in else 2


def _subset_min_rollouts(arguments: Arguments) -> int:
    """Subsets of k, or of as many as the order, must exist; a baseline needs another rollout."""
    size = arguments["k"] if "k" in arguments else arguments["order"]
    return size if arguments["baseline"] == "none" else max(size, 2)


def _on_rewards(
    transform: Callable[..., LossTransform],
    surrogate: Callable[..., Surrogate] = surrogates.linear,
    aggregation: str = "sum",
    min_rollouts: int | Callable[[Arguments], int] = 1,
) -> Recipe:
    """A recipe that learns from the rewards of sampled answers, and takes any number for one."""
    return Recipe(
        transform,
        surrogate,
        weight=group_stats.log_reward,
        answer="sampled",
        reward="exact_match",
        min_rollouts=min_rollouts,
        overrides={} if aggregation == "sum" else {"aggregation": aggregation},
    )


RECIPES: dict[str, Recipe] = {
    "garl": Recipe(aliases.garl, min_rollouts=_garl_min_rollouts),
    "paft": Recipe(aliases.paft),
    "guarded_garl": Recipe(aliases.guarded_garl, min_rollouts=_garl_min_rollouts),
    "jensen": Recipe(aliases.jensen, min_rollouts=2),
    "jepo": Recipe(aliases.jepo, q=1.0, min_rollouts=2),
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
        min_rollouts=2,
        answer="sampled",
        reward="exact_match",
        is_reward_weight=True,
        weight=group_stats.log_reward,
    ),
    "grpo": _on_rewards(aliases.grpo, surrogates.clipped, "sequence_mean", 2),
    "rloo": _on_rewards(aliases.rloo, min_rollouts=2),
    # Relatives: what other papers do, in the same algebra.
    "log_prob": Recipe(aliases.log_prob, min_rollouts=2),
    "vr_cli": Recipe(aliases.log_prob, min_rollouts=2, overrides={"pathwise": False}),
    "latro": Recipe(
        aliases.log_prob, min_rollouts=2, overrides={"kl_weight": 0.05, "kl_kind": "sequence"}
    ),
    "average_log_prob": Recipe(aliases.average_log_prob, min_rollouts=2, gold_log_probs=True),
    "rlpr": Recipe(aliases.rlpr, min_rollouts=2, gold_log_probs=True),
    "nover": Recipe(aliases.nover, min_rollouts=2, gold_log_probs=True),
    "r3": Recipe(aliases.r3, min_rollouts=2, gold_log_probs=True),
    "tempered": Recipe(aliases.tempered, min_rollouts=2),
    "rb_pass_at_k": Recipe(aliases.rb_pass_at_k, min_rollouts=_subset_min_rollouts),
    "rb_maxrl": Recipe(aliases.rb_maxrl, min_rollouts=_subset_min_rollouts),
    "pkpo": _on_rewards(aliases.pkpo, min_rollouts=_subset_min_rollouts),
    "rs_grpo": _on_rewards(aliases.rs_grpo, surrogates.clipped, "sequence_mean", 2),
    "gspo": _on_rewards(aliases.grpo, surrogates.clipped_sequence, "sequence_mean", 2),
    "cispo": _on_rewards(aliases.grpo, surrogates.cispo, "token_mean", 2),
    "lite_ppo": _on_rewards(aliases.lite_ppo, surrogates.clipped, "token_mean", 2),
    "reinforce_plus_plus": _on_rewards(
        aliases.reinforce_plus_plus, surrogates.clipped, "token_mean"
    ),
    "sft": Recipe(aliases.sft, rationale="annotated", weight=None),
}


# ---- A function as a loss ----


@dataclass(frozen=True)
class _Function:
    """A function that returns an `Estimator`, called with arguments as a `Recipe` is.

    With an argument `q` it gets those of a schedule, too. The standard measurements come with it,
    of the coefficients that its transform returns, unless the transform keeps some of them itself.
    """

    function: Callable[..., Estimator]

    @property
    def arguments(self) -> dict[str, Any]:
        """Every argument with its default, `inspect.Parameter.empty` for none."""
        own = _own_arguments(self.function)
        return (SCHEDULE if "q" in own else {}) | own

    def __call__(self, **given: Any) -> Estimator:
        """The estimator, with a schedule and measurements.

        Raises:
          TypeError, ValueError: an unknown argument, a missing one, a value out of range, or the
            function returned something else.
        """
        own, known = _own_arguments(self.function), self.arguments
        unknown = sorted(set(given) - set(known))
        if unknown and not _takes_any(self.function):
            raise TypeError(
                f"{label(self.function)}: unknown argument {', '.join(unknown)}; it reads "
                f"{', '.join(known) or 'none'}{closest(unknown[0], known)}"
            )
        values = known | given
        for name, value in values.items():
            if value is inspect.Parameter.empty:
                raise TypeError(
                    f"{label(self.function)}: argument {name} has no default: give it a value"
                )
        # Arguments of the schedule are ours, unless the function has them itself.
        passed = {n: v for n, v in values.items() if n in own or n not in SCHEDULE}
        if "q" not in own or set(own) & set(SCHEDULE):
            built = self._build(passed)
            return replace(built, transform=_with_measurements(built, None))
        # What a trainer must provide does not depend on q: it is taken at the first step.
        q = values["q"]
        built = self._build(passed | {"q": q(0) if callable(q) else q})

        def at_q(q: Commitment) -> LossTransform:
            return _with_measurements(self._build(passed | {"q": q}), q)

        return replace(built, transform=_over_steps(at_q, values))

    def _build(self, passed: Arguments) -> Estimator:
        built = self.function(**passed)
        if not isinstance(built, Estimator):  # else it fails deep inside a step
            raise TypeError(f"{label(self.function)} must return a losses.Estimator, got {built!r}")
        return built


def _own_arguments(function: Callable) -> dict[str, Any]:
    """The parameters of a function that have names, with their defaults."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some built-in functions tell nothing
        return {}
    return {
        p.name: p.default for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


def _takes_any(function: Callable) -> bool:
    """Whether it has **arguments, or does not tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return True
    return any(p.kind == p.VAR_KEYWORD for p in parameters)


def _with_measurements(estimator: Estimator, q: Commitment | None) -> LossTransform:
    """Its transform, with the standard measurements behind it unless it keeps some itself."""
    scores = estimator.measured(abstract_scores(1, max(2, estimator.min_rollouts)))
    kept = gauges.measurements(estimator.transform.init(scores))
    if kept.keys() & gauges.OF_GROUPS:
        return estimator.transform
    weight = group_stats.log_likelihood
    if estimator.rationale == "annotated":
        weight = None
    elif estimator.answer == "sampled":
        weight = group_stats.log_reward
    # `normalized`: whether the function divides by M^q is not known, so nothing is divided here.
    return chain(estimator.transform, gauges.measure_groups(q, normalized=True, weight=weight))


# ---- A loss by its name, as an object, or as a function ----

# A key of `RECIPES`, a recipe that has no name there, or a function that returns an Estimator.
Loss = str | Recipe | Callable[..., Estimator]


def _find(loss: Loss) -> Recipe | _Function:
    """Raises ValueError for an unknown name, or an object that `label` has no text for."""
    if isinstance(loss, Recipe):
        return loss
    if callable(loss):
        label(loss)
        return _Function(loss)
    if not isinstance(loss, str) or loss not in RECIPES:
        raise ValueError(
            f"no loss is called {loss!r}; there are {', '.join(sorted(RECIPES))}"
            + closest(loss, RECIPES)
        )
    return RECIPES[loss]


def label(loss: Loss) -> str:
    """Text that tells losses apart, in config.json too: 'garl', or 'Recipe(hard_garl)'.

    Raises:
      ValueError: a function without a name, of which two could not be told apart.
    """
    if isinstance(loss, str):
        return loss
    if not isinstance(loss, Recipe):
        return _name_of(loss)
    parts = [_name_of(loss.transform)]
    for each in fields(loss)[1:]:
        value = getattr(loss, each.name)
        usual = {} if each.name == "overrides" else each.default
        if value != usual:
            shown = _name_of(value) if callable(value) else repr(value)
            parts.append(f"{each.name}={shown}")
    return f"Recipe({', '.join(parts)})"


def _name_of(function: Callable) -> str:
    name = getattr(function, "__qualname__", "<lambda>")
    if "<lambda>" in name:
        raise ValueError(
            f"{function!r}, of type {type(function).__name__}, has no name that config.json could "
            "keep: give a function made with def"
        )
    return name  # without its module: that of a config file is called by how the file was loaded


def arguments(loss: Loss) -> dict[str, Any]:
    """The arguments of a loss with their defaults, without those that have none.

    Raises:
      ValueError: an unknown name.
    """
    found = _find(loss).arguments.items()
    return {name: value for name, value in found if value is not inspect.Parameter.empty}


def shared_arguments() -> dict[str, Any]:
    """Arguments that many recipes have, whatever their transform is, with their defaults."""
    return {**SCHEDULE, "normalize": True, **NORMALIZATION, **PENALTY, **IMPORTANCE}


def takes_any(loss: Loss) -> bool:
    """Whether it is a function with **arguments.

    Raises:
      ValueError: an unknown name.
    """
    found = _find(loss)
    return isinstance(found, _Function) and _takes_any(found.function)


def argument_types(loss: Loss) -> dict[str, Any]:
    """The type of each argument of a loss, for command lines: `float`, `int | None`, `Any`.

    Raises:
      ValueError: an unknown name.
    """
    recipe = _find(loss)
    functions = (
        (recipe.transform, recipe.surrogate) if isinstance(recipe, Recipe) else (recipe.function,)
    )
    annotated: dict[str, Any] = {}
    for function in functions:
        try:
            annotated |= get_type_hints(function)
        except (NameError, TypeError):  # an annotation that only a type checker can read
            continue
    types = {}
    for name, default in recipe.arguments.items():
        hint = annotated.get(name, Any)
        # The default tells more than a hint such as Commitment, which arrays fit, too.
        is_value = isinstance(default, (bool, int, float, str, tuple))
        # A recipe's `overrides` may have another default in the place of None.
        usual = recipe._usual.get(name, default) if isinstance(recipe, Recipe) else default
        is_optional = type(None) in get_args(hint) or usual is None
        types[name] = (
            hint if not is_value else type(default) | None if is_optional else type(default)
        )
    return types


def estimator(loss: Loss, given: Arguments) -> Estimator:
    """The estimator of a loss with arguments; those that are not given have their defaults.

    Raises:
      ValueError: the message names the loss, the argument, its value and the allowed range.
    """
    recipe = _find(loss)
    try:
        return recipe(**given)
    except (TypeError, ValueError) as error:
        prefix = "" if isinstance(recipe, _Function) else f"{label(loss)}: "
        raise ValueError(f"{prefix}{error}") from None


def build(loss: Loss, /, *, num_rollouts: int | None = None, **given: Any) -> Estimator:
    """`estimator`, with the arguments as keywords.

    Args:
      loss: a key of `RECIPES`, a `Recipe`, or a function that returns an `Estimator`.
      num_rollouts: M, when it is known, so that an estimator undefined for it is refused here.
      given: arguments of the loss; `arguments(loss)` lists them.

    Raises:
      ValueError: the message names the loss, the argument, its value and the allowed range.
    """
    built = estimator(loss, given)
    if num_rollouts is not None and num_rollouts < built.min_rollouts:
        raise ValueError(
            f"{label(loss)} needs at least {built.min_rollouts} rollouts per prompt for its "
            f"statistics of groups, got {num_rollouts}"
        )
    return built
