"""Weights in: safetensors straight onto the mesh."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlog.errors import ConfigError
from qlog.models.config import DecoderConfig
from qlog.models.decoder import Params, shapes
from qlog.models.families import FAMILIES
from qlog.models.huggingface.config_json import from_hf_config
from qlog.models.huggingface.tensors import (
    canonical_name,
    expected_shapes,
    is_head,
    layers_in,
    leaf_name,
    open_safetensors,
    read_json,
    tensor_files,
    tensors_of,
)

# {tensor's name as in a text-only file: (open safetensors file, its name in there)}
Tensors = dict[str, tuple[Any, str]]
Index = tuple[slice, ...]  # of a part of an array
_SAMPLE = 16 << 10  # bytes that `digest` reads at each place of a tensor
_IS_IT_THE_MODEL = (
    "is config.model (with config.architecture) the model of these weights, and were all of their "
    "*.safetensors downloaded?"
)


def read_config(folder: str | os.PathLike) -> DecoderConfig:
    """The DecoderConfig of a model's folder; ConfigError if qlog's decoder cannot express it."""
    return from_hf_config(read_json(pathlib.Path(folder) / "config.json"))


def check(folder: str | os.PathLike, config: DecoderConfig) -> None:
    """Whether a folder holds the weights of this model, by tensors' names, shapes and types.

    Warns of a tied model whose file has another head: it is not read, as in transformers.

    Raises:
      ConfigError: as `load`.
    """
    folder = pathlib.Path(folder)
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, config, stack)
        _check_tensors(folder, tensors, expected_shapes(config, shapes(config, jnp.float32)))
        if config.tied_embeddings and (file := _file_of_other_head(folder, config, tensors)):
            logging.warning(
                "%s has an lm_head.weight that differs from the embedding, but its config.json "
                "says tie_word_embeddings: the head is not read; correct config.json if the model "
                "has a head of its own.",
                file,
            )


def _file_of_other_head(
    folder: pathlib.Path, config: DecoderConfig, tensors: Tensors
) -> pathlib.Path | None:
    """The file of a tied model that has a head besides, if that differs from the embedding."""
    embedding, name = tensors[FAMILIES[config.family].tensors["embed"]]
    rows = embedding.get_slice(name)
    num_rows = rows.get_shape()[0]
    with contextlib.ExitStack() as stack:
        for path in tensor_files(folder):
            file = open_safetensors(path, stack)
            for key in file.keys():
                if not is_head(key):
                    continue
                head = file.get_slice(key)
                if head.get_shape() != rows.get_shape():
                    return path
                # Some rows tell: of a copy all are equal, of another head hardly one.
                for row in range(0, num_rows, max(num_rows // 64, 1)):
                    if not np.array_equal(head[row], rows[row]):
                        return path
    return None


def load(
    folder: str | os.PathLike,
    config: DecoderConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    shardings: Any = None,
) -> Params:
    """Parameters from a folder of safetensors, in one file or in many.

    Only the part of a parameter that a device holds is read from the file, so a host never holds
    more than its part of one stacked parameter, and never two copies of it.

    Args:
      folder: from `resolve`.
      config: must describe the same model, as `read_config(folder)` does.
      dtype: of the parameters, whatever the files have.
      shardings: a tree like params, of jax.sharding.Sharding; None: the first local device.

    Raises:
      ConfigError: for missing, surplus or misshapen tensors, before anything is read.
    """
    folder = pathlib.Path(folder)
    leaves = shapes(config, dtype)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, leaves)
    with contextlib.ExitStack() as stack:  # files stay open: tensors are read in parts
        tensors = _open_tensors(folder, config, stack)
        _check_tensors(folder, tensors, expected_shapes(config, leaves))

        def place(path, leaf, sharding):
            read = functools.partial(_read, tensors, config, leaf_name(path), leaf)
            # Each process is asked only for the parts of its own devices.
            return jax.make_array_from_callback(leaf.shape, sharding, _once_per_index(read))

        return jax.tree.map_with_path(place, leaves, shardings)


def digest(folder: str | os.PathLike, config: DecoderConfig) -> str:
    """16 hexadecimal digits of the weights in a folder, however they are spread over files.

    It covers the names, types and shapes of all tensors, and the first, middle and last 16 KiB of
    each. Other weights of the same model (trained further, from another seed) differ there; a
    change of single numbers elsewhere is not seen. It takes seconds, whatever the size.

    Raises:
      ConfigError: no safetensors, or damaged ones.
    """
    folder = pathlib.Path(folder)
    parts = {}
    with contextlib.ExitStack() as stack:
        for path in tensor_files(folder):
            open_safetensors(path, stack)  # says what is damaged
            with path.open("rb") as file:
                # A safetensors file: the header's size, the header (JSON), the tensors' bytes.
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
                for key, entry in header.items():
                    name = None if key == "__metadata__" else canonical_name(key, config)
                    if name is None:
                        continue
                    # The first, middle and last bytes; of a small tensor these overlap.
                    start, end = (8 + size + offset for offset in entry["data_offsets"])
                    seen = hashlib.sha256(f"{name} {entry['dtype']} {entry['shape']}".encode())
                    for at in (start, (start + end - _SAMPLE) // 2, end - _SAMPLE):
                        file.seek(max(start, at))
                        seen.update(file.read(min(_SAMPLE, end - max(start, at))))
                    parts[name] = seen.hexdigest()
    return hashlib.sha256(json.dumps(sorted(parts.items())).encode()).hexdigest()[:16]


def _open_tensors(
    folder: pathlib.Path, config: DecoderConfig, stack: contextlib.ExitStack
) -> Tensors:
    """{canonical tensor name: (open file, name in it)} over all files of the folder."""
    tensors: Tensors = {}
    for path in tensor_files(folder):
        file = open_safetensors(path, stack)
        for key in file.keys():
            canonical = canonical_name(key, config)
            if canonical in tensors:
                raise ConfigError(
                    f"{folder} holds the tensor {canonical!r} twice, the second time in "
                    f"{path.name}: keep the safetensors of one model only."
                )
            if canonical is not None:
                tensors[canonical] = (file, key)
    return tensors


def _check_tensors(
    folder: pathlib.Path, tensors: Tensors, expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises for the first thing that is wrong, before any tensor is read."""
    missing = [name for name in expected if name not in tensors]
    surplus = [name for name in tensors if name not in expected]
    if missing or surplus:
        names = missing or surplus
        held, described = layers_in(tensors), layers_in(expected)
        # Whole layers and nothing else: not the download is wrong, but their number.
        whole = len(held.keys() ^ described.keys()) * max(described.values(), default=0)
        if held and len(missing) + len(surplus) == whole:
            raise ConfigError(
                f"{folder} has {len(held)} layers where the config describes {len(described)}: "
                f"{_IS_IT_THE_MODEL}"
            )
        what = "lacks" if missing else "holds, beyond what the config describes,"
        hint = _IS_IT_THE_MODEL
        # The one tensor whose presence a field decides that files get wrong.
        if names == ["lm_head.weight"]:
            hint = "does its config.json have the right tie_word_embeddings?"
        raise ConfigError(f"{folder} {what} {len(names)} tensors, first {names[0]!r}: {hint}")
    for name, (file, key) in tensors.items():
        part = file.get_slice(key)
        if tuple(part.get_shape()) != expected[name]:
            raise ConfigError(
                f"{folder}: tensor {name!r} has shape {tuple(part.get_shape())}, the config asks "
                f"for {expected[name]}: {_IS_IT_THE_MODEL}"
            )
        if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise ConfigError(
                f"{folder}: tensor {name!r} is of type {part.get_dtype()}; qlog reads float32, "
                "float16 and bfloat16, not quantised weights: take the model's original ones."
            )


def _read(
    tensors: Tensors,
    config: DecoderConfig,
    leaf_name: str,
    leaf: jax.ShapeDtypeStruct,
    index: Index,
) -> np.ndarray:
    """The part `index` of a leaf, as a host array."""
    bounds = [range(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True)]
    out = np.empty([len(bound) for bound in bounds], leaf.dtype)
    names = tensors_of(config, leaf_name)
    # A stacked leaf [L, ...] is one tensor per layer. A kernel [I, O] is stored transposed, [O, I].
    is_stacked = leaf_name.startswith("layers/")
    is_transposed = leaf_name.endswith("/kernel")
    part_of_tensor = [slice(b.start, b.stop) for b in (bounds[1:] if is_stacked else bounds)]
    if is_transposed:
        part_of_tensor.reverse()
    for i, layer in enumerate(bounds[0] if is_stacked else [0]):
        file, key = tensors[names[layer]]
        part = file.get_slice(key)[tuple(part_of_tensor)]  # reads these bytes only
        out[i if is_stacked else ...] = part.T if is_transposed else part
    return out


def _once_per_index(read: Callable[[Index], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """Devices that hold the same part share one reading of it."""
    parts: dict[Any, np.ndarray] = {}

    def cached(index: Index) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)
        if key not in parts:
            parts[key] = read(index)
        return parts[key]

    return cached
