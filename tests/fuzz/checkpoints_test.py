"""Random damage to checkpoints and workdirs: a whole state is taken, or a sentence says why not."""

import shutil

import damage
import fuzzing
import jax
import pytest
import same_runs
import tiny
import trees
from damage import STEPS
from hypothesis import strategies as st

from qlog.errors import ConfigError
from qlog.experiment import prepare
from qlog.runs import checkpoint_reader

pytestmark = pytest.mark.slow
ONE = jax.devices()[:1]
experiment, states, whole = damage.experiment, damage.states, damage.whole  # fixtures


# ---- Ways to damage: each takes files and folders, a place in the file, and some bytes ----


def _flip(file, other, place, content):
    if size := file.stat().st_size:
        damage.flip(file, int(place * size), len(content) % 8)


def _cut(file, other, place, content):
    file.write_bytes(file.read_bytes()[: int(place * file.stat().st_size)])


def _insert(file, other, place, content):
    whole = file.read_bytes()
    at = int(place * len(whole))
    file.write_bytes(whole[:at] + content + whole[at:])


def _overwrite(file, other, place, content):
    whole = file.read_bytes()
    at = int(place * len(whole))
    file.write_bytes(whole[:at] + content + whole[at + len(content) :])


def _replace(file, other, place, content):
    file.write_bytes(content)


def _swap(file, other, place, content):
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two)
    other.write_bytes(one)


def _copy(file, other, place, content):
    file.write_bytes(other.read_bytes())


def _delete(file, other, place, content):
    file.unlink()


def _delete_folder(file, other, place, content):
    shutil.rmtree(file.parent)


def _make_folder(file, other, place, content):
    damage.folder(file)


def _rename(file, other, place, content):
    file.rename(file.with_name(f"{file.name}.old"))


def _link_to_nothing(file, other, place, content):
    file.unlink()
    file.symlink_to("nowhere")


KINDS = (
    _flip,
    _flip,
    _cut,
    _insert,
    _overwrite,
    _replace,
    _swap,
    _copy,
    _delete,
    _delete_folder,
    _make_folder,
    _rename,
    _link_to_nothing,
)
DAMAGES = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.integers(0, 10**6),  # which file
        st.integers(0, 10**6),  # which other one
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=64),
    ),
    min_size=1,
    max_size=4,
)


def apply(damages, folder):
    """Damages files below a folder; those that earlier damage took away are passed over."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    for kind, one, two, place, content in damages:
        file, other = found[one % len(found)], found[two % len(found)]
        if file.is_file() and other.is_file():
            kind(file, other, place, content)


def content(folder):
    """{name: bytes} of all files that must be whole."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in damage.files(folder)}


# ---- Checkpoints alone ----


def test_damaged_checkpoints(record_property, whole, experiment, states, tmp_path, capsys):
    before = {step: content(whole / "checkpoints" / str(step)) for step in STEPS}
    workdir = tmp_path / "run"

    def holds(damages):
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(whole, workdir)
        apply(damages, workdir / "checkpoints")
        intact = [
            step for step in STEPS if content(workdir / "checkpoints" / str(step)) == before[step]
        ]
        # ---- Who only reads: the same parameters, and nothing is renamed ----
        there = sorted(workdir.rglob("*"))
        try:
            found = checkpoint_reader.load_params(
                workdir, experiment.abstract_params(), "--workdir", "latest"
            )
        except ConfigError as error:
            assert not intact and "\n" not in str(error)
        else:
            taken = next(s for s in STEPS if _is_equal(found, states[s].params))
            assert taken >= max(intact, default=0)
        assert sorted(workdir.rglob("*")) == there
        # ---- Who goes on ----
        capsys.readouterr()
        try:
            step, state = damage.restore(workdir, experiment)
        except ConfigError as error:
            assert not intact and "\n" not in str(error) and "checkpoint" in str(error)
            return
        trees.assert_equal(state, states[step])
        assert step >= max(intact, default=0)
        said = capsys.readouterr().out.replace("\n", "")
        for passed in (s for s in STEPS if s > step):
            if (whole / "checkpoints" / str(passed)).is_dir() and passed not in intact:
                is_gone = not any((workdir / "checkpoints").glob(f"{passed}*"))
                assert is_gone or f"{passed} is damaged (" in said

    fuzzing.try_cases(record_property, "damaged checkpoints", 150, DAMAGES, holds)


def _is_equal(one, two):
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), one, two)
    return all(jax.tree.leaves(equal))


# ---- A whole workdir: the run goes on to the same end, or refuses in a sentence ----

RUN = tiny.config(
    train={"steps": 6}, checkpoint={"every": 1, "keep": 9}, evaluation={"every": 3, "prompts": 4}
)
_STOPPED_AT = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that has finished, and the same after its fourth step."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.run(RUN, folder / "finished", ONE)
    cut_short = RUN.copy_and_resolve_references()
    cut_short.train.steps, cut_short.evaluation.every = _STOPPED_AT, 3
    tiny.run(cut_short, folder / "stopped", ONE)
    return folder


def test_damaged_workdirs(record_property, runs, tmp_path):
    abstract = prepare(RUN, ONE, train=False, evaluate=False).abstract_params()
    load = lambda workdir, step: checkpoint_reader.load_params(workdir, abstract, which=str(step))
    expected = {step: load(runs / "finished", step) for step in range(1, 7)}
    workdir = tmp_path / "run"

    def holds(case):
        name, damages = case
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(runs / name, workdir)
        apply(damages, workdir)
        try:
            tiny.run(RUN, workdir, ONE)
        except ConfigError as error:
            assert "\n" not in str(error) and ("config" in str(error) or "workdir" in str(error))
            return
        # ---- Every checkpoint that is there has the numbers of an undamaged run ----
        left = [f for f in (workdir / "checkpoints").iterdir() if f.name.isdigit()]
        for folder in left:
            if not checkpoint_reader.fault(folder, ("params",)):
                trees.assert_equal(load(workdir, folder.name), expected[int(folder.name)])
        if name == "stopped":  # it was trained to its end, and each new step is in the log once
            assert "6" in {folder.name for folder in left}
            assert _new_steps(workdir) == _new_steps(runs / "finished")

    cases = st.tuples(st.sampled_from(["stopped", "finished"]), DAMAGES)
    fuzzing.try_cases(record_property, "damaged workdirs", 60, cases, holds)


def _new_steps(workdir):
    """What the log says of the steps that a stopped run had still to do."""
    return [
        row
        for row in same_runs.rows(workdir)
        if row.get("phase") == "train" and row["step"] >= _STOPPED_AT
    ]
