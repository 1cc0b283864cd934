"""configs/miniature.py: what it runs, and a few of its runs, cut short, with their report."""

import json
import re

import jax
import pytest

from configs import miniature
from qlog.commands import several_runs
from qlog.config import schema
from qlog.errors import ConfigError


def test_the_miniature_has_every_method_in_every_setting():
    runs = schema.several(miniature.get_config())
    assert len(runs) == 3 * (2 + 3 * len(miniature.METHODS))
    for name, run in runs.items():
        assert name.endswith(f"_{run.seed}")
        if name.startswith(("warm_g", "cold_", "noisy_")):
            start = "base" if name.startswith("cold") else "warm"
            assert run.init_from == f"{start}_{run.seed}"
            assert run.data.world.get("wrong", 0) == (0.2 if name.startswith("noisy") else 0)
    assert {run.seed for run in schema.several(miniature.get_config("seeds=2+5")).values()} == {
        2,
        5,
    }
    for wrong in ("many", "0", "-1", "1+-2", ""):
        with pytest.raises(ConfigError, match=re.escape(f"seeds={wrong!r}: write seeds=3")):
            miniature.get_config(f"seeds={wrong}")


def test_the_other_studies_change_what_they_say():
    runs = schema.several(miniature.get_config("seeds=1,collapse"))
    assert runs["rate3e-03_garl_q025_no_path_0"].loss.pathwise is False
    assert runs["rate1e-03_garl_q075_no_score_0"].loss.score is False
    assert {run.optimizer.learning_rate for run in runs.values()} == {1e-3, 3e-3, 5e-3}
    longer = schema.several(miniature.get_config("seeds=1,longer"))
    assert longer["steps1000_garl_q025_0"].train.steps == 1000
    assert longer["budget32_garl_q025_0"].rollout.rationale_budget == 32
    assert longer["updates4_garl_q075_0"].train.updates_per_batch == 4
    int8 = schema.several(miniature.get_config("seeds=1,int8"))
    assert int8["garl_int8_0"].rollout.cache == "int8" and int8["garl_0"].rollout.cache == "auto"
    assert int8["garl_int8_weights_0"].loss.importance == "sequence"


@pytest.mark.slow
def test_runs_of_two_seeds_are_one_line_and_one_curve(tmp_path, capsys):
    config = miniature.get_config("seeds=2")
    methods = ("grpo", "garl_q075")
    kept = [f"{name}_{seed}" for seed in (0, 1) for name in ("base", "warm")]
    kept += [
        f"{start}_{m}_{seed}" for start in ("warm", "noisy") for m in methods for seed in (0, 1)
    ]
    config.runs = {name: config.runs[name].to_dict() for name in kept}
    for run in config.runs.values():
        run.train = {**run.get("train", {}), "steps": 2, "prompts_per_step": 4}
    config.evaluation.update(every=1, prompts=8, prompts_per_batch=8, rollouts_per_prompt=4)
    several_runs.run(config, tmp_path, jax.devices()[:1])
    report = (tmp_path / "report.md").read_text()
    first = report.partition("**p@4**")[0]
    assert "| method | data.world.wrong=0.2 | else |" in first
    assert "| grpo | " in first and "| garl(q=0.75) | " in first and first.count("±") == 4
    assert "**p@1** of the last step" in report
    assert "| warm_grpo_0 |" in report.partition("## Every run")[2]
    for name in ("figure3", "figure4", "escape"):
        assert (tmp_path / f"{name}-multihop-cold.svg").exists()
        assert (tmp_path / f"{name}-multihop-cold-data.world.wrong_0.2.png").exists()
    assert json.loads((tmp_path / "warm_grpo_0" / "final.json").read_text())["split"] == "test"
    assert "**m@4**" in capsys.readouterr().out
