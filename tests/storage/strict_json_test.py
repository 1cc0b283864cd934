"""JSON that every reader takes."""

import json

import pytest

from qlog.storage import strict_json


def test_numbers_that_are_not_finite_become_strings():
    value = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (-float("inf"), None)}}
    text = strict_json.dumps(value, indent=1)
    found = json.loads(text, parse_constant=pytest.fail)  # called for NaN and Infinity
    assert found == {"a": "nan", "b": [1.5, "inf"], "c": {"d": ["-inf", None]}}
