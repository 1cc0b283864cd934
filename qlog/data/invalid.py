"""Records that cannot be used: an error, or skipped and counted (`config.data.invalid`)."""

import dataclasses

from qlog.data import fields
from qlog.errors import ConfigError

CHOICES = ("error", "skip")
_MOST_TOLD = 5  # reasons: a message that quotes the value is another one each time


class InvalidRecord(ConfigError):
    """One record or example that cannot be used, whatever the others are.

    Args:
      message: one sentence.
      where: the place or id with which it begins, if it is not the record's file and line.
    """

    def __init__(self, message: str, where: str = ""):
        super().__init__(message)
        self.where = where


@dataclasses.dataclass
class Skipped:
    """Records that were skipped, by what is wrong with them.

    Attributes:
      reasons: what is wrong, how often, and the place or the id of the first.
    """

    reasons: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)

    def add(self, error: InvalidRecord, where: str) -> None:
        """Counts a record.

        Args:
          where: its file and line, where the error does not say its place.
        """
        where = error.where or where
        reason = str(error).removeprefix(where).lstrip(": ").rstrip(".")
        reason = reason.removesuffix(f", or set {fields.INVALID} to 'skip'")  # it is
        number, first = self.reasons.get(reason, (0, where))
        self.reasons[reason] = (number + 1, first)

    @property
    def number(self) -> int:
        """How many records were skipped."""
        return sum(number for number, _ in self.reasons.values())

    def lines(self) -> list[str]:
        """Each reason with its number and an example, the most frequent first."""
        order = sorted(self.reasons.items(), key=lambda item: -item[1][0])
        told = [
            f"{number} record{'s' * (number > 1)}, first {first}: {why}"
            for why, (number, first) in order
        ]
        rest = sum(number for _, (number, _) in order[_MOST_TOLD:])
        return told[:_MOST_TOLD] + (
            [f"{rest} record{'s' * (rest > 1)} for other reasons"] if rest else []
        )

    def check_some_are_left(self, size: int, name: str) -> None:
        """Raises ConfigError if all of `size` records of `name` were skipped."""
        if self.number and self.number >= size:
            raise ConfigError(
                f"{fields.INVALID} = 'skip' skips all {size} records of {name}: {self.lines()[0]}."
            )

    def __add__(self, other: "Skipped") -> "Skipped":
        both = Skipped(dict(self.reasons))
        for reason, (number, first) in other.reasons.items():
            before, place = both.reasons.get(reason, (0, first))
            both.reasons[reason] = (before + number, place)
        return both
