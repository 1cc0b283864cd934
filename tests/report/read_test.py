"""Runs whose files hold anything are read all the same: what cannot be used is left out."""

import json

import pytest
import tiny

from qlog.config import schema
from qlog.report import read

_HUGE = 10**400
ODD = [
    "",
    "5",
    "{}",
    "[]",
    "[" * 100_000,
    "9" * 6000,
    '{"step": "three", "metrics": {}, "evaluation": [], "released": 1, "status": "x"}',
    '{"three": {"value": 1}, "3": {"value": "x"}, "4": 1, "5": {}}',
    '{"ids": [1], "p@1": ["x"]}',
    '{"owner": "x", "time": "now", "step": [], "pid": "x"}',
    # Whole numbers that no float holds, and a step that `int` refuses.
    "9" * 400,
    json.dumps({"owner": "x", "host": "y", "time": _HUGE, "step": _HUGE}),
    json.dumps({"step": _HUGE, "metrics": {}, "evaluation": {"rollouts_per_prompt": _HUGE}}),
    json.dumps({"9" * 6000: {"value": 0.5, "of": "m@4"}}),
    json.dumps({"ids": ["a"], "p@1": [_HUGE]}),
]
FILES = ("results.json", "scores.json", "owner.json", "final.json", "seconds.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ODD, ids=range(len(ODD)))
def test_a_file_of_a_run_may_hold_anything(content, name, tmp_path):
    (tmp_path / "config.json").write_text(schema.to_json(tiny.config()))
    (tmp_path / name).write_text(content)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "final.jsonl").write_text(content)
    (tmp_path / "metrics.jsonl").write_text(f"{content}\n{json.dumps({'step': 1})}\n")
    (run,) = read.read(read.find([str(tmp_path)]))
    assert run.steps == [] and run.scores == {}
