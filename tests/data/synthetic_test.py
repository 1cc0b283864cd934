"""The synthetic world: examples are right, reproducible, split apart, and within one vocabulary."""

import dataclasses
import itertools

import pytest

from qlog import data
from qlog.data import synthetic
from qlog.errors import ConfigError

WORLD = synthetic.World(names=10, people=5, hops=3, shortest=2, longest=6, heed=0.5)


def _facts(source):
    *facts, last = source.split(" . ")
    return dict(fact.split() for fact in facts), last.split()


def test_the_answer_is_reached_by_the_facts():
    for example in list(synthetic.open_examples("multihop", "train", WORLD)[i] for i in range(50)):
        follows, (ask, person) = _facts(example.source)
        assert ask == "ask" and len(follows) == WORLD.people
        walk = [person]
        for _ in range(WORLD.hops):
            walk.append(follows[walk[-1]])
        assert example.answer == f"answer [ met {walk[-1]} ]"
        assert example.rationale.split() == walk


def test_the_text_tells_walks_but_neither_asks_nor_answers():
    lengths, told, heeded = set(), set(), 0
    for i in range(200):
        example = synthetic.open_examples("multihop_text", "train", WORLD)[i]
        follows, (named,) = _facts(example.source)
        walk = example.rationale.split()
        assert all(follows[a] == b for a, b in itertools.pairwise(walk))
        assert example.answer.endswith(f"{walk[-1]} .")
        told.add(example.answer.replace(walk[-1], "kim"))
        assert not {"ask", "answer", "[", "]"} & set(example.source.split() + walk)
        lengths.add(len(walk))
        heeded += walk[0] == named
    assert len(told) == 6 and "at last met kim ." in told
    assert lengths == set(range(WORLD.shortest, WORLD.longest + 1))
    assert 0.45 < heeded / 200 < 0.75  # heed, and one chance in five of starting there anyway


def test_examples_are_functions_of_their_split_and_index():
    train = synthetic.open_examples("multihop", "train", WORLD)
    assert train[7] == synthetic.open_examples("multihop", "train", WORLD)[7]
    ids = {
        s: {synthetic.open_examples("multihop", s, WORLD)[i].source for i in range(100)}
        for s in synthetic.SPLITS
    }
    assert not ids["train"] & ids["test"] and not ids["train"] & ids["validation"]
    with pytest.raises(IndexError):
        train[len(train)]


def test_wrong_answers_are_of_the_training_split_and_name_others_in_the_ring():
    noisy = dataclasses.replace(WORLD, wrong=0.2)
    for split in synthetic.SPLITS:
        clean = synthetic.open_examples("multihop", split, WORLD)
        mislabelled = synthetic.open_examples("multihop", split, noisy)
        differ = [i for i in range(256) if clean[i] != mislabelled[i]]
        for i in differ:
            assert mislabelled[i] == dataclasses.replace(clean[i], answer=mislabelled[i].answer)
            assert mislabelled[i].answer.split()[3] in mislabelled[i].source.split()
        if split == "train":
            assert 0.1 < len(differ) / 256 < 0.3
            shown = {mislabelled[i].answer.split()[3] for i in differ}
            assert len(shown) > 3
        else:
            assert not differ


def test_every_word_is_one_token():
    tokenizer = WORLD.tokenizer()
    formatter = data.Formatter(tokenizer, synthetic.TASKS["multihop"], "cold")
    example = synthetic.open_examples("multihop", "test", WORLD)[0]
    prompt = formatter.prompt(example)
    assert len(prompt) == len(example.source.split()) + 1 and prompt[-1] == tokenizer.think_start_id
    gold = formatter.gold(example)
    assert len(gold) == 6 and gold[-1] == tokenizer.eos_ids[0]
    assert formatter.answer_text(gold) == example.answer
    assert tokenizer.encode("nobody") == tokenizer.encode("<unk>")


def test_impossible_worlds_are_refused():
    for arguments, message in (
        ({"people": 30, "names": 24}, "world.people = 30"),
        ({"hops": 6}, "world.hops = 6"),
        ({"names": 1000}, "world.names = 1000"),
        ({"heed": 2.0}, "world.heed = 2.0"),
        ({"wrong": -0.1}, "world.wrong = -0.1"),
    ):
        with pytest.raises(ConfigError, match=message):
            synthetic.World(**arguments)
