"""A step on eight devices gives the samples, losses and parameters of one device."""

import dataclasses
import types

import jax
import numpy as np
import pytest
import tiny
import trees

from qlog import models
from qlog.config import schema
from qlog.errors import ConfigError
from qlog.experiment import prepare
from qlog.learner.optimizer import apply_update
from qlog.parallel import batch_placement, sharding
from qlog.rollouts import decoding, sampler
from qlog.runs import checkpoint_reader
from qlog.runs.log import read_jsonl

# float32 sums in another order; Adam's eps keeps its first step smooth.
CLOSE = dict(rtol=1e-4, atol=1e-5)


def _config(**mesh):
    config = tiny.config(
        train={"steps": 1, "prompts_per_step": 8, "rollouts_prompts": 8},
        loss=schema.loss(tiny.graded_garl, q=0.75),
        optimizer={"eps": 1e-3},
        mesh=mesh,
        evaluation={"prompts_per_batch": 1},
    )
    config.architecture.num_layers = 1
    return config


def _one_step(folder, devices=None, **mesh):
    config = _config(**mesh)
    tiny.run(config, folder, devices)
    abstract = prepare(config, devices).abstract_params()
    row = read_jsonl(folder / "metrics.jsonl")[0]
    return (
        read_jsonl(folder / "rollouts.jsonl"),
        row,
        checkpoint_reader.load_params(folder, abstract),
    )


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return _one_step(tmp_path_factory.mktemp("one"), jax.devices()[:1])


@pytest.mark.parametrize(
    "mesh",
    [pytest.param({"data": 8}, marks=pytest.mark.slow), {"data": 2, "fsdp": 2, "tensor": 2}],
    ids=str,
)
def test_a_mesh_gives_the_numbers_of_one_device(one_device, mesh, tmp_path):
    samples, metrics, params = one_device
    sharded_samples, sharded_metrics, sharded_params = _one_step(tmp_path, **mesh)
    assert len(samples) == len(sharded_samples) == 8 * 4
    for a, b in zip(samples, sharded_samples, strict=True):
        assert (a["id"], a["rationale"], a["answer"]) == (b["id"], b["rationale"], b["answer"])
        np.testing.assert_allclose(b["log_w"], a["log_w"], **CLOSE)
    assert {"loss", "log_p", "reward", "grad_norm", "mismatch"} <= set(metrics)
    for name in [n for n in metrics if n not in ("phase", "compilations") and "/" not in n]:
        np.testing.assert_allclose(sharded_metrics[name], metrics[name], **CLOSE, err_msg=name)
    trees.assert_close(sharded_params, params, **CLOSE)


def test_an_update_keeps_everything_in_its_place():
    """Else the second step compiles every program again, and FSDP's saving is lost."""
    experiment = prepare(_config(data=2, fsdp=2, tensor=2))
    state = experiment.init_state(experiment.init_params())
    places = jax.tree.map(lambda x: x.sharding, state)
    grads = jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, np.float32)), state.params)
    after, _ = apply_update(
        state, state.loss_state, grads, optimizer=experiment.optimizer, mesh=experiment.mesh
    )
    embed = after.params["embed"]
    assert embed.addressable_shards[0].data.size == embed.size // 4
    same = jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), after, places)
    assert all(jax.tree.leaves(same))


def test_a_mesh_that_does_not_fit_is_named():
    with pytest.raises(
        ConfigError, match="mesh.data=3, mesh.fsdp=1, mesh.tensor=1 does not fit the 8"
    ):
        sharding.make_mesh(3, 1, 1)
    with pytest.raises(ConfigError, match="at most one may be -1"):
        sharding.make_mesh(-1, -1, 1)


def test_caches_are_split_over_prompts_and_heads_from_the_start():
    """Zeros know no mesh: left to the compiler, every device would hold every rollout's cache."""
    policy = dataclasses.replace(tiny.POLICY, mesh=sharding.make_mesh(2, 2, 2))
    prompts = batch_placement.put_batch(policy.mesh, np.full((8, 6), 7, np.int32))
    lengths, uids = batch_placement.put_batch(
        policy.mesh, (np.full(8, 5, np.int32), np.arange(8, dtype=np.uint32))
    )
    keys = sampler.rollout_keys(jax.random.key(0), uids, 4)
    settings = decoding.Sampling(4, 4, closing=(3,), eos=(2,), pad=0)
    params = models.init(policy.config, jax.random.key(0))
    budgets, ids = batch_placement.put_batch(
        policy.mesh, (np.full((8, 4), 4, np.int32), np.arange(32, dtype=np.int32).reshape(8, 4))
    )
    prefix = decoding.prefill(params, policy, prompts, lengths)
    wave = decoding.Batch(prompts, lengths, keys, budgets)
    pool = decoding.initial_pool(policy, prefix, wave, ids, settings, slots=16)
    for cache in jax.tree.leaves((pool.suffix.layers, pool.prefix.keys)):
        assert cache.addressable_shards[0].data.size == cache.size // 8


@pytest.mark.parametrize(
    "slices, shards, expected",
    [(1, 8, 8), (2, 8, 4), (4, 8, 2), (2, 1, 1), (2, 5, 5)],
    ids=["one slice", "two", "four", "a shard of both", "shards that do not split evenly"],
)
def test_neighbours_are_shards_of_one_slice(slices, shards, expected):
    """Of meshes over several slices, and of those that take several as one."""

    class Device(types.SimpleNamespace):
        __hash__ = object.__hash__

    num_devices = shards * 2
    devices = [Device(slice_index=i * slices // num_devices) for i in range(num_devices)]
    mesh = types.SimpleNamespace(
        devices=np.array(devices).reshape(shards, 1, 2), shape={"data": shards, "fsdp": 1}
    )
    assert sharding.batch_shards_of_a_slice(mesh) == expected
