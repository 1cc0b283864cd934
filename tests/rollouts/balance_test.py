"""Rollouts that change their shard: each is there once, prompts come along, shards are even."""

import numpy as np
import pytest

from qlog.rollouts import balance
from qlog.rollouts.balance import Shards
from qlog.rollouts.pool import NO_ROLLOUT, Level


def _run(plan, rollout_ids, old, new, shards):
    """What the devices do with a plan: the ids that end in each lane, the prompt in each block."""
    lanes = rollout_ids.reshape(shards.number, -1).copy()
    blocks = np.full((shards.number, old.num_blocks + new.num_blocks), -1)
    first = rollout_ids.reshape(shards.number, old.num_blocks, -1)[:, :, 0]
    blocks[:, : old.num_blocks] = np.where(first == NO_ROLLOUT, -1, first // shards.num_rollouts)
    exchange = plan.exchange
    for number, bit in enumerate(shards.bits):
        for index in range(number * balance.MAX_ROUNDS, (number + 1) * balance.MAX_ROUNDS):
            if index - number * balance.MAX_ROUNDS >= exchange.num_rounds[number]:
                break
            for work, out, into in (
                (lanes, exchange.lanes_out, exchange.lanes_in),
                (blocks, exchange.blocks_out, exchange.blocks_in),
            ):
                sent = [work[shard, out[shard, index]] for shard in range(shards.number)]
                for sender, receiver in shards.pairs(bit):
                    for value, place in zip(sent[sender], into[receiver, index], strict=True):
                        if place < work.shape[1]:
                            work[receiver, place] = value
    shape = (shards.number, new.num_blocks, new.lanes_per_block)
    lane, parent = plan.lane.reshape(shape), plan.parent.reshape(shape[:2])
    taken = np.stack([lanes[s][lane[s]] for s in range(shards.number)])
    prompts = np.stack([blocks[s][parent[s]] for s in range(shards.number)])
    return taken, prompts, plan.rollout_ids.reshape(shape)


@pytest.mark.parametrize("number, neighbours", [(1, 1), (4, 4), (8, 8), (6, 6), (8, 4), (16, 16)])
def test_what_goes_on_arrives_next_to_its_prompt(number, neighbours):
    rng = np.random.default_rng(number)
    shards, old, new = Shards(number, neighbours, 8), Level(2, 8, 64), Level(4, 2, 64)
    ids = np.arange(number * 16, dtype=np.int32).reshape(-1, 8)
    planned = 0
    for _ in range(30):
        going = rng.random(ids.shape) < rng.beta(0.5, 1, size=(len(ids), 1))
        plan = balance.regroup(ids, going, old, new, shards)
        if plan is None:
            continue
        planned += 1
        taken, prompts, new_ids = _run(plan, ids, old, new, shards)
        real = new_ids != NO_ROLLOUT
        np.testing.assert_array_equal(np.sort(new_ids[real]), np.sort(ids[going]))
        np.testing.assert_array_equal(taken[real], new_ids[real])
        of_block = np.broadcast_to(prompts[..., None], new_ids.shape)
        np.testing.assert_array_equal(of_block[real], new_ids[real] // 8)
        # Nothing leaves its slice.
        slices = lambda x: np.sort(x.reshape(number // neighbours, -1), axis=1)
        left = slices(np.where(real, new_ids, NO_ROLLOUT))
        there = slices(np.where(going, ids, NO_ROLLOUT))
        for a, b in zip(left, there, strict=True):
            np.testing.assert_array_equal(a[a != NO_ROLLOUT], b[b != NO_ROLLOUT])
    assert planned >= 3


@pytest.mark.parametrize("number", [2, 8, 64])
def test_one_long_prompt_spreads_over_all_shards(number):
    """With one lane in a block no lane is left out: the pool fits exactly."""
    shards, old = Shards(number, number, 32), Level(1, 32, 64)
    ids = np.arange(number * 32, dtype=np.int32).reshape(-1, 32)
    going = np.zeros(ids.shape, bool)
    going[-1] = True
    new = Level(max(1, 32 // number), 1, 64)
    plan = balance.regroup(ids, going, old, new, shards)
    assert plan is not None
    per_shard = (plan.rollout_ids.reshape(number, -1) != NO_ROLLOUT).sum(1)
    assert per_shard.sum() == 32 and per_shard.max() - per_shard.min() <= 1


def test_what_fits_where_it_is_stays_there():
    shards, old, new = Shards(4, 4, 4), Level(2, 4, 64), Level(2, 2, 64)
    ids = np.arange(32, dtype=np.int32).reshape(-1, 4)
    going = np.zeros(ids.shape, bool)
    going[0, :2] = going[7, 1:3] = True
    plan = balance.regroup(ids, going, old, new, shards)
    assert plan is not None and plan.exchange.sent == (0, 0)


def test_too_many_do_not_fit():
    shards, old, new = Shards(2, 2, 4), Level(2, 4, 64), Level(2, 3, 64)
    ids = np.arange(16, dtype=np.int32).reshape(-1, 4)
    assert balance.regroup(ids, np.ones(ids.shape, bool), old, new, shards) is None
