"""How much arithmetic and memory traffic work needs, whatever a program executes for it.

Numbers of rollouts and lengths may be arrays, for work of uneven lengths.
"""

from typing import NamedTuple

from qlog.models.config import DecoderConfig


class Need(NamedTuple):
    """What work takes if M rollouts share their prompt and logits are computed where they are used.

    Prompts count as whole forward passes, as is usual, though only keys and values are needed of
    their last layer.
    """

    flops: float
    bytes: float = 0.0  # read from memory


def prefill_need(config: DecoderConfig, prompts: int, length: int) -> Need:
    """Prompts of `length` tokens; no logits."""
    return Need(prompts * (2 * _body(config) * length + _attention(config, 0, length)))


def continuation_need(config: DecoderConfig, rollouts: int, start: int, length: int) -> Need:
    """Continuations of `length` tokens after `start` others, with logits."""
    weights = _body(config) + _head(config)
    return Need(rollouts * (2 * weights * length + _attention(config, start, start + length)))


def decode_need(
    config: DecoderConfig,
    prompts: int,
    rollouts: int,
    start: int,
    length: int,
    itemsize: int,
    cache_itemsize: float | None = None,
) -> Need:
    """All M rollouts of each prompt, decoded step by step.

    Every step reads the weights once, whose numbers take `itemsize` bytes, and once the keys and
    values of each group's prompt and of each rollout, whose numbers take `cache_itemsize` bytes
    (None: as many).
    """
    of_cache = itemsize if cache_itemsize is None else cache_itemsize
    flops = continuation_need(config, prompts * rollouts, start, length).flops
    per_slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    slots = prompts * start * length + prompts * rollouts * length * (length + 1) / 2
    weights = (_body(config) + _head(config)) * length
    return Need(flops, itemsize * weights + of_cache * per_slot * slots)


def train_need(config: DecoderConfig, prompts: int, rollouts: int, start: int, length: int) -> Need:
    """Forward and backward, three times the forward pass: prompts once, continuations each."""
    forward = prefill_need(config, prompts, start).flops
    forward += continuation_need(config, prompts * rollouts, start, length).flops
    return Need(3 * forward)


def recomputed_need(
    config: DecoderConfig,
    prompts: int,
    rollouts: int,
    start: int,
    length: int,
    body: bool,
    attention: bool,
    head: bool,
) -> Need:
    """What a backward pass of `train_need` computes again of the forward pass.

    Args:
      body: whether the layers' matrix products are.
      attention: whether attention is.
      head: whether logits are.
    """
    tokens = prompts * (start + rollouts * length)
    flops = 2 * _body(config) * tokens * body
    flops += 2 * _head(config) * prompts * rollouts * length * head
    of_prompt = _attention(config, 0, start)
    of_rollouts = rollouts * _attention(config, start, start + length)
    return Need(flops + prompts * (of_prompt + of_rollouts) * attention)


def _body(config: DecoderConfig) -> float:
    """Weights of the layers' matrices."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    per_layer = config.width * (heads * config.head_dim + 3 * config.mlp_width)
    return config.num_layers * per_layer


def _head(config: DecoderConfig) -> float:
    return config.vocab_size * config.width


def _attention(config: DecoderConfig, first: int, last: int) -> float:
    """Scores and mix of causal queries at positions first to last - 1."""
    keys = (last - first) * (first + 1 + last) / 2
    return 4 * config.num_layers * config.num_heads * config.head_dim * keys
