"""Values of Parquet as JSON would hold them.

Each is converted for itself: one that Python cannot hold (nanoseconds, a year beyond 9999, text
that is not UTF-8) is no fault of the other columns.
"""

import base64
import datetime
import decimal
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

# Not above, and inside functions below: most runs read no Parquet.
if TYPE_CHECKING:
    import pyarrow as pa


class Binary(str):
    """A binary value: base64, since JSON has no bytes; `text` is what they spell."""

    def text(self) -> str:
        """The bytes as UTF-8, as which some writers store text; raises UnicodeDecodeError."""
        return base64.b64decode(self).decode()


class Unconverted(str):
    """A value that Python cannot hold, as a text about it; no part of an example can be made of it.

    Args:
      text: the value, as far as it can be written.
      kind: its type in the file, such as timestamp[ns].

    Attributes:
      wrong: what is wrong with it, as the end of a sentence.
    """

    wrong: str

    def __new__(cls, text: str, kind: str):
        made = super().__new__(cls, text)
        made.wrong = f"is the {kind} {text!r:.60}, which cannot be read as text or a number"
        return made


def as_json(scalar: "pa.Scalar") -> Any:
    """A value as JSON would hold it; NaN, which pandas writes for missing, is None.

    Numbers keep the digits that they have in the file: 0.1 of a float32 is 0.1, and a decimal that
    no JSON number spells is a text.
    """
    import pyarrow as pa

    if not scalar.is_valid:
        return None
    try:
        if isinstance(scalar, pa.DictionaryScalar):
            return as_json(scalar.value)
        if isinstance(scalar, pa.ExtensionScalar) and pa.types.is_nested(scalar.value.type):
            return as_json(scalar.value)
        if isinstance(scalar, pa.MapScalar):
            return [[as_json(pair[0]), as_json(pair[1])] for pair in scalar.values]
        if isinstance(scalar, pa.ListScalar):  # those of fixed size, too
            return [as_json(each) for each in scalar.values]
        if isinstance(scalar, pa.StructScalar):
            return _object(scalar)
        if pa.types.is_float16(scalar.type) or pa.types.is_float32(scalar.type):
            # As a float64, 0.1 would be 0.10000000149011612; its shortest digits are 0.1.
            short = np.float16 if pa.types.is_float16(scalar.type) else np.float32
            return _plain(float(str(short(scalar.as_py()))))
        return _plain(scalar.as_py())
    except (pa.ArrowException, ValueError, LookupError, OverflowError):
        return Unconverted(_written(scalar), str(scalar.type))


def _object(scalar: "pa.StructScalar") -> Any:
    names = [field.name for field in scalar.type]
    values = [as_json(scalar[index]) for index in range(len(names))]
    if len(set(names)) < len(names):
        return Unconverted(repr(list(zip(names, values, strict=True))), "struct of repeated names")
    return dict(zip(names, values, strict=True))


def _plain(value: Any) -> Any:
    """A value of Python that has no others inside; ValueError for infinity."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and math.isinf(value):
        raise ValueError("JSON has no such number")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return _number(value)
    if isinstance(value, bytes):
        return Binary(base64.b64encode(value).decode())
    return value if isinstance(value, str | int | float | None) else str(value)


def _number(value: decimal.Decimal) -> int | float | str:
    """The number that JSON writes with the same digits; without one the digits as a text."""
    if value == value.to_integral_value():
        return int(value)
    digits = format(value, "f").rstrip("0")  # 1.10 is JSON's 1.1
    number = float(value)
    return number if json.dumps(number) == digits else digits


def _written(scalar: "pa.Scalar") -> str:
    """What can be said of a value that Python cannot hold."""
    import pyarrow as pa

    if isinstance(scalar, pa.StringScalar):  # large ones, too
        return scalar.as_buffer().to_pybytes().decode(errors="backslashreplace")
    try:
        return scalar.cast(pa.string()).as_py()
    except (pa.ArrowException, ValueError):
        return str(getattr(scalar, "value", "")) or "value"  # of times: the number that is stored
