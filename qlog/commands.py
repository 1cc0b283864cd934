"""What `--mode` can ask for."""

import json
import pathlib
import shlex
import sys

import jax
from ml_collections import ConfigDict

from qlog import aot, checkpoints, evaluation, models, scaling, sweep, train
from qlog import config as settings
from qlog.errors import ConfigError
from qlog.experiment import Experiment, prepare
from qlog.telemetry import say

_SHOWN = 3  # rollouts of each prompt that --mode=sample prints


def run_train(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Trains, one run or a sweep. An interruption that saved everything is no failure."""
    if config.runs:
        sweep.run(config, workdir)
    else:
        train.run(config, workdir)
    return 0


def run_evaluate(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Evaluates what `_load` finds on the evaluation split; prints and writes the numbers."""
    experiment = prepare(config, train=False)
    params = _load(experiment, workdir)
    split, law = config.evaluation.split, experiment.evaluation_sampling
    say(f"answers: temperature {law.temperature}, top_k {law.top_k}, top_p {law.top_p}")
    summary = evaluation.evaluate(experiment, params, workdir / "samples" / f"{split}.jsonl")
    _report(workdir, split, summary)
    return 0


def run_from_samples(config: ConfigDict, workdir: pathlib.Path, samples: pathlib.Path) -> int:
    """The numbers of an earlier evaluation from the samples it saved; no model, no data."""
    settings.check(config)
    _report(workdir, samples.stem, evaluation.recompute(config, samples))
    return 0


def run_export(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Writes what `_load` finds as a Hugging Face folder, workdir/export, in float32.

    The tokenizer's file and what lies beside it (chat template, generation settings) go along.
    """
    experiment = prepare(config, train=False, evaluate=False)
    if config.weights == "random" and not config.init_from and not _is_trained(workdir):
        raise ConfigError(
            f"--workdir={workdir} holds no checkpoints to export, and neither config.init_from nor "
            "config.weights names any parameters: give one of the three."
        )
    folder, tokenizer = workdir / "export", experiment.formatter.tokenizer
    params = _load(experiment, workdir)
    carried = []
    if tokenizer.path:
        carried = models.huggingface.tokenizer_files(tokenizer.path.parent)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        file = tokenizer.save(folder)
        file.rename(file.with_stem("tokenizer"))  # where transformers looks for it
    ids = {"eos_token_id": list(tokenizer.eos_ids), "pad_token_id": tokenizer.pad_id}
    if tokenizer.bos_id is not None:
        ids["bos_token_id"] = tokenizer.bos_id
    models.huggingface.export(
        params, experiment.policy.config, folder, tokenizer_files=carried, generation=ids
    )
    say(f"exported to {folder}")
    return 0


def run_sample(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Prints prompts of the evaluation split with sampled rationales and answers."""
    experiment = prepare(config, train=False)
    params = _load(experiment, workdir)
    for row in evaluation.sample_answers(experiment, params, experiment.evaluation_sampling):
        say(f"--- {row['id']}\n{row['source']}\n--- gold: {row['golds'][0]}  (log P {row['log_p']:.2f})")
        for rationale, answer, log_w in list(zip(row["rationales"], row["answers"], row["log_w"]))[:_SHOWN]:
            say(f"  [log w {log_w:.2f}] {rationale} => {answer}")
    return 0


def _load(experiment: Experiment, workdir: pathlib.Path) -> models.Params:
    """The best checkpoint of the workdir; without one, or where config.init_from is not what that
    run itself began from, the parameters that a run of this config would begin with."""
    config = experiment.config
    if _is_trained(workdir):
        began_from = json.loads((workdir / "config.json").read_text(encoding="utf-8"))["init_from"]
        if config.init_from in ("", began_from):
            say(f"parameters: the best checkpoint of {workdir}")
            return checkpoints.load_params(workdir, experiment.abstract_params(), "--workdir")
    say(f"parameters: {config.init_from or config.weights}")
    return experiment.init_params()


def _is_trained(workdir: pathlib.Path) -> bool:
    return (workdir / "checkpoints").is_dir() and (workdir / "config.json").is_file()


def _report(workdir: pathlib.Path, name: str, summary: dict[str, float]) -> None:
    text = json.dumps(summary, indent=2, sort_keys=True)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / f"evaluation_{name}.json").write_text(text, encoding="utf-8")
    say(text)


def run(
    mode: str, config: ConfigDict, workdir: pathlib.Path, from_samples: str = "", topology: str = ""
) -> int:
    """What --mode asks for; returns the exit status. `from_samples` is read by evaluate alone,
    `topology` by compile: one slice, or several after commas to compare."""
    if (mode == "compile") != bool(topology):
        raise ConfigError(
            f"--topology={topology} and --mode={mode}: --mode=compile and a topology such as v5e:4x4 "
            "need each other."
        )
    command = f"python -m qlog.main {shlex.join(sys.argv[1:])}"
    if mode == "compile" and "," in topology:
        return scaling.run(config, topology.split(","), workdir, command)
    if mode == "compile":
        return aot.run_compile(config, topology, workdir, command)
    if not from_samples:
        return _COMMANDS[mode](config, workdir)
    if mode != "evaluate":
        raise ConfigError(
            f"--from_samples={from_samples} is not read by --mode={mode}: add --mode=evaluate."
        )
    return run_from_samples(config, workdir, pathlib.Path(from_samples))


_COMMANDS = {
    "train": run_train, "evaluate": run_evaluate, "sample": run_sample, "export": run_export
}  # fmt: skip
