"""What a run costs before it starts: steps at the compiler's roofline, evaluations, chips, a price.

The roofline is that of `--mode=compile`: launch/tables/roofline.json has what was compiled for the paper's
configs, and the JSON files that the mode writes serve as well. All of it is a lower bound of the
time that a slice computes; start-up, compilation, saving and preemptions come on top.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from qlog.data import splits
from qlog.errors import ConfigError
from qlog.storage import paths

# What a step's roofline depends on, beside the prompts of a step and the slice.
_FIELDS = (
    ("model",),
    ("architecture",),
    ("dtype",),
    ("data", "max_prompt_tokens"),
    ("rollout", "rollouts_per_prompt"),
    ("rollout", "rationale_budget"),
    ("rollout", "answer_reserve"),
)


class Roofline(NamedTuple):
    """A step on a slice: `seconds` at least, `decode_share` of it spent in decoding."""

    chips: int
    seconds: float
    decode_share: float


class Estimate(NamedTuple):
    """One run on one slice, in full: every budget spent. Seconds are lower bounds."""

    chips: int
    steps: int
    step_seconds: float
    evaluations: int
    evaluation_seconds: float  # of all evaluations together

    @property
    def hours(self) -> float:
        return (self.steps * self.step_seconds + self.evaluation_seconds) / 3600


def read_rooflines(file: str | os.PathLike) -> Sequence[Mapping[str, Any]]:
    """The compiler's results in `file`: launch/tables/roofline.json, or one that --mode=compile wrote.

    Raises:
      ConfigError: no such file, or none of the two.
    """
    try:
        content = json.loads(paths.read(paths.parse(file, "--roofline")))
        results = content.get("results", [content])
        for result in results:
            if not {"config", "rows", "command", "versions"} <= set(result):
                raise ValueError("a result without config, rows, command and versions")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"--roofline={os.fspath(file)} cannot be read ({error}): give launch/tables/roofline.json or a "
            "compile_*.json or weak_scaling.json that --mode=compile wrote."
        ) from None
    share = content.get("decode_share")
    return [{"decode_share": share, **result} for result in results]


def roofline(config: ConfigDict, topology: str, results: Iterable[Mapping[str, Any]]) -> Roofline:
    """The result for `config` on `topology`, v5e:4x4 say.

    Raises:
      ConfigError: nothing was compiled for them; names the command that does it.
    """
    for result in results:
        if any(_get(result["config"], field) != _get(config, field) for field in _FIELDS):
            continue
        for row in result["rows"]:
            if (row["topology"], row["prompts"]) != (topology, config.train.prompts_per_step):
                continue
            if row["seconds"] is None:  # the compiler gave up for memory
                continue
            share = result["decode_share"]
            if "decode" in row.get("phases", {}):
                share = row["phases"]["decode"] / row["seconds"]
            return Roofline(row["chips"], row["seconds"], 1.0 if share is None else share)
    raise ConfigError(
        f"--slice={topology}: no roofline is known there for {config.model}, {config.data.name}, "
        f"{config.train.prompts_per_step} x {config.rollout.rollouts_per_prompt} rollouts a step of "
        f"{config.rollout.rationale_budget} tokens: run python -m qlog.main --mode=compile "
        f"--topology={topology} with the flags of the run, and give the compile_*.json that it writes into "
        "its workdir as --roofline=FILE."
    )


def estimate(config: ConfigDict, mode: str, step: Roofline) -> Estimate:
    """A run of `config` with --mode=train or evaluate.

    An evaluation decodes as a step does, other numbers of rollouts:
    prompts x rollouts of the evaluation / (prompts x rollouts of a step) x a step's decoding.
    """
    evaluation, train = config.evaluation, config.train
    steps, splits_evaluated = 0, [evaluation.split]
    if mode == "train":
        steps = train.steps
        times = (
            -(-steps // evaluation.every) if evaluation.every else 0
        )  # the last step always counts
        splits_evaluated = [evaluation.split] * times
        splits_evaluated += [evaluation.final] if evaluation.get("final") else []
    rollouts = (
        sum(_prompts(config, split) for split in splits_evaluated) * evaluation.rollouts_per_prompt
    )
    of_a_step = train.prompts_per_step * config.rollout.rollouts_per_prompt
    seconds = rollouts / of_a_step * step.decode_share * step.seconds
    return Estimate(step.chips, steps, step.seconds, len(splits_evaluated), seconds)


def _prompts(config: ConfigDict, split: str) -> int:
    size = splits.SIZES.get(config.data.name, {}).get(split)
    limit = config.evaluation.prompts
    if size is None and not limit:
        raise ConfigError(
            f"config.data.name = {config.data.name!r}: the size of its split {split!r} is not known, so "
            "its evaluation has no price: set config.evaluation.prompts."
        )
    return min(filter(None, (size, limit)))


def _get(config: Mapping[str, Any], field: Sequence[str]) -> Any:
    for key in field:
        config = config[key]
    return config.to_dict() if isinstance(config, ConfigDict) else config
