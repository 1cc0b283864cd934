"""The records of the learner: what a gradient is taken on, how much of it at a time, its sums.

Shapes: B prompts of an update, M rollouts per prompt, R tokens of a trajectory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qlog import losses
from qlog.parallel import sharding
from qlog.records import Prompts, Trajectories

_FEWEST_TOKENS = 2048  # of a pass through the model on one device: `Microbatch.narrowed`


class LearnerBatch(NamedTuple):
    """What one gradient is taken on: the prompts of an update, or b of them in a microbatch."""

    prompts: Prompts  # of B prompts
    trajectories: Trajectories  # of B prompts by M rollouts
    coefficients: losses.Coefficients  # [B, M] each, constants that know all prompts of the step
    reference: Array | None = None  # float32 [B, M, R], log p under the reference parameters


class Objective(NamedTuple):
    """What is differentiated; hashable, so jit-static."""

    surrogate: losses.Surrogate  # its sums add over microbatches
    temperature: float = 1.0  # of the distribution that sampled; gold answers are scored at 1


class Microbatch(NamedTuple):
    """How much of a batch the gradient has in memory at a time; hashable, so jit-static."""

    prompts: int  # b, on all devices together; a divisor of B
    packs: int  # w, of each of these prompts (`packing.Packing`); a divisor of M

    @classmethod
    def of(cls, config: ConfigDict, mesh: Mesh) -> "Microbatch":
        """What `config.train` asks for, where 0 is all; its prompts are those of one shard."""
        train = config.train
        # Fields count what one shard does, programs what all shards do together.
        prompts = train.prompts_per_microbatch * sharding.num_batch_shards(mesh)
        return cls(
            prompts=prompts or train.prompts_per_step // train.updates_per_batch,
            packs=train.rollouts_per_microbatch or config.rollout.rollouts_per_prompt,
        )

    def narrowed(self, slots: int, num_shards: int) -> "Microbatch":
        """With as few packs at a time as keep a device busy: the last ones are seldom full.

        Args:
          slots: R of a pack.
          num_shards: that the prompts are split over.

        Returns:
          Packs that divide the ones of `self`; these themselves where packs are short.
        """
        # A pass of few tokens is dear: whatever their number, it gathers and reads all weights, and
        # reads and writes all gradients. The compiler's model of a longest step of Qwen3 0.6B on
        # v5e:4x4, with 8, 2 and 1 packs of 3,072 slots at a time: 19.3, 13.8 and 15.0 s, of which
        # the interconnect is busy 0.7, 2.7 and 6.3 s. With fewer tokens all would wait for it.
        slots_at_once = slots * (self.prompts // num_shards)  # of a device, per pack
        divisors = (n for n in range(1, self.packs) if self.packs % n == 0)
        fewest = next((n for n in divisors if n * slots_at_once >= _FEWEST_TOKENS), self.packs)
        return self._replace(packs=fewest)


class SamplerMismatch(NamedTuple):
    """How far the learner's log-probabilities are from the sampler's, over the sampled tokens.

    Float32 scalars, with d = |log p by the learner - log p by the sampler| of a token.
    """

    num_tokens: Array  # tokens that the sampler drew, and so has a log p of
    sum: Array  # sum of d, in nats
    max: Array  # the largest d
    sum_exp: Array  # sum of exp(d): the factor by which the two probabilities differ

    @classmethod
    def between(cls, new: Array, old: Array, was_sampled: Array) -> "SamplerMismatch":
        """Of log-probabilities [b, M, R] by the learner and by the sampler, where it sampled."""
        difference = jnp.where(was_sampled, jnp.abs(new - old), 0.0)
        return cls(
            num_tokens=was_sampled.sum(dtype=jnp.float32),
            sum=difference.sum(),
            max=difference.max(),
            sum_exp=jnp.where(was_sampled, jnp.exp(difference), 0.0).sum(),
        )

    def merge(self, other: "SamplerMismatch") -> "SamplerMismatch":
        """Of the tokens of both. Zeros are neutral: no difference is below 0."""
        # All fields add up, except the largest.
        total = jax.tree.map(jnp.add, self, other)
        return total._replace(max=jnp.maximum(self.max, other.max))


class PackedRows(NamedTuple):
    """Packs that passed through the model, on all devices together: int32 scalars."""

    executed: Array  # all of them, the empty ones too
    needed: Array  # those that hold something


class StepSums(NamedTuple):
    """What a gradient tells besides itself: sums over tokens, which merge over microbatches."""

    surrogate: losses.Sums  # the loss, and what the surrogate measures
    mismatch: SamplerMismatch  # of the learner to the sampler
    rows: PackedRows  # what was computed for them

    def merge(self, other: "StepSums") -> "StepSums":
        """Of the tokens of both."""
        return StepSums(
            jax.tree.map(jnp.add, self.surrogate, other.surrogate),
            self.mismatch.merge(other.mismatch),
            jax.tree.map(jnp.add, self.rows, other.rows),
        )


class TermNorms(NamedTuple):
    """How large the two terms of a gradient are, float32 scalars. Norms are over all parameters."""

    score_norm: Array  # of what the rationales' tokens give, times the score coefficient
    path_norm: Array  # of what the answers' tokens give, times the path coefficient
    cosine: Array  # between the two, in [-1, 1]; 0 where one of them is 0


class UpdateMetrics(NamedTuple):
    """What an optimizer's update tells, scalars. Norms are over all parameters together (L2)."""

    grad_norm: Array  # float32, of the gradient before it is clipped; not finite: a skipped update
    update_norm: Array  # float32, of what was added to the parameters; 0 of a skipped update
    param_norm: Array  # float32, of the parameters after the update
    skipped_updates: Array  # int32, since the run began: gradients with an inf or a NaN
    skipped_in_a_row: Array  # int32, up to this update; 0 after one that was made
