"""Hugging Face folders in and out: safetensors straight onto the mesh, and back."""

import contextlib
import fnmatch
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qlog.errors import ConfigError, PassingError, summary
from qlog.models.config import DecoderConfig
from qlog.models.config_json import from_hf_config, to_hf_config
from qlog.models.decoder import Params, shapes
from qlog.models.families import FAMILIES
from qlog.storage import assets, git_lfs, paths, strict_json

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
_HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_WHOLE = "model.safetensors"
_SAMPLE = 16 << 10  # bytes that `digest` reads at each place of a tensor
_INDEX = "model.safetensors.index.json"
# Tensors that some files carry and the decoder does not need: RoPE tables, the part for images.
_IGNORED = re.compile(r"rotary_emb\.|vision_tower\.|multi_modal_projector\.")
# Files of models with images put the decoder one level down; older and newer spelling.
_OUTER_NAMES = (
    (re.compile(r"^language_model\.model\.|^model\.language_model\."), "model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
)
# {tensor's name as in a text-only file: (open safetensors file, its name in there)}
Tensors = dict[str, tuple[Any, str]]
Index = tuple[slice, ...]  # of a part of an array
_IS_IT_THE_MODEL = (
    "is config.model (with config.architecture) the model of these weights, and were all of their "
    "*.safetensors downloaded?"
)


def resolve(
    spec: str | os.PathLike, *, weights: bool = True, field: str = "config.model"
) -> pathlib.Path:
    """The local folder of a model.

    A Hub id is looked for in QLOG_ASSETS first (see qlog.storage.assets). Then it is downloaded
    from the Hub, on first use, into the cache of huggingface_hub (set HF_HOME to move it). An
    interrupted download is continued. Where there are several processes, call this within
    `distributed.once_per_host`.

    Args:
      spec: a folder here or in a bucket, or a Hub id 'owner/name' or 'owner/name@revision'.
      weights: False leaves out *.safetensors, where only the shape or the tokenizer is needed.
      field: the setting that named the model, for messages.

    Raises:
      ConfigError: the folder holds no model, or the Hub does not have it or refuses it.
      PassingError: a bucket or the Hub cannot be reached now.
    """
    wanted = functools.partial(is_wanted, weights=weights)
    folder = None if is_hub_id(spec) else assets.local(spec, field, wanted)
    if folder is not None and folder.is_dir():
        return _whole(folder, field, spec, weights)
    if folder is not None:
        raise ConfigError(
            f"{field} = {str(spec)!r} is not a folder here and not a Hub id of the form "
            "'owner/name'."
        )
    staged = assets.find(f"models/{spec}", functools.partial(_is_complete, weights), wanted)
    found = staged or _from_hub(str(spec), weights)
    # Without weights it may be a repository of a tokenizer alone.
    return _whole(found, field, spec, weights) if weights else found


def _whole(
    folder: pathlib.Path, field: str, spec: str | os.PathLike, weights: bool
) -> pathlib.Path:
    """The folder, if all of a model is there: data are prepared only for a model that loads.

    A download that was cut off leaves links of a cache, or only some of the files; without a
    network the Hub's client takes it for the model.
    """
    if not (folder / "config.json").is_file():
        hint = assets.why_missing(folder / "config.json")
        raise ConfigError(
            f"{field} = {os.fspath(spec)!r} is not a Hugging Face model, since {folder} holds no "
            f"config.json{hint}: correct the path, or download the model again."
        )
    if weights:
        _tensor_files(folder)
    return folder


def is_hub_id(spec: str | os.PathLike) -> bool:
    """Whether `spec` has the form 'owner/name' and there is no local folder of that name."""
    # 'a/b' may be a folder as well as an id: a folder that is there counts first.
    text = os.fspath(spec)
    name = text.partition("@")[0]
    return (
        name.count("/") == 1
        and not name.startswith((".", "/", "~"))
        and not pathlib.Path(text).is_dir()
    )


def is_wanted(name: str, weights: bool) -> bool:
    """Whether qlog reads a model's file of this name; with `weights`, safetensors too."""
    patterns = _HUB_PATTERNS if weights else _HUB_PATTERNS[1:]
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns) and "/" not in name


def _is_complete(weights: bool, names: set[str]) -> bool:
    return "config.json" in names and (
        not weights or any(n.endswith(".safetensors") for n in names)
    )


def _from_hub(spec: str, weights: bool) -> pathlib.Path:
    name, _, revision = spec.partition("@")
    try:
        patterns = _HUB_PATTERNS if weights else _HUB_PATTERNS[1:]
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=list(patterns)
            )
        )
    except Exception as error:  # the Hub's client raises what its layers below raise
        reason = f"{type(error).__name__}: {summary(error)}"
        command = f"{name} --revision {revision}" if revision else name
        message = (
            f"{name!r} is not a folder here, and the Hugging Face Hub does not give it ({reason}): "
            f"where there is a network, run `launch/stage --model={spec} --to=FOLDER` and set "
            f"{assets.ENVIRONMENT}=FOLDER (or gs://BUCKET/...) where every host of this run can "
            f"read it; or run `hf download {command} --local-dir FOLDER` and give FOLDER instead "
            f"of {name!r}."
        )
        raise (PassingError if _passes(error) else ConfigError)(message) from error


def _passes(error: BaseException | None) -> bool:
    """Whether asking the Hub again later may help: it did not answer, or its answer says so."""
    # The client wraps errors of the layers below, so the reason may be anywhere down the chain.
    while error is not None:
        # A setting of this machine, or an id that the client refuses: it stays so.
        if isinstance(error, huggingface_hub.errors.OfflineModeIsEnabled | ValueError):
            return False
        response = getattr(error, "response", None)
        if response is not None:
            # "Ask later" and faults of the server; the other codes are answers.
            return response.status_code in (408, 425, 429) or response.status_code >= 500
        if isinstance(error, TimeoutError | ConnectionError) or "Timeout" in type(error).__name__:
            return True
        if "Connect" in type(error).__name__ or "ProtocolError" in type(error).__name__:
            return True
        error = error.__cause__ or error.__context__
    return False


def read_config(folder: str | os.PathLike) -> DecoderConfig:
    """The DecoderConfig of a model's folder; ConfigError if qlog's decoder cannot express it."""
    return from_hf_config(_read_json(pathlib.Path(folder) / "config.json"))


def check(folder: str | os.PathLike, config: DecoderConfig) -> None:
    """Whether a folder holds the weights of this model, by tensors' names, shapes and types.

    Warns of a tied model whose file has another head: it is not read, as in transformers.

    Raises:
      ConfigError: as `load`.
    """
    folder = pathlib.Path(folder)
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, config, stack)
        _check_tensors(folder, tensors, _expected_shapes(config, shapes(config, jnp.float32)))
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
        for path in _tensor_files(folder):
            file = _open_safetensors(path, stack)
            for key in file.keys():
                if not _is_head(key):
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
        _check_tensors(folder, tensors, _expected_shapes(config, leaves))

        def place(path, leaf, sharding):
            read = functools.partial(_read, tensors, config, _leaf_name(path), leaf)
            # Each process is asked only for the parts of its own devices.
            return jax.make_array_from_callback(leaf.shape, sharding, _once_per_index(read))

        return jax.tree.map_with_path(place, leaves, shardings)


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
        generation = _read_json(carried.pop("generation_config.json")) | generation
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
        for path in _tensor_files(folder):
            _open_safetensors(path, stack)  # says what is damaged
            with path.open("rb") as file:
                # A safetensors file: the header's size, the header (JSON), the tensors' bytes.
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
                for key, entry in header.items():
                    name = None if key == "__metadata__" else _canonical_name(key, config)
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


def _leaf_name(path: tuple[Any, ...]) -> str:
    """The keys of a leaf of params, such as 'layers/q_proj/kernel'."""
    return "/".join(entry.key for entry in path)


def _canonical_name(tensor: str, config: DecoderConfig) -> str | None:
    """A tensor's name as in a text-only file; None if the decoder has no use for it."""
    # Tied models have no head of their own, but some files carry the embedding once more as one.
    if config.tied_embeddings and _is_head(tensor):
        return None
    tensor = _plain_name(tensor)
    return None if _IGNORED.search(tensor) else tensor


def _plain_name(tensor: str) -> str:
    for pattern, replacement in _OUTER_NAMES:
        tensor = pattern.sub(replacement, tensor)
    return tensor


def _is_head(tensor: str) -> bool:
    return _plain_name(tensor) == "lm_head.weight"


def _tensors_of(config: DecoderConfig, leaf: str) -> list[str]:
    """The tensors that make up a leaf: one, or one per layer."""
    tensors = FAMILIES[config.family].tensors
    if leaf not in tensors:
        raise ConfigError(
            f"DecoderConfig: models of family {config.family!r} have no tensor for {leaf!r}; "
            "is config.architecture right?"
        )
    name = tensors[leaf]
    return [name.format(i) for i in range(config.num_layers)] if "{}" in name else [name]


def _expected_shapes(config: DecoderConfig, leaves: Params) -> dict[str, tuple[int, ...]]:
    """{tensor: its shape in the file}: stacked leaves split up, kernels transposed."""
    expected = {}
    for path, leaf in jax.tree.leaves_with_path(leaves):
        name = _leaf_name(path)
        # [L, ...] -> L tensors [...]; [I, O] -> [O, I], as torch stores a linear layer.
        shape = leaf.shape[1:] if name.startswith("layers/") else leaf.shape
        shape = shape[::-1] if name.endswith("/kernel") else shape
        expected |= dict.fromkeys(_tensors_of(config, name), shape)
    return expected


def _tensor_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors of a model's folder; ConfigError if one is missing."""
    index = folder / _INDEX
    if (folder / _WHOLE).is_file():  # before an index, as transformers has it
        names = [_WHOLE]
    elif index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigError(f"{index} holds no 'weight_map' of tensors: download it again.")
        names = sorted(set(map(str, weight_map.values())))
        # An index is data: it names files of its folder, and none elsewhere on this host.
        if outside := [name for name in names if not assets.is_inside(name)]:
            raise ConfigError(
                f"{index} names {outside[0]!r}, which is not in its folder: download the model "
                "again from where you trust it."
            )
    else:
        names = sorted(file.name for file in folder.glob("*.safetensors"))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent or not names:
        what = f"lacks {', '.join(absent)}" if absent else "holds no *.safetensors"
        hint = assets.why_missing(folder / (absent[0] if absent else _WHOLE))
        raise ConfigError(f"{folder} {what}{hint}: download the model again, safetensors included.")
    for name in names:
        if git_lfs.is_pointer_file(folder / name):
            raise ConfigError(f"{folder / name} {git_lfs.SENTENCE}.")
    return [folder / name for name in names]


def _open_safetensors(path: pathlib.Path, stack: contextlib.ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="np"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}): download it again.") from error


def _open_tensors(
    folder: pathlib.Path, config: DecoderConfig, stack: contextlib.ExitStack
) -> Tensors:
    """{canonical tensor name: (open file, name in it)} over all files of the folder."""
    tensors: Tensors = {}
    for path in _tensor_files(folder):
        file = _open_safetensors(path, stack)
        for key in file.keys():
            canonical = _canonical_name(key, config)
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
    names = _tensors_of(config, leaf_name)
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
    # All processes gather each tensor, one after another; only the writer keeps it.
    weight_map = {}
    for number, entries in enumerate(files, 1):
        file = _WHOLE
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
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


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


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        fields = strict_json.loads(file.read_bytes())
    except strict_json.Unreadable as error:
        raise ConfigError(error.after(file, "download it again")) from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error}): download it again.") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{file} holds no JSON object: download it again.")
    return fields


def _write_json(file: paths.Path, fields: Mapping[str, Any]) -> None:
    paths.write(file, json.dumps(fields, indent=2) + "\n")
