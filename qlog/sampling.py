"""Sampling rollouts: prefill once per prompt, decode M rationales, force their end at the budget.

Conventions. A rollout is `tokens[b, m, :]`: the rationale, closed by the thinking-end token, then
(when asked for) the answer up to its end-of-sequence token. The prompt's last token is not
prefilled: it is the first token that the decode loop feeds, in every rollout, so that R inputs
predict R tokens and no logits are needed from the prefill. Suffix slot i therefore holds the
token before `tokens[..., i]`.

What token a rollout gets at step t:

| state of the rollout                              | token                          | sampled |
|---------------------------------------------------|--------------------------------|---------|
| thinking, t below the budget                      | drawn from the model           | yes     |
| ... and the draw is the thinking-end token        | rationale closed naturally     | yes     |
| ... and the draw is an end-of-sequence token      | kept; closing forced from t+1  | yes     |
| thinking, budget spent or end of sequence drawn   | next token of the closing text | no      |
| answering, reserve not spent                      | drawn from the model           | yes     |
| done                                              | pad                            | no      |
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from qlog import models, scoring, sharding
from qlog.policy import Policy

_FIRST_SLOTS = 128  # smallest cache; it doubles while rollouts are still running


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How rollouts are drawn; hashable, so jit-static. Lengths are in tokens.

    Attributes:
      rationale_budget: free tokens of a rationale, the forced closing not counted; 0 means none.
      answer_reserve: tokens kept for the answer, its end of sequence included.
      closing: token ids forced when the budget is spent; the last is the thinking-end token.
      eos: ids that end an answer.
      pad: id that fills the rest.
      temperature: of the rationale and of the sampled answer; 0 is greedy.
      top_k, top_p: draw from the top_k most probable tokens alone (0: all), and of those from the
        fewest that hold top_p of the probability (1: all). Evaluation only: the learner scores
        the whole law, so training leaves both off.
      with_answer: go on to sample the answer (rewards, evaluation), or stop at the thinking end.
    """

    rationale_budget: int
    answer_reserve: int
    closing: tuple[int, ...]
    eos: tuple[int, ...]
    pad: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    with_answer: bool = False

    @property
    def max_length(self) -> int:
        """Longest rollout: an end of sequence on the last free token still fits its closing."""
        answer = self.answer_reserve if self.with_answer else 0
        return self.rationale_budget + len(self.closing) + answer


class Rollouts(NamedTuple):
    """M rollouts of each of B prompts; R is `Sampling.max_length` or the bucket above it.

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


class DecodeState(NamedTuple):
    """What the decode loop carries. step: int32 scalar, tokens made so far in every rollout."""

    step: Array
    last: Array  # int32 [B, M], the token to feed next
    closing_at: Array  # int32 [B, M], step at which the forced closing begins
    done: Array  # bool [B, M]
    keys: Array  # PRNG keys [B, M], one per (seed, step, prompt, rollout)
    rollouts: Rollouts
    suffix: models.Suffix


def rollout_keys(key: Array, uids: Array, rollouts: int) -> Array:
    """Keys [B, M] that depend on (key, the prompt's uid, the rollout's index) alone."""
    per_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, uids)
    per_rollout = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(per_rollout, (0, None))(per_prompt, jnp.arange(rollouts))


def sample(
    params: models.Params,
    policy: Policy,
    prompts: Array,
    lengths: Array,
    keys: Array,
    settings: Sampling,
) -> tuple[Rollouts, models.Prefix, models.Suffix]:
    """Draw the rollouts of a batch of prompts.

    Args:
      prompts: int32 [B, P], right-padded; lengths: int32 [B], at least 1.
      keys: [B, M] from `rollout_keys`.

    Returns:
      The rollouts, and the caches of prompts and rollouts, on which answers can be scored.
    """
    prefix = prefill(params, policy, prompts, lengths)
    slots = min(_FIRST_SLOTS, settings.max_length)
    state = _start(policy, prompts, lengths, keys, settings, slots)
    while True:
        state = _decode(params, policy, prefix, state, settings)
        if slots >= settings.max_length or bool(state.done.all()):
            return state.rollouts, prefix, state.suffix
        slots = min(2 * slots, settings.max_length)
        state = _grow(state, slots)


@functools.partial(jax.jit, static_argnames=("policy",))
def prefill(params, policy: Policy, prompts: Array, lengths: Array) -> models.Prefix:
    """The prompts' caches, all tokens but the last of each: prompts int32 [B, P], lengths [B]."""
    prefix = models.prefill(params, policy.config, prompts, lengths - 1, dtype=policy.dtype)
    return sharding.keep_prefix(policy.mesh, prefix)


@functools.partial(jax.jit, static_argnames=("policy", "settings", "slots"))
def _start(policy, prompts, lengths, keys, settings, slots) -> DecodeState:
    shape = keys.shape
    last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)
    no, zero = jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32)
    per_token = (*shape, slots)
    rollouts = Rollouts(
        tokens=jnp.full(per_token, settings.pad, jnp.int32),
        log_probs=jnp.zeros(per_token), is_sampled=jnp.zeros(per_token, bool),
        rationale_lengths=zero, lengths=zero, forced=no, ended_early=no, complete=no,
    )  # fmt: skip
    state = DecodeState(
        step=jnp.zeros((), jnp.int32), last=jnp.broadcast_to(last, shape),
        closing_at=jnp.full(shape, settings.rationale_budget, jnp.int32), done=no, keys=keys,
        rollouts=rollouts, suffix=models.empty_suffix(policy.config, *shape, slots, policy.dtype),
    )  # fmt: skip
    return sharding.keep_rows(policy.mesh, state)


@functools.partial(jax.jit, static_argnames=("slots",))
def _grow(state: DecodeState, slots: int) -> DecodeState:
    """Room for `slots` tokens in every buffer."""

    def widen(x, axis, fill=0):
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, slots - x.shape[axis])
        return jnp.pad(x, padding, constant_values=fill)

    old = state.rollouts
    rollouts = old._replace(
        tokens=widen(old.tokens, 2), log_probs=widen(old.log_probs, 2),
        is_sampled=widen(old.is_sampled, 2),
    )  # fmt: skip
    layers = jax.tree.map(lambda x: widen(x, 3), state.suffix.layers)
    return state._replace(rollouts=rollouts, suffix=state.suffix._replace(layers=layers))


@functools.partial(
    jax.jit, static_argnames=("policy", "settings"), donate_argnames=("state",)
)
def _decode(params, policy, prefix, state, settings) -> DecodeState:
    """Run until every rollout is done or the buffers are full."""
    slots = state.rollouts.tokens.shape[-1]
    params = models.cast_weights(params, policy.dtype)
    table = models.unembedding(params)

    def unfinished(state):
        return (state.step < slots) & ~state.done.all()

    def step(state):
        positions = (prefix.lengths[:, None] + state.step)[..., None]
        positions = jnp.broadcast_to(positions, (*state.last.shape, 1))
        hidden, suffix = models.apply(
            params, policy.config, state.last[..., None], positions,
            prefix=prefix, suffix=state.suffix, slot=state.step, dtype=policy.dtype,
        )  # fmt: skip
        logits = scoring.masked_logits(hidden[:, :, 0], table, policy.valid_vocab)
        keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(state.keys, state.step)
        drawn, log_probs = draw(
            logits, keys, settings.temperature, settings.top_k, settings.top_p
        )
        return _advance(state, settings, drawn, log_probs)._replace(suffix=suffix)

    return jax.lax.while_loop(unfinished, step, state)


def _advance(state: DecodeState, settings: Sampling, drawn: Array, log_probs: Array) -> DecodeState:
    """The table in this module's docstring: from the model's draw to the rollouts' next tokens."""
    old, t = state.rollouts, state.step
    closing = jnp.asarray(settings.closing, jnp.int32)
    eos = jnp.asarray(settings.eos, jnp.int32)
    thinking = ~state.done & (old.rationale_lengths == 0)
    answering = ~state.done & ~thinking
    closed_so_far = t - state.closing_at
    forcing = thinking & (closed_so_far >= 0)
    is_sampled = (thinking & ~forcing) | answering
    forced_token = closing[jnp.clip(closed_so_far, 0, len(settings.closing) - 1)]
    token = jnp.where(forcing, forced_token, jnp.where(is_sampled, drawn, settings.pad))
    is_eos = (token[..., None] == eos).any(-1)

    natural = thinking & ~forcing & (token == settings.closing[-1])
    closes = natural | (forcing & (closed_so_far == len(settings.closing) - 1))
    ends_early = thinking & ~forcing & is_eos
    rationale_lengths = jnp.where(closes, t + 1, old.rationale_lengths)
    completes = answering & is_eos
    finished = completes | (answering & (t + 1 - rationale_lengths >= settings.answer_reserve))
    if not settings.with_answer:
        finished = closes
    rollouts = Rollouts(
        tokens=old.tokens.at[:, :, t].set(token),
        log_probs=old.log_probs.at[:, :, t].set(jnp.where(is_sampled, log_probs, 0.0)),
        is_sampled=old.is_sampled.at[:, :, t].set(is_sampled),
        rationale_lengths=rationale_lengths,
        lengths=jnp.where(state.done, old.lengths, t + 1),
        forced=old.forced | (forcing & ~old.ended_early),
        ended_early=old.ended_early | ends_early,
        complete=old.complete | completes,
    )
    return state._replace(
        step=t + 1, last=token, done=state.done | finished, rollouts=rollouts,
        closing_at=jnp.where(ends_early, t + 1, state.closing_at),
    )  # fmt: skip


def draw(
    logits: Array, keys: Array, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Array, Array]:
    """Draw a token from softmax(logits / temperature) by inverting its distribution function.

    Two levels, a block of the vocabulary and then a token in it: one uniform number each, instead
    of the V random numbers per token that `jax.random.categorical` makes.

    Args:
      logits: float32 [B, M, V]; -inf is never drawn. keys: [B, M]. temperature: 0 is greedy.
      top_k, top_p: as in `Sampling`; applied after the temperature, top_k first.

    Returns:
      int32 [B, M], and their log-probabilities, float32 [B, M], under the law that was sampled.
    """
    if temperature == 0.0:
        token = jnp.argmax(logits, axis=-1)
        return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[..., None], -1)[..., 0]
    scaled = truncate(logits / temperature, top_k, top_p)
    top = scaled.max(-1, keepdims=True)
    weights = jnp.exp(scaled - top)
    uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (2,))))(keys)
    size = max(16, 1 << (logits.shape[-1].bit_length() // 2))
    padding = -logits.shape[-1] % size
    weights = jnp.pad(weights, ((0, 0), (0, 0), (0, padding)))
    blocks = weights.reshape(*logits.shape[:2], -1, size)
    sums = blocks.sum(-1)
    block = _invert(sums, uniform[..., 0])
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=2)[..., 0, :]
    token = block * size + _invert(inside, uniform[..., 1])
    picked = jnp.take_along_axis(scaled, token[..., None], axis=-1)
    return token, (picked - top)[..., 0] - jnp.log(sums.sum(-1))


def truncate(logits: Array, top_k: int, top_p: float) -> Array:
    """-inf for tokens outside the nucleus, logits [..., V]; ties with its last token stay inside."""
    if top_k == 0 and top_p == 1.0:
        return logits
    size = logits.shape[-1]
    ordered, _ = jax.lax.top_k(logits, min(top_k, size) or size)
    law = jax.nn.softmax(ordered)
    is_inside = jnp.cumsum(law, axis=-1) - law < top_p  # the first always is
    last = jnp.take_along_axis(ordered, is_inside.sum(-1, keepdims=True) - 1, axis=-1)
    return jnp.where(logits >= last, logits, -jnp.inf)


def _invert(weights: Array, uniform: Array) -> Array:
    """Index i with probability weights[i] / sum; uniform in [0, 1 - 2^-23] never rounds to 1."""
    cumulative = jnp.cumsum(weights, axis=-1)
    target = uniform[..., None] * cumulative[..., -1:]
    return (cumulative <= target).sum(-1).astype(jnp.int32)
