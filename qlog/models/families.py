"""How Hugging Face names things, family by family: config.json's fields and the files' tensors."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from qlog.errors import ConfigError
from qlog.models.config import TRAITS, DecoderConfig, RopeScaling

# model_type in config.json -> our family and the architecture it stands for.
_MODEL_TYPES = {
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "llama": ("llama", "LlamaForCausalLM"),
    "gemma3_text": ("gemma3", "Gemma3ForCausalLM"),
}
# Checkpoints with images: the decoder is in config.json's text_config.
_TEXT_PART_OF = {"gemma3": "gemma3_text"}

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
# What transformers assumes where config.json is silent; published Gemma files are silent a lot.
_DEFAULTS = {
    "qwen3": dict(rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=1e4, head_dim=128),
    "qwen2": dict(rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=1e4),
    "llama": dict(rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=1e4),
    "gemma3": dict(
        vocab_size=262_208,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        max_position_embeddings=131_072,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        sliding_window=4096,
        query_pre_attn_scalar=256,
    ),
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
# What a field must be wherever it stands. Hand-made files hold anything.
_TYPES = (
    (
        [name for ours, name in _FIELDS.items() if ours not in ("norm_eps", "tied_embeddings")],
        lambda value: type(value) is int and value > 0,
        "a whole number above 0",
    ),
    (
        ("sliding_window", "max_window_layers", "sliding_window_pattern"),
        lambda value: type(value) is int and value >= 0,
        "a whole number",
    ),
    (
        ("rms_norm_eps", "query_pre_attn_scalar"),
        lambda value: _is_positive(value),
        "a number above 0",
    ),
    (
        ("tie_word_embeddings", "use_sliding_window"),
        lambda value: type(value) is bool,
        "true or false",
    ),
    (("rope_parameters", "rope_scaling"), lambda value: isinstance(value, Mapping), "an object"),
    (("architectures", "layer_types"), lambda value: isinstance(value, list), "a list"),
)
_ACTIVATIONS = {
    family: {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[traits.get("activation", "silu")]
    for family, traits in TRAITS.items()
}

# Leaf of params -> tensor; kernels are stored transposed. "{}" is the layer's number.
_TENSORS = {
    "embed": "model.embed_tokens.weight",
    "unembed": "lm_head.weight",
    "final_norm": "model.norm.weight",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/q_proj/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/q_proj/bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers/k_proj/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/k_proj/bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
    "layers/v_proj/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/v_proj/bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/o_proj/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/gate_proj/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/up_proj/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/down_proj/kernel": "model.layers.{}.mlp.down_proj.weight",
}
_TENSORS_WITH_POST_NORMS = _TENSORS | {
    "layers/post_attention_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers/post_mlp_norm/scale": "model.layers.{}.post_feedforward_layernorm.weight",
}
# Tensors that some files carry and the decoder does not need: RoPE tables, the half for images.
_IGNORED = re.compile(r"rotary_emb\.|vision_tower\.|multi_modal_projector\.")
# Files of models with images put the decoder one level down; older and newer spelling.
_OUTER_NAMES = (
    (re.compile(r"^language_model\.model\.|^model\.language_model\."), "model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
)


def tensor_name(config: DecoderConfig, leaf: str) -> str:
    """The file's name for a leaf of params such as 'layers/q_proj/kernel'."""
    return (_TENSORS_WITH_POST_NORMS if config.post_norms else _TENSORS)[leaf]


def canonical_name(tensor: str, config: DecoderConfig) -> str | None:
    """A tensor's name as in a text-only file; None if the decoder has no use for it."""
    for pattern, replacement in _OUTER_NAMES:
        tensor = pattern.sub(replacement, tensor)
    if _IGNORED.search(tensor) or (config.tied_embeddings and tensor == "lm_head.weight"):
        return None
    return tensor


def from_hf_config(fields: Mapping[str, Any]) -> DecoderConfig:
    """The DecoderConfig that a Hugging Face config.json describes.

    Raises ConfigError for architectures and options that the decoder cannot express.
    """
    if str(fields.get("model_type")) in _TEXT_PART_OF:
        text = fields.get("text_config")
        if not isinstance(text, Mapping):
            raise ConfigError(f"config.json: text_config = {text!r} must be an object.")
        text = {"model_type": _TEXT_PART_OF[fields["model_type"]], **text}
        outer = ("tie_word_embeddings", "quantization_config")
        fields = text | {name: fields[name] for name in outer if name in fields}
    model_type = fields.get("model_type")
    if str(model_type) not in _MODEL_TYPES:
        raise ConfigError(
            f"config.json: model_type {model_type!r} is not supported; qlog's decoder covers "
            f"{', '.join(_MODEL_TYPES)} and the text part of {', '.join(_TEXT_PART_OF)}."
        )
    family, architecture = _MODEL_TYPES[model_type]
    _check_types(fields)
    for name in fields.get("architectures") or ():
        if name != architecture:
            raise ConfigError(
                f"config.json: architecture {name!r} is not supported; of model_type "
                f"{model_type!r} qlog reads {architecture}."
            )
    fields = _with_defaults(fields, family)
    _check_supported(fields, family)
    theta, scaling, local_theta = _rope(fields, family)
    scalar = fields.get("query_pre_attn_scalar") if family == "gemma3" else None
    return DecoderConfig(
        **{ours: fields[theirs] for ours, theirs in _FIELDS.items()},
        **TRAITS[family],
        query_pre_attn_scalar=None if scalar in (None, fields["head_dim"]) else float(scalar),
        layer_windows=_windows(fields, family),
        rope_theta=theta,
        rope_scaling=scaling,
        local_rope_theta=local_theta,
    )


def to_hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder, in the spelling that old and new readers both know.

    Raises ConfigError when the family's config.json has no words for it (say a field of
    `architecture` that was overridden).
    """
    model_type, architecture = next(
        (name, arch) for name, (family, arch) in _MODEL_TYPES.items() if family == config.family
    )
    fields = {"architectures": [architecture], "model_type": model_type}
    fields |= {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    fields["rope_theta"] = config.rope_theta
    scaling = config.rope_scaling
    if scaling and scaling.original_length is None:
        fields["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
    elif scaling:
        fields["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
            "original_max_position_embeddings": scaling.original_length,
        }
    activation = _ACTIVATIONS[config.family]
    windows = config.windows
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    if config.family == "gemma3":
        scalar = config.query_pre_attn_scalar or config.head_dim
        fields |= {
            "hidden_activation": activation,
            "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
            "rope_local_base_freq": config.local_rope_theta,
            "sliding_window": max(windows) or 4096,
            "layer_types": kinds,
        }
    else:
        fields["hidden_act"] = activation
        if any(windows):
            fields |= {
                "use_sliding_window": True,
                "sliding_window": max(windows),
                "layer_types": kinds,
            }
    understood = from_hf_config(fields)
    for field in dataclasses.fields(config):
        ours, read = getattr(config, field.name), getattr(understood, field.name)
        if ours != read and not (field.name == "layer_windows" and windows == understood.windows):
            raise ConfigError(
                f"DecoderConfig.{field.name} = {ours!r} cannot be written for family "
                f"{config.family!r}: its config.json would mean {read!r}."
            )
    return fields


def _with_defaults(fields, family):
    fields = _DEFAULTS[family] | {k: v for k, v in fields.items() if v is not None}
    if "num_attention_heads" in fields:
        fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
        if "hidden_size" in fields:
            fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    missing = [name for name in _FIELDS.values() if name not in fields]
    if missing:
        raise ConfigError(f"config.json: field {missing[0]!r} is missing.")
    return fields


def _check_types(fields):
    for names, is_right, what in _TYPES:
        for name in names:
            if fields.get(name) is not None and not is_right(fields[name]):
                raise ConfigError(f"config.json: {name} = {fields[name]!r} must be {what}.")


def _check_supported(fields, family):
    activation = _ACTIVATIONS[family]
    only = _ONLY | {"hidden_act": (None, activation), "hidden_activation": (None, activation)}
    for name, allowed in only.items():
        if fields.get(name) not in allowed:
            raise ConfigError(
                f"config.json: {name} = {fields[name]!r} is not supported for {family}; "
                f"qlog's decoder knows {allowed[-1]!r}."
            )


def _rope(fields, family):
    """(theta, scaling, theta of layers with a window or None), from the old or the new spelling."""
    old = {"rope_theta": fields["rope_theta"], **(fields.get("rope_scaling") or {})}
    new = fields.get("rope_parameters") or {}
    if family != "gemma3":
        return *_one_rope(old | new), None
    if "full_attention" not in new:
        new = {"full_attention": new}
    for kind in ("full_attention", "sliding_attention"):
        if not isinstance(new.get(kind) or {}, Mapping):
            raise ConfigError(
                f"config.json: rope_parameters.{kind} = {new[kind]!r} must be an object."
            )
    theta, scaling = _one_rope(old | (new["full_attention"] or {}))
    local = {"rope_theta": fields["rope_local_base_freq"], **(new.get("sliding_attention") or {})}
    local_theta, local_scaling = _one_rope(local)
    if local_scaling:
        raise ConfigError(f"config.json: scaled RoPE on sliding layers ({local}) is not supported.")
    return theta, scaling, local_theta


def _is_positive(value):
    return type(value) in (int, float) and 0 < value < math.inf


def _one_rope(rope):
    def number(name):
        if not _is_positive(rope.get(name)):
            raise ConfigError(
                f"config.json: {name} = {rope.get(name)!r} of the RoPE {rope} must be a number "
                "above 0."
            )
        return float(rope[name])

    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"config.json: partial RoPE ({rope}) is not supported.")
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = RopeScaling(number("factor"))
    elif kind == "llama3":
        scaling = RopeScaling(
            number("factor"),
            int(number("original_max_position_embeddings")),
            number("low_freq_factor"),
            number("high_freq_factor"),
        )
    else:
        raise ConfigError(
            f"config.json: RoPE scaling of type {kind!r} is not supported; qlog's decoder knows "
            "'default', 'linear' and 'llama3'."
        )
    return number("rope_theta"), scaling


def _windows(fields, family):
    """DecoderConfig.layer_windows: the shortest cycle that spells out the layers."""
    num_layers = fields["num_hidden_layers"]
    slides_at_all = {"gemma3": True, "llama": False}.get(family, fields.get("use_sliding_window"))
    window = (fields.get("sliding_window") or 0) if slides_at_all else 0
    if "layer_types" in fields:
        kinds = fields["layer_types"]
        if len(kinds) != num_layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
            raise ConfigError(
                f"config.json: layer_types = {kinds} must name one of 'full_attention' and "
                f"'sliding_attention' for each of {num_layers} layers."
            )
        slides = [kind == "sliding_attention" for kind in kinds]
    elif family == "gemma3":
        every = fields.get("sliding_window_pattern", 6)
        slides = [(layer + 1) % every != 0 for layer in range(num_layers)]
    else:
        slides = [layer >= fields.get("max_window_layers", 28) for layer in range(num_layers)]
    windows = tuple(window if slide else 0 for slide in slides)
    for cycle in range(1, num_layers):
        if all(windows[layer] == windows[layer % cycle] for layer in range(num_layers)):
            return windows[:cycle]
    return windows
