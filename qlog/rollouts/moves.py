"""Pools of lanes, their moves to other sizes and other shards, and rollouts held by the host.

What is moved are caches, most of a device's memory. They move one by one, and each old one is
deleted before the next is made: at most one cache is there twice, never two whole pools. In one
program for all of them XLA would keep every input until the end.
"""

import collections
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from qlog import models
from qlog.parallel import batch_placement, sharding
from qlog.records import Rollouts
from qlog.rollouts.balance import MAX_ROUNDS, Plan, Shards
from qlog.rollouts.pool import NO_ROLLOUT, Level


class Pool(NamedTuple):
    """Rollouts under way: N blocks of m lanes. The lanes of a block belong to one prompt."""

    step: Array  # int32 scalar, tokens made so far in every lane
    rollout_ids: Array  # int32 [N, m], b * M + m of the lane's rollout, or NO_ROLLOUT
    last: Array  # int32 [N, m], the token to feed next
    closing_at: Array  # int32 [N, m], step at which the forced closing begins
    done: Array  # bool [N, m], True in empty lanes
    keys: Array  # PRNG keys [N, m], one per (seed, training step, prompt, rollout)
    rollouts: Rollouts  # [N, m, ...], what the lanes have made so far
    prefix: models.Prefix  # the prompts' caches, N copies
    suffix: models.Suffix  # the rollouts' caches, [N, K, m, S, C] per layer


# ---- Moves on the devices ----


class Route(NamedTuple):
    """Where rollouts, or copies of prompts, go: a `balance.Exchange` and what follows, on devices.

    All but `num_rounds` are split over shards.
    """

    out: Array  # int32 [shards, D * T, c], places in the work space that a shard sends
    into: Array  # int32 [shards, D * T, c], places where it puts what it receives
    index: Array  # int32 [N'] or [N', m'], the place of each new block or lane in the work space
    num_rounds: Array  # int32 [D]


def move(mesh: Mesh | None, pool: Pool, plan: Plan, shards: Shards, slots: int) -> Pool:
    """The pool after `plan`; the caches of `pool` are deleted.

    Args:
      slots: of the new pool's caches.
    """
    exchange = plan.exchange
    lanes, blocks, rollout_ids = batch_placement.put_batch(
        mesh,
        (
            (exchange.lanes_out, exchange.lanes_in, plan.lane),
            (exchange.blocks_out, exchange.blocks_in, plan.parent),
            plan.rollout_ids,
        ),
    )
    num_rounds = batch_placement.put_everywhere(mesh, exchange.num_rounds)
    to_lanes, to_blocks = (
        Route(out, into, index, num_rounds) for out, into, index in (lanes, blocks)
    )

    def moved(cache: Array, take: Callable[..., Array], *arguments: Any) -> Array:
        new = take(mesh, shards, *arguments, cache)
        cache.delete()  # its memory is free as soon as `take` has run; the host does not wait
        return new

    # Each array by itself: of a quantised cache the numbers, then their scales.
    layers = jax.tree.map(lambda x: moved(x, take_lanes, slots, to_lanes), pool.suffix.layers)
    keys, values = jax.tree.map(
        lambda x: moved(x, take_blocks, to_blocks), (pool.prefix.keys, pool.prefix.values)
    )
    prefix = models.Prefix(keys, values, take_blocks(mesh, shards, to_blocks, pool.prefix.lengths))
    # The rest is small, one program for all of it.
    per_lane = (pool.last, pool.closing_at, pool.done, pool.keys, pool.rollouts)
    last, closing_at, done, lane_keys, rollouts = _take_per_lane(mesh, shards, to_lanes, per_lane)
    return Pool(
        step=pool.step,
        rollout_ids=rollout_ids,
        last=last,
        closing_at=closing_at,
        # An empty lane has a copy of the shard's first lane, which may go on.
        done=_or_empty(done, rollout_ids),
        keys=lane_keys,
        rollouts=rollouts,
        prefix=prefix,
        suffix=pool.suffix._replace(layers=layers),
    )


def _exchanged(
    mesh: Mesh | None, shards: Shards, work: Array, out: Array, into: Array, num_rounds: Array
) -> Array:
    """A shard's work space [places, ...] after the rounds of a `balance.Exchange`."""
    if not shards.bits:
        return work
    # One more place, behind the others: for what is received and not wanted.
    work = jnp.concatenate([work, jnp.zeros_like(work[:1])])
    for number, bit in enumerate(shards.bits):
        first, pairs = number * MAX_ROUNDS, tuple(shards.pairs(bit))

        def one_round(index: Array, work: Array, pairs: Any = pairs) -> Array:
            # Row by row, as slices: XLA copies a whole array for a gather or scatter of large rows.
            sent = [jax.lax.dynamic_index_in_dim(work, place) for place in out[0, index]]
            received = sharding.exchange(mesh, jnp.concatenate(sent), pairs)
            for row, place in enumerate(into[0, index]):
                rows = received[row : row + 1]
                work = jax.lax.dynamic_update_slice_in_dim(work, rows, place, axis=0)
            return work

        with jax.named_scope("exchange_rounds"):  # qlog.aot finds the loop by this name
            work = jax.lax.fori_loop(first, first + num_rounds[number], one_round, work)
    return work


@functools.partial(jax.jit, static_argnames=("mesh", "shards", "slots"))
def take_lanes(mesh: Mesh | None, shards: Shards, slots: int, route: Route, cache: Array) -> Array:
    """[N, K, m, S, C] -> [N', K, m', `slots`, C]; C is 1 of scales."""

    def take(x: Array, out: Array, into: Array, index: Array, num_rounds: Array) -> Array:
        lanes = x.transpose(0, 2, 1, 3, 4).reshape(-1, x.shape[1], *x.shape[3:])  # [N m, K, S, C]
        lanes = _exchanged(mesh, shards, lanes, out, into, num_rounds)
        taken = lanes[index].transpose(0, 2, 1, 3, 4)
        more = max(0, slots - x.shape[3])
        return jnp.pad(taken[..., :slots, :], ((0, 0),) * 3 + ((0, more), (0, 0)))

    return _shard_map(mesh, take, cache, route)


@functools.partial(jax.jit, static_argnames=("mesh", "shards"))
def take_blocks(mesh: Mesh | None, shards: Shards, route: Route, blocks: Array) -> Array:
    """[N, ...] -> [N', ...]."""

    def take(x: Array, out: Array, into: Array, index: Array, num_rounds: Array) -> Array:
        # The work space has room for the old blocks, and for as many as there will be.
        space = jnp.zeros((index.shape[0], *x.shape[1:]), x.dtype)
        work = jnp.concatenate([x, space])
        return _exchanged(mesh, shards, work, out, into, num_rounds)[index]

    return _shard_map(mesh, take, blocks, route)


@functools.partial(jax.jit, static_argnames=("mesh", "shards"))
def _take_per_lane(mesh: Mesh | None, shards: Shards, route: Route, tree: Any) -> Any:
    """Arrays [N, m, ...] -> [N', m', ...]."""

    def take(x: Array, out: Array, into: Array, index: Array, num_rounds: Array) -> Array:
        lanes = x.reshape(-1, *x.shape[2:])
        return _exchanged(mesh, shards, lanes, out, into, num_rounds)[index]

    def moved(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return _shard_map(mesh, take, x, route)
        # Keys are sent as the numbers that they are made of.
        data = _shard_map(mesh, take, jax.random.key_data(x), route)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))

    return jax.tree.map(moved, tree)


def _shard_map(mesh: Mesh | None, take: Callable[..., Array], x: Array, route: Route) -> Array:
    return sharding.shard_map_batch(
        mesh, take, x, route.out, route.into, route.index, everywhere=(route.num_rounds,)
    )


@jax.jit
def _or_empty(done: Array, rollout_ids: Array) -> Array:
    return done | (rollout_ids == NO_ROLLOUT)


# ---- Rollouts in the host's memory ----


class _Parts(NamedTuple):
    """The arrays of a pool that are held, by what their first dimensions are."""

    caches: Any  # [N, K, m, S, C], or [N, K, m, S, 1] of scales
    lanes: Any  # [N, m, ...]
    blocks: Any  # [N, ...]

    @classmethod
    def of(cls, pool: Pool) -> "_Parts":
        keys = jax.random.key_data(pool.keys)
        lanes = (pool.last, pool.closing_at, keys, pool.rollouts)
        return cls(pool.suffix.layers, lanes, pool.prefix)


def _index(kind: str, blocks: np.ndarray, lanes: np.ndarray, step: int) -> tuple:
    """Where the entries of lanes, or of blocks, are in an array of this kind."""
    if kind == "caches":
        return blocks, slice(None), lanes, slice(step)  # the slots that are filled
    return (blocks, lanes) if kind == "lanes" else (blocks,)


class Held:
    """Rollouts in the host's memory, each on the processes that have its shard.

    They go back to the devices that they came from.
    """

    def __init__(self, mesh: Mesh | None, keys: Array):
        """Of none; `keys`: PRNG keys [B, M] of all rollouts. An id is prompt * M + number."""
        self._mesh, self._num_rollouts = mesh, keys.shape[1]
        self._key_kind = jax.random.key_impl(keys)
        # By device and id of the rollout, or number of the prompt: what the device has of it, an
        # array for each leaf. They are copies, so that each is freed by itself.
        self._rollouts: dict[tuple[Any, int], list[np.ndarray]] = {}
        self._prompts: dict[tuple[Any, int], list[np.ndarray]] = {}

    @property
    def num_bytes(self) -> int:
        """Of host memory."""
        return sum(
            array.nbytes
            for kept in (*self._rollouts.values(), *self._prompts.values())
            for array in kept
        )

    def add(self, pool: Pool, rollout_ids: np.ndarray, held: np.ndarray, step: int) -> None:
        """Copies rollouts of a pool, and their prompts.

        Args:
          rollout_ids: int32 [N, m] of the pool.
          held: bool [N, m], lanes to copy.
          step: of the pool: so many slots of its caches are filled.
        """
        arrays = collections.defaultdict(list)  # by device and whether they are of prompts
        # One array after the other: as a whole it is on the host only for a moment.
        for kind, tree in zip(_Parts._fields, _Parts.of(pool), strict=True):
            for leaf in jax.tree.leaves(tree):
                for device, here, local in batch_placement.local_parts(leaf):
                    blocks, lanes = np.nonzero(held[here])
                    if kind == "blocks":
                        blocks = np.unique(blocks)
                    some = local[_index(kind, blocks, lanes, step)]
                    arrays[device, kind == "blocks"].append(some)
        for device, here, _ in batch_placement.local_parts(pool.last):
            ids = rollout_ids[here]
            for index, rollout in enumerate(ids[held[here]].tolist()):
                kept = [entries[index].copy() for entries in arrays[device, False]]
                self._rollouts[device, rollout] = kept
            # A prompt may have several blocks with equal caches.
            for index, block in enumerate(np.flatnonzero(held[here].any(1))):
                prompt = int(ids[block, 0]) // self._num_rollouts
                kept = [entries[index].copy() for entries in arrays[device, True]]
                self._prompts[device, prompt] = kept

    def pool(self, like: Pool, rollout_ids: np.ndarray, level: Level, step: int) -> Pool:
        """A pool of rollouts that were held at `step`.

        Args:
          like: shapes of any pool, as `jax.eval_shape` gives them.
          rollout_ids: int32 [N, m], NO_ROLLOUT in empty lanes.
          level: the pool's size.
        """
        parts = []
        leaf_numbers = {False: itertools.count(), True: itertools.count()}
        for kind, tree in zip(_Parts._fields, jax.eval_shape(_Parts.of, like), strict=True):
            leaves, structure = jax.tree.flatten(tree)
            made = [
                self._put(
                    kind, next(leaf_numbers[kind == "blocks"]), leaf, rollout_ids, level, step
                )
                for leaf in leaves
            ]
            parts.append(jax.tree.unflatten(structure, made))
        gone = set(rollout_ids.ravel().tolist())
        self._rollouts = {place: k for place, k in self._rollouts.items() if place[1] not in gone}
        still = {(d, rollout // self._num_rollouts) for d, rollout in self._rollouts}
        self._prompts = {place: kept for place, kept in self._prompts.items() if place in still}
        layers, (last, closing_at, keys, rollouts), prefix = parts
        ids = batch_placement.put_batch(self._mesh, rollout_ids)
        return Pool(
            step=batch_placement.put_everywhere(self._mesh, np.int32(step)),
            rollout_ids=ids,
            last=last,
            closing_at=closing_at,
            done=batch_placement.put_batch(self._mesh, rollout_ids == NO_ROLLOUT),
            keys=jax.random.wrap_key_data(keys, impl=self._key_kind),
            rollouts=rollouts,
            prefix=prefix,
            suffix=like.suffix._replace(
                layers=layers, lengths=batch_placement.put_everywhere(self._mesh, np.int32(0))
            ),
        )

    def _put(
        self, kind: str, leaf_number: int, leaf: Any, ids: np.ndarray, level: Level, step: int
    ) -> Array:
        """One array of a pool, put together on the host for each device of this process."""
        num_blocks, num_lanes = ids.shape
        shape = (num_blocks, *leaf.shape[1:])
        if kind == "lanes":
            shape = (num_blocks, num_lanes, *leaf.shape[2:])
        elif kind == "caches":
            shape = (num_blocks, leaf.shape[1], num_lanes, level.slots, leaf.shape[4])

        def fill(device: Any, first: int, local: np.ndarray) -> None:
            here = ids[first : first + len(local)]
            blocks, lanes = np.nonzero(here != NO_ROLLOUT)
            if kind == "blocks":
                blocks = np.unique(blocks)
                prompts = here[blocks, 0] // self._num_rollouts
                kept = [self._prompts[device, prompt] for prompt in prompts.tolist()]
            else:
                kept = [self._rollouts[device, rollout] for rollout in here[blocks, lanes].tolist()]
            if kept:
                entries = np.stack([arrays[leaf_number] for arrays in kept])
                local[_index(kind, blocks, lanes, step)] = entries

        return batch_placement.put_parts(self._mesh, shape, leaf.dtype, fill)
