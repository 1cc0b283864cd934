"""Scorers: the rewards of training and the metrics of evaluation, by name or as your own function.

A scorer is called with keywords, of which it gets those that it has parameters for:

    def in_brackets(*, answer, **_):
        return float(answer.startswith("[") and answer.endswith("]"))

| keyword     | type           | what it is                                                  |
|-------------|----------------|-------------------------------------------------------------|
| `prompt`    | str            | the prompt as the model reads it, control tokens by name    |
| `rationale` | str            | what was sampled before the thinking-end token              |
| `answer`    | str            | what was sampled after it, up to the end of the sequence    |
| `golds`     | tuple of str   | the gold answer, then its aliases                           |
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

from qlog.errors import ConfigError, TrainingError, let_signals_pass
from qlog.grading import graders

LARGEST = 1e9  # absolute value of a score: sums of squares must stay finite in float32
_MAX_FAILURES = 0.01  # share of the calls of a scorer that may fail
_MOST_TOLD = 20  # warnings of a panel: an error that quotes the answer is another one each time
_FEWEST_CALLS = 100  # as which fewer calls count: one failure at the start stops nothing


class Sample(NamedTuple):
    """A sampled answer, and all that a scorer may look at."""

    prompt: str
    rationale: str
    answer: str
    golds: tuple[str, ...]  # no list: all scorers see the same one
    source: str
    example: Any  # a data.Example, which this package does not know


class Scorer(NamedTuple):
    """A function that scores a sample, and what its score counts for."""

    name: str  # of the function; no two scorers of a list share it
    function: Callable[..., float]
    weight: float  # of the score in a sum
    keywords: tuple[str, ...]  # fields of `Sample` that the function is called with
    named: tuple[str, ...]  # those that its signature names, and **rest does not just take

    def __call__(self, sample: Sample) -> float:
        """The score, without its weight.

        Raises:
          TypeError, ValueError: it is not a number up to LARGEST; and whatever the function raises.
        """
        value: Any = self.function(**{name: getattr(sample, name) for name in self.keywords})
        try:
            # float() would take "1" and, with a warning, an array of one number.
            is_number = not (isinstance(value, (str, bytes)) or np.ndim(value))
            score = float(value) if is_number else math.nan
        except Exception:
            is_number = False
        if not is_number:
            raise TypeError(f"it returned {value!r:.100}, not a number")
        if not abs(score) <= LARGEST:  # nor NaN
            raise ValueError(f"it returned {score}, not a number from -{LARGEST:g} to {LARGEST:g}")
        return score


class Failures(NamedTuple):
    """Calls of a scorer that raised, or returned no number."""

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
      value: a name of `graders.GRADERS`, names with commas between them, a function, or a list of
        these or of (one, weight).
      field: of the config, for messages.

    Raises:
      ConfigError: an unknown name, no function, a function without a name or with a parameter that
        no keyword fills, a weight that is not a finite number, two scorers of one name.
    """
    if isinstance(value, str) and "," in value:
        value = [name.strip() for name in value.split(",")]
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
    is_number = isinstance(weight, (int, float, np.number)) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight):
        raise ConfigError(f"{field}: the weight {weight!r} must be a finite number.")
    if isinstance(function, str):
        try:
            function = graders.by_name(function)
        except ValueError as error:
            raise ConfigError(f"{field} = {error}, or give a function.") from None
    if not callable(function):
        raise ConfigError(
            f"{field} = {function!r} must be the name of a grader, a function, or a list of these "
            "or of (function, weight), as [('exact_match', 1.0), (mine, 0.2)]."
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
    keywords, named = _keywords(score, f"{field} = {name}")
    return Scorer(name, score, float(weight), keywords, named)


def _keywords(
    function: Callable[..., float], label: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(fields of `Sample` that a function takes: all, if it has `**rest`; those that it names)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function of C that does not tell
        return Sample._fields, ()
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for p in parameters:
        if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) or p.default is not p.empty:
            continue
        if p.kind not in by_name or p.name not in Sample._fields:
            raise ConfigError(
                f"{label} has a parameter {p.name!r} that nothing fills: it is called with the "
                f"keywords {', '.join(Sample._fields)}."
            )
    names = {p.name for p in parameters if p.kind in by_name}
    named = tuple(name for name in Sample._fields if name in names)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return Sample._fields if takes_all else named, named


# ---- Scoring ----


class ScorerError(TrainingError):
    """A scorer failed too often, or its scores mean nothing to the loss. The state is unharmed."""


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
            if failed.last not in self._told and len(self._told) < _MOST_TOLD:
                self._told.add(failed.last)
                logging.warning("%s: %s failed and scores 0: %s", self._field, name, failed.last)


def _attempt(scorer: Scorer, sample: Sample) -> tuple[float, str]:
    try:
        return scorer(sample), ""
    except BaseException as error:  # a user's function may raise anything
        let_signals_pass(error)  # where the calling thread scores
        return 0.0, _described(error, scorer.function)


def _described(error: BaseException, function: Callable[..., float]) -> str:
    """An exception on one line, with the last line of the function's own file that it passed."""
    try:
        text = " ".join(str(error).split())[:300]
    except Exception:  # an exception that cannot say what it is
        text = ""
    code = getattr(inspect.unwrap(function), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if code and frame.filename == code.co_filename]
    where = f" ({os.path.basename(code.co_filename)}:{lines[-1]})" if code and lines else ""
    return f"{type(error).__name__}: {text}{where}"
