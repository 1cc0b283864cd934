"""One mesh, and where arrays live on it: rules outside the model."""

import re
from collections.abc import Sequence

import jax
import numpy as np
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
    """NamedShardings for parameters, or a train state that holds them: `PARAMETER_RULES` by path.

    A mesh axis that does not divide its dimension is dropped there: that dimension is replicated.
    """

    def place(path, leaf):
        name = "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
        spec = next(spec for pattern, spec in PARAMETER_RULES if re.search(pattern, name))
        if len(spec) > len(leaf.shape):
            spec = PartitionSpec()
        fits = [
            axis if axis is None or size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, leaf.shape)
        ]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree_util.tree_map_with_path(place, tree)


def keep(mesh: Mesh | None, tree):
    """Inside jit: parameters, gradients or a train state held to `tree_shardings`; None: as it is."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, tree_shardings(mesh, tree))


def keep_rows(mesh: Mesh | None, tree, rows: int = 0):
    """Inside jit: arrays held split over prompts, axis `rows`; caches, which have five axes, over
    key/value heads too, the axis after. Without this the compiler may give every device all."""
    if mesh is None:
        return tree

    def hold(x):
        if x.ndim <= rows:
            return jax.lax.with_sharding_constraint(x, replicated(mesh))
        spec = [None] * rows + [_BATCH[0] if x.shape[rows] % batch_shards(mesh) == 0 else None]
        if x.ndim == 5 and x.shape[rows + 1] % mesh.shape["tensor"] == 0:
            spec.append("tensor")
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(hold, tree)


def keep_prefix(mesh: Mesh | None, prefix):
    """`keep_rows` of a models.Prefix, whose caches begin with the layers."""
    keys, values = keep_rows(mesh, (prefix.keys, prefix.values), rows=1)
    return prefix._replace(keys=keys, values=values, lengths=keep_rows(mesh, prefix.lengths))


def put_batch(mesh: Mesh, tree):
    """Host arrays of this process's prompts -> global arrays split over data and fsdp."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def local_rows(mesh: Mesh, tree):
    """The way back of `put_batch`: global arrays -> this process's rows of them, on the host."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def rows(x):
        shards = {s.index[0].start or 0: s.data for s in x.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    return jax.tree.map(rows, jax.device_put(tree, batch_sharding(mesh)))
