"""How long a run takes, by arithmetic: as if chips ran at their public peaks.

| what is reckoned | how much of it |
|---|---|
| decoding | the pools of `rollouts.schedule` on one shard, all rationales at their budget |
| log w | a pass over the gold answers for every pool that ends or moves |
| the gradient | forward, backward, and what `train.remat` computes again |
| the reference of a KL penalty | a forward pass over all rollouts |
| `train.terms_every` | a second gradient of a step's first update, every so many steps |
| evaluations | as decoding; those without rationales and the last one's split, too |

Passes over many tokens take their arithmetic, decoding the slower of arithmetic and memory. Budgets
are the most that rationales can take, and peaks the least time. So the sum is no bound; it tells a
run of an hour from one of a week before it starts. Left out is what takes little of a step (updates
of parameters, moves of caches), and what no arithmetic knows (compiling, rewards, saving).
`--mode=compile` reckons the programs that the compiler makes, exchanges between chips included, and
progress lines tell what is left once there are steps to go by.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from qlog import data
from qlog.config.evaluated import splits_after
from qlog.data import splits
from qlog.data.pipeline import Lengths
from qlog.experiment.parts import EvaluationCalls, Experiment
from qlog.experiment.phases import bytes_per_slot, prompts_of_shard
from qlog.models import flops
from qlog.parallel import chips, sharding
from qlog.parallel.chips import Chip, Gpu
from qlog.rollouts import sampler, schedule
from qlog.rollouts.balance import Shards
from qlog.rollouts.decoding import Sampling
from qlog.rollouts.schedule import STEPS_PER_LOOK, Planted, Schedule

_MOST_LOOKS = 2**14  # at a schedule's pools, about


class Estimate(NamedTuple):
    """Seconds of what is left of a run, at the chips' peaks."""

    step: float  # on average; 0 where none is left
    evaluation: float  # of one evaluation on `evaluation.split`; 0 without
    final: float  # of the one on `evaluation.final`; 0 without
    num_steps: int
    num_evaluations: int  # on `evaluation.split`
    kind: str  # of the chips, as JAX names it

    @property
    def whole(self) -> float:
        steps, evaluations = self.num_steps * self.step, self.num_evaluations * self.evaluation
        return steps + evaluations + self.final


def estimate(experiment: Experiment, start: int = 0) -> Estimate | None:
    """What a run takes after its step `start`; None where peaks are not known (CPUs).

    An experiment of shapes evaluates what its config says, if the size of the split is known.
    """
    config, kind = experiment.config, experiment.mesh.devices.flat[0].device_kind
    peaks = chips.peaks(kind)
    if peaks is None:
        return None
    # ---- Evaluations that are to come ----
    settings, dataset, final = config.evaluation, experiment.evaluation_data, experiment.final_data
    every = settings.every
    if experiment.train_data is not None:
        # Where something is evaluated in any case, it is at least after the last step.
        every = (every or config.train.steps) if dataset is not None else 0
    left = splits_after(config, start, every)
    num_evaluations = left.count(settings.split)
    evaluation = _evaluation(experiment, peaks, settings.split, dataset) if num_evaluations else 0.0
    is_last = settings.final in left and (experiment.train_data is None or final is not None)
    last = _evaluation(experiment, peaks, settings.final, final) if is_last else 0.0
    if not evaluation:
        num_evaluations = 0
    # ---- Steps ----
    num_steps = max(config.train.steps - start, 0)
    step = _step(experiment, peaks, start) if num_steps else 0.0
    return Estimate(step, evaluation, last, num_steps, num_evaluations, kind)


def num_questions(config: ConfigDict, split: str, dataset: data.Dataset | None = None) -> int:
    """Questions of one evaluation; 0 where that is not known before its data are read.

    Args:
      dataset: of the split, where it is read.
    """
    size = len(dataset) if dataset is not None else None
    if size is None:
        size = splits.SIZES.get(data.label(config.data.name), {}).get(split)
    return min(filter(None, (size, config.evaluation.prompts)), default=0)


# ---- A step, and an evaluation ----


def _step(experiment: Experiment, peaks: Chip | Gpu, start: int) -> float:
    """Seconds of a step, on average over those from step `start` on."""
    config, estimator = experiment.config, experiment.estimator
    train, widths = config.train, _widths(config, experiment.train_data)
    seconds = 0.0
    if estimator.rationale == "sampled":
        prompts, in_memory = prompts_of_shard(experiment)
        lengths = np.full((prompts, experiment.rollouts_per_prompt), experiment.sampling.max_length)
        seconds += _sample(experiment, peaks, experiment.sampling, lengths, in_memory, widths)
    forward, gradient = _passes(experiment, widths)
    passes = gradient
    if estimator.reference:
        passes += forward
    if every := train.terms_every:
        # At step 0 and every so many from it.
        number = -(-train.steps // every) - -(-start // every)
        passes += gradient / train.updates_per_batch * number / (train.steps - start)
    return seconds + passes / experiment.mesh.devices.size / peaks.flops


def _evaluation(
    experiment: Experiment, peaks: Chip | Gpu, split: str, dataset: data.Dataset | None
) -> float:
    """Seconds of one evaluation, with all its passes; 0 where its size is not known."""
    config, usual = experiment.config, experiment.evaluation_sampling
    settings, widths = config.evaluation, _widths(config, dataset)
    questions = num_questions(config, split, dataset)
    if not questions:
        return 0.0
    shards = sharding.num_batch_shards(experiment.mesh)
    calls = EvaluationCalls.of(questions, shards, settings.prompts_per_batch)
    prompts = calls.batches * calls.per_shard
    # The last call is filled up with copies, whose rationales have no budget.
    copies = (calls.number * prompts * shards - questions) // shards
    bare = dataclasses.replace(usual, rationale_budget=0)
    seconds = 0.0
    for sampling in [usual, bare] if settings.without_rationale else [usual]:
        full = np.full((prompts, settings.rollouts_per_prompt), sampling.max_length)
        filled_up = full.copy()
        filled_up[prompts - copies :] = bare.max_length
        of_call = lambda lengths, sampling=sampling: _sample(
            experiment, peaks, sampling, lengths, calls.per_shard, widths
        )
        seconds += (calls.number - 1) * of_call(full) if calls.number > 1 else 0.0
        seconds += of_call(filled_up)
    return seconds


def _widths(config: ConfigDict, dataset: data.Dataset | None) -> Lengths:
    """What the dataset's batches are padded to; without one the most that there can be."""
    if dataset is not None:
        return dataset.widths
    rollout = config.rollout
    return Lengths(config.data.max_prompt_tokens, rollout.answer_reserve, rollout.rationale_budget)


# ---- What they consist of ----


class _Scored(Planted):
    """Counts what is scored: all lanes of a pool, whenever they are stored."""

    num_lanes = 0

    def store(self) -> None:
        self.num_lanes += self.rollout_ids.size


def _sample(
    experiment: Experiment,
    peaks: Chip | Gpu,
    sampling: Sampling,
    lengths: np.ndarray,
    in_memory: int,
    widths: Lengths,
) -> float:
    """Seconds of a call of the sampler: prompts, decoding, scores of the gold answers.

    Args:
      lengths: int [b, M], tokens of the rollouts of one shard; the others have the same.
      in_memory: prompts whose rollouts fit at their longest.
    """
    policy, tensor = experiment.policy, experiment.mesh.shape["tensor"]
    prompts, num_rollouts = lengths.shape
    shape = sampler.shape_of(sampling, prompts, num_rollouts, widths.prompt, in_memory)
    # ---- The pools, as the sampler makes them. Shards of equal work exchange nothing ----
    plan = Schedule(shape, Shards(1, 1, num_rollouts))
    machine = _Scored(plan, lengths)
    # Looks cost time here, too: of many waves or tokens there are fewer.
    steps_per_look = max(STEPS_PER_LOOK, plan.num_waves * shape.slots // _MOST_LOOKS)
    stretches = schedule.run(plan, machine, steps_per_look).stretches
    # ---- Decoding: step by step ----
    of_slot = 2 * policy.config.num_layers * policy.config.num_kv_heads * policy.config.head_dim
    # Of a number of the caches, as if each device of a tensor group had its part: where heads do
    # not divide, each has and reads all of them.
    of_cache = bytes_per_slot(experiment, policy.cache_dtype) * tensor / of_slot
    itemsize, seconds = jnp.dtype(policy.dtype).itemsize, 0.0
    for stretch in stretches:
        level, first, last = stretch
        start, length = widths.prompt + first, last - first
        need = flops.continuation_need(policy.config, level.num_lanes, start, length)
        read = schedule.read_bytes(stretch, policy.config, widths.prompt, itemsize, of_cache)
        seconds += max(need.flops / peaks.flops, read / peaks.hbm_speed) / tensor
    # ---- Passes over prompts and gold answers ----
    start = widths.prompt + sampling.max_rationale_length
    prefilled = flops.prefill_need(policy.config, prompts, widths.prompt)
    scored = flops.continuation_need(policy.config, machine.num_lanes, start, widths.gold)
    return seconds + (prefilled.flops + scored.flops) / tensor / peaks.flops


def _passes(experiment: Experiment, widths: Lengths) -> tuple[float, float]:
    """FLOPs of a step's forward pass, and of its gradient, on all devices together."""
    policy, num_rollouts = experiment.policy, experiment.rollouts_per_prompt
    prompts = experiment.config.train.prompts_per_step
    slots = experiment.trajectory_length(widths.rationale, widths.gold)
    size = (policy.config, prompts, num_rollouts, widths.prompt, slots)
    gradient = flops.train_need(*size).flops
    forward = gradient / 3
    # As `head.token_log_probs` cuts the tokens of a microbatch: chunks are computed again.
    shards = sharding.num_batch_shards(experiment.mesh)
    microbatch = experiment.microbatch.narrowed(slots, shards)
    largest = max(1, policy.logits_chunk // microbatch.prompts)
    gradient += flops.recomputed_need(
        *size,
        body=policy.remat in ("attention", "full"),
        attention=policy.remat == "full",
        head=microbatch.packs * slots > largest,
    ).flops
    return forward, gradient
