"""The matrix product of activations with a kernel, its gradient written out."""

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_vjp
def matmul(x: Array, kernel: Array) -> Array:
    """x [..., I] @ kernel [I, O] -> [..., O], in the dtype of both.

    Its own derivative rule because JAX's computes the kernel's gradient as (g^T x)^T, for which XLA
    on CPUs first writes a transposed copy of the wider operand, a fifth of a training step's time.
    """
    return jnp.matmul(x, kernel)


def _forward(x, kernel):
    return jnp.matmul(x, kernel), (
        x,
        kernel,
    )  # rematerialisation looks for this product by its kind


def _backward(residuals, cotangent):
    x, kernel = residuals
    tokens = tuple(range(x.ndim - 1))
    kernel_grad = jax.lax.dot_general(x, cotangent, ((tokens, tokens), ((), ())))
    return jnp.matmul(cotangent, kernel.T), kernel_grad


matmul.defvjp(_forward, _backward)


def dot_general(x: Array, kernel: Array, dimensions, precision=None, **options) -> Array:
    """`matmul` as what flax.linen.Dense takes for `dot_general`."""
    del precision, options
    assert dimensions == (((x.ndim - 1,), (0,)), ((), ())), dimensions
    return matmul(x, kernel)
