"""Which rollouts move to which shard when a pool shrinks, so that no shard waits for another.

Prompts differ: one has short rationales, another fills its budget. Without moves a pool could only
shrink when the fullest shard fits. So rollouts are exchanged before, between pairs of shards whose
numbers differ in one bit, the highest bit first: then each half of the shards has half of what is
left, each quarter a quarter, and so on (dimension exchange; Cybenko, 1989). With 4 shards:

    shard      0   1   2   3
    going      8   3   0   1
    bit 1      4   2   4   2     0 <-> 2, 1 <-> 3
    bit 0      3   3   3   3     0 <-> 1, 2 <-> 3

A pair exchanges a few rollouts at a time, by `jax.lax.ppermute`: a round. How many rounds there are
depends on the lengths and is decided here, on the host; the compiled program runs as many.

What is counted is not rollouts but chunks, as many rollouts of a prompt as a block has lanes, since
a block holds one prompt.
"""

import collections
from typing import NamedTuple

import numpy as np

from qlog.rollouts.pool import NO_ROLLOUT, Level, by_prompt

# Rounds per bit that a plan may have. With the sizes below, a pair can exchange half a pool.
MAX_ROUNDS = 8


class Exchange(NamedTuple):
    """What shards send each other, before each sorts what it has into its new blocks.

    Places are those of a shard's work space: [old lanes] for rollouts, [old and new blocks] for
    copies of prompts. A place behind the end is one that is not written.

    D bits, T = MAX_ROUNDS rounds of each at most, c rollouts and d prompts in a round. Round r of
    the n-th bit is entry n * T + r.
    """

    num_rounds: np.ndarray  # int32 [D], rounds of each bit; the same on all shards
    lanes_out: np.ndarray  # int32 [shards, D * T, c], what a shard sends
    lanes_in: np.ndarray  # int32 [shards, D * T, c], where it puts what it receives
    blocks_out: np.ndarray  # int32 [shards, D * T, d]
    blocks_in: np.ndarray  # int32 [shards, D * T, d]

    @property
    def sent(self) -> tuple[int, int]:
        """Rollouts and prompts that each shard sends in all rounds, empty places included."""
        rounds = int(self.num_rounds.sum())
        return rounds * self.lanes_out.shape[-1], rounds * self.blocks_out.shape[-1]


class Plan(NamedTuple):
    """Where the lanes of a smaller pool come from: N' blocks of m' lanes on all shards together."""

    exchange: Exchange
    parent: np.ndarray  # int32 [N'], the place in the work space of the block's prompt
    lane: np.ndarray  # int32 [N', m'], that of the lane's rollout; 0 for an empty lane
    rollout_ids: np.ndarray  # int32 [N', m'], b * M + m of the batch, or NO_ROLLOUT


class Shards(NamedTuple):
    """How a pool lies on shards."""

    number: int
    # Shards next to each other that may exchange rollouts, a divisor of `number`: a slice. The
    # network between slices is too slow for caches.
    neighbours: int
    num_rollouts: int  # per prompt, M

    def pairs(self, bit: int) -> list[tuple[int, int]]:
        """(a, b) and (b, a) of all shards that exchange at this bit."""
        found = []
        for shard in range(self.number):
            first = shard // self.neighbours * self.neighbours
            other = (shard - first) ^ (1 << bit)
            if other < self.neighbours:
                found.append((shard, first + other))
        return found

    @property
    def bits(self) -> list[int]:
        """Bits of a shard's number, the highest first."""
        bits = list(range((self.neighbours - 1).bit_length()))[::-1]
        # Where a power of two is missing, some shards have no partner at the high bits: what these
        # leave uneven a second time evens out.
        return bits if self.neighbours & (self.neighbours - 1) == 0 else bits * 2


def round_sizes(old: Level, new: Level) -> tuple[int, int]:
    """Rollouts and prompts in a round of an exchange."""
    lanes, blocks = old.num_lanes, min(old.num_blocks, new.num_blocks)
    return -(-lanes // (2 * MAX_ROUNDS)), -(-blocks // MAX_ROUNDS)


def no_exchange(shards: Shards, old: Level, new: Level) -> Exchange:
    """Nothing leaves its shard."""
    lanes, blocks = round_sizes(old, new)
    shape = (shards.number, len(shards.bits) * MAX_ROUNDS)
    return Exchange(
        num_rounds=np.zeros(len(shards.bits), np.int32),
        lanes_out=np.zeros((*shape, lanes), np.int32),
        lanes_in=np.full((*shape, lanes), old.num_lanes, np.int32),
        blocks_out=np.zeros((*shape, blocks), np.int32),
        blocks_in=np.full((*shape, blocks), old.num_blocks + new.num_blocks, np.int32),
    )


def nothing(shards: Shards, old: Level, new: Level) -> Plan:
    """The move of a pool without rollouts."""
    shape = (shards.number * new.num_blocks, new.lanes_per_block)
    zeros = np.zeros(shape, np.int32)
    ids = np.full(shape, NO_ROLLOUT, np.int32)
    return Plan(no_exchange(shards, old, new), zeros[:, 0], zeros, ids)


def regroup(
    rollout_ids: np.ndarray, going: np.ndarray, old: Level, new: Level, shards: Shards
) -> Plan | None:
    """Puts the rollouts that go on into pools of size `new`; None where they do not fit.

    Args:
      rollout_ids: int32 [N, m], b * M + m of each lane's rollout.
      going: bool [N, m], lanes whose rollout is not done.
    """
    parts = _parts(rollout_ids, going, old, new, shards)
    lanes = new.lanes_per_block
    if any(part.num_chunks > new.num_blocks for part in parts):
        total = collections.Counter[int]()
        for part in parts:
            total.update({prompt: len(found) for prompt, found in part.rollouts.items()})
        if sum(-(-size // lanes) for size in total.values()) > shards.number * new.num_blocks:
            return None
        exchange = _balance(parts, old, new, shards)
        if any(part.num_chunks > new.num_blocks for part in parts):
            return None
    else:
        exchange = no_exchange(shards, old, new)
    # ---- Sort what each shard has into its blocks.
    shape = (shards.number, new.num_blocks, lanes)
    parent = np.zeros(shape[:2], np.int32)
    lane = np.zeros(shape, np.int32)
    new_ids = np.full(shape, NO_ROLLOUT, np.int32)
    for index, part in enumerate(parts):
        block = 0
        for prompt, rollouts in sorted(part.rollouts.items()):
            for first in range(0, len(rollouts), lanes):
                ids, places = zip(*rollouts[first : first + lanes], strict=True)
                parent[index, block] = part.prompts[prompt]
                lane[index, block, : len(ids)] = places
                new_ids[index, block, : len(ids)] = ids
                block += 1
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # [shards, blocks, ...] -> [N', ...]
    return Plan(exchange, flat(parent), flat(lane), flat(new_ids))


class _Part:
    """What a shard has while rollouts are exchanged: who lies where in its work space."""

    def __init__(self, ids: np.ndarray, going: np.ndarray, old: Level, new: Level, shards: Shards):
        lanes = old.lanes_per_block
        self.lanes_per_block = new.lanes_per_block
        self.rollouts = by_prompt(ids, going, shards.num_rollouts)
        # Any old block of this prompt has the prompt's cache: that of its first rollout.
        self.prompts = {p: found[0][1] // lanes for p, found in self.rollouts.items()}
        self.num_chunks = sum(map(self.chunks, self.rollouts))
        self._lanes, self._blocks = old.num_lanes, old.num_blocks + new.num_blocks

    def chunks(self, prompt: int) -> int:
        """Blocks that this prompt's rollouts take."""
        return -(-len(self.rollouts.get(prompt, ())) // self.lanes_per_block)

    def last_chunk(self, prompt: int) -> int:
        """Rollouts in the prompt's last block, which may be filled in part."""
        return (len(self.rollouts[prompt]) - 1) % self.lanes_per_block + 1

    def free_lanes(self) -> list[int]:
        taken = {place for found in self.rollouts.values() for _, place in found}
        return [place for place in range(self._lanes) if place not in taken]

    def free_blocks(self) -> list[int]:
        taken = set(self.prompts.values())
        return [place for place in range(self._blocks) if place not in taken]


def _parts(
    rollout_ids: np.ndarray, going: np.ndarray, old: Level, new: Level, shards: Shards
) -> list[_Part]:
    by_shard = (shards.number, old.num_blocks, old.lanes_per_block)
    return [
        _Part(ids, kept, old, new, shards)
        for ids, kept in zip(rollout_ids.reshape(by_shard), going.reshape(by_shard), strict=True)
    ]


def _balance(parts: list[_Part], old: Level, new: Level, shards: Shards) -> Exchange:
    """Evens out the chunks of all shards, in `parts` and in the exchange that is returned."""
    exchange = no_exchange(shards, old, new)
    for number, bit in enumerate(shards.bits):
        # A pair with an odd number of chunks cannot share it evenly. Within a group of shards that
        # later bits split no further from each other, the odd ones go to one half and to the other
        # by turns: so the two halves differ by one at most, and not by one for each pair.
        odd = collections.Counter[int]()
        moved = []
        for a, b in shards.pairs(bit):
            if a < b:
                group = a >> (bit + 1)
                first, second = (a, b) if odd[group] % 2 == 0 else (b, a)
                odd[group] += (parts[a].num_chunks + parts[b].num_chunks) % 2
                moved.append(_even_out(parts, first, second, old, new))
        num_rounds = 0
        for move in moved:
            num_rounds = max(num_rounds, _write(exchange, number, move))
        exchange.num_rounds[number] = num_rounds
    return exchange


class _Move(NamedTuple):
    """What one shard sends to another at one bit: places of the sender and of the receiver."""

    sender: int
    receiver: int
    lanes: list[tuple[int, int]]
    blocks: list[tuple[int, int]]


def _even_out(parts: list[_Part], a: int, b: int, old: Level, new: Level) -> _Move:
    """Moves chunks from the fuller of two shards to the other; an odd one stays with `a`."""
    more, less = (a, b) if parts[a].num_chunks >= parts[b].num_chunks else (b, a)
    sender, receiver = parts[more], parts[less]
    move = _Move(more, less, [], [])
    # Places that are free before the first round: what the sender has sent is not received into.
    free_lanes, free_blocks = receiver.free_lanes(), receiver.free_blocks()
    most_lanes, most_blocks = (size * MAX_ROUNDS for size in round_sizes(old, new))
    while sender.num_chunks > receiver.num_chunks:
        # ---- The chunk that fills the receiver's blocks best, needs no copy of its prompt there,
        # and is the smallest.
        best = None
        for prompt in sender.rollouts:
            size = sender.last_chunk(prompt)
            has = receiver.rollouts.get(prompt, ())
            grows = -(-(len(has) + size) // new.lanes_per_block) - receiver.chunks(prompt)
            cost = (grows, prompt not in receiver.prompts, size, prompt)
            if best is None or cost < best:
                best = cost
        assert best is not None
        grows, is_new, size, prompt = best
        difference = sender.num_chunks - receiver.num_chunks
        if grows and (difference < 2 and not (difference == 1 and more == b)):
            break
        if (
            len(move.lanes) + size > most_lanes
            or len(move.blocks) + is_new > most_blocks
            or size > len(free_lanes)
            or is_new > len(free_blocks)
        ):
            break
        # ---- Move it.
        if is_new:
            place = free_blocks.pop()
            move.blocks.append((sender.prompts[prompt], place))
            receiver.prompts[prompt] = place
        rollouts = sender.rollouts[prompt]
        chunk, sender.rollouts[prompt] = rollouts[-size:], rollouts[:-size]
        if not sender.rollouts[prompt]:
            del sender.rollouts[prompt], sender.prompts[prompt]
        arrived = []
        for rollout, place in chunk:
            there = free_lanes.pop()
            move.lanes.append((place, there))
            arrived.append((rollout, there))
        receiver.rollouts[prompt] = sorted([*receiver.rollouts.get(prompt, ()), *arrived])
        sender.num_chunks -= 1
        receiver.num_chunks += grows
    return move


def _write(exchange: Exchange, number: int, move: _Move) -> int:
    """Puts a move into the rounds of the bit with this number; returns how many it takes."""
    first = number * MAX_ROUNDS
    num_rounds = 0
    for pairs, out, into in (
        (move.lanes, exchange.lanes_out, exchange.lanes_in),
        (move.blocks, exchange.blocks_out, exchange.blocks_in),
    ):
        size = out.shape[-1]
        for index, (source, target) in enumerate(pairs):
            out[move.sender, first + index // size, index % size] = source
            into[move.receiver, first + index // size, index % size] = target
        num_rounds = max(num_rounds, -(-len(pairs) // size))
    return num_rounds
