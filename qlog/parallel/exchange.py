"""Rows of batch arrays for other shards: `take`, a gather over the whole mesh, and back: `add`.

A batch array [B, ...] is split over prompts: each shard has B / S rows of it. The learner computes
some rows on other shards than their own (learner/blocks.py). Of a plain x[index] the compiler would
not know which few rows a shard needs, and would send all B of them to every shard.
"""

import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from qlog.parallel.sharding import batch_sharding, num_batch_shards

_Tree = TypeVar("_Tree")  # a pytree of arrays


def take(mesh: Mesh | None, tree: _Tree, index: Array) -> _Tree:
    """Inside jit: x[index] of each array x of `tree`, split over prompts as x is.

    Values are copied, never computed: floats, infinities and NaNs come out as they were, except
    that -0.0 becomes 0.0.

    Args:
      tree: arrays [B, ...] of numbers or bools, split over data and fsdp and over nothing else.
      index: int32 [N], rows of the whole batch, in any order, also repeated. N is a multiple of the
        number of shards, S. Every process gives the same.

    Returns:
      Arrays [N, ...]; the shards have N / S consecutive rows each.
    """
    if mesh is None or num_batch_shards(mesh) == 1:
        return jax.tree.map(lambda x: x[index], tree)
    split = batch_sharding(mesh).spec
    # On each device, with its own rows only.
    return jax.shard_map(
        functools.partial(_take_on_shard, _Place.of(mesh)),
        mesh=mesh,
        in_specs=(split, PartitionSpec()),
        out_specs=split,
        check_vma=False,
    )(tree, index)


def add(mesh: Mesh | None, total: Array, rows: Array, index: Array) -> Array:
    """Inside jit: total.at[index].add(rows), the way back of `take`.

    Args:
      total: [B, ...], split as `take` has it.
      rows: [N, ...], split in the same way.
      index: int32 [N], to which row of `total` each of them is added.
    """
    if mesh is None or num_batch_shards(mesh) == 1:
        return total.at[index].add(rows)
    split = batch_sharding(mesh).spec
    return jax.shard_map(
        functools.partial(_add_on_shard, _Place.of(mesh)),
        mesh=mesh,
        in_specs=(split, split, PartitionSpec()),
        out_specs=split,
        check_vma=False,
    )(total, rows, index)


# ---- On one device ----


class _Place(NamedTuple):
    """What a device knows of the mesh."""

    axes: tuple[str, ...]  # those that rows are split over
    num_shards: int  # S

    @classmethod
    def of(cls, mesh: Mesh) -> "_Place":
        (axes,) = batch_sharding(mesh).spec
        return cls(axes, num_batch_shards(mesh))

    def own(self, index: Array, num_rows: int) -> Array:
        """index [N] as rows of this shard; outside of [0, num_rows): rows of another one."""
        return index - jax.lax.axis_index(self.axes) * num_rows

    def part(self, x: Array) -> Array:
        """x [N, ...] -> [N / S, ...]: what this shard has of it."""
        return x.reshape(self.num_shards, -1, *x.shape[1:])[jax.lax.axis_index(self.axes)]

    def is_at_home(self, index: Array, num_rows: int) -> Array:
        """bool: the rows that each shard has, or wants, are its own. The same on every device."""
        home = jnp.repeat(jnp.arange(self.num_shards), len(index) // self.num_shards)
        return (index // num_rows == home).all()


def _take_on_shard(place: _Place, tree: _Tree, index: Array) -> _Tree:
    """A shard's N / S rows of the result, from its B / S rows of the arrays."""
    num_rows = len(jax.tree.leaves(tree)[0])
    own = place.own(index, num_rows)
    stay = lambda tree: jax.tree.map(lambda x: x[place.part(own)], tree)
    # One cond around all arrays: where no row moves, nothing is sent.
    return jax.lax.cond(
        place.is_at_home(index, num_rows), stay, functools.partial(_exchange, place.axes, own), tree
    )


def _add_on_shard(place: _Place, total: Array, rows: Array, index: Array) -> Array:
    """A shard's B / S rows of the total, from its N / S rows of what is added."""
    own = place.own(index, len(total))
    stay = lambda rows: total.at[place.part(own)].add(rows)

    def gather(rows: Array) -> Array:
        """Every shard sees all N rows for a moment, and adds its own ones."""
        rows = jax.lax.all_gather(rows, place.axes, tiled=True)
        # A negative index would count from the end: row B / S does not exist, and is dropped.
        target = jnp.where(own < 0, len(total), own)
        return total.at[target].add(rows, mode="drop")

    return jax.lax.cond(place.is_at_home(index, len(total)), stay, gather, rows)


def _exchange(axes: tuple[str, ...], own: Array, tree: _Tree) -> _Tree:
    """Each shard lays its rows where they go, zeros elsewhere: the sum over shards is the result.

    A reduce-scatter makes the sums, and leaves each shard its part of them. A row comes from one
    shard only, so that nothing is rounded. For a moment a shard has N rows of an array: a prompt
    needs few bytes, a number for each token of its rollouts.
    """

    def exchange(x: Array) -> Array:
        is_mine = (own >= 0) & (own < len(x))
        rows = x[jnp.clip(own, 0, len(x) - 1)]  # [N, ...]
        # `where` and not a product: 0 * NaN is NaN.
        rows = jnp.where(is_mine.reshape(-1, *[1] * (x.ndim - 1)), rows, 0)
        # Bools have no sum; a byte holds them.
        numbers = rows.astype(jnp.int8) if x.dtype == bool else rows
        summed = jax.lax.psum_scatter(numbers, axes, scatter_dimension=0, tiled=True)
        return summed.astype(x.dtype)

    return jax.tree.map(exchange, tree)
