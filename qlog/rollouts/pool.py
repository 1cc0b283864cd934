"""The sizes that a pool of decoding lanes may have, and which rollout each lane has.

A pool holds N blocks of m lanes on each shard. A lane decodes one rollout. All rollouts of a block
belong to one prompt, and the block holds one copy of that prompt's cache. At first a block is a
whole group: blocks of M lanes. When enough rollouts are done, those that go on move to fewer or
smaller blocks, which have more slots each:

    blocks of 4 lanes           5 of 8 go on         blocks of 2 lanes
    prompt 0 | 0 1 2 3          | 0 . 2 3            prompt 0 | 0 2
    prompt 1 | 4 5 6 7          | . 5 . 7            prompt 0 | 3 .
                                                     prompt 1 | 5 7

Small blocks leave fewer lanes empty, but need more copies of the prompts' caches. Everything here
is host arithmetic on numpy arrays: `balance.py` moves rollouts between shards, `schedule.py`
decides when a pool shrinks, `moves.py` moves the caches.
"""

from typing import NamedTuple

import numpy as np

# What an empty lane has for a rollout's id. It lies beyond the end of every array, so a scatter by
# ids with mode="drop" leaves empty lanes out. (-1 would not do: it means the last element.)
NO_ROLLOUT = int(np.iinfo(np.int32).max)

# Each pool has so many of the last one's lanes. Rollouts that end at a constant rate then leave one
# lane in nine without work. A step down costs a move of all caches, a pass that scores gold
# answers, and programs to compile, so there are few.
_SHRINK = 4 / 5
# A level may have so many of the slots that it could have with one copy of each prompt: the rest of
# the memory is for copies, with which blocks are small.
_SLOTS = 1 / 2
# Shorter rollouts are done before a move pays for itself.
_MIN_SLOTS = 64
# The smallest pool has one of so many lanes: what it could still save, its programs cost.
_LANES_TO_LAST = 64
# Copies of a prompt's cache on a shard when few of its rollouts go on.
_COPIES = 5
# So many times the prompts of `prompts_in_memory` start together: half of the slots are enough
# until most rollouts are done.
_PROMPTS_AT_START = 2


class Level(NamedTuple):
    """A size of the pool on one shard, that is, on one part of the batch's prompts."""

    num_blocks: int  # each with one copy of a prompt's cache
    lanes_per_block: int  # rollouts that a block can decode
    slots: int  # of each lane: the step up to which it can be decoded

    @property
    def num_lanes(self) -> int:
        return self.num_blocks * self.lanes_per_block


class Shape(NamedTuple):
    """What a shard samples, and what its caches may take."""

    prompts: int  # of this shard
    rollouts: int  # M of each prompt
    slots: int  # of the longest rollout, in whole tiles
    prompt_slots: int  # P, of a prompt's cache
    # How many prompts with M rollouts each fit into memory when all reach the last slot: a divisor
    # of `prompts`. The caches of no pool take more slots than these.
    prompts_in_memory: int
    tile: int  # slots are multiples of it

    @property
    def memory(self) -> int:
        """In slots, of keys and values of one layer each."""
        return self.prompts_in_memory * (self.prompt_slots + self.rollouts * self.slots)

    def size(self, level: Level) -> int:
        """In slots, as `memory`."""
        num_blocks, lanes, slots = level
        return num_blocks * (self.prompt_slots + lanes * slots)

    def fitting_slots(self, num_blocks: int, lanes_per_block: int) -> int:
        """The most slots that each lane can have, 0 where not even the prompts fit."""
        left = self.memory // num_blocks - self.prompt_slots
        slots = left // lanes_per_block // self.tile * self.tile
        return max(0, min(self.slots, slots))


def prompts_per_wave(shape: Shape) -> int:
    """Prompts of a shard that start together: a divisor of its prompts."""
    in_memory = min(shape.prompts_in_memory, shape.prompts)
    divisors = [n for n in range(1, shape.prompts + 1) if shape.prompts % n == 0]
    for prompts in reversed(divisors):
        if in_memory < prompts <= _PROMPTS_AT_START * in_memory:
            # More prompts than fit to the last slot: they start together if there is a good part of
            # it for each.
            slots = shape.fitting_slots(prompts, shape.rollouts)
            if slots >= max(_MIN_SLOTS, shape.slots // 3):
                return prompts
    return max(n for n in divisors if n <= in_memory)


class Sizes(NamedTuple):
    """The pools that a shard may have."""

    shrinking: tuple[Level, ...]  # the first for a wave of prompts; fewer lanes, not fewer slots
    # The largest ones that can be decoded to the last slot, which may be among the others: one for
    # whole groups, and one with blocks for all prompts of a wave.
    full: tuple[Level, ...]


def sizes(shape: Shape) -> Sizes:
    """Pools for the waves of `prompts_per_wave`, none with more memory than `shape` has."""
    prompts = prompts_per_wave(shape)
    start = Level(prompts, shape.rollouts, shape.fitting_slots(prompts, shape.rollouts))
    found = [start]
    if shape.slots < _MIN_SLOTS:
        return Sizes((start,), (start,))
    while found[-1].num_lanes > max(1, start.num_lanes // _LANES_TO_LAST):
        lanes = int(found[-1].num_lanes * _SHRINK)
        found.append(_level(shape, start, found[-1], lanes))
    if start.slots == shape.slots:
        return Sizes(tuple(found), (start,))
    whole = Level(shape.prompts_in_memory, shape.rollouts, shape.slots)
    return Sizes(tuple(found), tuple(dict.fromkeys((whole, _full(shape, start, whole.num_lanes)))))


def _level(shape: Shape, start: Level, last: Level, lanes: int) -> Level:
    """A level of about so many lanes, less than the last; blocks as small as memory allows."""
    slots = max(last.slots, int(_SLOTS * shape.fitting_slots(1, lanes)))
    # But not too small: lanes of a block read their prompt's cache once together, copies are each
    # read on their own.
    each = max(1, int(lanes / start.num_lanes * shape.rollouts / _COPIES))
    while True:
        num_blocks = -(-lanes // each)
        if num_blocks * each >= last.num_lanes:
            num_blocks = lanes // each
        level = Level(num_blocks, each, shape.fitting_slots(num_blocks, each))
        # One block for all lanes fits in any case: the last level has as many lanes and slots.
        if level.slots >= slots or each >= lanes:
            return level
        each += 1


def _full(shape: Shape, start: Level, lanes: int) -> Level:
    """The level with most lanes that have all slots, and blocks for all prompts of a wave."""
    found = Level(1, 1, shape.slots)
    for each in range(1, shape.rollouts + 1):
        # As many blocks as fit.
        num_blocks = shape.memory // (shape.prompt_slots + each * shape.slots)
        if num_blocks >= min(start.num_blocks, lanes) and num_blocks * each > found.num_lanes:
            found = Level(num_blocks, each, shape.slots)
    return found


def by_prompt(
    rollout_ids: np.ndarray, kept: np.ndarray, num_rollouts: int
) -> dict[int, list[tuple[int, int]]]:
    """For each prompt with rollouts that are kept: their (id, place), in the order of the ids.

    Args:
      rollout_ids: int32 [N, m] of one shard; a place is block * m + lane.
      kept: bool [N, m].
      num_rollouts: per prompt, M; a rollout's id is prompt * M + its number.
    """
    places = np.flatnonzero(kept)
    ids = rollout_ids.ravel()[places]
    found: dict[int, list[tuple[int, int]]] = {}
    for index in np.argsort(ids, kind="stable").tolist():
        rollout = int(ids[index]), int(places[index])
        found.setdefault(rollout[0] // num_rollouts, []).append(rollout)
    return found
