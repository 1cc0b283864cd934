"""One mesh, and where arrays live on it: rules outside the model."""

import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qlog.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
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
    data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh (data, fsdp, tensor) over all devices; one size may be -1, for the rest of them.

    Raises:
      ConfigError: sizes whose product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor)))
    named = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"{named}: sizes must be at least 1; at most one may be -1 (the rest).")
    taken = int(np.prod([size for size in sizes.values() if size != -1]))
    if free and len(devices) % taken == 0:
        sizes[free[0]] = len(devices) // taken
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise ConfigError(
            f"{named} does not fit the {len(devices)} devices here: the product must be "
            f"{len(devices)} (set one size to -1 to take the rest)."
        )
    # jax.make_mesh defaults to Explicit axes, on which Flax's gathers fail.
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * 3, devices=devices)


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
        return int(np.prod([mesh.shape[name] for name in (axis if isinstance(axis, tuple) else (axis,))]))

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
    hold = lambda x: jax.lax.with_sharding_constraint(x, _row_sharding(mesh, x, rows))  # noqa: E731
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
    """The same host array on every process -> a global array split over data and fsdp."""
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
    """Host arrays of this process's prompts -> global arrays split over data and fsdp."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def on_host(tree):
    """Global arrays, whole, on every process; small ones."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


def local_rows(mesh: Mesh, tree):
    """The way back of `put_batch`: global arrays -> this process's rows of them, on the host."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def rows(x):
        shards = {s.index[0].start or 0: s.data for s in x.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    return jax.tree.map(rows, jax.device_put(tree, batch_sharding(mesh)))
