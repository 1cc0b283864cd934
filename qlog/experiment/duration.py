"""How long a run takes, by arithmetic: as if chips ran at their public peaks.

A step is reckoned with all rationales at their budget, the most that there can be, and with all
arithmetic and memory at the chips' peaks, the least that it can take. So the sum is no bound; it
tells a run of an hour from one of a week before it starts. `--mode=compile` reckons the programs
that the compiler makes, exchanges between chips included, and progress lines tell what is left once
there are steps to go by.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from qlog import data
from qlog.data.pipeline import Lengths
from qlog.experiment.parts import Experiment
from qlog.experiment.phases import bytes_per_slot, prompts_of_shard
from qlog.models import flops
from qlog.parallel import chips, sharding
from qlog.parallel.chips import Chip, Gpu
from qlog.rollouts.decoding import Sampling


class Estimate(NamedTuple):
    """Seconds of a run's parts, at the chips' peaks."""

    step: float
    evaluation: float  # of one evaluation; 0 without
    num_steps: int
    num_evaluations: int
    kind: str  # of the chips, as JAX names it

    @property
    def whole(self) -> float:
        return self.num_steps * self.step + self.num_evaluations * self.evaluation


def estimate(experiment: Experiment) -> Estimate | None:
    """What a run takes from its first step to its last; None where peaks are not known (CPUs)."""
    config, kind = experiment.config, experiment.mesh.devices.flat[0].device_kind
    peaks = chips.peaks(kind)
    if peaks is None:
        return None
    step = _gradient(experiment, peaks)
    if experiment.estimator.rationale == "sampled":
        prompts, in_memory = prompts_of_shard(experiment)
        width = _widths(config, experiment.train_data).prompt
        rollouts = experiment.rollouts_per_prompt
        sampling = experiment.sampling
        step += _decode(experiment, peaks, sampling, prompts, in_memory, rollouts, width)
    # ---- Evaluations: every so many steps, and after the last one ----
    evaluation, num_evaluations = 0.0, 0
    dataset = experiment.evaluation_data
    if dataset is not None:
        settings = config.evaluation
        total = min(settings.prompts or len(dataset), len(dataset))
        evaluation = _decode(
            experiment,
            peaks,
            experiment.evaluation_sampling,
            -(-total // sharding.num_batch_shards(experiment.mesh)),
            settings.prompts_per_batch,
            settings.rollouts_per_prompt,
            _widths(config, dataset).prompt,
        )
        every = settings.every or config.train.steps
        num_evaluations = -(-config.train.steps // every)
    return Estimate(step, evaluation, config.train.steps, num_evaluations, kind)


def _widths(config: ConfigDict, dataset: data.Dataset | None) -> Lengths:
    """What the dataset's batches are padded to; without one the most that there can be."""
    if dataset is not None:
        return dataset.widths
    rollout = config.rollout
    return Lengths(config.data.max_prompt_tokens, rollout.answer_reserve, rollout.rationale_budget)


def _decode(
    experiment: Experiment,
    peaks: Chip | Gpu,
    sampling: Sampling,
    prompts: int,
    in_memory: int,
    num_rollouts: int,
    width: int,
) -> float:
    """Seconds of sampling, step by step: the slower of arithmetic and memory.

    Args:
      prompts: of a shard.
      in_memory: how many of these are decoded at a time.
      num_rollouts: per prompt, M.
      width: P, slots of a prompt.
    """
    policy, tensor = experiment.policy, experiment.mesh.shape["tensor"]
    shape = policy.config
    # The cache of one device, as if it had all heads: `tensor` divides the whole below.
    heads = dataclasses.replace(shape, num_layers=1).num_kv_heads
    numbers = 2 * shape.num_layers * heads * shape.head_dim
    parts = tensor if heads % tensor == 0 else 1
    of_cache = bytes_per_slot(experiment, policy.cache_dtype) * parts / numbers
    seconds = 0.0
    for first in range(0, prompts, in_memory):
        at_once = min(in_memory, prompts - first)
        need = flops.decode_need(
            shape,
            at_once,
            num_rollouts,
            width,
            sampling.max_length,
            jnp.dtype(policy.dtype).itemsize,
            of_cache,
        )
        prefill = flops.prefill_need(shape, at_once, width).flops
        seconds += prefill / tensor / peaks.flops
        seconds += max(need.flops / peaks.flops, need.bytes / peaks.hbm_speed) / tensor
    return seconds


def _gradient(experiment: Experiment, peaks: Chip | Gpu) -> float:
    """Seconds of forward and backward passes of a step."""
    config = experiment.config
    widths = _widths(config, experiment.train_data)
    length = experiment.trajectory_length(widths.rationale, widths.gold)
    need = flops.train_need(
        experiment.policy.config,
        config.train.prompts_per_step,
        experiment.rollouts_per_prompt,
        widths.prompt,
        length,
    )
    return need.flops / experiment.mesh.devices.size / peaks.flops
