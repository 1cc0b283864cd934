"""Caches of int8 numbers: half the memory of bfloat16 ones, and half of what decoding reads.

A key or a value is a vector of C numbers, of one token and one head. It is kept as

    x  ~  scale * n,    scale = max |x| / 127,    n = round(x / scale), an int8,

so each number is off by at most scale / 2. Attention never makes the vectors anew. A scale belongs
to a whole vector, so it leaves the sum over C, and multiplies one number per token instead of C:

    scores      q . k_t               =  (q . n_t) scale_t
    the mix     sum over t of p_t v_t =  sum over t of (p_t scale_t) n_t

int8 numbers are exact in bfloat16, so the products see what the cache holds, in any dtype.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

_LARGEST = 127  # of an int8; -128 is left out, so that x and -x are kept alike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """Vectors [..., C] as int8 numbers, each vector with a scale: x = scale * values.

    A pytree of two arrays with the same axes. What cuts, moves or splits vectors along any axis but
    the last does the same to both, so `jax.tree.map` of such code takes caches of either kind. (It
    is no tuple, since a tuple of caches is one of layers.)
    """

    values: Array  # int8 [..., C]
    scale: Array  # float32 [..., 1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the vectors."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """int8, by which `stored` knows how the cache is kept."""
        return self.values.dtype


Cached = Array | Quantised  # keys or values [..., C] as a cache holds them


def stored(x: Array, dtype: DTypeLike) -> Cached:
    """Keys or values [..., C] as a cache of this dtype holds them: int8 quantises."""
    return _quantise(x) if jnp.dtype(dtype) == jnp.int8 else x.astype(dtype)


def _quantise(x: Array) -> Quantised:
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1, keepdims=True) / _LARGEST
    # A vector of zeros has scale 0, and stays zeros. An inf or a NaN makes the scale one, too, and
    # with it all that is read from this vector: nothing broken becomes a number that looks right.
    values = jnp.round(x / jnp.where(scale > 0, scale, 1))
    return Quantised(values.astype(jnp.int8), scale)


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> Cached:
    """Room for keys or values of this shape, [..., C], in a cache of this dtype."""
    values = jnp.zeros(shape, dtype)
    if values.dtype != jnp.int8:
        return values
    return Quantised(values, jnp.zeros((*shape[:-1], 1), jnp.float32))


def factors(x: Cached, dtype: DTypeLike) -> tuple[Array, Array | None]:
    """What a matrix product over tokens takes of a block of keys or values [..., T, C].

    Returns:
      The vectors, quantised ones without their scales and in `dtype`; and the scales as a row,
      float32 [..., 1, T], or None where there are none.
    """
    if isinstance(x, Quantised):
        return x.values.astype(dtype), x.scale.mT
    return x, None


def itemsize(dtype: DTypeLike, head_dim: int) -> float:
    """Bytes that a cache of this dtype takes per number of a key or a value, scales included."""
    vector = jax.eval_shape(lambda: empty((head_dim,), dtype))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(vector)) / head_dim
