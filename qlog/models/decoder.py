"""A Qwen3-architecture decoder behind one pure function.

Flax Linen holds the layer's parameters and arithmetic; everything else is plain JAX: the stack is
a `lax.scan` over stacked layer parameters, the KV caches are explicit pytrees.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from qlog.models.attention import Segment, attend
from qlog.models.config import DecoderConfig

Params = Any


class Prefix(NamedTuple):
    """The prompt's keys and values, one copy per prompt, all layers stacked.

    keys, values: [L, B, K, P, C]; lengths: int32 [B], the slots that hold tokens.
    """

    keys: Array
    values: Array
    lengths: Array


class Suffix(NamedTuple):
    """The rollouts' own keys and values: per layer a pair of [B, K, M, S, C].

    Layers are separate buffers, so that the decode loop updates each in place.
    lengths: int32, scalar or [B, M]: the slots that may be seen.
    """

    layers: tuple[tuple[Array, Array], ...]
    lengths: Array


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


class Block(nn.Module):
    """One pre-norm decoder layer: attention, then a SwiGLU."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, rotation, segments_of):
        """x: [B, M, R, D] -> ([B, M, R, D], (keys, values) of the new tokens [B, K, M, R, C])."""
        cfg = self.config
        dense = functools.partial(nn.Dense, use_bias=False, dtype=x.dtype)
        normed = RMSNorm(cfg.norm_eps, name="attention_norm")(x)
        queries = self._heads(dense, "q_proj", normed, cfg.num_heads)
        keys = self._heads(dense, "k_proj", normed, cfg.num_kv_heads)
        values = self._heads(dense, "v_proj", normed, cfg.num_kv_heads)
        if cfg.qk_norm:
            queries = RMSNorm(cfg.norm_eps, name="q_norm")(queries)
            keys = RMSNorm(cfg.norm_eps, name="k_norm")(keys)
        queries = _rotate(queries, rotation) * cfg.head_dim**-0.5
        keys = _rotate(keys, rotation)
        batch, rollouts, length = x.shape[:3]
        queries = queries.reshape(batch, rollouts, length, cfg.num_kv_heads, -1, cfg.head_dim)
        queries = queries.transpose(0, 3, 1, 4, 2, 5)  # [B, K, M, G, R, C]
        keys, values = (t.transpose(0, 3, 1, 2, 4) for t in (keys, values))  # [B, K, M, R, C]
        segments, stored = segments_of(keys, values)
        mixed = attend(queries, segments)
        mixed = mixed.transpose(0, 2, 4, 1, 3, 5).reshape(batch, rollouts, length, -1)
        x = x + dense(cfg.width, name="o_proj")(mixed)
        normed = RMSNorm(cfg.norm_eps, name="mlp_norm")(x)
        gate = dense(cfg.mlp_width, name="gate_proj")(normed)
        up = dense(cfg.mlp_width, name="up_proj")(normed)
        return x + dense(cfg.width, name="down_proj")(nn.silu(gate) * up), stored

    def _heads(self, dense, name, x, num_heads):
        """Project to [B, M, R, heads, C]."""
        flat = dense(num_heads * self.config.head_dim, name=name)(x)
        return flat.reshape(*x.shape[:-1], num_heads, self.config.head_dim)


def init(config: DecoderConfig, key: Array, dtype=jnp.float32) -> Params:
    """Random parameters: {"embed" [V, D], "layers" (leaves stacked [L, ...]), "final_norm" [D]},
    and "unembed" [V, D] when the embeddings are not tied."""
    embed_key, unembed_key, layers_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, 1, config.width), dtype)
    rotation = _rotation(config, jnp.zeros((1, 1, 1), jnp.int32))

    def init_layer(layer_key):
        segments_of = functools.partial(_own_segment, visible=jnp.ones((), bool))
        return Block(config).init(layer_key, x, rotation, segments_of)["params"]

    layers = jax.vmap(init_layer)(jax.random.split(layers_key, config.num_layers))
    table = (config.vocab_size, config.width)
    params = {
        "embed": 0.02 * jax.random.normal(embed_key, table),
        "layers": layers,
        "final_norm": jnp.ones((config.width,)),
    }
    if not config.tied_embeddings:
        params["unembed"] = 0.02 * jax.random.normal(unembed_key, table)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def unembedding(params: Params) -> Array:
    """The output head's table [V, D]: the embedding itself when tied."""
    return params.get("unembed", params["embed"])


def apply(
    params: Params,
    config: DecoderConfig,
    tokens: Array,
    positions: Array,
    *,
    prefix: Prefix | None = None,
    suffix: Suffix | None = None,
    slot: Array | None = None,
    dtype=jnp.float32,
    remat: bool = False,
) -> tuple[Array, Any]:
    """The one forward pass: new tokens of M rollouts over shared prefix, own suffix, themselves.

    | use     | tokens    | prefix   | suffix            | slot     | returned state         |
    |---------|-----------|----------|-------------------|----------|------------------------|
    | prefill | [B, 1, P] | none     | none              | none     | stacked (keys, values) |
    | train   | [B, M, R] | prompt's | none              | none     | stacked (keys, values) |
    | decode  | [B, M, 1] | prompt's | rollouts', edited | the step | the edited suffix      |
    | score   | [B, M, R] | prompt's | rollouts', read   | none     | the suffix, as it came |

    Args:
      params: from `init` or a checkpoint; cast to `dtype` on the way in.
      tokens: int32 [B, M, R]; padding, if any, follows the tokens, so causality hides it.
      positions: int32 [B, M, R], counted from the prompt's first token.
      prefix: keys and values that all rollouts of a prompt share.
      suffix: keys and values of each rollout; slots beyond `suffix.lengths` are not seen.
      slot: int32 scalar; write the new token's keys and values there in every rollout (R = 1).
      dtype: of the activations and of the caches.
      remat: recompute each layer in the backward pass.

    Returns:
      The final hidden states [B, M, R, D], normalised, ready for the output head; and the state.
    """
    hidden = params["embed"].astype(dtype)[tokens]
    rotation = _rotation(config, positions)
    length = tokens.shape[-1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    if prefix is not None:
        prefix_slots = jnp.arange(prefix.keys.shape[-2])
        in_prefix = prefix_slots < prefix.lengths[:, None, None, None, None, None]
    block = Block(config)

    def layer(x, weights, shared, own):
        def segments_of(keys, values):
            segments = []
            if shared is not None:
                segments.append(Segment(shared[0].astype(dtype), shared[1].astype(dtype), in_prefix))
            if own is None:
                own_segment, stored = _own_segment(keys, values, causal)
                return segments + own_segment, stored
            past_keys, past_values = own
            past = jnp.arange(past_keys.shape[-2])
            if slot is None:
                visible = past < jnp.reshape(suffix.lengths, (-1, 1, suffix.lengths.shape[-1], 1, 1, 1))
                own_segment, _ = _own_segment(keys, values, causal)
                return segments + [Segment(past_keys, past_values, visible)] + own_segment, own
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=3)
            past_keys = write(past_keys, keys.astype(past_keys.dtype))
            past_values = write(past_values, values.astype(past_values.dtype))
            segments.append(Segment(past_keys, past_values, past <= slot))
            return segments, (past_keys, past_values)

        return block.apply({"params": weights}, x, rotation, segments_of)

    shared = None if prefix is None else (prefix.keys, prefix.values)
    if suffix is None:
        step = lambda x, inputs: layer(x, *inputs, None)  # noqa: E731
        step = jax.checkpoint(step) if remat else step
        hidden, state = jax.lax.scan(step, hidden, (params["layers"], shared))
    else:
        layers = []
        for index, own in enumerate(suffix.layers):
            weights, its_prefix = jax.tree.map(lambda a: a[index], (params["layers"], shared))
            hidden, stored = layer(hidden, weights, its_prefix, own)
            layers.append(stored)
        state = suffix._replace(layers=tuple(layers))
    final_norm = {"params": {"scale": params["final_norm"]}}
    return RMSNorm(config.norm_eps).apply(final_norm, hidden), state


def prefill(params: Params, config: DecoderConfig, tokens: Array, lengths: Array, **options) -> Prefix:
    """Keys and values of right-padded prompts: tokens int32 [B, P], lengths int32 [B]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    _, (keys, values) = apply(params, config, tokens[:, None], positions[:, None], **options)
    return Prefix(keys.squeeze(3), values.squeeze(3), lengths)


def empty_suffix(config: DecoderConfig, batch: int, rollouts: int, slots: int, dtype) -> Suffix:
    """A suffix with room for `slots` tokens in each of `batch` x `rollouts` rollouts."""
    shape = (batch, config.num_kv_heads, rollouts, slots, config.head_dim)
    layers = tuple(
        (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)
    )
    return Suffix(layers, jnp.zeros((), jnp.int32))


def _own_segment(keys, values, visible):
    """The new tokens seeing each other; their keys and values are what the layer gives back."""
    return [Segment(keys, values, visible)], (keys, values)


def _rotation(config: DecoderConfig, positions: Array) -> tuple[Array, Array]:
    """cos and sin of RoPE's angles, float32 [B, M, R, 1, C / 2]."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = positions[..., None, None].astype(jnp.float32) * config.rope_theta**-exponents
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """RoPE in the half-split convention of Qwen and Llama: x [B, M, R, heads, C]."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
