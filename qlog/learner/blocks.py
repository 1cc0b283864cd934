"""Which device computes which packs: an update's prompts, cut into blocks and spread over shards.

All devices of a mesh run the same program at the same time, so a microbatch lasts as long as its
largest part. With a whole prompt on each device, all of them would wait for the prompt with most
packs. Here prompts a to d have 8, 2, 2 and 1 packs, on two devices with one prompt at a time:

    by prompts                       by blocks

    device 0    aaaaaaaa  bb         device 0    aaa  aa  bb
    device 1    cc......  d.         device 1    aaa  cc  d.

                8 and 2 packs                    3, 2 and 2 packs

A *block* is a prompt and some consecutive packs of it. Its device computes the prompt once, then
these packs. Gradients are sums over packs, so blocks may be computed anywhere, in any order. A
prompt that is cut passes through the model once for each of its blocks, so the plan is the one with
the least cost of prompts and packs together. It depends on the numbers of packs alone: every
process makes the same one.

All of this is arithmetic on the host. `planning.py` asks for plans, `gradient.py` computes the
blocks, with one compiled program for all plans.
"""

import heapq
import math
from typing import NamedTuple

import numpy as np


class Blocks(NamedTuple):
    """The blocks of T microbatches, each with N places: numpy int32 [T, N] per field.

    A microbatch has as many places on each shard, those of a shard in line.
    """

    prompt: np.ndarray  # which prompt of the batch
    first_pack: np.ndarray  # the first of its packs that are in the block
    num_packs: np.ndarray  # how many of them, from there on; 0: nothing, the place stays empty

    def of(self, start: int, stop: int) -> "Blocks":
        """Of the microbatches from number `start` up to `stop`."""
        return Blocks(*[x[start:stop] for x in self])

    def padded_to_multiple(self, several: int) -> "Blocks":
        """With empty microbatches at the end, until T is a multiple of `several`."""
        missing = -len(self.prompt) % several
        # Repeats of the first microbatch's prompts, of which no pack is taken.
        empty = Blocks(self.prompt[:1], self.first_pack[:1] * 0, self.num_packs[:1] * 0)
        return Blocks(
            *[
                np.concatenate([x, np.repeat(y, missing, axis=0)])
                for x, y in zip(self, empty, strict=True)
            ]
        )


class Work(NamedTuple):
    """How much all devices together compute for the gradient of an update."""

    executed_rows: int  # packs that pass through the model, empty ones included
    needed_rows: int  # packs that hold something
    prompt_passes: (
        int  # prompts that pass through the model, forward and backward, repeats included
    )


class PlanSettings(NamedTuple):
    """What a plan is made for."""

    num_shards: int  # S, parts that a batch's prompts are split into
    places: int  # N of a microbatch, on all shards together: a multiple of S
    packs_at_once: int  # w: a device computes packs in windows of w, full or not
    prompt_cost: float  # of one pass of a prompt, where that of a pack is 1

    def executed(self, num_packs: np.ndarray) -> np.ndarray:
        """Packs that a device computes for a block of `num_packs`: whole windows."""
        return -(-num_packs // self.packs_at_once) * self.packs_at_once

    def cost(self, largest: np.ndarray) -> float:
        """Of microbatches whose largest blocks have `largest` [T] packs, on one place of each."""
        return float(self.executed(largest).sum() + self.prompt_cost * len(largest))

    def work(self, blocks: Blocks) -> Work:
        """What these blocks make all devices compute."""
        rows = self.places * self.executed(blocks.num_packs.max(axis=1)).sum()
        return Work(int(rows), int(blocks.num_packs.sum()), blocks.prompt.size)


def plan_blocks(num_packs: np.ndarray, settings: PlanSettings, balanced: bool = True) -> Blocks:
    """The blocks of an update's prompts, by microbatch and place.

    Where nothing is gained by cutting or moving prompts, none is: then each shard computes its own.

    Args:
      num_packs: int [B], the packs of each prompt; B is a multiple of the places.
      balanced: False leaves all prompts whole and where they are, to compare with.

    Returns:
      T >= 1 microbatches. Each pack of each prompt is in one block.
    """
    num_packs = np.asarray(num_packs, np.int64)
    unmoved = _whole_prompts(num_packs, settings)
    if not balanced:
        return unmoved
    parts = _cheapest_parts(num_packs, settings, settings.cost(unmoved.num_packs.max(axis=1)))
    return (
        unmoved
        if parts is None
        else _by_size(_cut(num_packs, parts, settings), settings, num_packs)
    )


# ---- Whole prompts, each on its own shard ----


def _whole_prompts(num_packs: np.ndarray, settings: PlanSettings) -> Blocks:
    """A block for each prompt. Microbatches without any pack are left out, all but one."""
    num_microbatches = len(num_packs) // settings.places
    # Strided: prompts lie on the shards in their order, so each shard has its share of every part.
    prompt = np.arange(len(num_packs)).reshape(settings.places, num_microbatches).T
    has_packs = num_packs[prompt].any(axis=1)  # [T]
    prompt = prompt[has_packs] if num_packs.any() else prompt[:1]
    return _as_int32(Blocks(prompt, np.zeros_like(prompt), num_packs[prompt]))


# ---- Prompts cut into parts ----


def _cheapest_parts(
    num_packs: np.ndarray, settings: PlanSettings, most: float
) -> np.ndarray | None:
    """Into how many blocks each prompt is cut: int [B]; 0 of one without packs.

    Args:
      most: None is returned when no cut costs less.
    """
    # T microbatches have T * N places. For every T that may pay, the places are filled: the prompt
    # with the largest blocks is cut into one more, until there is a block for each place. Blocks
    # are then nearly equal, and none of the places is empty. A larger T only cuts further.
    windows = -(-num_packs // settings.packs_at_once)  # [B]
    parts = np.minimum(windows, 1)
    fewest = max(1, -(-int(parts.sum()) // settings.places))
    average = windows.sum() * settings.packs_at_once / settings.places  # packs of a place at least
    largest = [(-int(windows[b]), int(b)) for b in np.flatnonzero(windows > 1)]
    heapq.heapify(largest)
    best, least = None, most
    for num_microbatches in range(fewest, math.ceil(windows.sum() / settings.places) + 1):
        if average + settings.prompt_cost * num_microbatches >= least:
            break  # so would be all that follow
        for _ in range(num_microbatches * settings.places - int(parts.sum())):
            if not largest:
                break
            _, b = heapq.heappop(largest)
            parts[b] += 1
            if (size := -(-int(windows[b]) // int(parts[b]))) > 1:
                heapq.heappush(largest, (-size, b))
        cut = _cut(num_packs, parts, settings)
        # Sorted by size, every N-th block is the largest of its microbatch.
        cost = settings.cost(np.sort(cut.num_packs)[:: -settings.places])
        if cost < least:
            best, least = parts.copy(), cost
    return best


def _cut(num_packs: np.ndarray, parts: np.ndarray, settings: PlanSettings) -> Blocks:
    """The blocks of all prompts in line, int [blocks] per field: `parts` nearly equal ones each.

    They are cut between windows, so that only the last block of a prompt has a window that is not
    full.
    """
    w = settings.packs_at_once
    prompt = np.repeat(np.arange(len(parts)), parts)
    number = np.arange(len(prompt)) - np.repeat(np.cumsum(parts) - parts, parts)  # within a prompt
    # Of q * parts + r windows, the first r blocks have q + 1, the others q.
    q, r = np.divmod(-(-num_packs[prompt] // w), parts[prompt])
    first = (q * number + np.minimum(number, r)) * w
    size = (q + (number < r)) * w
    return Blocks(prompt, first, np.minimum(size, num_packs[prompt] - first))


# ---- From blocks in line to microbatches and places ----


def _by_size(blocks: Blocks, settings: PlanSettings, num_packs: np.ndarray) -> Blocks:
    """Blocks in line -> [T, N]: the largest ones together in the first microbatch, and so on."""
    places, prompts_per_shard = settings.places, len(num_packs) // settings.num_shards
    num_microbatches = -(-len(blocks.prompt) // places)
    # Of equal blocks, those of prompts that lie in the same place on each shard are together.
    order = np.lexsort((blocks.prompt, blocks.prompt % prompts_per_shard, -blocks.num_packs))
    # Empty places have a prompt of their own shard, which nothing has to be sent for.
    own = np.arange(places) // (places // settings.num_shards) * prompts_per_shard
    shape = (num_microbatches, places)
    planned = Blocks(
        np.tile(own, (num_microbatches, 1)), np.zeros(shape, int), np.zeros(shape, int)
    )
    for t in range(num_microbatches):
        chosen = Blocks(*[x[order[t * places : (t + 1) * places]] for x in blocks])
        place = _places_near(chosen.prompt // prompts_per_shard, settings)
        for row, x in zip(planned, chosen, strict=True):
            row[t, place] = x
    return _as_int32(planned)


def _places_near(home: np.ndarray, settings: PlanSettings) -> np.ndarray:
    """A place for each of at most N blocks, on its own shard while that has room: int, distinct.

    Args:
      home: the shard on which each block's prompt lies.
    """
    per_shard = settings.places // settings.num_shards
    # How many blocks in front of each one have the same home.
    order = np.argsort(home, kind="stable")
    start = np.searchsorted(home[order], home)
    rank = np.empty_like(home)
    rank[order] = np.arange(len(home))
    rank -= start
    place = home * per_shard + rank
    stays = rank < per_shard
    free = np.setdiff1d(np.arange(settings.places), place[stays])
    place[~stays] = free[: (~stays).sum()]
    return place


def _as_int32(blocks: Blocks) -> Blocks:
    return Blocks(*[x.astype(np.int32) for x in blocks])
