"""What travels through a training step: every record, with all shapes.

The letters of all shapes in qlog:

  B  prompts of a batch          P  tokens of the longest prompt (data.max_prompt_tokens)
  M  rollouts of each prompt     R  tokens of the longest rollout (`Sampling.max_length`)
                                 A  tokens of the longest gold answer (rollout.answer_reserve)

These are sizes. In formulas (the losses, `log_p` in the metrics) P is a probability, that of the
gold answer: p(y* | x*).

Sequences are padded on the right. Arrays are global `jax.Array`s, split over prompts. What
`batch_placement.local_batch` makes of a record has numpy arrays, of the prompts that a process
holds.
"""

from typing import Any, NamedTuple

from jax import Array

from qlog import models


class Prompts(NamedTuple):
    """The prompts of a batch."""

    tokens: Array  # int32 [B, P]
    lengths: Array  # int32 [B], at least 1
    is_prompt: Array  # bool [B], False for what only fills up a batch


class Golds(NamedTuple):
    """The gold answers of a batch."""

    tokens: Array  # int32 [B, A], separator and end of sequence included
    lengths: Array  # int32 [B]


class Rollouts(NamedTuple):
    """M rollouts of each prompt: a rationale z, then the sampled answer if there is one."""

    tokens: Array  # int32 [B, M, R]
    log_probs: Array  # float32 [B, M, R], under the distribution that was sampled; 0 where forced
    is_sampled: Array  # bool [B, M, R], False for forced tokens and padding
    rationale_lengths: Array  # int32 [B, M], thinking-end token included
    lengths: Array  # int32 [B, M], rationale and answer, end of sequence included
    forced: Array  # bool [B, M], the rationale's budget was spent, so its end was forced
    ended_early: Array  # bool [B, M], an end of sequence inside the rationale
    complete: Array  # bool [B, M], the answer ended by itself, within its reserve


class Samples(NamedTuple):
    """What sampling makes of a batch of prompts."""

    rollouts: Rollouts  # [B, M, ...]
    log_w: Array  # float32 [B, M], log p(y* | x*, z) of the gold answer y*
    lane_steps: int  # work of the decode loop: its steps, times the lanes that the pool had
    # float32 [B, M, A], log p of each of the gold answer's tokens; None: they were not asked for
    gold_log_probs: Array | None


class Groups(NamedTuple):
    """A batch of groups as sampled and scored; a group is one prompt and its M rollouts."""

    prompts: Prompts  # [B, ...]
    golds: Golds  # [B, ...]
    rollouts: Rollouts  # [B, M, ...]
    log_w: Array  # float32 [B, M]
    reward: Array  # float32 [B, M], of the sampled answers; 0 where none are scored
    # By name of the scorer: float32 [B, M], what it scored before its weight, which `reward` is the
    # sum of; {} where there is no reward
    reward_parts: dict[str, Array]
    lane_steps: int  # as in `Samples`
    gold_log_probs: Array | None = None  # as in `Samples`


class Trajectories(NamedTuple):
    """What the gradient is taken on: rationale, then answer. R holds the longest of both."""

    tokens: Array  # int32 [B, M, R]
    # bool [B, M, R], tokens of z whose log-probability counts: no forced ones
    rationale_mask: Array
    answer_mask: Array  # bool [B, M, R], tokens of the answer
    old_log_probs: Array  # float32 [B, M, R], under the policy that sampled
    was_sampled: Array  # bool [B, M, R], where `old_log_probs` has a value
    lengths: Array  # int32 [B, M], rationale and answer


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: Array  # int32 scalar, batches of prompts learned from so far
    params: models.Params  # float32
    opt_state: Any  # of the optax optimizer
    loss_state: Any  # of the estimator's loss transform
