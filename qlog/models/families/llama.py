"""Llama 3.1 and 3.2, text only."""

from typing import Any

from qlog.models.families.family import Family, Fields, read_windows, rope_of_all_layers
from qlog.models.rope import RopeScaling


def _read(fields: Fields) -> dict[str, Any]:
    return {"layer_windows": read_windows(fields, window=0), **rope_of_all_layers(fields)}


def _write(config: Fields, windows: tuple[int, ...]) -> dict[str, Any]:
    del config, windows  # the rest is a mere renaming, and there are no windows
    return {"hidden_act": "silu"}


def _llama3(
    num_layers: int, width: int, num_heads: int, mlp_width: int, tied: bool, rope_factor: float
) -> Fields:
    return dict(
        vocab_size=128_256,
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=width // num_heads,
        mlp_width=mlp_width,
        tied_embeddings=tied,
        norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=RopeScaling(rope_factor, 8192),
        max_positions=131_072,
    )


LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    traits=dict(qk_norm=False),
    defaults=dict(rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=1e4),
    read=_read,
    write=_write,
    presets={
        "llama3p1_8b": _llama3(32, 4096, 32, 14336, False, 8.0),
        "llama3p1_70b": _llama3(80, 8192, 64, 28672, False, 8.0),
        "llama3p2_1b": _llama3(16, 2048, 32, 8192, True, 32.0),
        "llama3p2_3b": _llama3(28, 3072, 24, 8192, True, 32.0),
    },
)
