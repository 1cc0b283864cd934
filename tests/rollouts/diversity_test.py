"""Entropy, repetition and distinct answers, against counting by hand and exact entropies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlog.records import Rollouts
from qlog.rollouts import diversity
from qlog.rollouts.token_choice import choose_token

B, M, R = 3, 4, 24


def random_rollouts(seed: int, vocab: int = 3) -> Rollouts:
    rng = np.random.default_rng(seed)
    rationale = rng.integers(1, 14, (B, M))
    lengths = rationale + rng.integers(1, R - 14, (B, M))
    place = np.arange(R)
    is_token = place < lengths[..., None]
    forced = rng.random((B, M)) < 0.3
    is_sampled = is_token & ~(forced[..., None] & (place == rationale[..., None] - 1))
    return Rollouts(
        # padding is garbage: it must have no effect
        tokens=jnp.asarray(rng.integers(0, vocab, (B, M, R)), jnp.int32),
        log_probs=jnp.asarray(-rng.random((B, M, R)), jnp.float32),
        is_sampled=jnp.asarray(is_sampled),
        rationale_lengths=jnp.asarray(rationale, jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        forced=jnp.asarray(forced),
        ended_early=jnp.zeros((B, M), bool),
        complete=jnp.ones((B, M), bool),
    )


def counted(rollouts: Rollouts) -> dict[str, float]:
    """The same numbers, one rollout after the other."""
    entropies, shares, distinct = {"rationale": [], "answer": []}, [], []
    for b in range(B):
        answers = set()
        for m in range(M):
            end, length = int(rollouts.rationale_lengths[b, m]), int(rollouts.lengths[b, m])
            tokens = np.asarray(rollouts.tokens[b, m]).tolist()
            for t in range(length):
                if rollouts.is_sampled[b, m, t]:
                    part = "rationale" if t < end else "answer"
                    entropies[part].append(-float(rollouts.log_probs[b, m, t]))
            grams = [tuple(tokens[t : t + 4]) for t in range(end - 3)]
            if grams:
                shares.append(1 - len(set(grams)) / len(grams))
            answers.add(tuple(tokens[end:length]))
        distinct.append(len(answers))
    return {
        "entropy/rationale": float(np.mean(entropies["rationale"])),
        "entropy/answer": float(np.mean(entropies["answer"])),
        "repetition": float(np.mean(shares)),
        "distinct_answers": float(np.mean(distinct)),
    }


@pytest.mark.parametrize("vocab", [1, 2, 3, 150_000])
@pytest.mark.parametrize("seed", range(3))
def test_equals_counting(seed, vocab):
    rollouts = random_rollouts(seed, vocab)
    found = {name: float(x) for name, x in diversity.measure(rollouts, True).items()}
    assert found == pytest.approx(counted(rollouts), rel=1e-5, abs=1e-6)


def test_without_answers_only_rationales_are_measured():
    assert diversity.measure(random_rollouts(0), False).keys() == {
        "entropy/rationale",
        "repetition",
    }


def test_no_rationale_is_long_enough():
    rollouts = random_rollouts(0)._replace(rationale_lengths=jnp.full((B, M), 3, jnp.int32))
    assert float(diversity.measure(rollouts, True)["repetition"]) == 0


def test_entropy_is_that_of_the_distribution():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 50)) * 2, jnp.float32)
    number = 50_000
    keys = jax.random.split(jax.random.key(0), (number, 1))
    tokens, log_probs = choose_token(jnp.broadcast_to(logits, (number, 1, 50)), keys, 1.0)
    ones = jnp.ones((number, 1, 1), bool)
    length = jnp.ones((number, 1), jnp.int32)
    rollouts = Rollouts(
        tokens[..., None], log_probs[..., None], ones, length, length, *[ones[..., 0]] * 3
    )
    found = float(diversity.measure(rollouts, False)["entropy/rationale"])
    log_p = np.asarray(jax.nn.log_softmax(logits)).ravel().astype(float)
    exact = -(np.exp(log_p) * log_p).sum()
    spread = np.sqrt((np.exp(log_p) * log_p**2).sum() - exact**2) / np.sqrt(number)
    assert abs(found - exact) < 5 * spread
