"""Names that cannot be: what is asked of them, and who is told."""

import json
import pathlib

import pytest
import tiny

from qlog import models
from qlog.commands import show
from qlog.data import builders, tokenizers
from qlog.errors import ConfigError
from qlog.experiment import files
from qlog.models import huggingface
from qlog.runs import checkpoint_reader
from qlog.storage import assets, paths

LONG = "a" * 300  # no file system takes more than 255 bytes


@pytest.mark.parametrize("kind", [paths.Path, pathlib.Path])
def test_a_name_that_is_too_long_is_a_file_that_is_not_there(kind, tmp_path):
    for path in (kind(tmp_path / LONG), kind(tmp_path / LONG / "x")):
        assert not paths.exists(path)
        assert not paths.is_file(path) and not paths.is_folder(path)
        with pytest.raises(FileNotFoundError):
            paths.read(path)
    assert paths.names(paths.Path(tmp_path / LONG)) == []
    assert not paths.is_dangling(tmp_path / LONG)


def test_whatever_a_config_names_may_be_too_long(tmp_path, capsys):
    assert assets.names(LONG, "field") == []
    assert assets.why_missing("b" * 254) == "", "with .gz behind it the name is too long"
    config = tiny.config()
    for question, message in (
        (lambda: checkpoint_reader.find_checkpoint(LONG, "config.init_from"), "has no checkpoint"),
        (lambda: tokenizers.load(LONG), "path = a+ does not exist"),
        (lambda: huggingface.resolve(f"/{LONG}"), "is not a folder here"),
        (lambda: files.model_shape(changed(config, model=LONG)), "config.model = 'a+' is unknown"),
        (lambda: builders.prepare("hotpotqa", manual_dir=LONG), "is not a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            question()
    assert show.main(["show", LONG]) == 2
    assert "name a config file first" in capsys.readouterr().err
    index = {"weight_map": {"model.norm.weight": LONG}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="lacks a+: download the model again"):
        huggingface.check(tmp_path, models.PRESETS["qwen3_0p6b"])


def changed(config, **fields):
    config.update(fields)
    return config


def test_a_home_of_nobody_is_a_name_like_any_other():
    assert not paths.exists(paths.parse("~no-such-user/x"))
    with pytest.raises(ConfigError, match="path = ~no-such-user/x does not exist"):
        tokenizers.load("~no-such-user/x")
