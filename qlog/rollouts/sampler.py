"""Sampling rollouts: prefill each prompt once, decode M rationales, force their end at the budget,
score the gold answer on the caches that are left.

Rollouts end at very different steps, so they are decoded in pools of lanes that shrink. The order
is that of `schedule.py`; here is the machine that it drives, which calls the compiled programs of
`decoding.py`. The README of this folder has a drawing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qlog import models
from qlog.parallel import batch_placement, sharding
from qlog.parallel.interrupts import Interrupts
from qlog.policy import Policy
from qlog.records import Golds, Samples
from qlog.rollouts import balance, decoding, moves, schedule
from qlog.rollouts.decoding import Batch, Sampling
from qlog.rollouts.moves import Pool
from qlog.rollouts.pool import NO_ROLLOUT, Level, Shape
from qlog.rollouts.schedule import STEPS_PER_LOOK, Schedule


def rollout_keys(key: Array, uids: Array, num_rollouts: int) -> Array:
    """PRNG keys [B, M] that depend only on (key, the prompt's uid, the rollout's index).

    `key` stands for (seed, training step). The decode loop folds in the position of each token. So
    a rollout does not depend on the batch it is in, on the lane, or on the number of devices.

    Args:
      uids: uint32 [B], of the prompts.
    """
    per_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, uids)
    per_rollout = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(per_rollout, (0, None))(per_prompt, jnp.arange(num_rollouts))


# ---- A call: its waves, and the sizes of its pools ----


def sample(
    params: models.Params,
    policy: Policy,
    prompts: Array,
    lengths: Array,
    keys: Array,
    golds: Golds,
    sampling: Sampling,
    prompts_per_wave: int = 0,
    rehearse: bool = False,
    interrupts: Interrupts | None = None,
    *,
    budgets: Array | None = None,
    steps_per_look: int = STEPS_PER_LOOK,
    shrink: bool = True,
    exchange: bool = True,
) -> Samples:
    """Samples the rollouts of a batch of prompts and scores their gold answers.

    Args:
      prompts: int32 [B, P], right-padded.
      lengths: int32 [B], at least 1.
      keys: [B, M] from `rollout_keys`.
      golds: the gold answers, [B, A].
      prompts_per_wave: bounds the memory: no pool's caches take more than those of so many prompts
        and of M rollouts each at their longest. A divisor of B; 0 is all.
      rehearse: visit all sizes of the pool first, also those that this batch does not need, so that
        later batches of the same shapes compile nothing.
      interrupts: checked between chunks of decode steps.
      budgets: int32 [B, M], free tokens of each rationale, at most sampling.rationale_budget; None
        gives it to all.
      steps_per_look: decode steps between two looks at which rollouts are done.
      shrink: False keeps all lanes until the last rollout is done; the rollouts are the same.
      exchange: False leaves all rollouts on their shards; the rollouts are the same.

    Raises:
      Stop: a signal has reached any process; on every process after the same chunk.
    """
    num_prompts, num_rollouts = keys.shape
    of_rollouts = budgets
    if of_rollouts is None:
        of_rollouts = decoding.every_budget(policy, sampling, num_prompts, num_rollouts)
    plan = plan_of(
        policy,
        sampling,
        num_prompts,
        num_rollouts,
        prompts.shape[1],
        prompts_per_wave or num_prompts,
        shrink,
        exchange,
    )
    decoder = _Decoder(
        params,
        policy,
        sampling,
        Batch(prompts, lengths, keys, of_rollouts),
        golds,
        plan,
        interrupts,
    )
    if rehearse:
        decoder.rehearse()
    work = schedule.run(plan, decoder, steps_per_look)
    results = decoding.by_prompt(decoder.results, keys.shape)
    return Samples(results.rollouts, results.log_w, work.lane_steps, results.gold_log_probs)


def plan_of(
    policy: Policy,
    sampling: Sampling,
    num_prompts: int,
    num_rollouts: int,
    prompt_slots: int,
    prompts_per_wave: int,
    shrink: bool = True,
    exchange: bool = True,
) -> Schedule:
    """The sizes of pools and the waves of a call of `sample`."""
    mesh = policy.mesh
    number = sharding.num_batch_shards(mesh) if mesh else 1
    neighbours = sharding.batch_shards_of_a_slice(mesh) if mesh and exchange else 1
    shape = shape_of(
        sampling, num_prompts // number, num_rollouts, prompt_slots, prompts_per_wave // number
    )
    return Schedule(shape, balance.Shards(number, neighbours, num_rollouts), shrink)


def shape_of(
    sampling: Sampling,
    num_prompts: int,
    num_rollouts: int,
    prompt_slots: int,
    prompts_in_memory: int,
) -> Shape:
    """What one shard samples; all numbers are those of the shard."""
    # Slots are in tiles as `models.whole_tiles` rounds them.
    is_short = sampling.max_length <= models.TILE
    return Shape(
        prompts=num_prompts,
        rollouts=num_rollouts,
        slots=models.whole_tiles(sampling.max_length),
        prompt_slots=prompt_slots,
        prompts_in_memory=max(1, prompts_in_memory),
        tile=models.whole_tiles(1) if is_short else models.TILE,
    )


# ---- The machine that the schedule drives ----


class _Decoder:
    """The `schedule.Machine` of the real devices: owns the pool, what is held, and the results.

    Attributes:
      results: of all rollouts, at their ids.
    """

    def __init__(
        self,
        params: models.Params,
        policy: Policy,
        sampling: Sampling,
        batch: Batch,
        golds: Golds,
        plan: Schedule,
        interrupts: Interrupts | None,
    ):
        self._params, self._policy, self._sampling = params, policy, sampling
        # As they are read at every decode step. Prefill takes those that are trained.
        self._weights = decoding.decoding_weights(params, policy)
        self._batch, self._golds, self._plan, self._interrupts = batch, golds, plan, interrupts
        self._pool: Pool | None = None
        self._held = moves.Held(policy.mesh, batch.keys)
        self.results = decoding.empty_results(policy, sampling, *batch.keys.shape)

    @property
    def _current(self) -> Pool:
        assert self._pool is not None, "no pool was started"
        return self._pool

    def start(self, wave: int) -> None:
        policy, plan = self._policy, self._plan
        self._pool = None  # its memory is free before the next one is made
        part = batch_placement.every_nth(self._batch, wave, plan.num_waves)
        ids = batch_placement.put_batch(policy.mesh, plan.rollout_ids(wave))
        prefix = decoding.prefill(self._params, policy, part.prompts, part.lengths)
        self._pool = decoding.initial_pool(
            policy, prefix, part, ids, self._sampling, plan.sizes[0].slots
        )

    def decode(self, until: int) -> tuple[int, np.ndarray]:
        policy, interrupts = self._policy, self._interrupts
        flags = interrupts.flags(policy.mesh) if interrupts else jnp.zeros(1, bool)
        self._pool, look = decoding.decode(
            self._weights, policy, self._current, self._sampling, until, flags
        )
        # This is the one place where the host waits for the devices.
        step, going, stop = jax.device_get(look)
        if interrupts:
            doing = (
                f"decoding: token {step} of at most {self._sampling.max_length}  "
                f"{going.sum()} of {self._batch.keys.size} rollouts go on"
            )
            interrupts.beat(bool(stop), doing if until else "")  # `rehearse` speaks for itself
        return int(step), going

    def store(self) -> None:
        self.results = decoding.score_and_store(
            self._weights, self._policy, self._current, self.results, self._golds
        )

    def move(self, plan: balance.Plan, old: Level, new: Level) -> None:
        pool, self._pool = self._current, None
        self._pool = moves.move(self._policy.mesh, pool, plan, self._plan.shards, new.slots)

    def hold(self, rollout_ids: np.ndarray, held: np.ndarray, step: int) -> None:
        self._held.add(self._current, rollout_ids, held, step)
        if self._interrupts:
            self._interrupts.beat()  # copies take seconds

    def resume(self, rollout_ids: np.ndarray, level: Level, step: int) -> None:
        like, self._pool = self._current, None
        shapes = jax.eval_shape(lambda pool: pool, like)
        del like  # its memory is free before the next pool is made
        self._pool = self._held.pool(shapes, rollout_ids, level, step)
        if self._interrupts:
            self._interrupts.beat()

    def rehearse(self) -> None:
        """Compiles the programs of every size of the pool, on lanes without rollouts.

        Which sizes a batch visits depends on the lengths of its rollouts. Without a rehearsal a
        program might be compiled in any step of a run, for minutes, on all devices.
        """
        self.start(0)
        here, transitions = self._plan.sizes[0], self._plan.transitions()
        for number, (old, new) in enumerate(transitions, 1):
            if self._interrupts:
                self._interrupts.beat(
                    doing=f"compiling: decoding, part {number} of {len(transitions)}"
                )
            if old != here:
                nothing = np.full(
                    (self._plan.shards.number * old.num_blocks, old.lanes_per_block),
                    NO_ROLLOUT,
                    np.int32,
                )
                self.resume(nothing, old, step=0)
            self.move(balance.nothing(self._plan.shards, old, new), old, new)
            self.decode(until=0)  # compiled, but no step is executed
            self.store()
            here = new
        self._pool = None
