"""Rotary position embeddings."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

Rotation = tuple[Array, Array]  # cos and sin


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Slows RoPE's frequencies down, for contexts longer than the ones trained on first.

    Without `original_length` every frequency is divided by `factor` (Gemma 3). With it, Llama 3's
    rule: wavelengths above original_length / low_frequency are divided by `factor`, those below
    original_length / high_frequency are kept, and the ones between are interpolated.
    """

    factor: float  # by which frequencies are divided
    original_length: int | None = None  # tokens of the context that was trained first
    low_frequency: float = 1.0  # turns in original_length, below which a frequency is divided
    high_frequency: float = 4.0  # turns in original_length, above which a frequency is kept


def rotation(
    positions: Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Rotation:
    """cos and sin of the angles at int32 `positions` [B, M, R]: float32 [B, M, R, 1, C / 2]."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies(head_dim, theta, scaling)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, turn: Rotation, scale: float = 1.0) -> Array:
    """x [B, M, R, heads, C] rotated and scaled (Su et al., arXiv 2104.09864).

    Number i is paired with number i + C / 2, as in the published weights of all our families.
    """
    cos, sin = turn
    first, second = jnp.split(x.astype(jnp.float32) * scale, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians per position, float32 [C / 2].

    At position 1e5 one unit in the last place of the largest frequency is an angle of 0.006. So
    float32 roundings follow the order of the code that the published weights were trained with.
    """
    one = np.float32(1)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    kept = one / (np.float64(theta) ** exponents).astype(np.float32)
    if scaling is None:
        return kept
    factor = np.float32(scaling.factor)
    # Linear scaling (Gemma 3): all positions closer together.
    if scaling.original_length is None:
        return kept / factor
    length, low, high = (
        np.float32(x)
        for x in (scaling.original_length, scaling.low_frequency, scaling.high_frequency)
    )
    # Llama 3's rule: short wavelengths tell neighbours apart and are kept, long ones are stretched.
    wavelengths = np.float32(2 * np.pi) / kept
    weight = (length / wavelengths - low) / (high - low)
    between = (one - weight) * kept / factor + weight * kept
    long_or_between = np.where(wavelengths > length / low, kept / factor, between)
    return np.where(wavelengths < length / high, kept, long_or_between)
