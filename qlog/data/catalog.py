"""Which data a config names: the `data` section -> a Corpus, whose splits are opened one by one.

    corpus = find_corpus(config.data.to_dict())     # checks the section, reads no file
    prepared = corpus.prepare()                     # once per host: downloads, copies
    train = corpus.open("train", prepared)          # examples by random access

`data.name` is one of the official datasets, a synthetic task, 'jsonl' or 'parquet' (files of your
own), or a function that returns examples. A kind of data is one function here and its line in
`_kinds`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from qlog.data import builders, fields, hub, own, record_files, splits, synthetic
from qlog.data.examples import Converted, Example, Task
from qlog.data.pipeline import Source
from qlog.data.record_files import JSON_SUFFIXES, PARQUET_SUFFIXES, File, RecordFiles
from qlog.data.tasks import TASKS, open_examples
from qlog.data.tokenizers import Tokenizer
from qlog.errors import ConfigError

Section = Mapping[str, Any]  # the `data` section of a config

# What the warm style opens with where `data.description` is empty and nothing better is known.
_OWN_DESCRIPTION = "Do the task below. Reply with the answer alone, without an explanation."
# What a section that was not made from the schema may leave out.
_DEFAULTS = {
    "manual_dir": "",
    "data_dir": "",
    "files": {},
    "fields": {},
    "description": "",
    "invalid": "error",
    "world": {},
}
_SUFFIXES = {"jsonl": JSON_SUFFIXES, "parquet": PARQUET_SUFFIXES}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The data of a run: all splits of one dataset.

    Attributes:
      task: how examples are put into words.
      prepare: downloads or copies what is not on this host yet, once per host; returns what `open`
        takes as `prepared`, a text that processes can send each other. None where there is nothing
        to fetch.
      open: (split, prepared) -> the split's examples.
      tokenizer: the vocabulary that the data come with; None where the config names one.
      endless: examples are made when asked for, so only the first ones are measured.
      asset: the folder of the prepared data among staged assets, relative to QLOG_ASSETS; '' where
        `prepare` makes none.
      files: by split, the paths that the config names, which hosts have to share.
    """

    task: Task
    prepare: Callable[[], str | None]
    open: Callable[[str, str | None], Source]
    tokenizer: Tokenizer | None = None
    endless: bool = False
    asset: str = ""
    files: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


class _Kind(NamedTuple):
    """A kind of data."""

    make: Callable[[Section], Corpus]
    reads: frozenset[str]  # keys of the section that only some kinds read, and this one does


def find_corpus(section: Section) -> Corpus:
    """The data that the `data` section of a config names. Reads no file.

    Raises:
      ConfigError: no such data, or a key that they do not read.
    """
    section = {**_DEFAULTS, **section}
    name, kinds = section["name"], _kinds()
    if callable(name):
        own.check_function(name)
        kind = _Kind(_function, frozenset())
    elif isinstance(name, str) and name in kinds:
        kind = kinds[name]
    else:
        raise ConfigError(
            f"{fields.NAME} = {name!r} is unknown{fields.closest(str(name), kinds)}: use one of "
            f"{', '.join(kinds)}, or a function."
        )
    for key in ("files", "fields", "world"):
        if not isinstance(section[key], Mapping):
            raise ConfigError(
                f"config.data.{key} = {section[key]!r} must be a section, such as "
                '{"train": "train.jsonl"} for the files.'
            )
    # A key that nothing reads would be ignored without a word.
    for key in sorted(frozenset().union(*(each.reads for each in kinds.values())) - kind.reads):
        if value := section[key]:
            readers = [name for name, each in kinds.items() if key in each.reads]
            raise ConfigError(
                f"config.data.{key} = {value!r} is not read by {label(name)!r}, it is read only "
                f"by {', '.join(readers)}: remove it."
            )
    corpus = kind.make(section)
    if section["description"]:
        task = dataclasses.replace(corpus.task, description=section["description"])
        corpus = dataclasses.replace(corpus, task=task)
    return corpus


def label(name: str | Callable[..., Any]) -> str:
    """`data.name` as text; of a function its qualified name, as config.json keeps it."""
    return name if isinstance(name, str) else name.__qualname__


def _kinds() -> dict[str, _Kind]:
    official = _Kind(_official, frozenset({"manual_dir", "data_dir", "files"}))
    made = _Kind(_synthetic, frozenset({"world"}))
    files = _Kind(_own_files, frozenset({"files", "fields"}))
    return {
        **dict.fromkeys(TASKS, official),
        **dict.fromkeys(synthetic.TASKS, made),
        **dict.fromkeys(_SUFFIXES, files),
    }


# ---- The official datasets ----


def _official(section: Section) -> Corpus:
    if section["files"]:
        return _hub(section)
    name = section["name"]
    places = {
        "manual_dir": section["manual_dir"] or None,
        "data_dir": section["data_dir"] or None,
    }
    return Corpus(
        TASKS[name],
        prepare=lambda: str(builders.prepare(name, **places)),
        open=functools.partial(_open_official, name),
        asset=f"data/{builders.staged_name(name)}",
    )


def _open_official(name: str, split: str, prepared: str | None) -> Converted:
    return open_examples(name, split, prepared=prepared)


# The official splits by the names that the Hub has for them.
_OFFICIAL_SPLITS = {"train": "train", "validation": "dev", "test": "test"}


def _hub(section: Section) -> Corpus:
    """An official dataset from files in a layout of the Hugging Face Hub."""
    for key in ("manual_dir", "data_dir"):
        if section[key]:
            raise ConfigError(
                f"config.data.{key} = {section[key]!r} is not read next to {fields.FILES}: empty "
                "one of the two."
            )
    name, specs = section["name"], _specs(section["files"])
    labelled = builders.official_splits(name)
    for split in specs:
        if _OFFICIAL_SPLITS[split] not in labelled:
            raise ConfigError(
                f"{fields.FILES}.{split} = {section['files'][split]!r}: the official {split} split "
                f"of {name} has no answers; remove it, {split} comes from the validation files."
            )
    return Corpus(
        TASKS[name],
        prepare=functools.partial(
            _fetch,
            specs,
            PARQUET_SUFFIXES + JSON_SUFFIXES,
            # Each split can be drawn from another one's files (`splits.choose`).
            dict.fromkeys(
                specs, [each for each, other in _OFFICIAL_SPLITS.items() if other in labelled]
            ),
        ),
        open=functools.partial(_open_hub, name, section["invalid"] == "skip"),
        files=specs,
    )


def _open_hub(name: str, skip_invalid: bool, split: str, prepared: str | None) -> Converted:
    # The same rule on the same official ids: the same examples as from the official files.
    files = fetched_files(prepared)
    available = [_OFFICIAL_SPLITS[each] for each in files]
    official = splits.official_split(name, split, available)
    on_hub = next(each for each, other in _OFFICIAL_SPLITS.items() if other == official)
    records = hub.HubRecords(name, RecordFiles(files[on_hub]), skip_invalid)
    chosen = splits.choose(name, split, records.ids, available)
    return Converted(splits.Split(records, chosen, official), TASKS[name])


# ---- The synthetic tasks ----


def _synthetic(section: Section) -> Corpus:
    name, sizes = section["name"], section["world"]
    known = [field.name for field in dataclasses.fields(synthetic.World)]
    for key in sizes:
        if key not in known:
            raise ConfigError(
                f"{fields.WORLD}.{key} = {sizes[key]!r} is read by nothing"
                f"{fields.closest(key, known)}: the task has {', '.join(sorted(known))}."
            )
    world = synthetic.World(**sizes)
    return Corpus(
        synthetic.TASKS[name],
        prepare=lambda: None,
        open=lambda split, prepared: synthetic.open_examples(name, split, world),
        tokenizer=world.tokenizer(),
        endless=True,
    )


# ---- Files of your own ----


def _own_files(section: Section) -> Corpus:
    name = section["name"]
    if not section["files"]:
        raise ConfigError(
            f"{fields.FILES} is empty and {fields.NAME} = {name!r} reads files: name them, as in "
            f'{fields.FILES}.train = "train.{name}".'
        )
    specs, reader = _specs(section["files"]), own.Reader(section["fields"])
    return Corpus(
        Task(name, _OWN_DESCRIPTION),
        prepare=functools.partial(_fetch, specs, _SUFFIXES[name], {"train": splits.NAMES}),
        open=functools.partial(_open_own, reader, section["invalid"] == "skip"),
        files=specs,
    )


def _open_own(
    reader: own.Reader, skip_invalid: bool, split: str, prepared: str | None
) -> own.OwnExamples:
    files = fetched_files(prepared)
    source = splits.own_source(split, list(files))
    examples = own.OwnExamples(RecordFiles(files[source]), reader, skip_invalid)
    # Other splits may be drawn from these records: then this one is what is left of them.
    chosen = splits.choose_own(split, examples.ids, list(files))
    return examples if chosen is None else examples.selected(chosen)


def _specs(files: Mapping[str, Any]) -> dict[str, list[str]]:
    """`data.files` as lists of paths by split."""
    specs = {}
    for split, given in files.items():
        if split not in splits.NAMES:
            raise ConfigError(
                f"{fields.FILES}.{split} = {given!r} is read by nothing"
                f"{fields.closest(split, splits.NAMES)}: the splits are {', '.join(splits.NAMES)}."
            )
        several = list(given) if isinstance(given, list | tuple) else [given]
        if not several or not all(isinstance(spec, str) and spec for spec in several):
            raise ConfigError(
                f"{fields.FILES}.{split} = {given!r} must be a path, a glob, or a list of them."
            )
        specs[split] = several
    return specs


def _fetch(
    specs: Mapping[str, list[str]],
    suffixes: tuple[str, ...],
    sources: Mapping[str, Sequence[str]],
) -> str:
    """The files of each split on this host, as JSON: {split: [[name, path]]}.

    Args:
      specs: paths by split.
      suffixes: the kinds of files that are wanted.
      sources: by split, the splits that are drawn from its files where none are named for them.
    """
    found = {}
    for split, several in specs.items():
        field = f"{fields.FILES}.{split}"
        drawn = [each for each in sources.get(split, ()) if each not in specs]
        names = record_files.expand(several, split, field, suffixes, drawn)
        found[split] = record_files.local(names, field)
    return json.dumps(found)


def fetched_files(prepared: str | None) -> dict[str, list[File]]:
    """Of a corpus with `files`, what `prepare` returned: the files of each split, on this host."""
    assert prepared, "files are opened with what `prepare` returned"
    return {split: [File(*file) for file in files] for split, files in json.loads(prepared).items()}


# ---- A function ----


def _function(section: Section) -> Corpus:
    function: Callable[[str], Sequence[Example]] = section["name"]
    return Corpus(
        Task(function.__name__, _OWN_DESCRIPTION),
        prepare=lambda: None,
        open=lambda split, prepared: own.CheckedExamples(function, split),
    )
