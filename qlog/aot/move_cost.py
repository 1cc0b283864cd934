"""What a pool's move to another size costs on a slice that is not here, read from its programs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlog.aot import hlo, hlo_cost
from qlog.aot.compiler import compile_lowered
from qlog.experiment import Experiment
from qlog.models.attention import quantised
from qlog.parallel import sharding
from qlog.parallel.chips import Chip
from qlog.rollouts import balance, moves
from qlog.rollouts.balance import Shards
from qlog.rollouts.schedule import Moved


class MoveCost(NamedTuple):
    """Of one move of all caches, on one chip."""

    sent: dict[str, float]  # bytes over the interconnect, by kind of collective
    bytes: float  # read from and written to HBM

    def seconds(self, chip: Chip) -> float:
        """One after the other: a program sends what it has read, then writes it."""
        return sum(self.sent.values()) / chip.link_speed + self.bytes / chip.hbm_speed


def move_cost(experiment: Experiment, moved: Moved, shards: Shards) -> MoveCost:
    """Compiles the moves of one layer's caches, which all layers repeat.

    Args:
      experiment: on the devices of a topology.
      moved: the sizes, and the rounds that a schedule had.
    """
    shape, mesh = experiment.policy.config, experiment.mesh
    old, new = moved.old, moved.new
    prompt_slots = experiment.config.data.max_prompt_tokens
    exchange = balance.no_exchange(shards, old, new)
    kv_heads, size = shape.num_kv_heads, shape.head_dim
    lanes = (shards.number * old.num_blocks, kv_heads, old.lanes_per_block, old.slots, size)
    prompts = (shards.number * old.num_blocks, kv_heads, prompt_slots, size)
    routes = {}
    for kind, out, into, index in (
        ("lanes", exchange.lanes_out, exchange.lanes_in, (new.num_blocks, new.lanes_per_block)),
        ("blocks", exchange.blocks_out, exchange.blocks_in, (new.num_blocks,)),
    ):
        places = (_split(mesh, out.shape), _split(mesh, into.shape))
        index = _split(mesh, (shards.number * index[0], *index[1:]))
        routes[kind] = moves.Route(*places, index, _rounds(mesh, exchange))
    # As the pool holds them: an array each, or numbers and their scales.
    dtype = experiment.policy.cache_dtype
    of_lanes, of_prompts = (
        jax.tree.leaves(jax.eval_shape(lambda shape=shape: quantised.empty(shape, dtype)))
        for shape in (lanes, prompts)
    )
    programs = [
        *(
            moves.take_lanes.lower(
                mesh, shards, new.slots, routes["lanes"], _split(mesh, x.shape, x.dtype)
            )
            for x in of_lanes
        ),
        *(
            moves.take_blocks.lower(mesh, shards, routes["blocks"], _split(mesh, x.shape, x.dtype))
            for x in of_prompts
        ),
    ]
    # Each bit has a loop; on average over the bits it runs so many rounds.
    rounds = moved.rounds / max(1, len(shards.bits))

    def trips(loop: hlo_cost.DataLoop) -> float:
        return rounds if loop.scope == "exchange_rounds" else hlo_cost.all_slices(loop)

    total = hlo_cost.Cost()
    for lowered in programs:
        text = compile_lowered(lowered).as_text() or ""
        # Keys and values, of all layers.
        total = total.plus(hlo_cost.module_cost(hlo.Module(text), trips), 2 * shape.num_layers)
    return MoveCost(dict(total.sent), total.bytes)


def _split(mesh: Any, shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    """An array that is split over shards."""
    array = jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding_of(mesh, array))


def _rounds(mesh: Any, exchange: balance.Exchange) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        np.shape(exchange.num_rounds), jnp.int32, sharding=sharding.replicated(mesh)
    )
