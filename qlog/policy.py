"""The static half of a policy; its parameters are the other half."""

import dataclasses
import functools

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qlog import models
from qlog.models import DecoderConfig, attention
from qlog.models.attention import quantised
from qlog.parallel import sharding

_CHUNK_BYTES = 1 << 24  # of float32 logits that exist at a time, on a device
_FEWEST_TOKENS = 256  # of a chunk: with fewer, matrix products would get thin


@dataclasses.dataclass(frozen=True)
class Policy:
    """What compiled programs need to know of a model; hashable, so jit-static."""

    config: DecoderConfig  # the decoder's shape
    # Rows of the vocabulary that the tokenizer knows. The padding rows after them get probability
    # 0, in sampling and in scoring alike.
    valid_vocab: int
    # Of activations and of keys and values. Parameters, log-probabilities and losses are float32.
    dtype: DTypeLike = jnp.float32
    remat: str = "none"  # a key of models.REMAT: what the backward pass computes again
    # Over which activations and caches are split, by prompts and heads; None leaves it to the
    # compiler.
    mesh: Mesh | None = None
    attention: str = "blocks"  # the kernels: a name that `models.attention.kernels` takes
    # Keys and values that sampling and scoring keep: "auto" is `dtype`, "int8" quantises them
    # (`models.attention.quantised`). The learner keeps none.
    cache: str = "auto"

    @property
    def cache_dtype(self) -> DTypeLike:
        """Of the caches that sampling and scoring keep."""
        return jnp.int8 if self.cache == "int8" else self.dtype

    @property
    def cache_itemsize(self) -> float:
        """Bytes per number of a key or a value in these caches, scales included."""
        return quantised.itemsize(self.cache_dtype, self.config.head_dim)

    @property
    def execution(self) -> models.Execution:
        """How the functions of `models` run for this policy."""
        return _execution(self)

    @property
    def logits_chunk(self) -> int:
        """Tokens whose logits exist at a time, on all devices together: `head.token_log_probs`."""
        fitting = max(_FEWEST_TOKENS, _CHUNK_BYTES // (4 * self.config.vocab_size))
        return fitting * (sharding.num_batch_shards(self.mesh) if self.mesh else 1)

    def gathered(self, params: models.Params) -> models.Params:
        """The parameters with their tables whole on every device, but for the tensor axis.

        Otherwise a table is split over fsdp: activations that are looked up in it would be split
        over their width, and logits would be partial sums.
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
