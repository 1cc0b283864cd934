"""JSON lines: text with one JSON value on each line."""

from typing import Any

from qlog.storage import strict_json


def line(value: Any) -> str:
    """The line of a value, with its newline at the end; as `strict_json.dumps` writes it."""
    return strict_json.dumps(value, ensure_ascii=False) + "\n"


def split(text: str) -> list[str]:
    """The lines of `text` that hold something.

    A last line that was cut short is among them: `json.loads` raises for it.
    """
    # Not str.splitlines, which also splits at the line separators of Unicode (U+2028). JSON allows
    # them inside of a string.
    return [line for line in text.split("\n") if line]


def loads(content: bytes) -> list[Any]:
    """The values of `numbered`."""
    return [value for _, value in numbered(content)]


def numbered(content: bytes) -> list[tuple[int, Any]]:
    """The values of a file of JSON lines that others wrote, each after the number of its line.

    Lines are counted from 1; blank ones are left out.

    Raises:
      strict_json.Unreadable: it is no text in UTF-8, or a line is not JSON ("line 3 is not ...").
    """
    values = []
    for number, each in enumerate(strict_json.text(content).split("\n"), 1):
        if not each.strip():
            continue
        try:
            values.append((number, strict_json.loads(each)))
        except strict_json.Unreadable as error:
            raise strict_json.Unreadable(f"line {number} {error.what}", error.remedy) from None
    return values
