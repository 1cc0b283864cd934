"""The tensors of a model's folder: in which files they are, and which parameter each one is."""

import collections
import contextlib
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import jax
from safetensors import SafetensorError, safe_open

from qlog.errors import ConfigError
from qlog.models.config import DecoderConfig
from qlog.models.decoder import Params
from qlog.models.families import FAMILIES
from qlog.storage import assets, git_lfs, paths, strict_json

WHOLE = "model.safetensors"  # all tensors, where one file holds them
INDEX = "model.safetensors.index.json"  # which file holds which tensor, where there are several
# Tensors that some files carry and the decoder does not need: RoPE tables, the part for images.
_IGNORED = re.compile(r"rotary_emb\.|vision_tower\.|multi_modal_projector\.")
_LAYER = re.compile(r"\.(\d+)\.")  # its number in the name of a tensor
# Files of models with images put the decoder one level down; older and newer spelling.
_OUTER_NAMES = (
    (re.compile(r"^language_model\.model\.|^model\.language_model\."), "model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
)


# ---- Files ----


def tensor_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors of a model's folder; ConfigError if one is missing."""
    index = folder / INDEX
    if paths.is_file(folder / WHOLE):  # before an index, as transformers has it
        names = [WHOLE]
    elif paths.is_file(index):
        weight_map = read_json(index).get("weight_map")
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
    absent = [name for name in names if not paths.is_file(folder / name)]
    if absent or not names:
        what = f"lacks {', '.join(absent)}" if absent else "holds no *.safetensors"
        hint = assets.why_missing(folder / (absent[0] if absent else WHOLE))
        raise ConfigError(f"{folder} {what}{hint}: download the model again, safetensors included.")
    for name in names:
        if git_lfs.is_pointer_file(folder / name):
            raise ConfigError(f"{folder / name} {git_lfs.SENTENCE}.")
    return [folder / name for name in names]


def open_safetensors(path: pathlib.Path, stack: contextlib.ExitStack) -> Any:
    """The open file, which `stack` closes; ConfigError if it is damaged."""
    try:
        return stack.enter_context(safe_open(path, framework="np"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}): download it again.") from error


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file of the folder; ConfigError where there is none."""
    try:
        fields = strict_json.loads(file.read_bytes())
    except strict_json.Unreadable as error:
        raise ConfigError(error.after(file, "download it again")) from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error}): download it again.") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{file} holds no JSON object: download it again.")
    return fields


# ---- Names and shapes ----


def layers_in(names: Iterable[str]) -> collections.Counter[str]:
    """How many of the tensors each layer has, by its number."""
    found = map(_LAYER.search, names)
    return collections.Counter(match[1] for match in found if match)


def leaf_name(path: tuple[Any, ...]) -> str:
    """The keys of a leaf of params, such as 'layers/q_proj/kernel'."""
    return "/".join(entry.key for entry in path)


def canonical_name(tensor: str, config: DecoderConfig) -> str | None:
    """A tensor's name as in a text-only file; None if the decoder has no use for it."""
    # Tied models have no head of their own, but some files carry the embedding once more as one.
    if config.tied_embeddings and is_head(tensor):
        return None
    tensor = _plain_name(tensor)
    return None if _IGNORED.search(tensor) else tensor


def _plain_name(tensor: str) -> str:
    for pattern, replacement in _OUTER_NAMES:
        tensor = pattern.sub(replacement, tensor)
    return tensor


def is_head(tensor: str) -> bool:
    """Whether a tensor is the output head, whatever the spelling of its name."""
    return _plain_name(tensor) == "lm_head.weight"


def tensors_of(config: DecoderConfig, leaf: str) -> list[str]:
    """The tensors that make up a leaf: one, or one per layer."""
    tensors = FAMILIES[config.family].tensors
    if leaf not in tensors:
        raise ConfigError(
            f"DecoderConfig: models of family {config.family!r} have no tensor for {leaf!r}; "
            "is config.architecture right?"
        )
    name = tensors[leaf]
    return [name.format(i) for i in range(config.num_layers)] if "{}" in name else [name]


def expected_shapes(config: DecoderConfig, leaves: Params) -> dict[str, tuple[int, ...]]:
    """{tensor: its shape in the file}: stacked leaves split up, kernels transposed."""
    expected = {}
    for path, leaf in jax.tree.leaves_with_path(leaves):
        name = leaf_name(path)
        # [L, ...] -> L tensors [...]; [I, O] -> [O, I], as torch stores a linear layer.
        shape = leaf.shape[1:] if name.startswith("layers/") else leaf.shape
        shape = shape[::-1] if name.endswith("/kernel") else shape
        expected |= dict.fromkeys(tensors_of(config, name), shape)
    return expected
