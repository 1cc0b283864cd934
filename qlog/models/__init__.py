"""The decoder, its presets, and weights in and out."""

from qlog.models.config import PRESETS, DecoderConfig, RopeScaling
from qlog.models.decoder import Params, Prefix, Suffix, apply, empty_suffix, init, prefill, unembedding

__all__ = [
    "PRESETS", "DecoderConfig", "Params", "Prefix", "RopeScaling", "Suffix", "apply",
    "empty_suffix", "init", "prefill", "unembedding",
]  # fmt: skip
