"""The decoder's shape, what sets the families apart, and the named presets."""

import dataclasses
from collections.abc import Mapping

from qlog.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Slows RoPE's frequencies down, for contexts longer than the ones trained on first.

    Without `original_length` every frequency is divided by `factor` (Gemma 3). With it, Llama 3's
    rule: wavelengths above original_length / low_frequency are divided by `factor`, those below
    original_length / high_frequency are kept, and the ones between are interpolated.
    """

    factor: float
    original_length: int | None = None
    low_frequency: float = 1.0
    high_frequency: float = 4.0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides the shape and the arithmetic of a decoder; hashable, so jit-static.

    Widths are in units, lengths in tokens. `head_dim` is independent of `width // num_heads`
    (Qwen3 0.6B: 16 heads of 128 over a width of 1024).

    The vocabulary is often padded (Qwen3: 151,936 rows for 151,669 tokens). The padding rows are
    ordinary rows here: whoever turns hidden states into probabilities, sampler and scorer alike,
    masks them by the tokenizer's own size, `valid_vocab`.
    """

    vocab_size: int  # rows of the embedding, padding rows included
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tied_embeddings: bool = True
    qk_norm: bool = True
    family: str = "qwen3"  # a key of TRAITS: tensor names and config.json of Hugging Face folders
    qkv_bias: bool = False
    post_norms: bool = False  # also normalise what attention and MLP add to the residual stream
    norm_offset: bool = False  # norms multiply by 1 + scale instead of scale
    scale_embeddings: bool = False  # multiply embeddings by sqrt(width)
    activation: str = "silu"  # of the MLP's gate: 'silu' or 'gelu_tanh'
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: head_dim
    layer_windows: tuple[int, ...] = (0,)  # cycled over the layers: how many latest tokens each
    # query sees, its own included; 0: all of them
    local_rope_theta: float | None = None  # of layers with a window; None: as all others
    rope_scaling: RopeScaling | None = None  # of layers that do not use local_rope_theta
    max_positions: int = 40_960  # trained context; only written to config.json on export

    def __post_init__(self):
        # A config file spells tuples as lists and a RopeScaling as a dictionary.
        object.__setattr__(self, "layer_windows", tuple(self.layer_windows))
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ConfigError(f"DecoderConfig.{field.name} = {value}: must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"DecoderConfig.num_heads = {self.num_heads} must be a multiple of "
                f"num_kv_heads = {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"DecoderConfig.head_dim = {self.head_dim}: RoPE needs an even size")
        for name, known in (("family", tuple(TRAITS)), ("activation", ("silu", "gelu_tanh"))):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"DecoderConfig.{name} = {getattr(self, name)!r}: one of {', '.join(known)}"
                )
        if not self.layer_windows or min(self.layer_windows) < 0:
            raise ConfigError(
                f"DecoderConfig.layer_windows = {self.layer_windows}: one or more lengths, "
                "0 for a layer that sees everything"
            )

    @property
    def num_groups(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def windows(self) -> tuple[int, ...]:
        """The sliding window of each of the `num_layers` layers, 0 where there is none."""
        cycle = len(self.layer_windows)
        return tuple(self.layer_windows[layer % cycle] for layer in range(self.num_layers))


# What every model of a family has in common, as DecoderConfig fields.
TRAITS = {
    "qwen3": dict(family="qwen3", qk_norm=True),
    "qwen2": dict(family="qwen2", qk_norm=False, qkv_bias=True),
    "llama": dict(family="llama", qk_norm=False),
    "gemma3": dict(
        family="gemma3",
        qk_norm=True,
        post_norms=True,
        norm_offset=True,
        scale_embeddings=True,
        activation="gelu_tanh",
    ),
}


def _qwen3(num_layers, width, num_heads, mlp_width, tied):
    return DecoderConfig(
        vocab_size=151_936,
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=mlp_width,
        tied_embeddings=tied,
        **TRAITS["qwen3"],
    )


def _qwen2p5(num_layers, width, num_heads, num_kv_heads, mlp_width, tied, norm_eps=1e-6):
    return DecoderConfig(
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
        **TRAITS["qwen2"],
    )


def _llama3(num_layers, width, num_heads, mlp_width, tied, rope_factor):
    return DecoderConfig(
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
        **TRAITS["llama"],
    )


def _gemma3(num_layers, width, num_heads, num_kv_heads, mlp_width, *, text_only=False, **others):
    fields = dict(
        vocab_size=262_144 if text_only else 262_208,
        head_dim=256,
        local_rope_theta=1e4,
        layer_windows=(512 if text_only else 1024,) * 5 + (0,),
        rope_scaling=None if text_only else RopeScaling(8.0),
        max_positions=32_768 if text_only else 131_072,
        **TRAITS["gemma3"],
    )
    return DecoderConfig(
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        mlp_width=mlp_width,
        **fields | others,
    )


PRESETS = {
    "qwen3_0p6b": _qwen3(28, 1024, 16, 3072, True),
    "qwen3_1p7b": _qwen3(28, 2048, 16, 6144, True),
    "qwen3_4b": _qwen3(36, 2560, 32, 9728, True),
    "qwen3_8b": _qwen3(36, 4096, 32, 12288, False),
    "qwen3_14b": _qwen3(40, 5120, 40, 17408, False),
    "qwen3_32b": _qwen3(64, 5120, 64, 25600, False),
    # Base models; some Instruct siblings differ in norm_eps, which their config.json says.
    "qwen2p5_0p5b": _qwen2p5(24, 896, 14, 2, 4864, True),
    "qwen2p5_1p5b": _qwen2p5(28, 1536, 12, 2, 8960, True),
    "qwen2p5_3b": _qwen2p5(36, 2048, 16, 2, 11008, True),
    "qwen2p5_7b": _qwen2p5(28, 3584, 28, 4, 18944, False),
    "qwen2p5_14b": _qwen2p5(48, 5120, 40, 8, 13824, False, 1e-5),
    "qwen2p5_32b": _qwen2p5(64, 5120, 40, 8, 27648, False, 1e-5),
    "llama3p1_8b": _llama3(32, 4096, 32, 14336, False, 8.0),
    "llama3p1_70b": _llama3(80, 8192, 64, 28672, False, 8.0),
    "llama3p2_1b": _llama3(16, 2048, 32, 8192, True, 32.0),
    "llama3p2_3b": _llama3(28, 3072, 24, 8192, True, 32.0),
    "gemma3_270m": _gemma3(18, 640, 4, 1, 2048, text_only=True),
    "gemma3_1b": _gemma3(26, 1152, 4, 1, 6912, text_only=True),
    "gemma3_4b": _gemma3(34, 2560, 8, 4, 10240),
    "gemma3_12b": _gemma3(48, 3840, 16, 8, 15360),
    "gemma3_27b": _gemma3(62, 5376, 32, 16, 21504, head_dim=128, query_pre_attn_scalar=168.0),
}
