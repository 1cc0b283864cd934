"""From coefficients to the next parameters: the surrogate's gradient, then the optax update.

A group's prompt passes through the model once, forward and backward, whatever M is: its keys and
values are computed under `jax.vjp`, the rollouts' gradients with respect to them are summed over
microbatches, and one pull-back takes the sum to the parameters. The coefficients are constants
that already know the whole batch, so the size of a microbatch cannot change the result.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from qlog import losses, models, scoring, sharding
from qlog.policy import Policy
from qlog.sampling import Rollouts


class Prompts(NamedTuple):
    """tokens: int32 [B, P] right-padded; lengths: int32 [B]; is_prompt: bool [B]."""

    tokens: Array
    lengths: Array
    is_prompt: Array


class Trajectories(NamedTuple):
    """What the gradient is taken on: rationale, then answer, right-padded. All [B, M, R].

    tokens: int32. rationale_mask: tokens of z that carry its log-probability (forced ones do
    not). answer_mask: tokens of the answer. old_log_probs: float32, of the policy that sampled;
    was_sampled: where there is one.
    """

    tokens: Array
    rationale_mask: Array
    answer_mask: Array
    old_log_probs: Array
    was_sampled: Array


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
    answer = jnp.take_along_axis(jnp.broadcast_to(gold[:, None], (*ends.shape[:2], gold.shape[1])), offset, -1)
    in_rationale = slots < ends
    rationale_mask = _fit(rollouts.is_sampled, length) & in_rationale
    return Trajectories(
        tokens=jnp.where(in_rationale, own, answer),
        rationale_mask=rationale_mask,
        answer_mask=~in_rationale & (slots < ends + gold_lengths[:, None, None]),
        old_log_probs=_fit(rollouts.log_probs, length),
        was_sampled=rationale_mask,
    )


@functools.partial(jax.jit, static_argnames=("length",))
def with_sampled_answer(rollouts: Rollouts, length: int) -> Trajectories:
    """Trajectories of `length` tokens: the rollouts as they were sampled."""
    in_rationale = jnp.arange(length) < rollouts.rationale_lengths[..., None]
    sampled = _fit(rollouts.is_sampled, length)
    return Trajectories(
        tokens=_fit(rollouts.tokens, length), rationale_mask=sampled & in_rationale,
        answer_mask=sampled & ~in_rationale, old_log_probs=_fit(rollouts.log_probs, length),
        was_sampled=sampled,
    )  # fmt: skip


def annotated(rationale: Array, rationale_lengths: Array) -> Rollouts:
    """Annotated rationales [B, R] in the place of sampled ones, M = 1 (supervised fine-tuning)."""
    lengths = rationale_lengths[:, None]
    is_token = jnp.arange(rationale.shape[1]) < lengths[..., None]
    no = jnp.zeros(lengths.shape, bool)
    return Rollouts(
        tokens=rationale[:, None], log_probs=jnp.zeros(is_token.shape), is_sampled=is_token,
        rationale_lengths=lengths, lengths=lengths, forced=no, ended_early=no, complete=no,
    )  # fmt: skip


def log_probs(
    params: models.Params,
    policy: Policy,
    prefix: models.Prefix,
    last: Array,
    trajectories: Trajectories,
    temperature: float,
) -> Array:
    """log p of every token of the trajectories [b, m, R], float32; the prompt is in `prefix`.

    Args:
      prefix: caches of the prompts' tokens but the last.
      last: int32 [b], each prompt's last token.
      temperature: of the law that sampled; gold answers are always scored at 1.
    """
    tokens = trajectories.tokens
    first = jnp.broadcast_to(last[:, None, None], (*tokens.shape[:2], 1))
    inputs = jnp.concatenate([first, tokens[..., :-1]], axis=-1)
    positions = prefix.lengths[:, None, None] + jnp.arange(tokens.shape[-1])
    positions = jnp.broadcast_to(positions, tokens.shape)
    hidden, _ = models.apply(
        params, policy.config, inputs, positions,
        prefix=prefix, dtype=policy.dtype, remat=policy.remat,
    )  # fmt: skip
    if temperature != 1.0:
        is_gold = trajectories.answer_mask & ~trajectories.was_sampled
        temperature = jnp.where(is_gold, 1.0, temperature)
    return scoring.token_log_probs(
        hidden, models.unembedding(params), tokens,
        valid_vocab=policy.valid_vocab, temperature=temperature, chunk=scoring.chunk_size(policy),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("policy", "temperature"))
def reference_log_probs(params, policy, prompts: Prompts, trajectories, temperature) -> Array:
    """`log_probs` under other parameters, without a gradient: [B, M, R]."""
    prefix, last = _prefix(params, policy, prompts)
    return log_probs(params, policy, prefix, last, trajectories, temperature)


@functools.partial(
    jax.jit, static_argnames=("policy", "surrogate", "temperature", "microbatch")
)
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
) -> tuple[models.Params, losses.Sums, Gauges]:
    """Gradient of the surrogate, summed over the batch's prompts, in microbatches.

    Args:
      coefficients: [B, M], of the whole batch.
      reference: log-probabilities of reference parameters [B, M, R], or None.
      surrogate: token-level loss of `qlog.losses`, which adds over microbatches.
      microbatch: prompts and rollouts per prompt that are in memory at a time; divisors of B, M.

    Returns:
      float32 gradients like `params`, the surrogate's sums, and the gauges.
    """
    num_prompts, num_rollouts, _ = trajectories.tokens.shape
    rows, columns = microbatch
    per_rollout = (trajectories, coefficients, reference)

    def rollouts_loss(params, keys, values, lengths, last, chunk):
        chunk_trajectories, coefficient, chunk_reference = chunk
        prefix = models.Prefix(keys, values, lengths)
        new = log_probs(params, policy, prefix, last, chunk_trajectories, temperature)
        sums = surrogate(
            coefficient.score, coefficient.path, coefficient.token_weight,
            new, chunk_trajectories.old_log_probs, chunk_reference,
            chunk_trajectories.rationale_mask, chunk_trajectories.answer_mask,
        )  # fmt: skip
        return sums.loss, (sums, _gauges(jax.lax.stop_gradient(new), chunk_trajectories))

    def prompts_chunk(chunk):
        chunk_prompts, chunk_rollouts = chunk
        (prefix, last), pull = _prefix_vjp(params, policy, chunk_prompts)

        def rollouts_chunk(chunk):
            value_and_grad = jax.value_and_grad(rollouts_loss, argnums=(0, 1, 2), has_aux=True)
            (_, (sums, gauges)), grads = value_and_grad(
                params, prefix.keys, prefix.values, prefix.lengths, last, chunk
            )
            return (sharding.keep(policy.mesh, grads[0]), *grads[1:]), sums, gauges

        (param_grads, *cache_grads), sums, gauges = _sum_over(
            rollouts_chunk, chunk_rollouts, num_rollouts // columns, axis=1
        )
        grads = jax.tree.map(jnp.add, param_grads, pull(tuple(cache_grads)))
        return sharding.keep(policy.mesh, grads), sums, gauges

    return _sum_over(prompts_chunk, (prompts, per_rollout), num_prompts // rows, axis=0)


def _sum_over(function, tree, chunks: int, axis: int):
    """The sum of `function`, which returns (grads, Sums, Gauges), over equal chunks of `tree`.

    Every chunk takes rows from all over `axis`, so that on a mesh each device keeps its share.
    """
    if chunks == 1:
        return function(tree)

    def split(x):
        x = x.reshape(*x.shape[:axis], x.shape[axis] // chunks, chunks, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis + 1, 0)

    def add(total, chunk):
        (grads, sums, gauges), (more_grads, more_sums, more_gauges) = total, function(chunk)
        plus = functools.partial(jax.tree.map, jnp.add)
        return (plus(grads, more_grads), plus(sums, more_sums), gauges.merge(more_gauges)), None

    parts = jax.tree.map(split, tree)
    one = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
    return jax.lax.scan(add, zeros, parts)[0]


def _prefix(params, policy: Policy, prompts: Prompts) -> tuple[models.Prefix, Array]:
    """Caches of the prompts' tokens but the last, and the last tokens [B]."""
    prefix = models.prefill(
        params, policy.config, prompts.tokens, prompts.lengths - 1,
        dtype=policy.dtype, remat=policy.remat,
    )  # fmt: skip
    prefix = sharding.keep_prefix(policy.mesh, prefix)
    last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)[:, 0]
    return prefix, last


def _prefix_vjp(params, policy, prompts):
    """`_prefix`, and the pull-back from gradients of its keys and values to the parameters."""

    def keys_and_values(params):
        prefix, last = _prefix(params, policy, prompts)
        return (prefix.keys, prefix.values), (prefix.lengths, last)

    (keys, values), pull, (lengths, last) = jax.vjp(keys_and_values, params, has_aux=True)
    return (models.Prefix(keys, values, lengths), last), lambda grads: pull(grads)[0]


def _gauges(new: Array, trajectories: Trajectories) -> Gauges:
    mask = trajectories.was_sampled
    difference = jnp.where(mask, jnp.abs(new - trajectories.old_log_probs), 0.0)
    return Gauges(
        sampled=mask.sum(dtype=jnp.float32), mismatch=difference.sum(),
        mismatch_max=difference.max(), mismatch_exp=jnp.where(mask, jnp.exp(difference), 0.0).sum(),
    )  # fmt: skip


def _fit(x: Array, length: int) -> Array:
    """x [B, M, R] cut or zero-padded to [B, M, length]."""
    x = x[..., :length]
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[-1])))


@functools.partial(jax.jit, static_argnames=("optimizer", "mesh"), donate_argnames=("state",))
def update(
    state: TrainState, loss_state: Any, grads: models.Params, num_prompts: Array, *,
    optimizer: optax.GradientTransformation, mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, Array]]:  # fmt: skip
    """One optax update from gradients summed over `num_prompts` prompts; and its norms.

    With a mesh the new state lies where the old one did, so that the next step compiles nothing.
    """
    grads = jax.tree.map(lambda g: g / num_prompts, grads)
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
