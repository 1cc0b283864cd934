"""One step: rollouts of a batch of prompts, their scores, the estimator's coefficients, the update."""

import contextlib
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qlog import data, losses, models
from qlog.config.streams import StepStream
from qlog.experiment import Experiment
from qlog.learner.gradient import batch_gradient, reference_log_probs
from qlog.learner.optimizer import apply_update
from qlog.learner.trajectories import annotated, with_gold_answer, with_sampled_answer
from qlog.parallel import process, sharding
from qlog.parallel.interrupts import Interrupts
from qlog.records import Golds, Groups, Prompts, Rollouts, TrainState, Trajectories
from qlog.rollouts import sampler
from qlog.rollouts.text import rollout_texts


class Stopwatch:
    """Seconds by phase; a phase ends when what it computed is ready."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield jax.block_until_ready
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def collect(
    experiment: Experiment,
    params: models.Params,
    batch: data.PromptBatch,
    key: Array,
    watch: Stopwatch,
    interrupts: Interrupts | None = None,
    rehearse: bool = False,
) -> Groups:
    """Rollouts of a batch of prompts, their log w and rewards; annotated ones as they come.

    Args:
      interrupts: looked at while decoding.
      rehearse: compile what later batches may need and this one does not.

    Raises:
      Stop: a signal came.
    """
    put = functools.partial(sharding.put_batch, experiment.mesh)
    prompts = Prompts(*put((batch.tokens, batch.lengths, batch.is_prompt)))
    gold, gold_lengths = put((batch.gold, batch.gold_lengths))
    if experiment.estimator.rationale == "annotated":
        rollouts = annotated(*put((batch.rationale, batch.rationale_lengths)))
        none = jnp.zeros(rollouts.lengths.shape)
        return Groups(prompts, gold, gold_lengths, rollouts, none, none, 0)
    with watch("decode") as ready:
        keys = sampler.rollout_keys(key, put(batch.uids), experiment.rollouts_per_prompt)
        rollouts, log_w, row_steps = ready(
            sampler.sample(
                params,
                experiment.policy,
                prompts.tokens,
                prompts.lengths,
                keys,
                Golds(gold, gold_lengths),
                experiment.sampling,
                experiment.prompts_at_once(experiment.config.rollout.prompts_per_wave),
                rehearse,
                interrupts,
            )
        )
    reward = jnp.zeros_like(log_w)
    if experiment.estimator.reward:
        with watch("reward"):
            reward = put(_rewards(experiment, rollouts, batch))
    return Groups(prompts, gold, gold_lengths, rollouts, log_w, reward, row_steps)


def learn(
    experiment: Experiment,
    state: TrainState,
    groups: Groups,
    reference,
    key: Array,
    watch: Stopwatch,
    interrupts: Interrupts | None = None,
):
    """Coefficients, gradient and update; returns the new state, sums, gauges and norms.

    Raises:
      Stop: a signal came before the first update; `state` is as it was.
    """
    config, estimator = experiment.config, experiment.estimator
    microbatch = experiment.microbatch
    gradient = functools.partial(
        batch_gradient,
        surrogate=estimator.surrogate,
        temperature=experiment.sampling.temperature,
        microbatch=microbatch,
    )
    with watch("train") as ready:
        trajectories = _trajectories(experiment, groups)
        loss_key = jax.random.fold_in(key, StepStream.LOSS)
        coefficients, loss_state = _coefficients(
            estimator, groups, trajectories, state.loss_state, loss_key
        )
        total = None
        for index in range(config.train.updates_per_batch):
            prompts, slice_, coefficient = _prompts_slice(
                (groups.prompts, trajectories, coefficients), index, config.train.updates_per_batch
            )
            reference_values = None
            if reference is not None:
                reference_values = reference_log_probs(
                    reference,
                    experiment.policy,
                    prompts,
                    slice_,
                    experiment.sampling.temperature,
                    microbatch,
                )
            grads, sums, gauges = gradient(
                state.params,
                experiment.policy,
                prompts,
                slice_,
                coefficient,
                reference_values,
                # After an update nothing can be given up: it takes the state's buffers.
                before_each=interrupts and (interrupts.beat if index else interrupts.check),
            )
            state, norms = apply_update(
                state, loss_state, grads, optimizer=experiment.optimizer, mesh=experiment.mesh
            )
            if total is None:
                total = sums, gauges
            else:  # later updates' log-probabilities differ from the sampler's by right
                total = jax.tree.map(jnp.add, total[0], sums), total[1]
        state = ready(state._replace(step=state.step + 1))
    process.release_memory()
    return state, *total, norms


@functools.partial(jax.jit, static_argnames=("estimator",))
def _coefficients(estimator: losses.Estimator, groups: Groups, trajectories, loss_state, key):
    # What was not measured is left out, so that a part that reads it is an error and not a zero.
    scores = losses.Scores(
        log_w=groups.log_w if estimator.rationale == "sampled" else None,
        reward=groups.reward if estimator.reward else None,
        valid=jnp.broadcast_to(groups.prompts.is_prompt[:, None], groups.log_w.shape),
        num_tokens=(trajectories.rationale_mask | trajectories.answer_mask).sum(
            -1, dtype=jnp.int32
        ),
    )
    return losses.coefficients(estimator.transform, scores, loss_state, key=key)


def trajectory_length(experiment: Experiment, rationale: int, answer: int) -> int:
    """Slots of a trajectory: the most there can be, so that one program serves all steps.

    Args:
      rationale: slots of the batch's rationales, which bound annotated ones.
      answer: slots of its gold answers.
    """
    estimator, settings = experiment.estimator, experiment.sampling
    if estimator.answer != "gold":
        return models.whole_tiles(settings.max_length)
    longest = settings.max_rationale_length if estimator.rationale == "sampled" else rationale
    return models.whole_tiles(longest + answer)


def _trajectories(experiment: Experiment, groups: Groups) -> Trajectories:
    rollouts, answer = groups.rollouts, groups.gold.shape[-1]
    length = trajectory_length(experiment, rollouts.tokens.shape[-1], answer)
    if experiment.estimator.answer != "gold":
        return with_sampled_answer(rollouts, length)
    return with_gold_answer(rollouts, groups.gold, groups.gold_lengths, length)


@functools.partial(jax.jit, static_argnames=("index", "count"))
def _prompts_slice(tree, index: int, count: int):
    """Every count-th prompt from `index` on: each device keeps its share of every slice."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:])[:, index], tree)


def _rewards(experiment: Experiment, rollouts: Rollouts, batch: data.PromptBatch):
    """Exact match of the sampled answers, float32 [B, M], in the rows that this process holds."""
    mesh, size = experiment.mesh, len(batch.examples)
    local = sharding.local_batch(mesh, rollouts)
    reward = np.zeros((size, experiment.rollouts_per_prompt), np.float32)
    for index, row in enumerate(sharding.local_prompts(mesh, size)):
        example = batch.examples[row]
        golds = (example.answer, *example.aliases)
        for column, (_, answer) in enumerate(rollout_texts(experiment.formatter, local, index)):
            reward[row, column] = experiment.grader(answer, golds)
    return reward
