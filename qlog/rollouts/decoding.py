"""What the devices do: prefill, the decode loop, and scores of the gold answers. All compiled.

Conventions. A rollout is `tokens[b, m, :]`: the rationale, closed by the thinking-end token, then
(when asked for) the answer up to its end-of-sequence token. The prompt's last token is not
prefilled: it is the first token that the decode loop feeds, in every rollout. So R inputs predict
R tokens, and no logits are needed from the prefill. Slot i of a rollout's cache (the suffix)
therefore holds the token before `tokens[..., i]`.

What token a rollout gets at step t:

| state of the rollout                              | token                          | sampled |
|---------------------------------------------------|--------------------------------|---------|
| thinking, t below the budget                      | chosen by the model            | yes     |
| ... and it is the thinking-end token              | rationale closed naturally     | yes     |
| ... and it is an end-of-sequence token            | kept; closing forced from t+1  | yes     |
| thinking, budget spent or end of sequence chosen  | next token of the closing text | no      |
| answering, reserve not spent                      | chosen by the model            | yes     |
| done                                              | pad                            | no      |

All lanes of a pool are at the same step. Which pools there are, and when they shrink, is decided on
the host (`sampler.py`).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from qlog import models
from qlog.models import head
from qlog.parallel import sharding
from qlog.policy import Policy
from qlog.records import Golds, Rollouts
from qlog.rollouts import scoring
from qlog.rollouts.moves import Pool
from qlog.rollouts.token_choice import choose_token


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How rollouts are sampled; hashable, so jit-static. Lengths are in tokens.

    Attributes:
      rationale_budget: free tokens of a rationale, the forced closing not counted; 0 means none.
      answer_reserve: tokens kept for the answer, its end of sequence included.
      closing: token ids forced when the budget is spent; the last is the thinking-end token.
      eos: token ids that end an answer.
      pad: token id that fills the rest.
      temperature: of the rationale and of the sampled answer; 0 takes the most probable token.
      top_k: sample only from the top_k most probable tokens; 0 means all.
      top_p: sample only from the fewest most probable tokens that hold top_p of the probability;
        1 means all. Both are for evaluation: the learner scores tokens under the whole
        distribution, so training leaves them off.
      with_answer: go on to sample the answer (rewards, evaluation), or stop at the thinking end.
      gold_tokens: A, to keep the log-probability of each of the gold answer's tokens; 0 keeps only
        log w, their sum.
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
    gold_tokens: int = 0

    @property
    def max_rationale_length(self) -> int:
        """Longest rationale: an end of sequence on the last free token still fits its closing."""
        return self.rationale_budget + len(self.closing)

    @property
    def max_length(self) -> int:
        """Longest rollout, R."""
        return self.max_rationale_length + (self.answer_reserve if self.with_answer else 0)


class Batch(NamedTuple):
    """What is sampled from: all prompts of a call, or those of a wave."""

    prompts: Array  # int32 [B, P], right-padded
    lengths: Array  # int32 [B], at least 1
    keys: Array  # PRNG keys [B, M]
    budgets: Array  # int32 [B, M], free tokens of each rationale


class Look(NamedTuple):
    """What the host reads after a chunk of decode steps; the same on every device."""

    step: Array  # int32 scalar, the step that the pool is at
    going: Array  # bool [N, m], lanes whose rollout is not done
    stop: Array  # bool scalar, a signal has reached any process


class Results(NamedTuple):
    """Where rollouts are put when they are done: at their id."""

    rollouts: Rollouts  # [B * M, ...]; [B, M, ...] in the end
    log_w: Array  # float32 [B * M], log p(y* | x*, z); [B, M] in the end
    # float32 [B * M, A], of the gold answer's tokens; [B, M, A] in the end. None: log w is enough
    gold_log_probs: Array | None


# ---- A wave's first pool, and the place for its results ----


@functools.partial(jax.jit, static_argnames=("policy",))
def decoding_weights(params: models.Params, policy: Policy) -> models.Params:
    """The parameters as `decode` reads them at every step: in the activations' dtype, gathered on
    every device except for the tensor axis."""
    return sharding.constrain_gathered_params(
        policy.mesh, models.decoding_weights(params, policy.dtype)
    )


@functools.partial(jax.jit, static_argnames=("policy",))
def prefill(params: models.Params, policy: Policy, prompts: Array, lengths: Array) -> models.Prefix:
    """The prompts' caches, one per prompt, of all tokens but the last of each.

    Args:
      prompts: int32 [B, P], right-padded.
      lengths: int32 [B], at least 1.
    """
    params = policy.gathered(params)
    prefix = models.prefill(
        params, policy.config, prompts, lengths - 1, policy.execution, policy.cache_dtype
    )
    # Layers as separate arrays, which the host can move and delete one by one.
    return sharding.constrain_batch(policy.mesh, models.unstack(prefix))


@functools.partial(jax.jit, static_argnames=("policy", "sampling", "slots"))
def initial_pool(
    policy: Policy,
    prefix: models.Prefix,
    wave: Batch,
    rollout_ids: Array,
    sampling: Sampling,
    slots: int,
) -> Pool:
    """The pool of all rollouts of a wave: a block is a group, N = B and m = M.

    Args:
      prefix: from `prefill`.
      rollout_ids: int32 [B, M].
      slots: of each rollout's cache.
    """
    shape = num_prompts, num_rollouts = rollout_ids.shape
    last = jnp.take_along_axis(wave.prompts, wave.lengths[:, None] - 1, axis=1)
    pool = Pool(
        step=jnp.zeros((), jnp.int32),
        rollout_ids=rollout_ids,
        last=jnp.broadcast_to(last, shape),
        closing_at=jnp.minimum(wave.budgets, sampling.rationale_budget),
        done=jnp.zeros(shape, bool),
        keys=wave.keys,
        rollouts=_blank_rollouts(shape, sampling),
        prefix=prefix,
        suffix=models.empty_suffix(
            policy.config, num_prompts, num_rollouts, slots, policy.cache_dtype
        ),
    )
    return sharding.constrain_batch(policy.mesh, pool)


@functools.partial(jax.jit, static_argnames=("policy", "sampling", "num_prompts", "num_rollouts"))
def every_budget(policy: Policy, sampling: Sampling, num_prompts: int, num_rollouts: int) -> Array:
    """int32 [B, M]: `sampling.rationale_budget` for each rollout."""
    budgets = jnp.full((num_prompts, num_rollouts), sampling.rationale_budget, jnp.int32)
    return sharding.constrain_batch(policy.mesh, budgets)


@functools.partial(jax.jit, static_argnames=("policy", "sampling", "num_prompts", "num_rollouts"))
def empty_results(
    policy: Policy, sampling: Sampling, num_prompts: int, num_rollouts: int
) -> Results:
    """A place for each of the B * M rollouts."""
    size = num_prompts * num_rollouts
    kept = jnp.zeros((size, sampling.gold_tokens)) if sampling.gold_tokens else None
    empty = Results(_blank_rollouts((size,), sampling), jnp.zeros(size), kept)
    return sharding.constrain_batch(policy.mesh, empty)


def _blank_rollouts(shape: tuple[int, ...], sampling: Sampling) -> Rollouts:
    """Rollouts [*shape, ...] without a token."""
    no, zero = jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32)
    per_token = (*shape, sampling.max_length)
    return Rollouts(
        tokens=jnp.full(per_token, sampling.pad, jnp.int32),
        log_probs=jnp.zeros(per_token),
        is_sampled=jnp.zeros(per_token, bool),
        rationale_lengths=zero,
        lengths=zero,
        forced=no,
        ended_early=no,
        complete=no,
    )


# ---- The decode loop ----


@functools.partial(jax.jit, static_argnames=("policy", "sampling"), donate_argnames=("pool",))
def decode(
    weights: models.Params,
    policy: Policy,
    pool: Pool,
    sampling: Sampling,
    until: int | Array,
    flags: Array,
) -> tuple[Pool, Look]:
    """Decode steps up to step `until`, fewer when every rollout is done before.

    Args:
      weights: from `decoding_weights`.
      pool: is donated: the loop writes its caches in place.
      until: an operand, not static: chunks of any length are one program.
      flags: bool [devices]; each process has set those of its devices.

    Returns:
      The pool, and on every device what the host looks at.
    """
    # The loop only reads the table and the prompts' caches. As part of the loop's state XLA might
    # copy them, so they are captured instead.
    table, prefix = models.unembedding(weights), pool.prefix

    def unfinished(pool: Pool) -> Array:
        return (pool.step < until) & ~pool.done.all()

    def step(pool: Pool) -> Pool:
        # The token that is fed is the one before tokens[..., t], so its slot is t, and t slots of
        # the suffix follow the prompt's tokens but the last. All lanes are at the same t.
        hidden, suffix = models.decode_step(
            weights,
            policy.config,
            pool.last,
            prefix,
            pool.suffix,
            pool.step,
            policy.execution,
        )
        logits = head.masked_logits(hidden, table, policy.valid_vocab)  # [N, m, V]
        # A lane's key goes with its rollout when the pool shrinks, and t is the same in all lanes.
        # So the randomness of a token depends only on (seed, training step, prompt, rollout, t).
        keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(pool.keys, pool.step)
        token, log_probs = choose_token(
            logits, keys, sampling.temperature, sampling.top_k, sampling.top_p
        )
        return _advance(pool, sampling, token, log_probs)._replace(suffix=suffix)

    with jax.named_scope("decode_steps"):  # qlog.aot finds the loop by this name
        pool = jax.lax.while_loop(unfinished, step, pool._replace(prefix=None))
    pool = pool._replace(prefix=prefix)
    pool = sharding.constrain_batch(policy.mesh, pool)
    # Replicated, so that every process reads the same and takes the same way afterwards.
    look = Look(step=pool.step, going=~pool.done, stop=flags.any())
    return pool, sharding.constrain_replicated(policy.mesh, look)


def _advance(pool: Pool, sampling: Sampling, chosen: Array, log_probs: Array) -> Pool:
    """One row of the table in this module's docstring for each lane: its next token and its state.

    Args:
      chosen: int32 [N, m], the model's tokens; where the closing is forced they are not used.
      log_probs: float32 [N, m], of `chosen`.
    """
    old, t = pool.rollouts, pool.step
    closing = jnp.asarray(sampling.closing, jnp.int32)
    eos = jnp.asarray(sampling.eos, jnp.int32)

    # Which state is the rollout in? Its rationale has length 0 until it is closed.
    thinking = ~pool.done & (old.rationale_lengths == 0)
    answering = ~pool.done & ~thinking
    closed_so_far = t - pool.closing_at  # tokens of the closing text that are there already
    forcing = thinking & (closed_so_far >= 0)
    is_sampled = (thinking & ~forcing) | answering

    # Its next token: forced, chosen by the model, or pad.
    forced_token = closing[jnp.clip(closed_so_far, 0, len(sampling.closing) - 1)]
    token = jnp.where(forcing, forced_token, jnp.where(is_sampled, chosen, sampling.pad))
    is_eos = (token[..., None] == eos).any(-1)

    # The rationale ends with the thinking-end token, chosen or forced. An end of sequence inside it
    # does not end the rollout: an answer is scored after a thinking end. So the closing follows.
    natural = thinking & ~forcing & (token == sampling.closing[-1])
    closes = natural | (forcing & (closed_so_far == len(sampling.closing) - 1))
    ends_early = thinking & ~forcing & is_eos
    rationale_lengths = jnp.where(closes, t + 1, old.rationale_lengths)

    # The answer ends with an end of sequence, or when its reserve is spent.
    completes = answering & is_eos
    finished = completes | (answering & (t + 1 - rationale_lengths >= sampling.answer_reserve))
    if not sampling.with_answer:
        finished = closes
    rollouts = Rollouts(
        tokens=old.tokens.at[:, :, t].set(token),
        log_probs=old.log_probs.at[:, :, t].set(jnp.where(is_sampled, log_probs, 0.0)),
        is_sampled=old.is_sampled.at[:, :, t].set(is_sampled),
        rationale_lengths=rationale_lengths,
        lengths=jnp.where(pool.done, old.lengths, t + 1),
        forced=old.forced | (forcing & ~old.ended_early),
        ended_early=old.ended_early | ends_early,
        complete=old.complete | completes,
    )
    return pool._replace(
        step=t + 1,
        last=token,
        done=pool.done | finished,
        rollouts=rollouts,
        closing_at=jnp.where(ends_early, t + 1, pool.closing_at),
    )


# ---- Scores, and results ----


@functools.partial(jax.jit, static_argnames=("policy",), donate_argnames=("results",))
def score_and_store(
    weights: models.Params, policy: Policy, pool: Pool, results: Results, golds: Golds
) -> Results:
    """`results` with the pool's rollouts and their log w.

    Rollouts that are not done are stored, too, with a log w that means nothing. They stay in the
    pool, and a later call writes over them.

    Args:
      weights: from `decoding_weights`.
      results: is donated.
      golds: of all prompts of the call, [B, A].
    """
    num_prompts = golds.lengths.shape[0]
    num_rollouts = results.log_w.size // num_prompts
    # The prompt of each block: that of its first lane. NO_ROLLOUT of an empty block gives the last
    # prompt; what is scored for it is dropped below.
    prompt = jnp.minimum(pool.rollout_ids[:, 0] // num_rollouts, num_prompts - 1)
    # A block may be at another place than its prompt's gold answer, so these are replicated first.
    golds = jax.tree.map(lambda x: x[prompt], sharding.constrain_replicated(policy.mesh, golds))
    golds = sharding.constrain_batch(policy.mesh, golds)
    log_probs = scoring.token_log_probs(
        weights,
        policy,
        pool.prefix,
        pool.suffix,
        pool.rollouts.tokens,
        jnp.maximum(pool.rollouts.rationale_lengths, 1),
        golds,
    )
    # By id; empty lanes have NO_ROLLOUT, which lies outside and is dropped.
    store = lambda whole, lanes: whole.at[pool.rollout_ids].set(lanes, mode="drop")
    kept = None if results.gold_log_probs is None else log_probs
    found = Results(pool.rollouts, log_probs.sum(-1), kept)
    results = jax.tree.map(store, results, found)
    return sharding.constrain_batch(policy.mesh, results)


@functools.partial(jax.jit, static_argnames=("shape",))
def by_prompt(results: Results, shape: tuple[int, int]) -> Results:
    """[B * M, ...] -> [B, M, ...]."""
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), results)
