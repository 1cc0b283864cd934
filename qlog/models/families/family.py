"""What a family of models is, and how its parts of config.json are read."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from qlog.errors import ConfigError
from qlog.models import limits
from qlog.models.rope import RopeScaling, yarn_magnitude

_T = TypeVar("_T")
Fields = Mapping[str, Any]  # fields of a config.json, or of a DecoderConfig

# Leaf of params -> tensor of a safetensors file; "{}" is the layer's number.
TENSORS = {
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


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that differ only in numbers: one arithmetic, one kind of config.json.

    All families share one decoder; a family chooses among the options of DecoderConfig.
    """

    name: str  # DecoderConfig.family
    model_type: str  # of config.json
    architecture: str  # of config.json, the one class of `architectures` that is read
    traits: Fields  # DecoderConfig fields that all of its models have in common
    # Fields of config.json: what transformers assumes where the file is silent.
    defaults: Fields
    # config.json -> the DecoderConfig fields that are not a mere renaming: windows and RoPE. Raises
    # ConfigError for what the decoder cannot express.
    read: Callable[[Fields], dict[str, Any]]
    # The other way round: fields of config.json from those of a DecoderConfig, and every layer's
    # window.
    write: Callable[[Fields, tuple[int, ...]], dict[str, Any]]
    # Name for config.model -> DecoderConfig fields besides the traits.
    presets: Mapping[str, Fields] = dataclasses.field(default_factory=dict)
    # Fields of config.json in which null says "none" (no window), where in all others it says what
    # leaving the field out says: the default.
    nullable: frozenset[str] = frozenset()
    # model_type of checkpoints with images whose `text_config` is a model of this family.
    text_part_of: str | None = None
    # Leaf of params -> tensor of a safetensors file, as TENSORS.
    tensors: Mapping[str, str] = dataclasses.field(default_factory=lambda: TENSORS)

    @property
    def activation(self) -> str:
        """transformers' name for the MLP's activation."""
        names = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
        return names[self.traits.get("activation", "silu")]


class Rope(NamedTuple):
    """Base of the frequencies, and how they are slowed down."""

    theta: float  # base of the frequencies, config.json's rope_theta
    scaling: RopeScaling | None  # None: the frequencies as they are


def read_rope(rope: Fields) -> Rope:
    """The RoPE of an object that holds rope_theta and, in either spelling, the scaling.

    Raises ConfigError for kinds that `models.rope` does not know.
    """

    def number(name: str, default: float | None = None) -> float:
        # A null or a 0 stands for the default, as in transformers; without a default it is refused.
        value: Any = rope.get(name) or default
        if not limits.is_number(value):
            raise ConfigError(
                f"config.json: {name} = {value!r} of the RoPE {rope} must be "
                f"{limits.number_text()}."
            )
        return float(value)

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
    elif kind == "yarn":
        scaling = _read_yarn(rope, number)
    else:
        raise ConfigError(
            f"config.json: RoPE scaling of type {kind!r} is not supported; qlog's decoder knows "
            "'default', 'linear', 'llama3' and 'yarn'."
        )
    return Rope(number("rope_theta"), scaling)


def _read_yarn(rope: Fields, number: Callable[..., float]) -> RopeScaling:
    factor = number("factor")
    attention_factor = rope.get("attention_factor")
    if attention_factor is not None:
        attention_factor = number("attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        # DeepSeek's way to say it: how much cos and sin grow, over how much scores shrink.
        attention_factor = yarn_magnitude(factor, number("mscale"))
        attention_factor /= yarn_magnitude(factor, number("mscale_all_dim"))
    truncate = rope.get("truncate", True)
    if type(truncate) is not bool:
        raise ConfigError(
            f"config.json: truncate = {truncate!r} of the RoPE {rope} must be true or false."
        )
    return RopeScaling(
        factor,
        int(number("original_max_position_embeddings")),
        number("beta_slow", 1.0),
        number("beta_fast", 32.0),
        rope_type="yarn",
        attention_factor=attention_factor,
        truncate=truncate,
    )


def write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """config.json's rope_scaling: what `read_rope` reads."""
    fields = {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling.rope_type == "linear":
        return fields
    fields["original_max_position_embeddings"] = scaling.original_length
    if scaling.rope_type == "llama3":
        fields["low_freq_factor"] = scaling.low_frequency
        fields["high_freq_factor"] = scaling.high_frequency
        return fields
    fields |= {"beta_slow": scaling.low_frequency, "beta_fast": scaling.high_frequency}
    # The rest is seldom said, and not every reader knows it.
    if scaling.attention_factor is not None:
        fields["attention_factor"] = scaling.attention_factor
    if not scaling.truncate:
        fields["truncate"] = False
    return fields


def rope_of_all_layers(fields: Fields) -> dict[str, Any]:
    """DecoderConfig's RoPE fields where all layers share one RoPE."""
    # Files older than transformers 5 have rope_theta and rope_scaling, newer ones rope_parameters.
    theta, scaling = read_rope(
        {"rope_theta": fields["rope_theta"]}
        | (fields.get("rope_scaling") or {})
        | (fields.get("rope_parameters") or {})
    )
    return {"rope_theta": theta, "rope_scaling": scaling}


def read_windows(
    fields: Fields, window: int, slides: Callable[[int], bool] = lambda layer: False
) -> tuple[int, ...]:
    """DecoderConfig.layer_windows: the shortest cycle that spells out the layers.

    Args:
      fields: of config.json; `layer_types` decides which layers slide, where it is given.
      window: of the layers that slide.
      slides: whether a layer slides, by its number, where `layer_types` is not given.
    """
    num_layers = fields["num_hidden_layers"]
    if "layer_types" in fields:
        kinds = fields["layer_types"]
        if len(kinds) != num_layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
            raise ConfigError(
                f"config.json: layer_types = {kinds} must name one of 'full_attention' and "
                f"'sliding_attention' for each of {num_layers} layers."
            )
        is_sliding = [kind == "sliding_attention" for kind in kinds]
    else:
        is_sliding = [slides(layer) for layer in range(num_layers)]
    return shortest_cycle(tuple(window if sliding else 0 for sliding in is_sliding))


def shortest_cycle(layers: tuple[_T, ...]) -> tuple[_T, ...]:
    """The shortest beginning that, repeated, spells out all layers."""
    # Knuth, Morris and Pratt: borders[i] is the length of the longest beginning of layers[:i + 1],
    # short of all of it, that is also its end. What is left of the whole is the shortest cycle.
    borders = [0] * len(layers)
    for end in range(1, len(layers)):
        border = borders[end - 1]
        while border and layers[border] != layers[end]:
            border = borders[border - 1]
        borders[end] = border + (layers[border] == layers[end])
    return layers[: len(layers) - borders[-1]] if layers else layers


def layer_types(windows: tuple[int, ...]) -> list[str]:
    """config.json's layer_types of layers with these windows."""
    return ["sliding_attention" if window else "full_attention" for window in windows]
