"""What `--mode` can ask for."""

import itertools
import os
import shlex
import sys

from ml_collections import ConfigDict

from qlog import evaluation, models, train
from qlog.aot import compile_run, weak_scaling
from qlog.commands import several_runs
from qlog.config.check import check_config
from qlog.console import say
from qlog.errors import ConfigError, Stop
from qlog.experiment import Experiment, prepare
from qlog.parallel import distributed, interrupts
from qlog.runs import checkpoints
from qlog.storage import paths
from qlog.storage.paths import Path

_SHOWN = 3  # rollouts of each prompt that --mode=sample prints


def run_train(config: ConfigDict, workdir: Path) -> int:
    """Trains, one run or a sweep. An interruption that saved everything is no failure."""
    try:
        if config.runs:
            several_runs.run(config, workdir)
        else:
            with train.claimed(config, workdir) as claim:
                train.run(prepare(config), workdir, claim)
    except Stop as stop:
        say("stopped: the same command goes on.")
        stop.status = 0
        raise
    return 0


def run_evaluate(config: ConfigDict, workdir: Path, checkpoint: str) -> int:
    """Evaluates a checkpoint on the evaluation split; prints and writes the numbers, to
    evaluation_SPLIT.json or, of another checkpoint than the best, evaluation_SPLIT_CHECKPOINT.json."""
    path = _find(workdir, checkpoint)
    experiment = prepare(config, train=False)
    params, source, step = _load(experiment, path)
    split, draws = config.evaluation.split, experiment.evaluation_sampling
    say(f"answers: temperature {draws.temperature}, top_k {draws.top_k}, top_p {draws.top_p}")
    name = split if checkpoint == "best" else f"{split}_{checkpoint}"
    samples = workdir / "samples" / f"{name}.jsonl"
    watching = config.watchdog.first_seconds, lambda: True, lambda: None
    with interrupts.listening() as stop, stop.deferred(), stop.watching(*watching):
        try:
            summary = evaluation.evaluate(
                experiment, params, samples, source=source, interrupts=stop
            )
        except Stop:
            say(f"stopped; what was sampled is in {samples}.parts: the same command goes on.")
            raise
    _report(workdir, name, evaluation.record(config, summary, source, step))
    return 0


def run_from_samples(config: ConfigDict, workdir: Path, samples: Path) -> int:
    """The numbers of an earlier evaluation from the samples it saved; no model, no data."""
    check_config(config)
    summary = evaluation.recompute(config, samples)
    _report(
        workdir, samples.stem, evaluation.record(config, summary, f"samples of {samples}", None)
    )
    return 0


def run_export(config: ConfigDict, workdir: Path, checkpoint: str) -> int:
    """Writes a checkpoint as a Hugging Face folder, workdir/export, in float32.

    The tokenizer's file and what lies beside it (chat template, generation settings) go along.
    """
    path = _find(workdir, checkpoint)
    experiment = prepare(config, train=False, evaluate=False)
    params, _, _ = _load(experiment, path)
    folder, tokenizer = workdir / "export", experiment.formatter.tokenizer
    carried = []
    if tokenizer.path:
        carried = models.huggingface.tokenizer_files(tokenizer.path.parent)
    distributed.once_per_run(lambda: str(tokenizer.save(folder)))
    ids = {"eos_token_id": list(tokenizer.eos_ids), "pad_token_id": tokenizer.pad_id}
    if tokenizer.bos_id is not None:
        ids["bos_token_id"] = tokenizer.bos_id
    models.huggingface.export(
        params, experiment.policy.config, folder, tokenizer_files=carried, generation=ids
    )
    say(f"exported to {folder}")
    return 0


def run_sample(config: ConfigDict, workdir: Path, checkpoint: str) -> int:
    """Prints prompts of the evaluation split with sampled rationales and answers."""
    path = _find(workdir, checkpoint)
    experiment = prepare(config, train=False)
    params, _, _ = _load(experiment, path)
    batches = evaluation.sample_answers(experiment, params, experiment.evaluation_sampling)
    for row in itertools.chain.from_iterable(batches):
        say(
            f"--- {row['id']}\n{row['source']}\n--- gold: {row['golds'][0]}  (log P {row['log_p']:.2f})"
        )
        shown = itertools.islice(
            zip(row["rationales"], row["answers"], row["log_w"], strict=True), _SHOWN
        )
        for rationale, answer, log_w in shown:
            say(f"  [log w {log_w:.2f}] {rationale} => {answer}")
    return 0


def _find(workdir: Path, checkpoint: str) -> Path | None:
    """The checkpoint's folder, looked for before anything is read; None for base.

    Raises:
      ConfigError: none there; the base model never takes its place unasked.
    """
    if checkpoint == "base":
        return None
    try:
        return checkpoints.find_checkpoint(workdir, "--workdir", checkpoint)
    except ConfigError as error:
        raise ConfigError(f"{error} The model before training is --checkpoint=base.") from None


def _load(experiment: Experiment, path: Path | None) -> tuple[models.Params, str, int | None]:
    """Parameters, what they are in words, and their step.

    Args:
      path: a checkpoint; None for what a run of this config begins with.
    """
    config = experiment.config
    if path is None:
        params, step, source = (
            experiment.init_params(),
            None,
            f"base: {config.init_from or config.weights}",
        )
    else:
        params = checkpoints.load_params(path, experiment.abstract_params(), "--workdir")
        step, source = int(path.name) if path.name.isdigit() else None, str(path)
    say(f"parameters: {source}")
    return params, source, step


def _report(workdir: Path, name: str, record: str) -> None:
    """Prints the numbers and writes evaluation_NAME.json."""
    distributed.once_per_run(lambda: paths.write(workdir / f"evaluation_{name}.json", record))
    say(record)


def run(
    mode: str,
    config: ConfigDict,
    workdir: str | os.PathLike,
    *,
    checkpoint: str = "best",
    from_samples: str = "",
    topology: str = "",
) -> int:
    """What --mode asks for; returns the exit status.

    Args:
      checkpoint: read by evaluate, sample and export.
      from_samples: read by evaluate alone.
      topology: by compile: one slice, or several after commas to compare.
    """
    workdir = paths.parse(workdir, "--workdir")
    if (mode == "compile") != bool(topology):
        raise ConfigError(
            f"--topology={topology} and --mode={mode}: --mode=compile and a topology such as v5e:4x4 "
            "need each other."
        )
    if from_samples and mode != "evaluate":
        raise ConfigError(
            f"--from_samples={from_samples} is not read by --mode={mode}: add --mode=evaluate."
        )
    if mode not in _READING and checkpoint != "best":
        raise ConfigError(
            f"--checkpoint={checkpoint} is not read by --mode={mode}: it is for {', '.join(_READING)}; "
            "training begins from --config.init_from."
        )
    command = f"python -m qlog.main {shlex.join(sys.argv[1:])}"
    if mode == "compile" and "," in topology:
        return weak_scaling.run(config, topology.split(","), workdir, command)
    if mode == "compile":
        return compile_run.run_compile(config, topology, workdir, command)
    if from_samples:
        return run_from_samples(config, workdir, paths.parse(from_samples, "--from_samples"))
    if mode == "train":
        return run_train(config, workdir)
    return _READING[mode](config, workdir, checkpoint)


_READING = {"evaluate": run_evaluate, "sample": run_sample, "export": run_export}
