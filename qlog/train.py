"""The training loop: prompts -> rollouts -> scores -> coefficients -> gradient -> update."""

import contextlib
import functools
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from qlog import data, evaluation, train_metrics
from qlog.config import schema
from qlog.config.check import check_config, check_same_run, evaluation_scorers
from qlog.config.streams import Stream, stream_key
from qlog.console import say, show_table
from qlog.errors import ConfigError, Stop, TrainingError
from qlog.experiment import Experiment, prepare
from qlog.experiment.contents import (
    BEGUN_FROM,
    begun_from,
    check_same_parts,
    check_same_reference,
    identity,
)
from qlog.grading.scorers import ScorerError
from qlog.parallel import distributed, interrupts, process
from qlog.parallel.interrupts import Interrupts
from qlog.records import Groups, TrainState
from qlog.runs import checkpoint_reader, checkpoints, ownership, resumption
from qlog.runs import folder as names
from qlog.runs.folder import FINAL, RESULTS
from qlog.runs.log import RunLog
from qlog.runs.profiling import profiled
from qlog.step import StepResult, Stopwatch, collect, learn
from qlog.storage import paths
from qlog.storage.paths import Path


class Outcome(NamedTuple):
    """How a start of a run ended."""

    metrics: dict[str, float]  # of the last evaluation; {} without one
    interrupted: bool  # a signal came: what was done is saved, and there is more to do


@contextlib.contextmanager
def claimed(config: ConfigDict, workdir: str | os.PathLike) -> Iterator[ownership.Claim]:
    """While inside, `workdir` belongs to this run, and a standstill of the process ends it.

    Enter it before `prepare`, as the commands do. A second start is then refused before it
    downloads anything, and a download that hangs is noticed. A signal raises Stop where the
    process stands: until `run` begins, nothing has been done that could be lost.

    Args:
      workdir: a folder, or gs://BUCKET/...; all processes must see the same.

    Raises:
      ConfigError: the config is wrong, or the workdir cannot be used.
      PassingError: another run has the workdir.
    """
    check_config(config)
    workdir = checkpoint_reader.place(workdir, "--workdir")
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(interrupts.listening())
        stop.speaks = jax.process_index() == 0
        stack.enter_context(stop.deferred())  # to the end: giving the workdir back is not cut short
        with stop.immediate():
            distributed.once_per_run(lambda: names.check_kinds(workdir))
            claim = stack.enter_context(ownership.claim(workdir))
            limit = config.watchdog.first_seconds
            stack.enter_context(
                stop.watching(limit, lambda: True, claim.release, is_resumable=True)
            )
            yield claim


def start(
    config: ConfigDict,
    workdir: str | os.PathLike,
    devices: Sequence[Any] | None = None,
) -> Outcome:
    """`run` of what `prepare` makes of a config. Every process must call it.

    Args:
      devices: the mesh's; None takes all.

    Raises:
      ConfigError, TrainingError, PassingError, Stop: as `prepare` and `run` do.
    """
    # Claimed first: a second start is refused before it downloads anything.
    with claimed(config, workdir) as claim:
        begins = not checkpoint_reader.has_steps(workdir)
        return run(prepare(config, devices, begins=begins), workdir, claim)


def run(
    experiment: Experiment, workdir: str | os.PathLike, claim: ownership.Claim | None = None
) -> Outcome:
    """Trains, from scratch or from the newest checkpoint in `workdir`.

    Leaves behind config.json, metrics.jsonl, rollouts.jsonl, TensorBoard events, samples of every
    evaluation, checkpoints, and when it finishes final.json (with `evaluation.final`) and, last,
    results.json. SIGINT, SIGTERM and SIGHUP give up the step
    under way, save the state as it was before that step, and return.

    Args:
      experiment: what `prepare` returned, or the same with parts of your own:
        `dataclasses.replace(prepare(config), train_data=mine)`.
      workdir: a folder, or gs://BUCKET/...; all processes must see the same.
      claim: what `claimed` yielded, of a caller that has entered it; None enters it here.

    Raises:
      ValueError: the experiment has nothing to train on, or `claim` is of another folder.
      ConfigError: before anything compiles: the run in `workdir` is another one.
      TrainingError: gradients stay non-finite, or sampler and learner disagree.
      PassingError: another run has the workdir, or takes it over.
      Stop: a signal came before the first step.
    """
    config = experiment.config
    workdir = checkpoint_reader.place(workdir, "--workdir")
    if experiment.train_data is None:
        raise ValueError("experiment.train_data is None: `prepare(config)` opens it.")
    if claim is not None and claim.workdir != workdir:
        raise ValueError(f"claim is of {claim.workdir}, not of {workdir}: claim what is run in.")
    with contextlib.ExitStack() as stack:
        # ---- The workdir is ours; from here on signals wait for what they would spoil ----
        claim = claim or stack.enter_context(claimed(config, workdir))
        stop = stack.enter_context(interrupts.listening())
        stack.enter_context(stop.deferred())  # to the end: closing files is not cut short either

        # ---- The state: a new one, or that of the newest checkpoint ----
        with stop.immediate():  # no step is done yet
            saved = stack.enter_context(
                contextlib.closing(checkpoints.Checkpoints(workdir, keep=config.checkpoint.keep))
            )
            made_of = identity(experiment) | {BEGUN_FROM: begun_from(experiment)}
            _check_resumption(saved, config, made_of, experiment.estimator.reference)
            metrics = distributed.once_per_run(lambda: resumption.finished_metrics(workdir, config))
            if metrics is not None:
                saved.prune(config.checkpoint.finished)
                distributed.once_per_run(lambda: names.write_config(workdir, config, keep=True))
                say(f"finished before, in {workdir}")
                return Outcome(metrics, False)
            if not saved.latest_step:
                distributed.once_per_run(lambda: resumption.check_nothing_is_lost(workdir))
            training = _Training(experiment, made_of, workdir, claim, saved, stop, stack)

        # ---- Steps ----
        try:
            if training.step and training.evaluation_is_due():
                training.evaluate()  # an earlier start was stopped before it was done
            for step, batch in training.batches():
                started, watch = time.monotonic(), Stopwatch()
                claim.beat(step, "train")
                # A step draws from a key of its own, so a resumed run draws as an unbroken one.
                key = stream_key(config.seed, Stream.TRAIN, step)
                with profiled(step + 1, config.profile.steps, workdir):
                    # Either of the two raises Stop when a signal has come; the state is then
                    # still that before the step. (`learn` waits for its results, so that the
                    # host is idle for milliseconds of a step that takes seconds.)
                    groups = collect(
                        experiment,
                        training.state.params,
                        batch,
                        key,
                        watch,
                        stop,
                        rehearse=step == training.start,
                    )
                    result = learn(
                        experiment,
                        training.state,
                        groups,
                        training.reference,
                        key,
                        watch,
                        stop,
                        with_terms=_is_each(step, config.train.terms_every),
                    )
                    training.state, training.step = result.state, step + 1
                    training.log_step(batch, groups, result, watch)
                    del groups, result  # or they would lie in memory next to the next step's
                limit = config.watchdog
                stop.step_done(time.monotonic() - started, limit.steps, limit.seconds)
                saved.check()  # before more is computed that could not be saved
                if training.save_is_due():
                    training.save()  # first: a preempted host may have no time to evaluate
                if training.evaluation_is_due():
                    training.evaluate()
                claim.check()
                stop.check()

            # ---- All steps are done ----
            training.find_metrics()
            if experiment.final_data is not None:
                training.evaluate_best()
        except ScorerError:
            # Nothing is wrong with the state: the same command goes on when the function is mended.
            training.save()
            raise
        except Stop:
            # ---- Interrupted: the same command goes on from here ----
            training.save()
            training.log.interrupted()
            where = "before the first step"
            if training.step:
                where = f"at step {training.step}, saved in {workdir}"
            say(f"stopped {where}: the same command resumes.")
            return Outcome(training.metrics, True)

        # ---- Finished ----
        return training.finish()


class _Training:
    """A run under way: its state, and what happens to it besides the steps themselves.

    Attributes:
      state: parameters, and all else that a step changes.
      step: batches of prompts that `state` has learned from.
      start: `step` when this start of the run began.
      reference: parameters that the loss compares with; None where it has no reference.
      metrics: of the last evaluation; {} before the first.
      log: what the run writes next to its checkpoints.
    """

    def __init__(
        self,
        experiment: Experiment,
        made_of: dict[str, Any],
        workdir: Path,
        claim: ownership.Claim,
        saved: checkpoints.Checkpoints,
        stop: Interrupts,
        stack: contextlib.ExitStack,
    ):
        """Makes or restores the state, and opens the log.

        Args:
          made_of: `identity(experiment)` and what it began from, which checkpoints keep.
          stack: closes what is opened here.
        """
        self._experiment, self._config = experiment, experiment.config
        self._made_of, self._workdir = made_of, workdir
        self._claim, self._saved, self._stop = claim, saved, stop
        self.step = self.start = saved.latest_step or 0
        self.metrics: dict[str, float] = {}
        experiment.write_split_ids(workdir / "splits.json")
        show_table("run", train_metrics.describe(experiment, workdir, self.step))

        # ---- State and reference ----
        self.reference = None
        abstract = experiment.abstract_state()
        state_bytes = _num_bytes(abstract)
        needed = names.room_needed(self._config, state_bytes, saved.num_kept)
        distributed.once_per_run(lambda: names.notice_room(workdir, needed))
        if self.step:
            self.state: TrainState = saved.restore(abstract)
            self.step = self.start = saved.latest_step or 0  # an earlier one, of a damaged one
            say(f"resumed from step {self.step} in {workdir}")
        if not self.step or experiment.estimator.reference:
            params = experiment.init_params()
            if experiment.estimator.reference:
                # An update takes over the buffers of its state: the reference needs others.
                self.reference = jax.tree.map(jnp.copy, params)
            if not self.step:
                self.state = experiment.init_state(params)

        # ---- Log and watchdog ----
        if jax.process_index() == 0:
            # Of fewer steps. Launchers take a run that has results for finished.
            paths.remove(workdir / RESULTS)
            if saved.latest_step != self._config.train.steps:
                paths.remove(workdir / FINAL)
            names.write_config(workdir, self._config)
        self.log = stack.enter_context(
            RunLog(workdir, self.step, self._config, is_lost=lambda: claim.is_lost)
        )
        stack.enter_context(stop.telling(self.log.doing))
        self._compilations = stack.enter_context(contextlib.closing(process.Compilations()))
        self._num_compiled = self._compilations.num_compiled
        self._saved_at = time.monotonic()
        self._is_finishing = False
        limit = self._config.watchdog.first_seconds
        stack.enter_context(stop.watching(limit, self._is_saved, self._leave, is_resumable=True))
        stop.on_beat = claim.beat

    def _is_saved(self) -> bool:
        """Whether the process may end where it stands without losing a step that is done."""
        is_kept = self.step in (self.start, self._saved.latest_step) and not self._saved.is_saving
        return is_kept and not self._is_finishing

    def _leave(self) -> None:
        """What must not be left undone when the process ends without unwinding."""
        self.log.flush()
        self._claim.release()

    def batches(self) -> Iterator[tuple[int, data.PromptBatch]]:
        """(step from 0, its prompts) of the steps that are left."""
        config, train_data = self._config, self._experiment.train_data
        assert train_data is not None, "training needs experiment.train_data"
        batches = data.train_batches(
            train_data,
            seed=config.seed,
            start_step=self.step,
            prompts_per_step=config.train.prompts_per_step,
        )
        for step, batch in batches:
            if step >= config.train.steps:
                return
            if step == self.start:
                self.log.begins(step)
            # Here, so that it does not count with the step what an evaluation compiled.
            self._num_compiled = self._compilations.num_compiled
            yield step, batch

    def log_step(
        self, batch: data.PromptBatch, groups: Groups, result: StepResult, watch: Stopwatch
    ) -> None:
        """Writes the metrics of the step that was just done, and now and then its rollouts.

        Raises:
          TrainingError: going on would be a waste.
        """
        step = self.step - 1
        values = train_metrics.measure(self._experiment, groups, result, watch)
        values["compilations"] = self._compilations.num_compiled - self._num_compiled
        values["steps_since_checkpoint"] = float(self.step - (self._saved.latest_step or 0))
        self.log.scalars(step, "train", values)
        self.log.progress(step, train_metrics.progress(values))
        _check_health(self._config, step, values)
        if step % self._config.train.rollouts_every == 0:
            self.log.rollouts(
                step,
                train_metrics.rollout_rows(self._experiment, groups, result.coefficients, batch),
            )

    def save_is_due(self) -> bool:
        """Whether to save now: after so many steps or minutes, and before an evaluation."""
        config = self._config
        if due(self.step, config.checkpoint.every, config.train.steps) or self.evaluation_is_due():
            return True
        # Clocks differ, and a save needs every process: the first one's clock counts.
        minutes = (time.monotonic() - self._saved_at) / 60
        is_late = bool(config.checkpoint.minutes) and minutes >= config.checkpoint.minutes
        return distributed.any_process(is_late and jax.process_index() == 0)

    def save(self) -> None:
        """Starts saving the state, unless the newest checkpoint has it."""
        if self.step <= (self._saved.latest_step or 0):
            return
        self._claim.check()
        self.log.flush()  # so that metrics never end before the checkpoint that follows them
        text = schema.to_json(self._config)
        with self._stop.patient():  # it first waits for the save before
            self._saved.save(self.state, step=self.step, config=text, identity=self._made_of)
        self._saved_at = time.monotonic()

    def evaluation_is_due(self) -> bool:
        """Whether the state is to be evaluated, and has not been."""
        config = self._config
        return (
            self._experiment.evaluation_data is not None
            and due(self.step, config.evaluation.every, config.train.steps)
            and self.step not in self._saved.scores
        )

    def evaluate(self) -> None:
        """Evaluates the state, of which a checkpoint is being written, and scores the checkpoint.

        Raises:
          Stop: a signal came; the next start goes on after the batches that were sampled.
        """
        config = self._config.evaluation
        split, parameters_from = config.split, f"step {self.step}"
        self._claim.beat(self.step, "evaluate")
        samples = self._workdir / "samples" / f"step_{self.step:06d}.jsonl"
        # Patient: the first evaluation compiles programs, and grading is the first process's work.
        with self._stop.patient():
            self.metrics = evaluation.evaluate(
                self._experiment,
                self.state.params,
                samples,
                parameters_from=parameters_from,
                interrupts=self._stop,
            )
            # A kill after the score and before the checkpoint would leave a score of nothing.
            self._saved.wait()
        self._claim.check()
        self.log.scalars(self.step - 1, split, self.metrics)
        self.log.flush()
        say(f"{parameters_from}: {split} " + train_metrics.brief(self._config, self.metrics))
        metric = train_metrics.best_metric(self._config)
        # Scores under other settings do not compare: their description tells them apart.
        what = (
            f"{metric} of {config.prompts or 'all'} questions, {split}, "
            f"temperature {config.temperature}, {evaluation_scorers(self._config)[0].name}"
        )
        self._saved.score(self.step, self.metrics[metric], what)

    def find_metrics(self) -> None:
        """Finds `metrics` where an earlier start evaluated the last step, and ended after that.

        Raises:
          Stop: as `evaluate`.
        """
        if self.metrics or self._experiment.evaluation_data is None:
            return
        split = self._config.evaluation.split
        find = functools.partial(resumption.logged_metrics, self._workdir, self.step - 1, split)
        self.metrics = distributed.once_per_run(find)
        if train_metrics.best_metric(self._config) not in self.metrics:  # of other settings
            self.evaluate()

    def evaluate_best(self) -> None:
        """Evaluates the best checkpoint on the split `evaluation.final`, into final.json.

        Once it is there, a later start of the run takes it as it is. The state is given up: its
        memory may be needed for the checkpoint's parameters.

        Raises:
          Stop: a signal came; the next start goes on after the batches that were sampled.
        """
        experiment = self._experiment.of_final()
        config, file = experiment.config, self._workdir / FINAL
        with self._stop.patient():
            self._claim.check()
            self._saved.wait()
            step = self._saved.best_step
            parameters_from = f"{self._workdir}, step {step}"
            about = functools.partial(
                evaluation.record, config, parameters_from=parameters_from, step=step
            )
            if distributed.once_per_run(lambda: resumption.is_written(file, about(metrics={}))):
                return
            # ---- Parameters: those at hand, or the checkpoint's in their place ----
            self._claim.beat(self.step, "final")
            params = self.state.params
            if step != self.step:
                del params, self.state, self.reference
                folder = self._workdir / "checkpoints" / str(step)
                params = checkpoint_reader.load_params(
                    folder, experiment.abstract_params(), "--workdir"
                )
            # ---- Numbers ----
            metrics = evaluation.evaluate(
                experiment,
                params,
                self._workdir / "samples" / "final.jsonl",
                parameters_from=parameters_from,
                interrupts=self._stop,
            )
        self._claim.check()
        if jax.process_index() == 0:
            paths.write(file, about(metrics=metrics))
        split = config.evaluation.split
        say(f"best, step {step}: {split} {train_metrics.brief(config, metrics)}")

    def finish(self) -> Outcome:
        """Writes the results of the last evaluation. Signals wait for the end."""
        config, self._is_finishing = self._config, True
        with self._stop.patient():
            self._claim.check()
            self._saved.wait()
            if jax.process_index() == 0:
                parameters_from = f"{self._workdir}, step {self.step}"
                record = evaluation.record(config, self.metrics, parameters_from, self.step)
                paths.write(self._workdir / RESULTS, record)
            self._saved.prune(config.checkpoint.finished)
        return Outcome(self.metrics, False)


def due(step: int, every: int, last: int) -> bool:
    """Whether what happens every `every` steps happens after `step` of them.

    Args:
      every: 0 for the last step only.
      last: the step at which it always happens.
    """
    return step == last or (every > 0 and step % every == 0)


def _is_each(step: int, every: int) -> bool:
    """Whether what happens at step 0 and every `every` steps from it happens at `step`."""
    return every > 0 and step % every == 0


def _check_resumption(
    saved: checkpoints.Checkpoints,
    config: ConfigDict,
    made_of: dict[str, Any],
    has_reference: bool,
) -> None:
    """Raises ConfigError unless the newest checkpoint, if any, is one of this very run.

    Args:
      made_of: of this start; gets what the run began from when it began.
      has_reference: whether the loss compares with what the run began from.
    """
    if not saved.latest_step:
        return
    if saved.latest_step > config.train.steps:
        raise ConfigError(
            f"config.train.steps = {config.train.steps} is below step {saved.latest_step} of the "
            "checkpoint in --workdir: raise it, or use another --workdir."
        )
    config_before, made_of_before = saved.made_of()
    before = made_of_before.get(BEGUN_FROM)
    check_same_run(config_before, config, knows_reference=before is not None)
    check_same_parts(made_of_before, made_of)
    if has_reference:
        check_same_reference(before, made_of[BEGUN_FROM], config)
    made_of[BEGUN_FROM] = before  # what it is now changes nothing any more


def _num_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree of shapes, each counted once."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _check_health(config: ConfigDict, step: int, values: dict[str, float]) -> None:
    """Raises TrainingError where going on would be a waste, before anything is saved."""
    if not math.isfinite(values["param_norm"]):
        raise TrainingError(
            f"step {step}: the norm of the parameters is {values['param_norm']}, and they are not "
            "saved: the last checkpoint is of an earlier step; lower optimizer.learning_rate "
            f"({config.optimizer.learning_rate:g}) and train in another --workdir."
        )
    if values["skipped_in_a_row"] >= config.optimizer.max_skipped_in_a_row:
        raise TrainingError(
            f"step {step}: {values['skipped_in_a_row']:.0f} gradients in a row were not finite and "
            "were skipped; look at metrics.jsonl, then lower optimizer.learning_rate."
        )
    limit = config.train.max_mismatch
    if limit and values.get("mismatch", 0.0) > limit:
        cache = config.rollout.cache
        by_rounding = (
            f", or takes another --workdir and rollout.cache=auto, since {cache} caches round"
            if cache != "auto"
            else ""
        )
        raise TrainingError(
            f"step {step}: sampler and learner disagree by {values['mismatch']:.3g} nats per "
            f"token, more than train.max_mismatch = {limit}: the run would train on wrong numbers "
            f"(0 trains on{by_rounding})."
        )
