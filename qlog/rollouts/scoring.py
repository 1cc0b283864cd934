"""log w: the gold answers' log-probabilities, read off the caches that sampling leaves."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from qlog import models
from qlog.models import head
from qlog.policy import Policy
from qlog.records import Golds


@functools.partial(jax.jit, static_argnames=("policy",))
def token_log_probs(
    params: models.Params,
    policy: Policy,
    prefix: models.Prefix,
    suffix: models.Suffix,
    tokens: Array,
    rationale_lengths: Array,
    golds: Golds,
) -> Array:
    """log p of each token of the gold answer y*, given x*, z_m and y*'s tokens before it.

    At temperature 1. Their sum is log w_m = log p(y* | x*, z_m).

    Only the thinking-end token and the gold answer pass through the model: 1 + A tokens instead of
    P + R + A. In the sampler's pool B is the number of blocks and M the lanes of each.

    Args:
      prefix: caches of the prompts' tokens but the last, [B, K, P, C] per layer.
      suffix: caches of the rollouts, [B, K, M, S, C] per layer; slot i has the keys and values of
        the token before `tokens[..., i]`.
      tokens: int32 [B, M, R], the rollouts.
      rationale_lengths: int32 [B, M], thinking-end token included, at least 1.
      golds: of the B prompts; a length of 0 gives log w = 0.

    Returns:
      float32 [B, M, A], 0 behind the gold answer's end.
    """
    num_prompts, num_rollouts, _ = tokens.shape
    # A token predicts the next one. So the inputs are the thinking-end token and the gold answer
    # without its last token; the targets are the gold answer.
    last = jnp.take_along_axis(tokens, rationale_lengths[..., None] - 1, axis=-1)  # [B, M, 1]
    num_tokens = golds.tokens.shape[-1]
    gold_m = jnp.broadcast_to(golds.tokens[:, None], (num_prompts, num_rollouts, num_tokens))
    inputs = jnp.concatenate([last, gold_m[..., :-1]], axis=-1)  # [B, M, A]

    # The prefix lacks the prompt's last token, which is in slot 0 of the suffix (see decoding.py).
    # Of a rationale of n tokens all but the last are in slots 1 to n - 1. So n slots are seen, and
    # the thinking-end token, the first input, has the position of slot n. The answer that a
    # rollout sampled lies in the slots from n on and is not seen.
    hidden = models.score_step(
        params,
        policy.config,
        inputs,
        prefix,
        suffix._replace(lengths=rationale_lengths),
        policy.execution,
    )
    log_probs = head.token_log_probs(
        hidden,
        models.unembedding(params),
        gold_m,
        valid_vocab=policy.valid_vocab,
        chunk=policy.logits_chunk,
    )
    is_gold = jnp.arange(num_tokens) < golds.lengths[:, None, None]
    return jnp.where(is_gold, log_probs, 0.0)
