"""Scorers: what a config may name, how they are called, and what happens when they misbehave."""

import asyncio
import fractions
import functools
import json
import math
import threading
import time
import types

import numpy as np
import pytest

from qlog.config import schema
from qlog.errors import ConfigError
from qlog.grading import graders, scorers
from qlog.grading.scorers import Failures, Panel, Sample, read

SAMPLE = Sample(
    prompt="<s>Who?",
    rationale="because",
    answer="[x]",
    golds=("[x]", "y"),
    source="Who?",
    example=types.SimpleNamespace(id="a", official_answer="", extra={"level": 3}),
)


def brackets(*, answer, **_):
    return float(answer.startswith("[") and answer.endswith("]"))


def level(example):
    return example.extra["level"]


def samples(number):
    return [SAMPLE._replace(answer=str(i)) for i in range(number)]


# ---- From a config ----


def test_a_name_a_function_or_a_weighted_list():
    (named,) = read("exact_match", "f")
    assert named.function is graders.exact_match and named.weight == 1.0
    assert named(SAMPLE) == 1.0
    (function,) = read(brackets, "f")
    assert (function.name, function(SAMPLE)) == ("brackets", 1.0)
    (single,) = read((brackets, 0.5), "f")
    assert (single.name, single.weight) == ("brackets", 0.5)
    both = read([("contains", 2), brackets, (level, -0.25)], "f")
    assert [(s.name, s.weight) for s in both] == [
        ("contains", 2.0),
        ("brackets", 1.0),
        ("level", -0.25),
    ]
    assert [s.name for s in read(("contains", "squad_f1"), "f")] == ["contains", "squad_f1"]
    assert [s.name for s in read("contains, squad_f1", "f")] == ["contains", "squad_f1"]
    assert read((), "f") == ()


@pytest.mark.parametrize("name", graders.GRADERS)
def test_every_grader_can_be_named(name):
    (scorer,) = read(name, "f")
    right = SAMPLE._replace(answer="407", golds=("407",))
    assert scorer(right) == 1.0
    assert scorer(right._replace(answer="408")) == 0.0


def test_functions_get_the_keywords_that_they_have_parameters_for():
    def wants(answer, golds, weight=2.0):
        return weight * (answer in golds)

    def everything(**keywords):
        assert keywords == SAMPLE._asdict()
        return 1

    assert read(wants, "f")[0](SAMPLE) == 2.0
    assert read(everything, "f")[0](SAMPLE) == 1.0


async def judge(answer):
    return 1.0


def asks_for_more(answer, temperature):
    return 1.0


def by_position(answer, /):
    return 1.0


@pytest.mark.parametrize(
    "value, message",
    [
        ("exact", r"^f = 'exact' is not a grader: use one of exact_match, .*, or give a function"),
        (3, r"^f = 3 must be the name of a grader, a function, or a list"),
        (None, "^f = None must be the name"),
        ([3, 4], "^f = 3 must be"),
        (lambda answer: 1.0, "has no name.* made with def"),
        (judge, "^f = judge: it is async"),
        (
            asks_for_more,
            "^f = asks_for_more has a parameter 'temperature' that nothing fills: .*prompt",
        ),
        (by_position, "parameter 'answer' that nothing fills"),
        ([brackets, (brackets, 2.0)], "^f has two functions of the name 'brackets'"),
        ((brackets, math.nan), "^f: the weight nan must be a finite number"),
        ((brackets, True), "^f: the weight True must"),
        ([(brackets, None)], "^f: the weight None must"),
    ],
)
def test_what_cannot_be_a_scorer_is_told_in_a_sentence(value, message):
    with pytest.raises(ConfigError, match=message):
        read(value, "f")


# ---- Calling ----


@pytest.mark.parametrize("threads", [1, 5])
def test_scores_keep_the_order_of_samples(threads):
    def number(answer):
        return int(answer) - 10

    seen = []
    panel = Panel(read([number, (brackets, 100.0)], "f"), "f", threads)
    found = panel.score(samples(40), seen.append)
    np.testing.assert_array_equal(found.values["number"], np.arange(40) - 10)
    assert found.failures == {"number": Failures(), "brackets": Failures()}
    assert seen == list(range(1, 41))
    np.testing.assert_array_equal(panel.total(found.values), np.arange(40) - 10)


def test_functions_that_wait_run_side_by_side():
    meeting = threading.Barrier(8)

    def waits():  # passes only if eight calls are under way at the same time
        meeting.wait(timeout=60)
        return 1.0

    found = Panel(read(waits, "f"), "f", threads=8).score(samples(8))
    assert found.values["waits"].sum() == 8


def test_one_thread_is_the_calling_one():
    def where():
        return float(threading.current_thread() is threading.main_thread())

    assert Panel(read(where, "f"), "f", threads=1).score(samples(3)).values["where"].all()


@pytest.mark.parametrize(
    "value, described",
    [
        (None, "TypeError: it returned None, not a number"),
        ("1.0", "TypeError: it returned '1.0', not a number"),
        (math.nan, "ValueError: it returned nan, not a number from -1e+09 to 1e+09"),
        (math.inf, "it returned inf"),
        (-1e10, "it returned -10000000000.0, not a number from"),
        ([1, [2]], "TypeError: it returned [1, [2]], not a number"),
        (np.ones(2), "it returned array"),
        (1j, "TypeError"),
        ({}, "TypeError"),
    ],
)
def test_what_is_no_number_is_a_failure_and_scores_nothing(value, described):
    found = Panel(read(fixed(value), "f"), "f").score([SAMPLE])
    assert found.values["function"][0] == 0.0
    assert found.failures["function"].number == 1
    assert described in found.failures["function"].last


@pytest.mark.parametrize(
    "value", [True, np.float32(0.5), np.array(2), -1, 10**9, fractions.Fraction(1, 2)]
)
def test_any_finite_number_is_a_score(value):
    found = Panel(read(fixed(value), "f"), "f").score([SAMPLE])
    assert found.values["function"][0] == float(value) and not found.failures["function"].number


def fixed(value):
    def function(answer):
        return value

    return function


def fails_on(*answers):
    def picky(answer):
        if answer in answers:
            raise KeyError(answer)
        return 1.0

    return picky


def count(panel, samples):
    found = panel.score(samples)
    panel.count(len(samples), found.failures)
    return found


def test_failures_score_nothing_and_are_counted_and_told_once(caplog):
    panel = Panel(read(fails_on("3"), "f"), "config.rollout.reward")
    for _ in range(2):
        found = count(panel, samples(150))
        assert found.values["picky"].sum() == 149 and found.values["picky"][3] == 0.0
    assert panel.failures["picky"].number == 2
    told = "config.rollout.reward: picky failed and scores 0: KeyError: '3' (scorers_test.py:"
    assert caplog.text.count(told) == 1


def test_more_than_one_percent_of_failures_stop_the_run():
    panel = Panel(read(fails_on("3", "4"), "f"), "config.rollout.reward")
    with pytest.raises(
        scorers.ScorerError,
        match=r"^config.rollout.reward: picky failed on 2 of 20 answers, .* 1% .*KeyError: '4' \(",
    ):
        count(panel, samples(20))
    panel = Panel(read(fails_on("3", "4"), "f"), "f")
    count(panel, samples(200))  # 2 of 200


class Mute(Exception):
    def __str__(self):
        raise ValueError("no words")


@pytest.mark.parametrize("error", [SystemExit(0), asyncio.CancelledError(), Mute()])
def test_whatever_a_function_raises_does_not_end_the_run(error):
    def leaves():
        raise error

    found = Panel(read(leaves, "f"), "f", threads=2).score(samples(2))
    assert found.failures["leaves"].number == 2


def test_a_failure_names_the_line_of_the_function_and_no_library():
    @functools.lru_cache
    def parses(answer):
        return json.loads(answer)

    last = Panel(read(parses, "f"), "f").score([SAMPLE]).failures["parses"].last
    assert last.startswith("JSONDecodeError: ") and "(scorers_test.py:" in last


def test_what_the_caller_raises_between_two_samples_ends_the_scoring():
    started = []

    def slow(answer):
        started.append(answer)
        time.sleep(0.01)
        return 1.0

    def stop(number):
        raise KeyError(number)

    with pytest.raises(KeyError):
        Panel(read(slow, "f"), "f", threads=2).score(samples(500), stop)
    assert len(started) < 100  # those that were not begun are given up


def test_an_object_with_a_name_is_a_scorer():
    class Brackets:
        __name__ = "marks"

        def __call__(self, answer):
            return 1.0

    assert read(Brackets(), "f")[0](SAMPLE) == 1.0
    config = schema.merge(schema.default(), {"rollout": {"reward": [(Brackets(), 1.0)]}})
    assert json.loads(schema.to_json(config))["rollout"]["reward"] == [["marks", 1.0]]
