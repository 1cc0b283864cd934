"""The phases of a training step on random tokens, as functions to be timed.

Every rollout has the full length: no token that ends one can be sampled.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlog import losses, models
from qlog.benchmark import measure
from qlog.learner import forward
from qlog.learner.gradient import batch_gradient
from qlog.learner.optimizer import apply_update
from qlog.learner.types import LearnerBatch, Microbatch, Objective, UpdateMetrics
from qlog.models import flops, head
from qlog.models.flops import Need
from qlog.parallel import batch_placement, process, sharding
from qlog.policy import Policy
from qlog.records import Golds, Prompts, TrainState, Trajectories
from qlog.rollouts import decoding, sampler, scoring

FIRST_TOKEN = 10  # random tokens are at least this, so none is padding or another special token


class Size(NamedTuple):
    """How much is computed. The fields are keys of the benchmark's JSON."""

    prompts: int  # B
    rollouts: int  # M of each prompt
    prompt: int  # P, tokens of each prompt
    rationale: int  # N, tokens of each rationale
    answer: int  # A, tokens of each gold answer


class TimedPhase(NamedTuple):
    """A part of a training step, ready to be timed."""

    call: Callable[[], object]  # runs it once, and returns or waits for what it computes
    tokens: int  # that it makes or learns from
    need: Need  # FLOPs and bytes that it cannot do without


class Batch(NamedTuple):
    """Random tokens of a training step."""

    prompts: Prompts  # [B, P], all of them full
    golds: Golds  # [B, A], all of them full
    keys: jax.Array  # PRNG keys [B, M]
    trajectories: Trajectories  # [B, M, N + A], every token a rationale's
    advantages: np.ndarray  # float32 [B, M], mean 0 and deviation 1 within each group


def make_batch(policy: Policy, size: Size, seed: int = 0) -> Batch:
    """Random tokens; the same for every implementation that is compared."""
    random = np.random.default_rng(seed)
    high = policy.valid_vocab - 1  # the last token is what closes a rationale

    def tokens(*shape: int) -> np.ndarray:
        return random.integers(FIRST_TOKEN, high, (size.prompts, *shape)).astype(np.int32)

    def full(value: int | bool, *shape: int, dtype: Any = np.int32) -> np.ndarray:
        return np.full((size.prompts, *shape), value, dtype)

    prompts, golds = tokens(size.prompt), tokens(size.answer)
    length = size.rationale + size.answer
    shape = (size.rollouts, length)
    # Of mean 0 in each group, as a policy gradient with a baseline has them.
    advantages = random.normal(size=(size.prompts, size.rollouts)).astype(np.float32)
    advantages -= advantages.mean(1, keepdims=True)
    advantages /= advantages.std(1, keepdims=True) + 1e-4
    everywhere = full(True, *shape, dtype=bool)
    parts = (
        Prompts(prompts, full(size.prompt), full(True, dtype=bool)),
        Golds(golds, full(size.answer)),
        Trajectories(
            tokens(*shape),
            everywhere,
            ~everywhere,
            full(0, *shape, dtype=np.float32),
            ~everywhere,
            full(length, size.rollouts),
        ),
        np.arange(size.prompts, dtype=np.uint32),
    )
    if policy.mesh:
        parts = batch_placement.put_batch(policy.mesh, parts)
    prompts, golds, trajectories, uids = jax.tree.map(jnp.asarray, parts)
    keys = sampler.rollout_keys(jax.random.key(seed), uids, size.rollouts)
    return Batch(prompts, golds, keys, trajectories, advantages)


def full_length_sampling(policy: Policy, size: Size, temperature: float = 1.0) -> decoding.Sampling:
    """Rationales of exactly N tokens: `without_ends` cannot sample the token that closes one."""
    return decoding.Sampling(
        rationale_budget=size.rationale - 1,  # then the closing token is forced
        answer_reserve=size.answer,
        closing=(policy.valid_vocab - 1,),
        eos=(),
        pad=0,
        temperature=temperature,
    )


def without_ends(policy: Policy) -> Policy:
    """The policy that cannot sample its last token."""
    return Policy(**{**vars(policy), "valid_vocab": policy.valid_vocab - 1})


def rollout_phases(
    params: models.Params, policy: Policy, size: Size, batch: Batch, wave: int = 0
) -> dict[str, TimedPhase]:
    """The phases of sampling by name.

    prefill: the prompts' caches. rollouts: prefill, decoding and scoring as in training. score: the
    gold answers on the caches, the last of the three only. score_fresh: the same log w without
    caches.

    Args:
      wave: prompts that are sampled at a time; 0 is all.
    """
    config, draws, itemsize = policy.config, without_ends(policy), jnp.dtype(policy.dtype).itemsize
    prompts, num_rollouts = batch.prompts, size.prompts * size.rollouts
    sampling = full_length_sampling(policy, size)
    arguments = (prompts.tokens, prompts.lengths)
    weights = decoding.decoding_weights(params, draws)
    # ---- Caches of one wave, as decoding leaves them to the scoring pass.
    budgets = jnp.full(batch.keys.shape, sampling.rationale_budget, jnp.int32)
    part, golds = jax.tree.map(
        lambda x: x[: wave or size.prompts],
        (decoding.Batch(*arguments, batch.keys, budgets), batch.golds),
    )
    prefix = decoding.prefill(params, draws, part.prompts, part.lengths)
    ids = jnp.arange(part.keys.size, dtype=jnp.int32).reshape(part.keys.shape)
    slots = models.whole_tiles(sampling.max_length)
    pool = decoding.initial_pool(draws, prefix, part, ids, sampling, slots)
    # As if every rationale had just been closed: the pool was not decoded, its tokens are padding.
    closed = jnp.full_like(pool.rollouts.rationale_lengths, size.rationale)
    pool = pool._replace(rollouts=pool.rollouts._replace(rationale_lengths=closed))
    waves = size.prompts // (wave or size.prompts)

    def score() -> jax.Array:
        for _ in range(waves):
            log_probs = scoring.token_log_probs(
                weights, draws, pool.prefix, pool.suffix, pool.rollouts.tokens, closed, golds
            )
        return log_probs  # [B, M, A]; log w is their sum

    def score_fresh() -> jax.Array:
        everything = Microbatch(size.prompts, size.rollouts)
        return forward.reference_log_probs(
            params, draws, prompts, batch.trajectories, 1.0, everything
        )

    def rollouts() -> tuple:
        return sampler.sample(
            params, draws, *arguments, batch.keys, batch.golds, sampling, prompts_per_wave=wave
        )[:2]

    # ---- What each of them needs.
    start = size.prompt + size.rationale
    scored = flops.continuation_need(config, num_rollouts, start, size.answer)
    prefilled = flops.prefill_need(config, size.prompts, size.prompt)
    decoded = flops.decode_need(
        config,
        size.prompts,
        size.rollouts,
        size.prompt,
        size.rationale,
        itemsize,
        policy.cache_itemsize,
    )
    # Decoding is the only phase that memory bounds, so only its bytes are counted.
    whole = Need(sum(n.flops for n in (scored, prefilled, decoded)), decoded.bytes)
    return {
        "prefill": TimedPhase(
            lambda: decoding.prefill(params, draws, *arguments),
            size.prompts * size.prompt,
            prefilled,
        ),
        "rollouts": TimedPhase(rollouts, num_rollouts * size.rationale, whole),
        "score": TimedPhase(score, num_rollouts * size.answer, scored),
        "score_fresh": TimedPhase(score_fresh, num_rollouts * size.answer, scored),
    }


class Trainer:
    """A step of policy-gradient training: gradient, clip, AdamW.

    Attributes:
      norms: of the gradients, one per step so far.
    """

    def __init__(
        self,
        params: models.Params,
        policy: Policy,
        size: Size,
        batch: Batch,
        microbatch: Microbatch,
        learning_rate: float = 1e-5,
    ):
        """Owns `params` from here on: the first step donates them."""
        self._policy, self._batch, self._size, self._microbatch = policy, batch, size, microbatch
        adamw = optax.adamw(learning_rate, weight_decay=0.0)
        chain = optax.chain(optax.clip_by_global_norm(1.0), adamw)
        self._optimizer = optax.apply_if_finite(chain, 100)
        opt_state = self._optimizer.init(params)
        # A loss per token, averaged over tokens, rollouts and prompts.
        per_token = batch.advantages / (size.rollouts * (size.rationale + size.answer))
        score = jnp.asarray(per_token)
        if policy.mesh:
            score = batch_placement.put_batch(policy.mesh, per_token)
        # The other coefficients are zero: a plain policy gradient.
        none = jnp.zeros_like(score)
        self._coefficients = losses.Coefficients(score, none, none, none)
        self._state = TrainState(jnp.zeros((), jnp.int32), params, opt_state, ())
        self.norms: list[float] = []

    def step(self) -> None:
        """One step, waited for, on the parameters that the step before left; adds to `norms`."""
        grads, _ = batch_gradient(
            self._state.params,
            self._policy,
            LearnerBatch(self._batch.prompts, self._batch.trajectories, self._coefficients),
            Objective(losses.linear()),
            self._microbatch,
        )
        self._state, update = apply_update(
            self._state, (), grads, optimizer=self._optimizer, mesh=self._policy.mesh
        )
        jax.block_until_ready(self._state)
        process.release_memory()  # as after every step of training
        self.norms.append(float(update.grad_norm))

    def phase(self) -> TimedPhase:
        """`step` as a phase, with what it needs."""
        size = self._size
        length = size.rationale + size.answer
        tokens = size.prompts * (size.prompt + size.rollouts * length)
        need = flops.train_need(
            self._policy.config, size.prompts, size.rollouts, size.prompt, length
        )
        return TimedPhase(self.step, tokens, need)

    def breakdown(self, seconds: float, repeats: int) -> dict[str, float]:
        """Seconds of a step by part: those of `parts`, and of the step's `seconds` the rest."""
        parts = {name: measure.repeat(call, repeats).median for name, call in self.parts().items()}
        return parts | {"rollouts' layers": seconds - sum(parts.values())}

    def parts(self) -> dict[str, Callable[[], object]]:
        """The parts of a step that can run by themselves: prompts, output head, update.

        The first two are forward and backward passes in the microbatches of the step. The rest of a
        step are the rollouts' layers.
        """
        num_prompts, num_packs = self._microbatch
        microbatches = self._size.prompts // num_prompts
        pack_microbatches = self._size.rollouts // num_packs
        # The prompts of one microbatch come from all over the batch, as in the learner.
        prompts, tokens = jax.tree.map(
            lambda x: x[::microbatches], (self._batch.prompts, self._batch.trajectories.tokens)
        )
        return {
            "prompts": functools.partial(
                self._repeat_gradient, _prompts_gradient, microbatches, prompts
            ),
            "output head": functools.partial(
                self._repeat_gradient,
                _head_gradient,
                microbatches * pack_microbatches,
                tokens[:, :num_packs],
            ),
            "update": functools.partial(
                self._update, jax.tree.map(jnp.zeros_like, self._state.params)
            ),
        }

    def _repeat_gradient(self, function: Callable[..., Any], times: int, tokens: Any) -> Any:
        """The gradients of the last of `times` runs."""
        grads = None
        for _ in range(times):
            grads = function(self._state.params, self._policy, tokens)
        return grads

    def _update(self, grads: models.Params) -> UpdateMetrics:
        self._state, update = apply_update(
            self._state, (), grads, optimizer=self._optimizer, mesh=self._policy.mesh
        )
        return update


@functools.partial(jax.jit, static_argnames=("policy",))
def _prompts_gradient(params: models.Params, policy: Policy, prompts: Prompts) -> models.Params:
    """Of a sum that every key and value of the prompts' caches enters."""

    def total(params: models.Params) -> jax.Array:
        prefix = models.prefill(
            policy.gathered(params),
            policy.config,
            prompts.tokens,
            prompts.lengths,
            policy.execution,
        )
        return prefix.keys.sum(dtype=jnp.float32) + prefix.values.sum(dtype=jnp.float32)

    return sharding.constrain_params(policy.mesh, jax.grad(total)(params))


@functools.partial(jax.jit, static_argnames=("policy",))
def _head_gradient(
    params: models.Params, policy: Policy, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of the tokens' log-probabilities, by hidden states (here embeddings) and output table."""
    # Any hidden states of the right shape cost the same.
    hidden = params["embed"][tokens].astype(policy.dtype)

    def total(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return head.token_log_probs(
            hidden, table, tokens, valid_vocab=policy.valid_vocab, chunk=policy.logits_chunk
        ).sum()

    return jax.grad(total, (0, 1))(hidden, models.unembedding(policy.gathered(params)))
