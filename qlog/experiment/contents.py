"""What a run is made of, by content: so that it resumes on the same, from wherever it is read."""

import dataclasses
import json
from typing import Any

from qlog import models
from qlog.errors import ConfigError, PassingError
from qlog.experiment.parts import Experiment
from qlog.parallel import distributed


def identity(experiment: Experiment) -> dict[str, Any]:
    """What a run is made of, by content, wherever it was read from; takes seconds.

    Returns:
      JSON of
        model: the fields of its DecoderConfig;
        weights: `models.huggingface.digest`, '' where no folder holds them (then the config says
          all);
        tokenizer: `Formatter.digest`, which the chat template is part of where it is used;
        examples: for each open split a digest of all its examples in order (of endless data of the
          first ones). A checkpoint of an older version has "splits" instead, digests of records,
          which nothing is compared with.
    """
    weights, formatter = experiment.weights, experiment.formatter
    assert formatter, "an experiment of shapes has no identity"
    # By content, not by name: the same files may be read from another folder when a run resumes.
    found = {
        "model": dataclasses.asdict(experiment.policy.config),
        "weights": models.huggingface.digest(weights, experiment.policy.config) if weights else "",
        "tokenizer": formatter.digest,
        "examples": {name: split.content for name, split in experiment.splits().items()},
    }
    return json.loads(json.dumps(found))  # as a checkpoint gives it back: tuples are lists


def check_same_parts(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Whether a run that resumes is made of the same model, weights, tokenizer and data.

    Args:
      before: the `identity` that the newest checkpoint was written under; {} of an old one.
      now: the `identity` of this start. A split that only one of the two has open is left out.

    Raises:
      ConfigError: a part differs.
    """
    parts = [(part, before[part], now[part]) for part in ("weights", "tokenizer") if part in before]
    if "model" in before:
        parts.insert(0, ("model", _with_new_fields(before["model"]), now["model"]))
    for name, old in before.get("examples", {}).items():
        parts.append((f"split {name}", old, now["examples"].get(name, old)))
    for part, old, new in parts:
        if old != new:
            raise ConfigError(
                f"--workdir: the run there has another {part} ({old or 'none'}, not "
                f"{new or 'none'}): use another --workdir, or what the run began with."
            )


def _with_new_fields(model: dict[str, Any]) -> dict[str, Any]:
    """The fields of a DecoderConfig, with the defaults of those that did not exist yet."""
    try:
        return json.loads(json.dumps(dataclasses.asdict(models.DecoderConfig(**model))))
    except (ConfigError, TypeError):  # fields that are no decoder today differ from any
        return model


def check_hosts(mine: dict[str, Any]) -> None:
    """Raises PassingError unless all processes, each with its host's files, have read the same."""
    everyone = distributed.gather([mine])
    for index, other in enumerate(everyone):
        for part in mine:
            if other[part] != everyone[0][part]:
                raise PassingError(
                    f"the {part} that process {index} reads differ from those of process 0 "
                    f"({other[part]} and {everyone[0][part]}): they changed while the run "
                    "started, or hosts keep copies of their own; name one revision, or stage them "
                    "(launch/stage)."
                )
