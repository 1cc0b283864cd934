"""Your own data as examples: the fields of a file's records, and functions that return examples.

A config's `data.fields` says which key of a record is which part of an example:

    {"id": "uid",                        the id; without one, or with "", a digest of the record
     "source": "{text}\\n\\nQ: {ask}",     a key, a list of keys (joined by blank lines), or a text
                                         with keys in braces
     "answer": "answers.text.0",         dots lead into objects and lists
     "aliases": "answers.text",          a list of texts, or one
     "rationale": "why"}

Parts that are not named there have keys of the same names.
"""

import collections
import dataclasses
import hashlib
import inspect
import json
import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from qlog.data import fields, record_files
from qlog.data.examples import Example, as_json, has_half_characters, wrong_id
from qlog.data.invalid import InvalidRecord, Skipped
from qlog.data.parquet_values import Binary, Unconverted
from qlog.data.record_files import Record, RecordFiles
from qlog.errors import ConfigError, let_signals_pass, summary

PARTS = ("id", "source", "answer", "aliases", "rationale")
_REQUIRED = ("source", "answer")
_MISSING = object()  # not None, which is JSON's null


class _Piece(NamedTuple):
    """A literal text, then the value of a key."""

    text: str
    key: str  # '' where only the text is meant


class Reader:
    """Turns records into examples.

    Args:
      names: `config.data.fields`.

    Raises:
      ConfigError: an unknown part, or keys that are no text.
    """

    def __init__(self, names: Mapping[str, Any]):
        for part, keys in names.items():
            if part == "id" and keys == "":
                continue  # digests, although the records have a key 'id'
            if part not in PARTS:
                raise ConfigError(
                    f"{fields.FIELDS}.{part} = {keys!r} is read by nothing"
                    f"{fields.closest(part, PARTS)}: an example has {', '.join(PARTS)}."
                )
            texts = keys if part == "source" and isinstance(keys, list | tuple) else [keys]
            if not texts or not all(isinstance(key, str) and key for key in texts):
                several = ", or a list of keys" if part == "source" else ""
                raise ConfigError(
                    f"{fields.FIELDS}.{part} = {keys!r} must be a key of the records{several}."
                )
        self._named = frozenset(part for part in names if names[part])  # parts that the user named
        self._keys = {part: names.get(part, part) for part in PARTS}
        self._source = _pieces(self._keys["source"])
        plain = [key for part, key in self._keys.items() if part != "source"]
        self._used = {*plain, *(piece.key for piece in self._source)}

    def example(self, record: Record, where: str) -> Example:
        """One record as an example.

        Args:
          where: the record's file and line, for messages.

        Raises:
          InvalidRecord: a part is missing, or of another type.
        """
        # Only answers may be numbers: graders compare texts, and how a number is written is fixed.
        answer = self._text(record, "answer", self._keys["answer"], where, numbers=True)
        if not answer.strip():
            raise InvalidRecord(
                f"{where}: the field {self._keys['answer']!r} is empty: leave the record "
                f"out, or set {fields.INVALID} to 'skip'."
            )
        source = "".join(
            piece.text + (self._text(record, "source", piece.key, where) if piece.key else "")
            for piece in self._source
        )
        if not source.strip():
            raise InvalidRecord(
                f"{where}: the source is empty: leave the record out, or set {fields.INVALID} to "
                "'skip'."
            )
        rationale = ""
        if _find(record, self._keys["rationale"]) not in (_MISSING, None):
            rationale = self._text(record, "rationale", self._keys["rationale"], where)
        extra = {key: value for key, value in record.items() if key not in self._used}
        try:
            extra = as_json(extra)  # JSON's own 1e999 is read as infinity
        except ValueError as error:
            raise InvalidRecord(f"{where} {error}.") from error
        return Example(
            id=self.id(record, where),
            source=source,
            answer=answer,
            aliases=self._aliases(record, answer, where),
            rationale=rationale,
            extra=extra,
        )

    def empty_parts(self, record: Record) -> list[str]:
        """The keys of the source that are blank in this record, such as an empty context."""
        return [
            piece.key
            for piece in self._source
            if piece.key and not str(_find(record, piece.key)).strip()
        ]

    def id(self, record: Record, where: str) -> str:
        """The record's id; a digest of its content where it has none."""
        key = self._keys["id"]
        value = _find(record, key) if key else None
        if value in (_MISSING, None) and "id" not in self._named:
            # Of the content, not of the place: the drawn splits stay when lines are moved.
            text = json.dumps(record, sort_keys=True, ensure_ascii=False)
            return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        text = self._text(record, "id", key, where)
        if wrong := wrong_id(text):
            raise InvalidRecord(f"{where} {wrong}: give each record its own, or leave the key out.")
        return text

    def check_named(self, records: Sequence[Record]) -> None:
        """Raises ConfigError for a key that the user named and no record has.

        Parts that an example may lack would be left out without a word.
        """
        for part in sorted(self._named - {"id", *_REQUIRED}):
            key = self._keys[part]
            if all(_find(record, key) is _MISSING for record in records):
                raise ConfigError(
                    f"{fields.FIELDS}.{part} = {key!r}: no record has this field"
                    f"{fields.closest(key, records[0])}; the first has {_listed(records[0])}."
                )

    def _text(self, record: Record, part: str, key: str, where: str, numbers: bool = False) -> str:
        """The text of a field; numbers and booleans as JSON writes them, if they are allowed."""
        value = _find(record, key)
        if value is _MISSING:
            raise InvalidRecord(
                f"{where} has no field {key!r}{fields.closest(key, record)}, it has "
                f"{_listed(record)}: name the key of the {part} in {fields.FIELDS}.{part}."
            )
        if numbers and isinstance(value, bool | int):
            return json.dumps(value)
        if numbers and isinstance(value, float) and math.isfinite(value):  # 1e999 is read as inf
            return json.dumps(value)
        if isinstance(value, Binary):
            try:
                return value.text()
            except UnicodeDecodeError as error:
                raise InvalidRecord(
                    f"{where}: the field {key!r} is binary and not UTF-8 ({error.reason}), but the "
                    f"{part} must be text: write the column as strings."
                ) from error
        if isinstance(value, Unconverted):
            raise InvalidRecord(
                f"{where}: the field {key!r} {value.wrong}: write the column as strings."
            )
        if not isinstance(value, str):
            if isinstance(value, list) and part == "answer" and value:
                raise InvalidRecord(
                    f"{where}: the field {key!r} is the list {_short(value)}, but must be one "
                    f"text: name one of its elements, {fields.FIELDS}.answer = '{key}.0', and the "
                    f"list in {fields.FIELDS}.aliases."
                )
            kind = "null" if value is None else f"{_short(value)}"
            allowed = "text, a number, true or false" if numbers else "text"
            raise InvalidRecord(f"{where}: the field {key!r} is {kind}, but must be {allowed}.")
        if has_half_characters(value):
            raise InvalidRecord(
                f"{where}: the field {key!r} holds half a character (a surrogate): write it as "
                "UTF-8."
            )
        return value

    def _aliases(self, record: Record, answer: str, where: str) -> tuple[str, ...]:
        key = self._keys["aliases"]
        value = _find(record, key)
        if value in (_MISSING, None):
            return ()
        values = value if isinstance(value, list) else [value]
        texts = [self._text({key: each}, "aliases", key, where, numbers=True) for each in values]
        # In the order of the file, without repetitions, as for the official datasets.
        return tuple(dict.fromkeys(text for text in texts if text.strip() and text != answer))


class _Chosen(Sequence[Record]):
    """Some of the records; each is read when it is asked for."""

    def __init__(self, records: RecordFiles, indices: Sequence[int]):
        self._records, self._indices = records, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index):
        return self._records[self._indices[index]]


class OwnExamples(Sequence[Example]):
    """Examples of files; each is read when it is asked for.

    Args:
      records: the files' records.
      reader: turns them into examples.
      skip_invalid: whether records that are no examples are left out and counted.

    Attributes:
      ids: the examples' ids, in their order.
      skipped: the records that were left out.
      notes: what else a user should hear of, in sentences.

    Raises:
      ConfigError: a record that is no example, two with the same id, a key that no record has.
    """

    def __init__(self, records: RecordFiles, reader: Reader, skip_invalid: bool = False):
        self._records, self._reader = records, reader
        self.skipped = Skipped()
        empty: collections.Counter[str] = collections.Counter()
        first: dict[str, str] = {}

        def id_of(index: int) -> str:
            record, where = records[index], records.where(index)
            example = reader.example(record, where)
            for key in reader.empty_parts(record):
                empty[key] += 1
                first.setdefault(key, where)
            return example.id

        # One pass at the start: what is wrong in line 900,000 shows now, and not on the third day.
        found = record_files.usable(records, id_of, self.skipped if skip_invalid else None)
        self.ids, self._indices = found.ids, found.indices
        reader.check_named(_Chosen(records, found.indices))
        self.notes = [
            f"{number} of {len(self.ids)} records have an empty {key!r} (first {first[key]}): "
            "their source is what is left"
            for key, number in empty.items()
        ]

    def selected(self, indices: Sequence[int]) -> "OwnExamples":
        """These examples only, in this order."""
        chosen = object.__new__(OwnExamples)
        chosen._records, chosen._reader = self._records, self._reader
        chosen._indices = [self._indices[index] for index in indices]
        chosen.skipped, chosen.notes = self.skipped, self.notes
        chosen.ids = [self.ids[index] for index in indices]
        return chosen

    def __len__(self) -> int:
        return len(self._indices)

    def where(self, index: int) -> str:
        """The file and line or row of an example, for messages."""
        return self._records.where(self._indices[index])

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        place = self._indices[index]
        where = self._records.where(place)
        example = self._reader.example(self._records[place], where)
        # Places in the file were noted at the start: in a file that was edited since, they point
        # into other records.
        if example.id != self.ids[index]:
            raise ConfigError(f"{where} changed while it was read: start again when it is whole.")
        return example


def _pieces(keys: str | Sequence[str]) -> list[_Piece]:
    """What a source is made of."""
    if not isinstance(keys, str):
        return [_Piece("\n\n" if i else "", key) for i, key in enumerate(keys)]
    if "{" not in keys and "}" not in keys:
        return [_Piece("", keys)]
    try:
        parsed = list(string.Formatter().parse(keys))
    except ValueError as error:
        raise ConfigError(
            f"{fields.FIELDS}.source = {keys!r}: {error}; write {{key}} for a field, and {{{{ for "
            "a brace."
        ) from error
    pieces = []
    for text, key, form, conversion in parsed:
        if key == "" or form or conversion:
            raise ConfigError(
                f"{fields.FIELDS}.source = {keys!r}: write only keys in braces, as in "
                "'{context}\\n\\n{question}'."
            )
        pieces.append(_Piece(text, key or ""))
    return pieces


def _find(record: Record, key: str) -> Any:
    """The value of a key, or of a path with dots ('qa.question', 'answers.0')."""
    if key in record:  # keys may have dots
        return record[key]
    value: Any = record
    for part in key.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _MISSING
    return value


def _listed(record: Record) -> str:
    return ", ".join(map(repr, record)) or "none"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- Functions ----


def check_function(function: Callable[..., Any]) -> None:
    """Whether `data.name` can be this function.

    Raises:
      ConfigError: it has no name that config.json could keep, or takes other arguments than one.
    """
    if not hasattr(function, "__qualname__"):
        raise ConfigError(
            f"{fields.NAME} is an object of type {type(function).__name__}, which has no name that "
            "config.json could keep: give a function made with def that returns the examples of a "
            "split."
        )
    try:
        # Asked, not called: it may read gigabytes.
        inspect.signature(function).bind("train")
    except TypeError as error:
        raise ConfigError(
            f"{fields.NAME} = {function.__qualname__} must be a function of one argument, the "
            f"name of a split ({error})."
        ) from error
    except ValueError:  # some builtins do not say what they take
        pass


class CheckedExamples(Sequence[Example]):
    """What a function returned for a split; each example is checked when it is asked for.

    Args:
      function: `data.name`.
      split: is called with it.

    Raises:
      ConfigError: the function raised, or returned no sequence; an example of wrong types.
    """

    def __init__(self, function: Callable[[str], Sequence[Example]], split: str):
        self._call = f"{function.__qualname__}({split!r})"
        try:
            examples = function(split)
        except BaseException as error:  # whatever the function raises
            let_signals_pass(error)
            raise ConfigError(
                f"{fields.NAME}: {self._call} raised {type(error).__name__}: {summary(error)}."
            ) from error
        # Texts and dictionaries have a length, too, and keys or letters where examples should be.
        has_both = hasattr(examples, "__len__") and hasattr(examples, "__getitem__")
        if not has_both or isinstance(examples, str | bytes | Mapping):
            raise ConfigError(
                f"{fields.NAME}: {self._call} returned an object of type "
                f"{type(examples).__name__}: return a list of qlog.data.Example, or another "
                "object with len and indexing."
            )
        try:
            self._examples, self._size = examples, len(examples)
        except BaseException as error:
            let_signals_pass(error)
            raise ConfigError(
                f"{fields.NAME}: len({self._call}) raised {type(error).__name__}: {summary(error)}."
            ) from error

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        try:
            example = self._examples[index]
        except BaseException as error:  # the user's Sequence may compute its examples
            let_signals_pass(error)
            raise ConfigError(
                f"{fields.NAME}: {self._call}[{index}] raised {type(error).__name__}: "
                f"{summary(error)}."
            ) from error
        if wrong := _wrong(example):
            where = f"{fields.NAME}: {self._call}[{index}]"
            raise InvalidRecord(f"{where} {wrong}.", where)
        try:
            extra = as_json(example.extra)
        except ValueError as error:
            where = f"{fields.NAME}: {self._call}[{index}] (id {example.id!r})"
            raise InvalidRecord(f"{where} {error}.", where) from error
        return dataclasses.replace(example, aliases=tuple(example.aliases), extra=extra)


def _wrong(example: object) -> str:
    """What is wrong with an example, as the end of a sentence; '' if nothing is."""
    if not isinstance(example, Example):
        return f"is an object of type {type(example).__name__}, but must be a qlog.data.Example"
    if wrong := wrong_id(example.id):
        return wrong
    for part in ("id", "source", "answer", "rationale", "official_answer"):
        value = getattr(example, part)
        if not isinstance(value, str):
            return f"has the {part} {_short(value)}, which must be text"
        if part in ("source", "answer") and not value.strip():
            return f"has an empty {part}"
        if has_half_characters(value):
            return f"has half a character in its {part} {_short(value)}"
    # A text would be taken for a sequence of letters, each of them a right answer. A set has
    # another order in each process.
    aliases: object = example.aliases
    if not isinstance(aliases, tuple | list) or not all(isinstance(a, str) for a in aliases):
        return f"has the aliases {_short(aliases)}, which must be a tuple of texts"
    if any(map(has_half_characters, aliases)):
        return f"has half a character in its aliases {_short(aliases)}"
    if not isinstance(example.extra, Mapping):
        return f"has the extra {_short(example.extra)}, which must be a mapping"
    return ""
