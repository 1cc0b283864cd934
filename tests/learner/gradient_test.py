"""The group's gradient: against separate sequences, across microbatches, and its update."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import trees

from qlog import losses, models
from qlog.learner import forward, gradient, planning
from qlog.learner.blocks import plan_blocks
from qlog.learner.gradient import batch_gradient
from qlog.learner.optimizer import apply_update
from qlog.learner.packing import pack_rollouts
from qlog.learner.terms import measure_terms
from qlog.learner.trajectories import with_gold_answer, with_sampled_answer
from qlog.learner.types import LearnerBatch, Microbatch, Objective
from qlog.parallel import batch_placement, sharding
from qlog.records import Golds, Rollouts, TrainState, Trajectories

B, M, R = 4, 4, 7


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    prompts = tiny.prompts(lengths=(5, 3, 4, 6))
    tokens = jnp.asarray(rng.integers(5, tiny.VALID_VOCAB, (B, M, R)), jnp.int32)
    slots = np.arange(R)
    ends = rng.integers(1, 5, (B, M, 1))
    lengths = ends + rng.integers(1, 3, (B, M, 1))
    rationale = jnp.asarray((slots < ends) & (slots != 1))  # token 1 was forced
    trajectories = Trajectories(
        tokens,
        rationale,
        jnp.asarray((slots >= ends) & (slots < lengths)),
        jnp.asarray(rng.normal(size=(B, M, R)), jnp.float32),
        rationale,
        jnp.asarray(lengths[..., 0]),
    )
    score, path = jnp.asarray(rng.normal(size=(2, B, M)), jnp.float32)
    coefficients = losses.Coefficients(score, path, jnp.zeros((B, M)), jnp.ones((B, M)))
    return tiny.params(), prompts, trajectories, coefficients


def _gradient(batch, microbatch, policy=tiny.POLICY, temperature=1.0):
    params, prompts, trajectories, coefficients = batch
    return batch_gradient(
        params,
        policy,
        LearnerBatch(prompts, trajectories, coefficients),
        Objective(losses.linear(), temperature),
        Microbatch(*microbatch),
    )


def _assert_trees_close(got, wanted, tolerance=2e-5):
    trees.assert_close(got, wanted, atol=tolerance, scaled=True)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_group_equals_separate_sequences_in_value_and_gradient(batch, temperature):
    params, prompts, trajectories, coefficients = batch

    # One sequence per rollout: prompt, then rollout, then padding; no group, no caches.
    width = prompts.tokens.shape[1] + R
    sequences = np.zeros((B * M, 1, width), np.int32)
    masks = np.zeros((2, B * M, width), np.float32)
    weights = np.stack([coefficients.score, coefficients.path]).reshape(2, B * M, 1)
    for row, (b, m) in enumerate(np.ndindex(B, M)):
        start = int(prompts.lengths[b])
        sequences[row, 0, :start] = prompts.tokens[b, :start]
        length = int(trajectories.lengths[b, m])
        sequences[row, 0, start : start + length] = trajectories.tokens[b, m, :length]
        masks[0, row, start : start + R] = trajectories.rationale_mask[b, m]
        masks[1, row, start : start + R] = trajectories.answer_mask[b, m]

    @jax.jit
    def separate(params):
        hidden = models.extend(params, tiny.SHAPE, jnp.asarray(sequences))
        logits = (hidden @ models.unembedding(params).T)[:, 0, :-1, : tiny.VALID_VOCAB]
        picked = [
            jnp.take_along_axis(jax.nn.log_softmax(logits / t), sequences[:, 0, 1:, None], -1)[
                ..., 0
            ]
            for t in (temperature, 1.0)
        ]
        return -sum(
            (w * mask[:, 1:] * p).sum() for w, mask, p in zip(weights, masks, picked, strict=True)
        )

    loss, wanted = jax.value_and_grad(separate)(params)
    got, sums = _gradient(batch, (B, M), temperature=temperature)
    np.testing.assert_allclose(sums.surrogate.loss, loss, rtol=1e-4)
    tokens = trajectories.rationale_mask | trajectories.answer_mask
    assert float(sums.surrogate.tokens) == tokens.sum()
    assert float(sums.mismatch.num_tokens) == trajectories.was_sampled.sum()
    _assert_trees_close(got, jax.tree.map(lambda g: g / B, wanted))


@pytest.mark.parametrize("together", [0.0, 1e11])
@pytest.mark.parametrize("microbatch", [(1, 4), (4, 1), (2, 2)])
def test_results_do_not_depend_on_the_microbatch(batch, microbatch, together, monkeypatch):
    monkeypatch.setattr(planning, "_FLOPS_PER_PROGRAM", together)
    whole, sums = _gradient(batch, (B, M))
    got, other_sums = _gradient(batch, microbatch)
    _assert_trees_close(got, whole)
    # How many rows were computed for them is what a microbatch decides.
    assert other_sums.rows.needed == sums.rows.needed
    trees.assert_close(other_sums._replace(rows=sums.rows), sums, rtol=1e-5)


def test_packed_rollouts_follow_one_another_in_few_packs():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 20, (16, 32)), 100)
    is_needed = rng.random((16, 32)) < 0.8
    packing = jax.tree.map(
        np.asarray, jax.jit(pack_rollouts, static_argnums=2)(lengths, is_needed, 104)
    )
    assert (packing.pack[~is_needed] == -1).all()
    for b in range(16):
        grid = np.full((32, 104), 32)
        for m in np.flatnonzero(is_needed[b]):
            cells = grid[packing.pack[b, m], packing.offset[b, m] :][: lengths[b, m]]
            assert len(cells) == lengths[b, m] and (cells == 32).all(), (
                "inside its pack, on no other"
            )
            cells[:] = m
            own = packing.token[b, packing.pack[b, m], packing.offset[b, m] :][: lengths[b, m]]
            np.testing.assert_array_equal(own, np.arange(lengths[b, m]))
        np.testing.assert_array_equal(packing.rollout[b], grid)
        assert packing.num_packs[b] == (grid < 32).any(1).sum()
    needed = (lengths * is_needed).sum(1)
    assert (packing.num_packs <= np.ceil(needed / 104) + 1).all() and packing.num_packs.max() < 12


def test_rollouts_with_zero_coefficients_change_nothing_and_take_no_pack(batch):
    params, prompts, trajectories, coefficients = batch
    keep = jnp.asarray(np.random.default_rng(1).random((B, M)) < 0.4).at[2].set(False)
    some = coefficients._replace(score=coefficients.score * keep, path=coefficients.path * keep)
    cut = trajectories._replace(
        rationale_mask=trajectories.rationale_mask & keep[..., None],
        answer_mask=trajectories.answer_mask & keep[..., None],
    )
    wanted, _ = _gradient((params, prompts, cut, coefficients), (B, M))
    for microbatch in ((B, M), (1, 1)):
        got, sums = _gradient((params, prompts, trajectories, some), microbatch)
        _assert_trees_close(got, wanted)
    passed = keep.at[0, 0].set(True)[..., None]  # the one that always passes, for the mismatch
    assert float(sums.mismatch.num_tokens) == (trajectories.was_sampled & passed).sum()
    tokens = trajectories.rationale_mask | trajectories.answer_mask
    assert float(sums.surrogate.tokens) == (tokens & passed).sum()


@pytest.mark.parametrize("remat", ["dots", "attention", "full"])
def test_rematerialisation_changes_nothing(batch, remat):
    remat = dataclasses.replace(tiny.POLICY, remat=remat)
    _assert_trees_close(_gradient(batch, (B, M), remat)[0], _gradient(batch, (B, M))[0])


def test_the_mismatch_measures_sampler_against_learner(batch):
    params, prompts, trajectories, _ = batch
    context = forward.prompt_context(params, tiny.POLICY, prompts)
    packing = pack_rollouts(trajectories.lengths, jnp.ones((B, M), bool), R)
    new = forward.log_probs(params, tiny.POLICY, context, trajectories, packing, 1.0)
    difference = np.abs(new - trajectories.old_log_probs)[np.array(trajectories.was_sampled)]
    _, sums = _gradient(batch, (2, 2))
    np.testing.assert_allclose(sums.mismatch.sum, difference.sum(), rtol=1e-4)
    np.testing.assert_allclose(sums.mismatch.max, difference.max(), rtol=1e-4)
    np.testing.assert_allclose(sums.mismatch.sum_exp, np.exp(difference).sum(), rtol=1e-4)


def test_what_is_only_measured_cannot_spoil_the_gradient(batch):
    """The derivative of log at 0 is not finite; that of the loss is, and is the one that counts."""

    def measuring(coefficients, tokens):
        sums = losses.linear()(coefficients, tokens)
        return sums._replace(kl=jnp.log(tokens.new - jax.lax.stop_gradient(tokens.new)).sum())

    params, prompts, trajectories, coefficients = batch
    found, expected = (
        gradient.batch_gradient(
            params,
            tiny.POLICY,
            LearnerBatch(prompts, trajectories, coefficients),
            Objective(surrogate),
            Microbatch(B, M),
        )[0]
        for surrogate in (measuring, losses.linear())
    )
    # Two programs, which may add up in another order.
    trees.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_gold_answers_are_spliced_after_each_rationale():
    tokens = jnp.array([[[11, 12, 3, 21, 22, 0], [13, 3, 23, 0, 0, 0]]], jnp.int32)
    ends = jnp.array([[3, 2]], jnp.int32)
    sampled = jnp.array([[[1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0]]], bool)
    no = jnp.zeros((1, 2), bool)
    rollouts = Rollouts(tokens, tokens * -0.1, sampled, ends, ends + 2, no, no, no)
    gold, lengths = jnp.array([[31, 32, 33, 0]], jnp.int32), jnp.array([3], jnp.int32)
    out = with_gold_answer(rollouts, Golds(gold, lengths), 7)
    np.testing.assert_array_equal(out.tokens[0, 0, :6], [11, 12, 3, 31, 32, 33])
    np.testing.assert_array_equal(out.tokens[0, 1, :5], [13, 3, 31, 32, 33])
    np.testing.assert_array_equal(
        out.answer_mask[0], [[0, 0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0]]
    )
    np.testing.assert_array_equal(
        out.rationale_mask[0], [[1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(out.was_sampled, out.rationale_mask)
    out = with_sampled_answer(rollouts, 5)
    np.testing.assert_array_equal(out.tokens, tokens[..., :5])
    np.testing.assert_array_equal(out.answer_mask[0], [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]])


def test_a_non_finite_gradient_is_skipped_and_counted():
    optimizer = optax.apply_if_finite(optax.adam(0.1), 2**30)
    params = {"w": jnp.ones(3)}

    def fresh():
        copy = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), copy, optimizer.init(copy), ())

    bad = {"w": jnp.array([1.0, jnp.nan, 1.0])}
    state, metrics = apply_update(fresh(), (), bad, optimizer=optimizer)
    np.testing.assert_array_equal(state.params["w"], params["w"])
    assert metrics.skipped_updates == 1 and metrics.skipped_in_a_row == 1
    good = {"w": jnp.array([1.0, 1.0, 1.0])}
    state, metrics = apply_update(state, (), good, optimizer=optimizer)
    assert (state.params["w"] < params["w"]).all()
    assert metrics.skipped_updates == 1 and metrics.skipped_in_a_row == 0
    np.testing.assert_allclose(metrics.grad_norm, np.sqrt(3.0), rtol=1e-6)


def test_there_is_one_tree_of_gradients_however_many_microbatches(batch):
    """Temporaries of a program are less than the gradients, which add up in place."""
    shape = dataclasses.replace(tiny.SHAPE, num_layers=6, width=256, mlp_width=1024)
    policy = dataclasses.replace(tiny.POLICY, config=shape, remat="full")
    _, prompts, trajectories, coefficients = batch
    params = models.shapes(shape)
    learner_batch = LearnerBatch(prompts, trajectories, coefficients)
    lowered = gradient.add_microbatches.lower(
        *tiny.microbatch(params, policy, learner_batch, prompts=2),
        objective=Objective(losses.linear()),
        microbatch=Microbatch(2, 2),
    )
    memory = lowered.compile().memory_analysis()
    gradients = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    assert memory.temp_size_in_bytes < gradients


def test_the_two_terms_of_a_gradient_add_up_to_it(batch):
    params, prompts, trajectories, coefficients = batch
    objective, microbatch = Objective(losses.linear()), Microbatch(2, 2)
    whole, _ = _gradient(batch, (2, 2))
    none = jnp.zeros_like(coefficients.score)
    score, _ = _gradient(batch[:3] + (coefficients._replace(path=none),), (2, 2))
    path, _ = _gradient(batch[:3] + (coefficients._replace(score=none),), (2, 2))
    _assert_trees_close(jax.tree.map(jnp.add, score, path), whole)
    learned = LearnerBatch(prompts, trajectories, coefficients)
    terms = measure_terms(params, tiny.POLICY, learned, objective, microbatch, whole)
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (score, path)]
    norms = [np.linalg.norm(x) for x in flat]
    np.testing.assert_allclose([terms.score_norm, terms.path_norm], norms, rtol=1e-4)
    np.testing.assert_allclose(terms.cosine, flat[0] @ flat[1] / np.prod(norms), atol=1e-4)


@pytest.fixture(scope="module")
def uneven():
    """The batch, and its gradient from one microbatch of whole prompts on one device."""
    whole = tiny.uneven_batch(8, 4, 8)
    arguments = Objective(losses.linear()), Microbatch(8, 4)
    found = batch_gradient(tiny.params(), tiny.POLICY, jax.tree.map(jnp.asarray, whole), *arguments)
    return whole, found


@pytest.mark.parametrize(
    "mesh, prompts, packs", [(None, 4, 1), ((2, 2, 2), 4, 1), ((2, 2, 2), 8, 2)], ids=str
)
def test_blocks_on_several_shards_give_the_gradient_of_whole_prompts(
    mesh, prompts, packs, uneven, compilations
):
    batch, (wanted, wanted_sums) = uneven
    mesh = mesh and sharding.make_mesh(*mesh)
    num_shards = sharding.num_batch_shards(mesh) if mesh else 1
    policy, params = dataclasses.replace(tiny.POLICY, mesh=mesh), tiny.params()
    if mesh:
        params = jax.device_put(params, sharding.param_shardings(mesh, params))
    placed = batch_placement.put_batch(mesh, batch)
    objective, microbatch = Objective(losses.linear()), Microbatch(prompts, packs)
    got, sums = batch_gradient(params, policy, placed, objective, microbatch)
    _assert_trees_close(got, wanted)
    trees.assert_close(sums._replace(rows=wanted_sums.rows), wanted_sums, rtol=1e-5)

    # Prompt 2 fills four packs, the others one or two, prompt 5 none.
    num_packs = np.asarray(gradient.begin(params, policy, placed)[1].num_packs)
    assert num_packs[2] == 4 and num_packs[5] == 0
    settings = planning.plan_settings(policy.config, 6, 8, num_shards, microbatch)
    planned = plan_blocks(num_packs, settings)
    assert sums.rows.needed == num_packs.sum()
    assert sums.rows.executed == settings.work(planned).executed_rows
    _, places = np.nonzero((planned.prompt == 2) & (planned.num_packs > 0))
    assert len(places) > 1, "it is cut into blocks"
    if prompts == num_shards:
        assert len(set(places)) > 1, "they are on several shards"

    # Other lengths make another plan, of the same program.
    lengths = np.full_like(batch.trajectories.lengths, 2)
    even = batch._replace(trajectories=batch.trajectories._replace(lengths=lengths))
    placed, before = batch_placement.put_batch(mesh, even), compilations()
    batch_gradient(params, policy, placed, objective, microbatch)
    assert compilations() == before
