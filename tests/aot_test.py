"""Compiling for a TPU that is not here; needs libtpu (the extra `tpu`), else skips."""

import jax
import pytest
import tiny

from qlog import aot
from qlog.errors import ConfigError


def test_collectives_are_read_from_hlo():
    hlo = """
      %a = bf16[8,128]{1,0:T(8,128)} all-gather(%x), replica_groups={}
      %b = (f32[4]{0}, f32[4]{0}) all-reduce-start(%y, %z), to_apply=%add
      %c = f32[4]{0} all-reduce-done(%b)
      ROOT %d = pred[16]{0} collective-permute(%p)
    """
    assert aot.collectives(hlo) == {"all-gather": 2048, "all-reduce": 32, "collective-permute": 16}


def test_what_does_not_fit_names_the_setting_to_change():
    chip = aot.CHIPS["TPU v5 lite"]
    fits = aot.Phase(1.0, 1.0, 2.0, 197e12, 0.0, {}, 1)
    large = fits._replace(peak=20 * 2**30)
    config = tiny.config()
    assert aot.roofline(fits, chip) == 1.0
    assert aot.remedies({"decode": fits, "gradient": fits}, chip, config) == []
    (advice,) = aot.remedies({"decode": fits, "gradient": large}, chip, config)
    assert "gradient needs 20.0 of 16 GiB" in advice and "train.rollouts_per_microbatch" in advice
    (advice,) = aot.remedies({"decode": large}, chip, config)
    assert "train.prompts_per_step = 4" in advice


def test_a_step_compiles_for_a_slice_and_fits(capsys):
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install libtpu (the extra 'tpu')")
    config = tiny.config(train={"prompts_per_step": 8}, evaluation={"prompts_per_batch": 8}, mesh={"data": 2, "fsdp": 2})
    config.architecture.num_layers = 1
    assert aot.run_compile(config, "v5e:2x2") == 0
    output = capsys.readouterr().out
    for program in ("prefill", "decode", "score", "gradient", "update", "fits."):
        assert program in output
    with pytest.raises(ConfigError, match="not known to libtpu"):
        aot.compile_run(config, "v5e:7x9")
    assert jax.default_backend() == "cpu"
