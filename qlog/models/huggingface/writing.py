"""Weights out: a folder that transformers and vLLM load."""

import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from qlog.errors import ConfigError, PassingError
from qlog.models.config import DecoderConfig
from qlog.models.decoder import Params
from qlog.models.huggingface.config_json import to_hf_config
from qlog.models.huggingface.tensors import INDEX, WHOLE, leaf_name, read_json, tensors_of
from qlog.storage import assets, paths

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export(
    params: Params,
    config: DecoderConfig,
    folder: str | os.PathLike,
    *,
    tokenizer_files: Iterable[str | os.PathLike] = (),
    generation: Mapping[str, Any] | None = None,
    dtype: DTypeLike | None = None,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder that transformers and vLLM load. All processes must call this.

    Args:
      params: from `init`, `load` or training, on any mesh.
      config: the decoder's shape.
      folder: created if it does not exist; in a bucket too (each file is made here, then
        uploaded). It must not hold safetensors yet.
      tokenizer_files: copied along, see `tokenizer_files`; a generation_config.json among them
        also supplies config.json's token ids.
      generation: fields that override or supply generation_config.json's, such as eos_token_id.
      dtype: of the written tensors; None keeps that of `params`, bit for bit.
      max_file_bytes: tensors are spread over several files beyond this size.

    Raises:
      ConfigError: the folder holds safetensors; on every process.
    """
    folder = paths.parse(folder, "the folder to export to")
    is_writer = jax.process_index() == 0
    fields = to_hf_config(config)
    carried = {pathlib.Path(file).name: pathlib.Path(file) for file in tokenizer_files}
    # Process 0 looks, or a late process would see the files of this very export. What it found goes
    # to the others as a number: an exception on one process would leave the others waiting.
    found, reason = _look(folder) if is_writer else (_EMPTY, "")
    found = _of_first(found)
    if found == _UNSEEN:
        raise ConfigError(f"{folder} cannot be looked at: {reason or 'process 0 tells why'}")
    if found == _TAKEN:
        raise ConfigError(
            f"{folder} holds safetensors already, and export needs a folder of its own: delete "
            "them, or move the folder."
        )
    generation = dict(generation or {})
    if "generation_config.json" in carried:
        generation = read_json(carried.pop("generation_config.json")) | generation
    dtype = np.dtype(dtype or params["embed"].dtype)
    # Readers of transformers look for the token ids in either file.
    fields |= {"torch_dtype": dtype.name}
    fields |= {name: generation[name] for name in _TOKEN_IDS if name in generation}
    if is_writer and not paths.is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(params, config, folder, dtype, max_file_bytes, is_writer)
    if is_writer:
        for name, source in carried.items():
            paths.copy(source, folder / name)
        _write_json(folder / "generation_config.json", generation)
        _write_json(folder / "config.json", fields)  # last: its presence says the rest is there


def tokenizer_files(folder: str | os.PathLike) -> list[pathlib.Path]:
    """The files of a model's folder that `export` copies: tokenizer, template, generation."""
    candidates = (pathlib.Path(folder) / name for name in _TOKENIZER_FILES)
    return [file for file in candidates if file.is_file()]


def _write_tensors(
    params: Params,
    config: DecoderConfig,
    folder: paths.Path,
    dtype: np.dtype,
    max_file_bytes: int,
    is_writer: bool,
) -> None:
    """model.safetensors, or numbered files and their index; one file's worth on the host."""
    # Which tensors go into which file: in the order of the leaves, a new file once one is full.
    files, size, total = [[]], 0, 0
    for path, leaf in jax.tree.leaves_with_path(params):
        name = leaf_name(path)
        tensors = tensors_of(config, name)
        each = leaf.size // len(tensors) * dtype.itemsize
        for layer, tensor in enumerate(tensors):
            if files[-1] and size + each > max_file_bytes:
                files.append([])
                size = 0
            files[-1].append((tensor, name, leaf, layer))
            size += each
            total += each
    # All processes gather each tensor, one after another; only the writer keeps it.
    weight_map = {}
    for number, entries in enumerate(files, 1):
        file = WHOLE
        if len(files) > 1:
            file = f"model-{number:05}-of-{len(files):05}.safetensors"
        on_host = {}
        for tensor, name, leaf, layer in entries:
            part = _to_host(leaf[layer] if name.startswith("layers/") else leaf)
            part = part.T if name.endswith("/kernel") else part
            # A transposed view would be written in the order of its memory: a copy puts it right.
            on_host[tensor] = np.ascontiguousarray(part, dtype=dtype)
            weight_map[tensor] = file
        if is_writer:
            _write_safetensors(on_host, folder / file)
    if is_writer and len(files) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_safetensors(tensors: dict[str, np.ndarray], target: paths.Path) -> None:
    """Writes a new file next to the target and moves it there; for a bucket, uploads it.

    safetensors can only write local files, so a bucket's are made on this host's disk first.
    """
    remote = paths.is_remote(target)
    with tempfile.TemporaryDirectory(
        prefix=".export-", dir=None if remote else target.parent
    ) as folder:
        fresh = pathlib.Path(folder) / target.name
        fresh.touch()
        mode = fresh.stat().st_mode  # the umask's; save_file's own is private
        save_file(tensors, fresh, metadata={"format": "pt"})
        fresh.chmod(mode)
        if remote:
            paths.copy(fresh, target)
        else:
            os.replace(fresh, target)


_EMPTY, _TAKEN, _UNSEEN = range(3)  # what a look into the folder to export to may find


def _look(folder: paths.Path) -> tuple[int, str]:
    """Whether a folder holds safetensors: one of the three states, and why it is not known."""
    try:
        return (_TAKEN if assets.exists(folder, "*.safetensors") else _EMPTY), ""
    except (ConfigError, PassingError) as error:
        return _UNSEEN, str(error)


def _of_first(number: int) -> int:
    """The number that process 0 has, on every process."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.array(number)))


def _to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole of a global array, whichever processes hold it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _write_json(file: paths.Path, fields: Mapping[str, Any]) -> None:
    paths.write(file, json.dumps(fields, indent=2) + "\n")
