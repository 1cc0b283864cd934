"""What an earlier start left: results, evaluations and the checkpoints that its log tells of."""

import json
import shutil

import jax
import pytest
import tiny

from qlog.config import schema
from qlog.errors import ConfigError
from qlog.runs import resumption
from qlog.runs.log import read_jsonl
from qlog.storage import paths

ONE = jax.devices()[:1]


def write_log(workdir, *rows):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_newest_checkpoint_that_a_log_tells_of_may_have_been_cut_short(tmp_path):
    workdir = paths.Path(tmp_path)
    resumption.check_nothing_is_lost(workdir)
    step = lambda step, since: {"step": step, "phase": "train", "steps_since_checkpoint": since}
    # Of the steps 1 to 4, checkpoints at 2 and 4 were begun: 4 may never have become whole.
    write_log(tmp_path, step(0, 1), step(1, 2), step(2, 1))
    resumption.check_nothing_is_lost(workdir)
    write_log(tmp_path, step(0, 1), step(1, 2), step(2, 1), step(3, 2), step(4, 1))
    with pytest.raises(ConfigError, match="tells of a checkpoint at step 2, and"):
        resumption.check_nothing_is_lost(workdir)
    write_log(tmp_path, step(0, 1), {"step": 2, "phase": "validation"})  # it waits for its own
    with pytest.raises(ConfigError, match="tells of a checkpoint at step 3, and"):
        resumption.check_nothing_is_lost(workdir)


def test_metrics_of_an_evaluation_are_found_in_the_log(tmp_path):
    workdir = paths.Path(tmp_path)
    write_log(
        tmp_path,
        {"step": 2, "phase": "train", "loss": 1.0},
        {"step": 2, "phase": "validation", "m@4": 0.5},
    )
    assert resumption.logged_metrics(workdir, 2, "validation")["m@4"] == 0.5
    assert resumption.logged_metrics(workdir, 2, "test") == {}


def test_only_a_whole_record_of_these_steps_is_an_end(tmp_path, capsys):
    workdir, config = paths.Path(tmp_path), tiny.config(train={"steps": 3})
    found = lambda: resumption.finished_metrics(workdir, config)
    assert found() is None and not capsys.readouterr().out
    record = {
        "step": 3,
        "metrics": {"m@4": 0.5},
        "evaluation": json.loads(schema.to_json(config.evaluation)),
    }
    results = tmp_path / "results.json"
    results.write_text(json.dumps(record)[:-5])
    assert found() is None
    assert "results.json cannot be read (" in capsys.readouterr().out
    results.write_text(json.dumps(record | {"step": 2}))
    assert found() is None
    results.write_text(json.dumps(record))
    assert found() == {"m@4": 0.5}


def test_a_record_is_written_once_whatever_its_metrics(tmp_path):
    file = paths.Path(tmp_path / "final.json")
    asked = json.dumps({"step": 3, "metrics": {}})
    assert not resumption.is_written(file, asked)
    file.write_text(json.dumps({"step": 3, "metrics": {"m@4": 0.5}}))
    assert resumption.is_written(file, asked)
    file.write_text(json.dumps({"step": 2, "metrics": {"m@4": 0.5}}))
    assert not resumption.is_written(file, asked)
    file.write_text("{")
    assert not resumption.is_written(file, asked)


def test_a_run_whose_checkpoints_are_gone_keeps_its_log(tmp_path):
    config = tiny.config(train={"steps": 4}, evaluation={"every": 0}, checkpoint={"every": 1})
    tiny.run(schema.merge(config, {"train": {"steps": 3}}), tmp_path, ONE)
    (tmp_path / "results.json").unlink(missing_ok=True)
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"tells of a checkpoint at step 1, and .* has none"):
        tiny.run(config, tmp_path, ONE)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    (tmp_path / "elsewhere").rename(tmp_path / "checkpoints")
    tiny.run(config, tmp_path, ONE)
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 4
