"""The vocabulary head: log-probabilities without [.., T, V] arrays."""

import jax
import jax.numpy as jnp
from jax import Array


def token_log_probs(
    hidden: Array,
    table: Array,
    targets: Array,
    *,
    valid_vocab: int,
    temperature: Array | float = 1.0,
    chunk: int = 1024,
) -> Array:
    """log softmax(hidden @ table.T / temperature)[targets], a chunk of tokens at a time.

    The backward pass recomputes each chunk's logits, so no [N, V] array is ever stored; those of a
    single chunk, which it needs at once, are kept.

    Args:
      hidden: [B, ..., D] final hidden states.
      table: [V, D] output head; rows from `valid_vocab` on are padding and get probability 0.
      targets: int32 [B, ...], below `valid_vocab`.
      valid_vocab: rows of the vocabulary that exist.
      temperature: scalar, or broadcastable to `targets`.
      chunk: tokens per chunk at most, over all of B, and so over all devices that B is split over.

    Returns:
      float32 [B, ...], each at most 0.
    """
    shape = targets.shape
    # Prompts, the first axis, stay outside the loop over chunks: on a mesh they are split, and a
    # loop over a split axis would have every device compute the logits of all.
    prompts = shape[0] if len(shape) > 1 else 1
    tokens = targets.size // prompts  # of each prompt

    def by_prompt(x: Array) -> Array:
        return x.reshape(prompts, tokens, *x.shape[len(shape) :])

    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), shape)
    inputs = by_prompt(hidden), by_prompt(targets), by_prompt(temperature)

    def one_chunk(inputs: tuple[Array, Array, Array]) -> Array:
        """float32 [B, T], of a chunk of T tokens of each prompt."""
        states, wanted, scale = (x.reshape(-1, *x.shape[2:]) for x in inputs)
        # Cast inside the chunk: so the chunks' gradients of the table add up in its precision.
        logits = masked_logits(states, table.astype(states.dtype), valid_vocab) / scale[:, None]
        # A masked sum, not a gather: the gather's backward pass is a scatter, row by row on CPUs.
        is_wanted = jnp.arange(table.shape[0]) == wanted[:, None]
        picked = jnp.where(is_wanted, logits, 0.0).sum(-1) - jax.nn.logsumexp(logits, axis=-1)
        return picked.reshape(inputs[1].shape)

    largest = max(1, chunk // prompts)  # tokens of each prompt
    if tokens <= largest:
        return one_chunk(inputs).reshape(shape)
    # As few chunks as possible, and all of one size, so that the last one is nearly full, too.
    num_chunks = -(-tokens // largest)
    size = -(-tokens // num_chunks)

    def split(x: Array) -> Array:
        """[B, tokens, ...] -> [chunks, B, size, ...], padded with copies of the last token."""
        padding = [(0, 0), (0, -tokens % size)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding, mode="edge")
        return jnp.moveaxis(x.reshape(prompts, -1, size, *x.shape[2:]), 1, 0)

    chunks = jax.lax.map(jax.checkpoint(one_chunk), jax.tree.map(split, inputs))
    return jnp.moveaxis(chunks, 0, 1).reshape(prompts, -1)[:, :tokens].reshape(shape)


def masked_logits(hidden: Array, table: Array, valid_vocab: int) -> Array:
    """float32 logits [..., V] of hidden [..., D]; padding rows of the vocabulary get -inf."""
    logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
    if valid_vocab == table.shape[0]:
        return logits
    return jnp.where(jnp.arange(table.shape[0]) < valid_vocab, logits, -jnp.inf)
