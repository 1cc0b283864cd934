"""The decoder, its presets, and weights in and out (`models.huggingface`)."""

from qlog.models import flops, huggingface
from qlog.models.config import PRESETS, DecoderConfig, register
from qlog.models.decoder import (
    TILE,
    Params,
    Prefix,
    Suffix,
    check_finite,
    decode_step,
    decoding_weights,
    empty_suffix,
    extend,
    init,
    prefill,
    score_step,
    shapes,
    unembedding,
    unstack,
    whole_tiles,
)
from qlog.models.execution import REMAT, Execution
from qlog.models.families import Family
from qlog.models.huggingface.config_json import from_hf_config, to_hf_config
from qlog.models.rope import RopeScaling

__all__ = [
    "PRESETS",
    "REMAT",
    "TILE",
    "DecoderConfig",
    "Execution",
    "Family",
    "Params",
    "Prefix",
    "RopeScaling",
    "Suffix",
    "check_finite",
    "decode_step",
    "decoding_weights",
    "empty_suffix",
    "extend",
    "flops",
    "from_hf_config",
    "huggingface",
    "init",
    "prefill",
    "register",
    "score_step",
    "shapes",
    "to_hf_config",
    "unembedding",
    "unstack",
    "whole_tiles",
]
