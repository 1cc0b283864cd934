"""The benchmark: its counts against enumeration, its phases against the trainer's own functions."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qlog import models
from qlog.benchmark import compare, measure, work
from qlog.benchmark.report import report
from qlog.models import flops
from qlog.policy import Policy


def test_needed_work_is_what_enumeration_counts():
    shape = tiny.SHAPE
    kernels = [x for x in jax.tree.leaves(tiny.params()["layers"]) if x.ndim == 3]
    body, head = sum(x.size for x in kernels), shape.vocab_size * shape.width
    prompts, rollouts, start, length = 2, 3, 7, 5

    def token(position):
        """Scores against `position` + 1 keys and their mix, in all layers and heads."""
        return 4 * shape.num_layers * shape.num_heads * shape.head_dim * (position + 1)

    prompt = sum(2 * body + token(t) for t in range(start))
    own = sum(2 * (body + head) + token(t) for t in range(start, start + length))
    assert flops.prefill_need(shape, prompts, start).flops == prompts * prompt
    need = flops.train_need(shape, prompts, rollouts, start, length)
    assert need.flops == 3 * prompts * (prompt + rollouts * own)
    slot = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    read = sum(body + head + slot * prompts * (start + rollouts * t) for t in range(1, length + 1))
    decode = flops.decode_need(shape, prompts, rollouts, start, length, 2)
    assert decode == flops.Need(prompts * rollouts * own, 2 * read)
    # A cache of another number of bytes.
    weights = (body + head) * length
    decode = flops.decode_need(shape, prompts, rollouts, start, length, 2, 1.5)
    assert decode.bytes == 2 * weights + 1.5 * (read - weights)


@pytest.mark.slow
def test_phases_do_the_work_that_they_are_timed_for():
    size = work.Size(prompts=2, rollouts=2, prompt=12, rationale=5, answer=3)
    policy = Policy(dataclasses.replace(tiny.SHAPE, num_layers=1), tiny.VALID_VOCAB)
    params, batch = models.init(policy.config, jax.random.key(0)), work.make_batch(policy, size)
    phases = work.rollout_phases(params, policy, size, batch)
    rollouts, log_w = phases["rollouts"].call()
    assert (rollouts.rationale_lengths == 5).all() and (
        rollouts.tokens[..., -1] == tiny.VALID_VOCAB - 1
    ).all()
    assert log_w.shape == phases["score"].call().shape == (2, 2)
    fresh = phases["score_fresh"].call()
    assert fresh.shape == (2, 2, 8) and np.isfinite(fresh).all()
    trainer = work.Trainer(params, policy, size, batch, (2, 2))
    trainer.step()
    trainer.step()
    assert all(np.array(trainer.norms) > 0) and trainer.norms[0] != trainer.norms[1]
    parts = trainer.parts()
    for name in ("prompts", "output head"):
        leaves = jax.tree.leaves(parts[name]())
        assert all(np.isfinite(x).all() for x in leaves) and any((x != 0).any() for x in leaves), (
            name
        )
    assert parts["update"]()["param_norm"] > 0


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    config = tiny.config()
    config.architecture.num_layers = 1
    file = tmp_path / "out.json"
    report(config, repeats=1, out=str(file), devices=jax.devices()[:1])
    facts = json.loads(file.read_text())
    assert set(facts["phases"]) == {"prefill", "rollouts", "score", "score_fresh", "train"}
    for row in facts["phases"].values():
        assert row["seconds"] > 0 and row["tokens_per_s"] > 0 and row["of_matmul_peak"] > 0
    parts = facts["train_parts"]
    assert set(parts) == {"prompts", "output head", "update", "rollouts' layers"}
    assert all(parts[name] > 0 for name in ("prompts", "output head", "update"))
    output = capsys.readouterr().out
    assert "train" in output and "tokens/s" in output


def test_the_comparison_names_its_work():
    for text in compare.TABLE:
        parsed = compare.parse(text)
        assert parsed.size in compare.SIZES and parsed.kind in ("train", "rollouts", "score")
    row = {
        "median": 2.0,
        "shortest": 1.9,
        "longest": 2.2,
        "peak_memory": 2**30,
        "peak_memory_compiling": 2**31,
        "needed_flops": 1e11,
    }
    line = compare.line(
        "train:tiny:4x8:256+128", {"qlog": row, "torch": row | {"median": 5.0}}, 1e11
    )
    assert line.startswith("| train | tiny 4x8, 256 + 128 | 5.00 (1.90 - 2.20) | 2.00")
    assert "| 2.5x | 1,024, 1,024, 2,048 | 0.50 |" in line
    row["parts"] = {"prompts": 0.5, "update": 1.5}
    table = compare.breakdown(
        {"train:tiny:4x8:256+128": {"qlog": row}, "score:tiny:4x8:256+128": {"qlog": {}}}
    )
    assert table.splitlines()[2:] == ["| tiny:4x8:256+128 | 0.50 s, 25% | 1.50 s, 75% |"]


@pytest.mark.parity
def test_both_implementations_take_the_same_step(tmp_path):
    compare.write_weights("tiny", tmp_path / "tiny")
    one = compare.parse("train:tiny:2x2:16+8")
    ours, theirs = (
        f(one, str(tmp_path / "tiny"), 1) for f in (compare.run_qlog, compare.run_torch)
    )
    np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-3)


def test_peaks_are_positive():
    peaks = measure.measure_peaks(jnp.float32, size=64)
    assert peaks.flops > 0 and peaks.bandwidth > 0


def test_peak_memory_is_this_processs_own():
    """A process that a large one starts does not begin with its size."""
    ballast = np.ones(1 << 26)  # 512 MiB
    ask = "from qlog.benchmark import measure; print(measure.process_peak_memory())"
    child = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert 0 < int(child.stdout) < ballast.nbytes < measure.process_peak_memory()
