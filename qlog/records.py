"""What travels through a step, with all shapes.

B prompts of up to P tokens, M rollouts each of up to R tokens, gold answers of up to A tokens.
"""

from typing import Any, NamedTuple

from jax import Array

from qlog import models


class Prompts(NamedTuple):
    """tokens: int32 [B, P] right-padded; lengths: int32 [B]; is_prompt: bool [B]."""

    tokens: Array
    lengths: Array
    is_prompt: Array


class Golds(NamedTuple):
    """tokens: int32 [B, A], right-padded, end of sequence included; lengths: int32 [B]."""

    tokens: Array
    lengths: Array


class Rollouts(NamedTuple):
    """M rollouts of each of B prompts; R is `Sampling.max_length`.

    tokens: int32 [B, M, R]. log_probs: float32 [B, M, R] under the law that was sampled, 0 where
    nothing was. is_sampled: bool [B, M, R]. rationale_lengths, lengths: int32 [B, M], closing
    included, end of sequence included. forced: the budget was spent. ended_early: an end of
    sequence inside the rationale. complete: the answer ended by itself, within its reserve.
    """

    tokens: Array
    log_probs: Array
    is_sampled: Array
    rationale_lengths: Array
    lengths: Array
    forced: Array
    ended_early: Array
    complete: Array


class Samples(NamedTuple):
    """rollouts: of B prompts by M. log_w: float32 [B, M], log p(y* | x*, z). row_steps: decode
    steps times rows of the pool, how many were executed."""

    rollouts: Rollouts
    log_w: Array
    row_steps: int


class Groups(NamedTuple):
    """A batch of groups as sampled and scored; arrays are global, B prompts by M rollouts."""

    prompts: Prompts
    gold: Array  # int32 [B, A]
    gold_lengths: Array  # int32 [B]
    rollouts: Rollouts
    log_w: Array  # float32 [B, M]
    reward: Array  # float32 [B, M]
    row_steps: int  # of the decode loop


class Trajectories(NamedTuple):
    """What the gradient is taken on: rationale, then answer, right-padded. All [B, M, R].

    tokens: int32. rationale_mask: tokens of z that carry its log-probability (forced ones do
    not). answer_mask: tokens of the answer. old_log_probs: float32, of the policy that sampled;
    was_sampled: where there is one. lengths: int32 [B, M], rationale and answer.
    """

    tokens: Array
    rationale_mask: Array
    answer_mask: Array
    old_log_probs: Array
    was_sampled: Array
    lengths: Array


class TrainState(NamedTuple):
    """Everything that a step changes. step: int32 scalar, batches of prompts learned from so far."""

    step: Array
    params: models.Params
    opt_state: Any
    loss_state: Any
