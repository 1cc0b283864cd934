"""How the pool of decoding lanes shrinks: which sizes it may have, which rollout each lane has.

A pool holds N blocks of m lanes. A lane decodes one rollout. All rollouts of a block belong to one
prompt, and the block holds one copy of that prompt's cache. At first a block is a whole group: B
blocks of M lanes. When enough rollouts are done, those that go on move to fewer or smaller blocks:

    blocks of 4 lanes           5 of 8 go on         blocks of 2 lanes
    prompt 0 | 0 1 2 3          | 0 . 2 3            prompt 0 | 0 2
    prompt 1 | 4 5 6 7          | . 5 . 7            prompt 0 | 3 .
                                                     prompt 1 | 5 7

Small blocks leave fewer lanes empty, but need more copies of the prompts' caches. Everything here
is host arithmetic on numpy arrays; `sampler.py` moves the caches.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# What an empty lane has for a rollout's id. It lies beyond the end of every array, so a scatter by
# ids with mode="drop" leaves empty lanes out. (-1 would not do: it means the last element.)
NO_ROLLOUT = int(np.iinfo(np.int32).max)

# Lanes of the pools, as shares of all rollouts. A step down costs a move of all caches and a pass
# that scores gold answers, so there are few.
_SHARES = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 1 / 16, 1 / 32, 1 / 64)
# With fewer lanes than this a decode step costs no less: it reads all weights in any case.
_MIN_LANES = 4
# Shorter rollouts are done before a move pays for itself.
_MIN_SLOTS = 64


class Level(NamedTuple):
    """A size of the pool on one shard, that is, on one part of the batch's prompts."""

    num_blocks: int  # each with one copy of a prompt's cache
    lanes_per_block: int  # rollouts that a block can decode

    @property
    def num_lanes(self) -> int:
        return self.num_blocks * self.lanes_per_block


class Plan(NamedTuple):
    """Where the lanes of a smaller pool come from: N' blocks on all shards together, m' lanes each.

    Places count within a shard: no rollout ever leaves its device.
    """

    parent: np.ndarray  # int32 [N'], the old block whose prompt the new block has
    lane: np.ndarray  # int32 [N', m'], the old place: old block * m + old lane; 0 for an empty lane
    rollout_ids: np.ndarray  # int32 [N', m'], b * M + m of the batch, or NO_ROLLOUT


class PoolSchedule:
    """Which rollout is in which lane, and the sizes that the pool may still shrink to.

    Attributes:
      rollout_ids: int32 [N, m], b * M + m of each lane's rollout, or NO_ROLLOUT.
    """

    def __init__(
        self, num_prompts: int, num_rollouts: int, levels: Sequence[Level], num_shards: int = 1
    ):
        """A pool of all rollouts.

        Args:
          num_prompts: on all shards together, B.
          num_rollouts: per prompt, M.
          levels: of one shard; the first one is the pool that decoding starts with.
          num_shards: parts of equal size that the prompts are split into.
        """
        ids = np.arange(num_prompts * num_rollouts, dtype=np.int32)
        self.rollout_ids = ids.reshape(num_prompts, num_rollouts)
        self._num_rollouts, self._num_shards = num_rollouts, num_shards
        self._smaller = list(levels[1:])

    def shrink(self, going: np.ndarray) -> list[Plan]:
        """The moves to the smallest pool that holds what goes on; none where the next is too small.

        Level by level, never past one: so there is one program per level, and a rehearsal that
        visits each level once has compiled them all.

        Args:
          going: bool [N, m], lanes whose rollout is not done.
        """
        plans = []
        while self._smaller and going.any():
            level = self._smaller[0]
            plan = regroup(self.rollout_ids, going, level, self._num_shards, self._num_rollouts)
            if plan is None:
                break
            plans.append(plan)
            self.rollout_ids, self._smaller = plan.rollout_ids, self._smaller[1:]
            # The move left the rollouts that are done behind.
            going = self.rollout_ids != NO_ROLLOUT
        return plans

    def rehearsal(self) -> list[Plan]:
        """Moves that visit every size once, without any rollout; the schedule stays as it is."""
        plans = []
        for level in self._smaller:
            shape = (self._num_shards * level.num_blocks, level.lanes_per_block)
            zeros = np.zeros(shape, np.int32)
            plans.append(Plan(zeros[:, 0], zeros, np.full(shape, NO_ROLLOUT, np.int32)))
        return plans


def levels(num_prompts: int, num_rollouts: int, slots: int, prefix_slots: int) -> list[Level]:
    """Sizes that a shard's pool may have, the first for all rollouts, each smaller than the last.

    Args:
      num_prompts: on this shard.
      num_rollouts: per prompt.
      slots: of a rollout's cache, in tokens.
      prefix_slots: of a prompt's cache, in tokens.
    """
    start = Level(num_prompts, num_rollouts)
    sizes = [start]
    if slots < _MIN_SLOTS:
        return sizes
    for share in _SHARES:
        wanted = max(_MIN_LANES, int(np.ceil(share * start.num_lanes)))
        # The slots of the lanes that are given up pay for copies of prompts: memory never grows.
        max_blocks = max(num_prompts, int((start.num_lanes - wanted) * slots // prefix_slots))
        # The smallest blocks that these copies allow. But not too small: lanes of a block read
        # their prompt's cache once together, copies are each read on their own.
        lanes = 1
        while lanes < share * num_rollouts / 8 or -(-wanted // lanes) > max_blocks:
            lanes *= 2
        level = Level(-(-wanted // lanes), lanes)
        if level.num_lanes < sizes[-1].num_lanes:
            sizes.append(level)
    return sizes


def regroup(
    rollout_ids: np.ndarray, going: np.ndarray, level: Level, num_shards: int, num_rollouts: int
) -> Plan | None:
    """Puts the rollouts that go on into a pool of size `level`; None when they do not fit.

    Args:
      rollout_ids: int32 [N, m], b * M + m of each lane's rollout.
      going: bool [N, m], lanes whose rollout is not done.
      num_shards: N and the new blocks are split evenly over so many.
      num_rollouts: per prompt, M.
    """
    if going.reshape(num_shards, -1).sum(1).max() > level.num_lanes:
        return None
    shape = (num_shards, level.num_blocks, level.lanes_per_block)
    parent = np.zeros(shape[:2], np.int32)
    lane = np.zeros(shape, np.int32)
    new_ids = np.full(shape, NO_ROLLOUT, np.int32)
    old_lanes = rollout_ids.shape[1]
    for shard, by_prompt in enumerate(
        _going_by_prompt(rollout_ids, going, num_shards, num_rollouts)
    ):
        block = 0
        for places, ids in by_prompt:
            # A prompt takes as many blocks as its rollouts need; its last one may have empty lanes.
            # So rollouts may not fit although there are enough lanes.
            for first in range(0, len(places), level.lanes_per_block):
                if block == level.num_blocks:
                    return None
                some = slice(first, first + level.lanes_per_block)
                size = len(places[some])
                # Any old block of this prompt has the prompt's cache: that of its first rollout.
                parent[shard, block] = places[first] // old_lanes
                lane[shard, block, :size] = places[some]
                new_ids[shard, block, :size] = ids[some]
                block += 1
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # [shards, blocks, ...] -> [N', ...]
    return Plan(flat(parent), flat(lane), flat(new_ids))


def _going_by_prompt(
    rollout_ids: np.ndarray, going: np.ndarray, num_shards: int, num_rollouts: int
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Per shard, for each prompt with rollouts that go on: their places in the shard, their ids."""
    shards = zip(rollout_ids.reshape(num_shards, -1), going.reshape(num_shards, -1), strict=True)
    for ids, keep in shards:
        places = np.flatnonzero(keep)
        ids = ids[places]
        # Sorted by id the rollouts of a prompt follow each other, since an id is b * M + m.
        order = np.argsort(ids, kind="stable")
        places, ids = places[order], ids[order]
        starts = np.flatnonzero(np.diff(ids // num_rollouts)) + 1
        yield list(zip(np.split(places, starts), np.split(ids, starts), strict=True))
