"""The decoder, its presets, and weights in and out (`models.huggingface`)."""

from qlog.models import flops, huggingface
from qlog.models.config import PRESETS, DecoderConfig, RopeScaling
from qlog.models.decoder import (
    REMAT,
    Params,
    Prefix,
    Suffix,
    apply,
    decoding_weights,
    empty_suffix,
    init,
    prefill,
    shapes,
    unembedding,
    unstack,
    whole_tiles,
)
from qlog.models.families import from_hf_config

__all__ = [
    "PRESETS",
    "REMAT",
    "DecoderConfig",
    "Params",
    "Prefix",
    "RopeScaling",
    "Suffix",
    "apply",
    "decoding_weights",
    "empty_suffix",
    "flops",
    "from_hf_config",
    "huggingface",
    "init",
    "prefill",
    "shapes",
    "unembedding",
    "unstack",
    "whole_tiles",
]
