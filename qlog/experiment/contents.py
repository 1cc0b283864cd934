"""What a run is made of, by content: so that it resumes on the same, from wherever it is read."""

import dataclasses
import hashlib
import json
from collections.abc import Hashable, Sequence
from typing import Any

from qlog import data, models
from qlog.console import say
from qlog.data.own import OwnExamples
from qlog.data.splits import read_ids
from qlog.errors import ConfigError, PassingError
from qlog.experiment.parts import Experiment
from qlog.parallel import distributed
from qlog.storage import paths

_EXAMPLES_DIGESTED = 32  # examples of each split that `identity` reads whole


def identity(experiment: Experiment) -> dict[str, Any]:
    """What a run is made of, by content, wherever it was read from; takes seconds.

    Returns:
      JSON of
        model: the fields of its DecoderConfig;
        weights: `models.huggingface.digest`, '' where no folder holds them (then the config says
          all);
        tokenizer: `Formatter.digest`, which the chat template is part of where it is used;
        examples: for each open split a digest of all ids in order (of endless data the first ones)
          and of 32 examples spread over it, whole;
        content: for each open split a digest of all examples, whole (`Dataset.content`).
      A checkpoint of an older version has no "content": then "examples" tells most changes. Still
      older ones have "splits", digests of records, which nothing is compared with.
    """
    weights, formatter = experiment.weights, experiment.formatter
    assert formatter, "an experiment of shapes has no identity"
    # By content, not by name: the same files may be read from another folder when a run resumes.
    found = {
        "model": dataclasses.asdict(experiment.policy.config),
        "weights": models.huggingface.digest(weights, experiment.policy.config) if weights else "",
        "tokenizer": formatter.digest,
        "examples": {name: _digest(split) for name, split in experiment.splits().items()},
        "content": {name: split.content for name, split in experiment.splits().items()},
    }
    return json.loads(json.dumps(found))  # as a checkpoint gives it back: tuples are lists


def _digest(dataset: data.Dataset) -> str:
    # What a checkpoint kept before `Dataset.content` was: all ids tell examples that were added,
    # left out or moved, and a few whole examples an edited release.
    num_read = min(len(dataset), _EXAMPLES_DIGESTED)
    sample = [dataset[i * len(dataset) // num_read] for i in range(num_read)]
    content = [list(dataset.ids), [vars(example) for example in sample]]
    text = json.dumps(content, sort_keys=True, default=dict)  # `extra` may be any mapping
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    for kind in ("examples", "content"):
        for name, old in before.get(kind, {}).items():
            parts.append((f"split {name}", old, now[kind].get(name, old)))
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


def check_disjoint(experiment: Experiment) -> None:
    """Whether what is evaluated is new to the model: no question of it is in train.

    Ids count, too: an id names one example of the whole data. Only a number is said of the official
    datasets, whose splits are what they are. Nothing is compared where the config asks for an
    evaluation on train, or where examples are made when asked for.

    Raises:
      ConfigError: the splits of data of one's own share ids or questions.
    """
    train, evaluated = experiment.train_data, experiment.evaluation_data
    split = experiment.config.evaluation.split
    if train is None or evaluated is None or split == "train" or train.endless:
        return
    name = data.label(experiment.config.data.name)
    what = f"config.data.name = {name!r}: train and {split} share"
    if shared := _shared(train.questions.tolist(), evaluated.questions.tolist()):
        if _is_official(train):
            say(f"{what} {len(shared)} questions, as the official files have them.")
            return
        kind, remedy = "questions with their answers", f"leave them out of train or of {split}"
    elif not _is_official(train) and (shared := _shared(train.ids, evaluated.ids)):
        kind = "ids"
        remedy = (
            "give each example its own, or set config.data.fields.id to '', then ids are digests "
            "of the records"
        )
    else:
        return
    ours, theirs = shared[0]
    raise ConfigError(
        f"{what} {len(shared)} {kind}, the first in {_place(train, ours)} and "
        f"{_place(evaluated, theirs)}: {remedy}."
    )


def _shared(ours: Sequence[Hashable], theirs: Sequence[Hashable]) -> list[tuple[int, int]]:
    """For each of `theirs` that `ours` has, too, the places in both."""
    places = {value: index for index, value in enumerate(ours)}
    return [(places[value], index) for index, value in enumerate(theirs) if value in places]


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
    found = distributed.once_per_run(
        lambda: _shared(read_ids(splits_file, "train") or [], evaluated.ids)
    )
    if found:
        raise ConfigError(
            f"config.evaluation.split = {split!r}: {splits_file} lists {len(found)} of its "
            f"{len(evaluated.ids)} ids in train, so the run has seen them, the first is of "
            f"{_place(evaluated, found[0][1])}: evaluate on others, or set it to 'train'."
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
                if part in ("examples", "content") and is_function:
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
