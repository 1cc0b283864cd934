"""The static half of a policy; its parameters are the other half."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from qlog.models import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Policy:
    """What compiled programs need to know of a model; hashable, so jit-static.

    Attributes:
      config: the decoder's shape.
      valid_vocab: rows of the vocabulary that the tokenizer knows; the padding rows after them
        get probability 0, in sampling and in scoring alike.
      dtype: of activations and KV caches. Parameters, log-probabilities and losses are float32.
      remat: none | dots | full, what the backward pass recomputes instead of keeping it.
      mesh: over which caches are held split by prompts and heads; None leaves it to the compiler.
    """

    config: DecoderConfig
    valid_vocab: int
    dtype: Any = jnp.float32
    remat: str = "none"
    mesh: Mesh | None = None
