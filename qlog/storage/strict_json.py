"""JSON as every reader takes it, and JSON that others wrote.

Written: Python's own `dumps` would write NaN and Infinity, which are not JSON. Read: `loads` takes
bytes from anywhere and raises nothing but `Unreadable`, whatever they are.
"""

import codecs
import json
import math
from collections.abc import Mapping
from typing import Any

from qlog.storage import git_lfs

# Lists and objects inside of each other. Functions that walk through a value call themselves once
# or twice per level, and Python allows 1,000 calls.
MAX_DEPTH = 100
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Unreadable(ValueError):
    """Bytes that are not the text or the JSON that they should be.

    Args:
      what: what is wrong, as the end of a sentence: "is UTF-16 and not UTF-8".
      remedy: what to do about it; '' where only the reader knows.
    """

    def __init__(self, what: str, remedy: str = ""):
        super().__init__(f"{what}: {remedy}" if remedy else what)
        self.what, self.remedy = what, remedy

    def after(self, name: object, remedy: str) -> str:
        """A whole sentence about the file or line `name`; `remedy` where there is no better one."""
        return f"{name} {self.what}: {self.remedy or remedy}."


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps`, but numbers that are not finite become the strings 'nan', 'inf' and '-inf'.

    So they stay visible, and can be told from what is absent.
    """
    return json.dumps(finite(value), **options, allow_nan=False)


def finite(value: Any) -> Any:
    """`value` with strings in the place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def text(content: bytes) -> str:
    """UTF-8 as text, without the mark U+FEFF that some editors write first.

    Raises:
      Unreadable: another encoding, or a pointer of Git LFS.
    """
    if git_lfs.is_pointer(content):
        what, remedy = git_lfs.SENTENCE.split(": ", 1)
        raise Unreadable(what, remedy)
    if is_utf16(content):
        raise Unreadable("is UTF-16 and not UTF-8", "save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"is not UTF-8 ({error.reason})", "save it as UTF-8, or download it again"
        ) from error


def is_utf16(content: bytes) -> bool:
    """Whether the first bytes of a file are those of a text in UTF-16, with its mark or without."""
    # Without a mark, every other byte of ASCII is 0. No text in UTF-8 has that.
    return content.startswith(_UTF16_MARKS) or (
        len(content) >= 4 and content[:4].count(0) == 2 and (content[0] == 0) != (content[1] == 0)
    )


def loads(content: bytes | str, *, unique_keys: bool = False) -> Any:
    """A JSON value that others wrote.

    Args:
      content: in UTF-8.
      unique_keys: whether an object that has a key twice is refused; Python keeps the last value.

    Raises:
      Unreadable: not UTF-8, not JSON (NaN is not), nested deeper than MAX_DEPTH, or a whole number
        of more digits than Python reads.
    """
    given = text(content) if isinstance(content, bytes) else content.removeprefix("\ufeff")
    hook = _unique if unique_keys else None
    try:
        value = json.loads(given, parse_constant=_refuse_constant, object_pairs_hook=hook)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        if "digits" in reason:  # Python names a function of its own as the remedy
            raise Unreadable(
                "holds a whole number of over 4,000 digits", "write it as a text"
            ) from None
        raise Unreadable(f"is not JSON ({reason})") from None
    # Few values have so many brackets: only these are walked through.
    if given.count("[") + given.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise _too_deep()
    return value


def _too_deep() -> Unreadable:
    return Unreadable(
        f"has lists or objects more than {MAX_DEPTH} deep in each other", "flatten it"
    )


def _depth(value: Any) -> int:
    """How deep lists and objects lie in each other; stops beyond MAX_DEPTH."""
    depth, level = 0, [value]
    # Level by level: a function that calls itself would fail where this has to tell.
    while depth <= MAX_DEPTH:
        level = [each for each in level if isinstance(each, dict | list)]
        if not level:
            break
        depth += 1
        level = [
            child for each in level for child in (each.values() if isinstance(each, dict) else each)
        ]
    return depth


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON value")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is there twice")
    return found
