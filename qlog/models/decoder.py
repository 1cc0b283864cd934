"""One decoder for all families (Qwen, Llama, Gemma) behind one pure function.

Flax Linen holds the layer's parameters and arithmetic; everything else is plain JAX: the stack is
a `lax.scan` over stacked layer parameters, the KV caches are explicit pytrees. What differs between
families is a field of DecoderConfig; what differs between layers is their sliding window.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from qlog.models.attention.blocks import ATTENTION, Segment, attend, attend_step
from qlog.models.config import DecoderConfig
from qlog.models.dense import dot_general
from qlog.models.rope import rotate, rotation

Params = Any
# Up to so many layers the stack is laid out flat: a loop stacks and copies what it keeps.
_UNROLLED_LAYERS = 4
_ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": functools.partial(nn.gelu, approximate=True)}
_NO_WINDOW = 1 << 30  # longer than any context
_keep_attention = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(ATTENTION),
    # cuDNN's backward pass wants what its forward pass gave, which has no name.
    lambda primitive, *_, **__: primitive.name == "dot_product_attention_fwd_wrapper",
)
# What a layer keeps for its backward pass, beside its input: everything; its matrix products and
# the attention, so that the cheap rest is computed again; the attention, for which long rollouts
# pay most; nothing.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _keep_attention
    ),
    "attention": _keep_attention,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Prefix(NamedTuple):
    """The prompt's keys and values, one copy per prompt.

    keys, values: [L, B, K, P, C], or a tuple of L arrays [B, K, P, C] (`unstack`); lengths: int32
    [B], the slots that hold tokens. Slot p holds the token at position p.
    """

    keys: Array | tuple[Array, ...]
    values: Array | tuple[Array, ...]
    lengths: Array


class Suffix(NamedTuple):
    """The rollouts' own keys and values: per layer a pair of [B, K, M, S, C].

    Layers are separate buffers, so that the decode loop updates each in place. Slot s holds the
    token at position prefix.lengths + s.
    lengths: int32, scalar or [B, M]: the slots that may be seen.
    """

    layers: tuple[tuple[Array, Array], ...]
    lengths: Array


class RMSNorm(nn.Module):
    """x / rms(x) * scale, or * (1 + scale) with `offset`; float32 inside, x's dtype outside."""

    eps: float
    offset: bool = False

    @nn.compact
    def __call__(self, x):
        initializer = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", initializer, (x.shape[-1],)).astype(jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return (x32 * (1 + scale if self.offset else scale)).astype(x.dtype)


class Block(nn.Module):
    """One pre-norm decoder layer: attention, then a gated MLP.

    What the queries see is the caller's: `heads`, then any attention of them, then `finish`.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32  # of the activations

    def setup(self):
        cfg = self.config
        norm = functools.partial(RMSNorm, cfg.norm_eps, cfg.norm_offset)
        dense = functools.partial(
            nn.Dense, use_bias=False, dtype=self.dtype, dot_general=dot_general
        )
        heads = functools.partial(dense, use_bias=cfg.qkv_bias)
        scaled_down = nn.initializers.variance_scaling(0.5 / cfg.num_layers, "fan_in", "normal")
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.q_proj = heads(cfg.num_heads * cfg.head_dim)
        self.k_proj = heads(cfg.num_kv_heads * cfg.head_dim)
        self.v_proj = heads(cfg.num_kv_heads * cfg.head_dim)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = norm(), norm()
        self.o_proj = dense(cfg.width, kernel_init=scaled_down)
        self.gate_proj, self.up_proj = dense(cfg.mlp_width), dense(cfg.mlp_width)
        self.down_proj = dense(cfg.width, kernel_init=scaled_down)
        if cfg.post_norms:
            self.post_attention_norm, self.post_mlp_norm = norm(), norm()

    def __call__(self, x, turn):
        """`finish` of the queries themselves: all parameters are used once, to initialise them."""
        return self.finish(x, self.heads(x, turn)[0])

    def heads(self, x, turn):
        """x: [B, M, R, D] -> queries [B, M, R, K, G, C], scaled, keys and values [B, M, R, K, C]."""
        cfg = self.config
        normed = self.attention_norm(x)
        queries, keys, values = (
            project(normed).reshape(*x.shape[:-1], -1, cfg.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cfg.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries = rotate(queries, turn, (cfg.query_pre_attn_scalar or cfg.head_dim) ** -0.5)
        queries = queries.reshape(*x.shape[:-1], cfg.num_kv_heads, -1, cfg.head_dim)
        return queries, rotate(keys, turn), values

    def finish(self, x, mixed):
        """x [B, M, R, D] and what attention gave it [B, M, R, K, G, C] -> [B, M, R, D]."""
        cfg = self.config
        mixed = self.o_proj(mixed.reshape(*x.shape[:-1], -1))
        x = x + (self.post_attention_norm(mixed) if cfg.post_norms else mixed)
        normed = self.mlp_norm(x)
        gate = _ACTIVATIONS[cfg.activation](self.gate_proj(normed))
        mixed = self.down_proj(gate * self.up_proj(normed))
        return x + (self.post_mlp_norm(mixed) if cfg.post_norms else mixed)


def init(config: DecoderConfig, key: Array, dtype=jnp.float32) -> Params:
    """Random parameters: {"embed" [V, D], "layers" (leaves stacked [L, ...]), "final_norm" [D]},
    and "unembed" [V, D] when the embeddings are not tied.

    Logits start with a deviation of 1, and the layers' outputs are scaled down with the depth, so
    that at first the residual stream carries the tokens themselves.
    """
    embed_key, unembed_key, layers_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, 1, config.width), dtype)
    turn = rotation(jnp.zeros((1, 1, 1), jnp.int32), config.head_dim, config.rope_theta)

    def init_layer(layer_key):
        return Block(config, dtype).init(layer_key, x, turn)["params"]

    layers = jax.vmap(init_layer)(jax.random.split(layers_key, config.num_layers))
    table = (config.vocab_size, config.width)
    params = {
        "embed": config.width**-0.5 * jax.random.normal(embed_key, table),
        "layers": layers,
        "final_norm": jnp.full((config.width,), 0.0 if config.norm_offset else 1.0),
    }
    if not config.tied_embeddings:
        params["unembed"] = config.width**-0.5 * jax.random.normal(unembed_key, table)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def shapes(config: DecoderConfig, dtype=jnp.float32) -> Params:
    """What `init` would give, as jax.ShapeDtypeStruct: to decide shardings by."""
    return jax.eval_shape(lambda key: init(config, key, dtype), jax.random.key(0))


def unembedding(params: Params) -> Array:
    """The output head's table [V, D]: the embedding itself when tied."""
    return params.get("unembed", params["embed"])


def decoding_weights(params: Params, dtype) -> Params:
    """Matrices and tables in `dtype`, norms as they are, the layers as a tuple instead of stacked.

    What `apply` would make of the parameters at every use: a loop that calls it often does so
    once, before.
    """

    def cast(path, leaf):
        is_norm = "norm" in jax.tree_util.keystr(path)
        return leaf if is_norm else leaf.astype(dtype)

    cast_params = jax.tree_util.tree_map_with_path(cast, params)
    return cast_params | {"layers": _unstacked(cast_params["layers"])}


def unstack(prefix: Prefix) -> Prefix:
    """The same prefix, its layers as separate arrays, for loops that visit them one by one."""
    return prefix._replace(keys=_unstacked(prefix.keys), values=_unstacked(prefix.values))


def _unstacked(tree) -> tuple:
    if isinstance(tree, tuple):
        return tree
    count = jax.tree.leaves(tree)[0].shape[0]
    return tuple(jax.tree.map(lambda leaf: leaf[index], tree) for index in range(count))


def apply(
    params: Params,
    config: DecoderConfig,
    tokens: Array,
    positions: Array,
    *,
    prefix: Prefix | None = None,
    suffix: Suffix | None = None,
    slot: Array | None = None,
    first: Array | None = None,
    dtype=jnp.float32,
    remat: str = "none",
    attend=attend,
    attend_step=attend_step,
    hold=lambda hidden: hidden,
    state_only: bool = False,
) -> tuple[Array, Any]:
    """The one forward pass: new tokens of M rollouts over shared prefix, own suffix, themselves.

    | use     | tokens    | prefix   | suffix            | slot     | returned state         |
    |---------|-----------|----------|-------------------|----------|------------------------|
    | prefill | [B, 1, P] | none     | none              | none     | stacked (keys, values) |
    | train   | [B, M, R] | prompt's | none              | none     | stacked (keys, values) |
    | decode  | [B, M, 1] | prompt's | rollouts', edited | the step | the edited suffix      |
    | score   | [B, M, R] | prompt's | rollouts', read   | none     | the suffix, as it came |

    Args:
      params: from `init` or a checkpoint, cast to `dtype` on the way in; or `decoding_weights`.
      tokens: int32 [B, M, R]; padding, if any, follows the tokens, so causality hides it.
      positions: int32 [B, M, R], counted from the prompt's first token.
      prefix: keys and values that all rollouts of a prompt share.
      suffix: keys and values of each rollout; slots beyond `suffix.lengths` are not seen.
      slot: int32 scalar; write the new token's keys and values there in every rollout (R = 1).
      first: int32 [B, M, R], the first of the new tokens that each may see, where several rollouts
        are packed into one row; None is 0.
      dtype: of the activations and of the caches.
      remat: what the backward pass recomputes of each layer, of `REMAT`.
      attend, attend_step: those of `attention`, or others that give the same.
      hold: applied to the hidden states [B, M, R, D] after the embedding and every layer, to say
        how they lie on a mesh.
      state_only: the caller needs the keys and values alone. Of the last layer nothing else is
        then computed, forward or backward, and the hidden states mean nothing.

    Returns:
      The final hidden states [B, M, R, D], normalised, ready for the output head; and the state.
    """
    hidden = params["embed"][tokens].astype(dtype)  # so its gradient adds up in its precision
    if config.scale_embeddings:
        hidden = hidden * jnp.asarray(config.width**0.5, dtype)
    hidden = hold(hidden)
    rotation_of = _rotations(config, positions)
    groups = config.num_heads // config.num_kv_heads
    block = Block(config, dtype)

    def heads(x, weights, window):
        """Queries, and the new keys and values as caches hold them."""
        turn = rotation_of(window)
        queries, *new = block.apply({"params": weights}, x, turn, method="heads")
        return queries, tuple(map(_by_head, new))

    def finish(x, weights, mixed):
        return block.apply({"params": weights}, x, mixed, method="finish")

    def mix(queries, new, shared, own, window):
        """Attention of new tokens over prefix, suffix and themselves: like `queries`."""
        sight = _Sight(positions, window, groups)
        segments = [Segment(*map(_flat, new), *sight.own(first), tokens.shape[1])]
        if own is not None:
            seen = jnp.broadcast_to(suffix.lengths, tokens.shape[:2])
            slots = own[0].shape[3]
            seen = sight.suffix(prefix.lengths, seen, slots)
            segments.insert(0, Segment(*map(_flat, own), *seen, tokens.shape[1]))
        if shared is not None:
            segments.insert(0, Segment(*_cast(shared, dtype), *sight.prefix(prefix.lengths)))
        return _rows_back(attend(_rows(queries), segments), queries)

    def mix_step(queries, new, shared, own, window):
        """`mix` of one token, which is written to its slot first; and the suffix of the layer."""
        sight = _Sight(positions, window, groups)
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=3)
        now = tuple(write(old, t.astype(old.dtype)) for old, t in zip(own, new))
        start, base = sight.start[:, 0], prefix.lengths[:, None]  # all rollouts are in step
        mixed = attend_step(
            queries[:, :, 0].transpose(0, 2, 1, 3, 4),
            Segment(*_cast(shared, dtype), start, base),
            Segment(*now, jnp.maximum(start - base, 0), jnp.reshape(slot + 1, (1, 1))),
        )
        return mixed.transpose(0, 2, 1, 3, 4)[:, :, None], now

    shared = None if prefix is None else (prefix.keys, prefix.values)
    windows = config.windows
    if suffix is None:
        # Equal layers keep their window static, so that the masks of plain ones cost nothing.
        scanned = None if len(set(windows)) == 1 else jnp.array(windows)

        def step(x, inputs):
            weights, its_prefix, window, is_last = inputs
            window = windows[0] if window is None else window
            queries, new = heads(x, weights, window)

            def output():
                return hold(finish(x, weights, mix(queries, new, its_prefix, None, window)))

            return output() if is_last is None else jax.lax.cond(is_last, lambda: x, output), new

        if remat != "none":
            step = jax.checkpoint(step, policy=REMAT[remat])
        unroll = config.num_layers <= _UNROLLED_LAYERS
        is_last = jnp.arange(config.num_layers) == config.num_layers - 1 if state_only else None
        inputs = (params["layers"], shared, scanned, is_last)
        hidden, state = jax.lax.scan(step, hidden, inputs, unroll=unroll)
    else:
        layers = []
        parts = map(_unstacked, (params["layers"], *shared))
        for weights, keys, values, own, window in zip(*parts, suffix.layers, windows):
            queries, new = heads(hidden, weights, window)
            if slot is None:
                mixed = mix(queries, new, (keys, values), own, window)
            else:
                mixed, own = mix_step(queries, new, (keys, values), own, window)
                layers.append(own)
            hidden = finish(hidden, weights, mixed)
        state = suffix if slot is None else suffix._replace(layers=tuple(layers))
    final_norm = {"params": {"scale": params["final_norm"]}}
    return RMSNorm(config.norm_eps, config.norm_offset).apply(final_norm, hidden), state


def prefill(
    params: Params, config: DecoderConfig, tokens: Array, lengths: Array, **options
) -> Prefix:
    """Keys and values of right-padded prompts: tokens int32 [B, P], lengths int32 [B]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    tokens, positions = tokens[:, None], positions[:, None]
    _, (keys, values) = apply(params, config, tokens, positions, state_only=True, **options)
    return Prefix(keys.squeeze(3), values.squeeze(3), lengths)


def empty_suffix(config: DecoderConfig, batch: int, rollouts: int, slots: int, dtype) -> Suffix:
    """A suffix with room for `slots` tokens in each of `batch` x `rollouts` rollouts."""
    shape = (batch, config.num_kv_heads, rollouts, slots, config.head_dim)
    layers = tuple(
        (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)
    )
    return Suffix(layers, jnp.zeros((), jnp.int32))


def _cast(arrays, dtype):
    return [x.astype(dtype) for x in arrays]


def _by_head(x: Array) -> Array:
    """[B, M, R, K, C] -> [B, K, M, R, C]: heads before slots, as caches are laid out."""
    return x.transpose(0, 3, 1, 2, 4)


def _flat(x: Array) -> Array:
    """[B, K, M, S, C] -> [B, K, M * S, C]: the slots of all rollouts side by side."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _rows(queries: Array) -> Array:
    """[B, M, R, K, G, C] -> [B, K, M * R * G, C]."""
    batch, _, _, heads, _, size = queries.shape
    return queries.transpose(0, 3, 1, 2, 4, 5).reshape(batch, heads, -1, size)


def _rows_back(rows: Array, like: Array) -> Array:
    batch, rollouts, length, heads, groups, size = like.shape
    return rows.reshape(batch, heads, rollouts, length, groups, size).transpose(0, 2, 3, 1, 4, 5)


class _Sight:
    """What the queries of one layer see of each segment: (start, stop), int32 [B or 1, M * R * G].

    Slot p of the prefix is position p, and new tokens that see each other have positions as far
    apart as their slots, so a sliding window is a bound on slots everywhere.

    Args:
      positions: int32 [B, M, R].
      window: an int, or a traced int32 inside a scan over unequal layers; 0 is none.
      groups: G, query heads per key/value head.
    """

    def __init__(self, positions: Array, window, groups: int):
        self._shape, self._groups = positions.shape, groups
        if isinstance(window, int):
            self._back = window - 1 if window else _NO_WINDOW
        else:
            self._back = jnp.where(window > 0, window - 1, _NO_WINDOW)
        self.start = jnp.maximum(positions - self._back, 0)  # first position inside the window

    def prefix(self, lengths: Array):
        return self._per_row(self.start), self._per_row(lengths[:, None, None])

    def suffix(self, base: Array, lengths: Array, slots: int):
        """base: position of slot 0, [B]; lengths: slots that may be seen, [B, M]; slots: S."""
        offset = slots * jnp.arange(self._shape[1])[:, None]
        start = jnp.maximum(self.start - base[:, None, None], 0)
        return self._per_row(offset + start), self._per_row(offset + lengths[..., None])

    def own(self, first: Array | None):
        """NumPy arrays where nothing is traced: kernels may then choose by what is seen."""
        xp = np if first is None and isinstance(self._back, int) else jnp
        tokens = xp.arange(self._shape[2], dtype=xp.int32)
        offset = self._shape[2] * xp.arange(self._shape[1], dtype=xp.int32)[:, None]
        start = xp.maximum(tokens - self._back, 0 if first is None else first)
        return self._per_row(offset + start, xp), self._per_row(offset + tokens + 1, xp)

    def _per_row(self, x: Array, xp=jnp) -> Array:
        x = x if x.ndim == 3 else x[None]
        x = xp.broadcast_to(x, (x.shape[0], *self._shape[1:]))
        return xp.repeat(x.reshape(x.shape[0], -1), self._groups, axis=1)


def _rotations(config: DecoderConfig, positions: Array):
    """RoPE's rotation of a layer as a function of its window, an int or a traced int32."""
    angles = functools.partial(rotation, positions, config.head_dim)
    everywhere = angles(config.rope_theta, config.rope_scaling)
    if config.local_rope_theta is None or not any(config.windows):
        return lambda window: everywhere
    local = angles(config.local_rope_theta)

    def of(window):
        if isinstance(window, int):
            return local if window else everywhere
        return jax.tree.map(functools.partial(jnp.where, window > 0), local, everywhere)

    return of


_TILE = 128


def whole_tiles(length: int) -> int:
    """`length` tokens rounded up to a multiple of 128; up to 128, to a multiple of 16.

    Else a TPU lays caches out in a way that the decode loop cannot update in place, copies them all
    at its beginning and end, and spends minutes on compiling shifts of everything else.
    """
    tile = _TILE if length > _TILE else 16
    return -(-length // tile) * tile
