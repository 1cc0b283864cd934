"""Sampling rollouts: prefill once per prompt, decode M rationales, force their end at the budget,
score the gold answer on the caches that are left.

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

Rollouts end at very different steps, so they are decoded in a pool of rows that shrinks
(`pool.py`). All rows are at the same step. Between chunks of steps the host looks which rows are
done; when the others fit a smaller pool, the gold answers are scored on all caches, and the rows
that go on move closer together, each staying on its device.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qlog import models
from qlog.models import head
from qlog.parallel import sharding
from qlog.parallel.interrupts import Interrupts
from qlog.policy import Policy
from qlog.records import Golds, Rollouts, Samples
from qlog.rollouts import scoring
from qlog.rollouts.pool import Plan, levels, nobody_in, regroup
from qlog.rollouts.token_choice import draw

_CHUNK = 8  # decode steps between two looks at which rollouts are done


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
    def max_rationale_length(self) -> int:
        """Longest rationale: an end of sequence on the last free token still fits its closing."""
        return self.rationale_budget + len(self.closing)

    @property
    def max_length(self) -> int:
        """Longest rollout."""
        return self.max_rationale_length + (self.answer_reserve if self.with_answer else 0)


class Pool(NamedTuple):
    """Rollouts under way: N blocks of m rows; the rows of a block belong to one prompt.

    source: int32 [N, m], the rollout's number b * M + m; B * M where there is none.
    """

    step: Array  # int32 scalar, tokens made so far in every row
    source: Array
    last: Array  # int32 [N, m], the token to feed next
    closing_at: Array  # int32 [N, m], step at which the forced closing begins
    done: Array  # bool [N, m]
    keys: Array  # PRNG keys [N, m], one per (seed, step, prompt, rollout)
    rollouts: Rollouts  # [N, m, ...]
    prefix: models.Prefix  # of N blocks
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
    golds: Golds,
    settings: Sampling,
    prompts_per_wave: int = 0,
    rehearse: bool = False,
    interrupts: Interrupts | None = None,
) -> Samples:
    """Draws the rollouts of a batch of prompts and scores their gold answers.

    Args:
      prompts: int32 [B, P], right-padded; lengths: int32 [B], at least 1.
      keys: [B, M] from `rollout_keys`.
      prompts_per_wave: prompts whose caches are in memory at a time, a divisor of B; 0 is all.
      rehearse: visit the pool's sizes that this batch has no use for, too, so that later batches
        of the same shapes compile nothing.
      interrupts: looked at between chunks of decode steps.

    Raises:
      Stop: a signal has reached any process; on every process after the same chunk.
    """
    weights = decoding_weights(params, policy)
    waves = len(prompts) // (prompts_per_wave or len(prompts))
    batch = (prompts, lengths, keys, golds)
    parts = [
        _sample_wave(
            params,
            weights,
            policy,
            *_wave(batch, index, waves),
            settings,
            rehearse and index == 0,
            interrupts,
        )
        for index in range(waves)
    ]
    rollouts, log_w = _join_waves([part[:2] for part in parts])
    return Samples(rollouts, log_w, sum(part.row_steps for part in parts))


def _sample_wave(
    params, weights, policy, prompts, lengths, keys, golds, settings, rehearse, interrupts
) -> Samples:
    count, rollouts = keys.shape
    shards = sharding.num_batch_shards(policy.mesh) if policy.mesh else 1
    slots = settings.max_length
    sizes = levels(count // shards, rollouts, slots, prompts.shape[1])
    nobody = count * rollouts
    fit = functools.partial(regroup, shards=shards, rollouts=rollouts, nobody=nobody)

    def flags():
        return interrupts.flags(policy.mesh) if interrupts else jnp.zeros(1, bool)

    def begin():
        prefix = prefill(params, policy, prompts, lengths)
        pool = start(policy, prefix, prompts, lengths, keys, settings)
        return pool, empty_results(policy, settings, count, rollouts)

    if rehearse:
        pool, results = begin()
        for size in sizes[1:]:
            pool = _move(policy, pool, nobody_in(size, shards, nobody), nobody)
            pool, *_ = decode(weights, policy, pool, settings, 0, flags())
            results = leave(weights, policy, pool, results, golds)
    pool, results = begin()
    source = np.arange(nobody, dtype=np.int32).reshape(count, rollouts)
    step = row_steps = 0
    going = np.ones(source.shape, bool)
    while going.any():
        step, before = min(step + _CHUNK, slots), step
        pool, *found = decode(weights, policy, pool, settings, step, flags())
        executed, going, is_asked = jax.device_get(found)  # waits for the chunk
        if interrupts:
            interrupts.beat(bool(is_asked))
        row_steps += source.size * (int(executed) - before)
        plan = None
        if len(sizes) > 1 and going.any():
            plan = fit(source, going, sizes[1])
        if plan:
            results = leave(weights, policy, pool, results, golds)
        while plan:
            pool, source, sizes = _move(policy, pool, plan, nobody), plan.source, sizes[1:]
            going = source < nobody
            plan = fit(source, going, sizes[1]) if len(sizes) > 1 else None
    results = leave(weights, policy, pool, results, golds)
    return Samples(*_by_prompt(results, keys.shape), row_steps)


@functools.partial(jax.jit, static_argnames=("policy",))
def decoding_weights(params: models.Params, policy: Policy) -> models.Params:
    """The parameters as `decode` reads them at every step: in the activations' dtype, whole on
    every device but for the tensor axis."""
    return sharding.constrain_gathered_params(
        policy.mesh, models.decoding_weights(params, policy.dtype)
    )


@functools.partial(jax.jit, static_argnames=("policy",))
def prefill(params, policy: Policy, prompts: Array, lengths: Array) -> models.Prefix:
    """The prompts' caches, all tokens but the last of each: prompts int32 [B, P], lengths [B]."""
    params = policy.gathered(params)
    prefix = models.prefill(params, policy.config, prompts, lengths - 1, **policy.options)
    return sharding.constrain_batch(policy.mesh, models.unstack(prefix))


@functools.partial(jax.jit, static_argnames=("policy", "settings"))
def start(policy, prefix, prompts, lengths, keys, settings) -> Pool:
    """The pool of all rollouts: blocks are groups, N = B and m = M."""
    shape, slots = keys.shape, models.whole_tiles(settings.max_length)
    last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)
    pool = Pool(
        step=jnp.zeros((), jnp.int32),
        source=jnp.arange(keys.size, dtype=jnp.int32).reshape(shape),
        last=jnp.broadcast_to(last, shape),
        closing_at=jnp.full(shape, settings.rationale_budget, jnp.int32),
        done=jnp.zeros(shape, bool),
        keys=keys,
        rollouts=_no_rollouts(shape, settings),
        prefix=prefix,
        suffix=models.empty_suffix(policy.config, *shape, slots, policy.dtype),
    )
    return sharding.constrain_batch(policy.mesh, pool)


@functools.partial(jax.jit, static_argnames=("policy", "settings", "count", "rollouts"))
def empty_results(policy, settings, count: int, rollouts: int) -> tuple[Rollouts, Array]:
    """Where rollouts that are done are kept: [B * M, ...], and their log w."""
    size = count * rollouts
    return sharding.constrain_batch(policy.mesh, (_no_rollouts((size,), settings), jnp.zeros(size)))


def _no_rollouts(shape, settings: Sampling) -> Rollouts:
    no, zero = jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32)
    per_token = (*shape, settings.max_length)
    return Rollouts(
        tokens=jnp.full(per_token, settings.pad, jnp.int32),
        log_probs=jnp.zeros(per_token),
        is_sampled=jnp.zeros(per_token, bool),
        rationale_lengths=zero,
        lengths=zero,
        forced=no,
        ended_early=no,
        complete=no,
    )


@functools.partial(jax.jit, static_argnames=("policy", "settings"), donate_argnames=("pool",))
def decode(
    weights, policy, pool: Pool, settings, until, flags: Array
) -> tuple[Pool, Array, Array, Array]:
    """Steps up to `until`, fewer when every rollout is done before.

    Args:
      flags: bool [devices]; each process has set its own.

    Returns:
      The pool, and on every device: the step it is at, bool [N, m] of the rows that go on, and
      whether any flag is set.
    """
    table, prefix = models.unembedding(weights), pool.prefix  # the loop only reads them

    def unfinished(pool):
        return (pool.step < until) & ~pool.done.all()

    def step(pool):
        positions = (prefix.lengths[:, None] + pool.step)[..., None]
        positions = jnp.broadcast_to(positions, (*pool.last.shape, 1))
        hidden, suffix = models.apply(
            weights,
            policy.config,
            pool.last[..., None],
            positions,
            prefix=prefix,
            suffix=pool.suffix,
            slot=pool.step,
            **policy.options,
        )
        logits = head.masked_logits(hidden[:, :, 0], table, policy.valid_vocab)
        keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(pool.keys, pool.step)
        drawn, log_probs = draw(logits, keys, settings.temperature, settings.top_k, settings.top_p)
        return _advance(pool, settings, drawn, log_probs)._replace(suffix=suffix)

    with jax.named_scope("decode_steps"):  # qlog.aot finds the loop by this name
        pool = jax.lax.while_loop(unfinished, step, pool._replace(prefix=None))
    pool = pool._replace(prefix=prefix)
    pool = sharding.constrain_batch(policy.mesh, pool)
    return pool, *sharding.constrain_replicated(policy.mesh, (pool.step, ~pool.done, flags.any()))


@functools.partial(jax.jit, static_argnames=("policy",), donate_argnames=("results",))
def leave(weights, policy, pool: Pool, results, golds: Golds):
    """`results` with the pool's rollouts and their log w; those not done will come again."""
    count = golds.lengths.shape[0]
    rollouts = results[1].size // count
    prompt = jnp.minimum(pool.source[:, 0] // rollouts, count - 1)  # empty blocks: any
    golds = jax.tree.map(lambda x: x[prompt], sharding.constrain_replicated(policy.mesh, golds))
    golds = sharding.constrain_batch(policy.mesh, golds)
    log_w = scoring.score_answers(
        weights,
        policy,
        pool.prefix,
        pool.suffix,
        pool.rollouts.tokens,
        jnp.maximum(pool.rollouts.rationale_lengths, 1),
        *golds,
    )
    write = lambda whole, own: whole.at[pool.source].set(own, mode="drop")
    return sharding.constrain_batch(
        policy.mesh, jax.tree.map(write, results, (pool.rollouts, log_w))
    )


def _move(policy, pool: Pool, plan: Plan, nobody: int) -> Pool:
    """The pool after `plan`; cache by cache, so that two whole pools are never in memory."""
    put = functools.partial(sharding.put_batch, policy.mesh)
    parent, lane, source = map(put, plan)

    def move(cache, take, index):
        moved = take(policy.mesh, cache, index)
        cache.delete()
        return moved

    layers = tuple(tuple(move(x, _take_lanes, lane) for x in pair) for pair in pool.suffix.layers)
    keys, values = (
        tuple(move(x, _take_blocks, parent) for x in caches)
        for caches in (pool.prefix.keys, pool.prefix.values)
    )
    prefix = models.Prefix(keys, values, _take_blocks(policy.mesh, pool.prefix.lengths, parent))
    rows = (pool.last, pool.closing_at, pool.done, pool.keys, pool.rollouts)
    last, closing_at, done, row_keys, rollouts = _take_rows(policy.mesh, rows, lane)
    return Pool(
        step=pool.step,
        source=source,
        last=last,
        closing_at=closing_at,
        done=_mark_nobody(done, source, nobody),
        keys=row_keys,
        rollouts=rollouts,
        prefix=prefix,
        suffix=pool.suffix._replace(layers=layers),
    )


@functools.partial(jax.jit, static_argnames=("mesh",))
def _take_blocks(mesh, blocks: Array, parent: Array) -> Array:
    """[N, ...] -> [N', ...]; indices count within the shard."""
    return sharding.shard_map_batch(mesh, lambda x, index: x[index], blocks, parent)


@functools.partial(jax.jit, static_argnames=("mesh",))
def _take_lanes(mesh, cache: Array, lane: Array) -> Array:
    """[N, K, m, S, C] -> [N', K, m', S, C]; indices count rows within the shard."""

    def take(x, index):
        taken = x[index // x.shape[2], :, index % x.shape[2]]  # [N', m', K, S, C]
        return taken.transpose(0, 2, 1, 3, 4)

    return sharding.shard_map_batch(mesh, take, cache, lane)


@functools.partial(jax.jit, static_argnames=("mesh",))
def _take_rows(mesh, rows, lane: Array):
    """Arrays [N, m, ...] -> [N', m', ...]; indices count rows within the shard."""
    take = lambda x, index: x.reshape(-1, *x.shape[2:])[index]
    return jax.tree.map(lambda x: sharding.shard_map_batch(mesh, take, x, lane), rows)


@functools.partial(jax.jit, static_argnames=("nobody",))
def _mark_nobody(done: Array, source: Array, nobody: int) -> Array:
    return done | (source == nobody)


@functools.partial(jax.jit, static_argnames=("shape",))
def _by_prompt(results, shape):
    """[B * M, ...] -> [B, M, ...]."""
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), results)


@functools.partial(jax.jit, static_argnames=("index", "count"))
def _wave(tree, index: int, count: int):
    """Every count-th prompt from `index` on: each device keeps its share of every wave."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:])[:, index], tree)


@jax.jit
def _join_waves(parts):
    """The way back of `_wave`."""
    return jax.tree.map(lambda *x: jnp.stack(x, 1).reshape(-1, *x[0].shape[1:]), *parts)


def _advance(pool: Pool, settings: Sampling, drawn: Array, log_probs: Array) -> Pool:
    """The table in this module's docstring: from the model's draw to the rollouts' next tokens."""
    old, t = pool.rollouts, pool.step
    closing = jnp.asarray(settings.closing, jnp.int32)
    eos = jnp.asarray(settings.eos, jnp.int32)
    thinking = ~pool.done & (old.rationale_lengths == 0)
    answering = ~pool.done & ~thinking
    closed_so_far = t - pool.closing_at
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
