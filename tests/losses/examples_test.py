"""The losses inside a user's own trainer, the package's example."""

import numpy as np
import pytest

from qlog import losses
from qlog.losses.examples import own_trainer


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
@pytest.mark.parametrize("name", ["garl", "paft"])
def test_eight_devices_train_as_one(name, how):
    """PAFT's draws included.

    The last bits of a sum depend on its order, and Adam's first steps depend on them.
    """
    estimator = losses.build(name, q=0.75)
    many, history = own_trainer.train(estimator, 15, how=how)
    one, same = own_trainer.train(estimator, 15, 1, how=how)
    np.testing.assert_allclose(history, same, rtol=1e-3)
    for key in one:
        np.testing.assert_allclose(many[key], one[key], rtol=1e-3, atol=1e-3)
    assert history[-1] > 3 * history[0]
