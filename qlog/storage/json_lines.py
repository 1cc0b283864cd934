"""JSON lines: text with one JSON value on each line."""

import json
from typing import Any


def line(value: Any) -> str:
    """The line of a value, with its newline at the end."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def split(text: str) -> list[str]:
    """The lines of `text` that hold something.

    A last line that was cut short is among them: `json.loads` raises for it.
    """
    # Not str.splitlines, which also splits at the line separators of Unicode (U+2028). JSON allows
    # them inside of a string.
    return [line for line in text.split("\n") if line]
