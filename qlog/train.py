"""The training loop: prompts -> rollouts -> scores -> coefficients -> gradient -> update."""

import contextlib
import json
import pathlib
import signal
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from qlog import config as settings
from qlog import checkpoints, data, distributed, evaluation, reporting, runtime
from qlog.errors import ConfigError
from qlog.experiment import prepare
from qlog.step import Stopwatch, collect, learn
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
    show_table("run", reporting.describe(experiment, workdir, start_step))
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
    metrics, last_evaluated, compiled = {}, -1, runtime.Compilations()
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(_stop_signals())
        for each in (compiled, log, saved):
            stack.enter_context(contextlib.closing(each))
        for step, batch in batches:
            if step >= config.train.steps:
                break
            watch, compiled_before = Stopwatch(), compiled.count
            key = jax.random.fold_in(jax.random.key(config.seed), 1000 + step)
            groups = collect(experiment, state.params, batch, key, watch, rehearse=step == start_step)
            state, sums, gauges, norms = learn(experiment, state, groups, reference, key, watch)
            values = reporting.measure(experiment, state, groups, sums, gauges, norms, watch)
            values["compilations"] = compiled.count - compiled_before
            log.scalars(step, "train", values)
            log.progress(step, reporting.progress(values))
            _check_health(config, step, values)
            if step % config.train.rollouts_every == 0:
                log.rollouts(step, reporting.rollout_rows(experiment, groups, batch))

            done = step + 1
            ends = done == config.train.steps
            if experiment.evaluation_data and (ends or done % config.evaluation.every == 0):
                samples = workdir / "samples" / f"step_{done:06d}.jsonl"
                metrics = evaluation.evaluate(experiment, state.params, samples)
                last_evaluated = done
                log.scalars(step, config.evaluation.split, metrics)
                say(f"step {done}: {config.evaluation.split} " + reporting.brief(config, metrics))
            stop = distributed.agree(stopping())  # a signal may have reached one process alone
            if ends or done % config.checkpoint.every == 0 or last_evaluated == done or stop:
                log.flush()
                score = metrics[reporting.best_metric(config)] if last_evaluated == done else None
                saved.save(state, step=done, config=settings.to_json(config), score=score)
            if stop:
                break
    interrupted = int(state.step) < config.train.steps
    if interrupted:
        say(f"stopped at step {int(state.step)}, saved in {workdir}: the same command resumes.")
    else:
        results = workdir / "results.json"
        if not metrics and results.exists():  # finished before
            metrics = json.loads(results.read_text())
        elif not metrics and experiment.evaluation_data:  # killed between checkpoint and results
            metrics = evaluation.evaluate(experiment, state.params)
        _write(workdir / "results.json", json.dumps(metrics, indent=2, sort_keys=True))
    return Outcome(metrics, interrupted)


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
