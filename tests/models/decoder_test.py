"""The four passes of the decoder agree with a plain forward pass over separate sequences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import trees
from models_fixtures import CONFIGS, jit, random_params

from qlog import models
from qlog.errors import ConfigError
from qlog.models.attention import Segment, blocks

B, M, P, R, A = 2, 3, 9, 7, 4
LENGTHS = np.array([9, 5])


def families(*names):
    return pytest.mark.parametrize("config", [CONFIGS[name] for name in names], ids=names)


def random_tokens():
    rng = np.random.default_rng(0)
    return (rng.integers(0, 40, shape) for shape in ((B, P), (B, M, R), (B, M, A)))


def separate(params, config, tokens, remat="none"):
    """The reference: [N, 1, T] right-padded sequences from position 0, no cache of any kind."""
    return models.extend(params, config, tokens, execution=models.Execution(remat=remat))


def as_sequences(prompts, continuations, lengths):
    """Prompt, then `lengths` tokens of each part: [B * M, 1, T], and where the last part starts."""
    total = P + sum(part.shape[-1] for part in continuations)
    tokens, starts = np.zeros((B * M, 1, total), np.int32), np.zeros((B, M), np.int32)
    for b in range(B):
        for m in range(M):
            row = list(prompts[b, : LENGTHS[b]])
            for part, size in zip(continuations, lengths, strict=True):
                starts[b, m] = len(row)
                row += list(part[b, m, : size[b, m]])
            tokens[b * M + m, 0, : len(row)] = row
    return tokens, starts


def continuation_of(hidden, starts, size):
    """[B * M, 1, T, D] -> [B, M, size, D], from each sequence's start on."""
    index = starts[..., None] + np.arange(size)
    return jnp.take_along_axis(hidden.reshape(B, M, *hidden.shape[-2:]), index[..., None], axis=2)


@families("qwen3", "gemma3", "smollm3")
def test_group_is_m_separate_sequences_in_values_and_gradients(config):
    params = random_params(config)
    prompts, rollouts, _ = random_tokens()
    cotangent = np.random.default_rng(2).normal(size=(B, M, R, config.width))
    tokens, starts = as_sequences(prompts, [rollouts], [np.full((B, M), R)])

    @jax.value_and_grad
    def group(params):
        prefix = models.prefill(params, config, jnp.asarray(prompts), jnp.asarray(LENGTHS))
        hidden = models.extend(params, config, rollouts, prefix=prefix)
        return (hidden * cotangent).sum()

    @jax.value_and_grad
    def one_by_one(params):
        hidden = separate(params, config, tokens, remat="full")
        return (continuation_of(hidden, starts, R) * cotangent).sum()

    value, gradient = jit(group)(params)
    expected, expected_gradient = jit(one_by_one)(params)
    np.testing.assert_allclose(value, expected, atol=1e-4)
    gradient, expected_gradient = jax.device_get((gradient, expected_gradient))
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_gradient))
    close = functools.partial(np.testing.assert_allclose, atol=1e-5 * scale)
    jax.tree.map(close, gradient, expected_gradient)


@pytest.mark.parametrize("remat", ["none", "dots"])
@pytest.mark.parametrize("unrolled", [0, 4])
def test_prompts_compute_of_the_last_layer_only_keys_and_values(monkeypatch, remat, unrolled):
    """Its other weights may be broken: they reach neither the caches nor any gradient."""
    monkeypatch.setattr(models.decoder, "_UNROLLED_LAYERS", unrolled)
    params, (prompts, *_) = tiny.params(), random_tokens()
    broken = {"o_proj", "mlp_norm", "gate_proj", "up_proj", "down_proj"}
    layers = {
        name: jax.tree.map(lambda x: x.at[-1].set(jnp.nan), tree) if name in broken else tree
        for name, tree in params["layers"].items()
    }
    assert broken < set(layers)

    @jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def prefill(params):
        arrays = jnp.asarray(prompts % tiny.VALID_VOCAB), jnp.asarray(LENGTHS)
        prefix = models.prefill(params, tiny.SHAPE, *arrays, models.Execution(remat=remat))
        return (prefix.keys**2).sum() + (prefix.values**3).sum(), prefix

    (_, prefix), gradient = prefill(params)
    (_, same), same_gradient = prefill(params | {"layers": layers})
    trees.assert_equal((prefix, gradient), (same, same_gradient))
    assert all(
        np.abs(gradient["layers"][name]["kernel"][0]).max() > 0 for name in broken - {"mlp_norm"}
    )


@families("qwen3", "gemma3", "windowed", "smollm3")
def test_cached_decode_and_score_equal_the_full_forward(config):
    params = random_params(config)
    prompts, rollouts, answers = random_tokens()
    prefill = jit(models.prefill, static_argnums=1)
    prefix = prefill(params, config, jnp.asarray(prompts), jnp.asarray(LENGTHS))

    @jit
    def decode(suffix, slot, tokens):
        return models.decode_step(params, config, tokens, prefix, suffix, slot)

    suffix, decoded = models.empty_suffix(config, B, M, R + 2, jnp.float32), []
    for slot in range(R):
        hidden, suffix = decode(suffix, slot, rollouts[..., slot])
        decoded.append(hidden)
    # Answers follow rationales of unequal lengths, the shortest of no token at all.
    kept = np.array([[R, 3, 1], [0, 5, 6]])
    scored = jit(models.score_step, static_argnums=1)(
        params, config, answers, prefix, suffix._replace(lengths=jnp.asarray(kept))
    )

    full = jit(separate, static_argnums=1)
    parts, sizes = [rollouts, answers], [np.full((B, M), R), np.zeros((B, M), int)]
    tokens, starts = as_sequences(prompts, parts, sizes)
    expected = continuation_of(full(params, config, tokens), starts - R, R)
    np.testing.assert_allclose(jnp.stack(decoded, 2), expected, atol=1e-4)
    tokens, starts = as_sequences(prompts, parts, [kept, np.full((B, M), A)])
    expected = continuation_of(full(params, config, tokens), starts, A)
    np.testing.assert_allclose(scored, expected, atol=1e-4)


def test_a_window_of_w_sees_w_tokens_its_own_included():
    config = dataclasses.replace(CONFIGS["windowed"], num_layers=1)
    params = random_params(config)
    tokens = np.arange(12)[None, None].repeat(12, axis=0)
    tokens[np.arange(12), 0, np.arange(12)] += 20  # sequence i differs in token i
    last = jit(separate, static_argnums=1)(params, config, tokens)[:, 0, -1]
    changed = np.abs(last - last[0]).max(-1) > 1e-6
    assert changed.tolist() == [False] * 7 + [True] * 5


@pytest.mark.parametrize("layers", [1, 2], ids=["known when compiling", "chosen in a scan"])
def test_without_rope_the_order_of_what_is_seen_does_not_matter(layers):
    """Alone; as one of two layers, the other of which has RoPE but adds nothing to the stream."""
    cycle = (False,) if layers == 1 else (False, True)
    config = dataclasses.replace(CONFIGS["qwen3"], num_layers=layers, layer_rope=cycle)
    params = random_params(config)
    for name in ("o_proj", "down_proj"):
        kernel = params["layers"][name]["kernel"]
        params["layers"][name]["kernel"] = kernel.at[1:].set(0)
    forward = jit(models.extend, static_argnums=1)
    tokens = np.stack([np.arange(12), [3, 1, 10, 4, 2, 6, 0, 5, 9, 7, 8, 11]])[:, None]
    with_rope = dataclasses.replace(config, layer_rope=(True,))
    ordered, shuffled = forward(params, config, tokens)[:, 0, -1]
    np.testing.assert_allclose(ordered, shuffled, atol=1e-5)
    ordered, shuffled = forward(params, with_rope, tokens)[:, 0, -1]
    assert np.abs(ordered - shuffled).max() > 1e-3


def dense_attention(queries, segments):
    """The plain formula: all scores at once, one softmax over all segments."""
    scores, values = [], []
    for keys, its_values, start, stop, _ in segments:
        slots = np.arange(keys.shape[2])
        visible = (start[..., None] <= slots) & (slots < stop[..., None])
        score = jnp.einsum("bknc,bktc->bknt", queries, keys)
        scores.append(jnp.where(visible[:, None], score, -jnp.inf))
        values.append(its_values)
    weights = jax.nn.softmax(jnp.concatenate(scores, -1), axis=-1)
    return jnp.einsum("bknt,bktc->bknc", weights, jnp.concatenate(values, 2))


@pytest.mark.parametrize("sizes", [(40, (70, 30)), (24, (24,))], ids=str)
def test_attention_in_blocks_equals_the_plain_formula_in_value_and_gradient(sizes):
    """Rows and slots that fill no block, intervals of all kinds, one segment partly unseen."""
    attend = functools.partial(blocks.attend, blocks=blocks.Blocks(16, 32, 32))
    count, slots = sizes
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    queries, cotangent = normal(2, 2, count, 4), normal(2, 2, count, 4)
    caches = [(normal(2, 2, n, 4), normal(2, 2, n, 4)) for n in slots]
    intervals = []
    for n in slots:
        ends = np.sort(rng.integers(0, n + 1, (2, 2, count)), axis=0).astype(np.int32)
        intervals.append((ends[0], np.maximum(ends[1], ends[0] + (len(slots) == 1))))
    intervals[0] = (
        np.minimum(intervals[0][0], slots[0] - 1),
        np.maximum(intervals[0][1], intervals[0][0] + 1),
    )

    def loss(attend, queries, caches):
        segments = [Segment(*cache, *ends) for cache, ends in zip(caches, intervals, strict=True)]
        return (attend(queries, segments) * cotangent).sum()

    run = lambda attend: jit(jax.value_and_grad(functools.partial(loss, attend), (0, 1)))(
        queries, caches
    )
    trees.assert_close(run(attend), run(dense_attention), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("length", [6, 20], ids=["several runs a block", "a run fills blocks"])
def test_runs_side_by_side_change_nothing(length):
    """Five runs over a shared prefix, slots of their own before, and their own tokens."""
    runs, heads, batch = 5, 2, 2
    count, rng = runs * length, np.random.default_rng(0)
    normal = lambda slots: jnp.asarray(rng.normal(size=(batch, heads, slots, 4)), jnp.float32)
    run, token = np.divmod(np.arange(count)[None], length)
    seen = rng.integers(0, 8, (batch, runs))[:, run[0]]
    intervals = [
        (np.zeros((batch, count), int), np.repeat([[9], [3]], count, 1)),
        (7 * run + seen // 2, 7 * run + seen),
        (length * run + token // 3, length * run + token + 1),
    ]
    caches = [(normal(n), normal(n)) for n in (9, 7 * runs, count)]
    queries, cotangent = normal(count), normal(count)

    def results(runs):
        def out(queries, caches):
            segments = [
                Segment(*cache, *map(jnp.int32, ends), 1 if i == 0 else runs)
                for i, (cache, ends) in enumerate(zip(caches, intervals, strict=True))
            ]
            return blocks.attend(queries, segments, blocks.Blocks(16, 4, 4))

        value, back = jax.vjp(out, queries, caches)
        return value, back(cotangent)

    several, one = (jit(results, static_argnums=0)(n) for n in (runs, 1))
    trees.assert_close(several, one, rtol=2e-5, atol=2e-5)


def test_attention_stores_no_array_of_queries_by_keys():
    """The compiled gradient's temporary memory grows with the length, not with its square."""

    def temporaries(length):
        shape = jax.ShapeDtypeStruct((1, 1, length, 16), jnp.float32)
        at = np.arange(length, dtype=np.int32)[None]
        loss = lambda q, k, v: blocks.attend(q, [Segment(q, k, 0 * at, at + 1)]).sum()
        compiled = jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 2.5 * temporaries(4096) < 2**26


def test_bfloat16_activations_keep_float32_parameters_and_stay_close():
    config = CONFIGS["gemma3"]
    params = random_params(config)
    tokens = next(random_tokens())[:, None]
    forward = jit(models.extend, static_argnums=1, static_argnames="execution")
    in_bfloat16 = models.Execution(jnp.bfloat16)
    hidden = forward(params, config, tokens, execution=in_bfloat16)
    prefix = jax.eval_shape(
        lambda: models.prefill(params, config, tokens[:, 0], jnp.asarray(LENGTHS), in_bfloat16)
    )
    assert hidden.dtype == prefix.keys.dtype == prefix.values.dtype == jnp.bfloat16
    exact = forward(params, config, tokens)
    assert np.abs(hidden.astype(jnp.float32) - exact).mean() < 0.05 * np.abs(exact).mean()


@families("qwen3", "gemma3")
def test_decoding_and_scoring_on_int8_caches_are_one_distribution(config):
    """Tokens that are decoded one by one, and the same ones scored together behind a rollout."""
    params = random_params(config)
    prompts, rollouts, answers = random_tokens()
    prefill = jit(models.prefill, static_argnums=1, static_argnames="cache_dtype")
    arrays = params, config, jnp.asarray(prompts), jnp.asarray(LENGTHS)
    prefix = prefill(*arrays, cache_dtype=jnp.int8)
    exact = prefill(*arrays)
    for cache, full in zip(prefix[:2], exact[:2], strict=True):
        assert cache.values.dtype == jnp.int8
        # What is kept is rounded, what was computed with it was not.
        off = np.abs(np.asarray(cache.values) * np.asarray(cache.scale) - full)
        assert np.all(off <= 0.5001 * np.asarray(cache.scale))

    @jit
    def decode(prefix, suffix, slot, tokens):
        return models.decode_step(params, config, tokens, prefix, suffix, slot)

    def decoded(prefix, dtype):
        suffix, hidden = models.empty_suffix(config, B, M, R + A, dtype), []
        for slot, tokens in enumerate(np.concatenate([rollouts, answers], -1).transpose(2, 0, 1)):
            one, suffix = decode(prefix, suffix, slot, tokens)
            hidden.append(one)
        return suffix, jnp.stack(hidden, 2)[:, :, R:]

    suffix, found = decoded(prefix, jnp.int8)
    assert {str(x.dtype) for x in jax.tree.leaves(suffix.layers)} == {"int8", "float32"}
    scored = jit(models.score_step, static_argnums=1)(
        params, config, answers, prefix, suffix._replace(lengths=jnp.full((B, M), R))
    )
    np.testing.assert_allclose(found, scored, atol=1e-4)
    _, full = decoded(exact, jnp.float32)
    difference = np.abs(found - full)
    assert 1e-3 < difference.max() and difference.mean() < 0.05 * np.abs(full).mean()


def test_casting_the_weights_before_changes_nothing():
    prompts, tree = tiny.prompts(), tiny.params()
    cast = models.decoding_weights(tree, jnp.bfloat16)
    assert cast["embed"].dtype == jnp.bfloat16 and cast["final_norm"].dtype == jnp.float32
    execution = models.Execution(jnp.bfloat16)
    prefix = models.prefill(tree, tiny.SHAPE, prompts.tokens, prompts.lengths, execution)
    suffix = models.empty_suffix(tiny.SHAPE, 3, 2, 4, jnp.bfloat16)
    before, after = (
        models.decode_step(t, tiny.SHAPE, prompts.tokens[:, :2], p, suffix, 0, execution)[0]
        for t, p in ((tree, prefix), (cast, models.unstack(prefix)))
    )
    np.testing.assert_array_equal(before, after)


def test_what_is_kept_is_not_multiplied_again():
    tree, tokens = tiny.params(), jnp.ones((1, 1, 4), jnp.int32)

    def products(remat):
        def total(tree):
            execution = models.Execution(remat=remat)
            return models.extend(tree, tiny.SHAPE, tokens, execution=execution).sum()

        return jax.jit(jax.grad(total)).lower(tree).as_text().count("stablehlo.dot_general")

    assert products("none") <= products("dots") < products("attention") < products("full")


def test_parameters_that_are_not_finite_are_named():
    params = tiny.params()
    assert models.check_finite(params, "x") is params
    scale = params["layers"]["q_proj"]["kernel"]
    params["layers"]["q_proj"]["kernel"] = scale.at[1, 0, 0].set(jnp.nan)
    params["embed"] = params["embed"].at[3, 3].set(jnp.inf)
    with pytest.raises(
        ConfigError, match="x: embed, layers/q_proj/kernel hold numbers that are not"
    ):
        models.check_finite(params, "x")
