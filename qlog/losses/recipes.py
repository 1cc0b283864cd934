"""Named estimators that a config can build: `build('garl', q=0.75)`.

A `Recipe` joins a function that gives a loss transform, one that gives a surrogate, and what a
trainer must provide. Its arguments are those of both functions, plus, where the transform takes
`q`, a schedule for it, plus edits that every recipe understands.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

from qlog.losses import aliases, edits, gauges, group_stats, q_schedules, surrogates
from qlog.losses.compose import chain
from qlog.losses.types import Estimator, LossTransform, Surrogate, check_choice, check_number

SCHEDULE = {"q_schedule": "constant", "q_end": 0.0, "q_steps": 0, "q_pace": 0.8}
_SCHEDULE_READS = {
    "constant": (),
    "linear": ("q_end", "q_steps"),
    "cosine": ("q_end", "q_steps"),
    "step": ("q_end", "q_steps"),
    "adaptive": ("q_end", "q_pace"),
}
EDITS = {"pathwise": True, "max_coefficient": None, "aggregation": "sum", "max_tokens": None}


def _defaults(function: Callable) -> dict[str, object]:
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


@dataclass(frozen=True)
class Recipe:
    """An estimator with arguments; call it with some of them to get an `Estimator`.

    Attributes:
      transform: function of keyword arguments with defaults that gives a loss transform.
      surrogate: the same, giving a surrogate.
      q: the commitment of a transform that does not take `q`, None where q means nothing.
      normalize: default of the argument that divides by M^q (recipes that take `q` only).
      weight: maps scores to the log-weights that measurements are about, None for none.
      overrides: other defaults, for recipes that differ only in these.
      The rest: fields of `Estimator`; `baselined` says for which arguments M = 1 is undefined.
    """

    transform: Callable[..., LossTransform]
    surrogate: Callable[..., Surrogate] = surrogates.linear
    q: float | None = None
    normalize: bool = True
    weight: Callable | None = group_stats.log_likelihood
    rationale: str = "sampled"
    answer: str = "gold"
    reward: str | None = None
    baselined: Callable[[dict], bool] = lambda arguments: False
    overrides: dict = field(default_factory=dict)

    def __post_init__(self):
        for function in (self.transform, self.surrogate):
            for name, default in _defaults(function).items():
                if default is inspect.Parameter.empty:
                    raise ValueError(f"{function.__name__}: argument {name} needs a default")

    @property
    def arguments(self) -> dict[str, object]:
        """Every argument with its default."""
        own = _defaults(self.transform)
        if "q" in own:
            own |= SCHEDULE | {"normalize": self.normalize}
        return own | _defaults(self.surrogate) | EDITS | self.overrides

    def __call__(self, **given) -> Estimator:
        """The estimator. Raises ValueError or TypeError naming the argument, value and range."""
        arguments = self.arguments
        unknown = sorted(set(given) - set(arguments))
        if unknown:
            raise TypeError(
                f"unknown argument {', '.join(unknown)}; it reads {', '.join(arguments)}"
            )
        arguments |= given
        own = {name: arguments[name] for name in _defaults(self.transform)}
        before = [] if arguments["pathwise"] else [edits.zero_pathwise()]
        after = []
        if arguments["max_coefficient"] is not None:
            check_number("max_coefficient", arguments["max_coefficient"], 0, float("inf"))
            after.append(edits.clip_coefficients(arguments["max_coefficient"]))
        after.append(edits.aggregate(arguments["aggregation"], arguments["max_tokens"]))

        def complete(q, core, normalize):
            bound = [edits.normalize_by_bound(q)] if normalize else []
            watch = gauges.measure_groups(q, normalize, self.weight)
            return chain(core, *before, *bound, watch, *after)

        if "q" in own:
            rest = {name: value for name, value in own.items() if name != "q"}
            factory = lambda q: complete(q, self.transform(q=q, **rest), arguments["normalize"])
            transform = _over_steps(factory, arguments)
        else:
            transform = complete(self.q, self.transform(**own), False)
        surrogate = self.surrogate(**{name: arguments[name] for name in _defaults(self.surrogate)})
        return Estimator(
            transform=transform,
            surrogate=surrogate,
            rationale=self.rationale,
            answer=self.answer,
            reward=self.reward,
            reference=bool(arguments.get("kl_weight", 0.0)),
            min_rollouts=2 if self.baselined(arguments) else 1,
        )


def _over_steps(factory: Callable[..., LossTransform], arguments: dict) -> LossTransform:
    """`factory(q)`, q a constant, a schedule as a function, or one described by arguments."""
    q, kind = arguments["q"], arguments["q_schedule"]
    check_choice("q_schedule", kind, q_schedules.SCHEDULES)
    for name, default in SCHEDULE.items():
        unread = name != "q_schedule" and name not in _SCHEDULE_READS[kind]
        if unread and arguments[name] != default:
            raise ValueError(
                f"{name}={arguments[name]!r} is not read with q_schedule={kind!r}; "
                f"leave it {default}"
            )
    if callable(q):
        check_choice("q_schedule, beside q as a function of the step,", kind, ("constant",))
        return q_schedules.scheduled(factory, q)
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
    return surrogates.add_kl(surrogate, kl_weight, kl_kind) if kl_weight else surrogate


_GRADED = dict(answer="sampled", reward="exact_match", weight=group_stats.log_reward)
_ALWAYS = lambda arguments: True

RECIPES: dict[str, Callable[..., Estimator]] = {
    "garl": Recipe(
        aliases.garl,
        baselined=lambda given: (given["baseline"], given["correction"]) != ("none", "none"),
    ),
    "paft": Recipe(aliases.paft),
    "rb_reinforce": Recipe(aliases.rb_reinforce, q=0.0),
    "rb_rloo": Recipe(aliases.rb_rloo, q=0.0, baselined=_ALWAYS),
    "iwae": Recipe(aliases.iwae, q=1.0),
    "trice": Recipe(aliases.trice, q=1.0),
    "star": Recipe(
        aliases.star, normalize=False, reward="exact_match", weight=group_stats.log_reward
    ),
    "maxrl": Recipe(aliases.maxrl, **_GRADED),
    "grpo": Recipe(
        aliases.grpo,
        _grpo_surrogate,
        overrides={"aggregation": "sequence_mean"},
        **_GRADED,
    ),
    "rloo": Recipe(aliases.rloo, baselined=_ALWAYS, **_GRADED),
    "sft": Recipe(aliases.sft, rationale="annotated", weight=None),
}


def _find(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"no loss is called {name!r}; there are {', '.join(sorted(RECIPES))}")
    return RECIPES[name]


def arguments(name: str) -> dict[str, object]:
    """The arguments of a recipe with their defaults; ValueError for an unknown name."""
    return dict(_find(name).arguments)


def build(name: str, *, num_rollouts: int | None = None, **given) -> Estimator:
    """The estimator called `name`, for configs and command lines.

    Args:
      name: a key of `RECIPES`.
      num_rollouts: M, when it is known, so that an estimator undefined for it is refused here.
      given: arguments of the recipe; `arguments(name)` lists them.

    Raises ValueError; the message names the recipe, the argument, its value and allowed range.
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
