"""The decoder's shape, and the named presets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides the shape and the arithmetic of a decoder; hashable, so jit-static.

    Widths are in units, lengths in tokens. `head_dim` is independent of `width // num_heads`
    (Qwen3 0.6B: 16 heads of 128 over a width of 1024).
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

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"DecoderConfig.{field.name} = {value}: must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"DecoderConfig.num_heads = {self.num_heads} must be a multiple of "
                f"num_kv_heads = {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"DecoderConfig.head_dim = {self.head_dim}: RoPE needs an even size")


def _qwen3(num_layers, width, num_heads, num_kv_heads, mlp_width, tied):
    return DecoderConfig(
        vocab_size=151_936, num_layers=num_layers, width=width, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=128, mlp_width=mlp_width, tied_embeddings=tied,
    )  # fmt: skip


PRESETS = {
    "qwen3_0p6b": _qwen3(28, 1024, 16, 8, 3072, True),
    "qwen3_1p7b": _qwen3(28, 2048, 16, 8, 6144, True),
    "qwen3_4b": _qwen3(36, 2560, 32, 8, 9728, True),
    "qwen3_8b": _qwen3(36, 4096, 32, 8, 12288, False),
    "qwen3_14b": _qwen3(40, 5120, 40, 8, 17408, False),
    "qwen3_32b": _qwen3(64, 5120, 64, 8, 25600, False),
}
