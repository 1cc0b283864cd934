"""The first page, and the page for those who come from elsewhere: their code runs, as printed."""

import json
import re
import runpy

import data_fixtures
import jax
import numpy as np
import pytest
import tiny
from places import ROOT

from qlog.config import schema
from qlog.runs.log import read_jsonl

README = (ROOT / "README.md").read_text()
TRL = (ROOT / "qlog/FROM_TRL_OR_TUNIX.md").read_text()
# A model and lengths with which the printed configs train in seconds.
SMALL = {
    "model": "qwen3_0p6b",
    "weights": "random",
    "dtype": "float32",
    "architecture": dict(
        vocab_size=384,
        num_layers=1,
        width=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_width=16,
    ),
    "data": {"max_prompt_tokens": 128},
    "rollout": {"rollouts_per_prompt": 2, "rationale_budget": 4, "answer_reserve": 8},
    "train": {"steps": 1, "prompts_per_step": 2, "remat": "none"},
    "evaluation": {"every": 0},
}


def python(page):
    return re.findall(r"```python\n(.*?)```", page, re.S)


def test_the_first_page_is_short():
    assert len(README.splitlines()) <= 150
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).stat().st_size < 150_000, picture


def test_the_losses_of_the_first_page_run():
    names = {}
    exec(python(README)[0], names)
    for part in names["coefficients"]:
        assert part.shape == (2, 3) and np.all(np.isfinite(part))
    # Clipped to 5 / M, as the chain says.
    assert np.abs(names["coefficients"].path).max() <= 5 / 3


@pytest.mark.parametrize(
    "page, file, key",
    [
        pytest.param(README, "questions.jsonl", "question", id="README"),
        pytest.param(TRL, "prompts.jsonl", "prompt", id="from TRL"),
    ],
)
def test_a_config_of_ones_own_trains_as_printed(page, file, key, tmp_path, monkeypatch):
    (text,) = (block for block in python(page) if block.startswith("# mine.py"))
    lines = [{key: f"What is {i} + 3?", "answer": f"{i + 3}"} for i in range(8)]
    (tmp_path / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "tokenizer").mkdir()
    data_fixtures.write_spec(tmp_path / "tokenizer", data_fixtures.byte_level_spec())
    monkeypatch.chdir(tmp_path)
    config = schema.merge(runpy.run_path("mine.py")["get_config"](), SMALL)
    config.tokenizer.path = "tokenizer"
    tiny.run(config, tmp_path / "run", jax.devices()[:1])
    (row,) = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert np.isfinite(row["grad_norm"]) and "reward" in row
