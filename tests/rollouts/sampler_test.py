"""Rollouts: caches against plain forward passes, budgets, keys, a pool that shrinks."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qlog.parallel import batch_placement, sharding
from qlog.records import Golds
from qlog.rollouts import decoding, moves, sampler

END, EOS, PAD = 3, (1, 2), 0
SAMPLING = decoding.Sampling(
    rationale_budget=9, answer_reserve=4, closing=(4, END), eos=EOS, pad=PAD, with_answer=True
)
M = 8


GOLDS = Golds(
    jnp.array([[5, 6, 1], [7, 1, 0], [8, 9, 1]], jnp.int32), jnp.array([3, 2, 3], jnp.int32)
)


def _sample(tree, prompts, keys, sampling=SAMPLING, golds=GOLDS, **options):
    return sampler.sample(
        tree, tiny.POLICY, prompts.tokens, prompts.lengths, keys, golds, sampling, **options
    )


@pytest.fixture(scope="module")
def drawn():
    tree, prompts = tiny.params(), tiny.prompts()
    keys = sampler.rollout_keys(jax.random.key(1), jnp.array([7, 8, 9], jnp.uint32), M)
    return tree, prompts, keys, _sample(tree, prompts, keys)


def _at(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


def _each(drawn):
    """(parameters, prompt, rollout) of each rollout."""
    tree, prompts, _, samples = drawn
    for b, m in np.ndindex(samples.log_w.shape):
        yield tree, prompts.tokens[b, : prompts.lengths[b]], _at(samples.rollouts, (b, m))


def test_decode_with_caches_equals_the_full_forward(drawn):
    compared = 0
    for tree, prompt, one in _each(drawn):
        n = int(one.lengths)
        expected = tiny.full_log_probs(tree, prompt, one.tokens[:n])
        mask = np.array(one.is_sampled[:n])
        np.testing.assert_allclose(
            np.array(one.log_probs[:n])[mask], np.array(expected)[mask], atol=1e-4
        )
        assert not np.array(one.log_probs[:n])[~mask].any()
        compared += mask.sum()
    assert compared > 100


def test_every_rollout_follows_the_table_of_cases(drawn):
    seen = set()
    for _, _, one in _each(drawn):
        tokens, sampled = np.array(one.tokens).tolist(), np.array(one.is_sampled).tolist()
        end, n = int(one.rationale_lengths), int(one.lengths)
        rationale, answer = tokens[:end], tokens[end:n]
        assert rationale[-1] == END and END not in rationale[:-1]
        assert all(t == PAD for t in tokens[n:]) and not any(sampled[n:])
        assert all(sampled[end:n]) and 1 <= len(answer) <= SAMPLING.answer_reserve
        assert bool(one.complete) == (answer[-1] in EOS)
        assert not any(t in EOS for t in answer[:-1])
        assert bool(one.complete) or len(answer) == SAMPLING.answer_reserve
        if one.forced or one.ended_early:
            assert rationale[-2:] == list(SAMPLING.closing)
            assert sampled[: end - 2] == [True] * (end - 2) and not any(sampled[end - 2 : end])
        if one.forced:
            assert end == SAMPLING.rationale_budget + 2
            seen.add("forced")
        elif one.ended_early:
            assert rationale[-3] in EOS and not any(t in EOS for t in rationale[:-3])
            seen.add("ended early")
        else:
            assert all(sampled[:end]) and end <= SAMPLING.rationale_budget
            seen.add("natural")
        seen.add("complete" if one.complete else "truncated")
    assert seen == {"forced", "ended early", "natural", "complete", "truncated"}


def test_gold_answers_scored_on_the_caches_equal_the_full_forward(drawn):
    log_w = drawn[-1].log_w
    for (b, m), (tree, prompt, one) in zip(np.ndindex(log_w.shape), _each(drawn), strict=True):
        answer = GOLDS.tokens[b, : GOLDS.lengths[b]]
        context = jnp.concatenate([prompt, one.tokens[: one.rationale_lengths]])
        expected = tiny.full_log_probs(tree, context, answer).sum()
        np.testing.assert_allclose(log_w[b, m], expected, rtol=1e-4)


def test_stopping_at_the_thinking_end_gives_the_same_rationales(drawn):
    tree, prompts, keys, whole = drawn
    sampling = dataclasses.replace(SAMPLING, with_answer=False)
    rollouts, log_w, _, tokens = _sample(tree, prompts, keys, sampling)
    assert tokens is None  # only their sum is kept
    np.testing.assert_allclose(log_w, whole.log_w, rtol=1e-5)
    np.testing.assert_array_equal(rollouts.lengths, rollouts.rationale_lengths)
    np.testing.assert_array_equal(rollouts.rationale_lengths, whole.rollouts.rationale_lengths)
    for b, m in np.ndindex(rollouts.lengths.shape):
        n = int(rollouts.lengths[b, m])
        np.testing.assert_array_equal(rollouts.tokens[b, m, :n], whole.rollouts.tokens[b, m, :n])


def test_tokens_of_gold_answers_are_kept_where_they_are_asked_for(drawn):
    """In waves, too: they add up to log w, and what is behind the answer's end is 0."""
    tree, prompts, keys, whole = drawn
    sampling = dataclasses.replace(SAMPLING, gold_tokens=GOLDS.tokens.shape[1])
    for extra in ({}, {"prompts_per_wave": 1}):
        samples = _sample(tree, prompts, keys, sampling, **extra)
        found = np.asarray(samples.gold_log_probs)
        assert found.shape == (*samples.log_w.shape, GOLDS.tokens.shape[1])
        np.testing.assert_allclose(found.sum(-1), whole.log_w, rtol=1e-4)
        is_gold = np.arange(found.shape[-1]) < np.asarray(GOLDS.lengths)[:, None, None]
        assert np.all(found[~np.broadcast_to(is_gold, found.shape)] == 0)
        tree_, prompt, one = next(_each((*drawn[:3], samples)))
        context = jnp.concatenate([prompt, one.tokens[: one.rationale_lengths]])
        answer = GOLDS.tokens[0, : GOLDS.lengths[0]]
        expected = tiny.full_log_probs(tree_, context, answer)
        np.testing.assert_allclose(found[0, 0, : len(answer)], expected, atol=1e-4)


def _same(samples, others, prompts=slice(None), atol=1e-5):
    """Equal but for the rounding of log-probabilities; `prompts`: those of `others` to compare."""
    mine, theirs = samples.rollouts, _at(others.rollouts, prompts)
    for name in set(mine._fields) - {"log_probs"}:
        np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name), err_msg=name)
    np.testing.assert_allclose(mine.log_probs, theirs.log_probs, atol=atol)
    np.testing.assert_allclose(samples.log_w, others.log_w[prompts], rtol=1e-5, atol=atol - 1e-5)


def test_samples_do_not_depend_on_the_batch_or_on_waves(drawn):
    tree, prompts, keys, whole = drawn
    order = jnp.array([2, 0])
    some_prompts, some_keys, some_golds = _at((prompts, keys, GOLDS), order)
    _same(_sample(tree, some_prompts, some_keys, golds=some_golds), whole, order)
    _same(_sample(tree, prompts, keys, prompts_per_wave=1), whole)


def test_a_shrinking_pool_gives_the_same_rollouts_and_compiles_once(drawn, compilations):
    """Ragged lengths visit the pool's sizes in any order; a rehearsal has compiled them all."""
    tree, prompts, keys, *_ = drawn
    sampling = dataclasses.replace(SAMPLING, rationale_budget=70)
    whole = _sample(tree, prompts, keys, sampling, shrink=False)
    shrunk = _sample(tree, prompts, keys, sampling, rehearse=True, steps_per_look=4)
    _same(shrunk, whole)
    lengths = np.array(whole.rollouts.lengths)
    assert whole.lane_steps == lengths.size * lengths.max()
    assert lengths.sum() <= shrunk.lane_steps < 0.75 * whole.lane_steps

    others = [tiny.prompts(lengths=(2 + seed, 6, 1), seed=seed) for seed in range(3)]
    uids = jnp.arange(3, dtype=jnp.uint32)
    keys = [sampler.rollout_keys(jax.random.key(seed), uids, M) for seed in range(3)]
    before = compilations()
    for other, its_keys in zip(others, keys, strict=True):
        _sample(tree, other, its_keys, sampling, steps_per_look=4)
    assert compilations() == before


LONGEST = 300


def _uneven(prompts, mesh=None, wave=0, budget=None, cache="auto", **options):
    """Samples of many prompts with rationales of planted lengths, from one token to the longest.

    No token that ends a rationale can be sampled.
    """
    last = tiny.VALID_VOCAB - 1
    policy = dataclasses.replace(tiny.POLICY, mesh=mesh, valid_vocab=last, cache=cache)
    sampling = decoding.Sampling(LONGEST, 4, closing=(last,), eos=(), pad=0)
    rng, put = np.random.default_rng(0), functools.partial(batch_placement.put_batch, mesh)
    tokens = rng.integers(5, last, (prompts, 6)).astype(np.int32)
    lengths = rng.integers(1, 7, prompts).astype(np.int32)
    gold = rng.integers(5, 20, (prompts, 3)).astype(np.int32)
    budgets = rng.exponential(rng.gamma(1, LONGEST / 3, (prompts, 1)), (prompts, 4))
    budgets = np.full(budgets.shape, budget) if budget else budgets.clip(0, LONGEST)
    golds = Golds(*put((gold, np.full(prompts, 3, np.int32))))
    keys = sampler.rollout_keys(jax.random.key(5), put(np.arange(prompts, dtype=np.uint32)), 4)
    return sampler.sample(
        tiny.params(),
        policy,
        *put((tokens, lengths)),
        keys,
        golds,
        sampling,
        wave,
        budgets=put(budgets.astype(np.int32)),
        **options,
    )


# Prompts, the mesh, and how many prompts fit to the last slot on all shards together.
PODS = [
    pytest.param(8, None, 1, id="one device"),
    pytest.param(8, (2, 1, 2), 2, id="two shards with tensor parallelism"),
    pytest.param(16, (2, 4, 1), 8, id="eight shards", marks=pytest.mark.slow),
    pytest.param(12, (6, 1, 1), 6, id="six shards", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("prompts, mesh, wave", PODS)
@pytest.mark.parametrize(
    "budget, cache",
    [
        pytest.param(None, "auto", id="uneven"),
        pytest.param(LONGEST, "auto", id="all at the budget"),
        pytest.param(None, "int8", id="uneven in int8", marks=pytest.mark.slow),
    ],
)
def test_rollouts_are_the_same_wherever_they_are_decoded(
    prompts, mesh, wave, budget, cache, compilations, monkeypatch
):
    """They change lanes, shards and pools, or wait in the host's memory: nothing is seen of it."""
    held = []
    add = moves.Held.add
    monkeypatch.setattr(
        moves.Held, "add", lambda self, *args: (held.append(args[2].sum()), add(self, *args))
    )
    devices = jax.devices()[: math.prod(mesh)] if mesh else None
    mesh = sharding.make_mesh(*mesh, devices=devices) if mesh else None
    whole = _uneven(prompts, budget=budget, cache=cache, shrink=False)
    moved = _uneven(prompts, mesh, wave, budget, cache, rehearse=True)
    # A number that lies between two int8 ones is rounded up on one device, down on another.
    _same(moved, whole, atol=1e-5 if cache == "auto" else 5e-3)
    assert sum(held) > 0
    assert moved.lane_steps < (0.7 if budget is None else 1.02) * whole.lane_steps
    # The rehearsal has compiled the programs of pools that are put together from held rollouts.
    before = compilations()
    _uneven(prompts, mesh, wave, LONGEST // 2 + 9, cache)
    assert compilations() == before


INT8 = dataclasses.replace(tiny.POLICY, cache="int8")


@pytest.mark.slow
def test_int8_rollouts_are_the_same_on_two_shards_and_however_they_move(monkeypatch):
    """Numbers and scales of a cache move, wait and are split over heads together."""
    held = []
    add = moves.Held.add
    monkeypatch.setattr(
        moves.Held, "add", lambda self, *args: (held.append(args[2].sum()), add(self, *args))
    )
    mesh = sharding.make_mesh(2, 1, 2, devices=jax.devices()[:4])
    _same(_uneven(8, mesh, 2, cache="int8"), _uneven(8, cache="int8", shrink=False), atol=5e-3)
    assert sum(held) > 0


def test_int8_rollouts_are_scored_as_they_were_sampled():
    """The gold answer being the one that was sampled, log w is its log-probability."""
    tree, prompts = tiny.params(), tiny.prompts()
    keys = sampler.rollout_keys(jax.random.key(1), jnp.array([7, 8, 9], jnp.uint32), 1)

    def sample(policy, golds):
        return sampler.sample(tree, policy, *prompts[:2], keys, golds, SAMPLING)

    first = sample(INT8, GOLDS)
    ends, lengths = first.rollouts.rationale_lengths[:, 0], first.rollouts.lengths[:, 0]
    slots = jnp.clip(ends[:, None] + jnp.arange(4), 0, SAMPLING.max_length - 1)
    answers = jnp.take_along_axis(first.rollouts.tokens[:, 0], slots, 1)
    again = sample(INT8, Golds(answers, lengths - ends))
    np.testing.assert_array_equal(first.rollouts.tokens, again.rollouts.tokens)
    in_answer = np.arange(SAMPLING.max_length) >= np.asarray(ends)[:, None]
    expected = (np.asarray(first.rollouts.log_probs)[:, 0] * in_answer).sum(1)
    np.testing.assert_allclose(again.log_w[:, 0], expected, atol=1e-4)


def test_int8_log_probabilities_are_close_to_those_of_full_precision(drawn):
    tree, prompts, keys, exact = drawn
    found = sampler.sample(tree, INT8, *prompts[:2], keys, GOLDS, SAMPLING)
    same = np.asarray(found.rollouts.tokens == exact.rollouts.tokens)
    same = np.logical_and.accumulate(same, -1)  # up to the first token that differs
    assert same.mean() > 0.8
    difference = np.abs(np.asarray(found.rollouts.log_probs - exact.rollouts.log_probs))[same]
    assert 1e-5 < difference.mean() < 0.02


def test_keys_depend_only_on_prompt_and_rollout():
    key = jax.random.key(3)
    uids = jnp.array([5, 6, 5], jnp.uint32)
    keys = jax.random.key_data(sampler.rollout_keys(key, uids, 4))
    np.testing.assert_array_equal(keys[0], keys[2])
    np.testing.assert_array_equal(
        keys[:, :2], jax.random.key_data(sampler.rollout_keys(key, uids, 2))
    )
    assert len(np.unique(keys[:2].reshape(8, -1), axis=0)) == 8


def test_a_budget_of_zero_means_no_rationale(drawn):
    tree, prompts, keys, *_ = drawn
    sampling = dataclasses.replace(SAMPLING, rationale_budget=0, closing=(END,))
    rollouts, *_ = _sample(tree, prompts, keys, sampling)
    assert (rollouts.tokens[..., 0] == END).all() and rollouts.forced.all()
    assert (rollouts.rationale_lengths == 1).all() and rollouts.is_sampled[..., 1].all()
