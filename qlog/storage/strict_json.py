"""JSON as every reader takes it: Python's own would write NaN and Infinity, which are not JSON."""

import json
import math
from collections.abc import Mapping
from typing import Any


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
