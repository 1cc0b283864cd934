"""The decoder's shape, and the named presets of all families."""

import dataclasses
from collections.abc import Mapping

from qlog.errors import ConfigError
from qlog.models.families import FAMILIES
from qlog.models.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides the shape and the arithmetic of a decoder; hashable, so jit-static.

    The vocabulary is often padded (Qwen3: 151,936 rows for 151,669 tokens). The padding rows are
    ordinary rows here. Sampler and scorer, which turn hidden states into probabilities, mask them
    by the tokenizer's size, `valid_vocab`.
    """

    vocab_size: int  # rows of the embedding, padding rows included
    num_layers: int  # each of attention and an MLP
    width: int  # of the hidden states
    num_heads: int  # query heads
    num_kv_heads: int  # key/value heads, a divisor of num_heads
    head_dim: int  # independent of width / num_heads (Qwen3 0.6B: 16 heads of 128, width 1024)
    mlp_width: int  # units of the gated MLP
    rope_theta: float = 1e6  # base of RoPE's frequencies
    norm_eps: float = 1e-6  # added to the mean square in RMS norms
    tied_embeddings: bool = True  # the output head is the embedding
    qk_norm: bool = True  # normalise each head's queries and keys
    family: str = "qwen3"  # a key of FAMILIES: names of tensors and fields of Hugging Face folders
    qkv_bias: bool = False  # biases in the projections to queries, keys and values (Qwen2)
    post_norms: bool = False  # also normalise what attention and MLP add to the residual stream
    norm_offset: bool = False  # norms multiply by 1 + scale instead of scale
    scale_embeddings: bool = False  # multiply embeddings by sqrt(width)
    activation: str = "silu"  # of the MLP's gate: 'silu' or 'gelu_tanh'
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: head_dim
    # How many latest tokens a query sees, itself included, cycled over the layers; 0: all.
    layer_windows: tuple[int, ...] = (0,)
    local_rope_theta: float | None = None  # of layers with a window; None: rope_theta
    rope_scaling: RopeScaling | None = None  # of layers that do not use local_rope_theta
    max_positions: int = 40_960  # trained context, in tokens; only written to config.json on export

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
        for name, known in (("family", tuple(FAMILIES)), ("activation", ("silu", "gelu_tanh"))):
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


PRESETS = {
    name: DecoderConfig(family=family.name, **family.traits, **fields)
    for family in FAMILIES.values()
    for name, fields in family.presets.items()
}
