"""Weak scaling on paper: the table, its conclusion, and one real pair of slices."""

import json

import pytest
import tiny

from qlog.aot import weak_scaling
from qlog.commands import modes
from qlog.errors import ConfigError
from qlog.parallel.chips import CHIPS


def _step(chips, interconnect, seconds=10.0, fits=True):
    phases = {"decode": 6.0, "gradient": seconds - 6.0}
    return weak_scaling.SliceStep(
        f"v5e:{chips}",
        chips,
        2 * chips,
        fits,
        seconds,
        phases,
        8.0,
        4.0,
        interconnect,
        100.0 * chips,
    )


def test_the_prompts_of_a_step_grow_with_the_chips():
    config = tiny.config(train={"prompts_per_microbatch": 2})
    grown = weak_scaling.with_times_prompts(config, 16)
    assert grown.train.prompts_per_step == 64 and grown.train.prompts_per_microbatch == 2
    assert config.train.prompts_per_step == 4


def test_the_conclusion_names_where_communication_dominates():
    text = weak_scaling.conclusion([_step(4, 2.0), _step(16, 9.0)])
    assert "0.25 on 4 chips, 1.12 on 16 chips" in text
    assert text.endswith("Communication dominates from 16 chips on.")
    text = weak_scaling.conclusion([_step(4, 1.0), _step(16, 2.0)])
    assert "dominates nowhere in the table" in text and "0.25 times the tokens" in text


def test_the_page_holds_the_table_and_what_does_not_fit():
    steps = [_step(4, 2.0), _step(16, 3.0, seconds=20.0, fits=False)]
    page = weak_scaling.page(
        steps, CHIPS["TPU v5 lite"], {"command": "python -m x", "versions": "jax 1"}
    )
    assert "| 16 | v5e:16 | 32 | 20 | 6 | 14 | 8 | 4 | 3 | 100 | 0.50 |" in page
    assert "Does not fit in HBM: v5e:16." in page and "    python -m x" in page


@pytest.mark.slow
def test_two_slices_compare(tmp_path, capsys):
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install libtpu (the extra 'tpu')")
    config = tiny.config(
        mesh={"data": 1, "fsdp": -1}, loss={"name": "sft"}, train={"prompts_per_step": 4}
    )
    config.architecture.num_layers = 1
    config.rollout.rollouts_per_prompt = 1
    assert modes.run("compile", config, tmp_path, topology="v5e:2x2,v5e:4x4") == 0
    saved = json.loads((tmp_path / "weak_scaling.json").read_text())
    assert [(row["chips"], row["prompts"]) for row in saved["rows"]] == [(4, 4), (16, 16)]
    assert 0 < saved["rows"][0]["interconnect"] < saved["rows"][1]["interconnect"]
    assert saved["config"]["train"]["prompts_per_step"] == 4 and saved["chip"]["flops"] == 197e12
    assert (tmp_path / "weak_scaling.md").read_text() in capsys.readouterr().out
    with pytest.raises(
        ConfigError, match="v5e:2x4 is 8 x TPU v5 lite, no multiple of v5e:4x4, 16 x"
    ):
        weak_scaling.measure_slices(config, ["v5e:4x4", "v5e:2x4"])
