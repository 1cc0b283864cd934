"""Attention over segments of keys and values: one description, a choice of kernels."""

import functools
from typing import NamedTuple

from jax.sharding import Mesh

from qlog.models.attention import blocks, cudnn, tpu
from qlog.models.attention.quantised import Cached, Quantised
from qlog.models.attention.segment import ATTENTION, Attend, AttendStep, Segment

__all__ = [
    "ATTENTION",
    "Attend",
    "AttendStep",
    "Cached",
    "Kernels",
    "Quantised",
    "Segment",
    "kernels",
]


class Kernels(NamedTuple):
    """The two kinds of attention that a decoder needs."""

    attend: Attend  # many query rows over segments; differentiable
    attend_step: AttendStep  # one token of each rollout; no gradient


@functools.cache  # a `functools.partial` equals no other, so each is made once
def kernels(name: str, mesh: Mesh | None = None) -> Kernels:
    """The kernels of a name: "blocks" (plain JAX, any backend), "tpu" (Pallas) or "cudnn" (CUDA).

    Args:
      name: of the module in this package.
      mesh: over which Pallas kernels are split; the compiler splits the others by itself.
    """
    return {
        "blocks": Kernels(blocks.attend, blocks.attend_step),
        # A decode step has one query row per rollout and head, too few to fill a Pallas block.
        "tpu": Kernels(functools.partial(tpu.attend, mesh=mesh), blocks.attend_step),
        "cudnn": Kernels(cudnn.attend, cudnn.attend_step),
    }[name]
