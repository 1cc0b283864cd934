"""The forward pass: log-probabilities of rollouts that continue the caches of their prompts.

Some packs of rollouts at a time, as the gradient takes them (`gradient.py`), or all of a batch,
where nothing is differentiated: `reference_log_probs`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from qlog import models
from qlog.learner import planning
from qlog.learner.blocks import Blocks
from qlog.learner.packing import Packing, pack_rollouts
from qlog.learner.types import Microbatch
from qlog.models import head
from qlog.parallel import exchange, sharding
from qlog.policy import Policy
from qlog.records import Prompts, Trajectories

_Sum = TypeVar("_Sum")


# ---- One window of packs: prompts' caches, then the rollouts that continue them ----


class PromptContext(NamedTuple):
    """What the rollouts of b prompts go on from: computed once, however many there are."""

    prefix: models.Prefix  # keys and values of all tokens of the prompts but the last
    last: Array  # int32 [b], the last token of each prompt: the first input of its rollouts


def prompt_context(params: models.Params, policy: Policy, prompts: Prompts) -> PromptContext:
    """The caches of b prompts, all of whose rollouts continue them: one forward pass of each."""
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


# ---- Which packs, and a loop over windows of them ----


def packing_of(policy: Policy, trajectories: Trajectories, is_needed: Array) -> Packing:
    """The packs of all rollouts that are needed, bool [b, M]; split over prompts."""
    slots = trajectories.tokens.shape[-1]
    packing = pack_rollouts(trajectories.lengths, is_needed, slots)
    return sharding.constrain_batch(policy.mesh, packing)


def packing_of_blocks(
    policy: Policy, trajectories: Trajectories, is_needed: Array, blocks: Blocks
) -> Packing:
    """The packs of blocks [N], from their prompts' trajectories [N, M, R]."""
    # Packing a prompt's rollouts gives the same packs everywhere, and costs less than sending them.
    packing = packing_of(policy, trajectories, is_needed)
    packing = packing.block(jnp.asarray(blocks.first_pack), jnp.asarray(blocks.num_packs))
    return sharding.constrain_batch(policy.mesh, packing)


@jax.named_scope("packs")  # qlog.aot finds the loop by this name
def sum_over_packs(
    function: Callable[[Packing], _Sum],
    packing: Packing,
    at_once: int,
    add: Callable[[_Sum, _Sum], _Sum],
) -> _Sum:
    """The sum of function(window) over windows of `at_once` packs, up to the last that is used."""
    window = lambda number: packing.window(number * at_once, at_once)
    zeros = zeros_like(jax.eval_shape(function, jax.eval_shape(window, 0)))
    # The number of iterations is known only as the program runs. Such a loop has no reverse-mode
    # derivative: that is why the pull-back of each window is called inside of it.
    num_used = -(-packing.num_packs.max() // at_once)
    return jax.lax.fori_loop(0, num_used, lambda i, total: add(total, function(window(i))), zeros)


def zeros_like(like: Any) -> Any:
    """Zeros in the place of arrays or of their shapes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


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
    microbatch = planning.narrowed(policy, trajectories, microbatch)
    found, num_packs = _begin_reference(policy, trajectories)
    for blocks in planning.blocks_of_programs(policy, prompts, trajectories, num_packs, microbatch):
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
    num_packs = packing_of(policy, trajectories, everything).num_packs
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
    # From the shards on which the prompts lie to those that compute the blocks.
    prompts, trajectories = exchange.take(
        policy.mesh, (prompts, trajectories), jnp.asarray(blocks.prompt)
    )
    everything = jnp.ones(trajectories.lengths.shape, bool)
    packing = packing_of_blocks(policy, trajectories, everything, blocks)
    context = prompt_context(params, policy, prompts)
    of_packs = lambda window: log_probs(params, policy, context, trajectories, window, temperature)
    if packs_at_once == packing.token.shape[1]:
        return of_packs(packing)
    # As with blocks: a rollout is in one window.
    return sum_over_packs(of_packs, packing, packs_at_once, jnp.add)
