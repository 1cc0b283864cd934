"""Rows of batch arrays that other shards need: `take`, a gather by index over the whole mesh.

A batch array [B, ...] is split over prompts: each shard has B / S rows of it. The learner computes
some rows on other shards than their own (learner/blocks.py). Of a plain x[index] the compiler would
not know which few rows a shard needs, and would send all B of them to every shard.
"""

import functools
from typing import TypeVar

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
    (axes,) = split
    # On each device, with its own rows only.
    return jax.shard_map(
        functools.partial(_take_on_shard, axes, num_batch_shards(mesh)),
        mesh=mesh,
        in_specs=(split, PartitionSpec()),
        out_specs=split,
        check_vma=False,
    )(tree, index)


def _take_on_shard(axes: tuple[str, ...], num_shards: int, tree: _Tree, index: Array) -> _Tree:
    """A shard's N / S rows of the result, from its B / S rows of the arrays.

    Args:
      axes: of the mesh, those that rows are split over.
    """
    shard = jax.lax.axis_index(axes)
    num_rows = len(jax.tree.leaves(tree)[0])  # B / S
    # Every device sees the whole index, so all of them come to the same answer.
    home = jnp.repeat(jnp.arange(num_shards), len(index) // num_shards)
    is_at_home = (index // num_rows == home).all()
    own = index - shard * num_rows  # which of this shard's rows; outside of [0, B / S): another's

    def stay(tree: _Tree) -> _Tree:
        mine = own.reshape(num_shards, -1)[shard]
        return jax.tree.map(lambda x: x[mine], tree)

    # One cond around all arrays: where no row moves, nothing is sent.
    return jax.lax.cond(is_at_home, stay, functools.partial(_exchange, axes, own), tree)


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
