"""The programs of a training step, lowered from shapes: no weights, no data, no devices.

A step at its longest, full prompts and every budget spent, or with rollouts of given lengths. The
arguments of each program are `jax.ShapeDtypeStruct`s with the shardings that the programs before it
give their results, so that what is compiled is what training compiles. How much of it runs is taken
from the plans that training follows: `rollouts.schedule` and `learner.blocks`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlog import losses, models
from qlog.aot.compiler import compile_lowered
from qlog.aot.hlo_cost import DataLoop, all_slices
from qlog.experiment import Experiment
from qlog.experiment.parts import BATCHES_PER_CALL
from qlog.experiment.phases import bytes_per_device
from qlog.learner import gradient, planning
from qlog.learner.blocks import Blocks
from qlog.learner.blocks import Work as LearnerWork
from qlog.learner.optimizer import apply_update
from qlog.learner.types import LearnerBatch, Microbatch, Objective
from qlog.parallel import batch_placement, sharding
from qlog.records import Golds, Prompts, Trajectories
from qlog.rollouts import decoding, sampler
from qlog.rollouts.moves import Pool
from qlog.rollouts.schedule import Schedule, Stretch, Work, planned_work, read_bytes

# Of prompts and rationales, in programs that are compiled for their shardings only.
_FEW_TOKENS = 16


class LoweredProgram(NamedTuple):
    """A program of a training step, ready to be compiled."""

    name: str  # cast, prefill, decode, score, evaluate, gradient or update
    lowered: jax.stages.Lowered
    # Per training step; 0 of what evaluation runs between steps. Decoding is compiled for the pool
    # that a wave starts with. Pools of other sizes count as so many runs as they read bytes.
    runs: float
    resident: float  # bytes of HBM per chip that other programs' arrays take while it runs


class StepLoops(NamedTuple):
    """How often the loops whose end depends on data run.

    Such loops have names in the programs, `jax.named_scope`s:

    | scope | where | an iteration is |
    |---|---|---|
    | decode_steps | rollouts/decoding.py | a token of every rollout, until all are done |
    | packs | learner/forward.py | a microbatch of packed rollouts, until none is left |
    | attention_blocks | models/attention/blocks.py | a block of keys that some query sees |

    The TPU kernels of attention count as `attention_blocks`. Every other loop has a constant number
    of iterations, which stands in the program.
    """

    prompt_tokens: int  # P, slots of a prompt
    decode_steps: int  # of the pool that a wave starts with, until its slots are spent
    rollout_tokens: int  # slots of a rollout and its gold answer in the learner
    microbatches_of_rollouts: float  # per microbatch of blocks, on average

    @classmethod
    def of(cls, experiment: Experiment, lengths: np.ndarray | None = None) -> "StepLoops":
        """Of a step with full prompts.

        Args:
          lengths: int [B, M] of the rollouts; None: all at their longest.
        """
        work = _learner_work(experiment, lengths)
        windows = work.executed_rows / _microbatch(experiment).packs
        return cls(
            prompt_tokens=experiment.config.data.max_prompt_tokens,
            decode_steps=min(experiment.sampling.max_length, _schedule(experiment).sizes[0].slots),
            rollout_tokens=(
                experiment.sampling.max_rationale_length + experiment.config.rollout.answer_reserve
            ),
            microbatches_of_rollouts=windows / work.prompt_passes,
        )

    def trips(self, loop: DataLoop) -> float:
        """Iterations of one loop, as `hlo_cost.module_cost` takes it."""
        if loop.scope == "decode_steps":
            return self.decode_steps
        if loop.scope == "packs":
            return self.microbatches_of_rollouts
        if loop.scope == "attention_blocks":
            return self._key_blocks(loop)
        return all_slices(loop)

    def _key_blocks(self, loop: DataLoop) -> float:
        """Blocks of keys that a block of queries visits, on average.

        | keys | shape on one chip | blocks |
        |---|---|---|
        | of prompts | [B, K, P, C] | all, as prompts are full |
        | of rollouts while decoding | [B, K, M, R, C] | half: a token sees those before it |
        | of packed rollouts | [B, K, w R, C] | half of one rollout's, however many w lie in line |

        Where w = 1 and R = P, packed rollouts look like prompts and count as these: too many.
        """
        array = loop.array
        if len(array.shape) == 4 and array.length == self.prompt_tokens:
            return array.num_slices
        # On average over n blocks of queries, (1 + 2 + ... + n) / n = (n + 1) / 2.
        return (min(array.length, self.rollout_tokens) / array.size + 1) / 2


def step_programs(
    experiment: Experiment, lengths: np.ndarray | None = None
) -> Iterator[LoweredProgram]:
    """The programs of a step in the order in which they first run.

    Args:
      lengths: int [B, M] of the rollouts; None: all at their longest.
    """
    yield from _rollout_programs(experiment, lengths)
    yield from _learner_programs(experiment, lengths)


# ---- Rollouts ----


class _Call(NamedTuple):
    """Shapes of what a call of the sampler decodes from and into."""

    plan: Schedule
    wave: decoding.Batch  # of the prompts that start together
    golds: Golds  # of all prompts of the call
    pool: Pool  # that a wave starts with
    results: decoding.Results  # of all prompts of the call


def _rollout_programs(
    experiment: Experiment, lengths: np.ndarray | None
) -> Iterator[LoweredProgram]:
    """A wave's sampling and scoring, and evaluation's decoding for its memory only."""
    config, policy = experiment.config, experiment.policy
    params = experiment.abstract_params()
    weights = _results(decoding.decoding_weights, (params, policy), (params, policy))

    # ---- What lies in HBM: the optimizer's state all the time, the parameters while their copy in
    # the activations' dtype decodes.
    opt_state = bytes_per_device(experiment.abstract_state().opt_state)
    training_state = opt_state + bytes_per_device(params)

    # What is an argument of a program is in its own memory report, and not counted here again.
    call = _call(
        experiment,
        experiment.sampling,
        config.train.prompts_per_step,
        experiment.rollouts_per_prompt,
        # 0 is all, as `sampler.sample` takes it.
        experiment.prompts_at_once(config.rollout.prompts_per_wave)
        or config.train.prompts_per_step,
    )
    waves, work = call.plan.num_waves, planned_work(call.plan, _lengths(experiment, lengths))
    yield LoweredProgram("cast", decoding.decoding_weights.lower(params, policy), 1, opt_state)
    yield LoweredProgram(
        "prefill",
        decoding.prefill.lower(params, policy, call.wave.prompts, call.wave.lengths),
        waves,
        opt_state + bytes_per_device(weights),
    )
    yield LoweredProgram(
        "decode",
        _lower_decode(experiment, weights, call, experiment.sampling),
        _decode_runs(experiment, work, call.plan),
        training_state + bytes_per_device(call.results),
    )
    yield LoweredProgram(
        "score",
        decoding.score_and_store.lower(weights, policy, call.pool, call.results, call.golds),
        # After each wave, and before each move, of as many lanes as there are then.
        waves + sum(moved.old.num_lanes for moved in work.moves) / call.plan.sizes[0].num_lanes,
        training_state,
    )
    # Evaluation runs between steps and takes no time of one. It has to fit all the same.
    if config.evaluation.every:
        evaluation, sampling = config.evaluation, experiment.evaluation_sampling
        prompts = experiment.prompts_at_once(evaluation.prompts_per_batch)
        several = prompts * BATCHES_PER_CALL
        call = _call(experiment, sampling, several, evaluation.rollouts_per_prompt, prompts)
        yield LoweredProgram(
            "evaluate",
            _lower_decode(experiment, weights, call, sampling),
            0,
            training_state + bytes_per_device(call.results),
        )


def _decode_runs(experiment: Experiment, work: Work, plan: Schedule) -> float:
    """How many times what a pool at its first size reads, until its slots are spent."""
    last = min(plan.sizes[0].slots, experiment.sampling.max_length)
    first = Stretch(plan.sizes[0], 0, last)
    policy, prompt = experiment.policy, experiment.config.data.max_prompt_tokens
    itemsizes = jnp.dtype(policy.dtype).itemsize, policy.cache_itemsize
    read = lambda stretch: read_bytes(stretch, policy.config, prompt, *itemsizes)
    return sum(map(read, work.stretches)) / read(first)


def _schedule(experiment: Experiment) -> Schedule:
    """Of a training step's rollouts."""
    config = experiment.config
    prompts = config.train.prompts_per_step
    return sampler.plan_of(
        experiment.policy,
        experiment.sampling,
        prompts,
        experiment.rollouts_per_prompt,
        config.data.max_prompt_tokens,
        experiment.prompts_at_once(config.rollout.prompts_per_wave) or prompts,
    )


def _lengths(experiment: Experiment, lengths: np.ndarray | None) -> np.ndarray:
    """int [B, M]: what is given, cut at the budget; or all at it."""
    longest = experiment.sampling.max_length
    if lengths is None:
        shape = (experiment.config.train.prompts_per_step, experiment.rollouts_per_prompt)
        return np.full(shape, longest)
    return np.minimum(lengths, longest)


def _lower_decode(
    experiment: Experiment, weights: Any, call: _Call, sampling: decoding.Sampling
) -> jax.stages.Lowered:
    until = jax.ShapeDtypeStruct((), jnp.int32)
    flags = batch_placement.per_device_shape(experiment.mesh, bool)
    return decoding.decode.lower(weights, experiment.policy, call.pool, sampling, until, flags)


def _call(
    experiment: Experiment,
    sampling: decoding.Sampling,
    num_prompts: int,
    num_rollouts: int,
    prompts_in_memory: int,
) -> _Call:
    """A call that samples B prompts, of which memory has room for some at their longest."""
    config, policy, params = experiment.config, experiment.policy, experiment.abstract_params()
    prompt_tokens = config.data.max_prompt_tokens
    plan = sampler.plan_of(
        policy, sampling, num_prompts, num_rollouts, prompt_tokens, prompts_in_memory
    )
    start = plan.sizes[0]
    by_prompt = _by_prompt(experiment, start.num_blocks * plan.shards.number)
    per_rollout = by_prompt(num_rollouts)
    keys = by_prompt(num_rollouts, dtype=jax.eval_shape(lambda: jax.random.key(0)).dtype)
    wave = decoding.Batch(by_prompt(prompt_tokens), by_prompt(), keys, per_rollout)
    # Compile at 16 tokens to learn the output shardings, then reuse them for the full shapes: XLA
    # chooses them by axes, not by sizes, and small programs compile in seconds.
    short_wave = wave._replace(prompts=by_prompt(_FEW_TOKENS))
    short_sampling = dataclasses.replace(sampling, rationale_budget=_FEW_TOKENS)
    short_prefill = (params, policy, short_wave.prompts, wave.lengths)
    prefix = _results(decoding.prefill, (params, policy, wave.prompts, wave.lengths), short_prefill)
    short_prefix = _results(decoding.prefill, short_prefill, short_prefill)
    short_slots = models.whole_tiles(short_sampling.max_length)
    pool = _results(
        decoding.initial_pool,
        (policy, prefix, wave, per_rollout, sampling, start.slots),
        (policy, short_prefix, short_wave, per_rollout, short_sampling, short_slots),
    )
    results = _results(
        decoding.empty_results,
        (policy, sampling, num_prompts, num_rollouts),
        (policy, short_sampling, num_prompts, num_rollouts),
    )
    of_all = _by_prompt(experiment, num_prompts)
    golds = Golds(of_all(config.rollout.answer_reserve), of_all())
    return _Call(plan, wave, golds, pool, results)


# ---- The learner ----


def _learner_programs(
    experiment: Experiment, lengths: np.ndarray | None
) -> Iterator[LoweredProgram]:
    """The gradient of a microbatch, and the update."""
    config, estimator = experiment.config, experiment.estimator
    updates, rollouts = config.train.updates_per_batch, experiment.rollouts_per_prompt
    prompts_per_update = config.train.prompts_per_step // updates
    by_prompt = _by_prompt(experiment, prompts_per_update)
    longest, microbatch = _trajectory_slots(experiment), _microbatch(experiment)
    tokens = by_prompt(rollouts, longest)  # [B, M, R], as all that is per token
    mask = by_prompt(rollouts, longest, dtype=bool)
    log_probs = by_prompt(rollouts, longest, dtype=jnp.float32)
    per_rollout = by_prompt(rollouts, dtype=jnp.float32)
    params, state = experiment.abstract_params(), experiment.abstract_state()
    # The records that `step` hands to the learner, all rollouts at the length of the longest.
    batch = LearnerBatch(
        Prompts(by_prompt(config.data.max_prompt_tokens), by_prompt(), by_prompt(dtype=bool)),
        Trajectories(tokens, mask, mask, log_probs, mask, by_prompt(rollouts)),
        losses.Coefficients(*[per_rollout] * len(losses.Coefficients._fields)),
        log_probs if estimator.reference else None,
    )
    begun = (params, experiment.policy, batch)
    grads, needed = _results(gradient.begin, begun, begun)
    of_places = jax.ShapeDtypeStruct((1, microbatch.prompts), jnp.int32)  # one microbatch
    lowered = gradient.add_microbatches.lower(
        grads,
        *begun,
        needed,
        Blocks(*[of_places] * len(Blocks._fields)),
        objective=Objective(estimator.surrogate, experiment.sampling.temperature),
        microbatch=microbatch,
    )
    # One program per microbatch of blocks, whose packs are a loop inside of it.
    runs = _learner_work(experiment, lengths).prompt_passes / microbatch.prompts
    yield LoweredProgram("gradient", lowered, runs, bytes_per_device(state.opt_state))
    update = apply_update.lower(
        state, state.loss_state, params, optimizer=experiment.optimizer, mesh=experiment.mesh
    )
    yield LoweredProgram("update", update, updates, 0.0)


def _learner_work(experiment: Experiment, lengths: np.ndarray | None) -> LearnerWork:
    """What all updates of a step compute."""
    config = experiment.config
    # As `step.learn` splits them.
    updates = config.train.updates_per_batch
    parts = [_lengths(experiment, lengths)[index::updates] for index in range(updates)]
    work = [
        planning.planned_work(
            part,
            experiment.policy.config,
            config.data.max_prompt_tokens,
            _trajectory_slots(experiment),
            sharding.num_batch_shards(experiment.mesh),
            experiment.microbatch,
        )
        for part in parts
    ]
    return LearnerWork(*[sum(numbers) for numbers in zip(*work, strict=True)])


def _trajectory_slots(experiment: Experiment) -> int:
    """R of the longest trajectory."""
    rationale, answer = (
        experiment.sampling.max_rationale_length,
        experiment.config.rollout.answer_reserve,
    )
    return experiment.trajectory_length(rationale, answer)


def _microbatch(experiment: Experiment) -> Microbatch:
    """As `batch_gradient` narrows it."""
    num_shards = sharding.num_batch_shards(experiment.mesh)
    return experiment.microbatch.narrowed(_trajectory_slots(experiment), num_shards)


# ---- Shapes ----


def _by_prompt(experiment: Experiment, prompts: int) -> Callable[..., jax.ShapeDtypeStruct]:
    """Makes shapes [B, *rest] of arrays that are split over the mesh by prompts."""

    def shape(*rest: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (prompts, *rest), dtype, sharding=sharding.batch_sharding(experiment.mesh)
        )

    return shape


def _results(function: Any, arguments: tuple, small_arguments: tuple) -> Any:
    """Shapes of what jitted `function` returns for `arguments`, with shardings.

    The shardings are those that the compiler gives the results for `small_arguments`.
    """
    shardings = compile_lowered(function.lower(*small_arguments)).output_shardings
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        function.eval_shape(*arguments),
        shardings,
    )
