"""Tiny decoders of every family, with random parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlog import models
from qlog.models.families import FAMILIES

# These programs are compiled once and run once, so the compiler's own time is what counts.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
_TINY = dict(
    vocab_size=40, num_layers=3, width=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=24
)


def tiny(family, **fields):
    return models.DecoderConfig(family=family, **_TINY, **FAMILIES[family].traits, **fields)


CONFIGS = {
    "qwen3": tiny("qwen3"),
    # Unequal layers: windows of 4 and 6 next to full attention, two RoPEs, one of them scaled.
    "gemma3": tiny(
        "gemma3",
        layer_windows=(4, 0, 6),
        local_rope_theta=1e4,
        rope_scaling=models.RopeScaling(2.0),
        query_pre_attn_scalar=20.0,
    ),
    # Equal layers with a window, which keep it static.
    "windowed": tiny("qwen2", layer_windows=(5,)),
    # Unequal layers: the second has no RoPE, and the others have YaRN's.
    "smollm3": tiny(
        "smollm3",
        layer_rope=(True, False),
        rope_scaling=models.RopeScaling(4.0, 8, 0.5, 2.0, rope_type="yarn"),
    ),
    "untied": tiny(
        "llama",
        tied_embeddings=False,
        rope_scaling=models.RopeScaling(4.0, 16),
    ),
}


def random_params(config, dtype=jnp.float32):
    """Every leaf random, so that norms and biases are not at their neutral values."""
    rng = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype)
    return jax.tree.map(draw, models.shapes(config, dtype))


@pytest.fixture
def own_families():
    """Families and presets that a test registers are gone after it."""
    before = [(table, dict(table)) for table in (FAMILIES, models.PRESETS)]
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)
