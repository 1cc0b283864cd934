"""How much work chips do in vain, since rollouts end at different lengths: host arithmetic.

The real planning code runs (`rollouts.schedule`, `learner.blocks`), on lengths instead of devices.
"""

import numpy as np

from qlog.rollouts import schedule
from qlog.rollouts.balance import Plan
from qlog.rollouts.pool import NO_ROLLOUT, Level
from qlog.rollouts.schedule import Schedule, Work


class Planted:
    """The `schedule.Machine` of rollouts whose lengths are known; computes nothing.

    Attributes:
      rollout_ids: int32 [N, m] of the pool.
      step: that the pool is at.
    """

    def __init__(self, plan: Schedule, lengths: np.ndarray):
        """`lengths`: int [B, M], at least 1."""
        self._plan, self._lengths = plan, lengths.ravel()
        self.rollout_ids, self.step = np.empty((0, 0), np.int32), 0

    def start(self, wave: int) -> None:
        self.resume(self._plan.rollout_ids(wave), self._plan.sizes[0], 0)

    def decode(self, until: int) -> tuple[int, np.ndarray]:
        ids = np.minimum(self.rollout_ids, self._lengths.size - 1)
        ends = np.where(self.rollout_ids == NO_ROLLOUT, 0, self._lengths[ids])
        reached = max(self.step, min(until, int(ends.max())))
        self.step = until
        return reached, ends > until

    def store(self) -> None:
        pass

    def move(self, plan: Plan, old: Level, new: Level) -> None:
        self.rollout_ids = plan.rollout_ids

    def hold(self, rollout_ids: np.ndarray, held: np.ndarray, step: int) -> None:
        pass

    def resume(self, rollout_ids: np.ndarray, level: Level, step: int) -> None:
        self.rollout_ids, self.step = rollout_ids, step


def decode_work(plan: Schedule, lengths: np.ndarray) -> Work:
    """What decoding rollouts of these lengths, int [B, M], would execute."""
    return schedule.run(plan, Planted(plan, lengths))
