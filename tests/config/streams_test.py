"""The numbers behind the streams of random keys: runs resume by them."""

import jax
import numpy as np

from qlog.config.streams import StepStream, Stream, stream_key


def test_streams_keep_their_numbers():
    """A renumbered stream would change what a resumed run draws."""
    assert {stream.name: stream.value for stream in Stream} == {
        "INIT": 1,
        "EVALUATION": 2,
        "TRAIN": 1000,
    }
    assert {stream.name: stream.value for stream in StepStream} == {"LOSS": 1}


def test_a_key_is_that_of_its_number():
    key = stream_key(7, Stream.TRAIN, step=3)
    expected = jax.random.fold_in(jax.random.key(7), 1003)
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(expected))
