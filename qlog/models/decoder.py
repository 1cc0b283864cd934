"""One decoder for all families (Qwen, Llama, Gemma, Mistral, SmolLM3), as pure functions.

There are four passes over it, and they share layers and parameters:
  - `extend`: rows of tokens over a prefix, differentiable; training, and the plain forward pass;
  - `prefill`: keys and values of prompts;
  - `decode_step`: one token of every rollout;
  - `score_step`: a few tokens after every rollout.

Flax Linen holds a layer's parameters and arithmetic. Everything else is plain JAX: the stack is a
`lax.scan` over stacked layer parameters, and caches are explicit pytrees. What differs between
families is a field of DecoderConfig; what differs between layers is their sliding window, and
whether they have RoPE.

Axes: B prompts, M rollouts or rows of each, R tokens, P slots of a prompt, S slots of a rollout,
D width, K key/value heads, G query heads per key/value head, C head size, L layers, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from qlog.errors import ConfigError
from qlog.models.attention import Cached, Quantised, Segment, layouts, quantised
from qlog.models.attention.layouts import KeysAndValues
from qlog.models.config import DecoderConfig
from qlog.models.dense import dot_general
from qlog.models.execution import PLAIN, REMAT, Execution
from qlog.models.rope import Rotation, rotate, rotation

Params = Any  # nested dicts as `init` makes them, of arrays, shapes or shardings
# A stack of at most so many layers is laid out flat: a loop would stack and copy what it keeps.
_UNROLLED_LAYERS = 4
_ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": functools.partial(nn.gelu, approximate=True)}
TILE = 128  # slots, a TPU's lanes


class Prefix(NamedTuple):
    """Keys and values of B prompts, one copy for all rollouts of a prompt.

    Slot p holds the token at position p.
    """

    # [L, B, K, P, C], or after `unstack` L caches [B, K, P, C]
    keys: Cached | tuple[Cached, ...]
    values: Cached | tuple[Cached, ...]  # like keys
    lengths: Array  # int32 [B], the slots that hold tokens


class Suffix(NamedTuple):
    """The rollouts' own keys and values.

    Slot s holds the token at position prefix.lengths + s.
    """

    # For each layer keys and values, [B, K, M, S, C]. Layers are separate buffers, so that the
    # decode loop updates each in place.
    layers: tuple[KeysAndValues, ...]
    lengths: Array  # int32, scalar or [B, M]: the slots that `score_step` may see


class RMSNorm(nn.Module):
    """x / rms(x) * scale, or * (1 + scale) with `offset`; float32 inside, x's dtype outside."""

    eps: float
    offset: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        initializer = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", initializer, (x.shape[-1],)).astype(jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return (x32 * (1 + scale if self.offset else scale)).astype(x.dtype)


class Block(nn.Module):
    """One pre-norm decoder layer: attention, then a gated MLP.

    It comes in two halves, `heads` and `finish`. The caller runs attention in between, and so
    decides what the queries see.
    """

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32  # of the activations

    def setup(self) -> None:
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

    def __call__(self, x: Array, turn: Rotation) -> Array:
        """Only for `init`: uses every parameter once, with queries in place of attention."""
        return self.finish(x, self.heads(x, turn)[0])

    def heads(self, x: Array, turn: Rotation | None) -> tuple[Array, Array, Array]:
        """x [B, M, R, D] -> queries [B, M, R, K, G, C], scaled; keys and values [B, M, R, K, C]."""
        cfg = self.config
        normed = self.attention_norm(x)
        queries, keys, values = (
            project(normed).reshape(*x.shape[:-1], -1, cfg.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cfg.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        # Scaled here, in float32, so that no kernel of attention has to.
        queries = rotate(queries, turn, (cfg.query_pre_attn_scalar or cfg.head_dim) ** -0.5)
        # Query head k * G + g shares key/value head k.
        queries = queries.reshape(*x.shape[:-1], cfg.num_kv_heads, -1, cfg.head_dim)
        return queries, rotate(keys, turn), values

    def finish(self, x: Array, mixed: Array) -> Array:
        """x [B, M, R, D] and attention's result [B, M, R, K, G, C] -> the layer's [B, M, R, D]."""
        cfg = self.config
        mixed = self.o_proj(mixed.reshape(*x.shape[:-1], -1))
        x = x + (self.post_attention_norm(mixed) if cfg.post_norms else mixed)
        normed = self.mlp_norm(x)
        gate = _ACTIVATIONS[cfg.activation](self.gate_proj(normed))
        mixed = self.down_proj(gate * self.up_proj(normed))
        return x + (self.post_mlp_norm(mixed) if cfg.post_norms else mixed)


def init(config: DecoderConfig, key: Array, dtype: DTypeLike = jnp.float32) -> Params:
    """Random parameters: {"embed" [V, D], "layers" (leaves stacked [L, ...]), "final_norm" [D]},
    and "unembed" [V, D] if the embeddings are not tied.

    Logits start with a deviation of 1, and the layers' outputs are scaled down with the depth, so
    that at first the residual stream carries the tokens themselves.
    """
    embed_key, unembed_key, layers_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, 1, config.width), dtype)
    turn = rotation(jnp.zeros((1, 1, 1), jnp.int32), config.head_dim, config.rope_theta)

    def init_layer(layer_key: Array) -> Params:
        return Block(config, dtype).init(layer_key, x, turn)["params"]

    # One layer's parameters, L times with different keys: leaves [L, ...], as the scan takes them.
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


def shapes(config: DecoderConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """The shapes of what `init` returns, as jax.ShapeDtypeStruct: to decide shardings by."""
    return jax.eval_shape(lambda key: init(config, key, dtype), jax.random.key(0))


def check_finite(params: Params, source: str) -> Params:
    """`params`, if none of them is inf or NaN. Every process must call it, and all agree.

    Args:
      source: where they are from, for the message.

    Raises:
      ConfigError: one of them is; it names them.
    """
    damaged = [
        "/".join(entry.key for entry in path)
        for path, is_finite in jax.tree.leaves_with_path(jax.device_get(_are_finite(params)))
        if not is_finite
    ]
    if damaged:
        raise ConfigError(
            f"{source}: {', '.join(damaged[:3])}{' and others' if damaged[3:] else ''} hold "
            "numbers that are not finite: the files are damaged, or of a run that exploded."
        )
    return params


@jax.jit
def _are_finite(params: Params) -> Any:
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params)


def unembedding(params: Params) -> Array:
    """The output head's table [V, D]: the embedding itself if tied."""
    return params.get("unembed", params["embed"])


def decoding_weights(params: Params, dtype: DTypeLike) -> Params:
    """Matrices and tables in `dtype`, norms as they are, the layers as a tuple instead of stacked.

    A loop of `decode_step` then casts and slices them once, and not at every step.
    """

    def cast(path, leaf):
        # `RMSNorm` computes in float32 from its scale; rounding that would change the result.
        is_norm = "norm" in jax.tree_util.keystr(path)
        return leaf if is_norm else leaf.astype(dtype)

    cast_params = jax.tree_util.tree_map_with_path(cast, params)
    return cast_params | {"layers": _unstacked(cast_params["layers"])}


def unstack(prefix: Prefix) -> Prefix:
    """The same prefix, its layers as separate arrays, for loops that visit them one by one."""
    return prefix._replace(keys=_unstacked(prefix.keys), values=_unstacked(prefix.values))


def _unstacked(tree: Any) -> tuple[Any, ...]:
    """A tree of arrays [L, ...] as a tuple of L trees; a tuple is unstacked already."""
    if isinstance(tree, tuple):
        return tree
    num_layers = jax.tree.leaves(tree)[0].shape[0]
    return tuple(_layer_of(tree, layer) for layer in range(num_layers))


def _layer_of(tree: Any, layer: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[layer], tree)


def extend(
    params: Params,
    config: DecoderConfig,
    tokens: Array,
    *,
    prefix: Prefix | None = None,
    offsets: Array | None = None,
    execution: Execution = PLAIN,
) -> Array:
    """Hidden states of M rows of tokens after a prefix that they share; differentiable in all.

    This is the forward pass of training. Without a prefix it is the plain forward pass.

    Args:
      params: from `init` or a checkpoint; cast to `execution.dtype` where they are used.
      config: the decoder's shape.
      tokens: int32 [B, M, R]; padding follows the tokens, so that causality hides it.
      prefix: keys and values of the B prompts. None: positions start at 0.
      offsets: int32 [B, M, R], where several rollouts are packed into one row: how many tokens of
        its rollout precede each token. A token sees only its own rollout. None: a row holds one
        rollout, and offsets are 0 to R - 1.
      execution: see `Execution`.

    Returns:
      The final hidden states [B, M, R, D], normalised, for the output head.
    """
    if offsets is None:
        positions, first = jnp.arange(tokens.shape[-1]), None
    else:
        # A token's number in the row less its number in the rollout: where its rollout begins.
        positions, first = offsets, jnp.maximum(jnp.arange(tokens.shape[-1]) - offsets, 0)
    if prefix is not None:
        positions = prefix.lengths[:, None, None] + positions
    positions = jnp.broadcast_to(positions, tokens.shape)
    rotations = _rotations(config, positions)

    def layer(x: Array, inputs: _LayerInputs) -> tuple[Array, None]:
        weights, cache = inputs.weights, inputs.cache
        window, has_rope = inputs.kind(config)
        queries, new = _heads(config, execution, weights, x, rotations.of(window, has_rope))
        visible = layouts.Visible(positions, window, config.num_groups)
        segments = [visible.new_tokens(new, first)]
        if prefix is not None and cache is not None:
            segments.insert(0, visible.prefix(_cast(cache, execution.dtype), prefix.lengths))
        mixed = _attend(execution, queries, segments)
        return execution.constrain(_finish(config, execution, weights, x, mixed)), None

    cache: Any = None if prefix is None else (prefix.keys, prefix.values)  # [L, B, K, P, C] each
    inputs = _LayerInputs(params["layers"], cache, *_kinds_to_scan(config))
    hidden, _ = _scan(layer, _embed(params, config, tokens, execution), inputs, config, execution)
    return _final_norm(params, config, hidden)


def prefill(
    params: Params,
    config: DecoderConfig,
    tokens: Array,
    lengths: Array,
    execution: Execution = PLAIN,
    cache_dtype: DTypeLike | None = None,
) -> Prefix:
    """Keys and values of prompts, and nothing else of them; differentiable, but for int8.

    Args:
      params: as for `extend`.
      config: the decoder's shape.
      tokens: int32 [B, P], right-padded.
      lengths: int32 [B], the tokens of each that a continuation may see.
      execution: see `Execution`.
      cache_dtype: of what is returned; int8 quantises it. The prompts' own attention sees keys and
        values as they are computed. None: `execution.dtype`.
    """
    kept_as = execution.dtype if cache_dtype is None else cache_dtype
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)[:, None]
    tokens = tokens[:, None]  # a prompt is a group of one row, [B, 1, P]
    rotations = _rotations(config, positions)

    def layer(x: Array, inputs: _LayerInputs) -> tuple[Array, KeysAndValues]:
        weights, (window, has_rope) = inputs.weights, inputs.kind(config)
        queries, new = _heads(config, execution, weights, x, rotations.of(window, has_rope))

        def output() -> Array:
            visible = layouts.Visible(positions, window, config.num_groups)
            mixed = _attend(execution, queries, [visible.new_tokens(new)])
            return execution.constrain(_finish(config, execution, weights, x, mixed))

        # Nothing reads the last layer's output, only its keys and values. A scan runs the same body
        # for every layer, so the compiler cannot leave the last one's attention and MLP out by
        # itself. The condition does, forward and backward. Taking the last layer out of the scan
        # would instead copy the other layers' weights out of their stacked arrays.
        # Quantised here, layer by layer: caches in full precision never exist as a whole.
        keys, values = (quantised.stored(each, kept_as) for each in new)
        return jax.lax.cond(inputs.is_last, lambda: x, output), (keys, values)

    is_last = jnp.arange(config.num_layers) == config.num_layers - 1
    inputs = _LayerInputs(params["layers"], None, *_kinds_to_scan(config), is_last)
    hidden = _embed(params, config, tokens, execution)
    _, caches = _scan(layer, hidden, inputs, config, execution)  # [L, B, K, 1, P, C]
    keys, values = jax.tree.map(lambda x: x.squeeze(3), caches)
    return Prefix(keys, values, lengths)


def decode_step(
    params: Params,
    config: DecoderConfig,
    tokens: Array,
    prefix: Prefix,
    suffix: Suffix,
    slot: Array | int,
    execution: Execution = PLAIN,
) -> tuple[Array, Suffix]:
    """One more token of every rollout; no gradient.

    Args:
      params: `decoding_weights`, or parameters as for `extend`.
      config: the decoder's shape.
      tokens: int32 [B, M].
      prefix: of the B prompts; `unstack` it before a loop.
      suffix: of the rollouts, with slots before `slot` written; if it is quantised, the token's
        keys and values are, too. Its lengths are not read.
      slot: int32 scalar, the same for all rollouts: they are decoded in step.
      execution: see `Execution`.

    Returns:
      The final hidden states [B, M, D], and the suffix with the tokens' keys and values in `slot`.
    """
    tokens = tokens[..., None]  # [B, M, 1]
    positions = jnp.broadcast_to(prefix.lengths[:, None, None] + slot, tokens.shape)
    rotations = _rotations(config, positions)
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=3)
    hidden, layers = _embed(params, config, tokens, execution), []
    for weights, cache, own, window, has_rope in _layers(params, config, prefix, suffix):
        turn = rotations.of(window, has_rope)
        queries, new = _heads(config, execution, weights, hidden, turn)
        # Written first, so that the token sees itself in its slot.
        keys, values = jax.tree.map(write, own, _as_kept(new, own))
        layers.append((keys, values))
        # One row of positions serves all rollouts: they are in step.
        start = layouts.Visible(positions, window, config.num_groups).start[:, 0]  # [B, 1]
        base = prefix.lengths[:, None]  # position of the suffix's first slot
        mixed = execution.attend_step(
            queries[:, :, 0].transpose(0, 2, 1, 3, 4),  # [B, K, M, G, C]
            Segment(*_cast(cache, execution.dtype), start, base),
            Segment(keys, values, jnp.maximum(start - base, 0), stop=jnp.reshape(slot + 1, (1, 1))),
        )
        mixed = mixed.transpose(0, 2, 1, 3, 4)[:, :, None]  # [B, M, 1, K, G, C]
        hidden = _finish(config, execution, weights, hidden, mixed)
    hidden = _final_norm(params, config, hidden)
    return hidden[:, :, 0], suffix._replace(layers=tuple(layers))


def score_step(
    params: Params,
    config: DecoderConfig,
    tokens: Array,
    prefix: Prefix,
    suffix: Suffix,
    execution: Execution = PLAIN,
) -> Array:
    """Hidden states of a few tokens after each rollout, whose caches are only read.

    Args:
      params: as for `decode_step`.
      config: the decoder's shape.
      tokens: int32 [B, M, A]; they follow the first `suffix.lengths` tokens of their rollout.
      prefix: of the B prompts.
      suffix: of the rollouts; slots from `suffix.lengths` on are not seen.
      execution: see `Execution`.

    Returns:
      The final hidden states [B, M, A, D], normalised, for the output head.
    """
    lengths = jnp.broadcast_to(suffix.lengths, tokens.shape[:2])
    positions = (prefix.lengths[:, None] + lengths)[..., None] + jnp.arange(tokens.shape[-1])
    rotations = _rotations(config, positions)
    hidden = _embed(params, config, tokens, execution)
    for weights, cache, own, window, has_rope in _layers(params, config, prefix, suffix):
        turn = rotations.of(window, has_rope)
        queries, new = _heads(config, execution, weights, hidden, turn)
        visible = layouts.Visible(positions, window, config.num_groups)
        segments = [
            visible.prefix(_cast(cache, execution.dtype), prefix.lengths),
            visible.suffix(own, prefix.lengths, lengths),
            # As decode steps see the tokens that they write, so that both give one distribution.
            visible.new_tokens(_as_kept(new, own)),
        ]
        mixed = _attend(execution, queries, segments)
        hidden = _finish(config, execution, weights, hidden, mixed)
    return _final_norm(params, config, hidden)


# ---- The parts that the four passes share ----


class _LayerInputs(NamedTuple):
    """What a scan over the layers takes: every array with a leading axis L, or None."""

    weights: Params
    cache: KeysAndValues | None  # of the prefix
    window: Array | None  # int32; None: all layers have the same, and config.windows[0] is static
    has_rope: Array | None  # bool; None: all layers have the same, and config.has_rope[0] is static
    is_last: Array | None = None  # bool

    def kind(self, config: DecoderConfig) -> tuple[int | Array, bool | Array]:
        """Inside of the scan: this layer's window, and whether it has RoPE."""
        window = config.windows[0] if self.window is None else self.window
        return window, config.has_rope[0] if self.has_rope is None else self.has_rope


def _embed(params: Params, config: DecoderConfig, tokens: Array, execution: Execution) -> Array:
    """int32 [B, M, R] -> [B, M, R, D]."""
    # Cast after the look-up, so that gradients of the table add up in the table's precision.
    hidden = params["embed"][tokens].astype(execution.dtype)
    if config.scale_embeddings:
        hidden = hidden * jnp.asarray(config.width**0.5, execution.dtype)
    return execution.constrain(hidden)


def _heads(
    config: DecoderConfig, execution: Execution, weights: Params, x: Array, turn: Rotation | None
) -> tuple[Array, tuple[Array, Array]]:
    """Queries [B, M, R, K, G, C], and new keys and values as caches hold them, [B, K, M, R, C]."""
    block = Block(config, execution.dtype)
    heads: Any = block.apply({"params": weights}, x, turn, method="heads")
    queries, keys, values = heads
    return queries, (layouts.by_head(keys), layouts.by_head(values))


def _finish(
    config: DecoderConfig, execution: Execution, weights: Params, x: Array, mixed: Array
) -> Array:
    """`Block.finish` with one layer's weights."""
    block = Block(config, execution.dtype)
    finished: Any = block.apply({"params": weights}, x, mixed, method="finish")
    return finished


def _attend(execution: Execution, queries: Array, segments: list[Segment]) -> Array:
    """Attention of queries [B, M, R, K, G, C]: the same shape."""
    return layouts.rows_back(execution.attend(layouts.rows(queries), segments), queries)


def _final_norm(params: Params, config: DecoderConfig, hidden: Array) -> Array:
    norm = RMSNorm(config.norm_eps, config.norm_offset)
    normalised: Any = norm.apply({"params": {"scale": params["final_norm"]}}, hidden)
    return normalised


def _kinds_to_scan(config: DecoderConfig) -> tuple[Array | None, Array | None]:
    """`_LayerInputs.window` and `.has_rope`: [L], or None where all layers are equal.

    What is None stays known at compile time. Without windows, masks are then causal as far as
    kernels can tell, and cost nothing, whichever layers have RoPE.
    """
    window, has_rope = (
        None if len(set(each)) == 1 else jnp.array(each)
        for each in (config.windows, config.has_rope)
    )
    return window, has_rope


def _scan(
    layer: Callable[[Array, _LayerInputs], tuple[Array, Any]],
    hidden: Array,
    inputs: _LayerInputs,
    config: DecoderConfig,
    execution: Execution,
) -> tuple[Array, Any]:
    """jax.lax.scan of a layer over the stacked layers, rematerialised as `execution` says."""
    if execution.remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT[execution.remat])
    unroll = config.num_layers <= _UNROLLED_LAYERS
    return jax.lax.scan(layer, hidden, inputs, unroll=unroll)


class _Layer(NamedTuple):
    """One layer as a loop visits it."""

    weights: Params
    cache: KeysAndValues  # of the prefix, [B, K, P, C] each
    own: KeysAndValues  # of the suffix, [B, K, M, S, C] each
    window: int
    has_rope: bool


def _layers(
    params: Params, config: DecoderConfig, prefix: Prefix, suffix: Suffix
) -> Iterator[_Layer]:
    """Yields the layers in their order.

    The loop over it is unrolled, unlike `_scan`: every layer then updates its suffix in place,
    where a scan would copy stacked caches in and out of each step.
    """
    parts = map(_unstacked, (params["layers"], prefix.keys, prefix.values))
    for weights, keys, values, own, window, has_rope in zip(
        *parts, suffix.layers, config.windows, config.has_rope, strict=True
    ):
        yield _Layer(weights, (keys, values), own, window, has_rope)


def empty_suffix(
    config: DecoderConfig, batch: int, rollouts: int, slots: int, dtype: DTypeLike
) -> Suffix:
    """A suffix with room for `slots` tokens in each of `batch` x `rollouts` rollouts.

    Args:
      dtype: of keys and values; int8 keeps them quantised.
    """
    shape = (batch, config.num_kv_heads, rollouts, slots, config.head_dim)
    layers = tuple(
        (quantised.empty(shape, dtype), quantised.empty(shape, dtype))
        for _ in range(config.num_layers)
    )
    return Suffix(layers, jnp.zeros((), jnp.int32))


def _as_kept(new: tuple[Array, Array], own: KeysAndValues) -> KeysAndValues:
    """New keys and values [B, K, M, R, C], as the suffix keeps those of its tokens."""
    keys, values = (quantised.stored(x, cache.dtype) for x, cache in zip(new, own, strict=True))
    return keys, values


def _cast(cache: KeysAndValues, dtype: DTypeLike) -> KeysAndValues:
    """Caches in the dtype of the activations; quantised ones as they are."""
    keys, values = (x if isinstance(x, Quantised) else x.astype(dtype) for x in cache)
    return keys, values


class _Rotations(NamedTuple):
    """RoPE's rotations for a set of positions."""

    everywhere: Rotation
    local: Rotation | None  # of layers with a window, where they have a frequency of their own

    def of(self, window: int | Array, has_rope: bool | Array) -> Rotation | None:
        """The rotation of a layer; None for one without RoPE.

        Args:
          window: of the layer, an int or a traced int32.
          has_rope: whether the layer has RoPE, a bool or a traced one.
        """
        if has_rope is False:
            return None
        turn = self._by_window(window)
        if isinstance(has_rope, bool):
            return turn
        # A scan runs one body for all layers: where a layer has no RoPE, a rotation by no angle.
        cos, sin = turn
        return jnp.where(has_rope, cos, 1), jnp.where(has_rope, sin, 0)

    def _by_window(self, window: int | Array) -> Rotation:
        if self.local is None:
            return self.everywhere
        if isinstance(window, int):
            return self.local if window else self.everywhere
        choose = functools.partial(jnp.where, window > 0)
        return jax.tree.map(choose, self.local, self.everywhere)


def _rotations(config: DecoderConfig, positions: Array) -> _Rotations:
    everywhere = rotation(positions, config.head_dim, config.rope_theta, config.rope_scaling)
    if config.local_rope_theta is None or not any(config.windows):
        return _Rotations(everywhere, None)
    return _Rotations(everywhere, rotation(positions, config.head_dim, config.local_rope_theta))


def whole_tiles(length: int) -> int:
    """`length` slots rounded up to a multiple of 128; up to 128, to a multiple of 16.

    Otherwise a TPU lays caches out in a way that the decode loop cannot update in place: it copies
    all of them before and after the loop, and compiling shifts of everything else takes minutes.
    """
    tile = TILE if length > TILE else 16
    return -(-length // tile) * tile
