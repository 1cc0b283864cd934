"""What the three TFDS builders share: raw files in, array_record files out, without TensorFlow."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from qlog.data import fields
from qlog.data.builders import raw
from qlog.errors import ConfigError

# How a field of a raw record is stored. TFDS cannot write nested ragged features without
# TensorFlow, so inner lists and mixed types (FinQA's exe_ans) are JSON text.
TEXT, FLAG, TEXTS, JSON, JSONS = "text", "flag", "texts", "json", "jsons"
_FEATURES = {
    TEXT: tfds.features.Text,
    FLAG: lambda: np.bool_,
    TEXTS: lambda: tfds.features.Sequence(tfds.features.Text()),
    JSON: tfds.features.Text,
    JSONS: lambda: tfds.features.Sequence(tfds.features.Text()),
}
_TYPES = {TEXT: str, FLAG: bool, TEXTS: list, JSON: object, JSONS: list}
OTHER = "other_fields"  # JSON object with the record's further fields, so that nothing is lost


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A dataset whose splits are raw files of JSON records.

    Every field of a raw record survives: `decode` of a stored example is the record again.
    A subclass in its own package `<name>/<name>_dataset_builder.py` sets:

    Attributes:
      FILES: the raw file of each official split.
      FIELDS: how each field is stored; "qa/question" is `record["qa"]["question"]`.
      KEY: the field with the record's unique id.

    After `download_and_prepare`, `ids` has the ids of each split in the order of the examples.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put the official raw files into the folder, unpacked."
    FILES: Mapping[str, raw.RawFile]
    FIELDS: Mapping[str, str]
    KEY: str = "id"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.ids: dict[str, list[str]] = {}

    @staticmethod
    def check(record: Mapping[str, Any]) -> None:
        """Raises TypeError for a record of another dataset that has the same fields."""

    def _info(self) -> tfds.core.DatasetInfo:
        features = {path: _FEATURES[kind]() for path, kind in self.FIELDS.items()}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(_nested({**features, OTHER: tfds.features.Text()})),
            disable_shuffling=True,  # record i of the raw file is example i
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        try:
            manual_dir = dl_manager.manual_dir
        except AssertionError:  # TFDS's way of saying that there is none, or an empty one
            urls = {split: file.url for split, file in self.FILES.items()}
            downloads: Any = dl_manager.download(urls)  # a path for each URL, in the same structure
            return {
                split: self._official_examples(split, pathlib.Path(path))
                for split, path in downloads.items()
            }
        paths = raw.find(manual_dir, self.FILES, self.name)
        return {split: self._generate_examples(split, path) for split, path in paths.items()}

    def _official_examples(
        self, split: str, path: pathlib.Path
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """The examples of a download, whose digest and size must be the official ones."""
        file = self.FILES[split]
        raw.verify(file, path)
        yield from self._generate_examples(split, path, file.member)
        if len(self.ids[split]) != file.size:
            raise ConfigError(
                f"{path} holds {len(self.ids[split])} records of {file.name}, but the official "
                f"file has {file.size}: delete it to download it again, or set "
                f"{fields.MANUAL_DIR}."
            )

    def _generate_examples(
        self, split: str, path: pathlib.Path, member: str = ""
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        # Ids are noted apart from the examples, in the order of the file: see `ids`.
        ids, seen = self.ids.setdefault(split, []), set()
        for record in raw.read(path, member):
            try:
                example = encode(record, self.FIELDS)
                self.check(record)
            except TypeError as error:
                raise ConfigError(
                    f"{path}: record {len(ids)} is not one of {self.name}: {error}; restore the "
                    "official file."
                ) from error
            record_id = record[self.KEY]
            if record_id in seen:
                raise ConfigError(
                    f"{path}: two records have the id {record_id!r}; restore the official file."
                )
            seen.add(record_id)
            ids.append(record_id)
            yield record_id, example


def encode(record: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    """A raw record -> the nested dict that TFDS writes.

    Args:
      kinds: `RecordBuilder.FIELDS`.

    Raises:
      TypeError: a field is missing, has another type than `kinds` says, or is a text that UTF-8
        cannot hold (half of a surrogate pair, which JSON can spell).
    """
    # What is not taken out of `rest` goes into OTHER. Parents are copied, as they lose fields.
    rest = {k: dict(v) if isinstance(v, dict) else v for k, v in record.items()}
    example = {}
    for path, kind in kinds.items():
        *parents, leaf = path.split("/")
        place: Any = rest
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not isinstance(place, dict) or leaf not in place:
            raise TypeError(f"the field {path!r} is missing")
        # Types are checked here, so that the message can name the field.
        value = place.pop(leaf)
        if not isinstance(value, _TYPES[kind]):
            raise TypeError(f"the field {path!r} is of type {type(value).__name__}")
        if kind == JSON:
            value = json.dumps(value, ensure_ascii=False)
        elif kind == JSONS:
            value = [json.dumps(item, ensure_ascii=False) for item in value]
        for text in value if isinstance(value, list) else [value]:
            _check_text(path, text, kind)
        example[path] = value
    return _nested({**example, OTHER: json.dumps(rest)})


def _check_text(path: str, text: Any, kind: str) -> None:
    if kind == FLAG:
        return
    if not isinstance(text, str):
        raise TypeError(f"the field {path!r} holds {text!r}, which is not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TypeError(f"the field {path!r} holds half a character ({error.reason})") from error


def decode(example: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    """What TFDS reads (bytes and arrays) -> the raw record: official names, str, lists, dicts."""
    # OTHER still has the parents of nested fields, emptied: each field goes back to its place.
    record = json.loads(example[OTHER])
    for path, kind in kinds.items():
        *parents, leaf = path.split("/")
        place: Any = record
        value: Any = example
        for parent in parents:
            place, value = place[parent], value[parent]
        place[leaf] = _PLAIN[kind](value[leaf])
    return record


def _text(value: bytes) -> str:
    return value.decode("utf-8")


_PLAIN = {
    TEXT: _text,
    FLAG: bool,
    TEXTS: lambda values: [_text(value) for value in values],
    JSON: json.loads,
    JSONS: lambda values: [json.loads(value) for value in values],
}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"qa/question": x} -> {"qa": {"question": x}}."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return nested
