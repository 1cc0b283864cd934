"""The page about rewards: its config trains, and its functions say what the page says."""

import pathlib
import re

import jax
import pytest
import tiny

from qlog import grading
from qlog.config import schema
from qlog.grading.scorers import Sample, read
from qlog.runs.log import read_jsonl

PAGE = pathlib.Path(grading.__file__).with_name("README.md").read_text()
(CONFIG,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_config_of_the_page_trains(tmp_path):
    names = {"__name__": "page"}
    exec(CONFIG, names)
    config = schema.merge(
        names["get_config"](),
        {
            "train": {"steps": 2, "prompts_per_step": 2},
            "evaluation": {"every": 2, "prompts": 3, "rollouts_per_prompt": 2},
        },
    )
    outcome = tiny.run(config, tmp_path, jax.devices()[:1])
    trained = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if row["phase"] == "train"]
    for row in trained:
        parts = (row["reward/exact_match"], 0.2 * row["reward/in_brackets"], row["reward/too_long"])
        assert row["reward"] == pytest.approx(sum(parts), abs=1e-6)
    for name in ("walked_home", "squad_f1"):
        for end in ("", "/low", "/high", "/errors"):
            assert f"metrics/{name}{end}" in outcome.metrics
    assert "reward/too_long" in read_jsonl(tmp_path / "rollouts.jsonl")[0]


def test_the_page_names_what_there_is():
    for field in Sample._fields:
        assert f"`{field}`" in PAGE
    for name in grading.graders.GRADERS:
        assert f"`{name}`" in PAGE
    names = {"__name__": "page"}
    exec(CONFIG, names)
    sample = Sample("", "amy bob", "answer [ met bob ]", ["answer [ met bob ]"], "", None)
    (bracket,) = read(names["in_brackets"], "f")
    assert (bracket(sample), bracket(sample._replace(answer="bob"))) == (1.0, 0.0)
    (long,) = read(names["too_long"], "f")
    assert long(sample) == -0.002
