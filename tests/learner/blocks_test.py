"""Plans of blocks: what each must hold, for any numbers of packs, and what it costs."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tiny

from qlog.learner import planning
from qlog.learner.blocks import Blocks, PlanSettings, plan_blocks
from qlog.learner.types import Microbatch


def _lockstep(num_packs, settings):
    """Packs and passes on each place when every shard computes its own prompts, whole."""
    largest = [
        num_packs[t :: len(num_packs) // settings.places].max()
        for t in range(len(num_packs) // settings.places)
    ]
    return sum(settings.executed(n) + settings.prompt_cost for n in largest if n)


@st.composite
def _cases(draw):
    shards, per_shard, microbatches = (draw(st.integers(1, n)) for n in (5, 3, 4))
    window = draw(st.sampled_from([1, 2, 4, 8]))
    most = draw(st.sampled_from([0, 1, 3, 32]))
    size = shards * per_shard * microbatches
    packs = draw(st.lists(st.integers(0, most), min_size=size, max_size=size))
    cost = draw(st.sampled_from([0.0, 0.3, 2.0]))
    return np.array(packs), PlanSettings(shards, shards * per_shard, window, cost)


@hypothesis.given(_cases())
@hypothesis.settings(max_examples=200, deadline=None)
def test_each_pack_is_in_one_block_and_no_plan_costs_more_than_whole_prompts(case):
    num_packs, settings = case
    blocks = plan_blocks(num_packs, settings)
    num_microbatches, places = blocks.prompt.shape
    assert num_microbatches >= 1 and places == settings.places
    assert all(x.dtype == np.int32 and x.shape == blocks.prompt.shape for x in blocks)
    seen = [[] for _ in num_packs]
    for b, first, size in zip(*map(np.ravel, blocks), strict=True):
        assert size >= 0 and first % settings.packs_at_once == 0
        seen[b] += range(first, first + size)
    assert [sorted(packs) for packs in seen] == [list(range(n)) for n in num_packs]
    # No microbatch is empty, unless nothing is needed at all.
    assert not num_packs.any() or blocks.num_packs.any(axis=1).all()
    cost = settings.cost(blocks.num_packs.max(axis=1))
    if num_packs.any():
        assert cost <= _lockstep(num_packs, settings) + 1e-9
    work = settings.work(blocks)
    assert work.needed_rows == num_packs.sum() <= work.executed_rows
    assert work.prompt_passes == blocks.prompt.size


@pytest.mark.parametrize("per_shard", [1, 2])
def test_equal_prompts_stay_whole_and_at_home(per_shard):
    settings = PlanSettings(4, 4 * per_shard, 1, 0.5)
    blocks = plan_blocks(np.full(16, 32), settings)
    # Microbatch t of n has the prompts t, t + n, t + 2 n, ...: some of every shard, in their order.
    n = 16 // (4 * per_shard)
    np.testing.assert_array_equal(blocks.prompt, np.arange(16).reshape(-1, n).T)
    assert (blocks.first_pack == 0).all() and (blocks.num_packs == 32).all()


def test_on_one_device_no_prompt_is_cut_or_moved():
    num_packs = np.array([7, 1, 0, 32])
    blocks = plan_blocks(num_packs, PlanSettings(1, 1, 1, 0.3))
    np.testing.assert_array_equal(blocks.prompt[:, 0], [0, 1, 3])
    np.testing.assert_array_equal(blocks.num_packs[:, 0], [7, 1, 32])


def test_the_drawing_of_the_page():
    """Eight packs of one prompt among eight prompts on four devices: learner/README.md."""
    blocks = plan_blocks(np.array([8, 2, 2, 2, 2, 2, 2, 1]), PlanSettings(4, 4, 1, 0.26))
    np.testing.assert_array_equal(blocks.prompt, [[0, 2, 0, 0], [1, 3, 4, 6], [0, 0, 5, 7]])
    np.testing.assert_array_equal(blocks.num_packs, [[2] * 4, [2] * 4, [1, 1, 2, 1]])


def test_a_block_stays_on_its_prompts_shard_while_there_is_room():
    blocks = plan_blocks(np.array([9, 3, 3, 3]), PlanSettings(2, 2, 1, 0.1))
    # Two blocks of prompt 0 in the first microbatch: its shard, number 0, has one place of each.
    np.testing.assert_array_equal(blocks.prompt, [[0, 0], [0, 2], [1, 3]])


def test_microbatches_that_fill_up_a_program_are_empty():
    blocks = Blocks(*np.ones((3, 5, 4), np.int32))
    padded = blocks.padded_to_multiple(3)
    assert padded.prompt.shape == (6, 4) and (padded.num_packs[5] == 0).all()
    np.testing.assert_array_equal(padded.of(0, 5), blocks)
    np.testing.assert_array_equal(blocks.padded_to_multiple(5), blocks)


def _lengths(law, prompts, seed):
    """int [prompts, 32], cut at 2,944."""
    rng = np.random.default_rng(seed)
    mean = {
        "gamma": lambda: np.maximum(rng.gamma(2, 300, (prompts, 1)), 30),
        "long gamma": lambda: np.maximum(rng.gamma(2, 600, (prompts, 1)), 30),
        "heavy tail": lambda: 200 * (1 + rng.pareto(1.1, (prompts, 1))),
        "one in eight": lambda: np.where(np.arange(prompts) % 8, 200, 2000)[:, None],
    }[law]()
    return np.minimum(1 + rng.exponential(mean, (prompts, 32)).astype(int), 2944)


@pytest.mark.parametrize("law", ["gamma", "long gamma", "heavy tail", "one in eight"])
def test_a_pod_computes_few_packs_in_vain(law):
    for num_shards in (1, 16, 64):
        work = planning.planned_work(
            _lengths(law, 2 * num_shards, seed=num_shards),
            tiny.SHAPE,
            1351,
            2944,
            num_shards,
            Microbatch(num_shards, 8),
        )
        assert work.executed_rows <= 1.25 * work.needed_rows, (num_shards, work)
        assert work.prompt_passes <= 5 * 2 * num_shards


def test_full_budgets_cost_what_whole_prompts_cost():
    work = planning.planned_work(
        np.full((32, 32), 2944), tiny.SHAPE, 1351, 2944, 16, Microbatch(16, 8)
    )
    assert work == (32 * 32, 32 * 32, 32)


def test_windows_are_as_narrow_as_keeps_a_device_busy():
    assert Microbatch(16, 8).narrowed(2944, 16) == (16, 1)
    assert Microbatch(16, 8).narrowed(600, 16) == (16, 4)
    assert Microbatch(32, 8).narrowed(600, 16) == (32, 2)
    assert Microbatch(16, 6).narrowed(1000, 16) == (16, 3)
    assert Microbatch(1, 16).narrowed(64, 1) == (1, 16)  # all of them are few tokens
