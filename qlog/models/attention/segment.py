"""What all kernels of attention agree on: how visible keys and values are described."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax import Array

from qlog.models.attention.quantised import Cached, Quantised

ATTENTION = "attention"  # `checkpoint_name` of the kernels' results, for rematerialisation


class Segment(NamedTuple):
    """Keys and values that the queries may see, and which of them each query row sees.

    Every mask is an interval of slots, [start, stop). Causality, padding, sliding windows, several
    rollouts packed into one row and the rollouts of a group next to each other all have this form.

    N query rows are rollouts, tokens and the query heads of a key/value head, flattened in this
    order.
    """

    keys: Cached  # [B, K, T, C]: prompts, key/value heads, slots, head size
    values: Cached  # [B, K, T, C]
    start: Array | np.ndarray  # int32 [B or 1, N], the first slot that a query row sees
    stop: Array | np.ndarray  # int32 [B or 1, N], the slot after the last one that it sees
    # Query rows and slots each consist of this many runs of equal length, one per rollout, and a
    # row sees only slots of its own run. 1: any row may see any slot.
    runs: int = 1

    @property
    def is_quantised(self) -> bool:
        """Whether keys and values are int8 numbers, which only blocks read, without a gradient."""
        return isinstance(self.keys, Quantised)

    @property
    def arrays(self) -> tuple[Array, Array]:
        """Keys and values, of a segment that is not quantised."""
        keys, values = self.keys, self.values
        assert not isinstance(keys, Quantised) and not isinstance(values, Quantised)
        return keys, values


Attend = Callable[[Array, list[Segment]], Array]
AttendStep = Callable[[Array, Segment, Segment], Array]
