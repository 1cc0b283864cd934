"""Short rollouts share a row, so that none pays for the longest of the batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Packing(NamedTuple):
    """Rollouts laid into rows of R slots; row w of a prompt holds whole rollouts, one after another.

    row, offset: int32 [B, M], where each rollout begins; row -1 is left out. rows: int32 [B], rows
    that hold something, the first ones. rollout, token: int32 [B, W, R], which rollout's which
    token is in a slot; M where there is none, and then slots count as tokens of one more rollout.
    """

    row: Array
    offset: Array
    rows: Array
    rollout: Array
    token: Array


def pack(lengths: Array, is_needed: Array, slots: int) -> Packing:
    """First-fit decreasing: longest rollouts first, each into the first row that has room.

    Args:
      lengths: int32 [B, M], at most `slots`.
      is_needed: bool [B, M]; the others are left out.
      slots: R. There are as many rows as rollouts, W = M.
    """
    batch, count = lengths.shape
    order = jnp.argsort(jnp.where(is_needed, -lengths, 1), axis=1)

    def place(filled, m):
        length = jnp.take_along_axis(lengths, m[:, None], 1)
        row = jnp.argmax(filled + length <= slots, axis=1)
        is_placed = jnp.take_along_axis(is_needed, m[:, None], 1)[:, 0]
        offset = jnp.take_along_axis(filled, row[:, None], 1)[:, 0]
        more = jnp.where(is_placed, length[:, 0], 0)
        return filled.at[jnp.arange(batch), row].add(more), (jnp.where(is_placed, row, -1), offset)

    filled, placed = jax.lax.scan(place, jnp.zeros((batch, count), jnp.int32), order.T)
    back = jnp.argsort(order, axis=1)
    row, offset = (jnp.take_along_axis(x.T, back, axis=1) for x in placed)

    # A rollout's number where it begins; everything after it is its own until the next begins.
    prompt, m = jnp.indices((batch, count))
    at = jnp.where(row < 0, count, row), offset
    grid = jnp.zeros((batch, count, slots), jnp.int32)
    begins = grid.at[(prompt, *at)].set(m + 1, mode="drop")
    slot = jnp.arange(slots)
    is_filled = slot < filled[..., None]
    start = jax.lax.cummax(jnp.where((begins > 0) | (slot == filled[..., None]), slot, 0), axis=2)
    rollout = jnp.take_along_axis(begins, start, axis=2) - 1
    return Packing(
        row, offset, (filled > 0).sum(1), jnp.where(is_filled, rollout, count), slot - start
    )
