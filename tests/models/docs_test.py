"""The page about the models: its examples run, its new family trains and comes back from disk."""

import json
import pathlib
import re

import jax
import pytest
import tiny
from models_fixtures import own_families  # noqa: F401

from qlog import models
from qlog.config import schema
from qlog.errors import ConfigError
from qlog.experiment import files
from qlog.models.families import FAMILIES

PAGE = pathlib.Path(models.__file__).with_name("README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SHORT = {
    "dtype": "float32",
    "train": {"steps": 1, "prompts_per_step": 2, "remat": "none", "rollouts_every": 1},
    "rollout": {"rollouts_per_prompt": 2},
    "evaluation": {
        "every": 0,
        "prompts": 2,
        "prompts_per_batch": 2,
        "rollouts_per_prompt": 2,
        "without_rationale": False,
    },
}


def test_the_table_has_every_family_and_every_preset():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", PAGE, re.MULTILINE)
    named = [
        (name, re.findall(r"`(\w+)`", types), re.findall(r"`(\w+)`", presets))
        for name, types, presets in rows
        if name in FAMILIES
    ]
    assert named == [
        (
            name,
            [family.model_type] + [family.text_part_of] * bool(family.text_part_of),
            list(family.presets),
        )
        for name, family in FAMILIES.items()
    ]


def test_yarn_in_a_config():
    names = {}
    exec(EXAMPLES[0], names)
    shape = files.model_shape(names["config"])
    assert shape.rope_scaling == models.RopeScaling(4.0, 32_768, rope_type="yarn")
    assert models.to_hf_config(shape)["rope_scaling"]["rope_type"] == "yarn"


@pytest.mark.usefixtures("own_families")
def test_the_new_family_trains_and_its_folder_is_read(tmp_path):
    names = {}
    exec(EXAMPLES[1], names)
    config = names["get_config"]()
    shape = files.model_shape(config)
    assert shape.family == "acme" and shape.qkv_bias
    tiny.run(schema.merge(config, SHORT), tmp_path / "preset", jax.devices()[:1])

    folder = tmp_path / "acme"
    params = models.init(shape, jax.random.key(0))
    models.huggingface.export(params, shape, folder)
    written = json.loads((folder / "config.json").read_text())
    assert written["model_type"] == "acme" and written["architectures"] == ["AcmeForCausalLM"]
    from_folder = schema.merge(config, {"model": str(folder), "weights": str(folder)})
    assert files.model_shape(from_folder) == shape
    # As a second process, or a notebook's cell, reads the file again.
    exec(EXAMPLES[1], {})
    tiny.run(schema.merge(from_folder, SHORT), tmp_path / "folder", jax.devices()[:1])
    # What its config.json cannot say is refused before anything is written.
    with pytest.raises(ConfigError, match="DecoderConfig.layer_windows = .4,. cannot be written"):
        models.to_hf_config(models.DecoderConfig(**vars(shape) | {"layer_windows": (4,)}))


def test_a_folder_of_a_family_that_is_not_registered_is_refused_by_name(tmp_path):
    fields = models.to_hf_config(models.PRESETS["smollm3_3b"]) | {"model_type": "acme"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = schema.merge(schema.default(), {"model": str(tmp_path)})
    with pytest.raises(ConfigError, match="'acme' is not supported.*mistral, smollm3.*register"):
        files.model_shape(config)
