"""Checkpoints of a tiny run, and ways to damage their files."""

import contextlib
import json
import shutil

import jax
import pytest
import tiny

from qlog.config import schema
from qlog.experiment import prepare
from qlog.runs import checkpoints, digests

STEPS = (3, 6, 9)  # those with checkpoints


def save(workdir, experiment, states):
    with contextlib.closing(checkpoints.Checkpoints(workdir, keep=9)) as saved:
        for step, state in states.items():
            saved.save(state, step=step, config=schema.to_json(experiment.config))


def restore(workdir, experiment):
    """(the step taken, its state), as a run that starts there."""
    with contextlib.closing(checkpoints.Checkpoints(workdir, keep=9)) as saved:
        state = saved.restore(experiment.abstract_state())
        return saved.latest_step, state


def files(folder):
    """The files of a checkpoint that must be whole; Orbax writes the other for its own use."""
    found = sorted(f for f in folder.rglob("*") if f.is_file())
    return [f for f in found if f.name != "commit_success.txt" or f.parent != folder]


def make_old(folder):
    """A checkpoint as versions without digests wrote it."""
    (folder / digests.FILE).unlink()
    about = folder / "_CHECKPOINT_METADATA"
    content = json.loads(about.read_text())
    del content["custom_metadata"]["has_digests"]
    about.write_text(json.dumps(content))


def flip(file, offset, bit=4):
    content = bytearray(file.read_bytes())
    content[offset] ^= 1 << bit
    file.write_bytes(bytes(content))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def folder(file):
    file.unlink()
    file.mkdir()


DAMAGE = {
    "flipped": lambda file: flip(file, file.stat().st_size // 2),
    "cut": cut,
    "empty": empty,
    "deleted": lambda file: file.unlink(),
    "a folder": folder,
}


# ---- Fixtures; a test file that wants them writes `states = damage.states` and so on ----


@pytest.fixture(scope="module")
def experiment():
    return prepare(tiny.config(), jax.devices()[:1], train=False, evaluate=False)


@pytest.fixture(scope="module")
def states(experiment):
    """A state for each step, with parameters that differ from step to step."""
    state = experiment.init_state(experiment.init_params())
    scaled = lambda step: jax.tree.map(lambda leaf: leaf * (1 + step), state.params)
    return {step: state._replace(params=scaled(step)) for step in STEPS}


@pytest.fixture(scope="module")
def whole(experiment, states, tmp_path_factory):
    """A workdir with a whole checkpoint of each step."""
    workdir = tmp_path_factory.mktemp("whole")
    save(workdir, experiment, states)
    return workdir


@pytest.fixture
def workdir(whole, tmp_path):
    """A copy of `whole`, to damage."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"
