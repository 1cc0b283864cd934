"""Checks of arguments, one sentence per error: the name, the value, what is allowed."""

import difflib
from collections.abc import Iterable

import numpy as np
from jax.core import Tracer


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raises unless `value` is traced, or a real number or array with all of it in [low, high].

    Raises:
      TypeError: not a real number.
      ValueError: out of range, or NaN.
    """
    if isinstance(value, Tracer):
        return  # its value is known only when the program runs
    numbers = np.asarray(value)
    if numbers.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be a number in [{low}, {high}], got {value!r}")
    # NaN fails both comparisons, so it is refused too.
    if not np.all((low <= numbers) & (numbers <= high)):
        raise ValueError(f"{name} must be in [{low}, {high}], got {value!r}")


def check_integer(name: str, value: object, low: int = 1) -> None:
    """Raises unless `value` is a Python integer of at least `low`: it fixes a shape or a length.

    Raises:
      TypeError: not an integer; True and False are not integers here.
      ValueError: below `low`.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least {low}, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value!r}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`; a misspelt word gets a suggestion."""
    choices = tuple(choices)
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {listed}, got {value!r}{closest(value, choices)}")


def closest(value: object, choices: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the choice that `value` is close to, '' where there is none."""
    close = difflib.get_close_matches(str(value), list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
