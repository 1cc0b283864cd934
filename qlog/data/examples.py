"""What a task is made of: examples, and the words that introduce them."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qlog.data import fields
from qlog.data.invalid import InvalidRecord


@dataclasses.dataclass(frozen=True)
class Example:
    """One supervised example (x*, y*).

    Attributes:
      id: the dataset's own id; splits, sampling keys and logs refer to it.
      source: context and question as one text, without instructions.
      answer: the gold answer as it is scored and trained on.
      aliases: other answers that the dataset counts as right.
      rationale: an annotated rationale, which only supervised fine-tuning uses; '' if none.
      official_answer: what the dataset's own script scores where that is not `answer`
        (FinQA's executed value, "0.34719"); '' if they are the same.
      extra: what else the record holds, by name, for rewards and metrics of your own; values as
        JSON has them (`as_json`).
    """

    id: str
    source: str
    answer: str
    aliases: tuple[str, ...] = ()
    rationale: str = ""
    official_answer: str = ""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def wrong_id(value: object) -> str:
    """What is wrong with an id, as the end of a sentence; '' if nothing is."""
    if not isinstance(value, str):
        return f"has the id {value!r:.60}, which must be text"
    if has_half_characters(value):
        return f"has half a character in its id {value!r:.60}"
    return "" if value.strip() else "has an empty id"


def as_json(value: Any, key: str = "") -> Any:
    """A value of `extra` as it is after JSON, in which samples are kept.

    So a reward sees in training what a metric sees of samples: tuples are lists, and scalars of
    numpy are Python's.

    Args:
      key: where the value is in `extra`, for messages.

    Raises:
      ValueError: JSON does not have it; the message is the end of a sentence.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and not has_half_characters(value):
        return str(value)  # of a subclass the plain text
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, list | tuple):
        return [as_json(each, f"{key}.{index}") for index, each in enumerate(value)]
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str) or has_half_characters(name):
                raise ValueError(f"has the key {name!r:.60} in its extra: keys must be texts")
        return {name: as_json(each, f"{key}.{name}") for name, each in value.items()}
    raise ValueError(
        f"has {value!r:.60} ({type(value).__name__}) in its extra at {key.lstrip('.')!r}, which "
        "JSON does not have: leave it out, or write it as a text or a finite number"
    )


def has_half_characters(text: str) -> bool:
    """Whether a text holds surrogates, which UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


@dataclasses.dataclass(frozen=True)
class Task:
    """How a dataset is put into words.

    Attributes:
      name: as in `data.name`.
      description: what the task is and how to write the answer; the warm style opens with it.
      to_example: one record with the official field names -> Example; None for a task that
        makes its examples on the fly.
    """

    name: str
    description: str
    to_example: Callable[[Mapping[str, Any]], Example] | None = None


class Converted(Sequence[Example]):
    """Records seen as examples; each is converted when it is asked for.

    Asking for a record whose fields are not as in the official files raises ConfigError.

    Args:
      records: with the official field names.
      task: its `to_example` converts them.

    Attributes:
      records: as given.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], task: Task):
        if task.to_example is None:
            raise ValueError(f"task {task.name!r} makes its own examples and reads no records")
        self.records = records
        self._name, self._to_example = task.name, task.to_example

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        try:
            return self._to_example(record)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            where = f"{self._name}: record {record.get('id', record.get('_id', index))!r}"
            raise InvalidRecord(
                f"{where} is not as the official files have them ({type(error).__name__}: {error}):"
                f" restore them in {fields.MANUAL_DIR} or {fields.FILES}, or set {fields.INVALID} "
                "to 'skip'.",
                where,
            ) from error
