"""Gold answers that no answer could match are counted before a run starts."""

import data_fixtures
import pytest

from qlog import data
from qlog.experiment import golds
from qlog.grading import scorers


def opened(tmp_path, answers, normalizer=None):
    spec = {**data_fixtures.byte_level_spec(), "normalizer": normalizer}
    tokenizer = data.load(data_fixtures.write_spec(tmp_path, spec))
    formatter = data.Formatter(tokenizer, data.Task("mine", "Say it."), "cold")
    examples = [data.Example(f"id-{i}", "say", answer) for i, answer in enumerate(answers)]
    return data.open_dataset(examples, formatter, data_fixtures.limits(100, 5000)), formatter


STRIP = {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}


@pytest.mark.parametrize(
    "normalizer, grader, number, example_id",
    [
        (None, "exact_match", 1, "id-3"),  # the one with a control token's name
        ({"type": "NFC"}, "exact_match", 1, "id-3"),  # both spellings of an accent are one
        (STRIP, "exact_match", 3, "id-1"),
        ({"type": "Lowercase"}, "exact_match", 4, "id-0"),
        ({"type": "Lowercase"}, "contains", 1, "id-3"),
    ],
)
def test_golds_whose_own_tokens_are_not_right(tmp_path, normalizer, grader, number, example_id):
    answers = ["Paris", "Caf\u00e9", "Cafe\u0301", "</think> Z"]
    dataset, formatter = opened(tmp_path, answers, normalizer)
    found = golds.unreachable(dataset, formatter, scorers.read(grader, "f"))
    assert found is not None
    assert (found.number, found.looked_at, found.grader) == (number, 4, grader)
    assert (found.example_id, found.gold) == (example_id, answers[int(example_id[3:])])


def test_what_can_be_right_is_not_told(tmp_path):
    def mine(*, answer):
        raise AssertionError("functions of one's own are not asked")

    dataset, formatter = opened(tmp_path, ["Paris", "1,200", "का", "a" * 4000])
    assert golds.unreachable(dataset, formatter, scorers.read(["contains", mine], "f")) is None
    assert golds.unreachable(dataset, formatter, ()) is None
    # Longer than graders read.
    dataset, formatter = opened(tmp_path, ["Paris", "a" * 4500])
    found = golds.unreachable(dataset, formatter, scorers.read("contains", "f"))
    assert found is not None and found.example_id == "id-1"
