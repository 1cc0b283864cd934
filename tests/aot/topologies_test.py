"""Meshes of the configs on TPU slices and GPU nodes that are not here: made right, or refused."""

import importlib.util
import itertools
import types

import jax
import numpy as np
import pytest
import tiny
from places import ROOT

from qlog import experiment
from qlog.aot.compiler import topology_devices
from qlog.config import schema
from qlog.config.check import check_batches
from qlog.errors import ConfigError
from qlog.parallel import batch_placement, sharding

NAMES = ("finqa", "hotpotqa", "musique")


class Device(types.SimpleNamespace):
    """A stand-in, told apart as JAX's devices are."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def get_config(name, arg="", **changes):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return schema.merge(module.get_config(arg), changes)


def gpus(nodes, per_node=8, one_process_each=True):
    """Stand-ins for the devices of GPU nodes, as JAX describes them: a node is a slice."""
    return [
        Device(
            id=i,
            platform="gpu",
            device_kind="NVIDIA H100 80GB HBM3",
            slice_index=i // per_node,
            process_index=i if one_process_each else i // per_node,
        )
        for i in range(nodes * per_node)
    ]


def tpus(shape, slices=1, kind="TPU v6 lite", per_host=(2, 2, 1)):
    """Stand-ins for a slice of TPUs, where no compiler tells of real ones."""
    found = []
    for index in range(slices):
        for place in itertools.product(*map(range, reversed(shape))):
            coords = place[::-1]
            host = sum(
                c // h * 100**i for i, (c, h) in enumerate(zip(coords, per_host, strict=True))
            )
            found.append(
                Device(
                    id=len(found),
                    platform="tpu",
                    device_kind=kind,
                    slice_index=index,
                    coords=list(coords),
                    core_on_chip=0,
                    process_index=index * 10**6 + host,
                    num_cores=1,
                )
            )
    return found


def assert_right(mesh, devices):
    """Every device once; only the data axis crosses slices."""
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)
    slices = np.vectorize(lambda d: getattr(d, "slice_index", 0))(mesh.devices)
    assert (slices == slices[:, :1, :1]).all()
    assert mesh.shape["data"] % len(np.unique(slices)) == 0


def check(config, devices):
    """The mesh of a config on the devices, or the sentence that refuses it."""
    try:
        mesh = sharding.make_mesh(**config.mesh, devices=devices)
        check_batches(config, mesh)
    except ConfigError as error:
        assert "\n" not in str(error)
        return str(error)
    assert_right(mesh, devices)
    return mesh


def with_one_flag(config, refusal):
    """The config with the one flag that a refusal names."""
    flag, _, value = refusal.partition("--config.")[2].partition(",")[0].partition("=")
    assert flag == "train.prompts_per_step", refusal
    return schema.merge(config, {"train": {"prompts_per_step": int(value)}})


@pytest.mark.parametrize("nodes, name", list(itertools.product((1, 2, 4, 8), NAMES)))
def test_the_papers_configs_run_on_gpu_nodes(nodes, name):
    """One process per GPU, as SLURM starts them: tensor groups span processes, but not nodes."""
    config, devices = get_config(name), gpus(nodes)
    found = check(config, devices)
    if isinstance(found, str):
        found = check(with_one_flag(config, found), devices)
    tensor = config.mesh.tensor
    assert dict(found.shape) == {"data": nodes, "fsdp": 8 // tensor, "tensor": tensor}


@pytest.mark.parametrize(
    "shape, slices",
    [
        ((2, 4, 1), 1),
        ((4, 4, 1), 1),
        ((4, 4, 1), 2),
        ((4, 4, 1), 4),
        ((8, 8, 1), 1),
        ((16, 16, 1), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_the_papers_configs_run_on_8_to_256_chips_with_one_flag(shape, slices, name):
    config, devices = get_config(name), tpus(shape, slices)
    found = check(config, devices)
    shards = len(devices) // config.mesh.tensor
    assert isinstance(found, str) == (shards > 32)
    if isinstance(found, str):
        assert f"--config.train.prompts_per_step={shards}," in found
        found = check(with_one_flag(config, found), devices)
    assert found.shape["data"] == slices


@pytest.mark.parametrize(
    "topology",
    [
        "v5e:4x4",
        "v6e:2x4",
        "v6e:4x4",
        "v6e:8x8",
        "v5p:2x2x2",
        "v5p:4x4x4",
        "tpu7x:2x2x1",
        "tpu7x:4x4x4",
    ],
)
def test_every_mesh_on_real_topologies(topology):
    """As the TPU compiler describes them: one to four slices, tensor groups of 1 to 8."""
    pytest.importorskip("libtpu", reason="no TPU compiler: launch/install tpu")
    for slices in (1, 2, 4):
        devices = topology_devices(topology if slices == 1 else f"{slices}*{topology}")
        for tensor, name in itertools.product((1, 2, 4, 8), NAMES):
            config = get_config(name, mesh={"tensor": tensor}, train={"prompts_per_step": 512})
            mesh = check(config, devices)
            assert mesh.shape["tensor"] == tensor and mesh.shape["data"] == slices
        refused = check(get_config("hotpotqa", mesh={"tensor": 3}), devices)
        assert "mesh.tensor=3" in refused


@pytest.mark.parametrize(
    "topology, name, model, tensor, prompts",
    [
        ("v5e:4x4", "finqa", "", 0, 0),
        ("v5e:4x4", "hotpotqa", "", 0, 0),
        ("v6e:2x4", "finqa", "", 0, 0),
        ("v6e:4x4", "finqa", "", 0, 0),
        ("v5p:4x4x4", "hotpotqa", "Qwen/Qwen3-8B", 4, 0),
        ("v5p:8x8x8", "hotpotqa", "Qwen/Qwen3-32B", 8, 64),
    ],
)
def test_rows_of_the_readme(topology, name, model, tensor, prompts):
    """128 hosts share 64 prompts: a batch need not be a multiple of the processes."""
    pytest.importorskip("libtpu", reason="no TPU compiler: launch/install tpu")
    changes = {"mesh": {"tensor": tensor}} if tensor else {}
    if model:
        changes |= {"model": model, "weights": model}
    if prompts:
        changes["train"] = {"prompts_per_step": prompts}
    experiment.prepare_shapes(get_config(name, **changes), topology_devices(topology))


def test_slices_of_one_mesh_and_those_that_differ():
    nodes = gpus(2)
    one = sharding.make_mesh(1, -1, 2, slices=1, devices=nodes)
    assert dict(one.shape) == {"data": 1, "fsdp": 8, "tensor": 2}
    two = sharding.make_mesh(2, -1, 2, devices=nodes)
    assert dict(two.shape) == {"data": 4, "fsdp": 2, "tensor": 2}
    with pytest.raises(ConfigError, match="does not fit the 8 devices in each of the 2 slices"):
        sharding.make_mesh(1, 16, 1, devices=nodes)
    with pytest.raises(ConfigError, match="the slices have 8, 7 devices"):
        sharding.make_mesh(1, -1, 1, devices=nodes[:-1])
    with pytest.raises(ConfigError, match="mesh.slices=3 must be 0"):
        sharding.make_mesh(1, -1, 1, slices=3, devices=nodes)


@pytest.mark.parametrize("sizes", [(1, 4, 2), (1, 2, 4), (2, 2, 2), (1, 1, 8)], ids=str)
def test_rows_follow_from_the_mesh_whatever_axis_spans_processes(sizes, monkeypatch):
    """8 processes with a GPU each together answer for every row once, and hold what they need."""
    mesh = sharding.make_mesh(*sizes, devices=gpus(1))
    place = sharding.batch_sharding(mesh)
    held, owned = [], []
    for process in range(8):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        everywhere = place.devices_indices_map((16,))
        mine = {d: i for d, i in everywhere.items() if d.process_index == process}
        monkeypatch.setattr(
            type(place), "addressable_devices_indices_map", lambda self, shape, mine=mine: mine
        )
        held.append(batch_placement.local_prompts(mesh, 16).tolist())
        owned.append(batch_placement.owned_prompts(mesh, 16).tolist())
    assert sorted(sum(owned, [])) == list(range(16))
    assert all(set(o) <= set(h) for o, h in zip(owned, held, strict=True))
    shards = sizes[0] * sizes[1]
    assert all(len(rows) == 16 // shards for rows in held)


def test_tiny_configs_keep_to_the_mesh_they_had():
    mesh = sharding.make_mesh(2, 2, 2)
    assert [d.id for d in mesh.devices.flat] == list(range(8))
    with pytest.raises(ConfigError, match="prompts_per_step = 4 is not a multiple of the 8 shards"):
        check_batches(tiny.config(mesh={"data": 8}), sharding.make_mesh(8, 1, 1))
