"""Gemma 3: text models, and the text part of those that read images."""

from collections.abc import Mapping
from typing import Any

from qlog.errors import ConfigError
from qlog.models.families.family import (
    TENSORS,
    Family,
    Fields,
    layer_types,
    read_rope,
    read_windows,
)
from qlog.models.rope import RopeScaling


def _read(fields: Fields) -> dict[str, Any]:
    # Layers with a window have unscaled RoPE of a lower base. In new files rope_parameters holds an
    # object for each kind of layer; in old ones all fields lie at the top.
    old = {"rope_theta": fields["rope_theta"], **(fields.get("rope_scaling") or {})}
    new = fields.get("rope_parameters") or {}
    if "full_attention" not in new:
        new = {"full_attention": new}
    for kind in ("full_attention", "sliding_attention"):
        if not isinstance(new.get(kind) or {}, Mapping):
            raise ConfigError(
                f"config.json: rope_parameters.{kind} = {new[kind]!r} must be an object."
            )
    theta, scaling = read_rope(old | (new["full_attention"] or {}))
    local = {"rope_theta": fields["rope_local_base_freq"], **(new.get("sliding_attention") or {})}
    local_theta, local_scaling = read_rope(local)
    if local_scaling:
        raise ConfigError(f"config.json: scaled RoPE on sliding layers ({local}) is not supported.")
    # Where layer_types is missing, every sixth layer sees everything.
    every = fields.get("sliding_window_pattern", 6)
    windows = read_windows(
        fields, fields.get("sliding_window") or 0, lambda layer: (layer + 1) % every != 0
    )
    scalar = fields["query_pre_attn_scalar"]
    return {
        "layer_windows": windows,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "local_rope_theta": local_theta,
        "query_pre_attn_scalar": None if scalar == fields["head_dim"] else float(scalar),
    }


def _write(config: Fields, windows: tuple[int, ...]) -> dict[str, Any]:
    scalar = config["query_pre_attn_scalar"] or config["head_dim"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "rope_local_base_freq": config["local_rope_theta"],
        "sliding_window": max(windows) or 4096,
        "layer_types": layer_types(windows),
    }


def _gemma3(
    num_layers: int, width: int, num_heads: int, num_kv_heads: int, mlp_width: int
) -> dict[str, Any]:
    return dict(
        vocab_size=262_208,
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=256,
        mlp_width=mlp_width,
        local_rope_theta=1e4,
        layer_windows=(1024,) * 5 + (0,),
        rope_scaling=RopeScaling(8.0),
        max_positions=131_072,
    )


# Sizes that read no images.
_TEXT_ONLY: dict[str, Any] = dict(
    vocab_size=262_144,
    layer_windows=(512,) * 5 + (0,),
    rope_scaling=None,
    max_positions=32_768,
)

GEMMA3 = Family(
    name="gemma3",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    text_part_of="gemma3",
    traits=dict(
        qk_norm=True,
        post_norms=True,
        norm_offset=True,
        scale_embeddings=True,
        activation="gelu_tanh",
    ),
    # Published files leave out a lot.
    defaults=dict(
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
    read=_read,
    write=_write,
    tensors=TENSORS
    | {
        "layers/post_attention_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
        "layers/mlp_norm/scale": "model.layers.{}.pre_feedforward_layernorm.weight",
        "layers/post_mlp_norm/scale": "model.layers.{}.post_feedforward_layernorm.weight",
    },
    presets={
        "gemma3_270m": _gemma3(18, 640, 4, 1, 2048) | _TEXT_ONLY,
        "gemma3_1b": _gemma3(26, 1152, 4, 1, 6912) | _TEXT_ONLY,
        "gemma3_4b": _gemma3(34, 2560, 8, 4, 10240),
        "gemma3_12b": _gemma3(48, 3840, 16, 8, 15360),
        "gemma3_27b": _gemma3(62, 5376, 32, 16, 21504)
        | dict(head_dim=128, query_pre_attn_scalar=168.0),
    },
)
