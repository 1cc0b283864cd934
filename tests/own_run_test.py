"""A run as its user has it: qlog installed as a wheel, everything else in a folder of one's own."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import pytest
from places import ROOT

from qlog.runs.log import read_jsonl

_CONFIG = '''
"""Sums, from my own file, with my own reward and metric."""

from my_rewards import near

from qlog.config import default, loss, merge


def is_number(*, answer, example, **_):
    assert example.extra["level"] in (1, 2)
    return answer.strip().lstrip("-").isdigit()


def get_config():
    return merge(
        default(),
        {
            "dtype": "float32",
            "architecture": dict(
                vocab_size=48, num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_dim=8,
                mlp_width=16,
            ),
            "tokenizer": {"path": "tokenizer"},
            "data": {
                "name": "jsonl",
                "files": {"train": "sums-*.jsonl"},
                "fields": {"source": "question", "answer": "result.value"},
                "description": "Add the numbers.",
                "style": "warm",
                "max_prompt_tokens": 48,
            },
            "loss": loss("grpo"),
            "rollout": {
                "rollouts_per_prompt": 4,
                "rationale_budget": 4,
                "answer_reserve": 6,
                "reward": [("exact_match", 1.0), (near, 0.5)],
            },
            "train": {"steps": 2, "prompts_per_step": 4, "rollouts_every": 1, "remat": "none"},
            "evaluation": {
                "every": 2, "prompts": 4, "prompts_per_batch": 4, "rollouts_per_prompt": 2,
                "metrics": [is_number],
            },
        },
    )
'''

_REWARDS = '''
def near(*, answer, golds, **_):
    """1 for the right number, less the further away it is."""
    try:
        return 1 / (1 + abs(int(answer) - int(golds[0])))
    except ValueError:
        return 0.0
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with qlog alone, from its wheel; what it depends on is that of this environment."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "qlog", source / "qlog", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir=dist", "."], cwd=source, check=True)
    (wheel,) = (source / "dist").glob("qlog-*.whl")
    subprocess.run([*pip, "install", "--no-deps", f"--target={target}", str(wheel)], check=True)
    return target


@pytest.fixture
def folder(tmp_path):
    """Two files of sums, a config and a tokenizer, far from any clone."""
    for part in range(2):
        lines = [
            {"question": f"{a} + {b}", "result": {"value": a + b}, "level": 1 + part}
            for a in range(6)
            for b in range(part, 6, 2)
        ]
        (tmp_path / f"sums-{part}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "mine.py").write_text(_CONFIG)
    (tmp_path / "my_rewards.py").write_text(_REWARDS)
    _tokenizer(tmp_path / "tokenizer")
    return tmp_path


def _tokenizer(folder: pathlib.Path) -> None:
    """A tokenizer.json of characters."""
    names = ["<pad>", "<eos>", "<think>", "</think>", "<unk>"]
    pieces = [*names, *sorted(set("Add the numbers.0123456789+- \n"))]
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": name, "special": True, "single_word": False, "lstrip": False}
            | {"rstrip": False, "normalized": False}
            for i, name in enumerate(names)
        ],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}}
        | {"behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "unk_token": "<unk>",
        },
    }
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def _main(folder, installed, *arguments):
    return subprocess.run(
        [sys.executable, "-P", "-m", "qlog.main", "--config=mine.py", *arguments],
        cwd=folder,
        # One device, as a user has it who sets nothing.
        env=os.environ
        | {"PYTHONPATH": str(installed), "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_my_data_reward_and_metric_from_a_wheel(folder, installed):
    result = _main(folder, installed, "--config.loss.max_coefficient=5", "--workdir=out")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = read_jsonl(folder / "out/metrics.jsonl")
    assert [row["phase"] for row in rows] == ["train", "train", "validation"]
    for row in rows[:2]:
        parts = row["reward/exact_match"] + 0.5 * row["reward/near"]
        assert row["reward"] == pytest.approx(parts, abs=1e-6)
    assert 0 <= rows[2]["metrics/is_number"] <= 1
    assert rows[2]["questions"] == 3  # a tenth of the file is drawn for validation
    rollouts = read_jsonl(folder / "out/rollouts.jsonl")
    assert "Add the numbers." in rollouts[0]["prompt"]
    assert json.loads((folder / "out/config.json").read_text())["loss"]["max_coefficient"] == 5
    # The same command has nothing more to do.
    again = _main(folder, installed, "--config.loss.max_coefficient=5", "--workdir=out")
    assert "finished before" in again.stdout, again.stderr


def test_a_mistake_in_it_is_one_sentence(folder, installed):
    broken = textwrap.dedent(_CONFIG).replace('"question"', '"qestion"')
    (folder / "mine.py").write_text(broken)
    result = _main(folder, installed, "--workdir=out")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "qestion" in result.stderr and "question" in result.stderr
    assert not (folder / "out/checkpoints").exists()
