"""Log-probabilities of a whole batch: the same from blocks of several shards as on one device."""

import dataclasses

import numpy as np
import tiny

from qlog.learner import forward
from qlog.learner.types import Microbatch
from qlog.parallel import batch_placement, sharding


def test_the_reference_of_blocks_on_several_shards_is_that_of_whole_prompts():
    batch = tiny.uneven_batch(8, 4, 8)
    mesh = sharding.make_mesh(2, 2, 2)

    def reference(mesh, microbatch):
        prompts, trajectories, *_ = batch_placement.put_batch(mesh, batch)
        policy = dataclasses.replace(tiny.POLICY, mesh=mesh)
        return forward.reference_log_probs(
            tiny.params(), policy, prompts, trajectories, 0.7, microbatch
        )

    wanted, got = reference(None, Microbatch(8, 4)), reference(mesh, Microbatch(4, 1))
    is_token = np.arange(8) < batch.trajectories.lengths[..., None]
    np.testing.assert_allclose(got[is_token], wanted[is_token], rtol=1e-4, atol=1e-5)
    assert got.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 3)
