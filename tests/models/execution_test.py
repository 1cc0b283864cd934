"""An Execution is static to jit: equal policies must not compile their programs twice."""

import functools

import jax
import jax.numpy as jnp
import pytest
import tiny

from qlog import models
from qlog.parallel import sharding
from qlog.policy import Policy


@pytest.mark.parametrize("kernels", ["blocks", "tpu", "cudnn"])
def test_equal_policies_have_equal_executions(kernels):
    make = functools.partial(Policy, tiny.SHAPE, tiny.VALID_VOCAB, remat="dots", attention=kernels)
    one, other = (make(mesh=sharding.make_mesh(2, 2, 2)).execution for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != make(mesh=None).execution


def test_equal_executions_compile_once():
    traces = []

    @functools.partial(jax.jit, static_argnames="execution")
    def forward(params, tokens, execution):
        traces.append(execution)
        return models.extend(params, tiny.SHAPE, tokens, execution=execution)

    for _ in range(2):
        execution = Policy(tiny.SHAPE, tiny.VALID_VOCAB, jnp.bfloat16).execution
        forward(tiny.params(), jnp.ones((1, 1, 4), jnp.int32), execution)
    assert len(traces) == 1
