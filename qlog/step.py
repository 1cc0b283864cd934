"""One step: `collect` samples and scores rollouts of a batch of prompts, `learn` updates from them.

`train.py` calls the two in turn. What travels between them are `records.Groups`.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qlog import data, losses, models
from qlog.config.streams import StepStream
from qlog.console import ProgressLine
from qlog.experiment import Experiment
from qlog.grading.scorers import LARGEST, Failures, Sample, ScorerError
from qlog.learner.forward import reference_log_probs
from qlog.learner.gradient import batch_gradient, merge
from qlog.learner.optimizer import apply_update
from qlog.learner.terms import measure_terms
from qlog.learner.trajectories import annotated, with_gold_answer, with_sampled_answer
from qlog.learner.types import LearnerBatch, Objective, StepSums, TermNorms, UpdateMetrics
from qlog.parallel import batch_placement, distributed, process
from qlog.parallel.interrupts import Interrupts
from qlog.records import Golds, Groups, Prompts, Rollouts, TrainState, Trajectories
from qlog.rollouts import sampler
from qlog.rollouts.text import rollout_texts

_Tree = TypeVar("_Tree")


class StepResult(NamedTuple):
    """What `learn` makes of a batch of groups."""

    state: TrainState  # after all updates of the step
    sums: StepSums  # over the whole batch; the mismatch is that of the first update
    update: UpdateMetrics  # of the last update
    coefficients: losses.Coefficients  # [B, M], of the whole batch
    terms: TermNorms | None = None  # of the first update's gradient; None: they were not asked for


class Stopwatch:
    """Seconds of a step by phase.

    JAX returns before the devices are done. So a phase waits for its results with the function
    that `with watch(phase) as ready` gives it. Else its seconds would count for the next phase.

    Attributes:
      seconds: by name of the phase, in the order of their beginnings.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[Callable[[_Tree], _Tree]]:
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
    """Rollouts of a batch of prompts, their log w and rewards; annotated rationales as they come.

    Args:
      batch: host arrays, on every process those of all B prompts.
      key: of this step. A rollout's random numbers depend only on it, its prompt and its number.
      watch: gets the seconds of the phases `decode` and `reward`.
      interrupts: looked at while decoding.
      rehearse: compile what later batches may need and this one does not.

    Raises:
      Stop: a signal came.
      ScorerError: a scorer of the reward fails too often, or the reward is one that the loss
        cannot take.
    """
    config, estimator = experiment.config, experiment.estimator
    # ---- Prompts and gold answers to the devices, split over prompts.
    put = functools.partial(batch_placement.put_batch, experiment.mesh)
    prompts = Prompts(*put((batch.tokens, batch.lengths, batch.is_prompt)))
    golds = Golds(*put((batch.gold, batch.gold_lengths)))
    if estimator.rationale == "annotated":
        rollouts = annotated(*put((batch.rationale, batch.rationale_lengths)))
        none = jnp.zeros(rollouts.lengths.shape)
        return Groups(
            prompts=prompts,
            golds=golds,
            rollouts=rollouts,
            log_w=none,
            reward=none,
            reward_parts={},
            lane_steps=0,
        )
    # ---- Rollouts, and log w: the gold answer is scored on the caches that decoding leaves.
    with watch("decode") as ready:
        keys = sampler.rollout_keys(key, put(batch.uids), experiment.rollouts_per_prompt)
        rollouts, log_w, lane_steps, gold_log_probs = ready(
            sampler.sample(
                params,
                experiment.policy,
                prompts.tokens,
                prompts.lengths,
                keys,
                golds,
                experiment.sampling,
                experiment.prompts_at_once(config.rollout.prompts_per_wave),
                rehearse,
                interrupts,
            )
        )
    # ---- Rewards, for losses that ask for them: answers are scored as text, on the host.
    reward, parts = jnp.zeros_like(log_w), {}
    if estimator.reward:
        assert experiment.reward, "an experiment of shapes has no rollouts"
        with watch("reward"):
            scores = _rewards(experiment, rollouts, batch, interrupts)
            reward, parts = put((_summed(experiment, scores), scores))
    return Groups(
        prompts=prompts,
        golds=golds,
        rollouts=rollouts,
        log_w=log_w,
        reward=reward,
        reward_parts=parts,
        lane_steps=lane_steps,
        gold_log_probs=gold_log_probs,
    )


def learn(
    experiment: Experiment,
    state: TrainState,
    groups: Groups,
    reference: models.Params | None,
    key: Array,
    watch: Stopwatch,
    interrupts: Interrupts | None = None,
    with_terms: bool = False,
) -> StepResult:
    """Coefficients of the whole batch, then a gradient and an update per part of its prompts.

    Args:
      state: donated by the first update.
      reference: parameters of the KL penalty's reference policy; None: the loss has no penalty.
      key: for losses that draw random numbers.
      watch: gets the seconds of the phase `train`.
      interrupts: looked at before each program of the gradient.
      with_terms: measure the gradient's two terms apart, which costs a second backward pass.

    Raises:
      Stop: a signal came before the first update; `state` is as it was.
    """
    config, estimator = experiment.config, experiment.estimator
    objective = Objective(estimator.surrogate, experiment.sampling.temperature)
    num_updates = config.train.updates_per_batch
    with watch("train") as ready:
        if interrupts:
            interrupts.beat(doing="learning")
        # ---- Coefficients: constants for what follows, computed before any update.
        trajectories = _trajectories(experiment, groups)
        loss_key = jax.random.fold_in(key, StepStream.LOSS)
        coefficients, loss_state = _coefficients(
            estimator, groups, trajectories, state.loss_state, loss_key
        )
        whole = LearnerBatch(groups.prompts, trajectories, coefficients)
        # ---- Updates: one for each part of the prompts.
        sums, terms = [], None
        for index in range(num_updates):
            batch = batch_placement.every_nth(whole, index, num_updates)
            if reference is not None:
                batch = batch._replace(
                    reference=reference_log_probs(
                        reference,
                        experiment.policy,
                        batch.prompts,
                        batch.trajectories,
                        objective.temperature,
                        experiment.microbatch,
                    )
                )
            grads, slice_sums = batch_gradient(
                state.params,
                experiment.policy,
                batch,
                objective,
                experiment.microbatch,
                # A signal before the first update gives the step up. Later the step goes on to its
                # end: the update has taken the buffers of `state`, and nothing can be given up.
                before_each=_sign_of_life(interrupts, may_stop=index == 0),
            )
            if with_terms and index == 0:
                terms = measure_terms(
                    state.params,
                    experiment.policy,
                    batch,
                    objective,
                    experiment.microbatch,
                    grads,
                    before_each=_sign_of_life(interrupts, may_stop=True),  # nothing is updated yet
                )
            state, update = apply_update(
                state, loss_state, grads, optimizer=experiment.optimizer, mesh=experiment.mesh
            )
            sums.append(slice_sums)
        state = ready(state._replace(step=state.step + 1))
    process.release_memory()
    # The mismatch is that of the first update: the parameters of later ones are not the sampler's.
    total = functools.reduce(merge, sums)._replace(mismatch=sums[0].mismatch)
    return StepResult(state, total, update, coefficients, terms)


def _sign_of_life(interrupts: Interrupts | None, may_stop: bool) -> Callable[[], None] | None:
    """What is called before each program of the gradient.

    Args:
      may_stop: whether a signal ends the step there.
    """
    if not interrupts:
        return None
    return functools.partial(interrupts.check if may_stop else interrupts.beat, doing="learning")


@functools.partial(jax.jit, static_argnames=("estimator",))
def _coefficients(
    estimator: losses.Estimator,
    groups: Groups,
    trajectories: Trajectories,
    loss_state: Any,
    key: Array,
) -> tuple[losses.Coefficients, Any]:
    gold_mask = None
    if groups.gold_log_probs is not None:
        slots = jnp.arange(groups.gold_log_probs.shape[-1])
        gold_mask = slots < groups.golds.lengths[:, None, None]  # [B, 1, A]
        gold_mask = jnp.broadcast_to(gold_mask, groups.gold_log_probs.shape)
    scores = losses.Scores(
        log_w=groups.log_w,
        reward=groups.reward,
        valid=jnp.broadcast_to(groups.prompts.is_prompt[:, None], groups.log_w.shape),
        num_tokens=(trajectories.rationale_mask | trajectories.answer_mask).sum(
            -1, dtype=jnp.int32
        ),
        gold_log_probs=groups.gold_log_probs,
        gold_mask=gold_mask,
    )
    return losses.coefficients(estimator.transform, estimator.measured(scores), loss_state, key=key)


def _trajectories(experiment: Experiment, groups: Groups) -> Trajectories:
    rollouts, answer = groups.rollouts, groups.golds.tokens.shape[-1]
    length = experiment.trajectory_length(rollouts.tokens.shape[-1], answer)
    if experiment.estimator.answer != "gold":
        return with_sampled_answer(rollouts, length)
    return with_gold_answer(rollouts, groups.golds, length)


class _Stopped(Exception):
    """A signal came while scoring: the rest is not scored."""


def _rewards(
    experiment: Experiment,
    rollouts: Rollouts,
    batch: data.PromptBatch,
    interrupts: Interrupts | None,
) -> dict[str, np.ndarray]:
    """What each scorer of the reward says of the sampled answers: float32 [B, M] by its name.

    The same on every process, though each scores only the prompts that it owns: a function may say
    something else when it is called again, and processes that share a tensor group must agree.

    Raises:
      ScorerError: a scorer fails too often; on every process.
      Stop: a signal came to one of them.
    """
    mesh, num_prompts = experiment.mesh, len(batch.examples)
    panel = experiment.reward
    assert panel, "an experiment of shapes has no rollouts"
    # `local` has the prompts of this process only, so a prompt has an index there and another one,
    # `b`, in the batch.
    local = batch_placement.local_batch(mesh, rollouts)
    owned = set(batch_placement.owned_prompts(mesh, num_prompts).tolist())
    held = batch_placement.local_prompts(mesh, num_prompts).tolist()
    places = {b: index for index, b in enumerate(held) if b in owned}
    samples = [
        sample
        for b, index in places.items()
        for sample in _samples(experiment, local, index, batch, b)
    ]
    line, is_stopped = ProgressLine(after=1.0), False

    def done(number: int) -> None:
        if interrupts:
            interrupts.beat()  # slow scorers are no standstill
            if interrupts.asked:
                raise _Stopped
        line.show(f"scoring rollouts: {number}/{len(samples)}", number / max(len(samples), 1))

    try:
        found = panel.score(samples, done)
    except _Stopped:
        found, is_stopped = panel.score((), done), True
    # ---- All prompts to all processes, and the failures of all ----
    num_rollouts = experiment.rollouts_per_prompt
    values = {
        name: scores.reshape(-1, num_rollouts).tolist() for name, scores in found.values.items()
    }
    mine = {
        "prompts": [] if is_stopped else list(places),
        "values": values,
        "failures": found.failures,
        "is_stopped": is_stopped,
    }
    # Patient: another process may score for long yet, and this one gives no sign of life meanwhile.
    with interrupts.patient() if interrupts else contextlib.nullcontext():
        everyone = distributed.gather([mine])
    if interrupts and any(its["is_stopped"] for its in everyone):
        interrupts.beat(any_asked=True)
    parts = {name: np.zeros((num_prompts, num_rollouts), np.float32) for name in values}
    for its in everyone:
        if not its["prompts"]:
            continue  # it owns none
        for name, part in parts.items():
            part[its["prompts"]] = its["values"][name]
        # Each process counts the failures of all, so that they stop together.
        failures = {name: Failures(*failed) for name, failed in its["failures"].items()}
        panel.count(len(its["prompts"]) * num_rollouts, failures)
    return parts


def _summed(experiment: Experiment, scores: dict[str, np.ndarray]) -> np.ndarray:
    """The reward, float32 [B, M], from the scores of its parts.

    Raises:
      ScorerError: a negative one, for a loss that reads it as a weight; a huge one.
    """
    assert experiment.reward, "an experiment of shapes has no rollouts"
    reward = experiment.reward.total(scores).astype(np.float32)
    if experiment.estimator.is_reward_weight and (reward < 0).any():
        raise ScorerError(
            f"config.rollout.reward gave {reward.min():.3g}: this loss takes the reward for a "
            "weight of the answer, which is not negative; shift the reward, or use a loss that "
            "takes its differences (grpo, rloo)."
        )
    if not (abs(reward) <= LARGEST).all():
        raise ScorerError(
            f"config.rollout.reward gave {abs(reward).max():.3g}, more than {LARGEST:g}: lower its "
            "weights."
        )
    return reward


def _samples(
    experiment: Experiment, rollouts: Rollouts, index: int, batch: data.PromptBatch, b: int
) -> Iterator[Sample]:
    """The M sampled answers of a prompt, as scorers take them.

    Args:
      rollouts: numpy arrays [b, M, ...].
      index: of the prompt in them.
      b: of the prompt in the batch.
    """
    formatter, example = experiment.formatter, batch.examples[b]
    assert formatter, "an experiment of shapes has no rollouts"
    ids = batch.tokens[b, : batch.lengths[b]].tolist()
    prompt = formatter.tokenizer.decode(ids, show_control=True)
    golds = (example.answer, *example.aliases)
    for rationale, answer in rollout_texts(formatter, rollouts, index):
        yield Sample(prompt, rationale, answer, golds, example.source, example)
