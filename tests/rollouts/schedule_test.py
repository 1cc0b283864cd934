"""The order of decoding, on lengths alone: what is executed, that nothing is lost or done twice."""

import numpy as np
import pytest

from qlog.rollouts import schedule
from qlog.rollouts.balance import Shards
from qlog.rollouts.pool import NO_ROLLOUT, Shape
from qlog.rollouts.schedule import Planted, Schedule, planned_work

BUDGET, M = 2944, 32


def _gamma(rng, prompts, mean):
    of_prompt = np.maximum(rng.gamma(2, mean / 2, size=(prompts, 1)), 30)
    return np.minimum(1 + rng.exponential(of_prompt, size=(prompts, M)).astype(int), BUDGET)


LAWS = {
    "mean 600": lambda rng, prompts: _gamma(rng, prompts, 600),
    "mean 1200": lambda rng, prompts: _gamma(rng, prompts, 1200),
    "heavy tail": lambda rng, prompts: np.minimum(
        1 + (200 * rng.pareto(1.1, size=(prompts, M)) * rng.gamma(2, 0.5, size=(prompts, 1))),
        BUDGET,
    ).astype(int),
    "one in eight": lambda rng, prompts: np.minimum(
        1 + rng.exponential(np.where(np.arange(prompts)[:, None] % 8, 300, 3000), (prompts, M)),
        BUDGET,
    ).astype(int),
    "two kinds": lambda rng, prompts: np.where(
        np.arange(prompts)[:, None] % 3, rng.integers(1, 600, (prompts, M)), BUDGET
    ),
}


def _schedule(prompts, chips, in_memory=1):
    shape = Shape(prompts // chips, M, BUDGET, 1351, in_memory, 128)
    return Schedule(shape, Shards(chips, chips, M))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("chips", [1, 16, 64])
def test_at_most_a_quarter_more_is_executed_than_needed(law, chips):
    lengths = LAWS[law](np.random.default_rng(chips), 2 * chips)
    work = planned_work(_schedule(2 * chips, chips), lengths)
    assert work.lane_steps <= 1.25 * lengths.sum()


def test_when_all_fill_their_budget_nothing_is_executed_twice():
    for prompts, chips in ((2, 1), (32, 4), (64, 16)):
        lengths = np.full((prompts, M), BUDGET)
        work = planned_work(_schedule(prompts, chips), lengths)
        assert work.lane_steps <= 1.02 * lengths.sum()


def test_waves_meet_at_one_step():
    """Sixteen waves on one chip: their tails go on together, in a fraction of the steps."""
    lengths = LAWS["mean 600"](np.random.default_rng(0), 32)
    plan = _schedule(32, 1)
    assert plan.num_waves == 16 and plan.hold_at == plan.sizes[0].slots
    work = planned_work(plan, lengths)
    steps = sum(last - first for _, first, last in work.stretches)
    assert work.held and steps < 0.7 * 16 * BUDGET
    assert work.lane_steps <= 1.25 * lengths.sum()


class _Checked(Planted):
    """Sees that each lane has the step that its rollout is at, and that each ends once."""

    def __init__(self, plan, lengths):
        super().__init__(plan, lengths)
        self.at, self.ended, self.stored = {}, set(), set()

    def start(self, wave):
        super().start(wave)
        ids = self.rollout_ids.ravel().tolist()
        assert not set(ids) & set(self.at)
        self.at |= dict.fromkeys(ids, 0)

    def decode(self, until):
        ids = self.rollout_ids[self.rollout_ids != NO_ROLLOUT].tolist()
        assert len(set(ids)) == len(ids)
        before = self.step
        reached, going = super().decode(until)
        for rollout in ids:
            if rollout not in self.ended:
                assert self.at[rollout] == before
                self.at[rollout] = until
        now = set(self.rollout_ids[going].tolist())
        self.ended |= set(ids) - now
        return reached, going

    def store(self):
        self.stored |= self.ended


@pytest.mark.parametrize(
    "prompts, chips, in_memory", [(4, 1, 1), (24, 4, 2), (12, 2, 1), (18, 6, 1)]
)
@pytest.mark.parametrize("law", LAWS)
def test_each_rollout_is_decoded_once_from_start_to_end(prompts, chips, in_memory, law):
    lengths = LAWS[law](np.random.default_rng(prompts), prompts)
    plan = _schedule(prompts, chips, in_memory)
    machine = _Checked(plan, lengths)
    schedule.run(plan, machine)
    everything = set(range(prompts * M))
    assert machine.ended == machine.stored == everything


def test_without_shrinking_all_wait_for_the_longest():
    lengths = LAWS["mean 600"](np.random.default_rng(1), 4)
    plan = Schedule(Shape(4, M, BUDGET, 1351, 2, 128), Shards(1, 1, M), shrink=False)
    executed = planned_work(plan, lengths).lane_steps
    assert executed == sum(2 * M * lengths[i::2].max() for i in range(2))
