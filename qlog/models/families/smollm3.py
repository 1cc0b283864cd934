"""SmolLM3: every fourth layer has no RoPE."""

from typing import Any

from qlog.errors import ConfigError
from qlog.models.families.family import (
    Family,
    Fields,
    layer_types,
    read_windows,
    rope_of_all_layers,
    shortest_cycle,
)


def _read(fields: Fields) -> dict[str, Any]:
    has_rope = _has_rope(fields)
    is_switched_on = fields.get("use_sliding_window", False)
    window = fields.get("sliding_window") or 0
    if "sliding_attention" in fields.get("layer_types", ()) and not (is_switched_on and window):
        # transformers would mask by layer_types, and call its attention by use_sliding_window.
        raise ConfigError(
            f"config.json: layer_types = {fields['layer_types']} needs use_sliding_window = true "
            f"and a sliding_window above 0, not {is_switched_on} and {window}."
        )
    # Where nothing names the layers that slide, it is those without RoPE.
    windows = read_windows(
        fields, window if is_switched_on else 0, lambda layer: not has_rope[layer]
    )
    return {
        "layer_windows": windows,
        "layer_rope": shortest_cycle(has_rope),
        **rope_of_all_layers(fields),
    }


def _has_rope(fields: Fields) -> tuple[bool, ...]:
    """Of each layer: no_rope_layers, or where it is not given all but every so many."""
    num_layers = fields["num_hidden_layers"]
    every = fields["no_rope_layer_interval"]
    if type(every) is not int or every < 1:
        raise ConfigError(
            f"config.json: no_rope_layer_interval = {every!r} must be a whole number above 0."
        )
    if "no_rope_layers" not in fields:
        return tuple((layer + 1) % every != 0 for layer in range(num_layers))
    # In spite of its name, a 1 is a layer that has RoPE. It may say more than there are layers.
    numbers = fields["no_rope_layers"]
    is_right = isinstance(numbers, list) and all(n in (0, 1) for n in numbers)
    if not is_right or len(numbers) < num_layers:
        raise ConfigError(
            f"config.json: no_rope_layers = {numbers!r} must be a list of 1 (a layer with RoPE) "
            f"and 0 (one without), for each of {num_layers} layers."
        )
    return tuple(bool(number) for number in numbers[:num_layers])


def _write(config: Fields, windows: tuple[int, ...]) -> dict[str, Any]:
    cycle, num_layers = config["layer_rope"], config["num_layers"]
    has_rope = [int(cycle[layer % len(cycle)]) for layer in range(num_layers)]
    fields = {"hidden_act": "silu", "no_rope_layers": has_rope, "layer_types": layer_types(windows)}
    if any(windows):
        fields |= {"use_sliding_window": True, "sliding_window": max(windows)}
    return fields


SMOLLM3 = Family(
    name="smollm3",
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    traits=dict(qk_norm=False),
    defaults=dict(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=11_008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
        rope_theta=2e6,
        no_rope_layer_interval=4,
    ),
    nullable=frozenset({"num_key_value_heads"}),
    read=_read,
    write=_write,
    presets={
        # The numbers of its config.json on the Hub.
        "smollm3_3b": dict(
            vocab_size=128_256,
            num_layers=36,
            width=2048,
            num_heads=16,
            num_kv_heads=4,
            head_dim=128,
            mlp_width=11_008,
            layer_rope=(True, True, True, False),
            rope_theta=5e6,
            max_positions=65_536,
        ),
    },
)
