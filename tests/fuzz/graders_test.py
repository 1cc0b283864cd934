"""Graders on any text: a number in [0, 1], right where it must be, the same both ways round."""

import fractions
import math
import types

import fuzzing
import numpy as np
import pytest
from hypothesis import strategies as st

from qlog.grading import accuracy, graders

pytestmark = pytest.mark.slow

_PIECES = (
    "yes no not the a an The No. 5 1,200 1.5 .5 -5 - ( ) (2.4) % $ $1.2M 1.2bn 3m million thousand "
    "billions per cent percent 1/2 7/0 = [ ] { } , . : ; ' \" \\frac{1}{2} \\boxed{407} \\boxed{ "
    "\\frac{}{} {,} \\, e3 1.5e3 1e99 x10^3 \u00d7 10^{-3} ^ * ** + ++ # C++ C# U.S. A. P. J. 2008 "
    "2008-2010 </think> <think> <|im_end|> <s> decrease rose fell up \\n \\ / "
).split() + [
    " ",
    "\n",
    "\u202f",
    "\u00a0",
    "\u0301",
    "\u0130",
    "\u00bd",
    "\u00b2",
    "\u2212",
    "\u0915\u093e",
    "\u200b",
    "\ufb01",
    "\u01c5",
    "\u00df",
    "\ud800",
    "\U0001f4a5",
    "9" * 60,
    "0." + "0" * 60 + "1",
    "(" * 30,
    "{" * 30,
    "1/" * 20,
]
ANSWERS = st.one_of(
    st.lists(st.one_of(st.sampled_from(_PIECES), st.text(max_size=4)), max_size=12).map("".join),
    st.lists(st.sampled_from(_PIECES), max_size=8).map(" ".join),
    st.text(st.characters(), max_size=40),  # surrogates, too
    fuzzing.TEXTS,
)
_PLAIN = {
    name: grade for name, grade in graders.GRADERS.items() if name != "numeric"
}  # (answer, golds)


def holds_for_texts(case):
    answer, golds, source = case
    for name, grade in _PLAIN.items():
        for given in (golds, golds[0]):
            score = grade(answer, given)
            assert type(score) is float and 0.0 <= score <= 1.0, name
        # More golds can only help.
        assert grade(answer, golds) == max(grade(answer, gold) for gold in golds), name
        if not graders.is_answer(answer) and name != "substring":
            assert grade(answer, golds) == 0.0, name
    copied = graders.contains(answer, golds, source=source)
    assert copied in (0.0, 1.0) and copied <= graders.contains(answer, golds)
    # ---- A gold answer is right, and equality is the same both ways round ----
    gold = golds[0]
    if gold.strip() and len(gold) <= graders.MAX_CHARS:
        assert graders.substring(gold, gold) == 1.0
    if graders.is_answer(gold):
        assert graders.exact_match(gold, gold) == graders.squad_em(gold, gold) == 1.0
        assert graders.contains(gold, gold) == 1.0
        has_words = bool(graders.squad_normalise(gold))
        assert graders.squad_f1(gold, gold) == float(has_words)
        assert graders.squad_f1(gold, gold, closed=()) == 1.0
        if graders.is_answer(answer):
            for grade in (graders.exact_match, graders.squad_em, graders.squad_f1):
                assert grade(answer, gold) == grade(gold, answer), grade
    # ---- Votes ----
    chosen = accuracy.majority_vote([answer, *golds], source)
    votes = [graders.vote_key(text) for text in (answer, *golds)]
    assert (chosen is None) == (not any(votes)) and (chosen is None or votes[chosen])


def test_any_answer_to_any_gold(record_property):
    cases = st.tuples(ANSWERS, st.lists(ANSWERS, min_size=1, max_size=3), ANSWERS)
    fuzzing.try_cases(record_property, "answers to golds", 6000, cases, holds_for_texts)


def holds_for_numbers(case):
    answer, target, gold, digits = case
    score = graders.finqa_numeric(answer, target, gold=gold)
    assert score in (0.0, 1.0)
    example = types.SimpleNamespace(official_answer=str(target))
    assert graders.numeric(answer, (gold or "0",), example) in (0.0, 1.0)
    if isinstance(target, float) and math.isfinite(target) and abs(target) < 1e15:
        # The executed answers have five decimals: written down so they are right.
        written = round(target, 5)
        assert graders.finqa_numeric(f"{written:.5f}", written) == 1.0
        assert graders.finqa_numeric(f"it is {written:,.5f}", written) == 1.0
        # What is off by a tenth is wrong.
        other = f"{1.1 * written + math.copysign(1, written):.{digits}f}"
        if not graders._YEAR.match(other):
            assert graders.finqa_numeric(other, written) == 0.0


def test_any_answer_to_any_number(record_property):
    targets = st.one_of(st.floats(), st.integers().map(float), ANSWERS, st.integers())
    cases = st.tuples(ANSWERS, targets, ANSWERS, st.integers(0, 5))
    fuzzing.try_cases(record_property, "answers to numbers", 4000, cases, holds_for_numbers)


def holds_for_rows(rows):
    rows = [{**row, "id": str(index)} for index, row in enumerate(rows)]
    found = accuracy.summarise(rows, k=2, dataset="finqa", level=0.9)
    assert all(math.isfinite(value) for value in found.values())
    assert all(0.0 <= found[name] <= 1.0 for name in ("p@1", "p@2", "m@2"))
    each = accuracy.per_question(rows, 2)
    assert all(np.isfinite(values).all() for values in each.values())


def test_any_rows_of_samples(record_property):
    row = st.fixed_dictionaries(
        {
            "golds": st.lists(ANSWERS, min_size=1, max_size=2),
            "answers": st.lists(ANSWERS, min_size=2, max_size=2),
        },
        optional={
            "source": st.one_of(st.none(), ANSWERS),
            "official_answer": st.one_of(st.none(), ANSWERS, st.floats()),
        },
    )
    rows = st.lists(row, min_size=1, max_size=3)
    fuzzing.try_cases(record_property, "rows of samples", 150, rows, holds_for_rows)


def test_pass_at_k_is_the_share_of_subsets(record_property):
    def holds(case):
        n, c, k = case
        c, k = min(c, n), min(k, n)
        exact = 1 - fractions.Fraction(math.comb(n - c, k), math.comb(n, k))
        assert abs(float(accuracy.pass_at_k(n, c, k)) - float(exact)) < 1e-9

    cases = st.tuples(st.integers(1, 60), st.integers(0, 60), st.integers(1, 60))
    fuzzing.try_cases(record_property, "pass@k", 500, cases, holds)
