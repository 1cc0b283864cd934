"""From a batch to the blocks that each program of an update computes; arithmetic on the host.

`blocks.py` cuts prompts into blocks. Here is what it needs to know of the model and the batch, and
how many microbatches of blocks go into one program.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qlog import models
from qlog.learner.blocks import Blocks, PlanSettings, Work, plan_blocks
from qlog.learner.packing import pack_rollouts
from qlog.learner.types import Microbatch
from qlog.parallel import sharding
from qlog.policy import Policy
from qlog.records import Prompts, Trajectories

_FLOPS_PER_PROGRAM = 2e11  # per device: about a second of a CPU


def _num_shards(policy: Policy) -> int:
    return sharding.num_batch_shards(policy.mesh) if policy.mesh else 1


def narrowed(policy: Policy, trajectories: Trajectories, microbatch: Microbatch) -> Microbatch:
    """`Microbatch.narrowed`, for these trajectories on the mesh of the policy."""
    return microbatch.narrowed(trajectories.tokens.shape[-1], _num_shards(policy))


def blocks_of_programs(
    policy: Policy,
    prompts: Prompts,
    trajectories: Trajectories,
    num_packs: Array,
    microbatch: Microbatch,
    balanced: bool = True,
) -> list[Blocks]:
    """The blocks that each program computes: those of one microbatch, or of several small ones.

    Args:
      num_packs: int32 [B], of each prompt, whole on every device. The host waits for it.
      microbatch: `narrowed` already.
      balanced: as `batch_gradient` takes it.
    """
    slots = prompts.tokens.shape[1], trajectories.tokens.shape[-1]
    settings = plan_settings(policy.config, *slots, _num_shards(policy), microbatch)
    several = _microbatches_per_program(policy, prompts, trajectories, microbatch)
    planned = plan_blocks(jax.device_get(num_packs), settings, balanced)
    planned = planned.padded_to_multiple(several)
    starts = range(0, len(planned.prompt), several)
    return [planned.of(start, start + several) for start in starts]


def plan_settings(
    config: models.DecoderConfig,
    prompt_slots: int,
    rollout_slots: int,
    num_shards: int,
    microbatch: Microbatch,
) -> PlanSettings:
    """What blocks are planned for.

    Args:
      prompt_slots, rollout_slots: P and R.
      microbatch: `narrowed` already.
    """
    flops = models.flops
    prompt = flops.prefill_need(config, 1, prompt_slots).flops
    # A pack costs what one rollout of R tokens does.
    pack = flops.continuation_need(config, 1, prompt_slots, rollout_slots).flops
    return PlanSettings(num_shards, microbatch.prompts, microbatch.packs, prompt / pack)


def planned_work(
    lengths: np.ndarray,
    config: models.DecoderConfig,
    prompt_slots: int,
    rollout_slots: int,
    num_shards: int,
    microbatch: Microbatch,
    balanced: bool = True,
) -> Work:
    """What `batch_gradient` would compute for rollouts of these lengths; host arithmetic.

    Args:
      lengths: int [B, M], in tokens, of an update's rollouts; all of them are learned from.
      config: of the model.
      prompt_slots, rollout_slots: P and R.
      num_shards: that the B prompts are split over.
      microbatch: as `batch_gradient` takes it.
      balanced: False: as if each shard kept its prompts whole and took as many packs at a time as
        `microbatch` allows, to compare with.
    """
    if balanced:
        microbatch = microbatch.narrowed(rollout_slots, num_shards)
    settings = plan_settings(config, prompt_slots, rollout_slots, num_shards, microbatch)
    on_device = _num_packs(jnp.asarray(lengths, jnp.int32), rollout_slots)
    planned = plan_blocks(jax.device_get(on_device), settings, balanced)
    return settings.work(planned)


@functools.partial(jax.jit, static_argnames=("length",))
def _num_packs(lengths: Array, length: int) -> Array:
    return pack_rollouts(lengths, jnp.ones(lengths.shape, bool), length).num_packs


def _microbatches_per_program(
    policy: Policy, prompts: Prompts, trajectories: Trajectories, microbatch: Microbatch
) -> int:
    """How many microbatches one program takes."""
    # One per program lets the host look for signals after each. But every program does anew what a
    # loop does once for all its iterations: the layout of the weights, and a copy of the gradients.
    # Large microbatches hide that, small ones do not. So these go together, as many as take about
    # a second on a CPU, which is soon enough for a signal.
    num_microbatches = len(prompts.lengths) // microbatch.prompts
    _, num_rollouts, length = trajectories.tokens.shape
    need = models.flops.train_need(
        policy.config, microbatch.prompts, num_rollouts, prompts.tokens.shape[1], length
    )
    num_devices = policy.mesh.size if policy.mesh else 1
    most = int(_FLOPS_PER_PROGRAM * num_devices / need.flops)
    return min(max(most, 1), num_microbatches)
