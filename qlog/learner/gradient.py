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
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qlog import losses, models
from qlog.learner import blocks as block_plans
from qlog.learner.blocks import Blocks, PlanSettings
from qlog.learner.packing import Packing, pack_rollouts
from qlog.learner.types import (
    LearnerBatch,
    Microbatch,
    Objective,
    PackedRows,
    SamplerMismatch,
    StepSums,
)
from qlog.models import head
from qlog.parallel import exchange, sharding
from qlog.policy import Policy
from qlog.records import Prompts, Trajectories

_FLOPS_PER_PROGRAM = 2e11  # per device: about a second of a CPU

_Sum = TypeVar("_Sum", Array, StepSums)
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
        microbatch = _narrowed(policy, batch.trajectories, microbatch)
    grads, needed = begin(params, policy, batch)
    sums = []
    for blocks in _programs(
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


def _num_shards(policy: Policy) -> int:
    return sharding.num_batch_shards(policy.mesh) if policy.mesh else 1


def _narrowed(policy: Policy, trajectories: Trajectories, microbatch: Microbatch) -> Microbatch:
    return microbatch.narrowed(trajectories.tokens.shape[-1], _num_shards(policy))


def _programs(
    policy: Policy,
    prompts: Prompts,
    trajectories: Trajectories,
    num_packs: Array,
    microbatch: Microbatch,
    balanced: bool = True,
) -> list[Blocks]:
    """The blocks that each program computes: those of one microbatch, or of several small ones.

    Args:
      num_packs: int32 [B], of each prompt, whole on every device. The host waits for it.
      microbatch: `narrowed` already.
      balanced: as `batch_gradient` takes it.
    """
    slots = prompts.tokens.shape[1], trajectories.tokens.shape[-1]
    settings = plan_settings(policy.config, *slots, _num_shards(policy), microbatch)
    several = _microbatches_per_program(policy, prompts, trajectories, microbatch)
    planned = block_plans.plan_blocks(jax.device_get(num_packs), settings, balanced)
    planned = planned.padded_to_multiple(several)
    starts = range(0, len(planned.prompt), several)
    return [planned.of(start, start + several) for start in starts]


def plan_settings(
    config: models.DecoderConfig,
    prompt_slots: int,
    rollout_slots: int,
    num_shards: int,
    microbatch: Microbatch,
) -> PlanSettings:
    """What blocks are planned for.

    Args:
      prompt_slots, rollout_slots: P and R.
      microbatch: `narrowed` already.
    """
    flops = models.flops
    prompt = flops.prefill_need(config, 1, prompt_slots).flops
    # A pack costs what one rollout of R tokens does.
    pack = flops.continuation_need(config, 1, prompt_slots, rollout_slots).flops
    return PlanSettings(num_shards, microbatch.prompts, microbatch.packs, prompt / pack)


def planned_work(
    lengths: np.ndarray,
    config: models.DecoderConfig,
    prompt_slots: int,
    rollout_slots: int,
    num_shards: int,
    microbatch: Microbatch,
    balanced: bool = True,
) -> block_plans.Work:
    """What `batch_gradient` would compute for rollouts of these lengths; host arithmetic.

    Args:
      lengths: int [B, M], in tokens, of an update's rollouts; all of them are learned from.
      config: of the model.
      prompt_slots, rollout_slots: P and R.
      num_shards: that the B prompts are split over.
      microbatch: as `batch_gradient` takes it.
      balanced: False: as if each shard kept its prompts whole and took as many packs at a time as
        `microbatch` allows, to compare with.
    """
    if balanced:
        microbatch = microbatch.narrowed(rollout_slots, num_shards)
    settings = plan_settings(config, prompt_slots, rollout_slots, num_shards, microbatch)
    on_device = _num_packs(jnp.asarray(lengths, jnp.int32), rollout_slots)
    planned = block_plans.plan_blocks(jax.device_get(on_device), settings, balanced)
    return settings.work(planned)


@functools.partial(jax.jit, static_argnames=("length",))
def _num_packs(lengths: Array, length: int) -> Array:
    return pack_rollouts(lengths, jnp.ones(lengths.shape, bool), length).num_packs


def _microbatches_per_program(
    policy: Policy, prompts: Prompts, trajectories: Trajectories, microbatch: Microbatch
) -> int:
    """How many microbatches one program takes."""
    # One per program lets the host look for signals after each. But every program does anew what a
    # loop does once for all its iterations: the layout of the weights, and a copy of the gradients.
    # Large microbatches hide that, small ones do not. So these go together, as many as take about
    # a second on a CPU, which is soon enough for a signal.
    num_microbatches = len(prompts.lengths) // microbatch.prompts
    _, num_rollouts, length = trajectories.tokens.shape
    need = models.flops.train_need(
        policy.config, microbatch.prompts, num_rollouts, prompts.tokens.shape[1], length
    )
    num_devices = policy.mesh.size if policy.mesh else 1
    most = int(_FLOPS_PER_PROGRAM * num_devices / need.flops)
    return min(max(most, 1), num_microbatches)


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
    packing = _packing(policy, batch.trajectories, is_needed)
    needed = Needed(
        is_needed=is_needed,
        num_packs=sharding.constrain_replicated(policy.mesh, packing.num_packs),
        share=1 / jnp.maximum(batch.prompts.is_prompt.sum(), 1).astype(jnp.float32),
    )
    return sharding.constrain_params(policy.mesh, _zeros(params)), needed


def _packing(policy: Policy, trajectories: Trajectories, is_needed: Array) -> Packing:
    slots = trajectories.tokens.shape[-1]
    packing = pack_rollouts(trajectories.lengths, is_needed, slots)
    return sharding.constrain_batch(policy.mesh, packing)


def _block_packing(
    policy: Policy, trajectories: Trajectories, is_needed: Array, blocks: Blocks
) -> Packing:
    """The packs of blocks [N], from their prompts' trajectories [N, M, R]."""
    # Packing a prompt's rollouts gives the same packs everywhere, and costs less than sending them.
    packing = _packing(policy, trajectories, is_needed)
    packing = packing.block(jnp.asarray(blocks.first_pack), jnp.asarray(blocks.num_packs))
    return sharding.constrain_batch(policy.mesh, packing)


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

        zeros = _zeros(jax.eval_shape(lambda: add(first)))
        sums, _ = jax.lax.scan(add_some, zeros, blocks)
    return jax.tree.map(jax.freeze, grads_refs), sums


# ---- Inside the program: a microbatch of blocks, and in it some packs at a time ----


class PromptContext(NamedTuple):
    """What the rollouts of b prompts go on from: computed once, however many there are."""

    prefix: models.Prefix  # keys and values of all tokens of the prompts but the last
    last: Array  # int32 [b], the last token of each prompt: the first input of its rollouts


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
    packing = _block_packing(policy, batch.trajectories, is_needed, blocks)
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
    caches_refs = _new_refs(sharding.constrain_batch(policy.mesh, _zeros(caches), axis=1))
    add = functools.partial(
        _add_packs, grads_refs, caches_refs, params, policy, objective, needed.share, context, batch
    )
    if packs_at_once == packing.token.shape[1]:
        sums = add(packing)
    else:
        sums = _sum_over_packs(add, packing, packs_at_once, StepSums.merge)
    pull_prompts.with_refs(grads_refs)(jax.tree.map(jax.freeze, caches_refs))
    return sums


def _add_packs(
    grads_refs: _Refs,
    caches_refs: _Refs,
    params: models.Params,
    policy: Policy,
    objective: Objective,
    share: Array,
    context: PromptContext,
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
        return log_probs(
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


@jax.named_scope("packs")  # qlog.aot finds the loop by this name
def _sum_over_packs(
    function: Callable[[Packing], _Sum],
    packing: Packing,
    at_once: int,
    add: Callable[[_Sum, _Sum], _Sum],
) -> _Sum:
    """The sum of function(window) over windows of `at_once` packs, up to the last that is used."""
    window = lambda number: packing.window(number * at_once, at_once)
    zeros = _zeros(jax.eval_shape(function, jax.eval_shape(window, 0)))
    # The number of iterations is known only as the program runs. Such a loop has no reverse-mode
    # derivative: that is why the pull-back of each window is called inside of it.
    num_used = -(-packing.num_packs.max() // at_once)
    return jax.lax.fori_loop(0, num_used, lambda i, total: add(total, function(window(i))), zeros)


def log_probs(
    params: models.Params,
    policy: Policy,
    context: PromptContext,
    trajectories: Trajectories,
    packing: Packing,
    temperature: float,
) -> Array:
    """log p of every token of the trajectories.

    Args:
      context: of the same b prompts.
      packing: of all rollouts, or a window of it.
      temperature: of the distribution that sampled. Gold answers are always scored at 1.

    Returns:
      float32 [b, M, R]; 0 for rollouts that are not in `packing`. Behind a rollout's last token
      the values mean nothing.
    """
    params = policy.gathered(params)
    prefix, last = context
    tokens = packing.to_packs(trajectories.tokens)  # [b, w, R]
    # The input in a slot is the token in front of it. A rollout's first token has in front of it
    # not its neighbour in the pack, but the prompt's last token, whose position comes next.
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
    temperatures: float | Array = temperature
    if temperature != 1.0:
        is_gold = packing.to_packs(trajectories.answer_mask & ~trajectories.was_sampled)
        temperatures = jnp.where(is_gold, 1.0, temperature)
    packed = head.token_log_probs(
        hidden,
        models.unembedding(params),
        tokens,
        valid_vocab=policy.valid_vocab,
        temperature=temperatures,
        chunk=policy.logits_chunk,
    )
    return packing.to_rollouts(packed)


def _prompt_context(params: models.Params, policy: Policy, prompts: Prompts) -> PromptContext:
    prefix = models.prefill(
        policy.gathered(params),
        policy.config,
        prompts.tokens,
        prompts.lengths - 1,
        policy.execution,
    )
    prefix = sharding.constrain_prefix(policy.mesh, prefix)
    last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)[:, 0]
    return PromptContext(prefix, last)


def _prompt_context_vjp(
    params: models.Params, policy: Policy, prompts: Prompts
) -> tuple[PromptContext, Any]:
    """`_prompt_context`, and the pull-back from gradients of (keys, values) to the parameters."""

    def keys_and_values(params):
        context = _prompt_context(params, policy, prompts)
        prefix = context.prefix
        return (prefix.keys, prefix.values), (prefix.lengths, context.last)

    # Lengths and tokens are integers, which have no gradient: they come as `has_aux`.
    (keys, values), pull, (lengths, last) = jax.vjp(keys_and_values, params, has_aux=True)
    return PromptContext(models.Prefix(keys, values, lengths), last), pull


# ---- The reference: log-probabilities without a gradient ----


def reference_log_probs(
    params: models.Params,
    policy: Policy,
    prompts: Prompts,
    trajectories: Trajectories,
    temperature: float,
    microbatch: Microbatch,
) -> Array:
    """`log_probs` of all B prompts under other parameters, in microbatches: float32 [B, M, R].

    Every process must call.
    """
    microbatch = _narrowed(policy, trajectories, microbatch)
    found, num_packs = _begin_reference(policy, trajectories)
    for blocks in _programs(policy, prompts, trajectories, num_packs, microbatch):
        found = _add_reference(
            found,
            params,
            policy,
            prompts,
            trajectories,
            blocks,
            temperature=temperature,
            microbatch=microbatch,
        )
    return found


@functools.partial(jax.jit, static_argnames=("policy",))
def _begin_reference(policy: Policy, trajectories: Trajectories) -> tuple[Array, Array]:
    """Zeros float32 [B, M, R], and the packs that all rollouts fill: int32 [B], on every device."""
    everything = jnp.ones(trajectories.lengths.shape, bool)
    num_packs = _packing(policy, trajectories, everything).num_packs
    zeros = jnp.zeros(trajectories.tokens.shape, jnp.float32)
    return (
        sharding.constrain_batch(policy.mesh, zeros),
        sharding.constrain_replicated(policy.mesh, num_packs),
    )


@functools.partial(
    jax.jit,
    static_argnames=("policy", "temperature", "microbatch"),
    donate_argnames=("found",),
)
def _add_reference(
    found: Array,
    params: models.Params,
    policy: Policy,
    prompts: Prompts,
    trajectories: Trajectories,
    blocks: Blocks,
    *,
    temperature: float,
    microbatch: Microbatch,
) -> Array:
    """`found` [B, M, R], and the log-probabilities of the rollouts in some microbatches' blocks."""
    of_blocks = functools.partial(
        _block_log_probs, params, policy, temperature, microbatch.packs, prompts, trajectories
    )

    def add(found: Array, some: Blocks) -> tuple[Array, None]:
        # A rollout has 0 in all blocks but its own, so the sum puts the blocks together.
        added = lambda: exchange.add(policy.mesh, found, of_blocks(some), jnp.asarray(some.prompt))
        return jax.lax.cond((some.num_packs > 0).any(), added, lambda: found), None

    if len(blocks.prompt) == 1:
        return add(found, jax.tree.map(lambda x: x[0], blocks))[0]
    return jax.lax.scan(add, found, blocks)[0]


def _block_log_probs(
    params: models.Params,
    policy: Policy,
    temperature: float,
    packs_at_once: int,
    prompts: Prompts,
    trajectories: Trajectories,
    blocks: Blocks,
) -> Array:
    """`log_probs` of a microbatch's blocks: [N, M, R]; 0 of rollouts that are in other blocks."""
    # As in `_add_blocks`.
    prompts, trajectories = exchange.take(
        policy.mesh, (prompts, trajectories), jnp.asarray(blocks.prompt)
    )
    everything = jnp.ones(trajectories.lengths.shape, bool)
    packing = _block_packing(policy, trajectories, everything, blocks)
    context = _prompt_context(params, policy, prompts)
    of_packs = lambda window: log_probs(params, policy, context, trajectories, window, temperature)
    if packs_at_once == packing.token.shape[1]:
        return of_packs(packing)
    # As with blocks: a rollout is in one window.
    return _sum_over_packs(of_packs, packing, packs_at_once, jnp.add)


def _zeros(like: Any) -> Any:
    """Zeros in the place of arrays or of their shapes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def _new_refs(tree: Any) -> _Refs:
    return jax.tree.map(jax.new_ref, tree)
