"""Paths on disks: which faults are tried again, and names that cannot be."""

import errno
import json
import os
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


# ---- Faults ----


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between tries, which are not waited for."""
    found = []
    monkeypatch.setattr(paths.time, "sleep", found.append)
    return found


def test_links_that_lead_to_each_other_are_no_folder(pauses, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.symlink_to(second)
    second.symlink_to(first)
    assert paths.names(paths.Path(first)) == [] and not pauses
    with pytest.raises(OSError) as caught:
        paths.read(paths.Path(first))
    assert caught.value.errno == errno.ELOOP and not pauses


@pytest.mark.parametrize(
    "number, is_tried_again",
    [
        *[(number, False) for number in (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)],
        *[(number, False) for number in (errno.EINVAL, errno.EISDIR, errno.EDQUOT, errno.EXDEV)],
        *[(number, True) for number in (errno.EIO, errno.ETIMEDOUT, errno.ESTALE)],
    ],
    ids=lambda value: errno.errorcode.get(value) if value > 1 else "",
)
def test_only_faults_that_pass_are_tried_again(number, is_tried_again, pauses):
    def fail():
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError):
        paths.retried(fail)
    assert bool(pauses) == is_tried_again
