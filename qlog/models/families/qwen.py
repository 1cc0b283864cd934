"""Qwen2, Qwen2.5 and Qwen3."""

from typing import Any

from qlog.models.families.family import (
    Family,
    Fields,
    layer_types,
    read_windows,
    rope_of_all_layers,
)


def _read(fields: Fields) -> dict[str, Any]:
    # Published files carry a sliding_window that use_sliding_window turns off.
    window = fields.get("sliding_window") or 0
    window = window if fields.get("use_sliding_window") else 0
    first_sliding = fields.get("max_window_layers", 28)
    windows = read_windows(fields, window, lambda layer: layer >= first_sliding)
    return {"layer_windows": windows, **rope_of_all_layers(fields)}


def _write(config: Fields, windows: tuple[int, ...]) -> dict[str, Any]:
    del config  # the rest is a mere renaming
    if not any(windows):
        return {"hidden_act": "silu"}
    return {
        "hidden_act": "silu",
        "use_sliding_window": True,
        "sliding_window": max(windows),
        "layer_types": layer_types(windows),
    }


# The numbers below are those of the models' config.json on the Hub.
def _qwen3(num_layers: int, width: int, num_heads: int, mlp_width: int, tied: bool) -> Fields:
    return dict(
        vocab_size=151_936,
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=mlp_width,
        tied_embeddings=tied,
    )


def _qwen2p5(
    num_layers: int,
    width: int,
    num_heads: int,
    num_kv_heads: int,
    mlp_width: int,
    tied: bool,
    norm_eps: float = 1e-6,
) -> Fields:
    # From 7B on the head has its own weights, and the vocabulary is padded further.
    return dict(
        vocab_size=151_936 if tied else 152_064,
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=width // num_heads,
        mlp_width=mlp_width,
        tied_embeddings=tied,
        norm_eps=norm_eps,
        max_positions=32_768 if tied else 131_072,
    )


QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    traits=dict(qk_norm=True),
    defaults=dict(rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=1e4, head_dim=128),
    read=_read,
    write=_write,
    presets={
        "qwen3_0p6b": _qwen3(28, 1024, 16, 3072, True),
        "qwen3_1p7b": _qwen3(28, 2048, 16, 6144, True),
        "qwen3_4b": _qwen3(36, 2560, 32, 9728, True),
        "qwen3_8b": _qwen3(36, 4096, 32, 12288, False),
        "qwen3_14b": _qwen3(40, 5120, 40, 17408, False),
        "qwen3_32b": _qwen3(64, 5120, 64, 25600, False),
    },
)

QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    traits=dict(qk_norm=False, qkv_bias=True),
    defaults=dict(rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=1e4),
    read=_read,
    write=_write,
    # Base models; some Instruct siblings differ in norm_eps, which their config.json says.
    presets={
        "qwen2p5_0p5b": _qwen2p5(24, 896, 14, 2, 4864, True),
        "qwen2p5_1p5b": _qwen2p5(28, 1536, 12, 2, 8960, True),
        "qwen2p5_3b": _qwen2p5(36, 2048, 16, 2, 11008, True),
        "qwen2p5_7b": _qwen2p5(28, 3584, 28, 4, 18944, False),
        "qwen2p5_14b": _qwen2p5(48, 5120, 40, 8, 13824, False, 1e-5),
        "qwen2p5_32b": _qwen2p5(64, 5120, 40, 8, 27648, False, 1e-5),
    },
)
