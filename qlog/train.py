"""The training loop: prompts -> rollouts -> scores -> coefficients -> gradient -> update."""

import contextlib
import functools
import json
import pathlib
import signal
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from qlog import config as settings
from qlog import (
    checkpoints, data, distributed, evaluation, learner, losses, models, sampling, scoring, sharding,
)  # fmt: skip
from qlog.data.pipeline import bucket
from qlog.errors import ConfigError
from qlog.experiment import Experiment, prepare
from qlog.telemetry import RunLog, say, show_table


class Outcome(NamedTuple):
    """metrics: of the last evaluation; empty without one. interrupted: saved, but not finished."""

    metrics: dict[str, float]
    interrupted: bool


def run(
    config: ConfigDict, workdir: str | pathlib.Path, devices: Sequence[jax.Device] | None = None
) -> Outcome:
    """Trains as `config` says, from scratch or from the latest checkpoint in `workdir`.

    Leaves behind config.json, metrics.jsonl, rollouts.jsonl, TensorBoard events, samples of every
    evaluation, checkpoints, and results.json when it finishes. SIGINT and SIGTERM save and return.

    Raises:
      ConfigError: before anything compiles.
      RuntimeError: the run went wrong: gradients stay non-finite, sampler and learner disagree.
    """
    experiment = prepare(config, devices)
    workdir = pathlib.Path(workdir)

    # ---- State: new, or the latest checkpoint ----
    saved = checkpoints.Checkpoints(_writable(workdir) / "checkpoints", keep=config.checkpoint.keep)
    start_step = saved.latest_step or 0
    if start_step:
        _check_same_run(saved.config(), config)
    experiment.write_split_ids(workdir / "splits.json")
    show_table("run", describe(experiment, workdir, start_step))
    state = experiment.init_state(experiment.init_params())
    reference = state.params if experiment.estimator.reference else None
    if start_step:
        # The update donates its state: the reference must keep buffers of its own.
        state = saved.restore(checkpoints.abstract_like(state))
        say(f"resumed from step {start_step} in {workdir}")
    elif reference is not None:
        reference = jax.tree.map(jnp.copy, reference)
    _write(workdir / "config.json", settings.to_json(config))

    # ---- Train loop ----
    log = RunLog(workdir, start_step, config.train.steps)
    batches = data.train_batches(
        experiment.train_data, seed=config.seed, prompts_per_step=config.train.prompts_per_step,
        start_step=start_step, process_index=jax.process_index(),
        process_count=jax.process_count(),
    )  # fmt: skip
    metrics, last_evaluated = {}, -1
    with _stop_signals() as stopping, contextlib.closing(log), contextlib.closing(saved):
        for step, batch in batches:
            if step >= config.train.steps:
                break
            watch = Stopwatch()
            key = jax.random.fold_in(jax.random.key(config.seed), 1000 + step)
            groups = collect(experiment, state.params, batch, key, watch)
            state, sums, gauges, norms = learn(experiment, state, groups, reference, key, watch)
            values = _host(_measure(experiment, state, groups, sums, gauges, norms, watch))
            log.scalars(step, "train", values)
            log.progress(step, _progress(values))
            _check_health(config, step, values)
            if step % config.train.rollouts_every == 0:
                log.rollouts(step, _rollout_rows(experiment, groups, batch))

            done = step + 1
            ends = done == config.train.steps
            if experiment.evaluation_data and (ends or done % config.evaluation.every == 0):
                samples = workdir / "samples" / f"step_{done:06d}.jsonl"
                metrics = evaluation.evaluate(experiment, state.params, samples)
                last_evaluated = done
                log.scalars(step, config.evaluation.split, metrics)
                say(f"step {done}: {config.evaluation.split} " + brief(config, metrics))
            stop = distributed.agree(stopping())  # a signal may have reached one process alone
            if ends or done % config.checkpoint.every == 0 or last_evaluated == done or stop:
                log.flush()
                score = metrics[best_metric(config)] if last_evaluated == done else None
                saved.save(state, step=done, config=settings.to_json(config), score=score)
            if stop:
                break
    interrupted = int(state.step) < config.train.steps
    if interrupted:
        say(f"stopped at step {int(state.step)}, saved in {workdir}: the same command resumes.")
    else:
        if not metrics and experiment.evaluation_data:  # finished before: resumed at the end
            metrics = json.loads((workdir / "results.json").read_text())
        _write(workdir / "results.json", json.dumps(metrics, indent=2, sort_keys=True))
    return Outcome(metrics, interrupted)


class Groups(NamedTuple):
    """A batch of groups as sampled and scored; arrays are global, B prompts by M rollouts."""

    prompts: learner.Prompts
    gold: Array  # int32 [B, A]
    gold_lengths: Array  # int32 [B]
    rollouts: sampling.Rollouts
    log_w: Array  # float32 [B, M]
    reward: Array  # float32 [B, M]


def collect(
    experiment: Experiment, params: models.Params, batch: data.PromptBatch, key: Array, watch: "Stopwatch"
) -> Groups:
    """Rollouts of a batch of prompts, their log w and rewards; annotated ones as they come."""
    put = functools.partial(sharding.put_batch, experiment.mesh)
    prompts = learner.Prompts(*put((batch.tokens, batch.lengths, batch.is_prompt)))
    gold, gold_lengths = put((batch.gold, batch.gold_lengths))
    if experiment.estimator.rationale == "annotated":
        rollouts = learner.annotated(*put((batch.rationale, batch.rationale_lengths)))
        none = jnp.zeros(rollouts.lengths.shape)
        return Groups(prompts, gold, gold_lengths, rollouts, none, none)
    with watch("decode") as ready:
        keys = sampling.rollout_keys(key, put(batch.uids), experiment.rollouts_per_prompt)
        rollouts, prefix, suffix = ready(
            sampling.sample(
                params, experiment.policy, prompts.tokens, prompts.lengths, keys, experiment.sampling
            )
        )
    with watch("score") as ready:
        log_w = ready(
            scoring.score_answers(
                params, experiment.policy, prefix, suffix, rollouts.tokens,
                rollouts.rationale_lengths, gold, gold_lengths,
            )
        )  # fmt: skip
    reward = jnp.zeros_like(log_w)
    if experiment.estimator.reward:
        with watch("reward"):
            reward = put(_rewards(experiment, rollouts, batch))
    return Groups(prompts, gold, gold_lengths, rollouts, log_w, reward)


def learn(experiment, state: learner.TrainState, groups: Groups, reference, key: Array, watch):
    """Coefficients, gradient and update; returns the new state, sums, gauges and norms."""
    config, estimator = experiment.config, experiment.estimator
    rows = config.train.prompts_per_step // config.train.updates_per_batch
    microbatch = (
        config.train.prompts_per_microbatch or rows,
        config.train.rollouts_per_microbatch or experiment.rollouts_per_prompt,
    )
    gradient = functools.partial(
        learner.gradient, surrogate=estimator.surrogate,
        temperature=experiment.sampling.temperature, microbatch=microbatch,
    )  # fmt: skip
    with watch("train") as ready:
        trajectories = _trajectories(experiment, groups)
        coefficients, loss_state = _coefficients(
            estimator.transform, groups, trajectories, state.loss_state, jax.random.fold_in(key, 1)
        )
        total = None
        for index in range(config.train.updates_per_batch):
            prompts, slice_, coefficient = _prompts_slice(
                (groups.prompts, trajectories, coefficients), index, config.train.updates_per_batch
            )
            reference_log_probs = None
            if reference is not None:
                reference_log_probs = learner.reference_log_probs(
                    reference, experiment.policy, prompts, slice_, experiment.sampling.temperature
                )
            grads, sums, gauges = gradient(
                state.params, experiment.policy, prompts, slice_, coefficient, reference_log_probs
            )
            state, norms = learner.update(
                state, loss_state, grads, prompts.is_prompt.sum(),
                optimizer=experiment.optimizer, mesh=experiment.mesh,
            )  # fmt: skip
            gauges_total = gauges if total is None else total[1].merge(gauges)
            total = (sums if total is None else jax.tree.map(jnp.add, total[0], sums), gauges_total)
        state = ready(state._replace(step=state.step + 1))
    return state, *total, norms


@functools.partial(jax.jit, static_argnames=("transform",))
def _coefficients(transform, groups: Groups, trajectories, loss_state, key):
    scores = losses.Scores(
        log_w=groups.log_w,
        reward=groups.reward,
        valid=jnp.broadcast_to(groups.prompts.is_prompt[:, None], groups.log_w.shape),
        num_tokens=(trajectories.rationale_mask | trajectories.answer_mask).sum(-1, dtype=jnp.int32),
    )
    return losses.coefficients(transform, scores, loss_state, key=key)


def _trajectories(experiment: Experiment, groups: Groups) -> learner.Trajectories:
    rollouts = groups.rollouts
    with_gold = experiment.estimator.answer == "gold"
    lengths = rollouts.lengths
    if with_gold:
        lengths = rollouts.rationale_lengths + groups.gold_lengths[:, None]
    longest = rollouts.tokens.shape[-1] + (groups.gold.shape[-1] if with_gold else 0)
    length = bucket(int(lengths.max()), longest)
    if with_gold:
        return learner.with_gold_answer(rollouts, groups.gold, groups.gold_lengths, length)
    return learner.with_sampled_answer(rollouts, length)


@functools.partial(jax.jit, static_argnames=("index", "count"))
def _prompts_slice(tree, index: int, count: int):
    """Every count-th prompt from `index` on: each device keeps its share of every slice."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:])[:, index], tree)


def _rewards(experiment: Experiment, rollouts: sampling.Rollouts, batch: data.PromptBatch):
    """Exact match of the sampled answers, float32 [B, M], of this process's prompts."""
    local = sharding.local_rows(experiment.mesh, rollouts)
    reward = np.zeros(local.lengths.shape, np.float32)
    for row, example in enumerate(batch.examples):
        golds = (example.answer, *example.aliases)
        for column, (_, answer) in enumerate(evaluation.rollout_texts(experiment.formatter, local, row)):
            reward[row, column] = experiment.grader(answer, golds)
    return reward


# ---- What a step reports ----


class Stopwatch:
    """Seconds by phase; a phase ends when what it computed is ready."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield jax.block_until_ready
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def _measure(experiment, state, groups: Groups, sums, gauges, norms, watch: Stopwatch) -> dict:
    rollouts, prompts = groups.rollouts, groups.prompts
    values = {"loss": sums.loss / prompts.is_prompt.sum(), **norms}
    values |= losses.measurements(state.loss_state) | losses.token_measurements(sums)
    train_tokens = prompts.lengths.sum() + sums.tokens
    tokens = {"train": train_tokens}
    if experiment.estimator.rationale == "sampled":
        sampled = jnp.maximum(gauges.sampled, 1.0)
        log_m = jnp.log(groups.log_w.shape[1])
        values |= {
            "log_p": (jax.nn.logsumexp(groups.log_w, axis=1) - log_m).mean(),
            "rationale_length": rollouts.rationale_lengths.mean(),
            "budget_hits": rollouts.forced.mean(),
            "ended_early": rollouts.ended_early.mean(),
            "mismatch": gauges.mismatch / sampled,
            "mismatch_max": gauges.mismatch_max,
            "mult_prob_error": gauges.mismatch_exp / sampled,
        }
        if experiment.estimator.reward:
            values |= {"reward": groups.reward.mean(), "truncated_answers": 1 - rollouts.complete.mean()}
        tokens["decode"] = prompts.lengths.sum() + rollouts.lengths.sum()
        tokens["score"] = groups.gold_lengths.sum() * groups.log_w.shape[1]
    for phase, seconds in watch.seconds.items():
        values[f"seconds/{phase}"] = seconds
        if phase in tokens:
            values[f"tokens_per_s/{phase}"] = tokens[phase] / seconds
    return values


def _host(values: dict) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(values).items()}


def _progress(values: dict[str, float]) -> str:
    words = [f"loss {values['loss']:.3g}"]
    for name, label in (("log_p", "log P"), ("effective_reward", "effective reward"), ("reward", "reward")):
        if name in values:
            words.append(f"{label} {values[name]:.3g}")
    speeds = [
        f"{name.split('/')[1]} {value:,.0f}"
        for name, value in values.items() if name.startswith("tokens_per_s/")
    ]  # fmt: skip
    return "  ".join(words) + f"  [tokens/s: {', '.join(speeds)}]"


def _check_health(config: ConfigDict, step: int, values: dict[str, float]) -> None:
    if values["skipped_in_a_row"] >= config.optimizer.max_skipped_in_a_row:
        raise RuntimeError(
            f"step {step}: {values['skipped_in_a_row']:.0f} gradients in a row were not finite and "
            "were skipped; look at metrics.jsonl, then lower optimizer.learning_rate."
        )
    limit = config.train.max_mismatch
    if limit and values.get("mismatch", 0.0) > limit:
        raise RuntimeError(
            f"step {step}: sampler and learner disagree by {values['mismatch']:.3g} nats per token, "
            f"more than train.max_mismatch = {limit}."
        )


def _rollout_rows(experiment: Experiment, groups: Groups, batch: data.PromptBatch):
    if experiment.estimator.rationale == "annotated":
        return
    local = sharding.local_rows(
        experiment.mesh, groups._replace(prompts=(), gold=(), gold_lengths=())
    )
    for row in range(min(experiment.config.train.rollouts_prompts, len(batch.examples))):
        prompt = batch.tokens[row, : batch.lengths[row]].tolist()
        texts = evaluation.rollout_texts(experiment.formatter, local.rollouts, row)
        for column, (rationale, answer) in enumerate(texts):
            yield {
                "id": batch.examples[row].id,
                "prompt": experiment.formatter.tokenizer.decode(prompt, show_control=True),
                "rollout": column,
                "rationale": rationale,
                "answer": answer,
                "gold": batch.examples[row].answer,
                "log_w": float(local.log_w[row, column]),
                "reward": float(local.reward[row, column]),
                "forced": bool(local.rollouts.forced[row, column]),
            }


def best_metric(config: ConfigDict) -> str:
    """The evaluation metric that chooses the best checkpoint: the majority vote."""
    return f"m@{config.evaluation.rollouts_per_prompt}"


def brief(config: ConfigDict, metrics: dict[str, float]) -> str:
    count = config.evaluation.rollouts_per_prompt
    names = ("p@1", f"p@{count}", f"m@{count}", "log_p")
    return "  ".join(f"{name} {metrics[name]:.3f}" for name in names)


def describe(experiment: Experiment, workdir: pathlib.Path, start_step: int) -> dict[str, object]:
    """The rows of the table that opens a run."""
    config, shape = experiment.config, experiment.policy.config
    count = sum(leaf.size for leaf in jax.tree.leaves(experiment.abstract_params()))
    loss = dict(config.loss)
    name = loss.pop("name")
    if isinstance(name, str):  # what differs from the recipe's defaults, and q always
        usual = losses.arguments(name)
        loss = {k: v for k, v in loss.items() if k == "q" or v != usual[k]}
    rows = config.train.prompts_per_step
    devices = experiment.mesh.devices
    return {
        "model": f"{config.model}: {shape.num_layers} layers, width {shape.width}, "
        f"vocabulary {shape.vocab_size:,}, {config.dtype}",
        "parameters": f"{count:,} from {config.init_from or config.weights}",
        "devices": f"{devices.size} x {devices.flat[0].device_kind}, {jax.process_count()} process(es)",
        "mesh": ", ".join(f"{axis} {size}" for axis, size in experiment.mesh.shape.items()),
        "data": f"{config.data.name}, {config.data.style}, {len(experiment.train_data):,} prompts"
        + "".join(f", {n} skipped over {field}" for field, n in experiment.train_data.skipped.items()),
        "prompts per step": f"{rows} in {config.train.updates_per_batch} update(s)",
        "rollouts per prompt (M)": f"{experiment.rollouts_per_prompt}: "
        f"{rows * experiment.rollouts_per_prompt} rollouts per step",
        "budgets": f"prompt {config.data.max_prompt_tokens}, rationale "
        f"{config.rollout.rationale_budget}, answer {config.rollout.answer_reserve} tokens",
        "estimator": f"{name if isinstance(name, str) else name.__qualname__}("
        + ", ".join(f"{k}={v}" for k, v in loss.items()) + ")",
        "steps": f"{config.train.steps}" + (f", resuming at {start_step}" if start_step else ""),
        "workdir": workdir,
    }  # fmt: skip


# ---- Files and signals ----


def _writable(workdir: pathlib.Path) -> pathlib.Path:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".write_test_{jax.process_index()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--workdir={workdir} cannot be written: {error.strerror}.") from None
    return workdir


def _write(path: pathlib.Path, text: str) -> None:
    """Whole or not at all; process 0 alone."""
    if jax.process_index() == 0:
        fresh = path.with_name(path.name + ".tmp")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)


# What may change between a run and its resumption: nothing here changes what a step computes.
_MAY_CHANGE = {"evaluation", "checkpoint", "mesh", "runs"}
_MAY_CHANGE_IN_TRAIN = {
    "steps", "rollouts_every", "rollouts_prompts", "prompts_per_microbatch", "remat",
    "rollouts_per_microbatch", "max_mismatch",
}  # fmt: skip


def _check_same_run(before: dict, config: ConfigDict) -> None:
    """A run resumes under the config that it began with."""
    now = json.loads(settings.to_json(config))
    for key in sorted(set(before) | set(now)):
        if key in _MAY_CHANGE:
            continue
        old, new = before.get(key), now.get(key)
        if key == "train":
            old, new = ({k: v for k, v in x.items() if k not in _MAY_CHANGE_IN_TRAIN} for x in (old, new))
        if old != new:
            raise ConfigError(
                f"config.{key} = {new!r} differs from the run in --workdir, which began with "
                f"{old!r}: use another --workdir, or the old value."
            )


@contextlib.contextmanager
def _stop_signals():
    """While inside, SIGINT and SIGTERM only ask: the yielded function says whether one came.

    A second signal raises KeyboardInterrupt at once.
    """
    received = []

    def receive(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)
        say(f"{signal.Signals(number).name}: finishing this step and saving; again to stop at once")

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, receive)
    except ValueError:  # not the main thread: signals are somebody else's business
        pass
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: set outside Python
