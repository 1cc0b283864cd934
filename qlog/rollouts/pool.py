"""How the pool of decoding rows shrinks: which sizes it may have, and which rollout sits where.

A pool holds blocks of rows, `lanes` in each; the rows of a block belong to one prompt, whose cache
the block holds one copy of. At first a block is a group: B blocks of M lanes. When rollouts are
done, those that go on are put together in fewer or smaller blocks. Small blocks leave fewer lanes
empty but need more copies of the prompts' caches. All of this is host arithmetic on numpy arrays.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# Rows of the pools, as shares of all rollouts; a step down costs a move and a scoring pass.
_SHARES = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 1 / 16, 1 / 32, 1 / 64)
_FEWEST = 4  # rows of the smallest pool: below, a step costs what reading the weights costs
_SHORTEST = 64  # rollouts of fewer tokens are not worth a move


class Level(NamedTuple):
    """A size of the pool on one shard: `blocks` of `lanes` rows."""

    blocks: int
    lanes: int


class Plan(NamedTuple):
    """Where the rows of a smaller pool come from; N blocks on all shards together, m lanes.

    parent: int32 [N], the old block whose prompt a block has, counted within its shard.
    lane: int32 [N, m], where a row's rollout was: old block * old lanes + old lane, within its
    shard. source: int32 [N, m], the rollout's number, or `nobody`.
    """

    parent: np.ndarray
    lane: np.ndarray
    source: np.ndarray


def levels(prompts: int, rollouts: int, slots: int, prefix_slots: int) -> list[Level]:
    """Sizes that a shard's pool may have, the first for all rollouts, each smaller than the last.

    What a level gains in private slots pays for its copies of prompts, so memory never grows.

    Args:
      prompts: on this shard; rollouts: per prompt.
      slots: of a rollout's cache; prefix_slots: of a prompt's.
    """
    sizes, rows = [Level(prompts, rollouts)], prompts * rollouts
    if slots < _SHORTEST:
        return sizes
    for share in _SHARES:
        wanted = max(_FEWEST, int(np.ceil(share * rows)))
        copies = max(prompts, int((rows - wanted) * slots // prefix_slots))
        lanes = 1
        while lanes < share * rollouts / 8 or -(-wanted // lanes) > copies:
            lanes *= 2
        level = Level(-(-wanted // lanes), lanes)
        if level.blocks * level.lanes < sizes[-1].blocks * sizes[-1].lanes:
            sizes.append(level)
    return sizes


def regroup(
    source: np.ndarray, going: np.ndarray, level: Level, shards: int, rollouts: int, nobody: int
) -> Plan | None:
    """Puts the rollouts that go on into a pool of size `level`; None when they do not fit.

    Args:
      source: int32 [N, m], the rollout's number in each row, prompt * rollouts + rollout.
      going: bool [N, m], rows whose rollout is not done.
      shards: N and the new blocks are split evenly over so many.
      nobody: the number that stands for no rollout.
    """
    if going.reshape(shards, -1).sum(1).max() > level.blocks * level.lanes:
        return None
    shape = (shards, level.blocks, level.lanes)
    parent = np.zeros(shape[:2], np.int32)
    lane = np.zeros(shape, np.int32)
    new_source = np.full(shape, nobody, np.int32)
    old_lanes = source.shape[1]
    for shard, rows in enumerate(_going_by_prompt(source, going, shards, rollouts)):
        block = 0
        for places, numbers in rows:
            for start in range(0, len(places), level.lanes):
                if block == level.blocks:
                    return None
                chunk = slice(start, start + level.lanes)
                size = len(places[chunk])
                parent[shard, block] = places[start] // old_lanes
                lane[shard, block, :size] = places[chunk]
                new_source[shard, block, :size] = numbers[chunk]
                block += 1
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    return Plan(flat(parent), flat(lane), flat(new_source))


def _going_by_prompt(
    source, going, shards, rollouts
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Per shard: for each prompt its rows' places and numbers."""
    for numbers, keep in zip(source.reshape(shards, -1), going.reshape(shards, -1)):
        places = np.flatnonzero(keep)
        numbers = numbers[places]
        order = np.argsort(numbers, kind="stable")
        places, numbers = places[order], numbers[order]
        starts = np.flatnonzero(np.diff(numbers // rollouts)) + 1
        yield list(zip(np.split(places, starts), np.split(numbers, starts)))


def nobody_in(level: Level, shards: int, nobody: int) -> Plan:
    """A pool without rollouts."""
    shape = (shards * level.blocks, level.lanes)
    zeros = np.zeros(shape, np.int32)
    return Plan(zeros[:, 0], zeros, np.full(shape, nobody, np.int32))
