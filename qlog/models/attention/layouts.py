"""Layouts: queries as rows, keys by head; and which slots each row sees.

Activations keep tokens before heads, [B, M, R, heads, C], since projections act on whole tokens.
Attention multiplies per key/value head, so caches keep heads first, [B, K, ..., slots, C]. All
queries of a prompt that share a key/value head, of any rollout, token and group, are then rows of
one matrix, and the product with the prompt's keys is one matrix product.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qlog.models.attention.quantised import Cached
from qlog.models.attention.segment import Segment

KeysAndValues = tuple[Cached, Cached]

_NO_WINDOW = 1 << 30  # longer than any context


def by_head(x: Array) -> Array:
    """[B, M, R, K, C] -> [B, K, M, R, C]: heads before slots, as caches are laid out."""
    return x.transpose(0, 3, 1, 2, 4)


def flat(x: Cached) -> Cached:
    """[B, K, M, S, C] -> [B, K, M * S, C]: the slots of all rollouts side by side."""
    return jax.tree.map(lambda leaf: leaf.reshape(*leaf.shape[:2], -1, leaf.shape[-1]), x)


def rows(queries: Array) -> Array:
    """[B, M, R, K, G, C] -> [B, K, M * R * G, C]."""
    batch, _, _, heads, _, size = queries.shape
    return queries.transpose(0, 3, 1, 2, 4, 5).reshape(batch, heads, -1, size)


def rows_back(rows: Array, like: Array) -> Array:
    batch, rollouts, length, heads, groups, size = like.shape
    return rows.reshape(batch, heads, rollouts, length, groups, size).transpose(0, 2, 3, 1, 4, 5)


class Visible:
    """Which slots the new tokens of one layer see: the segments that its attention takes.

    Slot p of a prefix holds position p, and slots of a suffix or of new tokens that see each other
    are as far apart as their positions. So a sliding window is a bound on slots everywhere.

    Args:
      positions: int32 [B, M, R] of the new tokens.
      window: how many latest tokens each sees, 0 for all: an int, or a traced int32 inside a scan
        over unequal layers.
      groups: G, query heads per key/value head.
    """

    def __init__(self, positions: Array, window: int | Array, groups: int):
        self._shape, self._groups = positions.shape, groups
        if isinstance(window, int):
            self._back = window - 1 if window else _NO_WINDOW
        else:
            self._back = jnp.where(window > 0, window - 1, _NO_WINDOW)
        self.start = jnp.maximum(positions - self._back, 0)  # first position inside the window

    def prefix(self, cache: KeysAndValues, lengths: Array) -> Segment:
        """cache: [B, K, P, C] each; lengths: int32 [B], the slots that hold tokens."""
        start, stop = self._per_row(self.start), self._per_row(lengths[:, None, None])
        return Segment(*cache, start, stop)

    def suffix(self, own: KeysAndValues, base: Array, lengths: Array) -> Segment:
        """own: [B, K, M, S, C] each; base: int32 [B], the position of slot 0; lengths: int32
        [B, M], the slots that may be seen."""
        rollouts, slots = own[0].shape[2:4]
        # All rollouts' slots form one axis, M * S, where rollout m's begin at m * S.
        offset = slots * jnp.arange(rollouts)[:, None]
        start = jnp.maximum(self.start - base[:, None, None], 0)
        start, stop = self._per_row(offset + start), self._per_row(offset + lengths[..., None])
        return Segment(flat(own[0]), flat(own[1]), start, stop, runs=rollouts)

    def new_tokens(self, new: KeysAndValues, first: Array | None = None) -> Segment:
        """new: [B, K, M, R, C] each; first: int32 [B, M, R], the first token of its row that each
        may see, None for 0."""
        # NumPy arrays where nothing is traced: kernels then know at compile time that attention is
        # causal, and choose a faster one.
        xp = np if first is None and isinstance(self._back, int) else jnp
        _, rollouts, length = self._shape
        tokens = xp.arange(length, dtype=xp.int32)
        offset = length * xp.arange(rollouts, dtype=xp.int32)[:, None]
        start = xp.maximum(tokens - self._back, 0 if first is None else first)
        start, stop = self._per_row(offset + start, xp), self._per_row(offset + tokens + 1, xp)
        return Segment(flat(new[0]), flat(new[1]), start, stop, runs=rollouts)

    def _per_row(self, x, xp=jnp):
        """[M, R] or [B, M, R], or less by broadcasting -> one number per query row, [1 or B, N]."""
        # Without an axis of prompts the interval is the same for all, and stays [1, N].
        x = x if x.ndim == 3 else x[None]
        x = xp.broadcast_to(x, (x.shape[0], *self._shape[1:]))
        return xp.repeat(x.reshape(x.shape[0], -1), self._groups, axis=1)
