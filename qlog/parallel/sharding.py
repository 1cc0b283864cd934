"""One mesh, and which part of each array lies on which device. The model knows none of this.

A mesh has three axes, here from the slowest network to the fastest:

| axis   | size              | splits                                  | devices exchange         |
|--------|-------------------|-----------------------------------------|--------------------------|
| data   | slices, mesh.data | the prompts of a batch                  | gradients, once per step |
| fsdp   | mesh.fsdp         | the prompts, too; one dimension of each | weights, before each     |
|        |                   | weight, its gradient and its moments    | use; gradients           |
| tensor | mesh.tensor       | heads, MLP units, vocabulary; heads of  | activations, in each     |
|        |                   | caches                                  | layer                    |

The functions, by what they do:

| where       | functions                                                                          |
|-------------|------------------------------------------------------------------------------------|
| outside jit | `make_mesh`; `*_sharding*`: where parameters and batches lie                       |
| inside jit  | `constrain_*`: `jax.lax.with_sharding_constraint` by kind of array;                |
|             | `shard_map_batch`: a function of each device's own part                            |

Between host and devices, and which prompts belong to which process: `batch_placement.py`.

A mesh of None is one device: then arrays are left as they are.
"""

import collections
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qlog.console import count_text
from qlog.errors import ConfigError, summary

AXES = ("data", "fsdp", "tensor")
_BATCH = ("data", "fsdp")  # the axes over which prompts are split

# Which dimensions of a parameter are split, by its path. The first match wins. The first axis of a
# layer's parameter is the layer (layers are stacked). The moments of the optimizer have the path of
# their parameter inside their own path, so the same rules place them. A projection into heads or
# MLP units splits its outputs over `tensor`, the projection back its inputs: between the two no
# device needs another one's activations.
PARAMETER_RULES = (
    (r"(un)?embed$", PartitionSpec("tensor", "fsdp")),
    (r"(q|k|v|gate|up)_proj/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"(o|down)_proj/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"(q|k|v|gate|up)_proj/bias$", PartitionSpec(None, "tensor")),
    (r"", PartitionSpec()),
)

_Tree = TypeVar("_Tree")  # a pytree of arrays; the result has the same structure

# ---- The mesh ----


def make_mesh(
    data: int, fsdp: int, tensor: int, slices: int = 0, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh (data, fsdp, tensor) over all devices.

    Sizes are those of one slice: a TPU slice, a node of GPUs, or else all devices. Each slice holds
    a replica of the parameters.

    Args:
      data, fsdp, tensor: one of them may be -1, for the rest of a slice's devices.
      slices: 0 takes slices as they are; 1 takes all devices as one slice, whatever network lies
        between them.
      devices: all devices of the run by default.

    Raises:
      ConfigError: sizes whose product is not the number of devices in a slice, slices of different
        sizes, or a layout that is not possible on the chips of a slice.
    """
    groups = _slices(list(jax.devices() if devices is None else devices), slices)
    num_devices = len(groups[0])
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    named = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"{named}: sizes must be at least 1; at most one may be -1 (the rest).")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if free and num_devices % taken == 0:
        sizes[free[0]] = num_devices // taken
    if math.prod(sizes.values()) != num_devices:
        which = f"in each of the {len(groups)} slices" if len(groups) > 1 else "here"
        raise ConfigError(
            f"{named} does not fit the {count_text(num_devices, 'device')} {which}: the product "
            f"must be {num_devices} (set one size to -1 to take the rest)."
        )
    shape = tuple(sizes.values())
    try:
        parts = [_arranged(group, shape) for group in groups]
    except Exception as error:  # NotImplementedError, AssertionError, ValueError: by kind of chip
        raise ConfigError(
            f"{named} cannot be laid out on {num_devices} x {groups[0][0].device_kind} "
            f"({summary(error)}): choose powers of two."
        ) from None
    # Slices follow each other along the data axis, the outermost one. So a group of fsdp or tensor
    # lies within a slice, and only the sum of gradients crosses the network between slices.
    # The axes are Auto: jax.make_mesh defaults to Explicit axes, on which Flax's gathers fail.
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * 3)


def _slices(devices: list[jax.Device], slices: int) -> list[list[jax.Device]]:
    """The devices of each slice, in the order of the slices."""
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
            f"the slices have {', '.join(str(len(group)) for group in groups)} devices: a mesh "
            "needs as many in each; start on equal ones, or set mesh.slices=1."
        )
    return groups


def _arranged(devices: list[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """The devices of a slice in `shape`; neighbours along the last axes are near each other."""
    if devices[0].platform == "tpu" and len({getattr(d, "slice_index", 0) for d in devices}) == 1:
        # Along the rings of the slice's torus.
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # JAX numbers devices process by process, so those of a process are next to each other.
    return np.array(devices).reshape(shape)


# ---- Shardings, by kind of array ----


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """[B, ...] with the prompts, B, split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(_BATCH))


def num_batch_shards(mesh: Mesh) -> int:
    """Into how many parts the prompts of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_shards_of_a_slice(mesh: Mesh) -> int:
    """Batch shards next to each other between which no network of a data centre lies.

    Where a mesh takes several slices as one (mesh.slices=1) so that shards do not split into equal
    runs of one slice each, all count as neighbours.
    """
    number = num_batch_shards(mesh)
    by_shard = mesh.devices.reshape(number, -1)
    slices = [{getattr(device, "slice_index", 0) for device in shard} for shard in by_shard]
    several = len(set().union(*slices))
    run = number // several
    is_even = number % several == 0 and all(
        len(set().union(*slices[first : first + run])) == 1 for first in range(0, number, run)
    )
    return run if is_even else number


def param_shardings(mesh: Mesh, tree: Any) -> Any:
    """NamedShardings for parameters, or a train state that holds them: `PARAMETER_RULES` by path.

    Args:
      tree: a pytree of arrays or ShapeDtypeStructs.

    Returns:
      The same structure, with a NamedSharding at each leaf.
    """

    def place(path, leaf) -> NamedSharding:
        spec = _spec(path)
        # What has fewer dimensions than its parameter (a factored moment, a scalar) is replicated.
        return _fitting(mesh, tuple(spec) if len(spec) <= len(leaf.shape) else (), leaf.shape)

    return jax.tree_util.tree_map_with_path(place, tree)


def _spec(path: tuple) -> PartitionSpec:
    """The first rule that matches a path of jax.tree_util."""
    name = "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
    return next(spec for pattern, spec in PARAMETER_RULES if re.search(pattern, name))


def _fitting(mesh: Mesh, spec: Sequence, shape: Sequence[int]) -> NamedSharding:
    """`spec` for an array of this shape; a dimension that its axes do not divide is replicated.

    Args:
      spec: for each of the first dimensions an axis of the mesh, a tuple of axes, or None.
    """

    def num_parts(axes: str | tuple[str, ...]) -> int:
        return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))

    fits = [
        axes if axes is None or length % num_parts(axes) == 0 else None
        for axes, length in zip(spec, shape[: len(spec)], strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*fits))


def batch_sharding_of(
    mesh: Mesh, x: jax.Array | jax.ShapeDtypeStruct, axis: int = 0
) -> NamedSharding:
    """Prompts, at dimension `axis`, over data and fsdp; the heads of a cache over tensor."""
    spec: list[Any] = [*[None] * axis, _BATCH] if x.ndim > axis else []
    if x.ndim - axis >= 4:  # a cache [..., B, heads, T, D]; nothing else has as many dimensions
        spec.append("tensor")
    return _fitting(mesh, spec, x.shape)


# ---- Inside jit: constraints ----
#
# The compiler chooses the sharding of what no constraint touches, from its operands. Zeros have no
# operands, and the compiler may give all of them to every device. So a large array that a program
# makes is constrained where it is made.


def constrain_params(mesh: Mesh | None, tree: _Tree) -> _Tree:
    """Parameters, gradients or a train state, split as `param_shardings` says."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, param_shardings(mesh, tree))


def constrain_gathered_params(mesh: Mesh | None, weights: _Tree) -> _Tree:
    """Weights gathered over data and fsdp, as every use of them needs; still split over tensor.

    For loops that use the same weights many times: they are gathered once, in front of the loop.
    """
    if mesh is None:
        return weights

    def constrain(path, leaf: jax.Array) -> jax.Array:
        spec = tuple(_spec(path))
        # Of unstacked layers each leaf lacks the layer's axis, the first one.
        spec = spec[len(spec) - leaf.ndim :] if len(spec) > leaf.ndim else spec
        kept = [axis if axis == "tensor" else None for axis in spec]
        return jax.lax.with_sharding_constraint(leaf, _fitting(mesh, kept, leaf.shape))

    return jax.tree_util.tree_map_with_path(constrain, weights)


def constrain_activations(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """Activations [B, ...], split over prompts and over nothing else."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, _fitting(mesh, [_BATCH], x.shape[:1]))


def constrain_replicated(mesh: Mesh | None, tree: _Tree) -> _Tree:
    """Arrays that each device needs whole."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, replicated(mesh))


def constrain_batch(mesh: Mesh | None, tree: _Tree, axis: int = 0) -> _Tree:
    """Arrays with one entry per prompt (or lane, or pack), split over prompts.

    Args:
      axis: the dimension of the prompts. Caches, which have four dimensions or more from there on,
        are split over key/value heads, too: the dimension after it.
    """
    if mesh is None:
        return tree
    constrain = lambda x: jax.lax.with_sharding_constraint(x, batch_sharding_of(mesh, x, axis))
    return jax.tree.map(constrain, tree)


def constrain_prefix(mesh: Mesh | None, prefix: Any) -> Any:
    """`constrain_batch` of a models.Prefix, whose caches begin with the layers."""
    keys, values = constrain_batch(mesh, (prefix.keys, prefix.values), axis=1)
    return prefix._replace(keys=keys, values=values, lengths=constrain_batch(mesh, prefix.lengths))


def shard_map_batch(
    mesh: Mesh | None,
    function: Callable[..., jax.Array],
    x: jax.Array,
    *others: jax.Array,
    everywhere: Sequence[jax.Array] = (),
) -> jax.Array:
    """function(x, *others, *everywhere) on each device; the result is split as `x` is.

    Of `x` and `others` a device gives its own part, of `everywhere` all. Indices count within a
    device's part. So a gather by index stays on its device; of a gather from the whole array the
    compiler cannot know that.
    """
    if mesh is None:
        return function(x, *others, *everywhere)
    specs = [batch_sharding_of(mesh, a).spec for a in (x, *others)]
    specs += [PartitionSpec()] * len(everywhere)
    return jax.shard_map(
        function, mesh=mesh, in_specs=tuple(specs), out_specs=specs[0], check_vma=False
    )(x, *others, *everywhere)


def exchange(mesh: Mesh | None, x: jax.Array, pairs: Sequence[tuple[int, int]]) -> jax.Array:
    """Inside `shard_map_batch`: each shard's `x` at its partner; zeros where none sends.

    Args:
      pairs: (sender, receiver), numbers of batch shards; each is once a sender and a receiver at
        most.
    """
    return x if mesh is None else jax.lax.ppermute(x, _BATCH, pairs)
