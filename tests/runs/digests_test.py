"""Damaged checkpoints: noticed in every file, set aside by name, and the one before it is taken."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import time

import buckets
import damage
import jax
import pytest
import trees
from damage import DAMAGE, STEPS, cut, empty, files, flip, make_old, restore, save

from qlog.errors import ConfigError
from qlog.runs import checkpoint_reader, checkpoints, digests
from qlog.storage import paths

# Fixtures.
experiment, states = damage.experiment, damage.states
whole, workdir = damage.whole, damage.workdir


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_file_damaged_in_each_way_is_noticed(kind, whole, tmp_path):
    for number, name in enumerate(f.relative_to(whole) for f in files(whole / "checkpoints/9")):
        copy = tmp_path / str(number) / "checkpoints" / "9"
        shutil.copytree(whole / "checkpoints/9", copy)
        DAMAGE[kind](copy.parent.parent / name)
        assert checkpoint_reader.fault(copy), name


def test_flipped_bytes_at_random_places_are_noticed(whole, tmp_path):
    """The arrays' store itself lets most of them pass."""
    copy, rng = tmp_path / "checkpoints" / "9", random.Random(0)
    shutil.copytree(whole / "checkpoints/9", copy)
    found = files(copy)
    for _ in range(200):
        file = rng.choices(found, [f.stat().st_size for f in found])[0]
        before = file.read_bytes()
        flip(file, rng.randrange(len(before)))
        assert checkpoint_reader.fault(copy), file
        file.write_bytes(before)
    assert not checkpoint_reader.fault(copy)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_run_goes_on_from_the_newest_whole_one_and_can_save_that_step_again(
    kind, workdir, experiment, states, capsys
):
    data = max(files(workdir / "checkpoints/9"), key=lambda file: file.stat().st_size)
    DAMAGE[kind](data)
    left = sorted(
        f.relative_to(workdir / "checkpoints/9") for f in files(workdir / "checkpoints/9")
    )
    step, state = restore(workdir, experiment)
    assert step == 6
    trees.assert_equal(state, states[6])
    said = capsys.readouterr().out
    assert "checkpoints/9 is damaged (" in said and "set aside as 9.damaged; step 6 is" in said
    aside = workdir / "checkpoints" / "9.damaged"
    assert sorted(f.relative_to(aside) for f in files(aside)) == left
    save(workdir, experiment, {9: states[9], 12: states[3]})
    assert restore(workdir, experiment)[0] == 12
    assert sorted(f.relative_to(aside) for f in files(aside)) == left
    # A second one of the same step has a name of its own.
    shutil.rmtree(workdir / "checkpoints" / "12")
    empty(max(files(workdir / "checkpoints/9"), key=lambda file: file.stat().st_size))
    assert restore(workdir, experiment)[0] == 6
    assert {"9.damaged", "9.damaged.2"} < {f.name for f in (workdir / "checkpoints").iterdir()}


def test_an_empty_folder_and_a_copy_under_another_number_are_damaged(workdir, experiment, capsys):
    (workdir / "checkpoints" / "99").mkdir()
    shutil.copytree(workdir / "checkpoints" / "6", workdir / "checkpoints" / "50")
    assert restore(workdir, experiment)[0] == 9
    said = capsys.readouterr().out
    assert "99 is damaged (the folder is empty)" in said
    assert "50 is damaged (its files are those of step 6)" in said


def test_where_none_is_whole_nothing_is_renamed(workdir, experiment):
    for step in STEPS:
        cut(max(files(workdir / "checkpoints" / str(step)), key=lambda file: file.stat().st_size))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"no whole checkpoint \(3: .* bytes, not .*put back"):
            restore(workdir, experiment)
    assert {f.name for f in (workdir / "checkpoints").iterdir()} == {"3", "6", "9"}


def test_without_its_digests_a_new_checkpoint_is_damaged(workdir, experiment, states, capsys):
    """Or a changed byte of it would pass, as in an old one."""
    newest = workdir / "checkpoints" / "9"
    (newest / digests.FILE).unlink()
    flip(max(files(newest), key=lambda file: file.stat().st_size), 5000)
    step, state = restore(workdir, experiment)
    assert step == 6
    trees.assert_equal(state, states[6])
    assert "checkpoints/9 is damaged (digests.json is missing)" in capsys.readouterr().out


def test_old_checkpoints_have_no_digests_and_load(workdir, experiment, states, capsys):
    for step in STEPS:
        make_old(workdir / "checkpoints" / str(step))
    step, state = restore(workdir, experiment)
    assert step == 9
    trees.assert_equal(state, states[9])
    # Of them, damage shows when they are read, or described.
    cut(max(files(workdir / "checkpoints/9"), key=lambda file: file.stat().st_size))
    empty(workdir / "checkpoints/6/params/_METADATA")
    step, state = restore(workdir, experiment)
    assert step == 3
    trees.assert_equal(state, states[3])
    said = capsys.readouterr().out
    assert "checkpoints/9 is damaged (" in said and "checkpoints/6 is damaged (" in said


def test_numbers_that_are_not_finite_are_damage(workdir, experiment, states):
    bad = states[9]._replace(
        params=jax.tree.map(lambda leaf: leaf * jax.numpy.nan, states[9].params)
    )
    save(workdir, experiment, {12: bad})
    assert restore(workdir, experiment)[0] == 9


def test_the_best_is_chosen_among_whole_ones(workdir):
    (workdir / "scores.json").write_text(
        json.dumps({step: {"value": 1 / step, "of": "m@4"} for step in STEPS})
    )
    flip(max(files(workdir / "checkpoints/3"), key=lambda file: file.stat().st_size), 5000)
    with contextlib.closing(checkpoints.Checkpoints(workdir, keep=9)) as saved:
        assert saved.best_step == 6
    assert (workdir / "checkpoints" / "3.damaged").is_dir()


def test_in_a_bucket_checksums_are_those_of_the_store(experiment, states, capsys):
    with buckets.google() as (_, clients), pytest.MonkeyPatch.context() as patch:
        for name, value in clients.items():
            patch.setenv(name, value)
        workdir = paths.parse(f"gs://{buckets.BUCKET}/damaged")
        save(workdir, experiment, {step: states[step] for step in (6, 9)})
        known = json.loads(paths.read(workdir / "checkpoints/9" / digests.FILE))["files"]
        assert all(size and digest for size, digest in known.values())
        largest = max(known, key=lambda name: known[name][0])
        for kind in ("flipped", "deleted"):
            file = workdir / "checkpoints/9" / largest
            if kind == "deleted":
                paths.remove(file)
            else:
                content = bytearray(file.read_bytes())
                content[len(content) // 2] ^= 0x10
                paths.write(file, bytes(content))
            assert checkpoint_reader.fault(workdir / "checkpoints/9")
        step, state = restore(workdir, experiment)
        assert step == 6
        trees.assert_equal(state, states[6])
        assert "9 is damaged" in capsys.readouterr().out
        assert paths.names(workdir / "checkpoints") == ["6", "9.damaged"]
        save(workdir, experiment, {9: states[9]})
        assert restore(workdir, experiment)[0] == 9


def _copy(source, target):
    """A folder from a disk to a bucket or back, file by file."""
    system, where = paths.file_system(source) if paths.is_remote(source) else (None, "")
    names = (
        [name[len(where) :].lstrip("/") for name in system.find(where)]
        if system
        else [str(f.relative_to(source)) for f in pathlib.Path(source).rglob("*") if f.is_file()]
    )
    for name in names:
        with paths.open_bytes(source / name) as opened:
            paths.write(target / name, opened.read())


def test_between_a_disk_and_a_bucket_a_checkpoint_stays_whole(
    workdir, experiment, states, tmp_path, capsys, monkeypatch
):
    """A bucket's digests are other ones: of files that came from a disk, and the reverse."""
    with buckets.google() as (_, clients), pytest.MonkeyPatch.context() as patch:
        for name, value in clients.items():
            patch.setenv(name, value)
        bucket = paths.parse(f"gs://{buckets.BUCKET}/moved")
        save(bucket, experiment, {9: states[9]})
        down, up = paths.Path(tmp_path / "down/checkpoints/9"), bucket / "checkpoints/12"
        _copy(bucket / "checkpoints/9", down)
        known = json.loads((workdir / "checkpoints/9" / digests.FILE).read_text()) | {"step": 12}
        (workdir / "checkpoints/9" / digests.FILE).write_text(json.dumps(known))
        _copy(paths.Path(workdir / "checkpoints/9"), up)
        for copy in (down, up):
            assert not checkpoint_reader.fault(copy)
            table = json.loads(paths.read(copy / digests.FILE))["files"]
            largest = copy / max(table, key=lambda name: table[name][0])
            with paths.open_bytes(largest) as opened:
                content = bytearray(opened.read())
            content[len(content) // 2] ^= 0x10
            paths.write(largest, bytes(content))
            assert "the content of" in checkpoint_reader.fault(copy)
            if copy is down:
                monkeypatch.setattr(digests.extras, "is_installed", lambda name: False)
                assert not checkpoint_reader.fault(copy)
                assert "of some files only the sizes are compared" in capsys.readouterr().out


def test_a_description_that_is_written_late_is_whole(experiment, states, tmp_path, monkeypatch):
    """Orbax writes it in a thread, which a slow disk or a busy machine keeps waiting."""
    from orbax.checkpoint._src.metadata import checkpoint as orbax_metadata

    slow, written = orbax_metadata._MetadataStoreImpl.update, []

    def update(self, file_path, **fields):
        time.sleep(0.5)
        slow(self, file_path, **fields)
        written.append(sorted(fields))

    monkeypatch.setattr(orbax_metadata._MetadataStoreImpl, "update", update)
    save(tmp_path, experiment, {3: states[3]})
    assert ["custom_metadata", "item_handlers"] in [sorted(set(f)) for f in written], written
    assert not checkpoint_reader.fault(tmp_path / "checkpoints/3")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: json.dumps(json.loads(text) | {"files": {}}),
        lambda text: text.replace("params/", "qarams/", 1),
        lambda text: text.replace('"step": 9', '"step": 1e999'),
        lambda text: text.replace("params/", "params/" + "x" * 300, 1),
    ],
)
def test_a_damaged_table_of_digests_is_noticed(damage, workdir):
    file = workdir / "checkpoints/9" / digests.FILE
    file.write_text(damage(file.read_text()))
    assert checkpoint_reader.fault(workdir / "checkpoints/9") == "digests.json cannot be read"


@pytest.mark.parametrize("name", ["03", "\u00b2", "\u0663", "9" * 5000])
def test_what_is_no_step_is_said_not_to_be_one(name, workdir):
    with pytest.raises(ConfigError, match="has the steps 3, 6, 9; ask for"):
        checkpoint_reader.find_checkpoint(workdir, "init_from", name)


def test_digests_of_an_older_form_hold_for_the_files(workdir, experiment, states):
    for step in STEPS:
        file = workdir / "checkpoints" / str(step) / digests.FILE
        known = json.loads(file.read_text())
        del known["table"]
        file.write_text(json.dumps(known | {"about": "made by another rule"}))
    flip(max(files(workdir / "checkpoints/9/params"), key=lambda file: file.stat().st_size), 5000)
    step, state = restore(workdir, experiment)
    assert step == 6
    trees.assert_equal(state, states[6])
    digests.forget(workdir / "checkpoints/3", "training")
    assert not checkpoint_reader.fault(workdir / "checkpoints/3")


@pytest.mark.parametrize(
    "handlers",
    [None, {}, {"params": "x"}, {"params": "x", "training": "y"}, {"training": "x"}, 3],
    ids=str,
)
def test_how_items_are_read_is_part_of_a_checkpoint(handlers, workdir):
    about = workdir / "checkpoints/9/_CHECKPOINT_METADATA"
    said = json.loads(about.read_text())
    said["item_handlers"] = handlers
    if handlers is None:
        del said["item_handlers"]
    about.write_text(json.dumps(said))
    reason = checkpoint_reader.fault(workdir / "checkpoints/9")
    assert reason == "_CHECKPOINT_METADATA is missing or has changed"


def test_killed_while_it_is_pruned_a_checkpoint_is_pruned(workdir, experiment):
    """Its parameters are whole, and stay the run's."""
    step = workdir / "checkpoints/9"
    digests.forget(step, "training")
    (step / "training/_METADATA").unlink()
    with pytest.raises(ConfigError, match="kept parameters only"):
        restore(workdir, experiment)
    assert not checkpoint_reader.fault(step, ("params",))
    with contextlib.closing(checkpoints.Checkpoints(workdir, keep=9)) as saved:
        saved.prune("best_params")
    assert not (step / "training").exists()
    assert not checkpoint_reader.fault(step, ("params",))


def test_what_a_disk_loses_while_a_run_lasts_is_noticed_at_its_end(workdir, monkeypatch):
    """Such damage changes neither the size of a file nor its time."""
    assert not checkpoint_reader.fault(workdir / "checkpoints/9")
    largest = max(files(workdir / "checkpoints/9"), key=lambda file: file.stat().st_size)
    before = largest.stat()
    flip(largest, 5000)
    os.utime(largest, ns=(before.st_atime_ns, before.st_mtime_ns))
    now = time.monotonic()
    monkeypatch.setattr(digests.time, "monotonic", lambda: now + 3600)
    assert "has changed" in checkpoint_reader.fault(workdir / "checkpoints/9")
