"""The static half of a policy; its parameters are the other half."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from qlog import models
from qlog.models import DecoderConfig, attention
from qlog.parallel import sharding


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
    def execution(self) -> models.Execution:
        """How the functions of `models` run for this policy."""
        return _execution(self)

    def gathered(self, params: models.Params) -> models.Params:
        """Parameters whose tables lie whole on every device, but for the tensor axis.

        Looked up in a table that is split over fsdp, activations would be split over their width,
        and logits be partial sums.
        """
        tables = {k: params[k] for k in ("embed", "unembed") if k in params}
        return params | sharding.constrain_gathered_params(self.mesh, tables)


@functools.cache  # equal policies share one, whose functions are the same objects
def _execution(policy: Policy) -> models.Execution:
    kernels = attention.kernels(policy.attention, policy.mesh)
    return models.Execution(
        dtype=policy.dtype,
        attend=kernels.attend,
        attend_step=kernels.attend_step,
        constrain=functools.partial(sharding.constrain_activations, policy.mesh),
        remat=policy.remat,
    )


_CHUNK_BYTES = 1 << 24  # float32 logits that exist at a time, on a device


_FEWEST = 256  # but no fewer tokens than this: matrix products would get thin


def logits_chunk(policy: Policy) -> int:
    """Tokens per chunk on all devices together."""
    fitting = max(_FEWEST, _CHUNK_BYTES // (4 * policy.config.vocab_size))
    return fitting * (sharding.num_batch_shards(policy.mesh) if policy.mesh else 1)
