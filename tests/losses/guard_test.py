"""The guard: who has the word while log P rises, falls, comes back, or only wavers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlog import losses

KEY = jax.random.key(0)
WATCHED, FALLBACK = losses.garl(0.75), losses.paft(0.75)


def scores(log_p: float, spread: float = 0.1, seed: int = 0) -> losses.Scores:
    """Groups whose mean log wbar is `log_p`."""
    log_w = spread * np.random.default_rng(seed).normal(size=(4, 8))
    log_mean = np.log(np.exp(log_w).mean(1)).mean()
    return losses.Scores(jnp.asarray(log_w - log_mean + log_p, jnp.float32))


def play(transform, log_ps):
    """Whether the fallback has the word and the coefficients, after each batch; the last state."""
    step = jax.jit(functools.partial(losses.coefficients, transform))
    state = transform.init(scores(0.0))
    words, given = [], []
    for index, log_p in enumerate(log_ps):
        result, state = step(scores(log_p), state, key=jax.random.fold_in(KEY, index))
        words.append(bool(losses.measurements(state)["guard"]))
        given.append(result)
    return words, given, state


def test_the_fallback_has_the_word_from_the_drop_until_log_p_is_back():
    log_ps = [-8.0] * 10 + [-1.0] * 40 + [-6.0] * 15 + [-1.0] * 15
    words, given, state = play(losses.guarded(WATCHED, FALLBACK, drop=2.0), log_ps)
    assert not any(words[:51]) and all(words[55:66]) and not any(words[70:])
    assert np.abs(np.diff(words)).sum() == 2  # handed over once, and back once
    assert float(losses.measurements(state)["guard_drop"]) == 0
    for step in (20, 60, 75):
        transform = FALLBACK if words[step] else WATCHED
        key = jax.random.fold_in(KEY, step)
        alone, _ = losses.coefficients(
            transform, scores(log_ps[step]), transform.init(scores(0.0)), key=key
        )
        np.testing.assert_allclose(given[step].score, alone.score, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(given[step].path, alone.path, rtol=1e-5, atol=1e-8)


def test_one_batch_is_no_drop():
    log_ps = [-1.0] * 30 + [-6.0] + [-1.0] * 10
    assert not any(play(losses.guarded(WATCHED, FALLBACK, drop=2.0), log_ps)[0])


def test_batches_that_waver_are_no_drop():
    """Each step has other prompts: log P of -22 +- 6, at parameters that stay as they are."""
    log_ps = -22 + 6 * np.random.default_rng(0).normal(size=200)
    assert np.mean(play(losses.guarded(WATCHED, FALLBACK, drop=2.0), log_ps)[0]) < 0.05
    falling = log_ps - 0.5 * np.arange(200)
    assert np.mean(play(losses.guarded(WATCHED, FALLBACK, drop=2.0), falling)[0][100:]) == 1


@pytest.mark.parametrize("damage", [-jnp.inf, jnp.nan])
@pytest.mark.parametrize("groups", [1, 4])
def test_groups_and_batches_that_tell_nothing_change_nothing(damage, groups):
    step = jax.jit(functools.partial(losses.coefficients, losses.guarded(WATCHED, FALLBACK)))
    state = losses.guarded(WATCHED, FALLBACK).init(scores(0.0))
    words = []
    for log_p in [-1.0] * 20 + [None] + [-1.0] * 10 + [-15.0] * 10:
        given = scores(-1.0 if log_p is None else log_p)
        if log_p is None:
            given = losses.Scores(given.log_w.at[:groups].set(damage))
        result, state = step(given, state, key=KEY)
        words.append(bool(losses.measurements(state)["guard"]))
        if log_p is not None:
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(result))
    assert not any(words[:32]) and all(words[36:])


def test_devices_agree_on_the_whole_batch():
    transform = losses.guarded(WATCHED, FALLBACK, drop=2.0)
    good, bad = scores(-1.0), scores(-9.0)
    # One device's half of the batch has dropped by far, the other's has not.
    mixed = losses.Scores(jnp.concatenate([good.log_w[:2], bad.log_w[2:]]))

    def run(first, second, axis_name=None):
        step = lambda part: (
            lambda _, before: losses.coefficients(
                transform, part, before[1], key=KEY, axis_name=axis_name
            )
        )
        carried = step(first)(0, (None, transform.init(first)))
        carried = jax.lax.fori_loop(0, 19, step(first), carried)
        result, state = jax.lax.fori_loop(0, 10, step(second), carried)
        return result, losses.measurements(state)

    whole, measured = run(good, mixed)
    split = lambda batch: losses.Scores(batch.log_w.reshape(2, 2, 8))
    on_devices = jax.vmap(functools.partial(run, axis_name="data"), axis_name="data")
    halves, their = on_devices(split(good), split(mixed))
    assert float(measured["guard"]) == 1
    np.testing.assert_array_equal(their["guard"], [1, 1])
    np.testing.assert_allclose(their["guard_drop"], measured["guard_drop"], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(halves.score.reshape(4, 8), whole.score, rtol=1e-5, atol=1e-8)


def test_the_recipe_has_a_schedule_and_its_measurements():
    recipe = losses.build("guarded_garl", q=1.0, q_schedule="linear", q_end=0.0, q_steps=4, drop=1)
    transform = recipe.transform
    state = transform.init(scores(-1.0))
    seen = []
    step = jax.jit(functools.partial(losses.coefficients, transform))
    for log_p in (-1.0,) * 20 + (-9.0,) * 10:
        _, state = step(scores(log_p), state, key=KEY)
        measured = losses.measurements(state)
        seen.append((float(measured["q"]), float(measured["guard"])))
    assert [q for q, _ in seen][:5] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert not any(on for _, on in seen[:20]) and seen[-1][1] == 1
    calm = losses.build("guarded_garl", q=0.5).transform
    garl = losses.build("garl", q=0.5).transform
    one, _ = losses.coefficients(calm, scores(-3.0), calm.init(scores(0.0)), key=KEY)
    two, _ = losses.coefficients(garl, scores(-3.0), garl.init(scores(0.0)), key=KEY)
    np.testing.assert_array_equal(one.score, two.score)
