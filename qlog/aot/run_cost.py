"""What a run costs before it starts: steps at the compiler's roofline, evaluations, chips, a price.

`launch/sweep --price` prints it. The roofline is that of `--mode=compile`.
launch/tables/roofline.json holds what was compiled for the paper's configs; the JSON files that the
mode writes serve as well. All of it is a lower bound of the time that a slice computes. Start-up,
compilation, saving and preemptions come on top.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from qlog.config.evaluated import splits_after
from qlog.data import label
from qlog.errors import ConfigError
from qlog.experiment.duration import num_questions
from qlog.storage import paths

# What a step's roofline depends on, besides the prompts of a step and the slice.
_FIELDS = (
    ("model",),
    ("architecture",),
    ("dtype",),
    ("data", "max_prompt_tokens"),
    ("rollout", "rollouts_per_prompt"),
    ("rollout", "rationale_budget"),
    ("rollout", "answer_reserve"),
    ("rollout", "cache"),
)
_DEFAULTS = {"cache": "auto"}  # of fields that results of older versions lack


class Roofline(NamedTuple):
    """A step on a slice, as the compiler bounds it."""

    chips: int  # of the slice
    seconds: float  # of a step, at least
    decode_share: float  # of the seconds, those of decoding


class Estimate(NamedTuple):
    """One run on one slice with every budget spent. Seconds are lower bounds."""

    chips: int  # of the slice
    steps: int  # training steps; 0 of a run that only evaluates
    step_seconds: float  # of one step
    evaluations: int  # during and after training, that of the best checkpoint included
    evaluation_seconds: float  # of all evaluations together

    @property
    def hours(self) -> float:
        return (self.steps * self.step_seconds + self.evaluation_seconds) / 3600


def read_rooflines(file: str | os.PathLike) -> list[dict[str, Any]]:
    """The compiler's results in launch/tables/roofline.json or a file that --mode=compile wrote.

    Each has the keys config (fields of the run), rows (topology, chips, prompts, seconds, perhaps
    phases), command, versions and decode_share (None where it is not known).

    Raises:
      ConfigError: the file cannot be read, or is neither of the two.
    """
    try:
        content = json.loads(paths.read(paths.parse(file, "--roofline")))
        results = content.get("results", [content])
        for result in results:
            if not {"config", "rows", "command", "versions"} <= set(result):
                raise ValueError("a result without config, rows, command and versions")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"--roofline={os.fspath(file)} cannot be read ({error}): give "
            "launch/tables/roofline.json or a compile_*.json or weak_scaling.json that "
            "--mode=compile wrote."
        ) from None
    share = content.get("decode_share")
    return [{"decode_share": share, **result} for result in results]


def roofline(config: ConfigDict, topology: str, results: Iterable[Mapping[str, Any]]) -> Roofline:
    """The result for `config` on `topology`, v5e:4x4 for example.

    Args:
      results: from `read_rooflines`.

    Raises:
      ConfigError: nothing was compiled for them. The message names the command that does it.
    """
    for result in results:
        if any(_get(result["config"], field) != _get(config, field) for field in _FIELDS):
            continue
        for row in result["rows"]:
            if (row["topology"], row["prompts"]) != (topology, config.train.prompts_per_step):
                continue
            if not isinstance(row["seconds"], int | float):  # "nan": it did not fit
                continue
            # A compile_*.json knows the seconds of each program. The table of the paper's configs
            # has one share for all. Where neither is known, a whole step bounds the decoding.
            share = result["decode_share"]
            if "decode" in row.get("phases", {}):
                share = row["phases"]["decode"] / row["seconds"]
            return Roofline(row["chips"], row["seconds"], 1.0 if share is None else share)
    raise ConfigError(
        f"--slice={topology}: no roofline is known there for {config.model}, "
        f"{label(config.data.name)}, {config.train.prompts_per_step} x "
        f"{config.rollout.rollouts_per_prompt} rollouts a step of "
        f"{config.rollout.rationale_budget} tokens: run python -m qlog.main --mode=compile "
        f"--topology={topology} with the flags of the run, and give the compile_*.json that it "
        "writes into its workdir as --roofline=FILE."
    )


def estimate(config: ConfigDict, mode: str, step: Roofline) -> Estimate:
    """A run of `config` with --mode=train or evaluate.

    An evaluation decodes as a step does, for another number of rollouts:

        seconds = (its rollouts / rollouts of a step) x decode_share x seconds of a step

    What `evaluation.without_rationale` adds is left out: few tokens, of which no roofline tells.

    Raises:
      ConfigError: the size of an evaluated split is not known.
    """
    evaluation, train = config.evaluation, config.train
    steps, splits = 0, [evaluation.split]
    if mode == "train":
        steps, splits = train.steps, splits_after(config)
    prompts = sum(_prompts(config, split) for split in splits)
    rollouts = prompts * evaluation.rollouts_per_prompt
    step_rollouts = train.prompts_per_step * config.rollout.rollouts_per_prompt
    seconds = rollouts / step_rollouts * step.decode_share * step.seconds
    return Estimate(step.chips, steps, step.seconds, len(splits), seconds)


def _prompts(config: ConfigDict, split: str) -> int:
    """Prompts of one evaluation: all of the split, or as many as config.evaluation.prompts."""
    found = num_questions(config, split)
    if not found:
        raise ConfigError(
            f"config.data.name = {label(config.data.name)!r}: the size of its split {split!r} "
            "is not known, so its evaluation has no price: set config.evaluation.prompts."
        )
    return found


def _get(config: Any, field: Sequence[str]) -> Any:
    for key in field:
        config = config[key] if key in config else _DEFAULTS[key]
    return config.to_dict() if isinstance(config, ConfigDict) else config
