"""FinQA's gold programs: small arithmetic over the text's numbers and the table's rows.

A program is a list of steps such as `subtract(482, 75), divide(#0, 75)`; `#n` is the result of
step n, `const_100` the number 100, and `table_max(total assets, none)` reads the row of that name.
The rules, odd ones included, are those of the dataset's own evaluation script.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "exp": lambda a, b: a**b,
}
_ROWS: dict[str, Callable[[list[float]], float]] = {
    "table_max": max,
    "table_min": min,
    "table_sum": sum,
    "table_average": lambda row: sum(row) / len(row),
}
_DECIMALS = 5


class Step(NamedTuple):
    """One executed step: its text as annotated, and its value, a number or 'yes' / 'no'."""

    text: str
    value: float | str


def run(program: str, table: Sequence[Sequence[str]]) -> list[Step]:
    """Executes a program step by step.

    Args:
      program: the record's `qa.program`.
      table: the record's `table`, rows of cells, row names first.

    Returns:
      The steps. The value of the last one, rounded to 5 decimals, is the record's `exe_ans`.

    Raises:
      ValueError: a step that cannot be read or computed.
    """
    rows = {row[0]: row[1:] for row in table if row}
    steps: list[Step] = []
    for text in _split(program):
        name, _, rest = text.partition("(")
        # From the right: a row's name may have commas.
        left, comma, right = rest.removesuffix(")").rpartition(", ")
        if not comma:
            raise ValueError(f"cannot read the step {text!r} of the program {program!r}")
        try:
            # A table step reads a whole row; its second argument ("none") means nothing.
            if name in _ROWS:
                value = _ROWS[name]([_cell(cell) for cell in rows[left.strip()]])
            else:
                a, b = (_operand(x, steps) for x in (left, right))
                greater = "yes" if a > b else "no"
                value = greater if name == "greater" else float(_ARITHMETIC[name](a, b))
        except (KeyError, IndexError, TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"cannot compute the step {text!r} of {program!r}") from error
        steps.append(Step(text, value))
    return steps


def number_text(value: float | str) -> str:
    """A result as text: "yes", "407", "0.34719"; at most 5 decimals, no trailing zeros.

    Raises:
      ValueError: NaN, or an infinity.
    """
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a number")
    text = f"{value:.{_DECIMALS}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _split(program: str) -> list[str]:
    """The steps of a program, as text."""
    # A step ends at ")," before the next "name(": a row's name may have commas and parentheses.
    return [s.strip() for s in re.split(r"(?<=\)),\s*(?=[a-z_]+\()", program.strip())]


def _operand(text: str, steps: Sequence[Step]) -> float:
    text = text.strip()
    if not text.startswith("#"):
        return _number(text)
    value = steps[int(text[1:])].value
    if isinstance(value, str):
        raise ValueError(f"{text} is {value!r}, which is not a number")
    return value


def _number(text: str) -> float:
    """A number as programs write it: "1,234", "34.7%", "const_100", "const_m1" (which is -1)."""
    text = text.strip().replace(",", "")
    if text.startswith("const_"):
        text = text.removeprefix("const_").replace("m", "-")
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def _cell(text: str) -> float:
    """A table cell as a number; "-119 ( 119 )" and "$ 75" are -119 and 75."""
    return _number(text.replace("$", "").split("(")[0])
