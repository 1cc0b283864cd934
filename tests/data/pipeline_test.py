"""Batches: an order that only (seed, step) decides, padding, limits, evaluation."""

import itertools
import zlib

import numpy as np
import pytest
from data_fixtures import limits

from qlog import data
from qlog.data import pipeline
from qlog.errors import ConfigError

SIZE = 23


class Numbers:
    """Examples made when asked for: "w w ... w" of growing length, answered by their number."""

    def __init__(self, size=SIZE):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        return data.Example(
            f"id-{index}",
            " ".join(["w"] * (index + 1)),
            f"n{index % 10}",
            rationale="w " * (index % 3),
        )


@pytest.fixture(scope="module")
def formatter():
    words = data.word_level(["w", *(f"n{i}" for i in range(10))])
    return data.Formatter(words, data.Task("numbers", ""), "cold")


@pytest.fixture(scope="module")
def dataset(formatter):
    return data.open_dataset(Numbers(), formatter, limits(40, 8))


def take(dataset, count, *, seed=3, prompts_per_step=4, **options):
    batches = data.train_batches(dataset, seed=seed, prompts_per_step=prompts_per_step, **options)
    return list(itertools.islice(batches, count))


def ids(batches):
    return [example.id for _, batch in batches for example in batch.examples]


def assert_equal(one, other):
    for field in (
        "tokens",
        "lengths",
        "gold",
        "gold_lengths",
        "rationale",
        "rationale_lengths",
        "uids",
        "is_prompt",
    ):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), field)
    assert one.examples == other.examples


def test_batch_holds_what_the_formatter_says(dataset, formatter):
    ((step, batch),) = take(dataset, 1)
    assert step == 0 and len(batch.examples) == 4
    for row, example in enumerate(batch.examples):
        prompt, gold = formatter.prompt(example), formatter.gold(example)
        assert batch.tokens[row, : batch.lengths[row]].tolist() == prompt
        assert set(batch.tokens[row, batch.lengths[row] :]) <= {formatter.tokenizer.pad_id}
        assert batch.gold[row, : batch.gold_lengths[row]].tolist() == gold
        assert batch.uids[row] == zlib.crc32(example.id.encode())
    assert batch.tokens.shape[1] == dataset.widths.prompt
    assert [batch.tokens.dtype, batch.lengths.dtype, batch.gold.dtype] == [np.int32] * 3
    assert batch.uids.dtype == np.uint32 and batch.is_prompt.all()
    assert batch.rationale.shape == (4, 1) and not batch.rationale_lengths.any()


def test_every_epoch_has_every_example_in_a_new_order(dataset):
    order = ids(take(dataset, 3 * SIZE, prompts_per_step=1))
    epochs = [order[i * SIZE : (i + 1) * SIZE] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(example.id for example in Numbers())
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != [example.id for example in Numbers()]


def test_order_is_a_function_of_seed_and_step(dataset):
    steps = take(dataset, 12)  # over the end of the first epoch and of the second
    assert ids(steps) == ids(take(dataset, 12))
    assert ids(steps) != ids(take(dataset, 12, seed=4))
    # The same prompts whatever the batch size, and however many threads prepare them.
    assert ids(steps) == ids(take(dataset, 48, prompts_per_step=1))
    assert ids(steps) == ids(take(dataset, 12, threads=8, prefetch=32))
    assert ids(steps) == ids(take(dataset, 12, threads=1, prefetch=1))


def test_order_stays_what_it_was(dataset):
    # A new version of a library that shuffles otherwise would change resumed runs.
    order = [int(id_.removeprefix("id-")) for id_ in ids(take(dataset, 2))]
    assert order == [4, 22, 16, 7, 21, 3, 18, 19]


@pytest.mark.parametrize("start", [1, 5, 6, 11, 1000])
def test_resuming_continues_the_same_steps(dataset, start):
    whole = take(dataset, 12) if start < 12 else take(dataset, 3, start_step=start - 1)[1:]
    expected = [(step, batch) for step, batch in whole if step >= start]
    resumed = take(dataset, len(expected), start_step=start)
    assert [step for step, _ in resumed] == [step for step, _ in expected]
    for (_, one), (_, other) in zip(resumed, expected, strict=True):
        assert_equal(one, other)


def test_a_dataset_smaller_than_a_batch_repeats(formatter):
    small = data.open_dataset(Numbers(3), formatter, limits(40, 8))
    order = ids(take(small, 2, prompts_per_step=6))
    assert [sorted(order[i : i + 3]) for i in range(0, 12, 3)] == [["id-0", "id-1", "id-2"]] * 4


def test_an_example_that_is_in_a_batch_twice_has_other_keys(formatter):
    small = data.open_dataset(Numbers(3), formatter, limits(40, 8))
    for _, batch in take(small, 4, prompts_per_step=8):
        assert len({example.id for example in batch.examples}) == 3
        assert len(set(batch.uids.tolist())) == 8
        seen = set()
        for uid, example in zip(batch.uids, batch.examples, strict=True):
            if example.id not in seen:  # the keys of ordinary batches stay what they were
                assert uid == zlib.crc32(example.id.encode())
            seen.add(example.id)


def test_padded_lengths_are_few(dataset):
    steps = take(dataset, 40)
    assert {batch.gold.shape for _, batch in steps} == {(4, 8)}  # one for the whole dataset
    assert {batch.tokens.shape[1] for _, batch in steps} <= {16, 24, 32, 40}
    lengths = [pipeline.bucket(n, 5000) for n in range(1, 5001)]
    assert all(length >= n for n, length in zip(range(1, 5001), lengths, strict=True))
    assert sorted(set(lengths)) == [
        16,
        24,
        32,
        48,
        64,
        96,
        128,
        192,
        256,
        384,
        512,
        768,
        1024,
        1536,
        2048,
        3072,
        4096,
        5000,
    ]


def test_annotated_rationales_come_when_wanted(formatter):
    dataset = data.open_dataset(Numbers(), formatter, limits(40, 8, 6))
    ((_, batch),) = take(dataset, 1, prompts_per_step=8)
    for row, example in enumerate(batch.examples):
        rationale = batch.rationale[row, : batch.rationale_lengths[row]].tolist()
        assert rationale == formatter.rationale(example)
        assert rationale[-1] == formatter.tokenizer.think_end_id
    assert batch.rationale.shape == (8, 6)


def test_evaluation_sees_every_example_once_in_order(dataset):
    batches = list(data.evaluation_batches(dataset, batch_size=10))
    assert [len(batch.examples) for batch in batches] == [10, 10, 10]
    seen = [e.id for b in batches for e, real in zip(b.examples, b.is_prompt, strict=True) if real]
    assert seen == [example.id for example in Numbers()]
    assert batches[-1].is_prompt.tolist() == [True] * 3 + [False] * 7
    np.testing.assert_array_equal(batches[-1].tokens[3:], batches[-1].tokens[[0] * 7])
    limited = list(data.evaluation_batches(dataset, batch_size=10, limit=11))
    assert sum(int(batch.is_prompt.sum()) for batch in limited) == 11
    rest = list(data.evaluation_batches(dataset, batch_size=10, start=10, limit=21))
    assert [
        e.id for b in rest for e, real in zip(b.examples, b.is_prompt, strict=True) if real
    ] == seen[10:21]


def test_empty_dataset(formatter):
    with pytest.raises(ConfigError, match="config.data.name = numbers has no examples"):
        data.open_dataset(
            [],
            formatter,
            limits(40, 8),
            name="config.data.name = numbers",
        )


def test_overlong_examples_stop_the_run_or_are_dropped_and_counted(formatter):
    short = limits(12, 8)  # a prompt of n words has n + 1 tokens
    with pytest.raises(
        ConfigError,
        match="data.max_prompt_tokens = 12 is too small for 12 of 23 "
        ".*the longest with 24 tokens: raise it to 24, or set config.data.overlong",
    ):
        data.open_dataset(Numbers(), formatter, short)
    with pytest.raises(ConfigError, match="config.rollout.answer_reserve = 1 is too small for 23"):
        data.open_dataset(Numbers(), formatter, limits(40, 1))
    with pytest.raises(
        ConfigError,
        match="rollout.rationale_budget = 1 is too small for 7 of "
        "23 examples.*the longest with 2 tokens: raise it to 2",
    ):
        data.open_dataset(Numbers(), formatter, limits(40, 8, 2))
    kept = data.open_dataset(Numbers(), formatter, short, overlong="skip")
    assert len(kept) == 11 and kept.skipped == {"config.data.max_prompt_tokens": 12}
    assert sorted(ids(take(kept, 11, prompts_per_step=1))) == sorted(f"id-{i}" for i in range(11))
    with pytest.raises(ConfigError, match="drops all 23 .*shortest need .*max_prompt_tokens = 2"):
        data.open_dataset(Numbers(), formatter, limits(1, 8), overlong="skip")
    with pytest.raises(ConfigError, match="data.overlong = 'cut' is unknown: use one"):
        data.open_dataset(Numbers(), formatter, short, overlong="cut")


def test_overlong_example_met_later_stops_the_run_too(formatter):
    dataset = data.open_dataset(Numbers(), formatter, limits(12, 8), measure=5)
    with pytest.raises(ConfigError, match="data.max_prompt_tokens = 12 is too small for 1 of 1"):
        take(dataset, SIZE, prompts_per_step=1)
    assert dataset.widths.gold == 8  # the limit, since not every answer has been seen
    with pytest.raises(ConfigError, match="has to look at every example"):
        data.open_dataset(
            Numbers(),
            formatter,
            limits(12, 8),
            measure=5,
            overlong="skip",
        )
