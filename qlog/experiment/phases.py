"""The memory that each phase of a run needs, by arithmetic.

Each number is a lower bound: only arrays that lie in memory together while the phase runs, whatever
the compiler does. What programs need besides (temporaries, padding, fragments) is left out.

| phase    | lies in the memory of one device                                                 |
|----------|----------------------------------------------------------------------------------|
| decode   | the state, the weights as decoding reads them, the first pool's caches, a step's |
|          | logits of all lanes, the rollouts of the step                                    |
| gradient | the state, a gradient like the parameters, what the backward pass keeps of a     |
|          | microbatch, the rollouts of the step                                             |
| evaluate | as decode, of evaluation's prompts                                               |
| load     | the parameters                                                                   |

The state is the parameters and AdamW's moments (where something is trained), and the parameters of
the reference (where the loss has one).

Next to accelerators, a host holds what a checkpoint has of it, from when a save begins until all is
written (`checkpoint_bytes`).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from qlog import data, models
from qlog.data.pipeline import Lengths, bucket
from qlog.experiment.parts import BATCHES_PER_CALL, EvaluationCalls, Experiment
from qlog.parallel import sharding
from qlog.rollouts import decoding, pool, sampler
from qlog.rollouts.decoding import Sampling
from qlog.rollouts.pool import Level

_FLOAT32 = 4  # bytes
_TOKEN = 4  # bytes, int32


class Phase(NamedTuple):
    """A phase of a run, and what lies in the memory of one device while it runs."""

    name: str  # decode, gradient, evaluate or load, as `--mode=compile` names its programs
    of_model: dict[str, float]  # bytes by what they are: what no setting but the model changes
    of_batch: dict[str, float]  # bytes, likewise: what depends on prompts, rollouts and lengths

    @property
    def bytes(self) -> float:
        """At least so many on one device."""
        return sum(self.of_model.values()) + sum(self.of_batch.values())


def phases(experiment: Experiment, train: bool, evaluate: bool) -> list[Phase]:
    """What each phase needs at least.

    Where the experiment has its data, batches have their widths. Before that, the smallest ones
    that there are.

    Args:
      train: whether something is trained.
      evaluate: whether something is evaluated.
    """
    estimator, params = experiment.estimator, experiment.abstract_params()
    state = {"parameters": bytes_per_device(params)}
    if train:
        state["moments"] = bytes_per_device(experiment.abstract_state().opt_state)
    if train and estimator.reference:
        state["reference"] = state["parameters"]
    names = []
    if train and estimator.rationale == "sampled":
        names.append("decode")
    if train:
        names.append("gradient")
    if evaluate:
        names.append("evaluate")
    return [phase(name, experiment, state) for name in names or ["load"]]


def phase(name: str, experiment: Experiment, state: dict[str, float]) -> Phase:
    """What the phase of that name needs at least.

    Args:
      state: what lies there in any case, or `Phase.of_model` of an experiment with the same model.
    """
    if name == "load":
        return Phase(name, state, {})
    of_name = {"decode": _training_decode, "gradient": _gradient, "evaluate": _evaluation_decode}
    return of_name[name](experiment, state)


def bytes_per_device(tree: Any) -> float:
    """Bytes of a tree of shapes with shardings, on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def checkpoint_bytes(experiment: Experiment) -> float:
    """Bytes of all of a checkpoint: the parameters and the optimizer's moments, once."""
    leaves = jax.tree.leaves(experiment.abstract_state())
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _training_decode(experiment: Experiment, state: dict[str, float]) -> Phase:
    prompts, in_memory = prompts_of_shard(experiment)
    return _decode(
        "decode",
        experiment,
        state,
        experiment.sampling,
        prompts,
        in_memory,
        experiment.rollouts_per_prompt,
        batch_widths(experiment.config, experiment.train_data).prompt,
    )


def prompts_of_shard(experiment: Experiment) -> tuple[int, int]:
    """Prompts of a step on one shard, and how many of them fit with rollouts at their longest."""
    config = experiment.config
    prompts = config.train.prompts_per_step // sharding.num_batch_shards(experiment.mesh)
    return prompts, config.rollout.prompts_per_wave or prompts


def _evaluation_decode(experiment: Experiment, state: dict[str, float]) -> Phase:
    """A call of the fewest bytes: of one batch or several, with memory for the caches of one."""
    config, dataset = experiment.config.evaluation, experiment.evaluation_data
    prompts = 1
    if dataset is not None:
        total = min(config.prompts or len(dataset), len(dataset))
        shards = sharding.num_batch_shards(experiment.mesh)
        prompts = EvaluationCalls.of(total, shards, config.prompts_per_batch).per_shard
    calls = [
        _decode(
            "evaluate",
            experiment,
            state,
            experiment.evaluation_sampling,
            batches * prompts,
            prompts,
            config.rollouts_per_prompt,
            batch_widths(experiment.config, dataset).prompt,
        )
        for batches in range(1, BATCHES_PER_CALL + 1)
    ]
    return min(calls, key=lambda call: call.bytes)


def _decode(
    name: str,
    experiment: Experiment,
    state: dict[str, float],
    sampling: Sampling,
    prompts: int,
    in_memory: int,
    num_rollouts: int,
    width: int,
) -> Phase:
    """A call of the sampler.

    Args:
      prompts: of a shard.
      in_memory: of these, how many fit with all rollouts at their longest.
      num_rollouts: per prompt, M.
      width: P, slots of a prompt.
    """
    policy, tensor = experiment.policy, experiment.mesh.shape["tensor"]
    shape = sampler.shape_of(sampling, prompts, num_rollouts, width, in_memory)
    # ---- The pool that a wave starts with, the largest in lanes ----
    at_once = pool.prompts_per_wave(shape)
    start = Level(at_once, num_rollouts, shape.fitting_slots(at_once, num_rollouts))
    done = _results(experiment, sampling)
    weights = state["weights"] if "weights" in state else _decoding_weights(experiment)
    # A lane has no score: its rollout gets one when it is done, and leaves the pool.
    of_lanes = start.num_lanes * _bytes_of_one(experiment, done.rollouts)
    of_results = prompts * num_rollouts * _bytes_of_one(experiment, done)
    return Phase(
        name,
        state | {"weights": weights},
        {
            "caches": shape.size(start) * bytes_per_slot(experiment, policy.cache_dtype),
            # Each token is chosen from all logits of its lane: they are an array, for once.
            "logits": start.num_lanes * policy.config.vocab_size * _FLOAT32 / tensor,
            "rollouts": of_results + of_lanes,
            "prompts": prompts * width * _TOKEN,
        },
    )


def _gradient(experiment: Experiment, state: dict[str, float]) -> Phase:
    """A microbatch at its fullest, as `learner.gradient` computes it."""
    config, policy, shape = experiment.config, experiment.policy, experiment.policy.config
    shards = sharding.num_batch_shards(experiment.mesh)
    widths = batch_widths(config, experiment.train_data)
    slots = experiment.trajectory_length(widths.rationale, widths.gold)
    microbatch = experiment.microbatch.narrowed(slots, shards)
    prompts = microbatch.prompts // shards
    # Whatever is computed again (`train.remat`): the input of each layer is kept. The first one's
    # are embeddings, which the compiler may look up again.
    per_token = (shape.num_layers - 1) * shape.width * jnp.dtype(policy.dtype).itemsize
    tokens = prompts * (widths.prompt + microbatch.packs * slots)
    of_batch = {
        "activations": tokens * per_token,
        # Keys and values of the prompts, and gradients of both.
        "caches": 2 * prompts * widths.prompt * bytes_per_slot(experiment, policy.dtype),
    }
    whole = config.train.prompts_per_step // shards
    of_batch["prompts"] = whole * widths.prompt * _TOKEN
    if experiment.estimator.rationale == "sampled":
        of_rollout = _bytes_of_one(experiment, _results(experiment, experiment.sampling))
        of_batch["rollouts"] = whole * experiment.rollouts_per_prompt * of_rollout
    return Phase("gradient", state | {"gradient": state["parameters"]}, of_batch)


def batch_widths(config: ConfigDict, dataset: data.Dataset | None) -> Lengths:
    """What the dataset's batches are padded to; without one the least that there can be."""
    if dataset is not None:
        return dataset.widths
    return Lengths(
        prompt=bucket(1, config.data.max_prompt_tokens),
        gold=bucket(1, config.rollout.answer_reserve),
        rationale=1,
    )


def _decoding_weights(experiment: Experiment) -> float:
    """Bytes of `decoding.decoding_weights`, which lie next to the parameters that they are of."""
    params, itemsize = experiment.abstract_params(), jnp.dtype(experiment.policy.dtype).itemsize
    # Where nothing is rounded, the tables are those of the parameters. Layers are taken out of
    # their stack, so each is a copy in any case.
    leaves = jax.tree.leaves(params if itemsize < _FLOAT32 else params["layers"])
    return sum(leaf.size for leaf in leaves) * itemsize / experiment.mesh.shape["tensor"]


def bytes_per_slot(experiment: Experiment, dtype: DTypeLike) -> float:
    """Bytes of all layers' caches for one token of one sequence, on one device.

    Args:
      dtype: of keys and values; with int8 go their scales.
    """
    policy, tensor = experiment.policy, experiment.mesh.shape["tensor"]
    one_layer = dataclasses.replace(policy.config, num_layers=1)  # all layers have the same
    suffix = jax.eval_shape(lambda: models.empty_suffix(one_layer, 1, 1, 1, dtype))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(suffix.layers))
    # Heads are split over the tensor axis where it divides them.
    parts = tensor if policy.config.num_kv_heads % tensor == 0 else 1
    return policy.config.num_layers * size / parts


def _results(experiment: Experiment, sampling: Sampling) -> decoding.Results:
    """Shapes of where rollouts are put when they are done: one rollout of each shard."""
    shards = sharding.num_batch_shards(experiment.mesh)
    return decoding.empty_results.eval_shape(experiment.policy, sampling, shards, 1)


def _bytes_of_one(experiment: Experiment, one_each: Any) -> float:
    """Bytes of one rollout in arrays that hold one of each shard, as `_results` makes them."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one_each))
    return size / sharding.num_batch_shards(experiment.mesh)
