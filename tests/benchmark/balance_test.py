"""The commands that tell how evenly chips are busy: their numbers, their errors."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from places import ROOT

from qlog.errors import ConfigError
from qlog.rollouts import lengths


def _run(module, *words, devices=1, code=0):
    command = [sys.executable, "-m", module, *words]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    child = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert child.returncode == code, child.stderr
    return child


def _balance(*words, **options):
    return _run("qlog.benchmark.balance", *words, **options)


def test_given_lengths_end_with_one_line_of_executed_over_needed(tmp_path):
    """Of the paper's HotPotQA on 16 chips: within what is promised."""
    file = tmp_path / "lengths.npy"
    np.save(file, lengths.drawn(np.random.default_rng(0), 32, 32, 600, 2944))
    output = _balance("--chips=16", f"--lengths={file}", "--json").stdout
    found = json.loads(output.splitlines()[-1])
    assert set(found) == {"decode", "learn"}
    assert 1 <= found["decode"] <= 1.25 and 1 <= found["learn"] <= 1.3


def test_a_table_of_several_chips_for_any_config():
    output = _balance(
        "--config=configs/finqa.py", "--chips=2,8", "--mean=300", "--draws=1", "--json"
    ).stdout
    cases = json.loads(output.splitlines()[-1])["cases"]
    assert [case["chips"] for case in cases] == [2, 8]


def test_samples_of_an_evaluation_have_lengths(tmp_path):
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps({"lengths": [n, 2 * n]}) + "\n" for n in range(1, 5)))
    np.testing.assert_array_equal(lengths.of_samples(str(file))[:, 1], [2, 4, 6, 8])
    for line in ({"answers": []}, 5, {"lengths": [10**400]}):
        file.write_text(f"{json.dumps(line)}\n")
        with pytest.raises(ConfigError, match="gives no lengths"):
            lengths.of_samples(str(file))
    for content in (b"", b"PK\x03\x04"):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=f"--lengths={file} cannot be read: "):
            lengths.read(str(file))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ConfigError, match=f"--samples={file} is not a plain file"):
        lengths.of_samples(str(file))


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2), int), np.ones(3, int), np.ones((2, 2)), np.ones((0, 2), int)]
)
def test_lengths_that_are_none_are_told(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ConfigError, match=r"give integers of at\s+least 1"):
        lengths.read(str(tmp_path / "x.npy"))


def test_wrong_flags_are_told_in_a_sentence(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((3, 2), int))
    child = _balance("--chips=2", f"--lengths={tmp_path / 'x.npy'}", code=2)
    assert "3 prompts do not spread evenly over 2 shards" in child.stderr
    assert "Traceback" not in child.stderr
    assert "--chips=x" in _balance("--chips=x", code=2).stderr


def test_drawn_lengths_have_their_mean():
    drawn = lengths.drawn(np.random.default_rng(0), 4000, 8, 600, 10**6)
    assert drawn.min() >= 1 and abs(drawn.mean() - 600) < 30
    assert drawn.mean(1).std() > 300  # prompts differ


@pytest.mark.slow
def test_a_step_is_timed_with_and_without_balance(tmp_path):
    words = ("--rollouts=8", "--budget=128", "--mean=30", "--repeats=1", "--prompt=16")
    out = tmp_path / "out.json"
    output = _run("qlog.benchmark.uneven", *words, f"--out={out}", devices=4).stdout
    facts = json.loads(out.read_text())
    alone, balanced = facts["executed_over_needed"]
    assert balanced < alone and facts["gradient_difference"] < 1e-5
    assert facts["different_rollouts"] <= 1 and "have other tokens" in output
