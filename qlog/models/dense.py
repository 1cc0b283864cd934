"""The matrix product of activations with a kernel, its gradient written out."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_vjp
def matmul(x: Array, kernel: Array) -> Array:
    """x [..., I] @ kernel [I, O] -> [..., O], in the dtype of both.

    It has its own derivative rule. JAX's rule computes the kernel's gradient as (g^T x)^T, for
    which XLA on CPUs first writes a transposed copy of the wider operand: a fifth of the time of a
    training step.
    """
    return jnp.matmul(x, kernel)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    # A plain matmul, not a kernel of our own: rematerialisation finds what to keep by its kind.
    return jnp.matmul(x, kernel), (x, kernel)


def _backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    # Contracts all token axes at once: x^T g, with both operands as they lie in memory.
    tokens = tuple(range(x.ndim - 1))
    kernel_grad = jax.lax.dot_general(x, cotangent, ((tokens, tokens), ((), ())))
    return jnp.matmul(cotangent, kernel.T), kernel_grad


matmul.defvjp(_forward, _backward)


def dot_general(
    x: Array,
    kernel: Array,
    dimensions: jax.lax.DotDimensionNumbers,
    precision: jax.lax.PrecisionLike = None,
    **options: Any,
) -> Array:
    """`matmul` with the signature that flax.linen.Dense expects of its `dot_general`."""
    del precision, options
    assert dimensions == (((x.ndim - 1,), (0,)), ((), ())), dimensions
    return matmul(x, kernel)
