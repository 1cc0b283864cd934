"""The pool's schedule: what long tails cost, rollouts that stay on their shard, memory."""

import numpy as np
import pytest

from qlog.rollouts import pool, sampler


def _lane_steps(lengths, slots, prompt_slots, num_shards=1):
    """Lanes times steps that the sampler's loop executes on rollouts [B, M] of given lengths."""
    num_prompts, num_rollouts = lengths.shape
    sizes = pool.levels(num_prompts // num_shards, num_rollouts, slots, prompt_slots)
    schedule = pool.PoolSchedule(num_prompts, num_rollouts, sizes, num_shards)
    step = executed = 0
    while True:
        ids = schedule.rollout_ids
        ends = np.where(ids == pool.NO_ROLLOUT, 0, lengths.ravel()[ids % lengths.size])
        before, step = step, step + sampler.STEPS_PER_LOOK
        executed += ids.size * (min(step, ends.max()) - before)
        going = ends > step
        if not going.any():
            return executed
        for plan in schedule.shrink(going):
            _check_plan(plan, ids, going, num_shards, num_rollouts)
            ids = plan.rollout_ids
            going = ids != pool.NO_ROLLOUT


def _check_plan(plan, ids, going, num_shards, num_rollouts):
    """What goes on is there once, next to rollouts of the same prompt, on the same shard."""
    kept = plan.rollout_ids[plan.rollout_ids != pool.NO_ROLLOUT]
    np.testing.assert_array_equal(np.sort(kept), np.sort(ids[going]))
    old = ids.reshape(num_shards, -1)
    new = plan.rollout_ids.reshape(num_shards, -1, plan.rollout_ids.shape[1])
    for shard in range(num_shards):
        real = new[shard] != pool.NO_ROLLOUT
        lane = plan.lane.reshape(new.shape)[shard]
        np.testing.assert_array_equal(old[shard][lane[real]], new[shard][real])
        prompt_of_block = np.where(real, new[shard] // num_rollouts, -1).max(1)
        assert (real <= (new[shard] // num_rollouts == prompt_of_block[:, None])).all()
        parent = plan.parent.reshape(num_shards, -1)[shard]
        first = old[shard].reshape(-1, ids.shape[1])[parent]
        holds = (first // num_rollouts == prompt_of_block[:, None]).any(1)
        assert holds[prompt_of_block >= 0].all()


@pytest.mark.parametrize("mean", [200, 700, 1500])
@pytest.mark.parametrize("prompts", [4, 32])
def test_long_tails_cost_at_most_a_third_more_than_is_needed(prompts, mean):
    """Geometric lengths cut at 2944; waiting for the longest would cost 2 to 15 times as much."""
    rng = np.random.default_rng(mean)
    for _ in range(3):
        lengths = np.minimum(rng.geometric(1 / mean, (prompts, 32)), 2944)
        assert _lane_steps(lengths, 2944, 1351) <= 1.3 * lengths.sum()


def test_shards_keep_their_rollouts():
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / 700, (32, 32)), 2944)
    executed = _lane_steps(lengths, 2944, 1351, num_shards=8)
    assert executed < 2 * lengths.sum() < 0.6 * 32 * 32 * lengths.max()


def test_smaller_pools_never_need_more_memory():
    for prompts, rollouts, slots, prompt_slots in (
        (1, 32, 256, 4096),
        (4, 8, 2944, 512),
        (2, 16, 64, 1024),
    ):
        sizes = pool.levels(prompts, rollouts, slots, prompt_slots)
        memory = [s.num_blocks * (prompt_slots + s.lanes_per_block * slots) for s in sizes]
        assert max(memory) == memory[0]
    assert len(pool.levels(4, 8, 16, 24)) == 1
