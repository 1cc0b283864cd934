"""The training loop: prompts -> rollouts -> scores -> coefficients -> gradient -> update."""

import contextlib
import functools
import json
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from qlog import data, evaluation, train_metrics
from qlog.config import schema
from qlog.config.check import build_estimator, check_config
from qlog.console import say, show_table
from qlog.errors import ConfigError, Stop, TrainingError
from qlog.experiment import Experiment, identity, prepare
from qlog.parallel import distributed, interrupts, process
from qlog.parallel.interrupts import Interrupts
from qlog.records import TrainState
from qlog.runs import checkpoints, ownership
from qlog.runs.log import RunLog, read_jsonl
from qlog.runs.profiling import profiled
from qlog.step import Stopwatch, collect, learn
from qlog.storage import paths
from qlog.storage.paths import Path

RESULTS = "results.json"


class Outcome(NamedTuple):
    """metrics: of the last evaluation; empty without one. interrupted: saved, but not finished."""

    metrics: dict[str, float]
    interrupted: bool


def run(
    config: ConfigDict, workdir: str | os.PathLike, devices: Sequence[jax.Device] | None = None
) -> Outcome:
    """Trains as `config` says, from scratch or from the latest checkpoint in `workdir`.

    Leaves behind config.json, metrics.jsonl, rollouts.jsonl, TensorBoard events, samples of every
    evaluation, checkpoints, and results.json when it finishes. SIGINT and SIGTERM give up the step
    under way, save the state as of its begin, and return.

    Args:
      workdir: a folder, or gs://BUCKET/...; all processes must see the same.

    Raises:
      ConfigError: before anything compiles.
      TrainingError: gradients stay non-finite, sampler and learner disagree.
      PassingError: another run has the workdir, or takes it over.
      Stop: a signal before the first step.
    """
    check_config(config)
    workdir = checkpoints.place(workdir, "--workdir")
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(interrupts.listening())
        stop.speaks = jax.process_index() == 0
        stack.enter_context(stop.deferred())  # to the end: closing files is not cut short either
        with stop.immediate():
            claim = stack.enter_context(ownership.claim(workdir))
            stack.enter_context(
                stop.watching(
                    config.watchdog.first_seconds, lambda: True, claim.release, is_resumable=True
                )
            )
            experiment = prepare(config, devices)
            saved = stack.enter_context(
                contextlib.closing(checkpoints.Checkpoints(workdir, keep=config.checkpoint.keep))
            )
            if (saved.latest_step or 0) > config.train.steps:
                raise ConfigError(
                    f"config.train.steps = {config.train.steps} is below step {saved.latest_step} of the "
                    "checkpoint in --workdir: raise it, or use another --workdir."
                )
            if saved.latest_step:
                _check_same_run(*saved.made_of(), config, identity(experiment))
            finished = distributed.first(lambda: _finished(workdir, config))
            if finished is not None:
                saved.prune(config.checkpoint.finished)
                say(f"finished before, in {workdir}")
                return Outcome(finished, False)
            training = _Training(experiment, workdir, claim, saved, stop, stack)
        try:
            training.loop()
        except Stop:
            training.save()
            where = (
                f"at step {training.step}, saved in {workdir}"
                if training.step
                else "before the first step"
            )
            say(f"stopped {where}: the same command resumes.")
            return Outcome(training.metrics, True)
        return training.finish()


class _Training:
    """A run under way: its state, and the phases that change it.

    Attributes:
      step: batches of prompts that `state` has learned from.
      metrics: of the last evaluation.
    """

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        claim: ownership.Claim,
        saved: checkpoints.Checkpoints,
        stop: Interrupts,
        stack: contextlib.ExitStack,
    ):
        """The state is new, or that of the latest checkpoint. Opens the log on `stack`."""
        self._experiment, self._config, self._workdir = experiment, experiment.config, workdir
        self._claim, self._saved, self._stop = claim, saved, stop
        self.step = self._start = saved.latest_step or 0
        self.metrics: dict[str, float] = {}
        self._identity = identity(experiment)
        experiment.write_split_ids(workdir / "splits.json")
        show_table("run", train_metrics.describe(experiment, workdir, self.step))
        self._reference = None
        if self.step:
            self.state: TrainState = saved.restore(experiment.abstract_state())
            say(f"resumed from step {self.step} in {workdir}")
        if not self.step or experiment.estimator.reference:
            params = experiment.init_params()
            # The update donates its state: the reference must keep buffers of its own.
            self._reference = (
                jax.tree.map(jnp.copy, params) if experiment.estimator.reference else None
            )
        if not self.step:
            self.state = experiment.init_state(params)
        if jax.process_index() == 0:
            paths.write(workdir / "config.json", schema.to_json(self._config))
        self._log = stack.enter_context(
            contextlib.closing(
                RunLog(workdir, self.step, self._config.train.steps, is_lost=lambda: claim.is_lost)
            )
        )
        self._compiled = stack.enter_context(contextlib.closing(process.Compilations()))
        self._saved_at = time.monotonic()
        self._is_finishing = False
        stack.enter_context(
            stop.watching(
                self._config.watchdog.first_seconds, self._is_saved, self._leave, is_resumable=True
            )
        )
        stop.on_beat = claim.beat

    def _is_saved(self) -> bool:
        """Whether the process may end as it is, and lose no step that is done."""
        is_kept = self.step in (self._start, self._saved.latest_step) and not self._saved.is_saving
        return is_kept and not self._is_finishing

    def _leave(self) -> None:
        """What must not be left undone when the process ends without unwinding."""
        self._log.flush()
        self._claim.release()

    def loop(self) -> None:
        """Steps until train.steps are done; raises Stop when a signal has come."""
        config = self._config
        if self.step and self._evaluates():
            self.evaluate()  # interrupted before: it goes on
        batches = data.train_batches(
            self._experiment.train_data,
            seed=config.seed,
            start_step=self.step,
            prompts_per_step=config.train.prompts_per_step,
        )
        for step, batch in batches:
            if step >= config.train.steps:
                break
            with profiled(step + 1, config.profile.steps, self._workdir):
                self._learn_from(step, batch)
            if self._is_due():
                self.save()  # first: a preempted host may have no time for the evaluation
            if self._evaluates():
                self.evaluate()
            self._claim.check()
            self._stop.check()

    def _learn_from(self, step: int, batch: data.PromptBatch) -> None:
        """One step: rollouts, gradient, update; until the update the state is as it was."""
        config, experiment, started = self._config, self._experiment, time.monotonic()
        self._claim.beat(step, "train")
        watch, compiled = Stopwatch(), self._compiled.count
        key = jax.random.fold_in(jax.random.key(config.seed), 1000 + step)
        groups = collect(
            experiment,
            self.state.params,
            batch,
            key,
            watch,
            self._stop,
            rehearse=step == self._start,
        )
        result = learn(experiment, self.state, groups, self._reference, key, watch, self._stop)
        self.state, self.step = result.state, step + 1
        values = train_metrics.measure(experiment, groups, result, watch)
        values["compilations"] = self._compiled.count - compiled
        values["steps_since_checkpoint"] = float(self.step - (self._saved.latest_step or 0))
        self._log.scalars(step, "train", values)
        self._log.progress(step, train_metrics.progress(values))
        _check_health(config, step, values)
        if step % config.train.rollouts_every == 0:
            self._log.rollouts(step, train_metrics.rollout_rows(experiment, groups, batch))
        limit = config.watchdog
        self._stop.step_done(time.monotonic() - started, limit.steps, limit.seconds)

    def _is_due(self) -> bool:
        """Whether to save now; by the first process's clock."""
        config = self._config
        if (
            self.step == config.train.steps
            or self.step % config.checkpoint.every == 0
            or self._evaluates()
        ):
            return True
        minutes = (time.monotonic() - self._saved_at) / 60
        is_late = bool(config.checkpoint.minutes) and minutes >= config.checkpoint.minutes
        return distributed.agree(is_late and jax.process_index() == 0)

    def save(self) -> None:
        """Starts saving the state, unless the newest checkpoint has it."""
        if self.step > (self._saved.latest_step or 0):
            self._claim.check()
            self._log.flush()
            text = schema.to_json(self._config)
            with self._stop.patient():  # it first waits for the save before
                self._saved.save(self.state, step=self.step, config=text, identity=self._identity)
            self._saved_at = time.monotonic()

    def _evaluates(self) -> bool:
        """Whether the state is to be evaluated, and has not been."""
        config = self._config
        due = self.step == config.train.steps or (
            config.evaluation.every and self.step % config.evaluation.every == 0
        )
        return (
            bool(self._experiment.evaluation_data and due) and self.step not in self._saved.scores
        )

    def evaluate(self) -> None:
        """Evaluates the state, of which a checkpoint is being written; Stop leaves what was done to
        the next start."""
        split, source = self._config.evaluation.split, f"step {self.step}"
        self._claim.beat(self.step, "evaluate")
        samples = self._workdir / "samples" / f"step_{self.step:06d}.jsonl"
        # Its programs are compiled by the first; and numbers are computed on one process.
        with self._stop.patient():
            self.metrics = evaluation.evaluate(
                self._experiment, self.state.params, samples, source=source, interrupts=self._stop
            )
            self._saved.wait()  # or, after a kill, scores would tell of a checkpoint that is not there
        self._claim.check()
        self._log.scalars(self.step - 1, split, self.metrics)
        self._log.flush()
        say(f"{source}: {split} " + train_metrics.brief(self._config, self.metrics))
        metric = train_metrics.best_metric(self._config)
        config = self._config.evaluation
        what = f"{metric} of {config.prompts or 'all'} questions, {split}, temperature {config.temperature}"
        self._saved.score(self.step, self.metrics[metric], what)

    def finish(self) -> Outcome:
        """Writes the results of the last evaluation; signals wait for the end."""
        config, self._is_finishing = self._config, True
        with self._stop.patient():
            self._claim.check()
            self._saved.wait()
            if (
                not self.metrics and self._experiment.evaluation_data
            ):  # evaluated by an earlier start
                find = functools.partial(
                    _evaluated, self._workdir, self.step - 1, config.evaluation.split
                )
                self.metrics = distributed.first(find)
                if train_metrics.best_metric(config) not in self.metrics:  # of other settings
                    self.evaluate()
            if jax.process_index() == 0:
                source = f"{self._workdir}, step {self.step}"
                record = evaluation.record(config, self.metrics, source, self.step)
                paths.write(self._workdir / RESULTS, record)
            self._saved.prune(config.checkpoint.finished)
        return Outcome(self.metrics, False)


def _evaluated(workdir: Path, step: int, split: str) -> dict[str, float]:
    """The metrics of an evaluation that metrics.jsonl has; {} of another."""
    for row in read_jsonl(workdir / "metrics.jsonl"):
        if (row["step"], row["phase"]) == (step, split):
            return {name: value for name, value in row.items() if name not in ("step", "phase")}
    return {}


def _finished(workdir: Path, config: ConfigDict) -> dict | None:
    """The metrics of a run that has finished with these steps; None of one that has more to do, whose
    results of fewer steps are removed: launchers take a run that has results for finished."""
    try:
        record = json.loads(paths.read(workdir / RESULTS))
    except FileNotFoundError:
        return None
    if record["step"] >= config.train.steps:
        return record["metrics"]
    paths.remove(workdir / RESULTS)
    return None


def _check_health(config: ConfigDict, step: int, values: dict[str, float]) -> None:
    if values["skipped_in_a_row"] >= config.optimizer.max_skipped_in_a_row:
        raise TrainingError(
            f"step {step}: {values['skipped_in_a_row']:.0f} gradients in a row were not finite and "
            "were skipped; look at metrics.jsonl, then lower optimizer.learning_rate."
        )
    limit = config.train.max_mismatch
    if limit and values.get("mismatch", 0.0) > limit:
        raise TrainingError(
            f"step {step}: sampler and learner disagree by {values['mismatch']:.3g} nats per token, "
            f"more than train.max_mismatch = {limit}: the run would train on wrong numbers (0 trains on)."
        )


# What may change between a run and its resumption: nothing here changes what a step computes.
_MAY_CHANGE = {"attention", "checkpoint", "evaluation", "mesh", "profile", "runs", "watchdog"}
# Where things are read; what is read is compared by content (`experiment.identity`).
_MAY_CHANGE |= {"architecture", "model", "weights"}
_MAY_CHANGE_IN = {
    "train": {
        "steps",
        "rollouts_every",
        "rollouts_prompts",
        "prompts_per_microbatch",
        "remat",
        "rollouts_per_microbatch",
        "max_mismatch",
    },
    "rollout": {"prompts_per_wave"},
    "optimizer": {"max_skipped_in_a_row"},
    "data": {"data_dir", "manual_dir"},
    "tokenizer": {"path"},
}


def _check_same_run(before: dict, made_of: dict, config: ConfigDict, makes: dict) -> None:
    """A run resumes under the config that it began with, on the same model, weights and data.

    Args:
      before, made_of: config and identity of the newest checkpoint; config, makes: of this start.
    """
    now = json.loads(schema.to_json(config))
    # Parameters come from the checkpoint; where a run began from matters to a reference alone.
    may_change = _MAY_CHANGE | (set() if build_estimator(config).reference else {"init_from"})
    for key in sorted((set(before) | set(now)) - may_change):
        old, new = before.get(key), now.get(key)
        if key in _MAY_CHANGE_IN:
            old, new = (
                {k: v for k, v in x.items() if k not in _MAY_CHANGE_IN[key]} for x in (old, new)
            )
        if old != new:
            raise ConfigError(
                f"config.{key} = {new!r} differs from the run in --workdir, which began with "
                f"{old!r}: use another --workdir, or the old value."
            )
    splits = {
        name: (old, makes["splits"].get(name, old))
        for name, old in made_of.get("splits", {}).items()
    }
    pairs = {f"split {name}": pair for name, pair in splits.items()}
    pairs |= {
        part: (made_of[part], makes[part])
        for part in ("model", "weights", "tokenizer")
        if part in made_of
    }
    for part, (old, new) in pairs.items():
        if old != new:
            raise ConfigError(
                f"--workdir: the run there has another {part} ({old or 'none'}, not {new or 'none'}): use "
                "another --workdir, or what the run began with."
            )
