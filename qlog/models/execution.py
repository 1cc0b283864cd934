"""How a decoder is executed: what changes speed, memory and rounding only."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from qlog.models.attention import ATTENTION, Attend, AttendStep, blocks

_keep_attention = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(ATTENTION),
    # cuDNN's backward pass needs all outputs of its forward pass, and those have no name.
    lambda primitive, *_, **__: primitive.name == "dot_product_attention_fwd_wrapper",
)
# What the forward pass of a layer keeps for its backward pass, besides the layer's input. The rest
# is computed again. From most memory to least:
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    # Matrix products and attention: only elementwise work is repeated.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _keep_attention
    ),
    # Only attention, which costs most for long rollouts.
    "attention": _keep_attention,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _unchanged(hidden: Array) -> Array:
    return hidden


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a decoder's functions run; hashable, so jit-static.

    Equal values give equal programs, if `attend` and `constrain` are the same objects: a
    `functools.partial` made anew equals no other one.
    """

    # Of activations and of keys and values; parameters are cast to it.
    dtype: DTypeLike = jnp.float32
    attend: Attend = blocks.attend  # `models.attention.kernels` has others, with the same results
    attend_step: AttendStep = blocks.attend_step  # the same for one token of each rollout
    # Applied to hidden states [B, M, R, D] after the embedding and after each layer of a pass that
    # may be differentiated, to say how they are split over a mesh (`with_sharding_constraint`).
    constrain: Callable[[Array], Array] = _unchanged
    remat: str = "none"  # a key of REMAT


PLAIN = Execution()
