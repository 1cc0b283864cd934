"""Short rollouts share a pack of slots, so that none pays for the longest one of the batch.

A pack is R slots of one prompt. With M = 4, R = 8 and rollouts of 8, 5, 3 and 2 tokens,
3 of the W = M packs hold something:

    pack 0    0 0 0 0 0 0 0 0          pack 2    3 3 . . . . . .
    pack 1    1 1 1 1 1 2 2 2          pack 3    . . . . . . . .

The model reads packs. Attention ends at the token with which a rollout begins, so that a rollout
never sees the one in front of it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Packing(NamedTuple):
    """Where the M rollouts of each of B prompts lie in W packs of R slots.

    The first three fields are looked up by rollout, the last two by slot. Slots behind the last
    rollout of a pack count as the tokens of one more rollout, number M.
    """

    pack: Array  # int32 [B, M], the pack that holds the rollout; not in [0, W): it is in none
    offset: Array  # int32 [B, M], the slot with its first token
    num_packs: Array  # int32 [B], packs that hold something: the first ones
    rollout: Array  # int32 [B, W, R], number of the rollout in the slot
    token: Array  # int32 [B, W, R], which of the rollout's tokens is in the slot

    @property
    def is_packed(self) -> Array:
        """bool [B, M]: rollouts that are in one of the packs."""
        return (self.pack >= 0) & (self.pack < self.token.shape[1])

    def window(self, first: Array | int, num_packs: int) -> "Packing":
        """The `num_packs` packs from number `first` on, as if there were no others."""
        cut = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=num_packs, axis=1
        )
        return Packing(
            pack=self.pack - first,  # of rollouts in other packs: negative, or too large
            offset=self.offset,
            num_packs=jnp.clip(self.num_packs - first, 0, num_packs),
            rollout=cut(self.rollout),
            token=cut(self.token),
        )

    def block(self, first: Array, num_packs: Array) -> "Packing":
        """Some packs of each prompt, as if there were no others, in the same W packs of slots.

        Args:
          first: int32 [B], the pack that becomes number 0.
          num_packs: int32 [B], how many packs there are from there on.
        """
        pack = self.pack - first[:, None]
        is_here = (pack >= 0) & (pack < num_packs[:, None])
        num_all = self.token.shape[1]
        # [B, W, 1]. Behind the block are other packs of the prompt: no rollout is looked up there.
        source = (first[:, None, None] + jnp.arange(num_all)[:, None]) % num_all
        return Packing(
            pack=jnp.where(is_here, pack, -1),
            offset=self.offset,
            num_packs=num_packs,
            rollout=jnp.take_along_axis(self.rollout, source, axis=1),
            token=jnp.take_along_axis(self.token, source, axis=1),
        )

    def to_packs(self, x: Array) -> Array:
        """[B, M, R] by rollout and token -> [B, W, R] by pack and slot, anything if empty."""
        num_prompts, num_rollouts, length = x.shape
        # One gather from [B, M * R]. Number M, of an empty slot, is read as some other rollout.
        rollout = jnp.minimum(self.rollout, num_rollouts - 1)
        source = (rollout * length + self.token).reshape(num_prompts, -1)
        flat = x.reshape(num_prompts, -1)
        return jnp.take_along_axis(flat, source, axis=1).reshape(rollout.shape)

    def to_rollouts(self, x: Array) -> Array:
        """[B, W, R] by pack and slot -> [B, M, R] by rollout and token; 0 of those in no pack.

        Behind the last token of a rollout lies what follows it in the pack.
        """
        num_prompts, num_packs, length = x.shape
        num_rollouts = self.pack.shape[1]
        # One gather from [B, W * R]: a rollout's are the R slots from its first token on. They
        # may reach into the next pack, or past the last one, where the index is held back.
        first = jnp.clip(self.pack * length + self.offset, 0)
        source = first[..., None] + jnp.arange(length)
        source = jnp.minimum(source, num_packs * length - 1).reshape(num_prompts, -1)
        found = jnp.take_along_axis(x.reshape(num_prompts, -1), source, axis=1)
        found = found.reshape(num_prompts, num_rollouts, length)
        return jnp.where(self.is_packed[..., None], found, 0.0)


def pack_rollouts(lengths: Array, is_needed: Array, length: int) -> Packing:
    """First-fit decreasing: longest rollouts first, each into the first pack that has room.

    Args:
      lengths: int32 [B, M], in tokens; at most `length`.
      is_needed: bool [B, M]; the other rollouts are left out.
      length: R, slots of a pack.

    Returns:
      A Packing with W = M: there are as many packs as rollouts, and in the worst case all are used.
    """
    num_prompts, num_rollouts = lengths.shape

    # ---- Which pack: all prompts at once, a rollout of each per iteration.
    # Left-out rollouts are sorted to the end: 1 is above the negated length of any other.
    order = jnp.argsort(jnp.where(is_needed, -lengths, 1), axis=1)

    def place(filled: Array, m: Array) -> tuple[Array, tuple[Array, Array]]:
        """`filled` [B, W]: slots taken in each pack; `m` [B]: each prompt's rollout to place."""
        size = jnp.take_along_axis(lengths, m[:, None], 1)
        pack = jnp.argmax(filled + size <= length, axis=1)  # the first True
        is_placed = jnp.take_along_axis(is_needed, m[:, None], 1)[:, 0]
        offset = jnp.take_along_axis(filled, pack[:, None], 1)[:, 0]
        more = jnp.where(is_placed, size[:, 0], 0)
        filled = filled.at[jnp.arange(num_prompts), pack].add(more)
        return filled, (jnp.where(is_placed, pack, -1), offset)

    empty = jnp.zeros((num_prompts, num_rollouts), jnp.int32)
    filled, placed = jax.lax.scan(place, empty, order.T)
    # `placed` is in the order of placing, [M, B]; back to the order of the rollouts, [B, M].
    back = jnp.argsort(order, axis=1)
    pack, offset = (jnp.take_along_axis(x.T, back, axis=1) for x in placed)

    # ---- What is in each slot: [B, W, R].
    # The number of a rollout, from 1 on, where it begins; 0 elsewhere. Rollouts left out aim at
    # pack M, which does not exist, and mode="drop" drops them.
    prompt, m = jnp.indices((num_prompts, num_rollouts))
    grid = jnp.zeros((num_prompts, num_rollouts, length), jnp.int32)
    at = (prompt, jnp.where(pack < 0, num_rollouts, pack), offset)
    begins = grid.at[at].set(m + 1, mode="drop")
    # A slot belongs to the last rollout that begins at it or in front of it: a running maximum of
    # the beginnings. The empty slots behind the last rollout count as one more rollout.
    slot = jnp.arange(length)
    is_begin = (begins > 0) | (slot == filled[..., None])
    start = jax.lax.cummax(jnp.where(is_begin, slot, 0), axis=2)
    rollout = jnp.take_along_axis(begins, start, axis=2) - 1
    is_filled = slot < filled[..., None]
    return Packing(
        pack=pack,
        offset=offset,
        num_packs=(filled > 0).sum(1),
        rollout=jnp.where(is_filled, rollout, num_rollouts),
        token=slot - start,
    )
