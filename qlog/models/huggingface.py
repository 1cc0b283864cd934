"""Hugging Face folders in and out: safetensors straight onto the mesh, and back."""

import contextlib
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qlog.errors import ConfigError
from qlog.models import families
from qlog.models.config import DecoderConfig
from qlog.models.decoder import Params, shapes

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_IS_IT_THE_MODEL = (
    "is config.model (with config.architecture) the model of these weights, and were all of their "
    "*.safetensors downloaded?"
)


def resolve(spec: str | os.PathLike) -> pathlib.Path:
    """The local folder for `spec`: a folder, or a Hub id 'owner/name' or 'owner/name@revision'.

    A Hub id is downloaded on first use into the cache of huggingface_hub (set HF_HOME to move it),
    by process 0 alone; an interrupted download goes on where it stopped. All processes must call
    this. Raises ConfigError when the folder is no model, or the Hub gives nothing.
    """
    folder = pathlib.Path(spec).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} holds no config.json, so it is not a Hugging Face model.")
        return folder
    name, _, revision = str(spec).partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigError(f"{spec!r} is neither a folder nor a Hub id of the form 'owner/name'.")

    def fetch(**options):
        return huggingface_hub.snapshot_download(
            name, revision=revision or None,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"], **options,
        )  # fmt: skip

    found, reason = None, ""
    if jax.process_index() == 0:
        try:
            found = fetch()
        except Exception as error:  # the Hub's client raises what its layers below raise
            reason = f"{type(error).__name__}: {_one_line(error)}"
    if jax.process_count() > 1:
        if not multihost_utils.broadcast_one_to_all(np.array(found is not None)):
            reason = reason or "process 0 could not download it"
        elif jax.process_index() > 0:
            try:
                found = fetch(local_files_only=True)
            except Exception as error:
                reason = f"this process does not see the download of process 0: {_one_line(error)}"
        # All give up together: one alone would leave the others waiting for it.
        everywhere = multihost_utils.process_allgather(np.array(found is not None)).all()
        if found is not None and not everywhere:
            found, reason = None, "another process does not see the download of process 0"
    if found is None:
        which = f"{name} --revision {revision}" if revision else name
        raise ConfigError(
            f"{name!r} is no folder here, and the Hugging Face Hub does not give it ({reason}): "
            "where there is a network, "
            f"run `hf download {which} --local-dir FOLDER` (config.json, the tokenizer's files and "
            "all *.safetensors), put FOLDER where every host of this run can read it, and give its "
            f"path instead of {name!r}."
        )
    return pathlib.Path(found)


def read_config(folder: str | os.PathLike) -> DecoderConfig:
    """The DecoderConfig of a model's folder; ConfigError if qlog's decoder cannot express it."""
    return families.from_hf_config(_read_json(pathlib.Path(folder) / "config.json"))


def load(
    folder: str | os.PathLike, config: DecoderConfig, *, dtype=jnp.float32, shardings: Any = None
) -> Params:
    """Parameters from a folder of safetensors, in one file or in many.

    Every device's part is read from the file by itself, so a host holds at most its own part of
    one stacked parameter at a time, and never two copies of it.

    Args:
      folder: as `resolve` gives it.
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
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, config, stack)
        _check_tensors(folder, tensors, _expected_shapes(config, leaves))

        def place(path, leaf, sharding):
            read = functools.partial(_read, tensors, config, _leaf_name(path), leaf)
            return jax.make_array_from_callback(leaf.shape, sharding, _once_per_index(read))

        return jax.tree.map_with_path(place, leaves, shardings)


def export(
    params: Params,
    config: DecoderConfig,
    folder: str | os.PathLike,
    *,
    tokenizer_files: Iterable[str | os.PathLike] = (),
    generation: Mapping[str, Any] | None = None,
    dtype=None,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder that transformers and vLLM load. All processes must call this.

    Args:
      params: as `init` or `load` gives them, on any mesh.
      folder: created; must not hold safetensors yet.
      tokenizer_files: copied along, see `tokenizer_files`; a generation_config.json among them
        also supplies config.json's token ids.
      generation: fields that override or supply generation_config.json's, such as eos_token_id.
      dtype: of the written tensors; None keeps that of `params`, bit for bit.
      max_file_bytes: tensors are spread over several files beyond this size.
    """
    folder = pathlib.Path(folder)
    fields = families.to_hf_config(config)
    carried = {pathlib.Path(file).name: pathlib.Path(file) for file in tokenizer_files}
    if any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{folder} holds safetensors already, and export needs a folder of its own: delete "
            "them, or move the folder."
        )
    generation = dict(generation or {})
    if "generation_config.json" in carried:
        generation = _read_json(carried.pop("generation_config.json")) | generation
    dtype = np.dtype(dtype or params["embed"].dtype)
    fields |= {"torch_dtype": dtype.name}
    fields |= {name: generation[name] for name in _TOKEN_IDS if name in generation}
    is_writer = jax.process_index() == 0
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(params, config, folder, dtype, max_file_bytes, is_writer)
    if is_writer:
        for name, source in carried.items():
            shutil.copyfile(source, folder / name)
        _write_json(folder / "generation_config.json", generation)
        _write_json(folder / "config.json", fields)  # last: its presence says the rest is there


def tokenizer_files(folder: str | os.PathLike) -> list[pathlib.Path]:
    """The files of a model's folder that an export carries along: tokenizer, template, generation
    settings."""
    candidates = (pathlib.Path(folder) / name for name in _TOKENIZER_FILES)
    return [file for file in candidates if file.is_file()]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _leaf_name(path) -> str:
    return "/".join(entry.key for entry in path)


def _tensors_of(config: DecoderConfig, leaf: str) -> list[str]:
    """The tensors that make up a leaf: one, or one per layer."""
    name = families.tensor_name(config, leaf)
    return [name.format(i) for i in range(config.num_layers)] if "{}" in name else [name]


def _expected_shapes(config, leaves):
    """{tensor: its shape in the file}: stacked leaves split up, kernels transposed."""
    expected = {}
    for path, leaf in jax.tree.leaves_with_path(leaves):
        name = _leaf_name(path)
        shape = leaf.shape[1:] if name.startswith("layers/") else leaf.shape
        shape = shape[::-1] if name.endswith("/kernel") else shape
        expected |= dict.fromkeys(_tensors_of(config, name), shape)
    return expected


def _open_tensors(folder, config, stack):
    """{canonical tensor name: (open file, name in it)} over all files of the folder."""
    index = folder / _INDEX
    if (folder / _WHOLE).is_file():  # before an index, as transformers has it
        names = [_WHOLE]
    elif index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigError(f"{index} holds no 'weight_map' of tensors: download it again.")
        names = sorted(set(map(str, weight_map.values())))
    else:
        names = sorted(file.name for file in folder.glob("*.safetensors"))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent or not names:
        what = f"lacks {', '.join(absent)}" if absent else "holds no *.safetensors"
        raise ConfigError(f"{folder} {what}: download the model again, safetensors included.")
    tensors = {}
    for name in names:
        try:
            file = stack.enter_context(safe_open(folder / name, framework="np"))
        except (SafetensorError, OSError, ValueError) as error:
            message = f"{folder / name} is damaged ({error}): download it again."
            raise ConfigError(message) from error
        for key in file.keys():
            canonical = families.canonical_name(key, config)
            if canonical in tensors:
                raise ConfigError(
                    f"{folder} holds the tensor {canonical!r} twice, the second time in {name}: "
                    "keep the safetensors of one model alone."
                )
            if canonical is not None:
                tensors[canonical] = (file, key)
    return tensors


def _check_tensors(folder, tensors, expected):
    """Raises for the first thing that is wrong, before any tensor is read."""
    missing = [name for name in expected if name not in tensors]
    surplus = [name for name in tensors if name not in expected]
    if missing or surplus:
        names = missing or surplus
        what = "lacks" if missing else "holds, beyond what the config describes,"
        hint = _IS_IT_THE_MODEL
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


def _read(tensors, config, leaf_name, leaf, index):
    """The part `index` (a tuple of slices) of a leaf, as a host array."""
    bounds = [range(*part.indices(size)) for part, size in zip(index, leaf.shape)]
    out = np.empty([len(bound) for bound in bounds], leaf.dtype)
    names = _tensors_of(config, leaf_name)
    stacked = leaf_name.startswith("layers/")
    rows = [slice(b.start, b.stop) for b in (bounds[1:] if stacked else bounds)]
    transposed = leaf_name.endswith("/kernel")
    for i, layer in enumerate(bounds[0] if stacked else [0]):
        file, key = tensors[names[layer]]
        part = file.get_slice(key)[tuple(rows[::-1] if transposed else rows)]
        part = part.T if transposed else part
        if stacked:
            out[i] = part
        else:
            out[...] = part
    return out


def _once_per_index(read):
    """Devices that hold the same part share one reading of it."""
    parts = {}

    def cached(index):
        key = tuple((part.start, part.stop) for part in index)
        if key not in parts:
            parts[key] = read(index)
        return parts[key]

    return cached


def _write_tensors(params, config, folder, dtype, max_file_bytes, is_writer):
    """model.safetensors, or numbered files and their index; one file's worth on the host."""
    files, size = [[]], 0
    total = 0
    for path, leaf in jax.tree.leaves_with_path(params):
        name = _leaf_name(path)
        tensors = _tensors_of(config, name)
        each = leaf.size // len(tensors) * dtype.itemsize
        for layer, tensor in enumerate(tensors):
            if files[-1] and size + each > max_file_bytes:
                files.append([])
                size = 0
            files[-1].append((tensor, name, leaf, layer))
            size += each
            total += each
    weight_map = {}
    for number, entries in enumerate(files, 1):
        file = _WHOLE
        if len(files) > 1:
            file = f"model-{number:05}-of-{len(files):05}.safetensors"
        on_host = {}
        for tensor, name, leaf, layer in entries:
            part = _to_host(leaf[layer] if name.startswith("layers/") else leaf)
            part = part.T if name.endswith("/kernel") else part
            on_host[tensor] = np.ascontiguousarray(part, dtype=dtype)
            weight_map[tensor] = file
        if is_writer:
            (folder / file).touch()
            mode = (folder / file).stat().st_mode  # the umask's; save_file's own is private
            save_file(on_host, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(mode)
    if is_writer and len(files) > 1:
        _write_json(
            folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _to_host(array) -> np.ndarray:
    """The whole of a global array, whichever processes hold it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read as JSON ({error}): download it again."
        ) from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{file} holds no JSON object: download it again.")
    return fields


def _write_json(file: pathlib.Path, fields: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n")
