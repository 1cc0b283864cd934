"""The decoder's shape, and the named presets of all families."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from qlog.errors import ConfigError
from qlog.models import limits
from qlog.models.families import FAMILIES, Family
from qlog.models.rope import RopeScaling

_T = TypeVar("_T")


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
    # Whether queries and keys are rotated by their position, cycled over the layers (SmolLM3: three
    # of four layers). Where they are not, attention sees the order of tokens by causality alone.
    layer_rope: tuple[bool, ...] = (True,)
    local_rope_theta: float | None = None  # of layers with a window; None: rope_theta
    rope_scaling: RopeScaling | None = None  # of layers that do not use local_rope_theta
    max_positions: int = 40_960  # trained context, in tokens; no program depends on it

    def __post_init__(self):
        # A config file spells tuples as lists and a RopeScaling as a dictionary.
        object.__setattr__(self, "layer_windows", tuple(self.layer_windows))
        object.__setattr__(self, "layer_rope", tuple(self.layer_rope))
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        elif not isinstance(self.rope_scaling, RopeScaling | None):
            raise ConfigError(
                f"DecoderConfig.rope_scaling = {self.rope_scaling!r}: the fields of a RopeScaling, "
                "such as {'rope_type': 'yarn', 'factor': 4.0, 'original_length': 32768}"
            )
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
        lengths = self.layer_windows
        if not lengths or not all(limits.is_size(each) and each >= 0 for each in lengths):
            raise ConfigError(
                f"DecoderConfig.layer_windows = {lengths}: one or more lengths, 0 for a layer that "
                "sees everything"
            )
        if not self.layer_rope or not all(type(has_rope) is bool for has_rope in self.layer_rope):
            raise ConfigError(
                f"DecoderConfig.layer_rope = {self.layer_rope}: one or more of True and False, "
                "False for a layer without RoPE"
            )

    @property
    def num_groups(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def windows(self) -> tuple[int, ...]:
        """The sliding window of each of the `num_layers` layers, 0 where there is none."""
        return self._of_each_layer(self.layer_windows)

    @property
    def has_rope(self) -> tuple[bool, ...]:
        """Whether each of the `num_layers` layers has RoPE."""
        return self._of_each_layer(self.layer_rope)

    def _of_each_layer(self, cycle: tuple[_T, ...]) -> tuple[_T, ...]:
        return tuple(cycle[layer % len(cycle)] for layer in range(self.num_layers))


def _presets_of(family: Family) -> dict[str, DecoderConfig]:
    return {
        name: DecoderConfig(family=family.name, **family.traits, **fields)
        for name, fields in family.presets.items()
    }


# Name for config.model -> the decoder, of all families.
PRESETS: dict[str, DecoderConfig] = {
    name: config for family in FAMILIES.values() for name, config in _presets_of(family).items()
}
_BUILT_IN = frozenset(FAMILIES)


def register(family: Family) -> None:
    """Adds a family from outside of qlog, and its presets, for the rest of this process.

    A config file calls it at its top level: every process of a run reads the config file, before
    anything looks for a model. A second call with the same name replaces the first family, as
    running a notebook's cell again does.

    Raises:
      ConfigError: a name or model_type that another family has, or a preset that is no decoder.
    """
    if family.name in _BUILT_IN:
        raise ConfigError(
            f"models.register: qlog has a family {family.name!r} already; choose another name."
        )
    for other in FAMILIES.values():
        if family.model_type == other.model_type and family.name != other.name:
            raise ConfigError(
                f"models.register: family {other.name!r} reads model_type {family.model_type!r} "
                f"already, so {family.name!r} needs another one."
            )
    for name in family.presets:
        if name in PRESETS and PRESETS[name].family != family.name:
            raise ConfigError(
                f"models.register: family {PRESETS[name].family!r} has a preset {name!r} already; "
                "choose another name."
            )
    # DecoderConfig looks the family up, so it goes in first and comes out again if a preset fails.
    before = FAMILIES.get(family.name)
    FAMILIES[family.name] = family
    try:
        presets = _presets_of(family)
    except (ConfigError, TypeError) as error:
        del FAMILIES[family.name]
        if before:
            FAMILIES[family.name] = before
        raise ConfigError(f"models.register: a preset of {family.name!r}: {error}") from None
    for name in [name for name, config in PRESETS.items() if config.family == family.name]:
        del PRESETS[name]
    PRESETS.update(presets)
