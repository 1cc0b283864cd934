"""One mesh, and where arrays live on it: rules outside the model."""

import collections
import functools
import math
import re
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qlog.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
_Tree = TypeVar("_Tree")  # a pytree of arrays; the result has the same structure
_BATCH = PartitionSpec(("data", "fsdp"))

# First match wins; the first axis of a layer's parameter is the layer. Optimizer moments carry
# the parameter's path inside their own, so the same rules place them.
PARAMETER_RULES = (
    (r"(un)?embed$", PartitionSpec("tensor", "fsdp")),
    (r"(q|k|v|gate|up)_proj/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"(o|down)_proj/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"(q|k|v|gate|up)_proj/bias$", PartitionSpec(None, "tensor")),
    (r"", PartitionSpec()),
)


def make_mesh(
    data: int, fsdp: int, tensor: int, slices: int = 0, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh (data, fsdp, tensor) over all devices.

    Sizes are those of one slice: a TPU slice, a node of GPUs, or else all devices. Every slice holds
    a replica: the mesh's data axis is slices x `data`, so gradients alone cross the slow network.

    Args:
      data, fsdp, tensor: one may be -1, for the rest of a slice's devices.
      slices: 0 takes them as they are; 1 takes all devices for one slice, whatever lies between.

    Raises:
      ConfigError: sizes whose product is not the number of a slice's devices, slices of different
        sizes, or a layout that the slice's chips cannot have.
    """
    groups = _slices(list(jax.devices() if devices is None else devices), slices)
    count = len(groups[0])
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    named = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"{named}: sizes must be at least 1; at most one may be -1 (the rest).")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if free and count % taken == 0:
        sizes[free[0]] = count // taken
    if math.prod(sizes.values()) != count:
        which = f"in each of the {len(groups)} slices" if len(groups) > 1 else "here"
        raise ConfigError(
            f"{named} does not fit the {count} devices {which}: the product must be "
            f"{count} (set one size to -1 to take the rest)."
        )
    shape = tuple(sizes.values())
    try:
        parts = [_arranged(group, shape) for group in groups]
    except Exception as error:  # NotImplementedError, AssertionError, ValueError: by kind of chip
        raise ConfigError(
            f"{named} cannot be laid out on {count} x {groups[0][0].device_kind} "
            f"({' '.join(str(error).split())[:200]}): choose powers of two."
        ) from None
    # jax.make_mesh defaults to Explicit axes, on which Flax's gathers fail.
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * 3)


def _slices(devices: list, slices: int) -> list[list]:
    """The devices of each slice, in the slices' order."""
    if slices not in (0, 1):
        raise ConfigError(
            f"mesh.slices={slices} must be 0 (as they are) or 1 (all devices as one)."
        )
    by_slice = collections.defaultdict(list)
    for device in devices:
        by_slice[0 if slices == 1 else getattr(device, "slice_index", 0)].append(device)
    groups = [by_slice[index] for index in sorted(by_slice)]
    if len({len(group) for group in groups}) > 1:
        raise ConfigError(
            f"the slices have {', '.join(str(len(group)) for group in groups)} devices: a mesh needs as "
            "many in each; start on equal ones, or set mesh.slices=1."
        )
    return groups


def _arranged(devices: list, shape: tuple[int, ...]) -> np.ndarray:
    """Devices in `shape`, the last axes between neighbours."""
    if devices[0].platform == "tpu" and len({getattr(d, "slice_index", 0) for d in devices}) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.array(devices).reshape(shape)  # in order, so those of a process beside each other


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis (prompts) over data and fsdp."""
    return NamedSharding(mesh, _BATCH)


def batch_shards(mesh: Mesh) -> int:
    """How many ways the prompts of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def tree_shardings(mesh: Mesh, tree):
    """NamedShardings for parameters, or a train state that holds them: `PARAMETER_RULES` by path."""

    def place(path, leaf):
        spec = _spec(path)
        return _fitting(mesh, spec if len(spec) <= len(leaf.shape) else (), leaf.shape)

    return jax.tree_util.tree_map_with_path(place, tree)


def _spec(path) -> PartitionSpec:
    name = "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
    return next(spec for pattern, spec in PARAMETER_RULES if re.search(pattern, name))


def _fitting(mesh: Mesh, spec, shape) -> NamedSharding:
    """`spec` without the mesh axes that do not divide their dimension: that one is replicated."""

    def size(axis):
        return int(
            np.prod([mesh.shape[name] for name in (axis if isinstance(axis, tuple) else (axis,))])
        )

    fits = [
        axis if axis is None or length % size(axis) == 0 else None
        for axis, length in zip(spec, shape)
    ]
    return NamedSharding(mesh, PartitionSpec(*fits))


def keep(mesh: Mesh | None, tree):
    """Inside jit: parameters, gradients or a train state held to `tree_shardings`; None: as it is."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, tree_shardings(mesh, tree))


def keep_gathered(mesh: Mesh | None, weights):
    """Inside jit: weights held whole on every device, but split over the tensor axis."""
    if mesh is None:
        return weights

    def hold(path, leaf):
        spec = _spec(path)
        spec = spec[len(spec) - leaf.ndim :] if len(spec) > leaf.ndim else spec  # layers unstacked
        kept = [axis if axis == "tensor" else None for axis in spec]
        return jax.lax.with_sharding_constraint(leaf, _fitting(mesh, kept, leaf.shape))

    return jax.tree_util.tree_map_with_path(hold, weights)


def keep_prompts(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """Inside jit: activations [B, ...] held split over prompts alone."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, _fitting(mesh, [_BATCH[0]], x.shape[:1]))


def keep_everywhere(mesh: Mesh | None, tree):
    """Inside jit: arrays held whole on every device."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, replicated(mesh))


def keep_rows(mesh: Mesh | None, tree, rows: int = 0):
    """Inside jit: arrays held split over prompts, axis `rows`; caches, which have four axes or more
    from there on, over key/value heads too, the axis after. Without this the compiler may give
    every device all."""
    if mesh is None:
        return tree
    hold = lambda x: jax.lax.with_sharding_constraint(x, _row_sharding(mesh, x, rows))
    return jax.tree.map(hold, tree)


def keep_prefix(mesh: Mesh | None, prefix):
    """`keep_rows` of a models.Prefix, whose caches begin with the layers."""
    keys, values = keep_rows(mesh, (prefix.keys, prefix.values), rows=1)
    return prefix._replace(keys=keys, values=values, lengths=keep_rows(mesh, prefix.lengths))


def by_shard(mesh: Mesh | None, function, x: jax.Array, index: jax.Array) -> jax.Array:
    """function(x, index), each device with its own rows of both; indices count within the shard."""
    if mesh is None:
        return function(x, index)
    specs = [_row_sharding(mesh, a).spec for a in (x, index)]
    return jax.shard_map(
        function, mesh=mesh, in_specs=tuple(specs), out_specs=specs[0], check_vma=False
    )(x, index)


def put_rows(mesh: Mesh | None, x: np.ndarray) -> jax.Array:
    """`put_batch` of one array."""
    if mesh is None:
        return jax.numpy.asarray(x)
    return jax.make_array_from_callback(x.shape, batch_sharding(mesh), lambda index: x[index])


def put_own(mesh: Mesh | None, x: np.ndarray) -> jax.Array:
    """Host arrays [devices], another on each process -> a global array; a device has its process's."""
    if mesh is None:
        return jax.numpy.asarray(x)
    return jax.make_array_from_callback(x.shape, _own(mesh), lambda index: x[index])


def own_shape(mesh: Mesh, dtype) -> jax.ShapeDtypeStruct:
    """The shape and place of what `put_own` makes."""
    return jax.ShapeDtypeStruct((mesh.size,), dtype, sharding=_own(mesh))


def _own(mesh: Mesh) -> NamedSharding:
    """[devices]: an element each."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def _row_sharding(mesh: Mesh, x, rows: int = 0) -> NamedSharding:
    spec = [None] * rows + [_BATCH[0]] if x.ndim > rows else []
    if x.ndim - rows >= 4:
        spec.append("tensor")
    return _fitting(mesh, spec, x.shape)


def put_batch(mesh: Mesh, tree):
    """Host arrays [B, ...], on every process those of the whole batch -> global arrays split over
    data and fsdp. Of rows that a process does not hold its values are not looked at."""
    return jax.tree.map(functools.partial(put_rows, mesh), tree)


def on_host(mesh: Mesh | None, tree):
    """Global arrays, whole, on the host of every process; small ones. Every process must call."""
    return jax.device_get(_everywhere(tree, mesh))


@functools.partial(jax.jit, static_argnames=("mesh",))
def _everywhere(tree, mesh):
    return keep_everywhere(mesh, tree)


def held_rows(mesh: Mesh, batch: int) -> np.ndarray:
    """int [n]: the rows of a batch that lie on devices of this process, ascending.

    Where a tensor group spans processes they hold the same rows; `owned_rows` says who answers for
    them.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch,))
    return np.unique([row for (part,) in places.values() for row in range(batch)[part]])


def owned_rows(mesh: Mesh, batch: int) -> np.ndarray:
    """int [n]: the rows that this process answers for: of those who hold a row, the first process."""
    owner = np.full(batch, np.iinfo(int).max)
    for device, (part,) in batch_sharding(mesh).devices_indices_map((batch,)).items():
        owner[part] = np.minimum(owner[part], device.process_index)
    return np.flatnonzero(owner == jax.process_index())


def local_rows(mesh: Mesh, tree):
    """The way back of `put_batch`: global arrays [B, ...] -> this process's `held_rows`, on the host."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def rows(x):
        shards = {s.index[0].start or 0: s.data for s in x.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    return jax.tree.map(rows, jax.device_put(tree, batch_sharding(mesh)))


# ---- Parts of a batch: waves, updates and microbatches take some of its prompts at a time ----
#
# Part i of n has the prompts i, i + n, i + 2n, ... A device holds neighbouring prompts, so each part
# has as many prompts from every device, where they lie already: no device waits, nothing moves.
# The first B / n prompts would all lie on the first devices.


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
    """The way back of `split`: [n, B / n, ...] -> [B, ...], prompts in their old order."""
    join_one = lambda x: jax.numpy.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
    return jax.tree.map(join_one, parts)
