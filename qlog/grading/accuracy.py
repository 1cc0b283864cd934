"""Accuracy of sampled answers: pass@k, majority vote and intervals, from nothing but saved rows.

A row is one question with its n sampled answers, as evaluation writes it to disk. `summarise`
computes every number from such rows, so another grader or metric needs no new samples. Metrics that
are computed for everybody are lines of `_columns`; a config adds its own (scorers.py).
"""

import functools
import hashlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np

from qlog.grading import graders, scorers
from qlog.grading.scorers import Panel, Sample, Scorer

CONTAINS = scorers.read("contains", "grader")[0]


class Row(TypedDict):
    """A question and its n samples; all rows of an evaluation have the same n."""

    id: str  # of the question, once in an evaluation
    golds: list[str]  # the gold answer, then its aliases
    answers: list[str]  # n texts, those after the thinking-end token
    official_answer: NotRequired[str | float | None]  # FinQA's executed answer, exe_ans
    source: NotRequired[str | None]  # `Example.source`, the text in which copies are looked for
    prompt: NotRequired[str]  # as the model reads it, control tokens by name
    rationales: NotRequired[list[str]]  # n texts, without the thinking-end token
    extra: NotRequired[Mapping[str, Any]]  # `Example.extra`, where there is any


def pass_at_k(n: int | np.ndarray, c: int | np.ndarray, k: int) -> np.ndarray:
    """Unbiased estimate of the probability that one of k samples is right: 1 - C(n-c, k) / C(n, k).

    At n = k this is "any of k is right". The naive 1 - (1 - c/n)^k is biased low. Chen et al.,
    "Evaluating Large Language Models Trained on Code", arXiv:2107.03374, equation 1.

    Args:
      n: samples per question, any shape, n >= k.
      c: right samples among them, broadcast against n, 0 <= c <= n.
      k: at least 1.

    Returns:
      float64, the broadcast shape.

    Raises:
      ValueError: k < 1, k > n, or c outside [0, n].
    """
    n, c = np.asarray(n), np.asarray(c)
    if k < 1 or np.any(n < k):
        raise ValueError(f"pass_at_k: k = {k} must lie in [1, n], but the smallest n is {n.min()}")
    if np.any(c < 0) or np.any(c > n):
        raise ValueError("pass_at_k: the number c of right samples must lie in [0, n]")
    # C(n-c, k) / C(n, k) as a product: the i-th of k samples drawn without replacement is wrong
    # with probability (n - c - i) / (n - i). The binomials themselves would overflow.
    i = np.arange(k)
    wrong = np.maximum((n - c)[..., None] - i, 0) / (n[..., None] - i)
    return 1.0 - np.prod(wrong, axis=-1)


def majority_vote(
    answers: Sequence[str], question: str = "", normalise: Callable[[str], str] = graders.vote_key
) -> int | None:
    """Index of the answer that wins the vote: the first one of the most frequent normal form.

    A tie is drawn by a hash of the question and the form: fair over questions, the same at every
    call, and the same in every order of the samples. Answers whose normal form is "" cast no vote.

    Args:
      answers: the samples of one vote.
      question: its id.
      normalise: from an answer to what is counted.

    Returns:
      An index into `answers`, or None where no answer casts a vote (then the vote is wrong).
    """
    votes: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        if key := normalise(answer):
            votes.setdefault(key, []).append(index)
    if not votes:
        return None
    most = max(map(len, votes.values()))
    tied = [key for key, indices in votes.items() if len(indices) == most]
    return votes[min(tied, key=lambda key: _drawn(question, key))][0]


def _drawn(question: str, form: str) -> bytes:
    """A number that is as good as random for each form of an answer to a question."""
    return hashlib.sha256(f"{question}\0{form}".encode("utf-8", "surrogatepass")).digest()


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over questions.

    Questions are resampled, not samples: the 16 answers to one question are not independent.

    Args:
      values: [Q] one finite number per question.
      level: coverage in (0, 1).
      resamples: number of resampled data sets.
      seed: the same seed gives the same interval.

    Raises:
      ValueError: no values, values not finite or not one-dimensional, or level outside (0, 1).
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size or not np.all(np.isfinite(values)):
        raise ValueError(
            f"bootstrap_interval needs finite values of shape [Q] with Q >= 1, not {values.shape}"
        )
    if not 0.0 < level < 1.0:
        raise ValueError(f"bootstrap_interval: level = {level} must lie in (0, 1)")
    choose = np.random.default_rng(seed).integers
    means = [values[choose(values.size, size=values.size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise(
    rows: Sequence[Row],
    *,
    k: int = 16,
    dataset: str = "",
    grader: Scorer = CONTAINS,
    metrics: Sequence[Scorer] = (),
    example: Callable[[Row], Any] = lambda row: types.SimpleNamespace(**row),
    threads: int = 1,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, float]:
    """Every number of an evaluation, computed from its rows. Accuracies are in [0, 1].

    Of fewer than k samples per question all are taken. The names are
      p@1, p@k, m@k: single-sample accuracy, unbiased pass@k and majority vote under `grader`;
        where n > k, m@k is the mean over the n // k consecutive votes of k samples.
      p@1/low, p@1/high, ...: their bootstrap interval over questions.
      exact_match: mean of exact match with the gold answer, without aliases.
      em, f1: SQuAD's, with aliases.
      substring/p@1, substring/p@k, substring/m@k: the same under the paper's literal rule, and
        contains/... under ours, whatever `grader` is.
      numeric/p@1, numeric/p@k, numeric/m@k: `finqa_numeric` on official_answer, where rows have it.
      answer/distinct: mean over questions of the share of different answers among the samples, as
        votes tell them apart.
      answer/rejected_rate: share of answers that are empty, overlong or tagged.
      answer/empty_rate: share of the empty ones.
      answer/words: mean length in words of the answers that are not rejected.
      answer/copy_rate: share of answers of over graders.MAX_COPIED_WORDS words that are copied
        from the source, where rows have one.
      metrics/NAME, metrics/NAME/low, metrics/NAME/high: mean of a scorer of `metrics`, and its
        interval; metrics/NAME/errors: how many of its calls failed, and count as 0.
      questions, samples (per question), grader/errors: numbers of.

    Args:
      rows: ids must be distinct; all rows have the same number of answers.
      k: samples of pass@k and of a vote.
      dataset: "musique" drops HotPotQA's yes/no rule from f1, as MuSiQue's own script does.
      grader: says which answers are right: those with a score of at least 0.5.
      metrics: scorers of distinct names; their weights are not used.
      example: gives what scorers get as `example` from a row.
      threads: of `Panel`.
      level: coverage of the intervals, in (0, 1).
      seed: of the bootstrap.

    Raises:
      ValueError: no rows, a missing field (one that a scorer names, too), a repeated id, or unequal
        numbers of answers.
      scorers.ScorerError: more than 1% of calls of a scorer failed.
    """
    num_samples = _check(rows)
    k = min(k, num_samples)
    columns = _columns(dataset)
    if not any(row.get("official_answer") for row in rows):
        del columns["numeric/"]
    scores = {name: _score(rows, column) for name, column in columns.items()}
    # ---- By functions that a config may name: on threads, their failures counted ----
    _check_needs(rows, [grader, *metrics])
    samples = [sample for row in rows for sample in _samples(row, example(row))]
    graded = _panel_scores(Panel([grader], "config.evaluation.grader", threads), samples)
    measured = _panel_scores(Panel(metrics, "config.evaluation.metrics", threads), samples)
    scores[""] = graded.values[grader.name].reshape(len(rows), num_samples)

    summary: dict[str, float] = {}
    winners = _winners(rows, k)
    for name in filter(_is_prefix, scores):
        for metric, values in _accuracies(name, scores[name] >= 0.5, winners, k).items():
            summary[metric] = float(values.mean())
            summary[f"{metric}/low"], summary[f"{metric}/high"] = bootstrap_interval(
                values, level=level, seed=seed
            )
    # The other columns are plain means over all samples.
    summary |= {name: float(scores[name].mean()) for name in scores if not _is_prefix(name)}
    for name, values in measured.values.items():
        means = values.reshape(len(rows), num_samples).mean(axis=1)  # [Q]
        summary[f"metrics/{name}"] = float(means.mean())
        summary[f"metrics/{name}/low"], summary[f"metrics/{name}/high"] = bootstrap_interval(
            means, level=level, seed=seed
        )
        summary[f"metrics/{name}/errors"] = measured.failures[name].number
    return (
        summary
        | _lengths(rows)
        | {
            "questions": len(rows),
            "samples": num_samples,
            "grader/errors": graded.failures[grader.name].number,
        }
    )


def _check_needs(rows: Sequence[Row], wanted: Sequence[Scorer]) -> None:
    """Rows of older files have no prompt; those written by hand may have no rationales."""
    for scorer in wanted:
        for keyword, field in (("prompt", "prompt"), ("rationale", "rationales")):
            if keyword in scorer.named and any(row.get(field) is None for row in rows):
                raise ValueError(f"{scorer.name} needs the {field} of each row, which some lack")


def per_question(rows: Sequence[Row], k: int) -> dict[str, np.ndarray]:
    """What `summarise` takes means of, for the two rules that need no scorer: float64 [Q] each.

    The names are substring/p@1, substring/p@k, substring/m@k and contains/... In [0, 1]. For paired
    tests between runs, without reading their samples.

    Raises:
      ValueError: as `summarise`.
    """
    num_samples = _check(rows)
    k = min(k, num_samples)
    columns, winners = _columns(""), _winners(rows, k)
    values = {}
    for name in ("substring/", "contains/"):
        values |= _accuracies(name, _score(rows, columns[name]) >= 0.5, winners, k)
    return values


def _accuracies(
    prefix: str, is_right: np.ndarray, winners: list[list[int | None]], k: int
) -> dict[str, np.ndarray]:
    """p@1, p@k and m@k of each question, float64 [Q]; is_right: bool [Q, n]."""
    num_right, num_samples = is_right.sum(axis=1), is_right.shape[1]
    return {
        f"{prefix}p@1": pass_at_k(num_samples, num_right, 1),
        f"{prefix}p@{k}": pass_at_k(num_samples, num_right, k),
        f"{prefix}m@{k}": _voted(is_right, winners),
    }


def _samples(row: Row, example: Any) -> list[Sample]:
    """What scorers are called with, for each answer of a row."""
    prompt, source = row.get("prompt") or "", row.get("source") or ""
    rationales = row.get("rationales") or [""] * len(row["answers"])
    golds = tuple(row["golds"])
    return [
        Sample(prompt, rationale, answer, golds, source, example)
        for rationale, answer in zip(rationales, row["answers"], strict=True)
    ]


def _panel_scores(panel: Panel, samples: Sequence[Sample]) -> scorers.Scores:
    found = panel.score(samples)
    panel.count(len(samples), found.failures)
    return found


def _is_prefix(name: str) -> bool:
    """Whether a column is counted as right or wrong, and so has p@1, p@k and m@k."""
    return not name or name.endswith("/")


Column = Callable[[Row, str], float]  # (row, one of its answers) -> score in [0, 1]


def _columns(dataset: str) -> dict[str, Column]:
    """What is computed for each answer of each row, by the name (or prefix) of its metrics.

    "NAME/" is the prefix of p@1, p@k and m@k, where an answer is right from a score of 0.5 on.
    "NAME" is a metric itself, the mean of the scores.
    """
    f1 = (
        functools.partial(graders.squad_f1, closed=()) if dataset == "musique" else graders.squad_f1
    )
    return {
        "exact_match": lambda row, answer: graders.exact_match(answer, row["golds"][0]),
        "em": lambda row, answer: graders.squad_em(answer, row["golds"]),
        "f1": lambda row, answer: f1(answer, row["golds"]),
        "substring/": lambda row, answer: graders.substring(answer, row["golds"]),
        "contains/": lambda row, answer: graders.contains(
            answer, row["golds"], source=row.get("source") or ""
        ),
        "numeric/": lambda row, answer: graders.finqa_numeric(
            answer, row.get("official_answer") or row["golds"][0], gold=row["golds"][0]
        ),
    }


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _is_number(value: Any) -> bool:
    """Whether a float can hold it: JSON has whole numbers of any size."""
    try:
        return not isinstance(value, bool) and isinstance(float(value), float)
    except (OverflowError, TypeError, ValueError):
        return False


# What a row must hold. A string where a list belongs would be graded letter by letter.
_FIELDS = (
    ("id", lambda value: isinstance(value, str) and bool(value), "a string"),
    ("golds", _are_texts, "a list of strings"),
    ("answers", _are_texts, "a list of strings"),
    (
        "official_answer",
        lambda value: value is None or isinstance(value, str) or _is_number(value),
        "a number",
    ),
    ("source", lambda value: isinstance(value, (str, type(None))), "a string"),
    ("prompt", lambda value: isinstance(value, (str, type(None))), "a string"),
    ("rationales", lambda value: not value or _are_texts(value), "a list of strings"),
    ("extra", lambda value: isinstance(value, (Mapping, type(None))), "an object"),
)


def wrong(row: Mapping[str, Any]) -> str:
    """What is wrong with a row by itself, as the end of a sentence about it; '' if nothing is."""
    for field, is_right, what in _FIELDS:
        if not is_right(row.get(field)):
            return f"has no {field!r} that is {what}"
    if len(row.get("rationales") or row["answers"]) != len(row["answers"]):
        return "has other numbers of rationales and answers"
    return ""


def _check(rows: Sequence[Mapping[str, Any]]) -> int:
    """The number of answers per row, the same for all."""
    if not rows:
        raise ValueError("summarise needs at least one row of samples, got none")
    for index, row in enumerate(rows):
        if what := wrong(row):
            raise ValueError(f"row {index} of the samples {what}")
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        repeated = next(id_ for index, id_ in enumerate(ids) if id_ in ids[:index])
        raise ValueError(f"the samples hold question {repeated!r} more than once")
    sizes = {len(row["answers"]) for row in rows}
    if len(sizes) > 1:
        raise ValueError(
            f"every question needs the same number of answers, not {min(sizes)} to {max(sizes)}"
        )
    return sizes.pop()


def _score(rows: Sequence[Row], column: Column) -> np.ndarray:
    """float64 [Q, n] scores; equal answers to one question are graded once."""
    scores = []
    for row in rows:
        once = {answer: column(row, answer) for answer in set(row["answers"])}
        scores.append([once[answer] for answer in row["answers"]])
    return np.asarray(scores, np.float64)


def _winners(rows: Sequence[Row], k: int) -> list[list[int | None]]:
    """Per question, the winner's index in each consecutive vote of k samples."""
    winners = []
    for row in rows:
        answers, of_question = row["answers"], []
        # Samples that are left over, fewer than k, take part in no vote.
        for start in range(0, len(answers) - k + 1, k):
            winner = majority_vote(answers[start : start + k], row["id"])
            of_question.append(None if winner is None else start + winner)
        winners.append(of_question)
    return winners


def _voted(is_right: np.ndarray, winners: list[list[int | None]]) -> np.ndarray:
    """float64 [Q], the share of a question's votes whose winner is right; is_right: bool [Q, n]."""
    return np.array(
        [
            np.mean([winner is not None and is_right[question, winner] for winner in of_question])
            for question, of_question in enumerate(winners)
        ]
    )


def _lengths(rows: Sequence[Row]) -> dict[str, float]:
    """The metrics answer/...: what answers look like, right or wrong."""
    answers = [answer for row in rows for answer in row["answers"]]
    accepted = [answer for answer in answers if graders.is_answer(answer)]
    copies = [
        graders.is_answer(answer) and graders.is_copy(answer, source)
        for row in rows
        if (source := row.get("source"))
        for answer in row["answers"]
    ]
    return ({"answer/copy_rate": float(np.mean(copies))} if copies else {}) | {
        "answer/distinct": float(
            np.mean([_num_distinct(row) / len(row["answers"]) for row in rows])
        ),
        "answer/empty_rate": sum(not answer.strip() for answer in answers) / len(answers),
        "answer/rejected_rate": (len(answers) - len(accepted)) / len(answers),
        "answer/words": float(np.mean([len(a.split()) for a in accepted])) if accepted else 0.0,
    }


def _num_distinct(row: Row) -> int:
    """Different answers to a question; all that cast no vote are one."""
    return len({graders.vote_key(answer) for answer in row["answers"]})
