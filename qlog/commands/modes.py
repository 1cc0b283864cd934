"""What `--mode` can ask for."""

import contextlib
import itertools
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence

from ml_collections import ConfigDict

from qlog import evaluation, models, train
from qlog.aot import compile_run, weak_scaling
from qlog.commands import next_steps, several_runs
from qlog.config import command_line
from qlog.config.check import check_config
from qlog.console import ProgressLine, is_live, say, show_table
from qlog.data import chat_templates
from qlog.data.tokenizers import companions
from qlog.errors import ConfigError, Stop
from qlog.experiment import Experiment, cost, prepare
from qlog.experiment.contents import check_trained_ids
from qlog.parallel import distributed, interrupts
from qlog.rollouts import lengths as rollout_lengths
from qlog.runs import checkpoint_reader
from qlog.runs import folder as names
from qlog.storage import paths
from qlog.storage.paths import Path

_SHOWN = 3  # rollouts of each prompt that --mode=sample prints


def run(
    mode: str,
    config: ConfigDict,
    workdir: str | os.PathLike,
    *,
    checkpoint: str = "best",
    from_samples: str = "",
    topology: str = "",
    lengths: str = "",
    argv: Sequence[str] = (),
) -> int:
    """Does what --mode asks for; returns the exit status.

    Args:
      mode: train, evaluate, sample, export or compile.
      checkpoint: read by evaluate, sample and export.
      from_samples: read only by evaluate.
      topology: read by compile: one slice, or several with commas to compare.
      lengths: read by compile on one slice: a NumPy file, int [B, M].
      argv: the command line, the program's name first, with the lines of --flagfile in its place
        (`command_line.with_flag_files`): for the commands that a run names when it ends, and for
        what compile writes down; () where there is none.

    Raises:
      ConfigError: flags that do not go together, or something is wrong with the config.
      TrainingError, PassingError, Stop: as `train.run` and `evaluation.evaluate` do.
    """
    workdir = paths.parse(workdir, "--workdir")
    _check_flags(mode, checkpoint, from_samples, topology)
    if lengths and (mode != "compile" or "," in topology):
        raise ConfigError(f"--lengths={lengths} is for --mode=compile on one --topology.")
    command = f"python -m qlog.main {shlex.join(argv[1:])}"
    if mode == "compile" and "," in topology:
        return weak_scaling.run(config, topology.split(","), workdir, command)
    if mode == "compile":
        of_rollouts = rollout_lengths.read(lengths) if lengths else None
        return compile_run.run_compile(config, topology, workdir, command, of_rollouts)
    if from_samples:
        return run_from_samples(config, workdir, paths.parse(from_samples, "--from_samples"))
    if mode in _READING:
        return _READING[mode](config, workdir, checkpoint)
    with _interruption_is_no_failure():
        if config.runs:
            for sentence in command_line.out_of_reach(config, argv):
                say(f"NOTE: {sentence}")
            several_runs.run(config, workdir)
        else:
            # Before training: what the command line names may be gone by the end, and nothing that
            # fails then may turn a finished run into a failed one.
            steps = next_steps.after(config, workdir, argv)
            outcome = train.start(config, workdir)
            if not outcome.interrupted:
                next_steps.tell(workdir, steps)
    return 0


def _check_flags(mode: str, checkpoint: str, from_samples: str, topology: str) -> None:
    """Raises ConfigError for a flag that the mode does not read, or one that it lacks."""
    if (mode == "compile") != bool(topology):
        raise ConfigError(
            f"--topology={topology} and --mode={mode}: --mode=compile and a topology such as "
            "v5e:4x4 need each other."
        )
    if from_samples and mode != "evaluate":
        raise ConfigError(
            f"--from_samples={from_samples} is not read by --mode={mode}: add --mode=evaluate."
        )
    if mode not in _READING and checkpoint != "best":
        raise ConfigError(
            f"--checkpoint={checkpoint} is not read by --mode={mode}: it is for "
            f"{', '.join(_READING)}; training begins from --config.init_from."
        )


@contextlib.contextmanager
def _interruption_is_no_failure() -> Iterator[None]:
    """A training that a signal stopped has saved everything: its exit status is 0."""
    try:
        yield
    except Stop as stop:
        say("stopped: the same command goes on.")
        stop.status = 0
        raise


def run_evaluate(config: ConfigDict, workdir: Path, checkpoint: str) -> int:
    """Evaluates a checkpoint on the evaluation split, prints the numbers and writes them.

    To evaluation_SPLIT.json for the best checkpoint, else to evaluation_SPLIT_CHECKPOINT.json.
    """
    path = _find(workdir, checkpoint)
    experiment = prepare(config, train=False, begins=path is None)
    if path is not None:  # the base model was trained on none of them
        check_trained_ids(experiment, workdir / "splits.json")
    # A folder without a run: what the numbers are of must be told there, too.
    distributed.once_per_run(lambda: names.write_config(workdir, config, keep=True))
    params, parameters_from, step = _load(experiment, path)
    _tell_sampling(experiment)
    split = config.evaluation.split
    name = split if checkpoint == "best" else f"{split}_{checkpoint}"
    samples = workdir / "samples" / f"{name}.jsonl"
    # Every batch is on disk as soon as it is sampled: the process may end anywhere.
    watching = config.watchdog.first_seconds, lambda: True, lambda: None
    with interrupts.listening() as stop, stop.deferred(), stop.watching(*watching):
        try:
            summary = evaluation.evaluate(
                experiment, params, samples, parameters_from=parameters_from, interrupts=stop
            )
        except Stop:
            say(f"stopped; what was sampled is in {samples}.parts: the same command goes on.")
            raise
    _report(workdir, name, evaluation.record(config, summary, parameters_from, step))
    return 0


def run_from_samples(config: ConfigDict, workdir: Path, samples: Path) -> int:
    """Computes the numbers of an earlier evaluation again, from the samples that it saved.

    Needs neither model nor data.
    """
    check_config(config)
    summary = evaluation.recompute(config, samples)
    _report(
        workdir, samples.stem, evaluation.record(config, summary, f"samples of {samples}", None)
    )
    return 0


def run_export(config: ConfigDict, workdir: Path, checkpoint: str) -> int:
    """Writes a checkpoint as a Hugging Face folder, workdir/export, in float32.

    The tokenizer's file, chat template and generation settings are copied with it.
    """
    path = _find(workdir, checkpoint)
    experiment = prepare(config, train=False, evaluate=False, begins=path is None)
    cost.check(experiment, train=False, evaluate=False)
    params, _, _ = _load(experiment, path)
    folder, tokenizer = workdir / "export", experiment.formatter.tokenizer
    copied = []
    if tokenizer.path:  # None of a synthetic task's, which `save` writes
        copied = models.huggingface.tokenizer_files(tokenizer.path.parent)
    if tokenizer.chat_template:  # `save` writes the one that prompts were written in
        copied = [file for file in copied if file.name != companions.TEMPLATE]
    distributed.once_per_run(lambda: str(tokenizer.save(folder)))
    # Other libraries take the ids at which to stop from the model's config.
    ids = {"eos_token_id": list(tokenizer.eos_ids), "pad_token_id": tokenizer.pad_id}
    if tokenizer.bos_id is not None:
        ids["bos_token_id"] = tokenizer.bos_id
    models.huggingface.export(
        params, experiment.policy.config, folder, tokenizer_files=copied, generation=ids
    )
    if config.tokenizer.chat_template == chat_templates.BUILT_IN_NAME:
        distributed.once_per_run(lambda: _drop_chat_template(folder))
        say("without a chat template: prompts were written in a built-in one, not in the model's")
    if kwargs := config.tokenizer.chat_template_kwargs.to_dict():
        say(f"prompts were written with chat_template_kwargs {kwargs}: give them to the template")
    say(f"exported to {folder}")
    say(f"  transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}) loads it", "dim")
    return 0


def _drop_chat_template(folder: Path) -> None:
    """Removes the model's own template, in which this run wrote no prompt."""
    for name in (companions.TEMPLATE, companions.PROCESSOR_TEMPLATE):
        if paths.exists(folder / name):
            paths.remove(folder / name)
    file = folder / companions.CONFIG
    if paths.exists(file):
        kept = {k: v for k, v in json.loads(paths.read(file)).items() if k != "chat_template"}
        paths.write(file, json.dumps(kept, indent=2))


def run_sample(config: ConfigDict, workdir: Path, checkpoint: str) -> int:
    """Prints prompts of the evaluation split with sampled rationales and answers."""
    path = _find(workdir, checkpoint)
    experiment = prepare(config, train=False, begins=path is None)
    params, _, _ = _load(experiment, path)
    _tell_sampling(experiment)
    line, sampling = ProgressLine(), experiment.evaluation_sampling
    line.begin(f"sampling; {_SHOWN} answers to each question are shown")
    with interrupts.listening() as stop, stop.telling(line.beat):
        batches = evaluation.sample_answers(experiment, params, sampling, interrupts=stop)
        for row in itertools.chain.from_iterable(batches):
            say(
                f"--- {row['id']}\n{row['prompt']}\n"
                f"--- gold: {row['golds'][0]}  (log P {row['log_p']:.2f})"
            )
            shown = itertools.islice(
                zip(row["rationales"], row["answers"], row["log_w"], strict=True), _SHOWN
            )
            for rationale, answer, log_w in shown:
                say(f"  [log w {log_w:.2f}] {rationale} => {answer}")
    return 0


def _tell_sampling(experiment: Experiment) -> None:
    """Says how answers are drawn, and where that is set: training's rollouts have other fields."""
    sampling, number = experiment.evaluation_sampling, experiment.config.evaluation
    say(
        f"answers: {number.rollouts_per_prompt} to each question, "
        f"temperature {sampling.temperature:g}, top_k {sampling.top_k}, top_p {sampling.top_p:g}; "
        "set by --config.evaluation.rollouts_per_prompt, temperature, top_k, top_p"
    )


def _find(workdir: Path, checkpoint: str) -> Path | None:
    """The checkpoint's folder, looked for before anything is read; None for base.

    Raises:
      ConfigError: there is none. The base model takes its place only if asked for.
    """
    if checkpoint == "base":
        return None
    try:
        return checkpoint_reader.find_checkpoint(workdir, "--workdir", checkpoint)
    except ConfigError as error:
        raise ConfigError(f"{error} The model before training is --checkpoint=base.") from None


def _load(experiment: Experiment, path: Path | None) -> tuple[models.Params, str, int | None]:
    """Parameters, what they are in words, and their step of training if it is known.

    Args:
      path: a checkpoint; None for what a run of this config begins with.

    Raises:
      ConfigError: the checkpoint is of another model.
    """
    config = experiment.config
    if path is None:
        params, step = experiment.init_params(), None
        parameters_from = f"base: {config.init_from or config.weights}"
    else:
        params = checkpoint_reader.load_params(path, experiment.abstract_params(), "--workdir")
        step, parameters_from = int(path.name) if path.name.isdigit() else None, str(path)
        _notice_other_prompts(experiment, path)
    say(f"parameters: {parameters_from}")
    return params, parameters_from, step


def _notice_other_prompts(experiment: Experiment, path: Path) -> None:
    """Says so where prompts are not written as those that the checkpoint was trained on."""
    before = distributed.once_per_run(
        lambda: checkpoint_reader.made_of(path)[1].get("tokenizer", "")
    )
    now = experiment.formatter and experiment.formatter.digest
    if before and before != now:
        say(
            "NOTE: the checkpoint was trained on prompts of another tokenizer, chat template or "
            f"data.style ({before}, not {now}); this command writes them as its config says."
        )


def _report(workdir: Path, name: str, record: str) -> None:
    """Writes evaluation_NAME.json, and prints it: a table on a terminal, else as it is."""
    file = workdir / f"evaluation_{name}.json"
    distributed.once_per_run(lambda: paths.write(file, record))
    if not is_live():
        say(record)
        return
    found = json.loads(record)
    show_table(f"{found['data']}, {found['split']}", _main_numbers(found["metrics"]))
    say(f"Of {found['source']}. All numbers, with what they are of: {file}")


def _main_numbers(metrics: dict[str, float]) -> dict[str, str]:
    """The numbers that a reader looks for, with their intervals: not those of every grader."""
    shown = {}
    for name, value in metrics.items():
        value = float(value)  # of a number that is not finite the file has the word
        plain = name.removeprefix("no_rationale/").removeprefix("metrics/")
        if "/" not in plain:
            low, high = metrics.get(f"{name}/low"), metrics.get(f"{name}/high")
            interval = (
                "" if low is None or high is None else f"   {float(low):.4g} to {float(high):.4g}"
            )
            shown[name] = f"{value:.4g}{interval}"
    return shown


# The modes that read a checkpoint
_READING: dict[str, Callable[[ConfigDict, Path, str], int]] = {
    "evaluate": run_evaluate,
    "sample": run_sample,
    "export": run_export,
}
