"""Scorers: the rewards of training and the metrics of evaluation, by name or as your own function.

A scorer is called with keywords, of which it gets those that it has parameters for:

    def in_brackets(*, answer, **_):
        return float(answer.startswith("[") and answer.endswith("]"))

| keyword     | type           | what it is                                                  |
|-------------|----------------|-------------------------------------------------------------|
| `prompt`    | str            | the prompt as the model reads it, control tokens by name    |
| `rationale` | str            | what was sampled before the thinking-end token              |
| `answer`    | str            | what was sampled after it, up to the end of the sequence    |
| `golds`     | list of str    | the gold answer, then its aliases                           |
| `source`    | str            | context and question, without instructions                  |
| `example`   | `data.Example` | the example itself; `example.extra` has the record's other fields |

`read` makes scorers of what a config says. A `Panel` calls them on threads of the host, and stops a
run in which too many calls fail.
"""

import concurrent.futures
import inspect
import logging
import math
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from qlog.errors import ConfigError, TrainingError
from qlog.grading import graders

_MAX_FAILURES = 0.01  # share of the calls of a scorer that may fail
_FEWEST_CALLS = 100  # as which fewer calls count: one failure at the start stops nothing


class Sample(NamedTuple):
    """A sampled answer, and all that a scorer may look at."""

    prompt: str
    rationale: str
    answer: str
    golds: list[str]
    source: str
    example: Any  # a data.Example, which this package does not know


class Scorer(NamedTuple):
    """A function that scores a sample, and what its score counts for."""

    name: str  # of the function; no two scorers of a list share it
    function: Callable[..., float]
    weight: float  # of the score in a sum
    keywords: tuple[str, ...]  # fields of `Sample` that the function is called with

    def __call__(self, sample: Sample) -> float:
        """The score, without its weight.

        Raises:
          TypeError, ValueError: it is not a finite number; and whatever the function raises.
        """
        value = self.function(**{name: getattr(sample, name) for name in self.keywords})
        # float() would take "1" and, with a warning, an array of one number.
        if value is None or isinstance(value, (str, bytes)) or np.ndim(value):
            raise TypeError(f"it returned {value!r:.100}, not a number")
        score = float(value)
        if not math.isfinite(score):
            raise ValueError(f"it returned {score}, not a finite number")
        return score


class Failures(NamedTuple):
    """Calls of a scorer that raised, or returned no finite number."""

    number: int = 0
    last: str = ""  # the last one in words, with the line of code

    def and_(self, later: "Failures") -> "Failures":
        """These and later ones."""
        return Failures(self.number + later.number, later.last or self.last)


class Scores(NamedTuple):
    """What scorers say of N samples, by the name of the scorer."""

    values: dict[str, np.ndarray]  # float64 [N], 0 where the call failed
    failures: dict[str, Failures]


# ---- From a config ----


def read(value: Any, field: str) -> tuple[Scorer, ...]:
    """The scorers that a field of a config names.

    Args:
      value: a name of `graders.GRADERS`, a function, or a list of these or of (one, weight).
      field: of the config, for messages.

    Raises:
      ConfigError: an unknown name, no function, a function without a name or with a parameter that
        no keyword fills, a weight that is not a finite number, two scorers of one name.
    """
    several = isinstance(value, (list, tuple)) and not _is_weighted(value)
    scorers = [_scorer(item, field) for item in (value if several else (value,))]
    names = [scorer.name for scorer in scorers]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ConfigError(
            f"{field} has two functions of the name {min(repeated)!r}: their scores could not be "
            "told apart; rename one."
        )
    return tuple(scorers)


def _is_weighted(value: Any) -> bool:
    """Whether it is a (scorer, weight) pair, and not a list of two scorers."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and not callable(value[1])
        and not isinstance(value[1], (str, list, tuple))
    )


def _scorer(item: Any, field: str) -> Scorer:
    function: Any
    function, weight = item if _is_weighted(item) else (item, 1.0)
    if type(weight) not in (int, float) or not math.isfinite(weight):
        raise ConfigError(f"{field}: the weight {weight!r} must be a finite number.")
    if isinstance(function, str):
        try:
            function = graders.by_name(function)
        except ValueError as error:
            raise ConfigError(f"{field} = {error}, or give a function.") from None
    if not callable(function):
        raise ConfigError(
            f"{field} = {function!r} must be the name of a grader, a function, or a list of these "
            "or of (function, weight)."
        )
    score = cast(Callable[..., float], function)
    name = getattr(score, "__name__", "<object>")
    if name.startswith("<"):
        raise ConfigError(
            f"{field} = {function!r} has no name, by which metrics and config.json could call it: "
            "give a function made with def."
        )
    if inspect.iscoroutinefunction(function):
        raise ConfigError(
            f"{field} = {name}: it is async: give a plain function; it is called on several "
            "threads."
        )
    return Scorer(name, score, float(weight), _keywords(score, f"{field} = {name}"))


def _keywords(function: Callable[..., float], label: str) -> tuple[str, ...]:
    """Which fields of `Sample` a function takes: all, if it has `**rest`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function of C that does not tell
        return Sample._fields
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        allowed, taken = Sample._fields, set(Sample._fields)
    else:
        taken = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        allowed = tuple(name for name in Sample._fields if name in taken)
    for p in parameters:
        if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) or p.default is not p.empty:
            continue
        if p.kind is p.POSITIONAL_ONLY or p.name not in Sample._fields:
            raise ConfigError(
                f"{label} has a parameter {p.name!r} that nothing fills: it is called with the "
                f"keywords {', '.join(Sample._fields)}."
            )
    return allowed


# ---- Scoring ----


class ScorerError(TrainingError):
    """A scorer failed too often: then scores of 0 say nothing about answers."""


class Panel:
    """Scorers, and how often each has failed.

    Args:
      scorers: as `read` made them.
      field: of the config that names them, for messages.
      threads: samples that are scored at a time; 1 stays in the calling thread. Threads share the
        interpreter: functions that wait (for a server, a subprocess) run side by side, pure Python
        runs in turns.

    Attributes:
      failures: of all calls that `count` was told of, by the scorer's name.
    """

    def __init__(self, scorers: Sequence[Scorer], field: str, threads: int = 1):
        self.scorers = tuple(scorers)
        self._field, self._threads = field, threads
        self._calls = 0
        self._told: set[str] = set()
        self.failures = {scorer.name: Failures() for scorer in scorers}

    def score(
        self, samples: Sequence[Sample], done: Callable[[int], None] = lambda number: None
    ) -> Scores:
        """Calls every scorer with every sample; `count` must be told of the failures.

        Args:
          samples: any number of them.
          done: called with the number of samples that are done, after each, in the calling thread.
        """
        values = {scorer.name: np.zeros(len(samples)) for scorer in self.scorers}
        failures = {scorer.name: Failures() for scorer in self.scorers}
        for index, results in enumerate(self._results(samples)):
            for scorer, (value, failed) in zip(self.scorers, results, strict=True):
                values[scorer.name][index] = value
                if failed:
                    failures[scorer.name] = failures[scorer.name].and_(Failures(1, failed))
            done(index + 1)
        return Scores(values, failures)

    def _results(self, samples: Sequence[Sample]) -> Iterator[list[tuple[float, str]]]:
        """(score, failure in words or '') of each scorer, sample by sample."""

        def attempts(sample: Sample) -> list[tuple[float, str]]:
            return [_attempt(scorer, sample) for scorer in self.scorers]

        if self._threads == 1 or len(samples) < 2:
            yield from map(attempts, samples)
            return
        with concurrent.futures.ThreadPoolExecutor(self._threads, "scorer") as pool:
            yield from pool.map(attempts, samples)

    def total(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """The sum of the scores times their weights; the shape is that of each of `values`."""
        return np.sum([s.weight * values[s.name] for s in self.scorers], axis=0)

    def count(self, calls: int, failures: Mapping[str, Failures]) -> None:
        """Adds to `failures`, and warns of each kind of failure once.

        Where several processes score parts of a batch, each is told of the failures of all: then
        they stop together.

        Args:
          calls: of every scorer.
          failures: by the scorer's name.

        Raises:
          ScorerError: more than 1% of all calls of a scorer failed; fewer than 100 calls count as
            100.
        """
        self._calls += calls
        for name, failed in failures.items():
            if not failed.number:
                continue
            self.failures[name] = self.failures[name].and_(failed)
            number = self.failures[name].number
            if number > _MAX_FAILURES * max(self._calls, _FEWEST_CALLS):
                raise ScorerError(
                    f"{self._field}: {name} failed on {number} of {self._calls} answers, more than "
                    f"the {_MAX_FAILURES:.0%} allowed; the last failure was {failed.last}."
                )
            if failed.last not in self._told:
                self._told.add(failed.last)
                logging.warning("%s: %s failed and scores 0: %s", self._field, name, failed.last)


def _attempt(scorer: Scorer, sample: Sample) -> tuple[float, str]:
    try:
        return scorer(sample), ""
    # A user's function may raise anything. SystemExit would end the run as if it had succeeded.
    except (Exception, SystemExit) as error:
        return 0.0, _described(error)


def _described(error: BaseException) -> str:
    """An exception on one line, with the line of code that raised it."""
    text = " ".join(str(error).split())[:300]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    # What `Scorer` says of a returned value has no line of the user's.
    is_ours = frame.filename == __file__
    where = "" if is_ours else f" ({os.path.basename(frame.filename)}:{frame.lineno})"
    return f"{type(error).__name__}: {text}{where}"
