"""What a task is made of: examples, and the words that introduce them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlog.data import fields
from qlog.errors import ConfigError


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
        JSON has them.
    """

    id: str
    source: str
    answer: str
    aliases: tuple[str, ...] = ()
    rationale: str = ""
    official_answer: str = ""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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
            raise ConfigError(
                f"{self._name}: record {record.get('id', record.get('_id', index))!r} is not as "
                f"the official files have them ({type(error).__name__}: {error}): restore them in "
                f"{fields.MANUAL_DIR} or {fields.FILES}."
            ) from error
