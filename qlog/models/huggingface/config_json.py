"""Hugging Face's config.json in and out: what all families have in common."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qlog.errors import ConfigError
from qlog.models import limits
from qlog.models.config import DecoderConfig
from qlog.models.families import FAMILIES, Family
from qlog.models.families.family import Fields, write_scaling

# DecoderConfig field -> field of config.json.
_FIELDS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "width": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
}
# Fields that change the arithmetic in ways the decoder does not know: the values it can take.
_ONLY = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
}


class _Type(NamedTuple):
    """What a field must be wherever it stands; files written by hand hold anything."""

    names: tuple[str, ...]  # of the fields in config.json
    is_right: Callable[[Any], bool]  # whether a value is of the type
    description: str  # the type in words, for the message: "... must be DESCRIPTION"


def _size(ours: str, theirs: str) -> _Type:
    """Of a field that is a whole number above 0 in both."""
    return _Type(
        (theirs,),
        lambda value: limits.is_size(value, ours) and value > 0,
        f"{limits.size_text(ours)}, above 0",
    )


def _number(ours: str, theirs: str) -> _Type:
    """Of a field that is a number above 0 in both."""
    return _Type((theirs,), lambda value: limits.is_number(value, ours), limits.number_text(ours))


_TYPES = (
    *(
        _size(ours, theirs)
        for ours, theirs in _FIELDS.items()
        if ours not in ("norm_eps", "tied_embeddings")
    ),
    _size("", "sliding_window_pattern"),
    _Type(
        ("sliding_window", "max_window_layers"),
        lambda value: limits.is_size(value) and value >= 0,
        f"{limits.size_text()}, at least 0",
    ),
    _number("norm_eps", "rms_norm_eps"),
    _number("query_pre_attn_scalar", "query_pre_attn_scalar"),
    _Type(
        ("tie_word_embeddings", "use_sliding_window"),
        lambda value: type(value) is bool,
        "true or false",
    ),
    _Type(
        ("rope_parameters", "rope_scaling"),
        lambda value: isinstance(value, Mapping),
        "an object",
    ),
    _Type(("architectures", "layer_types"), lambda value: isinstance(value, list), "a list"),
)


def from_hf_config(fields: Fields) -> DecoderConfig:
    """The DecoderConfig that a Hugging Face config.json describes.

    Raises:
      ConfigError: architectures and options that the decoder cannot express.
    """
    fields = _text_part(fields)
    family = _family_of(fields)
    # Types first, so that all that follows may compute with the values.
    _check_types(fields)
    for name in fields.get("architectures") or ():
        if name != family.architecture:
            raise ConfigError(
                f"config.json: architecture {name!r} is not supported; of model_type "
                f"{family.model_type!r} qlog reads {family.architecture}."
            )
    fields = _with_defaults(fields, family)
    _check_supported(fields, family)
    renamed = {ours: fields[theirs] for ours, theirs in _FIELDS.items()}
    return DecoderConfig(**renamed, family=family.name, **family.traits, **family.read(fields))


def to_hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder, in the spelling that old and new readers both know.

    Raises:
      ConfigError: the family's config.json cannot express the decoder (say, a field that
        `config.architecture` changed).
    """
    family = FAMILIES[config.family]
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
    }
    fields |= {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    # RoPE at the top level is the old spelling: transformers 5 still reads it, and older ones read
    # no other.
    fields["rope_theta"] = config.rope_theta
    if config.rope_scaling:
        fields["rope_scaling"] = write_scaling(config.rope_scaling)
    fields |= family.write(vars(config), config.windows)
    # Reading it again shows what was lost, whatever it is.
    understood = from_hf_config(fields)
    for field in dataclasses.fields(config):
        ours, read = getattr(config, field.name), getattr(understood, field.name)
        # Different cycles may spell the same layers.
        is_same = ours == read or (
            (field.name == "layer_windows" and config.windows == understood.windows)
            or (field.name == "layer_rope" and config.has_rope == understood.has_rope)
        )
        if not is_same:
            raise ConfigError(
                f"DecoderConfig.{field.name} = {ours!r} cannot be written for family "
                f"{config.family!r}: its config.json would mean {read!r}."
            )
    return fields


def _text_part(fields: Fields) -> Fields:
    """The fields of the decoder: of a checkpoint with images, those of its text_config."""
    for family in FAMILIES.values():
        if family.text_part_of is None or fields.get("model_type") != family.text_part_of:
            continue
        text = fields.get("text_config")
        if not isinstance(text, Mapping):
            raise ConfigError(f"config.json: text_config = {text!r} must be an object.")
        # These two concern the text part but may stand outside of it.
        outer = ("tie_word_embeddings", "quantization_config")
        outer_fields = {name: fields[name] for name in outer if name in fields}
        return {"model_type": family.model_type, **text, **outer_fields}
    return fields


def _family_of(fields: Fields) -> Family:
    model_type = fields.get("model_type")
    for family in FAMILIES.values():
        if family.model_type == model_type:
            return family
    model_types = ", ".join(family.model_type for family in FAMILIES.values())
    with_images = ", ".join(f.text_part_of for f in FAMILIES.values() if f.text_part_of)
    raise ConfigError(
        f"config.json: model_type {model_type!r} is not supported; qlog's decoder covers "
        f"{model_types} and the text part of {with_images}; `models.register` adds a family."
    )


def _with_defaults(fields: Fields, family: Family) -> dict[str, Any]:
    """All fields that reading needs; ConfigError for one that has no default."""
    # A null means the default, as a field that is left out; of a nullable field it means none.
    none = {name for name in family.nullable if fields.get(name, ...) is None}
    defaults = {name: value for name, value in family.defaults.items() if name not in none}
    found = {**defaults, **{name: value for name, value in fields.items() if value is not None}}
    # Defaults that follow from other fields: one key/value head per query head, and heads that
    # share the width.
    if "num_attention_heads" in found:
        found.setdefault("num_key_value_heads", found["num_attention_heads"])
        if "hidden_size" in found:
            found.setdefault("head_dim", found["hidden_size"] // found["num_attention_heads"])
    missing = [name for name in _FIELDS.values() if name not in found]
    if missing:
        raise ConfigError(f"config.json: field {missing[0]!r} is missing.")
    return found


def _check_types(fields: Fields) -> None:
    for kind in _TYPES:
        for name in kind.names:
            value = fields.get(name)
            if value is not None and not kind.is_right(value):
                raise ConfigError(f"config.json: {name} = {value!r} must be {kind.description}.")


def _check_supported(fields: Fields, family: Family) -> None:
    # The activation has two names in config.json: Gemma's files say hidden_activation.
    allowed = (None, family.activation)
    only = _ONLY | {"hidden_act": allowed, "hidden_activation": allowed}
    for name, values in only.items():
        if fields.get(name) not in values:
            raise ConfigError(
                f"config.json: {name} = {fields[name]!r} is not supported for {family.name}; "
                f"qlog's decoder knows {values[-1]!r}."
            )
