"""A synthetic multi-hop task: who is reached from a person in so many steps of a chain of facts?

A world is a ring of people, each of whom follows another, told in any order:

    amy dan . eve bob . ...            "amy is followed by dan, eve by bob"
    ask amy                            the question: who comes `hops` steps after amy?
    <think> amy dan bob kim </think>   a rationale that helps: the walk itself
    answer [ met kim ]                 the fixed format, which the model must discover

Two tasks share the vocabulary. `multihop_text` is the world's plain text, without questions and
without answers: facts, a name, a walk that often starts there and ends anywhere, and who was met at
its end ("at last met kim ."). A base model trained on it can walk and tell. It does not know that
it is asked something, how far to go, or how to answer. `multihop` asks.

Example i of a split is a pure function of (split, i): nothing is stored.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qlog.data import fields
from qlog.data.examples import Example, Task
from qlog.data.tokenizers import Tokenizer, word_level
from qlog.errors import ConfigError

_NAMES = (
    "amy ann art bea ben bob cal cat dan deb eli eve fay gus hal ida ian ivy jay jim joe kay ken "
    "kim lea leo liz lou mae max meg mia ned nan oli pam pat pia ray rex rob ron roy sal sam sue "
    "ted tim tom una val vic viv wes zoe"
).split()
_FORMAT = "answer [ met {} ]"
# Several ways to tell it, so that naming who was met is a skill and not one fixed phrase.
_TOLD = ("met {} .", "saw {} .", "and met {} .", "then saw {} .", "at last met {} .", "{} .")
_WORDS = [
    ".",
    "met",
    "saw",
    "and",
    "then",
    "at",
    "last",
    "ask",
    *_FORMAT.replace("{} ", "").split(),
]
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class World:
    """The sizes of a world, for both tasks.

    Attributes:
      names: how many names exist.
      people: how many of them live in one example's ring.
      hops: steps that the question asks for.
      shortest: the length of the shortest walk in the plain text, in people.
      longest: the length of the longest one. The walk that helps has hops + 1 people.
      heed: how often the plain text's walk starts at the person named before it, instead of
        anywhere.
      wrong: the share of the training questions whose gold answer names another person than the one
        who is reached. It is the same wrong answer at every visit.
    """

    names: int = 24
    people: int = 6
    hops: int = 3
    shortest: int = 4
    longest: int = 6
    heed: float = 0.8
    wrong: float = 0.0

    def __post_init__(self):
        for field, low, high in (
            ("names", 3, len(_NAMES)),
            ("people", 3, self.names),
            ("hops", 1, self.people - 1),
            ("longest", 1, 10**6),
            ("shortest", 1, self.longest),
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(
                    f"{fields.WORLD}.{field} = {value!r} must be from {low} to {high}."
                )

        for field in ("heed", "wrong"):
            value = getattr(self, field)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 0 <= value <= 1
            ):
                raise ConfigError(f"{fields.WORLD}.{field} = {value!r} must be from 0 to 1.")

    def tokenizer(self) -> Tokenizer:
        """One token per word; every name and every word of the format, whichever task is read."""
        return word_level(_NAMES[: self.names] + _WORDS)


@dataclasses.dataclass(frozen=True)
class Worlds(Sequence[Example]):
    """Examples 0 .. size - 1 of a split, made when asked for.

    Attributes:
      task: 'multihop' or 'multihop_text'.
      world: sizes.
      split: one of SPLITS; no two splits share an example's random numbers.
      size: how many examples there are.
    """

    task: str
    world: World
    split: str
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.size:
            raise IndexError(index)
        split = SPLITS.index(self.split)
        # The generator's seed is what names the example: no two examples share random numbers.
        rng = np.random.default_rng([split, index, self.task == "multihop_text"])
        # A ring of people: each fact leads from one to the next, so every walk goes on without end.
        ring = [_NAMES[i] for i in rng.permutation(self.world.names)[: self.world.people]]
        facts = " ".join(f"{ring[i - 1]} {ring[i]} ." for i in rng.permutation(len(ring)))
        start = int(rng.integers(len(ring)))
        identity = f"{self.task}/{self.split}/{index}"
        if self.task == "multihop_text":
            # Plain text: the person named first is mostly, but not always, where the walk starts.
            length = int(rng.integers(self.world.shortest, self.world.longest + 1))
            named = start if rng.random() < self.world.heed else int(rng.integers(len(ring)))
            source = f"{facts} {ring[named]}"
            last = ring[(start + length - 1) % len(ring)]
            told = _TOLD[int(rng.integers(len(_TOLD)))].format(last)
            return Example(identity, source, told, rationale=_walk(ring, start, length))
        # The question: the rationale is the walk to the answer, both ends included.
        told = (start + self.world.hops) % len(ring)
        if self.split == "train" and rng.random() < self.world.wrong:
            told = (told + int(rng.integers(1, len(ring)))) % len(ring)
        return Example(
            identity,
            f"{facts} ask {ring[start]}",
            _FORMAT.format(ring[told]),
            rationale=_walk(ring, start, self.world.hops + 1),
        )


def _walk(ring: Sequence[str], start: int, length: int) -> str:
    return " ".join(ring[(start + i) % len(ring)] for i in range(length))


TASKS = {
    "multihop": Task("multihop", "Who is reached from the person asked about?"),
    "multihop_text": Task("multihop_text", "Walk, and tell who was met."),
}
_SIZES = {"train": 1 << 20, "validation": 256, "test": 256}


def open_examples(name: str, split: str, world: World) -> Worlds:
    """The examples of a synthetic task.

    Raises:
      ConfigError: there is no such split.
    """
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} is unknown: use one of {', '.join(SPLITS)}.")
    return Worlds(name, world, split, _SIZES[split])
