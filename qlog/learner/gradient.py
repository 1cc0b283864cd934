"""From coefficients to a gradient. A block's prompt passes once forward and backward.

The surrogate of an update's batch is

    L = 1/B  sum over prompts, rollouts and tokens  of  - coefficient * log p(token),

where the coefficients are constants that already know the whole batch. So L is a plain sum, and
neither the size of a microbatch nor the way into blocks (`blocks.py`) can change its gradient. The
README of this package has the derivation.

Shapes are those of the longest possible rollouts. Which packs of rollouts pass through the model,
and where, are arguments of the program. So it is compiled once, and short rollouts cost little.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from qlog import losses, models
from qlog.learner import forward, planning
from qlog.learner.blocks import Blocks
from qlog.learner.packing import Packing
from qlog.learner.types import (
    LearnerBatch,
    Microbatch,
    Objective,
    PackedRows,
    SamplerMismatch,
    StepSums,
)
from qlog.parallel import exchange, sharding
from qlog.policy import Policy
from qlog.records import Prompts

_Refs = Any  # a pytree of `jax.Ref`s: arrays that are changed in place


# ---- The gradient of an update: a loop on the host over compiled programs ----


def batch_gradient(
    params: models.Params,
    policy: Policy,
    batch: LearnerBatch,
    objective: Objective,
    microbatch: Microbatch,
    before_each: Callable[[], None] | None = None,
    *,
    balanced: bool = True,
) -> tuple[models.Params, StepSums]:
    """Gradient of the surrogate's mean over the batch's real prompts, in microbatches.

    Every process must call.

    Args:
      batch: B prompts. Rollouts whose coefficients are zero cost nothing, unless there is a
        reference: its penalty is on all of them.
      microbatch: what is in memory at a time, at most.
      before_each: called before each program, which takes one microbatch, or several small ones. It
        may raise to give up; then nothing has changed.
      balanced: False leaves each prompt whole, on its own device; the gradient is the same.

    Returns:
      float32 gradients like `params`, and the sums over the batch.
    """
    if balanced:
        microbatch = planning.narrowed(policy, batch.trajectories, microbatch)
    grads, needed = begin(params, policy, batch)
    sums = []
    for blocks in planning.blocks_of_programs(
        policy, batch.prompts, batch.trajectories, needed.num_packs, microbatch, balanced
    ):
        if before_each:
            # JAX returns before the devices are done. Without this wait the host would queue all
            # programs at once, look for signals long before they run, and have to sit them out.
            jax.block_until_ready(grads)
            before_each()
        grads, part = add_microbatches(
            grads,
            params,
            policy,
            batch,
            needed,
            blocks,
            objective=objective,
            microbatch=microbatch,
        )
        sums.append(part)
    return grads, functools.reduce(merge, sums)


merge = jax.jit(StepSums.merge)


# ---- Two programs: one that begins, one that adds microbatches ----


class Needed(NamedTuple):
    """What the gradient of a batch is taken on, besides the batch."""

    is_needed: Array  # bool [B, M], rollouts that are learned from, split over prompts
    num_packs: Array  # int32 [B], packs that they fill; whole on every device
    share: Array  # float32 scalar, of a prompt in the mean: 1 / the number of real prompts


@functools.partial(jax.jit, static_argnames=("policy",))
def begin(
    params: models.Params, policy: Policy, batch: LearnerBatch
) -> tuple[models.Params, Needed]:
    """Zeros like `params`, to which microbatches add their gradients, and what these need."""
    is_needed = (batch.coefficients.score != 0) | (batch.coefficients.path != 0)
    if batch.reference is not None:
        is_needed = jnp.ones_like(is_needed)  # the penalty is on all
    # One rollout always passes: a step that learns nothing still measures the sampler's mismatch.
    is_needed = sharding.constrain_batch(policy.mesh, is_needed.at[0, 0].set(True))
    # Of the packing only the numbers of packs are kept, so the compiler leaves the rest out.
    packing = forward.packing_of(policy, batch.trajectories, is_needed)
    needed = Needed(
        is_needed=is_needed,
        num_packs=sharding.constrain_replicated(policy.mesh, packing.num_packs),
        share=1 / jnp.maximum(batch.prompts.is_prompt.sum(), 1).astype(jnp.float32),
    )
    return sharding.constrain_params(policy.mesh, forward.zeros_like(params)), needed


@functools.partial(
    jax.jit,
    static_argnames=("policy", "objective", "microbatch"),
    donate_argnames=("grads",),
)
def add_microbatches(
    grads: models.Params,
    params: models.Params,
    policy: Policy,
    batch: LearnerBatch,
    needed: Needed,
    blocks: Blocks,
    *,
    objective: Objective,
    microbatch: Microbatch,
) -> tuple[models.Params, StepSums]:
    """Adds the gradients of some microbatches of blocks; one without any pack costs nothing.

    Args:
      grads: float32 like `params`; donated.
      needed: from `begin`.
      blocks: [n, N] of n microbatches, N = microbatch.prompts; the same on every process.

    Returns:
      The gradients, and the sums over these microbatches.
    """
    grads_refs = _new_refs(grads)
    add = functools.partial(
        _add_blocks, grads_refs, params, policy, objective, microbatch.packs, batch, needed
    )
    first = jax.tree.map(lambda x: x[0], blocks)
    if len(blocks.prompt) == 1:
        sums = add(first)
    else:

        def add_some(sums: StepSums, some: Blocks) -> tuple[StepSums, None]:
            merged = lambda: sums.merge(add(some))
            return jax.lax.cond((some.num_packs > 0).any(), merged, lambda: sums), None

        zeros = forward.zeros_like(jax.eval_shape(lambda: add(first)))
        sums, _ = jax.lax.scan(add_some, zeros, blocks)
    return jax.tree.map(jax.freeze, grads_refs), sums


# ---- Inside the program: a microbatch of blocks, and in it some packs at a time ----


def _add_blocks(
    grads_refs: _Refs,
    params: models.Params,
    policy: Policy,
    objective: Objective,
    packs_at_once: int,
    whole: LearnerBatch,
    needed: Needed,
    blocks: Blocks,
) -> StepSums:
    """Adds the gradients of a microbatch's blocks [N] to `grads_refs`.

    Args:
      whole: of all B prompts.

    Returns:
      The sums over the blocks' rollouts.
    """
    # The rows of the blocks' prompts, from the shards on which they lie to those that compute them.
    batch, is_needed = exchange.take(
        policy.mesh, (whole, needed.is_needed), jnp.asarray(blocks.prompt)
    )
    packing = forward.packing_of_blocks(policy, batch.trajectories, is_needed, blocks)
    # The loss of a group depends on the parameters in two ways: through the rollouts' own passes,
    # and through the prompt's keys and values, the caches C, that all of them attend to:
    #
    #     dL/dparams  =  sum over packs of (dL/dparams with C fixed)        pull-back of the tokens
    #                    + (sum over packs of dL/dC) * dC/dparams           pull-back of the prompts
    #
    # The prompts' forward pass keeps what their pull-back needs. Then come the packs, some at a
    # time, and add to both sums. Last, one pull-back takes the sum of dL/dC through the prompts.
    #
    # All of them add in place. `jax.new_ref` turns an array into a Ref, a buffer that the program
    # changes where it lies; `jax.freeze` turns it back into an array. A pull-back given Refs by
    # `with_refs` returns no gradients: it adds each to its Ref as soon as it is known, a layer's to
    # the layer's slice. So there is one tree of gradients, the one that was donated. With
    # `total = total + pull(...)` a second one would be in memory, as large as the parameters, for
    # as long as a backward pass lasts, and be read and written once more for each microbatch.
    context, pull_prompts = _prompt_context_vjp(params, policy, batch.prompts)
    caches = context.prefix.keys, context.prefix.values
    zeros = sharding.constrain_batch(policy.mesh, forward.zeros_like(caches), axis=1)
    caches_refs = _new_refs(zeros)
    add = functools.partial(
        _add_packs, grads_refs, caches_refs, params, policy, objective, needed.share, context, batch
    )
    if packs_at_once == packing.token.shape[1]:
        sums = add(packing)
    else:
        sums = forward.sum_over_packs(add, packing, packs_at_once, StepSums.merge)
    pull_prompts.with_refs(grads_refs)(jax.tree.map(jax.freeze, caches_refs))
    return sums


def _add_packs(
    grads_refs: _Refs,
    caches_refs: _Refs,
    params: models.Params,
    policy: Policy,
    objective: Objective,
    share: Array,
    context: forward.PromptContext,
    batch: LearnerBatch,
    packing: Packing,
) -> StepSums:
    """Adds gradients of the rollouts in `packing`, to the parameters' and to the caches'.

    Returns:
      The sums over these rollouts.
    """
    trajectories = batch.trajectories
    is_here = packing.is_packed[..., None]  # [b, M, 1]: the others count in their own packs

    def token_log_probs(params: models.Params, keys: Any, values: Any) -> Array:
        prefix = context.prefix._replace(keys=keys, values=values)
        return forward.log_probs(
            params,
            policy,
            context._replace(prefix=prefix),
            trajectories,
            packing,
            objective.temperature,
        )

    # Forward: parameters and caches -> log-probabilities [b, M, R] -> loss.
    prefix = context.prefix
    new, pull_tokens = jax.vjp(token_log_probs, params, prefix.keys, prefix.values)
    tokens = losses.TokenLogProbs(
        new=new,
        rationale_mask=trajectories.rationale_mask & is_here,
        answer_mask=trajectories.answer_mask & is_here,
        old=trajectories.old_log_probs,
        reference=batch.reference,
    )
    surrogate = lambda new: objective.surrogate(batch.coefficients, tokens._replace(new=new))
    # The other sums are only measured. As `has_aux` they are not differentiated, so what is not
    # finite in them cannot reach the gradient.
    loss, pull_loss, sums = jax.vjp(lambda new: _loss_and_sums(surrogate(new)), new, has_aux=True)
    # Backward, from `share` and not 1: the mean over prompts is taken here, in the one number that
    # all gradients contain, and never again.
    (gradient,) = pull_loss(jnp.full_like(loss, share))
    pull_tokens.with_refs(grads_refs, *caches_refs)(gradient)
    was_sampled = trajectories.was_sampled & is_here
    mismatch = SamplerMismatch.between(new, trajectories.old_log_probs, was_sampled)
    # A window has as many packs of each prompt, whether they hold something or not.
    num_prompts, num_packs, _ = packing.token.shape
    executed = jnp.asarray(num_prompts * num_packs, jnp.int32)
    return StepSums(sums, mismatch, PackedRows(executed, packing.num_packs.sum(dtype=jnp.int32)))


def _loss_and_sums(sums: losses.Sums) -> tuple[Array, losses.Sums]:
    return sums.loss, sums


def _prompt_context_vjp(
    params: models.Params, policy: Policy, prompts: Prompts
) -> tuple[forward.PromptContext, Any]:
    """`forward.prompt_context`, and its pull-back.

    Returns:
      The context, and a function from gradients of (keys, values) to those of the parameters.
    """

    def keys_and_values(params: models.Params) -> tuple[Any, Any]:
        context = forward.prompt_context(params, policy, prompts)
        prefix = context.prefix
        return (prefix.keys, prefix.values), (prefix.lengths, context.last)

    # Lengths and tokens are integers, which have no gradient: they come as `has_aux`.
    (keys, values), pull, (lengths, last) = jax.vjp(keys_and_values, params, has_aux=True)
    return forward.PromptContext(models.Prefix(keys, values, lengths), last), pull


def _new_refs(tree: Any) -> _Refs:
    return jax.tree.map(jax.new_ref, tree)
