"""Rows of other shards, against a plain gather."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlog.parallel import batch_placement, sharding
from qlog.parallel.exchange import add, take

B = 16


def _tree():
    rng = np.random.default_rng(0)
    floats = rng.normal(size=(B, 3)).astype(np.float32)
    floats[[0, 5, 15], 1] = np.nan, np.inf, -np.inf
    return {
        "floats": floats,
        "bools": rng.random((B, 2, 5)) < 0.5,
        "integers": rng.integers(-(2**31), 2**31 - 1, B).astype(np.int32),
    }


@pytest.mark.parametrize(
    "mesh",
    [None, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 8, "tensor": 1}],
    ids=str,
)
def test_rows_come_from_any_shard_as_they_were(mesh):
    mesh = mesh and sharding.make_mesh(**mesh)
    tree = _tree()
    placed = batch_placement.put_batch(mesh, tree)
    gather = jax.jit(functools.partial(take, mesh))
    indices = (
        np.arange(B),  # nothing moves
        np.arange(B)[::-1],  # all rows move
        np.full(8, 5),  # every shard wants the same one
        np.random.default_rng(1).integers(0, B, 24),
    )
    for index in indices:
        found = gather(placed, jnp.asarray(index, jnp.int32))
        for name, x in tree.items():
            np.testing.assert_array_equal(found[name], x[index], err_msg=name)
            assert found[name].dtype == x.dtype
            if mesh is not None:
                spread = sharding.batch_sharding(mesh)
                assert found[name].sharding.is_equivalent_to(spread, x.ndim), name


@pytest.mark.parametrize(
    "mesh",
    [None, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 8, "tensor": 1}],
    ids=str,
)
def test_rows_are_added_where_they_belong(mesh):
    mesh = mesh and sharding.make_mesh(**mesh)
    rng = np.random.default_rng(0)
    total, rows = rng.integers(0, 100, (B, 3)), rng.integers(0, 100, (B, 3))
    total, rows = total.astype(np.float32), rows.astype(np.float32)  # sums of these are exact
    placed = batch_placement.put_batch(mesh, (total, rows))
    give = jax.jit(functools.partial(add, mesh))
    for index in (np.arange(B), np.arange(B)[::-1], np.full(B, 5), rng.integers(0, B, B)):
        wanted = total.copy()
        np.add.at(wanted, index, rows)
        np.testing.assert_array_equal(give(*placed, jnp.asarray(index, jnp.int32)), wanted)


def test_no_shard_gets_the_whole_batch():
    mesh = sharding.make_mesh(1, 8, 1)
    placed = batch_placement.put_batch(mesh, _tree())
    program = (
        jax.jit(functools.partial(take, mesh)).lower(placed, jnp.zeros(8, jnp.int32)).compile()
    )
    text = program.as_text()
    assert "reduce-scatter" in text and "all-gather" not in text and "all-to-all" not in text
