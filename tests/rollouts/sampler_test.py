"""Rollouts: caches against plain forward passes, budgets, keys, and how tokens are chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qlog.models import head
from qlog.records import Golds
from qlog.rollouts import pool, sampler
from qlog.rollouts.token_choice import choose_token

END, EOS, PAD = 3, (1, 2), 0
SAMPLING = sampler.Sampling(
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
    rollouts, log_w, _ = _sample(tree, prompts, keys, sampling)
    np.testing.assert_allclose(log_w, whole.log_w, rtol=1e-5)
    np.testing.assert_array_equal(rollouts.lengths, rollouts.rationale_lengths)
    np.testing.assert_array_equal(rollouts.rationale_lengths, whole.rollouts.rationale_lengths)
    for b, m in np.ndindex(rollouts.lengths.shape):
        n = int(rollouts.lengths[b, m])
        np.testing.assert_array_equal(rollouts.tokens[b, m, :n], whole.rollouts.tokens[b, m, :n])


def _same(samples, others, prompts=slice(None)):
    """Equal but for the rounding of log-probabilities; `prompts`: those of `others` to compare."""
    mine, theirs = samples.rollouts, _at(others.rollouts, prompts)
    for name in set(mine._fields) - {"log_probs"}:
        np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name), err_msg=name)
    np.testing.assert_allclose(mine.log_probs, theirs.log_probs, atol=1e-5)
    np.testing.assert_allclose(samples.log_w, others.log_w[prompts], rtol=1e-5)


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


def _lane_steps(lengths, slots, prompt_slots, num_shards=1):
    """Lanes times steps that the sampler's loop executes on rollouts [B, M] of given lengths."""
    num_prompts, num_rollouts = lengths.shape
    sizes = pool.levels(num_prompts // num_shards, num_rollouts, slots, prompt_slots)
    schedule = pool.PoolSchedule(num_prompts, num_rollouts, sizes, num_shards)
    step = executed = 0
    while True:
        ids = schedule.rollout_ids
        ends = np.where(ids == pool.NO_ROLLOUT, 0, lengths.ravel()[ids % lengths.size])
        before, step = step, step + sampler.STEPS_PER_LOOK
        executed += ids.size * (min(step, ends.max()) - before)
        going = ends > step
        if not going.any():
            return executed
        for plan in schedule.shrink(going):
            _check_plan(plan, ids, going, num_shards, num_rollouts)
            ids = plan.rollout_ids
            going = ids != pool.NO_ROLLOUT


def _check_plan(plan, ids, going, num_shards, num_rollouts):
    """What goes on is there once, next to rollouts of the same prompt, on the same shard."""
    kept = plan.rollout_ids[plan.rollout_ids != pool.NO_ROLLOUT]
    np.testing.assert_array_equal(np.sort(kept), np.sort(ids[going]))
    old = ids.reshape(num_shards, -1)
    new = plan.rollout_ids.reshape(num_shards, -1, plan.rollout_ids.shape[1])
    for shard in range(num_shards):
        real = new[shard] != pool.NO_ROLLOUT
        lane = plan.lane.reshape(new.shape)[shard]
        np.testing.assert_array_equal(old[shard][lane[real]], new[shard][real])
        prompt_of_block = np.where(real, new[shard] // num_rollouts, -1).max(1)
        assert (real <= (new[shard] // num_rollouts == prompt_of_block[:, None])).all()
        parent = plan.parent.reshape(num_shards, -1)[shard]
        first = old[shard].reshape(-1, ids.shape[1])[parent]
        holds = (first // num_rollouts == prompt_of_block[:, None]).any(1)
        assert holds[prompt_of_block >= 0].all()


@pytest.mark.parametrize("mean", [200, 700, 1500])
@pytest.mark.parametrize("prompts", [4, 32])
def test_long_tails_cost_at_most_a_third_more_than_is_needed(prompts, mean):
    """Geometric lengths cut at 2944; waiting for the longest would cost 2 to 15 times as much."""
    rng = np.random.default_rng(mean)
    for _ in range(3):
        lengths = np.minimum(rng.geometric(1 / mean, (prompts, 32)), 2944)
        assert _lane_steps(lengths, 2944, 1351) <= 1.3 * lengths.sum()


def test_shards_keep_their_rollouts():
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / 700, (32, 32)), 2944)
    executed = _lane_steps(lengths, 2944, 1351, num_shards=8)
    assert executed < 2 * lengths.sum() < 0.6 * 32 * 32 * lengths.max()


def test_smaller_pools_never_need_more_memory():
    for prompts, rollouts, slots, prompt_slots in (
        (1, 32, 256, 4096),
        (4, 8, 2944, 512),
        (2, 16, 64, 1024),
    ):
        sizes = pool.levels(prompts, rollouts, slots, prompt_slots)
        memory = [s.num_blocks * (prompt_slots + s.lanes_per_block * slots) for s in sizes]
        assert max(memory) == memory[0]
    assert len(pool.levels(4, 8, 16, 24)) == 1


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


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_follow_the_softmax(temperature):
    num_tokens, vocab = 40_000, 50
    logits = jnp.asarray(np.random.default_rng(0).normal(size=vocab) * 2, jnp.float32)
    logits = logits.at[40:].set(-jnp.inf)
    keys = jax.random.split(jax.random.key(0), (num_tokens, 1))
    tokens, log_probs = jax.jit(choose_token, static_argnums=2)(
        jnp.broadcast_to(logits, (num_tokens, 1, vocab)), keys, temperature
    )
    probabilities = np.array(jax.nn.softmax(logits / temperature))
    counts = np.bincount(np.array(tokens).ravel(), minlength=vocab)
    assert not counts[40:].any()
    chi_square = (
        (counts[:40] - num_tokens * probabilities[:40]) ** 2 / (num_tokens * probabilities[:40])
    ).sum()
    assert chi_square < 39 + 5 * np.sqrt(2 * 39)  # five standard deviations
    np.testing.assert_allclose(
        log_probs[:, 0], np.log(np.maximum(probabilities, 1e-30))[tokens[:, 0]], atol=1e-5
    )


@pytest.mark.parametrize(
    ("top_k", "top_p", "inside"),
    [(3, 1.0, 4), (0, 0.6, 2), (20, 0.9, 4), (2, 0.5, 1), (0, 1e-6, 1)],
)
def test_truncated_tokens_follow_the_renormalised_distribution(top_k, top_p, inside):
    probabilities = np.array([0.05, 0.3, 0.4, 0.1, 0.1, 0.05])  # the two of 0.1 tie
    logits = jnp.log(jnp.broadcast_to(probabilities, (20_000, 1, 6))).astype(jnp.float32) * 0.5
    keys = jax.random.split(jax.random.key(1), (20_000, 1))
    tokens, log_probs = choose_token(logits, keys, 0.5, top_k, top_p)
    kept = np.where(np.isin(np.arange(6), [2, 1, 3, 4][:inside]), probabilities, 0)
    kept /= kept.sum()
    shares = np.bincount(np.array(tokens).ravel(), minlength=6) / 20_000
    assert np.abs(shares - kept).max() < 0.02 and not shares[kept == 0].any()
    np.testing.assert_allclose(log_probs[:, 0], np.log(kept[tokens[:, 0]]), atol=1e-5)


def test_greedy_takes_the_most_likely_token():
    logits = jnp.array([[[0.0, 3.0, 1.0]]])
    token, log_prob = choose_token(logits, jax.random.split(jax.random.key(0), (1, 1)), 0.0)
    assert token[0, 0] == 1
    np.testing.assert_allclose(log_prob[0, 0], jax.nn.log_softmax(logits)[0, 0, 1])


def test_log_probs_in_chunks_equal_the_plain_ones_in_value_and_gradient():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 11, 16)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(32, 16)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 29, (2, 11)), jnp.int32)
    temperature = jnp.asarray(rng.uniform(0.5, 2, (2, 11)), jnp.float32)

    def plain(hidden, table):
        logits = (hidden @ table[:29].T) / temperature[..., None]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]

    def chunked(hidden, table):
        return head.token_log_probs(
            hidden, table, targets, valid_vocab=29, temperature=temperature, chunk=4
        )

    np.testing.assert_allclose(chunked(hidden, table), plain(hidden, table), atol=1e-5)
    weight = jnp.asarray(rng.normal(size=(2, 11)), jnp.float32)
    for wanted, got in zip(
        jax.grad(lambda *a: (weight * plain(*a)).sum(), (0, 1))(hidden, table),
        jax.grad(lambda *a: (weight * chunked(*a)).sum(), (0, 1))(hidden, table),
        strict=True,
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
