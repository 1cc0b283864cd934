"""The phases of a training step on random tokens, as functions to be timed.

Every rollout has the full length: no token that ends one can be drawn.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlog import losses, models
from qlog.benchmark import measure
from qlog.learner import gradient
from qlog.learner.gradient import batch_gradient
from qlog.learner.optimizer import apply_update
from qlog.models import flops, head
from qlog.models.flops import Need
from qlog.parallel import process, sharding
from qlog.policy import Policy, logits_chunk
from qlog.records import Golds, Prompts, TrainState, Trajectories
from qlog.rollouts import sampler, scoring

FIRST_TOKEN = 10  # random tokens are drawn from here on


class Size(NamedTuple):
    """B prompts of P tokens with M rollouts each: N tokens of rationale, A of gold answer."""

    prompts: int
    rollouts: int
    prompt: int
    rationale: int
    answer: int


class Phase(NamedTuple):
    """call: runs the phase once. tokens: that it makes or learns from. need: of the phase."""

    call: Callable[[], object]
    tokens: int
    need: Need


class Batch(NamedTuple):
    """prompts: int32 [B, P]. golds. keys: [B, M]. trajectories: [B, M, N + A], all tokens counted.
    advantages: float32 [B, M], standardised within each group."""

    prompts: Prompts
    golds: Golds
    keys: jax.Array
    trajectories: Trajectories
    advantages: np.ndarray


def make_batch(policy: Policy, size: Size, seed: int = 0) -> Batch:
    """Random tokens; the same for every implementation that is compared."""
    random = np.random.default_rng(seed)
    high = policy.valid_vocab - 1  # the last token is what closes a rationale

    def tokens(*shape):
        return random.integers(FIRST_TOKEN, high, (size.prompts, *shape)).astype(np.int32)

    def full(value, *shape, dtype=np.int32):
        return np.full((size.prompts, *shape), value, dtype)

    prompts, golds = tokens(size.prompt), tokens(size.answer)
    length = size.rationale + size.answer
    shape = (size.rollouts, length)
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
        parts = sharding.put_batch(policy.mesh, parts)
    prompts, golds, trajectories, uids = jax.tree.map(jnp.asarray, parts)
    keys = sampler.rollout_keys(jax.random.key(seed), uids, size.rollouts)
    return Batch(prompts, golds, keys, trajectories, advantages)


def settings(policy: Policy, size: Size, temperature: float = 1.0) -> sampler.Sampling:
    """Rationales of exactly N tokens: the token that closes one is beyond the valid vocabulary."""
    return sampler.Sampling(
        rationale_budget=size.rationale - 1,
        answer_reserve=size.answer,
        closing=(policy.valid_vocab - 1,),
        eos=(),
        pad=0,
        temperature=temperature,
    )


def without_ends(policy: Policy) -> Policy:
    """The policy that cannot draw its last token."""
    return Policy(**{**vars(policy), "valid_vocab": policy.valid_vocab - 1})


def rollout_phases(params: models.Params, policy: Policy, size: Size, batch: Batch, wave: int = 0):
    """prefill, rollouts (prefill, decoding and scoring as in training), score (the last pass alone),
    and score_fresh, the same log w without the caches."""
    config, draws, itemsize = policy.config, without_ends(policy), jnp.dtype(policy.dtype).itemsize
    prompts, count = batch.prompts, size.prompts * size.rollouts
    draw = settings(policy, size)
    arguments = (prompts.tokens, prompts.lengths)
    weights = sampler.decoding_weights(params, draws)
    # The last of `prompts_per_wave` prompts' caches, for the scoring pass.
    part = jax.tree.map(lambda x: x[: wave or size.prompts], (*arguments, batch.keys, batch.golds))
    prefix = sampler.prefill(params, draws, *part[:2])
    pool = sampler.initial_pool(draws, prefix, *part[:3], draw)
    closed = jnp.full_like(pool.rollouts.rationale_lengths, size.rationale)
    pool = pool._replace(rollouts=pool.rollouts._replace(rationale_lengths=closed))
    waves = size.prompts // (wave or size.prompts)

    def score():
        for _ in range(waves):
            log_w = scoring.score_answers(
                weights, draws, pool.prefix, pool.suffix, pool.rollouts.tokens, closed, *part[3]
            )
        return log_w

    def score_fresh():
        return gradient.reference_log_probs(
            params, draws, prompts, batch.trajectories, 1.0, (size.prompts, size.rollouts)
        )

    def rollouts():
        return sampler.sample(
            params, draws, *arguments, batch.keys, batch.golds, draw, prompts_per_wave=wave
        )[:2]

    start = size.prompt + size.rationale
    scored = flops.continuation_need(config, count, start, size.answer)
    prefilled = flops.prefill_need(config, size.prompts, size.prompt)
    decoded = flops.decode_need(
        config, size.prompts, size.rollouts, size.prompt, size.rationale, itemsize
    )
    whole = Need(sum(n.flops for n in (scored, prefilled, decoded)), decoded.bytes)
    return {
        "prefill": Phase(
            lambda: sampler.prefill(params, draws, *arguments),
            size.prompts * size.prompt,
            prefilled,
        ),
        "rollouts": Phase(rollouts, count * size.rationale, whole),
        "score": Phase(score, count * size.answer, scored),
        "score_fresh": Phase(score_fresh, count * size.answer, scored),
    }


class Trainer:
    """A step of policy-gradient training: gradient, clip, AdamW."""

    def __init__(
        self, params, policy: Policy, size: Size, batch: Batch, microbatch, learning_rate=1e-5
    ):
        self._policy, self._batch, self._size, self._microbatch = policy, batch, size, microbatch
        adamw = optax.adamw(learning_rate, weight_decay=0.0)
        chain = optax.chain(optax.clip_by_global_norm(1.0), adamw)
        self._optimizer = optax.apply_if_finite(chain, 100)
        opt_state = self._optimizer.init(params)
        # A loss per token, averaged over tokens, rollouts and prompts.
        per_token = batch.advantages / (size.rollouts * (size.rationale + size.answer))
        score = jnp.asarray(per_token)
        if policy.mesh:
            score = sharding.put_batch(policy.mesh, per_token)
        none = jnp.zeros_like(score)
        self._coefficients = losses.Coefficients(score, none, none, none)
        self._state = TrainState(jnp.zeros((), jnp.int32), params, opt_state, ())
        self.norms = []

    def step(self):
        grads, _, _ = batch_gradient(
            self._state.params,
            self._policy,
            self._batch.prompts,
            self._batch.trajectories,
            self._coefficients,
            None,
            surrogate=losses.linear(),
            microbatch=self._microbatch,
        )
        self._state, norms = apply_update(
            self._state, (), grads, optimizer=self._optimizer, mesh=self._policy.mesh
        )
        jax.block_until_ready(self._state)
        process.release_memory()  # as after every step of training
        self.norms.append(float(norms["grad_norm"]))

    def phase(self) -> Phase:
        size = self._size
        length = size.rationale + size.answer
        tokens = size.prompts * (size.prompt + size.rollouts * length)
        need = flops.train_need(
            self._policy.config, size.prompts, size.rollouts, size.prompt, length
        )
        return Phase(self.step, tokens, need)

    def breakdown(self, seconds: float, repeats: int) -> dict[str, float]:
        """A step's seconds by part: each timed alone, and of `seconds` what they leave."""
        parts = {name: measure.repeat(call, repeats).median for name, call in self.parts().items()}
        return parts | {"rollouts' layers": seconds - sum(parts.values())}

    def parts(self) -> dict[str, Callable[[], object]]:
        """What can be run alone of a step: the prompts and the output head, forward and backward in
        the same microbatches, and the update. The rest of a step are the rollouts' layers."""
        prompts, rows = self._microbatch
        chunks, row_chunks = self._size.prompts // prompts, self._size.rollouts // rows
        some, tokens = jax.tree.map(
            lambda x: x[::chunks], (self._batch.prompts, self._batch.trajectories.tokens)
        )

        def run(function, times, tokens):
            for _ in range(times):
                grads = function(self._state.params, self._policy, tokens)
            return grads

        grads = jax.tree.map(jnp.zeros_like, self._state.params)

        def update():
            self._state, norms = apply_update(
                self._state, (), grads, optimizer=self._optimizer, mesh=self._policy.mesh
            )
            return norms

        return {
            "prompts": lambda: run(_prompts_gradient, chunks, some),
            "output head": lambda: run(_head_gradient, chunks * row_chunks, tokens[:, :rows]),
            "update": update,
        }


@functools.partial(jax.jit, static_argnames=("policy",))
def _prompts_gradient(params, policy, prompts):
    def total(params):
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
def _head_gradient(params, policy, tokens):
    hidden = params["embed"][tokens].astype(policy.dtype)

    def total(hidden, table):
        return head.token_log_probs(
            hidden, table, tokens, valid_vocab=policy.valid_vocab, chunk=logits_chunk(policy)
        ).sum()

    return jax.grad(total, (0, 1))(hidden, models.unembedding(policy.gathered(params)))
