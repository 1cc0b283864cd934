"""What `--mode` can ask for."""

import json
import pathlib

import jax
from ml_collections import ConfigDict

from qlog import checkpoints, evaluation, sweep, train
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
    """Evaluates init_from, or the best checkpoint of the workdir; prints and writes the numbers."""
    experiment, params = _load(config, workdir)
    split = config.evaluation.split
    workdir.mkdir(parents=True, exist_ok=True)
    summary = evaluation.evaluate(experiment, params, workdir / "samples" / f"{split}.jsonl")
    text = json.dumps(summary, indent=2, sort_keys=True)
    if jax.process_index() == 0:
        (workdir / f"evaluation_{split}.json").write_text(text, encoding="utf-8")
    say(text)
    return 0


def run_sample(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Prints prompts of the evaluation split with sampled rationales and answers."""
    experiment, params = _load(config, workdir)
    for row in evaluation.sample_answers(experiment, params, experiment.evaluation_sampling):
        say(f"--- {row['id']}\n{row['source']}\n--- gold: {row['golds'][0]}  (log P {row['log_p']:.2f})")
        for rationale, answer, log_w in list(zip(row["rationales"], row["answers"], row["log_w"]))[:_SHOWN]:
            say(f"  [log w {log_w:.2f}] {rationale} => {answer}")
    return 0


def _load(config: ConfigDict, workdir: pathlib.Path):
    experiment: Experiment = prepare(config, train=False)
    if config.init_from or not (workdir / "checkpoints").is_dir():
        return experiment, experiment.init_params()
    abstract = experiment.abstract_params()
    return experiment, checkpoints.load_params(workdir, abstract, "--workdir")


COMMANDS = {"train": run_train, "evaluate": run_evaluate, "sample": run_sample}
