"""The static half of a policy; its parameters are the other half."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from qlog import models, sharding
from qlog.models import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Policy:
    """What compiled programs need to know of a model; hashable, so jit-static.

    Attributes:
      config: the decoder's shape.
      valid_vocab: rows of the vocabulary that the tokenizer knows; the padding rows after them
        get probability 0, in sampling and in scoring alike.
      dtype: of activations and KV caches. Parameters, log-probabilities and losses are float32.
      remat: none | dots | attention | full: what of a layer the backward pass finds kept
        (`models.REMAT`), and what it computes again.
      mesh: over which caches are held split by prompts and heads; None leaves it to the compiler.
      attention: blocks (plain JAX, any backend), tpu (Pallas kernels) or cudnn (CUDA GPUs; in
        float32 blocks, too, of a GPU's size).
    """

    config: DecoderConfig
    valid_vocab: int
    dtype: Any = jnp.float32
    remat: str = "none"
    mesh: Mesh | None = None
    attention: str = "blocks"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `models.apply` and `models.prefill`."""
        attend, attend_step = models.attention.attend, models.attention.attend_step
        if self.attention == "tpu":
            attend = functools.partial(models.attention_tpu.attend, mesh=self.mesh)
        elif self.attention == "cudnn":
            attend, attend_step = models.attention_cudnn.attend, models.attention_cudnn.attend_step
        hold = functools.partial(sharding.keep_prompts, self.mesh)
        return {"dtype": self.dtype, "attend": attend, "attend_step": attend_step, "hold": hold}

    def gathered(self, params: models.Params) -> models.Params:
        """Parameters whose tables lie whole on every device, but for the tensor axis.

        Looked up in a table that is split over fsdp, activations would be split over their width,
        and logits be partial sums.
        """
        tables = {k: params[k] for k in ("embed", "unembed") if k in params}
        return params | sharding.keep_gathered(self.mesh, tables)
