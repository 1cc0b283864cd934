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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from qlog import losses, models, scoring, sharding
from qlog.policy import Policy
from qlog.sampling import Rollouts

_FLOPS_PER_PROGRAM = 2e11  # per device


class Prompts(NamedTuple):
    """tokens: int32 [B, P] right-padded; lengths: int32 [B]; is_prompt: bool [B]."""

    tokens: Array
    lengths: Array
    is_prompt: Array


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


class Packing(NamedTuple):
    """Rollouts laid into rows of R slots; row w of a prompt holds whole rollouts, one after another.

    row, offset: int32 [B, M], where each rollout begins; row -1 is left out. rows: int32 [B], rows
    that hold something, the first ones. rollout, token: int32 [B, W, R], which rollout's which
    token is in a slot; M where there is none, and then slots count as tokens of one more rollout.
    """

    row: Array
    offset: Array
    rows: Array
    rollout: Array
    token: Array


class TrainState(NamedTuple):
    """Everything that a step changes. step: int32 scalar, batches of prompts learned from so far."""

    step: Array
    params: models.Params
    opt_state: Any
    loss_state: Any


class Gauges(NamedTuple):
    """Sums over the batch's tokens, float32 scalars; `sampled` counts those with an old log_prob.

    How far the learner's log-probabilities are from the sampler's: sum |new - old|, its maximum,
    and the sum of exp |new - old|.
    """

    sampled: Array
    mismatch: Array
    mismatch_max: Array
    mismatch_exp: Array

    def merge(self, other: "Gauges") -> "Gauges":
        largest = jnp.maximum(self.mismatch_max, other.mismatch_max)
        return jax.tree.map(jnp.add, self, other)._replace(mismatch_max=largest)


@functools.partial(jax.jit, static_argnames=("length",))
def with_gold_answer(rollouts: Rollouts, gold: Array, gold_lengths: Array, length: int):
    """Trajectories of `length` tokens: each rationale followed by the gold answer [B, A]."""
    slots = jnp.arange(length)
    ends = rollouts.rationale_lengths[..., None]
    own = _fit(rollouts.tokens, length)
    offset = jnp.clip(slots - ends, 0, gold.shape[1] - 1)
    answer = jnp.take_along_axis(
        jnp.broadcast_to(gold[:, None], (*ends.shape[:2], gold.shape[1])), offset, -1
    )
    in_rationale = slots < ends
    rationale_mask = _fit(rollouts.is_sampled, length) & in_rationale
    return Trajectories(
        tokens=jnp.where(in_rationale, own, answer),
        rationale_mask=rationale_mask,
        answer_mask=~in_rationale & (slots < ends + gold_lengths[:, None, None]),
        old_log_probs=_fit(rollouts.log_probs, length),
        was_sampled=rationale_mask,
        lengths=rollouts.rationale_lengths + gold_lengths[:, None],
    )


@functools.partial(jax.jit, static_argnames=("length",))
def with_sampled_answer(rollouts: Rollouts, length: int) -> Trajectories:
    """Trajectories of `length` tokens: the rollouts as they were sampled."""
    in_rationale = jnp.arange(length) < rollouts.rationale_lengths[..., None]
    sampled = _fit(rollouts.is_sampled, length)
    return Trajectories(
        tokens=_fit(rollouts.tokens, length),
        rationale_mask=sampled & in_rationale,
        answer_mask=sampled & ~in_rationale,
        old_log_probs=_fit(rollouts.log_probs, length),
        was_sampled=sampled,
        lengths=rollouts.lengths,
    )


def annotated(rationale: Array, rationale_lengths: Array) -> Rollouts:
    """Annotated rationales [B, R] in the place of sampled ones, M = 1 (supervised fine-tuning)."""
    lengths = rationale_lengths[:, None]
    is_token = jnp.arange(rationale.shape[1]) < lengths[..., None]
    no = jnp.zeros(lengths.shape, bool)
    return Rollouts(
        tokens=rationale[:, None],
        log_probs=jnp.zeros(is_token.shape),
        is_sampled=is_token,
        rationale_lengths=lengths,
        lengths=lengths,
        forced=no,
        ended_early=no,
        complete=no,
    )


def pack(lengths: Array, is_needed: Array, slots: int) -> Packing:
    """First-fit decreasing: longest rollouts first, each into the first row that has room.

    Args:
      lengths: int32 [B, M], at most `slots`.
      is_needed: bool [B, M]; the others are left out.
      slots: R. There are as many rows as rollouts, W = M.
    """
    batch, count = lengths.shape
    order = jnp.argsort(jnp.where(is_needed, -lengths, 1), axis=1)

    def place(filled, m):
        length = jnp.take_along_axis(lengths, m[:, None], 1)
        row = jnp.argmax(filled + length <= slots, axis=1)
        is_placed = jnp.take_along_axis(is_needed, m[:, None], 1)[:, 0]
        offset = jnp.take_along_axis(filled, row[:, None], 1)[:, 0]
        more = jnp.where(is_placed, length[:, 0], 0)
        return filled.at[jnp.arange(batch), row].add(more), (jnp.where(is_placed, row, -1), offset)

    filled, placed = jax.lax.scan(place, jnp.zeros((batch, count), jnp.int32), order.T)
    back = jnp.argsort(order, axis=1)
    row, offset = (jnp.take_along_axis(x.T, back, axis=1) for x in placed)

    # A rollout's number where it begins; everything after it is its own until the next begins.
    prompt, m = jnp.indices((batch, count))
    at = jnp.where(row < 0, count, row), offset
    grid = jnp.zeros((batch, count, slots), jnp.int32)
    begins = grid.at[(prompt, *at)].set(m + 1, mode="drop")
    slot = jnp.arange(slots)
    is_filled = slot < filled[..., None]
    start = jax.lax.cummax(jnp.where((begins > 0) | (slot == filled[..., None]), slot, 0), axis=2)
    rollout = jnp.take_along_axis(begins, start, axis=2) - 1
    return Packing(
        row, offset, (filled > 0).sum(1), jnp.where(is_filled, rollout, count), slot - start
    )


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
    positions = prefix.lengths[:, None, None] + packing.token
    hidden, _ = models.apply(
        params,
        policy.config,
        inputs,
        positions,
        prefix=prefix,
        first=jnp.arange(slots) - packing.token,
        remat=policy.remat,
        **policy.options,
    )
    if temperature != 1.0:
        is_gold = packed(trajectories.answer_mask & ~trajectories.was_sampled)
        temperature = jnp.where(is_gold, 1.0, temperature)
    own = scoring.token_log_probs(
        hidden,
        models.unembedding(params),
        tokens,
        valid_vocab=policy.valid_vocab,
        temperature=temperature,
        chunk=scoring.chunk_size(policy),
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


def gradient(
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
) -> tuple[models.Params, losses.Sums, Gauges]:
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
    packing = sharding.keep_rows(policy.mesh, packing)
    share = 1 / jnp.maximum(prompts.is_prompt.sum(), 1).astype(jnp.float32)
    return sharding.keep(policy.mesh, _zeros(params)), packing, share


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
        cache_total = _references(sharding.keep_rows(policy.mesh, _zeros(caches), rows=1))

        def rows_chunk(first_row, rows):
            is_here = _is_in_rows(rows, first_row)[..., None]

            def loss(params, keys, values):
                its_prefix = models.Prefix(keys, values, prefix.lengths)
                new = log_probs(
                    params, policy, its_prefix, last, mine, rows, temperature, first_row
                )
                sums = surrogate(
                    coefficient.score,
                    coefficient.path,
                    coefficient.token_weight,
                    new,
                    mine.old_log_probs,
                    its_reference,
                    mine.rationale_mask & is_here,
                    mine.answer_mask & is_here,
                )
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
    is_gauges = lambda x: isinstance(x, Gauges)
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
        remat=policy.remat,
        **policy.options,
    )
    prefix = sharding.keep_prefix(policy.mesh, prefix)
    last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)[:, 0]
    return prefix, last


def _prefix_vjp(params, policy, prompts):
    """`_prefix`, and the pull-back from gradients of (keys, values) to the parameters."""

    def keys_and_values(params):
        prefix, last = _prefix(params, policy, prompts)
        return (prefix.keys, prefix.values), (prefix.lengths, last)

    (keys, values), pull, (lengths, last) = jax.vjp(keys_and_values, params, has_aux=True)
    return models.Prefix(keys, values, lengths), last, pull


def _gauges(new: Array, old: Array, mask: Array) -> Gauges:
    difference = jnp.where(mask, jnp.abs(new - old), 0.0)
    return Gauges(
        sampled=mask.sum(dtype=jnp.float32),
        mismatch=difference.sum(),
        mismatch_max=difference.max(),
        mismatch_exp=jnp.where(mask, jnp.exp(difference), 0.0).sum(),
    )


def _fit(x: Array, length: int) -> Array:
    """x [B, M, R] cut or zero-padded to [B, M, length]."""
    x = x[..., :length]
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[-1])))


@functools.partial(jax.jit, static_argnames=("optimizer", "mesh"), donate_argnames=("state",))
def update(
    state: TrainState,
    loss_state: Any,
    grads: models.Params,
    *,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One optax update from the batch's gradients; and its norms.

    With a mesh the new state lies where the old one did, so that the next step compiles nothing.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "grad_norm": optax.tree.norm(grads),
        "update_norm": optax.tree.norm(updates),
        "param_norm": optax.tree.norm(params),
        "skipped_updates": optax.tree.get(opt_state, "total_notfinite"),
        "skipped_in_a_row": optax.tree.get(opt_state, "notfinite_count"),
    }
    return sharding.keep(mesh, TrainState(state.step, params, opt_state, loss_state)), metrics
