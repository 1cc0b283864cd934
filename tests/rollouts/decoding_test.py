"""Pools as they are compiled and kept: bytes of caches, and of what is held on the host."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from qlog.rollouts import decoding, moves, sampler
from qlog.rollouts.pool import NO_ROLLOUT, Level

SAMPLING = decoding.Sampling(9, 4, closing=(4, 3), eos=(1, 2), pad=0, with_answer=True)
M = 8


def _first_pool(policy, rollouts=M, slots=256):
    """The first pool of three prompts."""
    prompts, ids = tiny.prompts(), np.arange(3 * rollouts, dtype=np.int32).reshape(3, rollouts)
    keys = sampler.rollout_keys(jax.random.key(0), jnp.arange(3, dtype=jnp.uint32), rollouts)
    prefix = decoding.prefill(tiny.params(), policy, prompts.tokens, prompts.lengths)
    wave = decoding.Batch(prompts.tokens, prompts.lengths, keys, jnp.full(ids.shape, 9, jnp.int32))
    return decoding.initial_pool(policy, prefix, wave, jnp.asarray(ids), SAMPLING, slots)


def test_int8_caches_take_a_byte_per_number_and_a_scale_per_vector():
    """Of all pools, held rollouts too, and of what the compiled decode loop keeps."""

    def bytes_of(pool):
        return sum(
            x.size * x.dtype.itemsize
            for x in jax.tree.leaves((pool.suffix.layers, pool.prefix.keys, pool.prefix.values))
        )

    def compiled_bytes(policy, pool):
        lowered = decoding.decode.lower(
            decoding.decoding_weights(tiny.params(), policy),
            policy,
            pool,
            SAMPLING,
            1,
            jnp.zeros(1, bool),
        )
        memory = lowered.compile().memory_analysis()
        return memory.argument_size_in_bytes, memory.temp_size_in_bytes

    def held_bytes(pool):
        held = moves.Held(None, pool.keys)
        held.add(pool, np.asarray(pool.rollout_ids), np.ones(pool.done.shape, bool), step=200)
        return held.num_bytes

    sixteen = dataclasses.replace(tiny.POLICY, dtype=jnp.bfloat16)
    eight = dataclasses.replace(sixteen, cache="int8")
    full, small = _first_pool(sixteen), _first_pool(eight)
    size = tiny.SHAPE.head_dim
    assert bytes_of(small) / bytes_of(full) == (size + 4) / (2 * size) == eight.cache_itemsize / 2
    saved = bytes_of(full) - bytes_of(small)
    arguments, temporaries = compiled_bytes(sixteen, full)
    fewer_arguments, its_temporaries = compiled_bytes(eight, small)
    assert arguments - fewer_arguments == saved > 1e4
    assert its_temporaries < temporaries + saved / 2  # nothing is dequantised as a whole
    assert held_bytes(small) < 0.8 * held_bytes(full)


def test_what_went_on_is_held_no_more():
    """One rollout that stays keeps nothing of the others."""
    pool = _first_pool(tiny.POLICY, rollouts=4, slots=16)
    ids, held = np.asarray(pool.rollout_ids), moves.Held(None, pool.keys)
    held.add(pool, ids, np.ones(ids.shape, bool), step=4)
    before = held.num_bytes
    some = np.full((3, 4), NO_ROLLOUT, np.int32)
    some[:, :3] = ids[:, :3]
    some[2, 3] = ids[2, 3]
    held.pool(jax.eval_shape(lambda pool: pool, pool), some, Level(3, 4, 32), step=4)
    assert 0 < held.num_bytes < before / 3
    some[:] = NO_ROLLOUT
    some[:2, 0] = ids[:2, 3]
    held.pool(jax.eval_shape(lambda pool: pool, pool), some, Level(3, 4, 32), step=4)
    assert held.num_bytes == 0
