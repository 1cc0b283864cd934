"""Accuracy of sampled answers: pass@k, majority vote and intervals, from saved rows alone.

A row is one question and its samples, as evaluation writes it to disk:

    {"id": str, "golds": [answer, alias, ...], "answers": [sampled answer, ...],
     "official_answer": str (optional: FinQA's exe_ans), "source": str (optional: the prompt)}

Answers are the texts after the thinking-end token. `summarise` computes every number from such
rows, so another grader or metric needs no new samples.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qlog.grading import graders


def pass_at_k(n: int | np.ndarray, c: int | np.ndarray, k: int) -> np.ndarray:
    """Unbiased estimate of the probability that one of k samples is right: 1 - C(n-c, k) / C(n, k).

    At n = k this is "any of k is right". The naive 1 - (1 - c/n)^k is biased low.

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
    draws = np.arange(k)
    wrong = np.maximum((n - c)[..., None] - draws, 0) / (n[..., None] - draws)
    return 1.0 - np.prod(wrong, axis=-1)


def majority_vote(
    answers: Sequence[str], normalise: Callable[[str], str] = graders.vote_key
) -> int | None:
    """Index of the answer that wins the vote: the first one of the most frequent normal form.

    Ties go to the form that was sampled first. Samples are exchangeable, so that this is a fair
    draw among the tied forms, and yet the same at every call. Answers whose normal form is "" cast
    no vote.

    Returns:
        An index into `answers`, or None where nobody votes (then the vote is wrong).
    """
    votes: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        if key := normalise(answer):
            votes.setdefault(key, []).append(index)
    # max keeps the first of equals, and a dict keeps the order of first occurrence.
    return max(votes.values(), key=len)[0] if votes else None


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
    draw = np.random.default_rng(seed).integers
    means = [values[draw(values.size, size=values.size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise(
    rows: Sequence[Mapping],
    *,
    k: int = 16,
    dataset: str = "",
    grade: Callable[..., float] = graders.contains,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, float]:
    """Every number of an evaluation, recomputed from its rows. Accuracies are in [0, 1].

    Keys, k being cut to the n samples per question where there are fewer:
        p@1, p@k, m@k: single-sample accuracy, unbiased pass@k and majority vote under `grade`;
            where n > k, m@k is the mean over the n // k consecutive votes of k samples.
        p@1/low, p@1/high, ...: their bootstrap interval over questions.
        exact_match: the training reward's mean, without aliases; em, f1: SQuAD's, with them.
        numeric/p@1, numeric/p@k, numeric/m@k: `finqa_numeric` on official_answer, where given.
        answer/rejected_rate: empty, overlong or tagged answers; answer/empty_rate: the empty ones;
        answer/words: mean length in words of the answers that are none of these; answer/copy_rate:
        those of over graders.MAX_COPIED_WORDS words copied from the source, where rows have it.
        questions, samples (per question), grader/errors.

    Args:
        rows: see the module's text; ids must be distinct, all rows have the same number of answers.
        dataset: "musique" drops HotPotQA's yes/no rule from f1, as MuSiQue's own script does.
        grade: (answer, golds, *, source) -> [0, 1], right from 0.5 on; counted by `graders.Grader`.

    Raises:
        ValueError: no rows, a missing field, a repeated id, or unequal numbers of answers.
        graders.GraderError: more than 1% of calls of a grader failed.
    """
    num_samples = _check(rows)
    k = min(k, num_samples)
    counted = graders.Grader(grade)
    f1_rule = {"closed": ()} if dataset == "musique" else {}
    columns = {
        "": lambda row, answer: counted(answer, row["golds"], source=row.get("source", "")),
        "exact_match": lambda row, answer: graders.exact_match(answer, row["golds"][0]),
        "em": lambda row, answer: graders.squad_em(answer, row["golds"]),
        "f1": lambda row, answer: graders.squad_f1(answer, row["golds"], **f1_rule),
    }
    if any(row.get("official_answer") for row in rows):
        columns["numeric/"] = lambda row, answer: graders.finqa_numeric(
            answer, row.get("official_answer") or row["golds"][0], gold=row["golds"][0]
        )
    scores = {name: _score(rows, column) for name, column in columns.items()}

    summary = {}
    winners = _winners(rows, k)
    for name in ("", "numeric/"):
        if name not in scores:
            continue
        right = (scores[name] >= 0.5).sum(axis=1)
        per_question = {
            f"{name}p@1": pass_at_k(num_samples, right, 1),
            f"{name}p@{k}": pass_at_k(num_samples, right, k),
            f"{name}m@{k}": _voted(scores[name] >= 0.5, winners),
        }
        for metric, values in per_question.items():
            summary[metric] = float(values.mean())
            summary[f"{metric}/low"], summary[f"{metric}/high"] = bootstrap_interval(
                values, level=level, seed=seed
            )
    summary |= {name: float(scores[name].mean()) for name in ("exact_match", "em", "f1")}
    return (
        summary
        | _lengths(rows)
        | {"questions": len(rows), "samples": num_samples, "grader/errors": counted.errors}
    )


def _are_texts(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


# What a row must hold. A string where a list belongs would be graded letter by letter.
_ROW = (
    ("id", lambda value: isinstance(value, str) and bool(value), "a string"),
    ("golds", _are_texts, "a list of strings"),
    ("answers", _are_texts, "a list of strings"),
    ("official_answer", lambda value: isinstance(value, (str, float, int, type(None))), "a number"),
    ("source", lambda value: isinstance(value, (str, type(None))), "a string"),
)


def _check(rows: Sequence[Mapping]) -> int:
    """The number of answers per row, the same for all."""
    if not rows:
        raise ValueError("summarise needs at least one row of samples, got none")
    for index, row in enumerate(rows):
        for field, is_right, what in _ROW:
            if not is_right(row.get(field)):
                raise ValueError(f"row {index} of the samples has no {field!r} that is {what}")
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        repeated = next(id_ for index, id_ in enumerate(ids) if id_ in ids[:index])
        raise ValueError(f"the samples hold question {repeated!r} more than once")
    counts = {len(row["answers"]) for row in rows}
    if len(counts) > 1:
        raise ValueError(
            f"every question needs the same number of answers, not {min(counts)} to {max(counts)}"
        )
    return counts.pop()


def _score(rows: Sequence[Mapping], column: Callable[[Mapping, str], float]) -> np.ndarray:
    """[Q, n] scores; equal answers to one question are graded once."""
    scores = []
    for row in rows:
        once = {answer: column(row, answer) for answer in set(row["answers"])}
        scores.append([once[answer] for answer in row["answers"]])
    return np.asarray(scores, np.float64)


def _winners(rows: Sequence[Mapping], k: int) -> list[list[int | None]]:
    """Per question, the winner's index in each consecutive vote of k samples."""
    winners = []
    for row in rows:
        starts = range(0, len(row["answers"]) - k + 1, k)
        votes = [majority_vote(row["answers"][start : start + k]) for start in starts]
        winners.append(
            [None if vote is None else start + vote for start, vote in zip(starts, votes)]
        )
    return winners


def _voted(is_right: np.ndarray, winners: list[list[int | None]]) -> np.ndarray:
    """[Q] share of the votes whose winner is right."""
    return np.array(
        [
            np.mean([winner is not None and is_right[question, winner] for winner in of_question])
            for question, of_question in enumerate(winners)
        ]
    )


def _lengths(rows: Sequence[Mapping]) -> dict[str, float]:
    answers = [answer for row in rows for answer in row["answers"]]
    accepted = [answer for answer in answers if graders.is_answer(answer)]
    copies = [
        graders.is_answer(answer) and graders.is_copy(answer, row["source"])
        for row in rows
        if row.get("source")
        for answer in row["answers"]
    ]
    return ({"answer/copy_rate": float(np.mean(copies))} if copies else {}) | {
        "answer/empty_rate": sum(not answer.strip() for answer in answers) / len(answers),
        "answer/rejected_rate": (len(answers) - len(accepted)) / len(answers),
        "answer/words": float(np.mean([len(a.split()) for a in accepted])) if accepted else 0.0,
    }
