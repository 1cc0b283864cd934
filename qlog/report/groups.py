"""Which runs are one experiment: those that differ in their seed, and in what changes no number."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qlog import losses
from qlog.config import schema
from qlog.report.records import Group, Run
from qlog.storage import paths

# Fields and sections that change no number of a run, so seeds may differ in them: where things are
# read, memory and speed, what is written. (What a run may change when it resumes is more: steps and
# the settings of evaluation do change numbers.)
_NO_NUMBERS = frozenset(
    {
        "seed",
        "tokenizer.path",
        "tokenizer.chat_template",
        "data.manual_dir",
        "data.data_dir",
        "data.files",
        "attention",
        "mesh",
        "rollout.prompts_per_wave",
        "rollout.reward_threads",
        "train.prompts_per_microbatch",
        "train.rollouts_per_microbatch",
        "train.remat",
        "train.max_mismatch",
        "train.terms_every",
        "train.rollouts_every",
        "train.rollouts_prompts",
        "optimizer.max_skipped_in_a_row",
        "evaluation.prompts_per_batch",
        "evaluation.without_rationale",
        "evaluation.metrics",
        "checkpoint",
        "watchdog",
        "profile",
        "runs",
    }
)
_DEPTH = 8  # runs that begin from each other's checkpoints, one after the other


def defaults() -> dict[str, Any]:
    """Every field of the schema by its dotted path, as config.json would have it."""
    return schema.fields(json.loads(schema.to_json(schema.default())))


def loss_fields(config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(the recipe's default, value) of each argument of the loss, by 'loss.q' and the like."""
    arguments = dict(config["loss"])
    usual, _ = _usual(arguments)
    return {f"loss.{key}": (usual.get(key), value) for key, value in arguments.items()}


def method(config: Mapping[str, Any]) -> str:
    """The loss as a call, such as garl(q=0.75): q always, else what differs from its defaults."""
    arguments = dict(config["loss"])
    usual, _ = _usual(arguments)
    name = str(arguments.pop("name", "?"))
    words = [f"{k}={v}" for k, v in arguments.items() if k == "q" or v != usual.get(k)]
    return f"{name}({', '.join(words)})" if words else name


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether the loss has all its defaults besides q."""
    arguments = dict(config["loss"])
    usual, is_known = _usual(arguments)
    arguments.pop("name", None)
    return is_known and all(k == "q" or v == usual.get(k) for k, v in arguments.items())


def _usual(section: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The defaults of a loss's arguments, and whether they are those of a recipe with a name.

    Of an object or a function config.json has the text only: then the defaults are those that all
    recipes have in common.
    """
    try:
        return losses.arguments(str(section.get("name"))), True
    except ValueError:
        return losses.shared_arguments(), False


def numbers(config: Mapping[str, Any], depth: int = _DEPTH) -> dict[str, Any]:
    """The fields that numbers depend on, as JSON values: equal in all seeds of an experiment.

    `init_from` names another run: it becomes what that run's numbers depend on, wherever it is.
    """
    found = {
        name: value
        for name, value in schema.from_json(config).items()
        if name not in _NO_NUMBERS and name.partition(".")[0] not in _NO_NUMBERS
    }
    if begun_from := found.get("init_from"):
        found["init_from"] = _begun_from(str(begun_from), depth)
    return found


def _begun_from(spec: str, depth: int) -> Any:
    """What a checkpoint's run depends on; the last part of its path, where its config is gone."""
    try:
        folder = paths.parse(spec)
        # A workdir, its checkpoints, or one step of them.
        for place in (folder, folder.parent, folder.parent.parent):
            text = paths.read(place / "config.json") if depth else ""
            config = json.loads(text or "{}")
            if "loss" in config:
                return [numbers(config, depth - 1), str(folder.relative_to(place))]
    except (OSError, ValueError):
        pass
    return spec.rstrip("/").rpartition("/")[2]


def origin(run: Run, runs: Iterable[Run]) -> Run | None:
    """The one of `runs` whose model `run` begins with, if curves of both can stand in one figure.

    Without a word about it the figure would say that both began alike. None of a run that begins
    with another model, or after training on annotated rationales, which has no such curve.
    """
    place = str(run.config.get("init_from") or "").partition("/checkpoints")[0].rstrip("/")
    for other in runs:
        folder = other.folder
        # Runs that lie together are found together, too, after their folder was moved.
        is_sibling = folder.parent == run.folder.parent and place.endswith(
            f"/{folder.parent.name}/{folder.name}"
        )
        if place and (place == str(folder) or is_sibling):
            return other if any("log_p" in row for row in other.steps) else None
    return None


def with_origins(alike: Sequence[Group]) -> tuple[list[Group], list[str]]:
    """The groups with labels that say which other one they start from; the same in sentences."""
    labelled, sentences = [], []
    for mine in alike:
        for other in alike:
            if other is not mine and all(origin(run, other.runs) for run in mine.runs):
                sentences.append(f"{mine.label} starts from the model that {other.label} trained.")
                mine = mine._replace(label=f"{mine.label} (starts from {other.label})")
                break
        labelled.append(mine)
    return labelled, sentences


def group(runs: Sequence[Run]) -> list[Group]:
    """The experiments among the runs, in the order of their first run; seeds in theirs."""
    alike: dict[str, list[Run]] = {}
    depends = {id(run): numbers(run.config) for run in runs}
    for run in runs:
        alike.setdefault(json.dumps(depends[id(run)], sort_keys=True), []).append(run)
    groups = list(alike.values())
    methods = [method(members[0].config) for members in groups]
    settings = _settings(methods, [depends[id(members[0])] for members in groups], groups)
    return [
        Group(
            ", ".join(filter(None, [name, setting])),
            name,
            setting,
            tuple(sorted(members, key=lambda run: (run.config.get("seed", 0), run.name))),
        )
        for name, setting, members in zip(methods, settings, groups, strict=True)
    ]


def _settings(
    methods: Sequence[str], depends: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[Run]]
) -> list[str]:
    """For each group the fields that tell it from those of the same method; '' for the only one."""
    flattened = [flat(each) for each in depends]
    settings = []
    for index, name in enumerate(methods):
        # Fields in which the groups of the same method differ from each other.
        same = [flattened[i] for i, other in enumerate(methods) if other == name]
        telling = [
            field
            for field in dict.fromkeys(key for each in same for key in each)
            if any(each.get(field) != same[0].get(field) for each in same)
        ]
        # An argument that a group does not have tells it by the others, which have it.
        words = [
            f"{field}={_short(flattened[index][field])}"
            for field in telling
            if field in flattened[index] and field != "init_from"
        ]
        if "init_from" in telling:  # a whole config: the name of the folder says it
            words.insert(0, "from " + _common_name(groups[index]))
        settings.append(", ".join(words))
    # Two runs that begin from other folders of one name are still told apart.
    pairs = list(zip(methods, settings, strict=True))
    return [
        setting
        if pairs.count((name, setting)) == 1
        else ", ".join(filter(None, [setting, groups[i][0].name]))
        for i, (name, setting) in enumerate(pairs)
    ]


def flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with the arguments of sections such as data.world as fields of their own."""
    found = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": part for key, part in value.items()}
        else:
            found[name] = value
    return found


def _common_name(runs: Sequence[Run]) -> str:
    """What the folders are called that the runs of a group begin from: base of base_0, base_1."""
    specs = [str(run.config.get("init_from") or "the base").rstrip("/") for run in runs]
    names = [spec.rpartition("/")[2] for spec in specs]
    common = os.path.commonprefix(names)
    if all(name == common for name in names):
        return common
    # Cut at a separator: base_1 is what base_10 and base_11 share.
    return re.sub(r"[-_.]?[^-_.]*$", "", common) or names[0]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
