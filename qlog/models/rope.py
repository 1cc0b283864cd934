"""Rotary position embeddings."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from qlog.errors import ConfigError
from qlog.models import limits

Rotation = tuple[Array, Array]  # cos and sin


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Slows RoPE's frequencies down, for contexts longer than the ones trained on first.

    The three kinds, by their names in config.json:
      - 'linear' (Gemma 3): every frequency is divided by `factor`;
      - 'llama3': frequencies of fewer than `low_frequency` turns in `original_length` are divided,
        those of more than `high_frequency` are kept, and the ones between are interpolated by
        their turns;
      - 'yarn' (Peng et al., arXiv 2309.00071): the same bounds, but the ones between are
        interpolated by their number, and cos and sin are multiplied by `attention_factor`.

    Raises:
      ConfigError: fields that do not go together.
    """

    factor: float  # by which frequencies are divided
    original_length: int | None = None  # tokens of the context that was trained first
    low_frequency: float = 1.0  # turns in original_length, below which a frequency is divided
    # Turns in original_length, above which a frequency is kept; None: 32 for 'yarn', else 4.
    high_frequency: float | None = None
    # 'linear', 'llama3' or 'yarn'; None: 'linear' without original_length, 'llama3' with it.
    rope_type: str | None = None
    attention_factor: float | None = None  # of 'yarn'; None: 0.1 ln(factor) + 1
    truncate: bool = True  # 'yarn' rounds its bounds outwards to whole numbers of a frequency

    def __post_init__(self):
        lengths = ("original_length", "low_frequency", "high_frequency")
        for name in ("factor", *lengths, "attention_factor"):
            value = getattr(self, name)
            if not limits.is_number(value) and (value is not None or name == "factor"):
                raise ConfigError(f"RopeScaling.{name} = {value!r} must be {limits.number_text()}.")
        # What None stands for is filled in, so that equal scalings compare and hash as equal.
        kind = self.rope_type or ("linear" if self.original_length is None else "llama3")
        object.__setattr__(self, "rope_type", kind)
        if self.high_frequency is None:
            object.__setattr__(self, "high_frequency", 32.0 if kind == "yarn" else 4.0)
        if kind not in ("linear", "llama3", "yarn"):
            raise ConfigError(
                f"RopeScaling.rope_type = {kind!r}: one of 'linear', 'llama3' and 'yarn'."
            )
        if (kind == "linear") != (self.original_length is None):
            needs = "takes no" if kind == "linear" else "needs an"
            raise ConfigError(
                f"RopeScaling.original_length = {self.original_length}: rope_type {kind!r} {needs} "
                "original_length."
            )
        if kind != "yarn" and (self.attention_factor is not None or not self.truncate):
            raise ConfigError(
                f"RopeScaling.rope_type = {kind!r}: attention_factor and truncate belong to 'yarn'."
            )

    @property
    def magnitude(self) -> float:
        """By which cos and sin are multiplied: attention's scores grow by its square."""
        if self.attention_factor is not None:
            return self.attention_factor
        return yarn_magnitude(self.factor) if self.rope_type == "yarn" else 1.0


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's 0.1 weight ln(factor) + 1, and 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rotation(
    positions: Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Rotation:
    """cos and sin of the angles at int32 `positions` [B, M, R]: float32 [B, M, R, 1, C / 2]."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies(head_dim, theta, scaling)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scaling is None or scaling.magnitude == 1:
        return cos, sin
    return cos * scaling.magnitude, sin * scaling.magnitude


def rotate(x: Array, turn: Rotation | None, scale: float = 1.0) -> Array:
    """x [B, M, R, heads, C] rotated and scaled (Su et al., arXiv 2104.09864); None: scaled only.

    Number i is paired with number i + C / 2, as in the published weights of all our families.
    """
    if turn is None:
        return (x.astype(jnp.float32) * scale).astype(x.dtype)
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
    tokens_per_radian = (np.float64(theta) ** exponents).astype(np.float32)
    kept = one / tokens_per_radian
    if scaling is None:
        return kept
    factor = np.float32(scaling.factor)
    # Linear scaling (Gemma 3): all positions closer together.
    if scaling.rope_type == "linear":
        return kept / factor
    if scaling.rope_type == "yarn":
        # Not kept / factor: the published code rounds the product, then the quotient.
        divided = one / (factor * tokens_per_radian)
        share_kept = one - _yarn_ramp(head_dim, theta, scaling)
        return divided * (one - share_kept) + kept * share_kept
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


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """How far each frequency is on the way from kept (0) to divided (1), float32 [C / 2]."""
    assert scaling.original_length is not None and scaling.high_frequency is not None

    def number_of(turns: float, length: int) -> float:
        # theta^(-2i / C) radians per token are `turns` turns in `length` tokens; solved for i.
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = number_of(scaling.high_frequency, scaling.original_length)
    last = number_of(scaling.low_frequency, scaling.original_length)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The bound is head_dim - 1, though there are only half as many frequencies: as published.
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp
    numbers = np.arange(head_dim // 2, dtype=np.float32)
    ramp = (numbers - np.float32(first)) / np.float32(last - first)
    return np.clip(ramp, np.float32(0), np.float32(1))
