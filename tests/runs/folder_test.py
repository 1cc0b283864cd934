"""Every file of a workdir damaged in every way: the run goes on, or says what to do."""

import json
import shutil
import sys

import jax
import pytest
import tiny

from qlog.config import schema
from qlog.errors import ConfigError
from qlog.runs import folder
from qlog.runs.log import RunLog
from qlog.storage import paths

ONE = jax.devices()[:1]
CONFIG = tiny.config(
    train={"steps": 4}, checkpoint={"every": 2}, evaluation={"every": 2, "final": "test"}
)
DAMAGE = {
    "emptied": lambda file: file.write_bytes(b""),
    "garbled": lambda file: file.write_bytes(b"\xff\xfe\x00" + file.read_bytes()[::-1]),
    "deleted": lambda file: file.unlink(),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "null": lambda file: file.write_bytes(b"null\n"),
    "nested": lambda file: file.write_bytes(b"[" * 100_000),
}
_USUAL = {("garbled", "killed")}  # the others are slow


class _KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run, and one that was killed in its last step."""
    finished, killed = (tmp_path_factory.mktemp(name) for name in ("finished", "killed"))
    tiny.run(CONFIG, finished, ONE)

    def progress(self, step, text):
        if step == 3:
            raise _KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "progress", progress)
        with pytest.raises(_KilledError):
            tiny.run(CONFIG, killed, ONE)
    return {"finished": finished, "killed": killed}


def _copy(workdir, target):
    shutil.copytree(workdir, target)
    return target


def _files(workdir):
    """All that a run writes but checkpoints (tests/runs/digests_test.py) and TensorBoard's."""
    found = [f for f in workdir.rglob("*") if f.is_file() and "checkpoints" not in f.parts]
    return sorted(f.relative_to(workdir) for f in found if "tfevents" not in f.name)


@pytest.mark.parametrize(
    "damage, kind",
    [
        pytest.param(d, k, marks=() if (d, k) in _USUAL else pytest.mark.slow)
        for d in DAMAGE
        for k in ("finished", "killed")
    ],
)
def test_a_damaged_file_costs_only_itself(damage, kind, runs, tmp_path):
    expected = json.loads((runs["finished"] / "results.json").read_text())["metrics"]
    names = _files(runs[kind])
    assert {"config.json", "metrics.jsonl", "scores.json", "owner.json"} < set(map(str, names))
    for number, name in enumerate(names):
        workdir = _copy(runs[kind], tmp_path / str(number))
        DAMAGE[damage](workdir / name)
        assert tiny.run(CONFIG, workdir, ONE).metrics == expected, name
        assert json.loads((workdir / "results.json").read_text())["metrics"] == expected, name


@pytest.mark.parametrize("name", ["metrics.jsonl", "results.json", "owner.json", "scores.json"])
def test_a_folder_in_the_place_of_a_file_is_refused(name, runs, tmp_path):
    workdir = _copy(runs["killed"], tmp_path / "run")
    (workdir / name).unlink(missing_ok=True)
    (workdir / name).mkdir()
    with pytest.raises(
        ConfigError, match=rf"{name} is a folder, and a run writes .*: move it away"
    ):
        tiny.run(CONFIG, workdir, ONE)


@pytest.mark.parametrize("name", ["checkpoints", "samples", ""])
def test_a_file_in_the_place_of_a_folder_is_refused(name, tmp_path):
    place = tmp_path / "run" / name
    place.parent.mkdir(exist_ok=True)
    place.write_text("x")
    with pytest.raises(ConfigError, match=r"is a file, and a run needs a folder there: move it"):
        tiny.run(CONFIG, tmp_path / "run", ONE)


def test_a_finished_run_has_one_truth(runs, tmp_path):
    workdir = _copy(runs["finished"], tmp_path / "run")
    before = {f: (workdir / f).read_bytes() for f in _files(workdir) if f.name != "owner.json"}
    for changes, said in (
        ({"evaluation": {"split": "train"}}, r"split = 'train': .* results are of 'validation'"),
        ({"evaluation": {"prompts": 5}}, r"prompts = 5: .* results are of 6: add --mode=evaluate"),
        ({"train": {"steps": 3}}, r"steps = 3 is below step 4 of the checkpoint .*: raise it, or"),
    ):
        with pytest.raises(ConfigError, match=said):
            tiny.run(schema.merge(CONFIG, changes), workdir, ONE)
    assert before == {f: (workdir / f).read_bytes() for f in before}


def test_room_that_is_short_is_said(tmp_path, capsys):
    folder.notice_room(paths.Path(tmp_path), 1000)
    assert not capsys.readouterr().out
    folder.notice_room(paths.Path(tmp_path), 10**18)
    said = capsys.readouterr().out
    assert "GB free, and the run needs about 1,000,000,000.0 GB for checkpoints and samples" in said


def test_room_is_needed_for_the_checkpoints_that_are_still_to_come():
    config = tiny.config(checkpoint={"keep": 3})
    first, later = (folder.room_needed(config, 10**9, num) for num in (0, 4))
    assert first - later == 4 * 10**9  # of five, one at least is written before one is deleted


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system without a size: /proc")
def test_a_file_system_that_tells_no_size_is_not_called_full(capsys):
    assert shutil.disk_usage("/proc").total == 0
    folder.notice_room(paths.Path("/proc"), 10**18)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"loss": 3}', "[" * 5000])
def test_a_config_that_was_lost_is_written_again(content, tmp_path):
    """A report knows a run by it."""
    workdir, file = paths.Path(tmp_path), tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    folder.write_config(workdir, CONFIG, keep=True)
    assert file.read_text() == schema.to_json(CONFIG)
    folder.write_config(workdir, tiny.config(seed=3), keep=True)  # one that is whole stays
    assert file.read_text() == schema.to_json(CONFIG)
