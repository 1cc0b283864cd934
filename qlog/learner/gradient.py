"""From coefficients to the next parameters: the surrogate's gradient, then the optax update.

A group's prompt passes through the model once, forward and backward, whatever M is: its keys and
values are computed under `jax.vjp`, the rollouts' gradients with respect to them are summed over
microbatches, and one pull-back takes the sum to the parameters. The coefficients are constants
that already know the whole batch, so the size of a microbatch cannot change the result.

Rollouts are packed: short ones share a row, so that none pays for the longest of the batch, and
those with no coefficient are left out. Shapes are those of the longest possible rollout; how many
rows pass through the model is decided as the program runs, so it is compiled once.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from qlog import losses, models
from qlog.learner.packing import Packing, pack
from qlog.models import head
from qlog.parallel import sharding
from qlog.policy import Policy, logits_chunk
from qlog.records import Prompts, Trajectories

_FLOPS_PER_PROGRAM = 2e11  # per device


class SamplerMismatch(NamedTuple):
    """Sums over the batch's tokens, float32 scalars; `sampled` counts those with an old log_prob.

    How far the learner's log-probabilities are from the sampler's: sum |new - old|, its maximum,
    and the sum of exp |new - old|.
    """

    sampled: Array
    mismatch: Array
    mismatch_max: Array
    mismatch_exp: Array

    def merge(self, other: "SamplerMismatch") -> "SamplerMismatch":
        largest = jnp.maximum(self.mismatch_max, other.mismatch_max)
        return jax.tree.map(jnp.add, self, other)._replace(mismatch_max=largest)


def log_probs(
    params: models.Params,
    policy: Policy,
    prefix: models.Prefix,
    last: Array,
    trajectories: Trajectories,
    packing: Packing,
    temperature: float,
    first_row: Array | int = 0,
) -> Array:
    """log p of every token of the trajectories [b, M, R], float32; the prompt is in `prefix`.

    Args:
      prefix: caches of the prompts' tokens but the last.
      last: int32 [b], each prompt's last token.
      packing: of all rows, or of the w rows from `first_row` on in `rollout` and `token`: tokens
        that are not in them, or in none, get 0.
      temperature: of the law that sampled; gold answers are always scored at 1.
    """
    params = policy.gathered(params)
    batch, count, slots = trajectories.tokens.shape
    rows = packing.token.shape[1]
    rollout = jnp.minimum(packing.rollout, count - 1)

    def packed(x):
        """[b, M, R] -> [b, w, R], a rollout's tokens beside those it shares a row with."""
        flat = (rollout * slots + packing.token).reshape(batch, -1)
        return jnp.take_along_axis(x.reshape(batch, -1), flat, axis=1).reshape(rollout.shape)

    tokens = packed(trajectories.tokens)
    before = jnp.pad(tokens, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    inputs = jnp.where(packing.token == 0, last[:, None, None], before)
    hidden = models.extend(
        params,
        policy.config,
        inputs,
        prefix=prefix,
        offsets=packing.token,
        execution=policy.execution,
    )
    if temperature != 1.0:
        is_gold = packed(trajectories.answer_mask & ~trajectories.was_sampled)
        temperature = jnp.where(is_gold, 1.0, temperature)
    own = head.token_log_probs(
        hidden,
        models.unembedding(params),
        tokens,
        valid_vocab=policy.valid_vocab,
        temperature=temperature,
        chunk=logits_chunk(policy),
    )

    row = packing.row - first_row
    at = jnp.clip(row * slots + packing.offset, 0)[..., None] + jnp.arange(slots)
    at = jnp.minimum(at, rows * slots - 1).reshape(batch, -1)
    unpacked = jnp.take_along_axis(own.reshape(batch, -1), at, axis=1).reshape(batch, count, slots)
    return jnp.where(_is_in_rows(packing, first_row)[..., None], unpacked, 0.0)


def _is_in_rows(packing: Packing, first_row) -> Array:
    """bool [b, M]: rollouts in the rows that `packing` holds, which begin at `first_row`."""
    row = packing.row - first_row
    return (packing.row >= 0) & (row >= 0) & (row < packing.token.shape[1])


@functools.partial(jax.jit, static_argnames=("policy", "temperature", "microbatch"))
def reference_log_probs(
    params, policy, prompts: Prompts, trajectories, temperature, microbatch: tuple[int, int]
) -> Array:
    """`log_probs` under other parameters, without a gradient: [B, M, R]."""
    everything = jnp.ones(trajectories.lengths.shape, bool)
    packing = pack(trajectories.lengths, everything, trajectories.tokens.shape[-1])

    def prompts_chunk(chunk):
        its_prompts, its_trajectories, its_packing = chunk
        prefix, last = _prefix(params, policy, its_prompts)

        def rows_chunk(first_row, rows):
            return log_probs(
                params, policy, prefix, last, its_trajectories, rows, temperature, first_row
            )

        return _sum_over_rows(rows_chunk, its_packing, microbatch[1])

    chunks = len(prompts.lengths) // microbatch[0]
    parts = jax.tree.map(lambda x: _split(x, chunks), (prompts, trajectories, packing))
    return jnp.moveaxis(jax.lax.map(prompts_chunk, parts), 0, 1).reshape(trajectories.tokens.shape)


def batch_gradient(
    params: models.Params,
    policy: Policy,
    prompts: Prompts,
    trajectories: Trajectories,
    coefficients: losses.Coefficients,
    reference: Array | None,
    *,
    surrogate: losses.Surrogate,
    temperature: float = 1.0,
    microbatch: tuple[int, int],
    before_each: Callable[[], None] | None = None,
) -> tuple[models.Params, losses.Sums, SamplerMismatch]:
    """Gradient of the surrogate's mean over the batch's real prompts, in microbatches.

    Args:
      coefficients: [B, M], of the whole batch. Rollouts whose are zero cost nothing.
      reference: log-probabilities of reference parameters [B, M, R], or None.
      surrogate: token-level loss of `qlog.losses`, which adds over microbatches.
      microbatch: prompts, and rows of packed rollouts per prompt, that are in memory at a time;
        divisors of B and M.
      before_each: called before each microbatch of prompts, small ones several at a time; may raise
        to give up.

    Returns:
      float32 gradients like `params`, the surrogate's sums over prompts, and the gauges.
    """
    batch = prompts, trajectories, coefficients, reference
    grads, packing, share = begin(params, policy, *batch)
    total, several = None, _microbatches_per_program(policy, prompts, trajectories, microbatch)
    for index in range(len(prompts.lengths) // microbatch[0] // several):
        if before_each:
            jax.block_until_ready(grads)  # else it would look while the devices are far behind
            before_each()
        grads, *found = add_microbatch(
            grads,
            params,
            policy,
            *batch,
            packing,
            share,
            index,
            surrogate=surrogate,
            temperature=temperature,
            microbatch=microbatch,
            several=several,
        )
        total = found if total is None else _add(total, found)
    return grads, *total


def _microbatches_per_program(policy: Policy, prompts, trajectories, microbatch) -> int:
    """How many microbatches one program takes: a divisor of their number.

    A program of each lets signals in between, but does again what a loop's body shares: the weights'
    layouts, and a copy of the gradients. So small ones go together, up to about a second of a CPU.
    """
    chunks, size = len(prompts.lengths) // microbatch[0], policy.mesh.size if policy.mesh else 1
    _, rollouts, length = trajectories.tokens.shape
    need = models.flops.train_need(
        policy.config, microbatch[0], rollouts, prompts.tokens.shape[1], length
    )
    most = _FLOPS_PER_PROGRAM * size / need.flops
    return max(n for n in range(1, chunks + 1) if chunks % n == 0 and (n == 1 or n <= most))


@functools.partial(jax.jit, static_argnames=("policy",))
def begin(params, policy: Policy, prompts: Prompts, trajectories, coefficients, reference):
    """What the microbatches of a gradient start from: zeros like `params`, the packing of the whole
    batch, and the share of a prompt in the mean, float32 scalar."""
    is_needed = (coefficients.score != 0) | (coefficients.path != 0)
    if reference is not None:
        is_needed = jnp.ones_like(is_needed)  # the penalty is on all
    is_needed = is_needed.at[0, 0].set(True)  # without a rollout the gauges would know nothing
    packing = pack(trajectories.lengths, is_needed, trajectories.tokens.shape[-1])
    packing = sharding.constrain_batch(policy.mesh, packing)
    share = 1 / jnp.maximum(prompts.is_prompt.sum(), 1).astype(jnp.float32)
    return sharding.constrain_params(policy.mesh, _zeros(params)), packing, share


@functools.partial(
    jax.jit,
    static_argnames=("policy", "surrogate", "temperature", "microbatch", "several"),
    donate_argnames=("grads",),
)
def add_microbatch(
    grads,
    params,
    policy,
    prompts: Prompts,
    trajectories,
    coefficients,
    reference,
    packing: Packing,
    share,
    index,
    *,
    surrogate,
    temperature: float,
    microbatch: tuple[int, int],
    several: int = 1,
):
    """`grads` plus those of the `several` microbatches from number `index` x `several` on, and their
    sums and gauges.

    One whose prompts have nothing to learn costs nothing. Every microbatch takes prompts from all
    over the batch, so that on a mesh each device keeps its share.
    """
    # Every pull-back adds to these in place, layer by layer: one tree of gradients, however many
    # microbatches there are.
    total = _references(grads)

    def of_prompts(chunk):
        its_prompts, mine, coefficient, its_reference, its_packing = chunk
        prefix, last, pull_prefix = _prefix_vjp(params, policy, its_prompts)
        caches = prefix.keys, prefix.values
        cache_total = _references(sharding.constrain_batch(policy.mesh, _zeros(caches), axis=1))

        def rows_chunk(first_row, rows):
            is_here = _is_in_rows(rows, first_row)[..., None]

            def loss(params, keys, values):
                its_prefix = models.Prefix(keys, values, prefix.lengths)
                new = log_probs(
                    params, policy, its_prefix, last, mine, rows, temperature, first_row
                )
                tokens = losses.TokenLogProbs(
                    new=new,
                    rationale_mask=mine.rationale_mask & is_here,
                    answer_mask=mine.answer_mask & is_here,
                    old=mine.old_log_probs,
                    reference=its_reference,
                )
                sums = surrogate(coefficient, tokens)
                return sums.loss, (sums, new)

            value, pull, (sums, new) = jax.vjp(loss, params, *caches, has_aux=True)
            pull.with_refs(total, *cache_total)(jnp.full_like(value, share))
            return sums, _gauges(new, mine.old_log_probs, mine.was_sampled & is_here)

        found = _sum_over_rows(rows_chunk, its_packing, microbatch[1])
        pull_prefix.with_refs(total)(jax.tree.map(jax.freeze, cache_total))
        return found

    batch = (prompts, trajectories, coefficients, reference, packing)
    chunks = len(prompts.lengths) // microbatch[0]
    if chunks == 1:
        found = of_prompts(batch)
    else:
        parts = jax.tree.map(lambda x: _split(x, chunks), batch)
        zeros = _zeros(jax.eval_shape(of_prompts, jax.tree.map(lambda x: x[0], parts)))

        def add(total, number):
            chunk = jax.tree.map(lambda x: x[number], parts)
            has_rows = chunk[-1].rows.max() > 0
            return jax.lax.cond(
                has_rows, lambda: _add(total, of_prompts(chunk)), lambda: total
            ), None

        found, _ = jax.lax.scan(add, zeros, index * several + jnp.arange(several))
    return jax.tree.map(jax.freeze, total), *found


def _sum_over_rows(function, packing: Packing, size: int):
    """The sum of function(first_row, packing of `size` rows) over the rows that hold something."""
    count = packing.token.shape[1]
    if size == count:
        return function(0, packing)

    def chunk(first_row):
        rows = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size, axis=1)
        return packing._replace(
            rollout=rows(packing.rollout, first_row), token=rows(packing.token, first_row)
        )

    zeros = _zeros(jax.eval_shape(lambda: function(jnp.int32(0), chunk(0))))
    used = -(-packing.rows.max() // size)
    return jax.lax.fori_loop(
        0, used, lambda i, total: _add(total, function(i * size, chunk(i * size))), zeros
    )


@jax.jit
def _add(total, part):
    is_gauges = lambda x: isinstance(x, SamplerMismatch)
    add = lambda a, b: a.merge(b) if is_gauges(a) else a + b
    return jax.tree.map(add, total, part, is_leaf=is_gauges)


def _zeros(like):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def _references(tree):
    return jax.tree.map(jax.new_ref, tree)


def _split(x: Array, chunks: int) -> Array:
    """[B, ...] -> [chunks, B / chunks, ...], each with every chunks-th row."""
    return jnp.moveaxis(x.reshape(x.shape[0] // chunks, chunks, *x.shape[1:]), 1, 0)


def _prefix(params, policy: Policy, prompts: Prompts) -> tuple[models.Prefix, Array]:
    """Caches of the prompts' tokens but the last, and the last tokens [B]."""
    prefix = models.prefill(
        policy.gathered(params),
        policy.config,
        prompts.tokens,
        prompts.lengths - 1,
        policy.execution,
    )
    prefix = sharding.constrain_prefix(policy.mesh, prefix)
    last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)[:, 0]
    return prefix, last


def _prefix_vjp(params, policy, prompts):
    """`_prefix`, and the pull-back from gradients of (keys, values) to the parameters."""

    def keys_and_values(params):
        prefix, last = _prefix(params, policy, prompts)
        return (prefix.keys, prefix.values), (prefix.lengths, last)

    (keys, values), pull, (lengths, last) = jax.vjp(keys_and_values, params, has_aux=True)
    return models.Prefix(keys, values, lengths), last, pull


def _gauges(new: Array, old: Array, mask: Array) -> SamplerMismatch:
    difference = jnp.where(mask, jnp.abs(new - old), 0.0)
    return SamplerMismatch(
        sampled=mask.sum(dtype=jnp.float32),
        mismatch=difference.sum(),
        mismatch_max=difference.max(),
        mismatch_exp=jnp.where(mask, jnp.exp(difference), 0.0).sum(),
    )
