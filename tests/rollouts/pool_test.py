"""Sizes of pools: memory, lanes, slots."""

import pytest

from qlog.rollouts import pool
from qlog.rollouts.pool import Level, Shape

SHAPES = [
    Shape(prompts=2, rollouts=32, slots=2944, prompt_slots=1351, prompts_in_memory=1, tile=128),
    Shape(prompts=32, rollouts=16, slots=1280, prompt_slots=1351, prompts_in_memory=2, tile=128),
    Shape(prompts=1, rollouts=32, slots=256, prompt_slots=4096, prompts_in_memory=1, tile=128),
    Shape(prompts=4, rollouts=8, slots=2944, prompt_slots=512, prompts_in_memory=4, tile=128),
    Shape(prompts=6, rollouts=2, slots=640, prompt_slots=300, prompts_in_memory=3, tile=128),
    Shape(prompts=5, rollouts=1, slots=96, prompt_slots=300, prompts_in_memory=2, tile=16),
    Shape(prompts=3, rollouts=7, slots=112, prompt_slots=9, prompts_in_memory=1, tile=16),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_no_pool_takes_more_memory_than_is_given(shape):
    sizes = pool.sizes(shape)
    for level in (*sizes.shrinking, *sizes.full):
        assert shape.size(level) <= shape.memory
        assert level.slots % shape.tile == 0 and level.lanes_per_block <= shape.rollouts


@pytest.mark.parametrize("shape", SHAPES)
def test_pools_shrink_to_the_last_lanes_and_never_lose_slots(shape):
    shrinking, full = pool.sizes(shape)
    start = shrinking[0]
    assert start == Level(pool.prompts_per_wave(shape), shape.rollouts, start.slots)
    assert shape.prompts % start.num_blocks == 0
    for old, new in zip(shrinking, shrinking[1:], strict=False):
        assert new.num_lanes < old.num_lanes and new.slots >= old.slots
    assert shrinking[-1].num_lanes <= max(1, start.num_lanes // 64)
    assert shrinking[-1].slots == shape.slots
    assert {level.slots for level in full} == {shape.slots}
    most = max(size.num_lanes for size in shrinking if size.slots == shape.slots)
    assert max(level.num_lanes for level in full) >= most


def test_short_rollouts_have_one_size():
    shape = Shape(8, 8, slots=16, prompt_slots=24, prompts_in_memory=4, tile=16)
    only = Level(4, 8, 16)
    assert pool.sizes(shape) == ((only,), (only,))


def test_twice_as_many_prompts_start_as_fit_to_the_last_slot():
    assert pool.prompts_per_wave(SHAPES[0]) == 2
    assert pool.prompts_per_wave(SHAPES[1]) == 4
    assert pool.prompts_per_wave(SHAPES[3]) == 4  # there are no more
