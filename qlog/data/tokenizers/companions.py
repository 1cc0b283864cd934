"""The small files next to a tokenizer: special tokens, ends of answers, the chat template."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from qlog.data import fields
from qlog.data.chat_templates import BUILT_IN_NAME
from qlog.errors import ConfigError
from qlog.storage import paths, strict_json

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
PROCESSOR_TEMPLATE = "chat_template.json"
# All that is read next to a tokenizer: a tokenizer that is one file in a bucket comes with these.
NAMES = (CONFIG, SPECIAL_TOKENS, GENERATION, TEMPLATE, PROCESSOR_TEMPLATE)
# Special tokens that `Tokenizer` reads; of all others only a template may make use.
_READ_TOKENS = ("eos_token", "pad_token", "bos_token")


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """What the files next to a tokenizer say about it; the defaults are those of no files.

    Attributes:
      special_tokens: {"eos_token": "<eos>", ...}, those that are set; None without the files.
      special_tokens_file: the file that has them, for messages.
      adds_bos: whether each text begins with bos_token.
      eos_ids: the ids of generation_config.json that end a text, in its order.
      generation_file: that file, for messages.
      template: the text of the model's own chat template; None without one.
      template_file: the file that has it.
    """

    special_tokens: Mapping[str, str] | None = None
    special_tokens_file: pathlib.Path | None = None
    adds_bos: bool = False
    eos_ids: tuple[int, ...] = ()
    generation_file: pathlib.Path | None = None
    template: str | None = None
    template_file: pathlib.Path | None = None


NO_FILES = TokenizerFiles()


def read(folder: pathlib.Path, *, with_template: bool = True) -> TokenizerFiles:
    """Reads the files of a folder that are there.

    Args:
      with_template: False leaves the template out, so that a faulty one does no harm.

    Raises:
      ConfigError: a file that is not what its name says.
    """
    config = _json(folder / CONFIG)
    special = _json(folder / SPECIAL_TOKENS)
    generation = _json(folder / GENERATION)
    has_tokens = config is not None or special is not None
    # special_tokens_map.json is the older place. transformers reads it only where the config does
    # not list the added tokens, and then it counts first.
    tokens = dict(config or {})
    special_tokens_file = folder / (SPECIAL_TOKENS if config is None else CONFIG)
    if "added_tokens_decoder" not in tokens:
        tokens |= special or {}
    template, template_file = _template(folder, config) if with_template else (None, None)
    return TokenizerFiles(
        special_tokens=_special_tokens(tokens, special_tokens_file) if has_tokens else None,
        special_tokens_file=special_tokens_file if has_tokens else None,
        adds_bos=_switch(config or {}, "add_bos_token", folder / CONFIG),
        eos_ids=_eos_ids(generation or {}, folder / GENERATION),
        generation_file=folder / GENERATION if generation is not None else None,
        template=template,
        template_file=template_file,
    )


def read_template(path: pathlib.Path) -> str:
    """The text of a .jinja file.

    Raises:
      ConfigError: no such file, or not a text in UTF-8.
    """
    if not paths.is_file(path):
        raise ConfigError(
            f"{fields.CHAT_TEMPLATE} = {path} does not exist: give the path of a .jinja file, "
            f"{BUILT_IN_NAME!r}, or '' for the model's own template."
        )
    return _text(path)


def _text(path: pathlib.Path) -> str:
    try:
        return strict_json.text(path.read_bytes())
    except strict_json.Unreadable as error:
        raise ConfigError(error.after(path, "download it again")) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error}): download it again.") from error


def _json(path: pathlib.Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if the file is not there."""
    if not paths.is_file(path):
        return None
    try:
        found = strict_json.loads(_text(path))
    except strict_json.Unreadable as error:
        raise ConfigError(error.after(path, "download it again")) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object: download it again.")
    return found


def _switch(config: Mapping[str, Any], key: str, path: pathlib.Path) -> bool:
    """A switch of tokenizer_config.json; 0 and 1 are as good as false and true."""
    value = config.get(key)
    if value not in (None, False, True):
        raise ConfigError(f"{path}: {key} = {value!r} must be true or false: correct it.")
    return bool(value)


def _special_tokens(config: Mapping[str, Any], path: pathlib.Path) -> dict[str, str]:
    """The keys that end in _token: a text, or an object with the text as `content`."""
    found = {}
    for key, value in config.items():
        # add_bos_token and the like are switches, also where they are written as 0 or 1.
        if not key.endswith("_token") or value is None or isinstance(value, bool):
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            if key not in _READ_TOKENS:
                continue  # nothing but a template could read it
            raise ConfigError(f"{path}: {key} = {value!r} is not a token's name: correct it.")
        found[key] = text
    return found


def _eos_ids(generation: Mapping[str, Any], path: pathlib.Path) -> tuple[int, ...]:
    """eos_token_id of generation_config.json: one id, a list of them, or nothing."""
    value = generation.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(id_) is not int for id_ in ids):  # isinstance would take True for an int
        raise ConfigError(
            f"{path}: eos_token_id = {value!r} must be a token's id, or a list of them: correct it."
        )
    return tuple(ids)


def _template(
    folder: pathlib.Path, config: Mapping[str, Any] | None
) -> tuple[str | None, pathlib.Path | None]:
    """The model's own chat template and its file, in the order in which transformers looks."""
    if paths.is_file(folder / TEMPLATE):
        return _text(folder / TEMPLATE), folder / TEMPLATE
    # The last one belongs to the processors of models with images; tokenizers come first.
    for name, values in ((CONFIG, config), (PROCESSOR_TEMPLATE, None)):
        values = _json(folder / name) if values is None else values
        template = (values or {}).get("chat_template")
        if template is None:
            continue
        # Several templates: [{"name": "default", "template": ...}, {"name": "tool_use", ...}].
        if isinstance(template, list) and all(isinstance(each, dict) for each in template):
            named = (each.get("template") for each in template if each.get("name") == "default")
            template = next(named, None)
        if not isinstance(template, str):
            raise ConfigError(
                f"{folder / name}: chat_template is neither a text nor a list with a template that "
                f"is named 'default': set {fields.CHAT_TEMPLATE} to the path of a .jinja file, or "
                f"to {BUILT_IN_NAME!r}."
            )
        return template, folder / name
    return None, None
