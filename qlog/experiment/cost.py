"""What a run takes, by arithmetic: before anything is fetched, allocated or compiled.

Memory is counted by phase of a step, for one device, and each number is a lower bound: only arrays
that lie in memory together while the phase runs, whatever the compiler does. What programs need
besides (temporaries, padding, fragments) is left out. So a run that is refused here cannot be held,
and one that is not refused may still be too large: `--mode=compile` asks the compiler.

What a device has is what this host and JAX say, unless QLOG_MEMORY is set: the bytes of one device.

| phase    | lies in memory                                                                   |
|----------|----------------------------------------------------------------------------------|
| decode   | the state, the weights as decoding reads them, the first pool's caches, a step's |
|          | logits of all lanes, the rollouts of the step                                    |
| gradient | the state, a gradient like the parameters, what the backward pass keeps of a     |
|          | microbatch, the rollouts of the step                                             |
| evaluate | as decode, of evaluation's prompts                                               |
| load     | the parameters                                                                   |

The state is the parameters and AdamW's moments (where something is trained), and the parameters of
the reference (where the loss has one).
"""

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from qlog import data, models
from qlog.config import schema
from qlog.data.pipeline import Lengths, bucket
from qlog.errors import ConfigError
from qlog.experiment.parts import BATCHES_PER_CALL, Experiment
from qlog.parallel import chips, distributed, sharding
from qlog.rollouts import pool, sampler
from qlog.rollouts.pool import Level
from qlog.rollouts.sampler import Sampling

_FLOAT32 = 4  # bytes
_TOKEN = 4  # bytes, int32
_VARIABLE = "QLOG_MEMORY"  # of the environment: bytes of one device, whatever is found
_ROOT = pathlib.Path("/")
_VERBS = {
    "decode": "decoding",
    "gradient": "the gradient",
    "evaluate": "evaluation",
    "load": "loading the model",
}


class Device(Protocol):
    """What is asked of a `jax.Device`."""

    @property
    def device_kind(self) -> str: ...

    def memory_stats(self) -> dict[str, int] | None: ...


class Phase(NamedTuple):
    """A phase of a run, and what lies in the memory of one device while it runs."""

    name: str  # decode, gradient, evaluate or load, as `--mode=compile` names its programs
    of_model: dict[str, float]  # bytes by what they are: what no setting but the model changes
    of_batch: dict[str, float]  # bytes, likewise: what depends on prompts, rollouts and lengths

    @property
    def bytes(self) -> float:
        """At least so many on one device."""
        return sum(self.of_model.values()) + sum(self.of_batch.values())


class Room(NamedTuple):
    """The memory of one device."""

    bytes: float
    where: str  # for messages: "this host has 25.2 GB"


# ---- What is needed ----


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
    found = []
    if train and estimator.rationale == "sampled":
        found.append(_training_decode(experiment, state))
    if train:
        found.append(_gradient(experiment, state))
    if evaluate:
        found.append(_evaluation_decode(experiment, state))
    return found or [Phase("load", state, {})]


def bytes_per_device(tree: Any) -> float:
    """Bytes of a tree of shapes with shardings, on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _training_decode(experiment: Experiment, state: dict[str, float]) -> Phase:
    config = experiment.config
    prompts = config.train.prompts_per_step // sharding.num_batch_shards(experiment.mesh)
    in_memory = config.rollout.prompts_per_wave or prompts
    width = _widths(config, experiment.train_data).prompt
    return _decode(
        "decode",
        experiment,
        state,
        experiment.sampling,
        prompts,
        in_memory,
        experiment.rollouts_per_prompt,
        width,
    )


def _evaluation_decode(experiment: Experiment, state: dict[str, float]) -> Phase:
    """A call of the fewest bytes: of one batch or several, with memory for the caches of one."""
    config, dataset = experiment.config.evaluation, experiment.evaluation_data
    # As `evaluation.sample_answers` cuts batches: not more prompts than questions.
    prompts = 1
    if dataset is not None:
        total = min(config.prompts or len(dataset), len(dataset))
        prompts = -(-total // sharding.num_batch_shards(experiment.mesh))
    prompts = min(config.prompts_per_batch, prompts)
    calls = [
        _decode(
            "evaluate",
            experiment,
            state,
            experiment.evaluation_sampling,
            batches * prompts,
            prompts,
            config.rollouts_per_prompt,
            _widths(experiment.config, dataset).prompt,
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
    # A lane has no score: its rollout gets one when it is done, and leaves the pool.
    of_lanes = start.num_lanes * _bytes_of_one(experiment, done.rollouts)
    of_results = prompts * num_rollouts * _bytes_of_one(experiment, done)
    return Phase(
        name,
        state | {"weights": _decoding_weights(experiment)},
        {
            "caches": shape.size(start) * _bytes_per_slot(experiment, policy.cache_dtype),
            # Each token is chosen from all logits of its lane: they are an array, for once.
            "logits": start.num_lanes * policy.config.vocab_size * _FLOAT32 / tensor,
            "rollouts": of_results + of_lanes,
            "prompts": prompts * width * _TOKEN,
        },
    )


def _gradient(experiment: Experiment, state: dict[str, float]) -> Phase:
    """A microbatch at its fullest, as `learner.gradient` computes it."""
    config, policy, shape = experiment.config, experiment.policy, experiment.policy.config
    shards, widths = (
        sharding.num_batch_shards(experiment.mesh),
        _widths(config, experiment.train_data),
    )
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
        "caches": 2 * prompts * widths.prompt * _bytes_per_slot(experiment, policy.dtype),
    }
    whole = config.train.prompts_per_step // shards
    of_batch["prompts"] = whole * widths.prompt * _TOKEN
    if experiment.estimator.rationale == "sampled":
        of_rollout = _bytes_of_one(experiment, _results(experiment, experiment.sampling))
        of_batch["rollouts"] = whole * experiment.rollouts_per_prompt * of_rollout
    return Phase("gradient", state | {"gradient": state["parameters"]}, of_batch)


def _widths(config: ConfigDict, dataset: data.Dataset | None) -> Lengths:
    """What the dataset's batches are padded to; without one the least that there can be."""
    if dataset is not None:
        return dataset.widths
    return Lengths(
        prompt=bucket(1, config.data.max_prompt_tokens),
        gold=bucket(1, config.rollout.answer_reserve),
        rationale=1,
    )


def _decoding_weights(experiment: Experiment) -> float:
    """Bytes of `sampler.decoding_weights`, which lie next to the parameters that they are of."""
    params, itemsize = experiment.abstract_params(), jnp.dtype(experiment.policy.dtype).itemsize
    # Where nothing is rounded, the tables are those of the parameters. Layers are taken out of
    # their stack, so each is a copy in any case.
    leaves = jax.tree.leaves(params if itemsize < _FLOAT32 else params["layers"])
    return sum(leaf.size for leaf in leaves) * itemsize / experiment.mesh.shape["tensor"]


def _bytes_per_slot(experiment: Experiment, dtype: DTypeLike) -> float:
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


def _results(experiment: Experiment, sampling: Sampling) -> sampler.Results:
    """Shapes of where rollouts are put when they are done: one rollout of each shard."""
    shards = sharding.num_batch_shards(experiment.mesh)
    return sampler.empty_results.eval_shape(experiment.policy, sampling, shards, 1)


def _bytes_of_one(experiment: Experiment, one_each: Any) -> float:
    """Bytes of one rollout in arrays that hold one of each shard, as `_results` makes them."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one_each))
    return size / sharding.num_batch_shards(experiment.mesh)


# ---- What there is ----


def room(mesh: Mesh) -> Room | None:
    """The memory of this process's smallest device; None where that is not known.

    Devices of a CPU share the memory of the host.

    Raises:
      ConfigError: QLOG_MEMORY is no number of bytes.
    """
    here = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    if not here:
        return None
    if text := os.environ.get(_VARIABLE):
        told = _told(text)
        return Room(told, f"{_VARIABLE} says {size_text(told)}")
    if here[0].platform == "cpu":
        total = host_memory()
        if total is None:
            return None
        shared = f" for {len(here)} devices" if len(here) > 1 else ""
        return Room(total / len(here), f"this host has {size_text(total)}{shared}")
    found = [limit for device in here if (limit := device_memory(device))]
    if not found:
        return None
    return Room(min(found), f"{here[0].device_kind} has {size_text(min(found))}")


def _told(text: str) -> float:
    """The bytes that QLOG_MEMORY says."""
    with contextlib.suppress(ValueError):
        if 0 < (told := float(text)) < math.inf:
            return told
    raise ConfigError(
        f"{_VARIABLE} = {text!r} is no number of bytes above 0: set it to the memory of one device "
        "in bytes, such as 64e9, or unset it."
    )


def device_memory(device: Device) -> float | None:
    """The most that JAX may allocate on an accelerator, in bytes; None where that is not known."""
    whole = chips.memory(device.device_kind)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if not limit:
        return whole
    # By default JAX takes its share of a GPU's memory (three quarters) at the start, and no more
    # later. With these settings it may go on beyond the share, to all that the GPU has.
    grows = os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower() in (
        "cuda_async",
        "platform",
    ) or os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in ("false", "0")
    if not grows:
        return limit
    return max(limit, whole) if whole else None


def host_memory(root: pathlib.Path = _ROOT) -> float | None:
    """Bytes that a process of this host can have, swap included; None where that is not known.

    Args:
      root: the folder that holds proc/ and sys/.
    """
    found = list(_control_groups(root))
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + _swap(root))
    least = min(found, default=math.inf)
    return least if least < math.inf else None


def _swap(root: pathlib.Path) -> float:
    """Bytes of swap that the host has."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("SwapTotal:"):
                return 1024.0 * int(line.split()[1])
    return 0.0


def _control_groups(root: pathlib.Path) -> Iterable[float]:
    """The limits of the control groups that this process is in: containers have one."""
    groups = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            # Version 2 has one tree, version 1 one for memory. Inside a container the tree begins
            # at its own group, so that the path may name nothing: then its root counts.
            tree = groups / "memory" if controllers else groups
            limit_of = _limit_of_first_version if controllers else _limit_of_second_version
            place = tree / name.lstrip("/")
            for group in (place, *place.parents):
                if group == tree or tree in group.parents:
                    yield limit_of(group, _swap(root))


def _limit_of_second_version(group: pathlib.Path, swap: float) -> float:
    """Bytes of memory and swap that a group of version 2 may have; infinite without a limit.

    Args:
      swap: of the host, in bytes. Where the kernel does not count swap, there is no file with a
        limit for it, and a group may have all of it.
    """
    return _number(group / "memory.max") + min(_number(group / "memory.swap.max"), swap)


def _limit_of_first_version(group: pathlib.Path, swap: float) -> float:
    """The same of a group of version 1, whose second limit is of memory and swap together."""
    together = _number(group / "memory.memsw.limit_in_bytes")
    return min(_number(group / "memory.limit_in_bytes") + swap, together)


def _number(file: pathlib.Path) -> float:
    """The number that a file of a control group holds; infinite where it is "max", or is absent."""
    with contextlib.suppress(OSError, ValueError):
        text = file.read_text().strip()
        return math.inf if text == "max" else float(int(text))
    return math.inf


# ---- Both together ----


def check(experiment: Experiment, train: bool, evaluate: bool) -> None:
    """Whether this machine can hold the run at all. Every process must call.

    Args:
      train, evaluate: as `phases` takes them.

    Raises:
      ConfigError: on every process: a lower bound of what one device needs exceeds what it has, or
        QLOG_MEMORY is no number of bytes.
    """
    largest = max(phases(experiment, train, evaluate), key=lambda phase: phase.bytes)
    fault = ""
    # The variable and the devices of one process may be other than those of the next.
    try:
        there = room(experiment.mesh)
    except ConfigError as error:
        there, fault = None, str(error)
    if there is not None and largest.bytes > there.bytes:
        fault = _sentence(experiment.config, largest, there)
    for text in distributed.gather([fault]):
        if text:
            raise ConfigError(text)


def describe(experiment: Experiment, evaluate: bool) -> str:
    """One line about a run that trains: the memory that it needs at least, and what there is.

    Args:
      evaluate: whether it evaluates, too.
    """
    largest = max(phases(experiment, True, evaluate), key=lambda phase: phase.bytes)
    there = room(experiment.mesh)
    of_room = f"; {there.where}" if there else ""
    return f"at least {size_text(largest.bytes)} per device, for {_VERBS[largest.name]}{of_room}"


def step_tokens(config: ConfigDict) -> int:
    """Tokens of a step's rationales when all of them spend their budget."""
    rollouts = config.train.prompts_per_step * config.rollout.rollouts_per_prompt
    return rollouts * config.rollout.rationale_budget


def _sentence(config: ConfigDict, phase: Phase, there: Room) -> str:
    parts = phase.of_model | phase.of_batch
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    shown = ", ".join(f"{name} {size_text(parts[name])}" for name in largest)
    is_model = sum(phase.of_model.values()) > there.bytes
    field = _field_of_model(config) if is_model else _unusual(config, _fields(config, phase.name))
    value = _get(config, field)
    smaller = "take a smaller model" if field == "model" else f"lower {field}"
    return (
        f"config.{field} = {value!r}: {_VERBS[phase.name]} needs at least "
        f"{size_text(phase.bytes)} of memory per device ({shown}), and {there.where}: {smaller}, "
        f"or {remedy('update' if is_model else phase.name, config)}; --mode=compile "
        f"--topology=v5e:4x4 tells whether it fits that TPU slice, and {_VARIABLE}=BYTES sets what "
        "one device has, should it be more."
    )


def remedy(name: str, config: ConfigDict) -> str:
    """The fields, with their values, that make a phase or program of that name smaller."""
    rollout, train, mesh = config.rollout, config.train, config.mesh
    if name == "gradient":
        remat = "" if train.remat == "full" else "set train.remat=full, "
        return (
            f"{remat}lower train.rollouts_per_microbatch = {train.rollouts_per_microbatch} or "
            f"train.prompts_per_microbatch = {train.prompts_per_microbatch} (0 is all), raise "
            f"mesh.fsdp = {mesh.fsdp}"
        )
    if name in ("update", "load"):
        return f"raise mesh.fsdp = {mesh.fsdp} or mesh.tensor = {mesh.tensor}"
    if name == "evaluate":
        prompts = config.evaluation.prompts_per_batch
        return f"lower evaluation.prompts_per_batch = {prompts}, raise mesh.fsdp = {mesh.fsdp}"
    return (
        f"lower rollout.prompts_per_wave = {rollout.prompts_per_wave} (0 is all), raise "
        f"mesh.fsdp = {mesh.fsdp}, or mesh.tensor = {mesh.tensor} (a divisor of the key/value "
        "heads)"
    )


def _fields(config: ConfigDict, name: str) -> list[str]:
    """The fields that a phase's memory grows with, besides those of the model."""
    lengths = ["rollout.rationale_budget", "rollout.answer_reserve"]
    if name == "evaluate":
        return ["evaluation.prompts_per_batch", "evaluation.rollouts_per_prompt", *lengths]
    slices = "train.prompts_per_microbatch" if name == "gradient" else "rollout.prompts_per_wave"
    prompts = ["train.prompts_per_step"]
    if _get(config, slices):
        prompts.append(slices)
    return [*prompts, "rollout.rollouts_per_prompt", *lengths]


def _unusual(config: ConfigDict, fields: list[str]) -> str:
    """The field that is the most times its default: most likely the one that was mistyped."""
    usual = schema.default()
    # 0 of a field that is cut into (prompts_per_wave) means all of them, which another one counts.
    return max(fields, key=lambda field: _get(config, field) / (_get(usual, field) or 32))


def _field_of_model(config: ConfigDict) -> str:
    """config.model, or the field of config.architecture that made it so large."""
    usual = models.PRESETS.get(config.model, models.PRESETS[schema.default().model])
    times = {
        f"architecture.{key}": value / getattr(usual, key)
        for key, value in config.architecture.items()
        if type(value) is int and type(getattr(usual, key)) is int
    }
    largest = max(times, key=lambda field: times[field], default="model")
    return largest if times.get(largest, 0) > 1 else "model"


def _get(config: Any, field: str) -> Any:
    for key in field.split("."):
        config = config[key]
    return config


def size_text(num_bytes: float) -> str:
    """25.2 GB, or 3.7 MB."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
