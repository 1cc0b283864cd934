"""The matrix product of activations with a kernel, its gradient written out."""

import functools

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_vjp
def matmul(x: Array, kernel: Array) -> Array:
    """x [..., I] @ kernel [I, O] -> [..., O], in the dtype of both.

    Its own derivative rule: of the two operands of a kernel's gradient XLA on CPUs transposes the
    first beforehand, so the narrower one is the first. JAX's rule may choose the wider.
    """
    return jnp.matmul(x, kernel)


def _forward(x, kernel):
    return jnp.matmul(x, kernel), (x, kernel)  # rematerialisation looks for this product by its kind


def _backward(residuals, cotangent):
    x, kernel = residuals
    tokens = tuple(range(x.ndim - 1))
    over_tokens = functools.partial(jax.lax.dot_general, dimension_numbers=((tokens, tokens), ((), ())))
    is_wider = x.shape[-1] > cotangent.shape[-1]
    kernel_grad = over_tokens(cotangent, x).T if is_wider else over_tokens(x, cotangent)
    return jnp.matmul(cotangent, kernel.T), kernel_grad


matmul.defvjp(_forward, _backward)


def dot_general(x: Array, kernel: Array, dimensions, precision=None, **options) -> Array:
    """`matmul` as what flax.linen.Dense takes for `dot_general`."""
    del precision, options
    assert dimensions == (((x.ndim - 1,), (0,)), ((), ())), dimensions
    return matmul(x, kernel)
