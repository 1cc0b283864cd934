"""Log-probabilities without [.., T, V] arrays, and gold answers scored on the rollouts' caches."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from qlog import models
from qlog.models import head
from qlog.policy import Policy, logits_chunk


@functools.partial(jax.jit, static_argnames=("policy",))
def score_answers(
    params: models.Params,
    policy: Policy,
    prefix: models.Prefix,
    suffix: models.Suffix,
    tokens: Array,
    rationale_lengths: Array,
    gold: Array,
    gold_lengths: Array,
) -> Array:
    """log w_m = log p(y* | x*, z_m), read off the caches that sampling left behind.

    Only the thinking-end token and the gold answer pass through the model; what a rollout sampled
    after its thinking-end token lies in later slots of its cache and is not seen.

    Args:
      prefix: of the prompts' tokens but the last, [.., B, .., P, ..].
      suffix: slot i holds the keys of the token before `tokens[..., i]`.
      tokens: int32 [B, M, R], the rollouts.
      rationale_lengths: int32 [B, M], thinking-end token included.
      gold: int32 [B, A] right-padded gold answers, end of sequence included.
      gold_lengths: int32 [B]; 0 gives log w = 0.

    Returns:
      float32 [B, M], summed over the gold answer's tokens, at temperature 1.
    """
    batch, rollouts, _ = tokens.shape
    last = jnp.take_along_axis(tokens, rationale_lengths[..., None] - 1, axis=-1)
    gold_m = jnp.broadcast_to(gold[:, None], (batch, rollouts, gold.shape[-1]))
    inputs = jnp.concatenate([last, gold_m[..., :-1]], axis=-1)
    # The prefix lacks the prompt's last token, which suffix slot 0 holds: see sampler.py.
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
        chunk=logits_chunk(policy),
    )
    is_gold = jnp.arange(gold.shape[-1]) < gold_lengths[:, None, None]
    return jnp.where(is_gold, log_probs, 0.0).sum(-1)
