"""In which order rollouts are decoded, and when a pool shrinks: what keeps all lanes busy.

All lanes of a pool are at the same step. Waves of prompts are decoded one after the other, and

  - a pool that is too large for what goes on shrinks, shards that have more give to those that have
    less (`balance.py`);
  - a wave has more prompts than fit to the last slot (`pool.levels`). Most rollouts are done before
    their slots are spent, and the others then get the slots of those that are done;
  - where there are more waves, rollouts that still go on at step `Schedule.hold_at` are held in the
    host's memory. Those of several waves are at the same step: they go on together, in one full
    pool, while the tail of each wave by itself would leave most lanes empty. So a wave starts
    before the last one's tail is done;
  - rollouts that do not fit when slots are spent are held, too, and go on later. So nothing is lost
    in a step whose rollouts all fill their budgets, and no pool takes more memory than planned.

With 3 waves, held at step 4 of 8, time from left to right:

    wave 0   0 1 2 3 -
    wave 1             0 1 2 3 -
    wave 2                       0 1 2 3 -
    held                                   4 5 6 7

`run` knows no device: it drives a `Machine`. The sampler is one; `qlog.benchmark.balance` runs the
same schedule on lengths alone.
"""

import collections
import dataclasses
from typing import NamedTuple, Protocol

import numpy as np

from qlog import models
from qlog.rollouts import balance, pool
from qlog.rollouts.balance import Plan, Shards
from qlog.rollouts.pool import NO_ROLLOUT, Level, Shape

# Decode steps between two looks at which rollouts are done. At a look the host waits for the
# devices, and they then wait for the host. Between looks, lanes that are done cost as others do.
STEPS_PER_LOOK = 8
# A pool of held rollouts starts when it is filled so far; less only when no wave waits.
_ENOUGH = 3 / 4


class Machine(Protocol):
    """What decodes: has one pool at a time, whose lanes are at the same step."""

    def start(self, wave: int) -> None:
        """Makes the pool of a wave: its prompts' caches, all rollouts at step 0."""

    def decode(self, until: int) -> tuple[int, np.ndarray]:
        """Decodes up to step `until`; fewer steps when all rollouts are done before.

        Returns:
          The step that was reached, and bool [N, m], lanes whose rollout goes on.
        """
        ...

    def store(self) -> None:
        """Keeps what all lanes have; rollouts that go on are stored again later."""

    def move(self, plan: Plan, old: Level, new: Level) -> None:
        """Moves the pool's rollouts into one of another size."""

    def hold(self, rollout_ids: np.ndarray, held: np.ndarray, step: int) -> None:
        """Copies rollouts of the pool to the host's memory; the pool stays as it is.

        Args:
          rollout_ids: int32 [N, m], of all lanes.
          held: bool [N, m], lanes to copy.
          step: that the pool is at.
        """

    def resume(self, rollout_ids: np.ndarray, level: Level, step: int) -> None:
        """Makes a pool of rollouts that were held at `step`."""


class Stretch(NamedTuple):
    """Steps that a pool was decoded for at one size."""

    level: Level
    first: int
    last: int  # the step after the last one


class Moved(NamedTuple):
    """A move of a pool to another size."""

    step: int
    old: Level
    new: Level
    sent: tuple[int, int]  # rollouts and prompts, by each shard, empty places included
    rounds: int  # of the exchange, over all bits


@dataclasses.dataclass
class Work:
    """What a schedule executed, on every shard the same."""

    num_shards: int
    stretches: list[Stretch] = dataclasses.field(default_factory=list)
    moves: list[Moved] = dataclasses.field(default_factory=list)
    held: int = 0  # rollouts times how often they were held, on all shards together
    # Slots of the pools that were copied to the host and back, empty ones included
    host_slots: int = 0

    @property
    def lane_steps(self) -> int:
        """Steps times lanes, on all shards together."""
        of_shard = sum((last - first) * level.num_lanes for level, first, last in self.stretches)
        return self.num_shards * of_shard


class Schedule:
    """The sizes of pools and the waves of a call; it has no state of a run.

    Attributes:
      sizes: of pools, the first one that of a wave.
      num_waves: parts of a shard's prompts, part i of n with prompts i, i + n, i + 2n, ...
      hold_at: step at which rollouts of different waves meet; 0 means that they do not.
    """

    def __init__(self, shape: Shape, shards: Shards, shrink: bool = True):
        self.shape, self.shards = shape, shards
        if shrink:
            self.sizes, self.full = pool.sizes(shape)
        else:
            in_memory = min(shape.prompts, shape.prompts_in_memory)
            self.sizes = (Level(in_memory, shape.rollouts, shape.slots),)
            self.full = self.sizes
        start = self.sizes[0]
        self.num_waves = shape.prompts // start.num_blocks
        self.hold_at = 0
        if self.num_waves > 1 and len(self.sizes) > 1:
            half = shape.slots // 2 // shape.tile * shape.tile
            self.hold_at = start.slots if start.slots < shape.slots else half

    @property
    def num_prompts(self) -> int:
        """On all shards together, B."""
        return self.shape.prompts * self.shards.number

    def rollout_ids(self, wave: int) -> np.ndarray:
        """int32 [N, M] of a wave's first pool: b * M + m."""
        prompts = np.arange(self.num_prompts).reshape(-1, self.num_waves)[:, wave]
        rollouts = np.arange(self.shape.rollouts)
        return (prompts[:, None] * self.shape.rollouts + rollouts).astype(np.int32)

    def transitions(self) -> list[tuple[Level, Level]]:
        """All moves that a run may make."""
        pairs = list(zip(self.sizes, self.sizes[1:], strict=False))
        for full in self.full:
            # When slots are spent, what fits a pool that has them all goes on there.
            pairs += [(size, full) for size in self.sizes if size.slots < full.slots]
            if full not in self.sizes:
                pairs += [(full, size) for size in self.smaller(full)[:1]]
        return list(dict.fromkeys(pairs))

    @property
    def most_lanes(self) -> int:
        """Lanes on all shards that can be decoded to their last step together."""
        return self.shards.number * max(level.num_lanes for level in self.full)

    def smaller(self, level: Level) -> tuple[Level, ...]:
        """The sizes that a pool of this size may shrink to."""
        return tuple(
            size
            for size in self.sizes
            if size.num_lanes < level.num_lanes and size.slots >= level.slots
        )


def run(schedule: Schedule, machine: Machine, steps_per_look: int = STEPS_PER_LOOK) -> Work:
    """Decodes all rollouts of a schedule."""
    runner = _Runner(schedule, machine, steps_per_look)
    waiting = list(range(schedule.num_waves))
    while waiting or runner.held:
        if waiting and not runner.has_enough_held():
            runner.start(waiting.pop(0))
        else:
            runner.resume()
        runner.decode(is_last=not waiting)
    return runner.work


class _Runner:
    """The state of `run`: the pool that is decoded, and what is held."""

    def __init__(self, schedule: Schedule, machine: Machine, steps_per_look: int):
        self._schedule, self._machine, self._steps_per_look = schedule, machine, steps_per_look
        self._shards = schedule.shards
        self._level, self._step = schedule.sizes[0], 0
        self._ids = np.empty(0)  # int32 [N, m]
        # By step, then by shard: ids of the rollouts that are held.
        self.held: dict[int, list[list[int]]] = {}
        self.work = Work(self._shards.number)

    # ---- Pools begin

    def start(self, wave: int) -> None:
        self._level, self._step = self._schedule.sizes[0], 0
        self._ids = self._schedule.rollout_ids(wave)
        self._machine.start(wave)

    def has_enough_held(self) -> bool:
        """Whether held rollouts fill a pool."""
        enough = _ENOUGH * self._schedule.most_lanes
        return any(sum(map(len, held)) >= enough for held in self.held.values())

    def resume(self) -> None:
        """A pool of those that were held at one step: as many as fit."""
        step = max(self.held, key=lambda step: sum(map(len, self.held[step])))
        by_shard = self.held.pop(step)
        sizes = {size for full in self._schedule.full for size in self._schedule.smaller(full)}
        options = []
        for level in (*self._schedule.full, *sizes):
            seats = [_Seats.of(ids, level, self._shards.num_rollouts) for ids in by_shard]
            options.append((sum(len(its.left) for its in seats), level.num_lanes, level, seats))
        # The smallest pool that has room for all, or else for most.
        _, _, level, seats = min(options, key=lambda option: option[:2])
        if any(its.left for its in seats):
            self.held[step] = [its.left for its in seats]
        self._level, self._step = level, step
        self._ids = np.concatenate([its.rollout_ids for its in seats])
        self._machine.resume(self._ids, level, step)
        self._count_copy()

    # ---- A pool is decoded

    def decode(self, is_last: bool) -> None:
        """Until all rollouts of the pool are done or held.

        Args:
          is_last: no wave waits.
        """
        while True:
            going = self._decode_to_the_next_look()
            if not going.any():
                self._machine.store()
                return
            going = self._shrink(going)
            if self._step == self._schedule.hold_at and self._meets(going, is_last):
                self._machine.store()
                self._hold(going)
                return
            if self._step == self._level.slots:
                self._make_room(going)

    def _decode_to_the_next_look(self) -> np.ndarray:
        until = min(self._step + self._steps_per_look, self._level.slots)
        if self._step < self._schedule.hold_at:
            until = min(until, self._schedule.hold_at)
        reached, going = self._machine.decode(until)
        stretches = self.work.stretches
        if stretches and stretches[-1][::2] == (self._level, self._step):
            stretches[-1] = stretches[-1]._replace(last=reached)
        else:
            stretches.append(Stretch(self._level, self._step, reached))
        self._step = until
        return going

    def _shrink(self, going: np.ndarray) -> np.ndarray:
        """Moves to the smallest pool that holds what goes on, size by size.

        Never past one: so there is one program per size, and a rehearsal that visits each size once
        has compiled them all.
        """
        for new in self._schedule.smaller(self._level):
            if going.sum() > new.num_lanes * self._shards.number:
                break
            plan = balance.regroup(self._ids, going, self._level, new, self._shards)
            if plan is None:
                break
            going = self._move(plan, new)
        return going

    def _move(self, plan: Plan, new: Level) -> np.ndarray:
        # All caches are scored before the move, since those of rollouts that are done do not come
        # along. What goes on is scored again later.
        self._machine.store()
        self._machine.move(plan, self._level, new)
        exchange = plan.exchange
        rounds = int(exchange.num_rounds.sum())
        self.work.moves.append(Moved(self._step, self._level, new, exchange.sent, rounds))
        self._ids, self._level = plan.rollout_ids, new
        return self._ids != NO_ROLLOUT

    def _meets(self, going: np.ndarray, is_last: bool) -> bool:
        """Whether this pool's rollouts go on together with others, later."""
        # A pool that is full by itself goes on: holding would cost two copies and gain nothing.
        is_full = going.sum() >= _ENOUGH * self._schedule.most_lanes
        return self._step in self.held or not (is_last or is_full)

    def _make_room(self, going: np.ndarray) -> None:
        """Slots are spent: what fits a pool with more of them goes on, the rest is held."""
        options = [(*self._fitting(going, new), new) for new in self._schedule.full]
        going_on, plan, new = max(options, key=lambda option: option[0].sum())
        held = going & ~going_on
        if held.any():
            self._hold(held)
        self._move(plan, new)

    def _fitting(self, going: np.ndarray, new: Level) -> tuple[np.ndarray, Plan]:
        """The rollouts that go on in a pool of size `new`, bool [N, m], and their move."""
        for evenly in (True, False):
            going_on = _share(self._ids, going, new, self._shards, evenly)
            plan = balance.regroup(self._ids, going_on, self._level, new, self._shards)
            if plan is not None:
                return going_on, plan
        raise AssertionError("each shard has as many blocks as it keeps")

    def _hold(self, held: np.ndarray) -> None:
        self._machine.hold(self._ids, held, self._step)
        by_shard = self.held.setdefault(self._step, [[] for _ in range(self._shards.number)])
        parts = zip(
            by_shard,
            self._ids.reshape(self._shards.number, -1),
            held.reshape(self._shards.number, -1),
            strict=True,
        )
        for those, ids, is_held in parts:
            those += ids[is_held].tolist()
        self.work.held += int(held.sum())
        self._count_copy()

    def _count_copy(self) -> None:
        # Arrays are copied whole.
        self.work.host_slots += self._shards.number * self._schedule.shape.size(self._level)


class _Seats(NamedTuple):
    """A shard's held rollouts in the blocks of a pool."""

    rollout_ids: np.ndarray  # int32 [N, m], NO_ROLLOUT in empty lanes
    left: list[int]  # ids of those that found no room

    @classmethod
    def of(cls, ids: list[int], level: Level, num_rollouts: int) -> "_Seats":
        rollout_ids = np.full((level.num_blocks, level.lanes_per_block), NO_ROLLOUT, np.int32)
        by_prompt = collections.defaultdict(list)
        for rollout in sorted(ids):
            by_prompt[rollout // num_rollouts].append(rollout)
        left, block = [], 0
        for rollouts in sorted(by_prompt.values(), key=len, reverse=True):
            for first in range(0, len(rollouts), level.lanes_per_block):
                some = rollouts[first : first + level.lanes_per_block]
                if block < level.num_blocks:
                    rollout_ids[block, : len(some)] = some
                else:
                    left += some
                block += 1
        return cls(rollout_ids, left)


def _share(
    rollout_ids: np.ndarray, going: np.ndarray, level: Level, shards: Shards, evenly: bool
) -> np.ndarray:
    """bool [N, m]: of the rollouts that go on, as many as pools of size `level` have room for.

    Args:
      evenly: all shards give up the same share of theirs, so that what is held is even. False: each
        keeps as much as fits itself.
    """
    shape = (shards.number, -1, rollout_ids.shape[1])
    chunks = []
    for ids, kept in zip(rollout_ids.reshape(shape), going.reshape(shape), strict=True):
        found = pool.by_prompt(ids, kept, shards.num_rollouts)
        lanes = level.lanes_per_block
        # Full ones first: they fill the blocks that there are.
        of_shard = [its[k : k + lanes] for its in found.values() for k in range(0, len(its), lanes)]
        chunks.append(sorted(of_shard, key=len, reverse=True))
    total, room = sum(map(len, chunks)), shards.number * level.num_blocks
    going_on = np.zeros((shards.number, rollout_ids.size // shards.number), bool)
    for shard, its in enumerate(chunks):
        share = len(its) * min(room, total) // max(1, total) if evenly else level.num_blocks
        going_on[shard, [place for chunk in its[:share] for _, place in chunk]] = True
    return going_on.reshape(going.shape)


# ---- The same on lengths alone ----


class Planted:
    """The `schedule.Machine` of rollouts whose lengths are known; computes nothing.

    Attributes:
      rollout_ids: int32 [N, m] of the pool.
      step: that the pool is at.
    """

    def __init__(self, plan: Schedule, lengths: np.ndarray):
        """`lengths`: int [B, M], at least 1."""
        self._plan, self._lengths = plan, lengths.ravel()
        self.rollout_ids, self.step = np.empty((0, 0), np.int32), 0

    def start(self, wave: int) -> None:
        self.resume(self._plan.rollout_ids(wave), self._plan.sizes[0], 0)

    def decode(self, until: int) -> tuple[int, np.ndarray]:
        ids = np.minimum(self.rollout_ids, self._lengths.size - 1)
        ends = np.where(self.rollout_ids == NO_ROLLOUT, 0, self._lengths[ids])
        reached = max(self.step, min(until, int(ends.max())))
        self.step = until
        return reached, ends > until

    def store(self) -> None:
        pass

    def move(self, plan: Plan, old: Level, new: Level) -> None:
        self.rollout_ids = plan.rollout_ids

    def hold(self, rollout_ids: np.ndarray, held: np.ndarray, step: int) -> None:
        pass

    def resume(self, rollout_ids: np.ndarray, level: Level, step: int) -> None:
        self.rollout_ids, self.step = rollout_ids, step


def planned_work(plan: Schedule, lengths: np.ndarray) -> Work:
    """What decoding rollouts of these lengths, int [B, M], would execute; host arithmetic."""
    return run(plan, Planted(plan, lengths))


def read_bytes(
    stretch: Stretch,
    config: models.DecoderConfig,
    prompt_tokens: int,
    itemsize: int,
    cache_itemsize: float,
) -> float:
    """What a shard reads in all steps of a stretch: weights, prompts and rollouts.

    Args:
      prompt_tokens: of each prompt.
      itemsize: bytes of a weight.
      cache_itemsize: bytes of a number of a key or a value.
    """
    level, *steps = stretch
    first, last = (
        models.flops.decode_need(
            config,
            level.num_blocks,
            level.lanes_per_block,
            prompt_tokens,
            step,
            itemsize,
            cache_itemsize,
        ).bytes
        for step in steps
    )
    return last - first
