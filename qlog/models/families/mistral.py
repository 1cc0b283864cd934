"""Mistral 7B, Nemo, Ministral 8B and Small, and the text part of Mistral Small 3.1 and 3.2."""

from typing import Any

from qlog.errors import ConfigError
from qlog.models.families.family import Family, Fields, read_windows, rope_of_all_layers


def _read(fields: Fields) -> dict[str, Any]:
    # A null is a model without windows; a file that leaves the field out has transformers' 4096.
    window = fields.get("sliding_window") or 0
    if read_windows(fields, window, lambda layer: True) != (window,):
        # transformers reads no layer_types for this model_type, and so would mask differently.
        raise ConfigError(
            f"config.json: layer_types = {fields['layer_types']} is not supported for mistral: all "
            f"layers have sliding_window = {fields.get('sliding_window')}."
        )
    return {"layer_windows": (window,), **rope_of_all_layers(fields)}


def _write(config: Fields, windows: tuple[int, ...]) -> dict[str, Any]:
    del config  # the rest is a mere renaming
    return {"hidden_act": "silu", "sliding_window": max(windows) or None}


# The numbers below are those of the models' config.json on the Hub.
def _mistral(
    num_layers: int, width: int, mlp_width: int, vocab_size: int, theta: float
) -> dict[str, Any]:
    return dict(
        vocab_size=vocab_size,
        num_layers=num_layers,
        width=width,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=mlp_width,
        tied_embeddings=False,
        norm_eps=1e-5,
        rope_theta=theta,
        max_positions=32_768,
    )


MISTRAL = Family(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    text_part_of="mistral3",
    traits=dict(qk_norm=False),
    defaults=dict(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        max_position_embeddings=131_072,
        rope_theta=1e4,
        sliding_window=4096,
    ),
    nullable=frozenset({"sliding_window", "num_key_value_heads"}),
    read=_read,
    write=_write,
    presets={
        "mistral_7b": _mistral(32, 4096, 14_336, 32_768, 1e6),  # v0.3
        "mistral_nemo_12b": _mistral(40, 5120, 14_336, 131_072, 1e6) | dict(max_positions=131_072),
        "ministral_8b": _mistral(36, 4096, 12_288, 131_072, 1e8) | dict(layer_windows=(32_768,)),
        "mistral_small_24b": _mistral(40, 5120, 32_768, 131_072, 1e8),  # 3, of January 2025
    },
)
