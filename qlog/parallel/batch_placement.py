"""Which prompts of a batch are where: on which process, on which device, in which part of a step.

| where       | functions                                                                          |
|-------------|------------------------------------------------------------------------------------|
| on the host | `local_prompts`, `owned_prompts`: which prompts of a batch belong to this process  |
| outside jit | `put_*`: host -> devices; `local_batch`, `gather_to_host`: devices -> host         |
| both        | `every_nth`, `split`, `join`: parts of a batch with as many prompts of each device |

The mesh decides (`sharding.batch_sharding`). Every process reads all prompts of a batch, and puts
those on its devices that lie there.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlog.parallel.sharding import (
    AXES,
    batch_sharding,
    batch_sharding_of,
    constrain_replicated,
    replicated,
)

_Tree = TypeVar("_Tree")


# ---- Between host and devices ----


def put_batch(mesh: Mesh | None, tree: Any) -> Any:
    """Host arrays [B, ...], the whole batch on each process -> global arrays, prompts split.

    A process copies only the prompts that lie on its devices; its values of others are not read.
    """

    def put(x: np.ndarray) -> jax.Array:
        if mesh is None:
            return jax.device_put(x, may_alias=False)
        return jax.make_array_from_callback(x.shape, batch_sharding(mesh), lambda part: x[part])

    return jax.tree.map(put, tree)


def put_everywhere(mesh: Mesh | None, x: Any) -> jax.Array:
    """Host array, the same on each process -> global array, whole on each device."""
    x = np.asarray(x)
    if mesh is None:
        return jax.device_put(x, may_alias=False)
    return jax.make_array_from_callback(x.shape, replicated(mesh), lambda part: x[part])


def local_parts(x: jax.Array) -> Iterator[tuple[jax.Device, slice, np.ndarray]]:
    """Each device of this process, its prompts, and its part of a global array [B, ...]."""
    shards = x.addressable_shards
    for shard in shards:
        shard.data.copy_to_host_async()  # all at once, then they are waited for one by one
    for shard in shards:
        # An array keeps what it was copied to on the host for as long as it lives: this one is
        # gone at once.
        data = shard.data
        alone = jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data])
        yield shard.device, shard.index[0], np.asarray(alone)


def put_parts(
    mesh: Mesh | None,
    shape: tuple[int, ...],
    dtype: Any,
    fill: Callable[[jax.Device, int, np.ndarray], None],
) -> jax.Array:
    """A global array [B, ...] from parts that only the processes of their devices know.

    Args:
      shape: of the whole array; it is split as `sharding.batch_sharding_of` says.
      fill: called with a device of this process, the number of its first prompt, and zeros for its
        part, which it fills in.
    """
    if mesh is None:
        whole = np.zeros(shape, dtype)
        (device,) = jax.numpy.zeros(()).devices()
        fill(device, 0, whole)
        return jax.device_put(whole, may_alias=False)
    place = batch_sharding_of(mesh, jax.ShapeDtypeStruct(shape, dtype))
    parts = []
    for device, index in place.addressable_devices_indices_map(shape).items():
        local = np.zeros(place.shard_shape(shape), dtype)
        fill(device, index[0].start or 0, local)
        # Of its own memory: programs write into it.
        parts.append(jax.device_put(local, device, may_alias=False))
    return jax.make_array_from_single_device_arrays(shape, place, parts)


def put_per_device(mesh: Mesh | None, x: np.ndarray) -> jax.Array:
    """Host array [devices] -> global array [devices], one entry on each device.

    The host arrays may differ from process to process: a device has the entry of its own process.
    """
    if mesh is None:
        return jax.numpy.asarray(x)
    return jax.make_array_from_callback(x.shape, _per_device(mesh), lambda part: x[part])


def per_device_shape(mesh: Mesh, dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    """Shape and sharding of what `put_per_device` makes."""
    return jax.ShapeDtypeStruct((mesh.size,), dtype, sharding=_per_device(mesh))


def _per_device(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(AXES))


def gather_to_host(mesh: Mesh | None, tree: Any) -> Any:
    """Global arrays -> whole numpy arrays, on each process. Small ones; every process must call."""
    return jax.device_get(_replicate(tree, mesh))


@functools.partial(jax.jit, static_argnames=("mesh",))
def _replicate(tree: _Tree, mesh: Mesh | None) -> _Tree:
    return constrain_replicated(mesh, tree)


def local_batch(mesh: Mesh, tree: Any) -> Any:
    """The way back of `put_batch`: global arrays [B, ...] -> numpy arrays [n, ...] of the
    `local_prompts` of this process, in their order."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def collect(x: jax.Array) -> np.ndarray:
        # A tensor group has the same prompts on each of its devices: one copy of each start.
        shards = {s.index[0].start or 0: s.data for s in x.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    return jax.tree.map(collect, jax.device_put(tree, batch_sharding(mesh)))


# ---- Which prompts belong to this process ----


def local_prompts(mesh: Mesh, batch: int) -> np.ndarray:
    """int [n]: the prompts of a batch that lie on devices of this process, ascending.

    Where a tensor group spans processes, several of them have the same prompts; `owned_prompts`
    gives each prompt to one process.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch,))
    prompts = np.arange(batch)
    return np.unique(np.concatenate([prompts[index] for index in places.values()]))


def owned_prompts(mesh: Mesh, batch: int) -> np.ndarray:
    """int [n]: the prompts that this process answers for, in logs and results.

    Each prompt has one such process: the lowest of those that have it on their devices.
    """
    owner = np.full(batch, np.iinfo(int).max)
    for device, index in batch_sharding(mesh).devices_indices_map((batch,)).items():
        owner[index] = np.minimum(owner[index], device.process_index)
    return np.flatnonzero(owner == jax.process_index())


# ---- Parts of a batch: waves, updates and microbatches take some of its prompts at a time ----
#
# Part i of n has the prompts i, i + n, i + 2n, ... A device holds consecutive prompts, so each part
# has as many prompts of every device: no device waits, and nothing moves between them. The first
# B / n prompts would all lie on the first devices.


def _by_stride(x: jax.Array, num_parts: int) -> jax.Array:
    """[B, ...] -> [B / num_parts, num_parts, ...]."""
    return x.reshape(-1, num_parts, *x.shape[1:])


@functools.partial(jax.jit, static_argnames=("index", "num_parts"))
def every_nth(tree: _Tree, index: int, num_parts: int) -> _Tree:
    """[B, ...] -> [B / num_parts, ...]: part `index`, every num_parts-th prompt from there on."""
    return jax.tree.map(lambda x: _by_stride(x, num_parts)[:, index], tree)


def split(tree: _Tree, num_parts: int) -> _Tree:
    """Inside jit: [B, ...] -> [num_parts, B / num_parts, ...], all parts of `every_nth`."""
    return jax.tree.map(lambda x: jax.numpy.moveaxis(_by_stride(x, num_parts), 1, 0), tree)


def join(parts: _Tree) -> _Tree:
    """The inverse of `split`: [num_parts, B / num_parts, ...] -> [B, ...]."""
    join_one = lambda x: jax.numpy.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
    return jax.tree.map(join_one, parts)
