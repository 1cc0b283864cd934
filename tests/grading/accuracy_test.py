"""pass@k, votes and intervals against enumeration; summaries recomputed from rows on disk."""

import itertools
import json
import math
import random

import numpy as np
import pytest

from qlog.grading import accuracy, graders, scorers

# ---- pass@k ----


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    for c in range(n + 1):
        outcomes = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(outcomes, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert accuracy.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_unbiased_where_the_naive_estimate_is_not():
    p, n, k = 0.1, 20, 16
    right = np.random.default_rng(0).binomial(n, p, size=200_000)
    truth = 1 - (1 - p) ** k
    assert accuracy.pass_at_k(n, right, k).mean() == pytest.approx(truth, abs=0.003)
    assert abs((1 - (1 - right / n) ** k).mean() - truth) > 0.03


def test_pass_at_k_of_arrays_and_large_counts():
    values = accuracy.pass_at_k(np.array([[16], [64]]), np.array([0, 1, 16]), 16)
    assert values.shape == (2, 3) and values.dtype == np.float64
    np.testing.assert_allclose(values[0], [0, 1, 1])
    np.testing.assert_allclose(values[1, :2], [0, 16 / 64])
    exact = 1 - math.comb(9_000, 100) / math.comb(10_000, 100)
    assert accuracy.pass_at_k(10_000, 1_000, 100) == pytest.approx(exact)


@pytest.mark.parametrize("n, c, k", [(4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 2), ([16, 4], 1, 8)])
def test_pass_at_k_refuses_what_it_cannot_estimate(n, c, k):
    with pytest.raises(ValueError, match="pass_at_k"):
        accuracy.pass_at_k(n, c, k)


# ---- Majority vote ----


@pytest.mark.parametrize(
    "answers, winner",
    [
        (["a", "b", "b"], 1),
        (["b", "a", "A!", "b", "The a"], 1),  # normalised votes
        (["", "", "", "z"], 3),  # empty answers cast no vote
        (["</think>", "</think>", "z"], 2),
        (["1,200", "1300", "$ 1200.0"], 0),
        (["", " "], None),
        ([], None),
    ],
)
def test_majority_vote(answers, winner):
    assert accuracy.majority_vote(answers) == winner


def test_ties_are_drawn_from_the_question():
    orders = list(itertools.permutations(["x", "x", "y", "y", "z"]))
    wins = []
    for question in map(str, range(400)):
        won = {order[accuracy.majority_vote(order, question)] for order in orders[:20]}
        assert len(won) == 1 and won < {"x", "y"}, "the same in every order"
        wins += won
    assert 160 < wins.count("x") < 240  # five standard deviations are 50
    # One form has no say in how others are drawn.
    for question in map(str, range(50)):
        answers = ["x", "y", "z"]
        winner = answers[accuracy.majority_vote(answers, question)]
        kept = [a for a in answers if a == winner or a == "z"]
        assert kept[accuracy.majority_vote(kept, question)] == winner


def test_majority_vote_with_another_normal_form():
    assert accuracy.majority_vote(["Ab", "aB", "c", "aB"], normalise=str) == 1
    assert accuracy.majority_vote(["c", "Ab", "aB"], normalise=str.lower) == 1


# ---- Bootstrap ----


def test_bootstrap_interval_matches_the_normal_approximation():
    values = np.random.default_rng(1).normal(size=400)
    low, high = accuracy.bootstrap_interval(values, resamples=4000)
    error = values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    narrow = accuracy.bootstrap_interval(values, level=0.5, resamples=4000)
    assert low < narrow[0] < values.mean() < narrow[1] < high


def test_bootstrap_interval_covers_the_truth():
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(200):
        low, high = accuracy.bootstrap_interval(rng.random(100) < 0.3, resamples=200, seed=seed)
        covered += low <= 0.3 <= high
    assert 0.88 < covered / 200 < 0.99


def test_bootstrap_interval_is_reproducible_and_handles_few_questions():
    values = [0.0, 1.0, 1.0, 0.0]
    assert accuracy.bootstrap_interval(values) == accuracy.bootstrap_interval(values)
    assert accuracy.bootstrap_interval([0.25]) == (0.25, 0.25)


@pytest.mark.parametrize(
    "values, level",
    [
        ([], 0.95),
        ([math.nan, 1.0], 0.95),
        ([[1.0]], 0.95),
        ([1.0], 1.0),
        ([1.0], 0.0),
    ],
)
def test_bootstrap_interval_refuses_bad_input(values, level):
    with pytest.raises(ValueError, match="bootstrap_interval"):
        accuracy.bootstrap_interval(values, level=level)


# ---- Summaries ----

ROWS = [
    {"id": "a", "golds": ["Paris", "City of Light"], "answers": ["Paris", "in Paris", "Rome", ""]},
    {"id": "b", "golds": ["yes"], "answers": ["no", "no", "yes", "yes no"]},
    {"id": "c", "golds": ["407"], "answers": ["1", "2", "3", "4"]},
]


def test_summary_by_hand():
    summary = accuracy.summarise(ROWS)
    # Right under `contains`: 2 of 4, 1 of 4, none.
    assert summary["p@1"] == pytest.approx((2 / 4 + 1 / 4 + 0) / 3)
    assert summary["p@4"] == pytest.approx(2 / 3)
    # Votes: "Paris" (of a three-way tie, the first), "no", "1".
    assert summary["m@4"] == pytest.approx(1 / 3)
    assert summary["exact_match"] == summary["em"] == pytest.approx(2 / 12)
    assert summary["f1"] == pytest.approx((1 + 2 / 3 + 1) / 12)  # "in Paris" has F1 2/3
    assert summary["answer/empty_rate"] == summary["answer/rejected_rate"] == pytest.approx(1 / 12)
    assert summary["answer/words"] == pytest.approx((1 + 2 + 1 + 1 + 1 + 1 + 2 + 4) / 11)
    assert (summary["questions"], summary["samples"], summary["grader/errors"]) == (3, 4, 0)
    assert "numeric/p@1" not in summary and "answer/copy_rate" not in summary
    for name in ("p@1", "p@4", "m@4"):
        assert summary[f"{name}/low"] <= summary[name] <= summary[f"{name}/high"]
    assert all(isinstance(value, (int, float)) for value in summary.values())


def test_summary_is_the_same_from_disk_and_in_any_order(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert accuracy.summarise(rows) == accuracy.summarise(ROWS)
    shuffled = accuracy.summarise(rows[::-1])
    assert {k: v for k, v in shuffled.items() if "/low" not in k and "/high" not in k} == (
        pytest.approx(
            {
                k: v
                for k, v in accuracy.summarise(ROWS).items()
                if "/low" not in k and "/high" not in k
            }
        )
    )


def test_more_samples_than_k():
    row = {"id": "a", "golds": ["x"], "answers": ["x", "x", "y", "y", "y", "x", "z"]}
    summary = accuracy.summarise([row], k=3)
    assert summary["p@1"] == pytest.approx(3 / 7)
    assert summary["p@3"] == pytest.approx(1 - math.comb(4, 3) / math.comb(7, 3))
    assert summary["m@3"] == pytest.approx(1 / 2)  # x x y -> x; y y x -> y; z is left over
    assert accuracy.summarise([row])["p@7"] == 1.0  # fewer than 16: k is what there is


def test_numeric_columns_where_rows_have_an_executed_answer():
    rows = [
        {"id": "a", "golds": ["34.7%"], "official_answer": "0.34719", "answers": ["0.347", "35%"]},
        {"id": "b", "golds": ["28%"], "official_answer": "1.25", "answers": ["28%", "1.25"]},
        {"id": "c", "golds": ["no"], "official_answer": "no", "answers": ["yes", "no"]},
    ]
    summary = accuracy.summarise(rows)
    assert summary["numeric/p@1"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert summary["numeric/p@2"] == 1.0
    assert summary["numeric/m@2"] == pytest.approx(1 / 3)  # "0.347"; "28%"; "yes"
    assert summary["p@1"] == pytest.approx((0 + 1 / 2 + 1 / 2) / 3)


def test_a_new_column_is_a_new_metric(monkeypatch):
    usual = accuracy._columns

    def columns(dataset):
        return usual(dataset) | {
            "words": lambda row, answer: float(len(answer.split()) == 1),
            "exact/": lambda row, answer: graders.exact_match(answer, row["golds"][0]),
        }

    before = accuracy.summarise(ROWS)
    monkeypatch.setattr(accuracy, "_columns", columns)
    summary = accuracy.summarise(ROWS)
    assert summary["words"] == pytest.approx(9 / 12)
    assert summary["exact/p@1"] == pytest.approx(2 / 12)
    added = {"words"} | {name for name in summary if name.startswith("exact/")}
    assert len(added) == 10
    assert {name: summary[name] for name in summary if name not in added} == before


def test_musiques_f1_has_no_closed_answers():
    rows = [{"id": "a", "golds": ["no man's land"], "answers": ["no"]}]
    assert accuracy.summarise(rows)["f1"] == 0.0
    assert accuracy.summarise(rows, dataset="musique")["f1"] == pytest.approx(0.5)


def test_copies_of_the_source_are_seen():
    source = " ".join(f"word{i}" for i in range(40))
    rows = [{"id": "a", "golds": ["word3"], "source": source, "answers": [source[:150], "word3"]}]
    summary = accuracy.summarise(rows)
    assert summary["answer/copy_rate"] == 0.5 and summary["p@1"] == 0.5


def scorer(function):
    return scorers.read(function, "field")[0]


def test_another_grader_says_what_is_right():
    def strict(answer, golds):
        return float(answer == golds[0])

    summary = accuracy.summarise(ROWS, grader=scorer(strict))
    assert summary["p@1"] == pytest.approx(2 / 12)

    def broken(answer):
        raise ZeroDivisionError("scale")

    with pytest.raises(scorers.ScorerError, match="broken failed on 12 of 12 .*ZeroDivisionError"):
        accuracy.summarise(ROWS, grader=scorer(broken))


def test_metrics_of_your_own_are_means_with_intervals():
    def length(answer):
        return len(answer)  # any number, not only [0, 1]

    def asked_for(example, rationale, prompt):
        return float(example.id == "b" and rationale == "why" and prompt == "Who?")

    rows = [
        {"id": i, "golds": ["x"], "answers": ["x", "yyy"], "prompt": "Who?", "rationales": r}
        for i, r in (("a", ["why", "why"]), ("b", ["why", ""]))
    ]
    summary = accuracy.summarise(rows, metrics=[scorer(length), scorer(asked_for)], threads=4)
    assert summary["metrics/length"] == summary["metrics/length/low"] == 2.0
    assert summary["metrics/asked_for"] == 0.25
    assert (summary["metrics/asked_for/low"], summary["metrics/asked_for/high"]) == (0.0, 0.5)
    assert summary["metrics/length/errors"] == 0
    plain = accuracy.summarise(rows)
    assert plain == {k: v for k, v in summary.items() if not k.startswith("metrics/")}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "at least one row"),
        ([{"id": "a", "golds": ["x"]}], "row 0 of the samples has no 'answers'"),
        ([{"id": "a", "golds": [], "answers": ["x"]}], "row 0 .* no 'golds'"),
        ([{"id": "a", "golds": "x", "answers": ["x"]}], "no 'golds' that is a list of strings"),
        ([{"id": "a", "golds": ["x"], "answers": ["x", None]}], "no 'answers' that is a list of"),
        (
            [{"id": "a", "golds": ["x"], "answers": ["x"], "official_answer": []}],
            "'official_answer'",
        ),
        ([ROWS[0], ROWS[0]], "question 'a' more than once"),
        ([ROWS[0], {"id": "z", "golds": ["x"], "answers": ["x"]}], "not 1 to 4"),
    ],
)
def test_rows_that_cannot_be_summarised(rows, message):
    with pytest.raises(ValueError, match=message):
        accuracy.summarise(rows)


def test_an_evaluation_of_real_size():
    """1,132 questions with 16 samples: the numbers agree with their definitions."""
    rng = random.Random(5)
    rows, right = [], []
    for number in range(1132):
        p = rng.random()
        hits = [rng.random() < p for _ in range(16)]
        right.append(hits)
        answers = [str(number) if hit else f"wrong {rng.choice('abc')}" for hit in hits]
        rows.append({"id": str(number), "golds": [str(number)], "answers": answers})
    summary = accuracy.summarise(rows)
    right = np.array(right)
    assert summary["p@1"] == pytest.approx(right.mean())
    assert summary["p@16"] == pytest.approx(right.any(axis=1).mean())
    won, tied = [], []
    for row in rows:
        counts = {a: row["answers"].count(a) for a in row["answers"]}
        most = [a for a, count in counts.items() if count == max(counts.values())]
        won.append(most == [row["id"]])
        tied.append(row["id"] in most and len(most) > 1)
    # A tie is won about every second time.
    assert np.mean(won) < summary["m@16"] < np.mean(won) + np.mean(tied)
    assert summary["m@16/high"] - summary["m@16/low"] < 0.07


def test_different_answers_are_told_apart_as_votes_do():
    rows = [
        {"id": "a", "golds": ["x"], "answers": ["Kim", "kim.", "bob", "eve"]},  # three of four
        {"id": "b", "golds": ["x"], "answers": ["bob"] * 4},
    ]
    assert accuracy.summarise(rows)["answer/distinct"] == pytest.approx((3 / 4 + 1 / 4) / 2)
