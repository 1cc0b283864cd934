"""Numbers over seeds and questions: means, 95% intervals, and a paired test.

Two kinds of chance are in a number: which questions the test split has, and which seed the run had.
One run shows only the first, so its interval resamples questions. Several seeds show the second,
and their interval resamples seeds (of three seeds it is too narrow: three values say little).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from qlog.grading.accuracy import bootstrap_interval
from qlog.report.records import Estimate, Evaluation, Paired

_FLIPS = 10_000  # sign flips of the permutation test: p-values from 1e-4 on


def over_seeds(evaluations: Sequence[Evaluation], metric: str) -> Estimate | None:
    """A metric over the seeds of an experiment, in percent.

    Args:
      evaluations: one per seed.
      metric: as `summarise` names it, such as substring/m@16.

    Returns:
      None where no evaluation has the metric.
    """
    having = [e for e in evaluations if isinstance(e.metrics.get(metric), int | float)]
    if not having:
        return None
    values = [100.0 * float(e.metrics[metric]) for e in having]
    if len(values) > 1:
        low, high = bootstrap_interval(values)
        spread = float(np.std(values, ddof=1))
        return Estimate(float(np.mean(values)), spread, low, high, "seeds", tuple(values))
    # Those of the evaluation itself, which resampled its questions.
    low, high = (_percent(having[0].metrics.get(f"{metric}/{end}")) for end in ("low", "high"))
    return Estimate(values[0], math.nan, low, high, "questions", tuple(values))


def _percent(value: object) -> float:
    return 100.0 * value if isinstance(value, int | float) else math.nan


def paired(ours: Sequence[Evaluation], others: Sequence[Evaluation], metric: str) -> Paired | None:
    """A paired test of two experiments on the questions that both have answered.

    A question's value is its mean over the seeds that answered it. Under the null hypothesis the
    sign of each question's difference is a fair coin: the p-value is the share of 10,000 sign flips
    whose mean difference is at least as large as the one that was found.

    Args:
      ours, others: one evaluation per seed.

    Returns:
      None where they share no question, or no file tells the questions' values.
    """
    mine, theirs = _by_question(ours, metric), _by_question(others, metric)
    shared = sorted(mine.keys() & theirs.keys())
    if not shared:
        return None
    difference = 100.0 * np.array([mine[key] - theirs[key] for key in shared])  # [Q]
    observed = abs(difference.mean())
    # In parts: 10,000 x 1,132 signs at once are 90 MB.
    rng, at_least = np.random.default_rng(0), 0
    for _ in range(20):
        signs = rng.choice((-1.0, 1.0), size=(_FLIPS // 20, len(shared)))
        at_least += int((abs(signs @ difference / len(shared)) >= observed - 1e-12).sum())
    low, high = bootstrap_interval(difference)
    # The sample itself counts as one of the flips, so that no p-value is 0.
    p_value = (1 + at_least) / (1 + _FLIPS)
    return Paired(float(difference.mean()), low, high, p_value, len(shared))


def _by_question(evaluations: Sequence[Evaluation], metric: str) -> Mapping[str, float]:
    """The mean over seeds by question; of questions that all seeds have answered."""
    having = [e for e in evaluations if metric in e.questions]
    if not having:
        return {}
    tables = [dict(zip(e.ids, e.questions[metric].tolist(), strict=True)) for e in having]
    common = set(tables[0]).intersection(*tables[1:])
    return {key: float(np.mean([table[key] for table in tables])) for key in common}
