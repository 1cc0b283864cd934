"""The random streams of a run: every key that it draws with comes from config.seed and a stream.

A key is a pure function of (seed, stream, step), so a resumed run draws what it would have drawn.
"""

import enum

import jax
from jax import Array


class Stream(enum.IntEnum):
    """What a run draws random numbers for. Never renumber: runs would not resume bit for bit."""

    INIT = 1  # random parameters
    EVALUATION = 2  # rollouts of evaluation: the same at every step, so that steps compare
    TRAIN = 1000  # + step, from 0: everything of one training step. Add new streams below


class StepStream(enum.IntEnum):
    """What is drawn inside a training step apart from its rollouts. Never renumber, either.

    Rollouts fold a prompt's uid into the step's key (`sampler.rollout_keys`).
    """

    LOSS = 1  # resampling and the like in a loss transform


def stream_key(seed: int, stream: Stream, step: int = 0) -> Array:
    """The key of a stream: `fold_in(key(seed), stream + step)`.

    Args:
      step: of training, from 0; only TRAIN has steps.
    """
    return jax.random.fold_in(jax.random.key(seed), stream + step)
