"""What a run is made of, by content: so that it resumes on the same, from wherever it is read."""

import dataclasses
import json
from typing import Any

from ml_collections import ConfigDict

from qlog import data, models
from qlog.data.own import OwnExamples
from qlog.data.splits import read_ids
from qlog.errors import ConfigError, PassingError
from qlog.experiment.parts import Experiment
from qlog.parallel import distributed
from qlog.runs import checkpoint_reader
from qlog.storage import paths

BEGUN_FROM = "begun_from"  # what `begun_from` returns, next to an identity in a checkpoint


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


def begun_from(experiment: Experiment) -> dict[str, Any] | None:
    """Which checkpoint of another run the parameters begin with. Every process must call it.

    Returns:
      `checkpoint_reader.version` of the one that `config.init_from` gave; None without one.
    """
    folder = experiment.begins_from
    return None if folder is None else checkpoint_reader.version(folder)


def check_same_reference(
    before: dict[str, Any] | None, now: dict[str, Any] | None, config: ConfigDict
) -> None:
    """Whether the reference of a KL penalty is the one that training began with.

    Args:
      before, now: as `begun_from` returns them; None before, too, of an older checkpoint.

    Raises:
      ConfigError: the best checkpoint of the run that `config.init_from` names is another one now.
    """
    if before is None or before == now:
        return
    steps = [None if each is None else each["step"] for each in (before, now)]
    if now is not None and None in steps and before["about"] == now["about"]:
        return  # of a checkpoint that was copied, without digests: its step is not known
    shown = "the base model" if now is None else f"the one of step {steps[1]}"
    if now is not None and steps[0] == steps[1]:
        shown += " of another run"
    raise ConfigError(
        f"config.init_from = {config.init_from!r} gives the reference of config.loss, which was "
        f"the checkpoint of step {steps[0]} when the run in --workdir began, and is {shown} now: "
        f"name the folder of the one before (.../checkpoints/{steps[0]})."
    )


def _with_new_fields(model: dict[str, Any]) -> dict[str, Any]:
    """The fields of a DecoderConfig, with the defaults of those that did not exist yet."""
    try:
        return json.loads(json.dumps(dataclasses.asdict(models.DecoderConfig(**model))))
    except (ConfigError, TypeError):  # fields that are no decoder today differ from any
        return model


def check_trained_ids(experiment: Experiment, splits_file: paths.Path) -> None:
    """Whether a run has trained on what is evaluated now; every process must call it.

    Args:
      splits_file: the run's splits.json, as `Experiment.write_split_ids` writes it; nothing is
        compared where there is none.

    Raises:
      ConfigError: on every process: the run trained on some of the ids of data of one's own.
    """
    evaluated, split = experiment.evaluation_data, experiment.config.evaluation.split
    if evaluated is None or split == "train" or evaluated.endless or _is_official(evaluated):
        return

    # The ids are the same on every process, so only one of them has to read the file.
    def places() -> list[int]:
        trained = set(read_ids(splits_file, "train") or ())
        return [i for i, example_id in enumerate(evaluated.ids) if example_id in trained]

    found = distributed.once_per_run(places)
    if found:
        raise ConfigError(
            f"config.evaluation.split = {split!r}: {splits_file} lists {len(found)} of its "
            f"{len(evaluated.ids)} ids in train, so the run has seen them, the first is of "
            f"{_place(evaluated, found[0])}: evaluate on others, or set it to 'train'."
        )


def _is_official(dataset: data.Dataset) -> bool:
    return isinstance(dataset.source, data.Converted)


def _place(dataset: data.Dataset, index: int) -> str:
    """Where an example of the source is, for messages."""
    if isinstance(dataset.source, OwnExamples):
        return dataset.source.where(index)
    return f"the example with id {dataset.ids[index]!r}"


def check_hosts(mine: dict[str, Any], is_function: bool = False) -> None:
    """Whether all processes, each with its host's files, have read the same.

    Args:
      mine: this process's `identity`.
      is_function: the examples are a function's, which another start does not change.

    Raises:
      PassingError: they have not; ConfigError of a function's examples.
    """
    everyone = distributed.gather([mine])
    for index, other in enumerate(everyone):
        for part in mine:
            if other[part] != everyone[0][part]:
                if part == "examples" and is_function:
                    raise ConfigError(
                        f"config.data.name: the function returns other examples in process {index} "
                        "than in process 0: return the same ones in each call, from a generator "
                        "with a fixed seed."
                    )
                raise PassingError(
                    f"the {part} that process {index} reads differ from those of process 0 "
                    f"({other[part]} and {everyone[0][part]}): they changed while the run "
                    "started, or hosts keep copies of their own; name one revision, or stage them "
                    "(launch/stage)."
                )
