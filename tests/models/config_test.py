"""Presets against published sizes, config.json in and out."""

import dataclasses
import itertools
import json
import math

import jax
import pytest
from models_fixtures import own_families  # noqa: F401

from qlog import models
from qlog.errors import ConfigError
from qlog.models.families import FAMILIES
from qlog.models.families.family import shortest_cycle

# Parameter counts as the models' pages give them.
PUBLISHED = {
    "qwen3_0p6b": 596_049_920,
    "qwen3_1p7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "qwen2p5_0p5b": 494_032_768,
    "qwen2p5_7b": 7_615_616_512,
    "llama3p1_8b": 8_030_261_248,
    "llama3p2_1b": 1_235_814_400,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "mistral_7b": 7_248_023_552,
    "mistral_nemo_12b": 12_247_782_400,
    "ministral_8b": 8_019_808_256,
    "mistral_small_24b": 23_572_403_200,
    "smollm3_3b": 3_075_098_624,
}
# As published with Llama 3.2 1B and the text half of Gemma 3 27B, fields without effect left out.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "vocab_size": 128256,
}
GEMMA = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model"},
}
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# Ministral 8B; 7B and Small differ as the tests below say.
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "vocab_size": 131072,
}
SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    leaves = jax.tree.leaves(models.shapes(models.PRESETS[name]))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == PUBLISHED[name]


def test_config_json_decides_and_agrees_with_the_presets():
    assert models.from_hf_config(LLAMA) == models.PRESETS["llama3p2_1b"]
    assert models.from_hf_config(GEMMA) == models.PRESETS["gemma3_27b"]
    assert models.from_hf_config(QWEN) == models.PRESETS["qwen2p5_0p5b"]
    for config in models.PRESETS.values():
        assert models.from_hf_config(models.to_hf_config(config)) == config


def test_mistrals_window_may_be_null_and_is_4096_where_it_is_not_said():
    assert models.from_hf_config(MISTRAL) == models.PRESETS["ministral_8b"]
    small = MISTRAL | dict(
        hidden_size=5120, intermediate_size=32768, num_hidden_layers=40, sliding_window=None
    )
    assert models.from_hf_config(small) == models.PRESETS["mistral_small_24b"]
    assert models.to_hf_config(models.PRESETS["mistral_small_24b"])["sliding_window"] is None
    first = MISTRAL | dict(intermediate_size=14336, num_hidden_layers=32, head_dim=None)
    third = first | dict(rope_theta=1e6, vocab_size=32768, sliding_window=None)
    assert models.from_hf_config(third) == models.PRESETS["mistral_7b"]
    del first["sliding_window"]  # v0.1 says 4096, as transformers does of a file that is silent
    assert models.from_hf_config(first).windows == (4096,) * 32
    assert models.from_hf_config({"model_type": "mistral"}).windows == (4096,) * 32
    ungrouped = models.from_hf_config({"model_type": "mistral", "num_key_value_heads": None})
    assert ungrouped.num_kv_heads == 32


def test_the_text_part_of_mistral_3():
    """Small 3.2, which reads images too."""
    text = {k: v for k, v in MISTRAL.items() if k not in ("architectures", "tie_word_embeddings")}
    text |= dict(hidden_size=5120, intermediate_size=32768, num_hidden_layers=40)
    text |= dict(rope_theta=1e9, max_position_embeddings=131072, sliding_window=None)
    outer = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"}
    config = models.from_hf_config(outer | {"text_config": text, "vision_config": {}})
    small = models.PRESETS["mistral_small_24b"]
    assert config == dataclasses.replace(small, rope_theta=1e9, max_positions=131_072)
    with pytest.raises(ConfigError, match="model_type 'ministral3' is not supported"):
        models.from_hf_config(outer | {"text_config": text | {"model_type": "ministral3"}})


def test_layers_without_rope_by_name_and_by_interval():
    preset = models.PRESETS["smollm3_3b"]
    assert models.from_hf_config(SMOLLM3) == preset
    assert models.from_hf_config(SMOLLM3 | {"no_rope_layers": None}) == preset
    assert preset.has_rope == (True, True, True, False) * 9
    uneven = SMOLLM3 | {"no_rope_layers": [0] * 35 + [1, 0, 0]}  # longer than there are layers
    assert models.from_hf_config(uneven).has_rope == (False,) * 35 + (True,)
    every = models.from_hf_config(SMOLLM3 | {"no_rope_layers": None, "no_rope_layer_interval": 1})
    assert every.layer_rope == (False,)
    sliding = {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}
    windowed = models.from_hf_config(SMOLLM3 | sliding)
    assert windowed.layer_windows == (0, 0, 0, 8)
    for config in (every, windowed, dataclasses.replace(preset, layer_rope=(True, False, True))):
        assert models.from_hf_config(models.to_hf_config(config)) == config
    # The same layers in another spelling.
    twice = dataclasses.replace(preset, layer_rope=2 * preset.layer_rope)
    assert models.to_hf_config(twice) == models.to_hf_config(preset)


def test_yarn_in_and_out():
    """As the model cards of Qwen2.5 and Qwen3 ask for it, and with all that it can say."""
    config = models.from_hf_config(QWEN | {"rope_scaling": YARN})
    assert config.rope_scaling == models.RopeScaling(4.0, 32_768, rope_type="yarn")
    assert config.rope_scaling.high_frequency == 32
    assert models.from_hf_config(models.to_hf_config(config)) == config
    new = {"rope_type": "yarn", "rope_theta": 1e6, **{k: v for k, v in YARN.items() if k != "type"}}
    assert models.from_hf_config(QWEN | {"rope_parameters": new}) == config
    said = dict(beta_fast=16, beta_slow=2.5, truncate=False)
    full = models.from_hf_config(QWEN | {"rope_scaling": YARN | said | {"attention_factor": 1.25}})
    assert full.rope_scaling == models.RopeScaling(4.0, 32_768, 2.5, 16, "yarn", 1.25, False)
    assert models.from_hf_config(models.to_hf_config(full)) == full
    # DeepSeek's two numbers are one quotient; nulls and zeros stand for the defaults.
    both = YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": None, "beta_slow": 0}
    scaling = models.from_hf_config(QWEN | {"rope_scaling": both}).rope_scaling
    quotient = (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert scaling.magnitude == pytest.approx(quotient)


def test_layers_with_windows_by_threshold_and_by_name():
    sliding = QWEN | {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 4}
    late = models.from_hf_config(sliding | {"max_window_layers": 1})
    assert late.windows == (0, 8, 8, 8)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert models.from_hf_config(sliding | {"layer_types": kinds}).layer_windows == (8, 0)
    assert models.from_hf_config(models.to_hf_config(late)) == late


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (QWEN, {"model_type": "qwen3_moe"}, "'qwen3_moe' is not supported.*qwen3, qwen2, llama"),
        (QWEN, {"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForCausalLM"),
        (QWEN, {"hidden_size": None}, "'hidden_size' is missing"),
        (QWEN, {"hidden_act": "gelu"}, "hidden_act = 'gelu'.*knows 'silu'"),
        (QWEN, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            QWEN,
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
            "'dynamic'.*'llama3' and 'yarn'",
        ),
        (
            QWEN,
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "original_max_.* = None of the RoPE",
        ),
        (QWEN, {"rope_scaling": YARN | {"truncate": 1}}, "truncate = 1 of the RoPE"),
        (QWEN, {"rope_scaling": YARN | {"beta_fast": "32"}}, "beta_fast = '32' of the RoPE"),
        (QWEN, {"rope_scaling": YARN | {"attention_factor": -1.0}}, "attention_factor = -1.0"),
        (QWEN, {"layer_types": ["full_attention"]}, "layer_types.*24 layers"),
        (
            MISTRAL,
            {"layer_types": ["full_attention"] * 36},
            "all layers have sliding_window = 32768",
        ),
        (MISTRAL, {"sliding_window": "4096"}, "sliding_window = '4096' must be a whole number"),
        (SMOLLM3, {"no_rope_layers": [1, 0]}, "no_rope_layers = .1, 0. must be .* of 36 layers"),
        (SMOLLM3, {"no_rope_layers": ["1"] * 36}, "must be a list of 1"),
        (SMOLLM3, {"no_rope_layer_interval": 0}, "no_rope_layer_interval = 0 must be a whole"),
        (
            SMOLLM3,
            {"layer_types": ["sliding_attention"] * 36},
            "needs use_sliding_window = true and a sliding_window above 0, not False and 0",
        ),
        (LLAMA, {"attention_bias": True}, "attention_bias = True"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial RoPE"),
        (
            QWEN,
            {"num_attention_heads": 0},
            "num_attention_heads = 0 must be a whole number of at most 2147483647, above 0",
        ),
        (QWEN, {"num_hidden_layers": 10**9}, "num_hidden_layers = 10+ must be .* at most 65536"),
        (SMOLLM3, {"num_hidden_layers": 10**30}, "num_hidden_layers = 10+ must be"),
        (QWEN, {"head_dim": 10**30}, "head_dim = 10+ must be a whole number of at most 2147483647"),
        (QWEN, {"rms_norm_eps": 10**31}, "rms_norm_eps = 10+ must be .* above 0 and at most 1"),
        (QWEN, {"rope_theta": 10**400}, "rope_theta = 10+ of the RoPE .* must be a number above 0"),
        (MISTRAL, {"sliding_window": 10**30}, "sliding_window = 10+ must be a whole number"),
        (GEMMA["text_config"], {"sliding_window_pattern": 0}, "sliding_window_pattern = 0 must be"),
        (QWEN, {"hidden_size": "896"}, "hidden_size = '896' must be"),
        (QWEN, {"model_type": ["qwen2"]}, "not supported"),
        (
            LLAMA,
            {"rope_scaling": {"type": "linear"}, "rope_parameters": {}},
            "factor = None of the RoPE",
        ),
        (LLAMA, {"rope_theta": math.nan}, "rope_theta = nan"),
        (GEMMA, {"text_config": None}, "text_config = None must be an object"),
        (GEMMA["text_config"], {"rope_parameters": {"full_attention": 3}}, "full_attention = 3"),
        (GEMMA["text_config"], {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    ],
)
def test_what_the_decoder_cannot_express_is_refused(base, change, message):
    models.from_hf_config(base)
    with pytest.raises(ConfigError, match=message):
        models.from_hf_config(base | change)


def test_a_cycle_is_found_without_trying_each_length():
    assert shortest_cycle(()) == ()
    assert shortest_cycle((1, 1, 0, 1, 1, 0, 1)) == (1, 1, 0)
    # Other than the last one all are equal: to try each length would take 65,536^2 / 2 looks.
    almost = (0,) * (2**16 - 1) + (1,)
    assert shortest_cycle(almost) == almost
    short = itertools.product((0, 1), repeat=7)
    for layers in short:
        cycle = shortest_cycle(layers)
        assert tuple(itertools.islice(itertools.cycle(cycle), 7)) == layers
        shorter = layers[: len(cycle) - 1] or (None,)
        assert tuple(itertools.islice(itertools.cycle(shorter), 7)) != layers


def test_what_config_json_cannot_express_is_not_exported():
    for change in (
        dict(layer_windows=(4, 6)),
        dict(layer_rope=(True, False)),
        dict(qk_norm=False),
        dict(activation="gelu_tanh"),
    ):
        config = dataclasses.replace(models.PRESETS["qwen3_0p6b"], **change)
        with pytest.raises(ConfigError, match=f"DecoderConfig.{next(iter(change))} .* 'qwen3'"):
            models.to_hf_config(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_heads=3), "multiple of num_kv_heads = 8"),
        (dict(width=0), "width = 0"),
        (dict(head_dim=7), "even"),
        (dict(family="mamba"), "family = 'mamba'"),
        (dict(activation="relu"), "activation = 'relu'"),
        (dict(layer_windows=()), "layer_windows"),
        (dict(rope_scaling="yarn"), "rope_scaling = 'yarn': the fields of a RopeScaling"),
        (dict(layer_rope=()), "layer_rope = .*: one or more of True and False"),
        (dict(layer_rope=(1, 0)), "layer_rope = .1, 0.: one or more of True and False"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(models.PRESETS["qwen3_0p6b"], **change)


@pytest.mark.usefixtures("own_families")
def test_a_family_from_outside_is_read_written_and_replaced():
    size = dict(
        vocab_size=40,
        num_layers=2,
        width=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=24,
    )
    own = dataclasses.replace(
        FAMILIES["qwen3"], name="own", model_type="own", presets={"own_tiny": size}
    )
    models.register(own)
    assert models.from_hf_config(models.to_hf_config(models.PRESETS["own_tiny"])).family == "own"
    models.register(dataclasses.replace(own, presets={"own_small": size}))
    assert "own_small" in models.PRESETS and "own_tiny" not in models.PRESETS
    for change, message in (
        (dict(name="qwen3"), "a family 'qwen3' already"),
        (dict(model_type="llama"), "family 'llama' reads model_type 'llama' already"),
        (dict(name="other", model_type="other"), "family 'own' has a preset 'own_small' already"),
        (dict(presets={"own_odd": size | dict(head_dim=7)}), "a preset of 'own': .*head_dim = 7"),
        (dict(presets={"own_odd": size | dict(depth=7)}), "a preset of 'own': .*'depth'"),
    ):
        before = dict(FAMILIES), dict(models.PRESETS)
        with pytest.raises(ConfigError, match=message):
            models.register(dataclasses.replace(FAMILIES["own"], **change))
        assert before == (FAMILIES, models.PRESETS)


def test_fields_read_back_from_json_stay_hashable():
    config = models.PRESETS["gemma3_4b"]
    again = models.DecoderConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config and hash(again) == hash(config)
