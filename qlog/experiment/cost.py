"""What a run takes, by arithmetic: before anything is fetched, allocated or compiled.

A run whose lower bounds (`phases`) exceed what this machine has (`qlog.parallel.memory`) cannot be
held, and is refused. One that is not refused may still be too large: `--mode=compile` asks the
compiler. Its time is estimated (`duration`) and said.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from qlog import models
from qlog.config import schema
from qlog.config.check import check_batches, check_config
from qlog.console import count_text, size_text, time_text
from qlog.errors import ConfigError
from qlog.experiment import duration
from qlog.experiment.parts import Experiment
from qlog.experiment.phases import Phase, bytes_per_device, checkpoint_bytes, phase, phases
from qlog.parallel import distributed, memory, sharding
from qlog.parallel.memory import Room

_VERBS = {
    "decode": "decoding",
    "gradient": "the gradient",
    "evaluate": "evaluation",
    "load": "loading the model",
}
# Fields that cut a phase's work into parts: the results stay the same. 0 is all at once.
_SLICES = {
    "decode": ("rollout.prompts_per_wave",),
    "gradient": ("train.rollouts_per_microbatch", "train.prompts_per_microbatch"),
    "evaluate": ("evaluation.prompts_per_batch",),
}
# The other fields that a phase's memory grows with, besides those of the model.
_LENGTHS = ("rollout.rationale_budget", "rollout.answer_reserve")
_AMOUNTS = {
    "decode": ("train.prompts_per_step", "rollout.rollouts_per_prompt", *_LENGTHS),
    "gradient": ("train.prompts_per_step", "rollout.rollouts_per_prompt", *_LENGTHS),
    "evaluate": ("evaluation.rollouts_per_prompt", *_LENGTHS),
}
_MOST_FIELDS = 3  # that a sentence names


def check(experiment: Experiment, train: bool, evaluate: bool) -> None:
    """Whether this machine can hold the run at all. Every process must call.

    Args:
      train, evaluate: as `phases` takes them.

    Raises:
      ConfigError: on every process: a lower bound of what one device or its host needs exceeds
        what it has, or an environment variable that tells what there is holds no number of bytes.
    """
    largest = max(phases(experiment, train, evaluate), key=lambda phase: phase.bytes)
    held = host_bytes(experiment) if train else 0.0
    fault = ""
    # The variables and the devices of one process may be other than those of the next.
    try:
        there, host = memory.of_device(experiment.mesh), memory.of_host(experiment.mesh)
        if there is not None and largest.bytes > there.bytes:
            fault = _sentence(experiment, largest, there)
        elif host is not None and held > host.bytes:
            fault = _sentence_of_host(experiment.config, held, host)
    except ConfigError as error:
        fault = str(error)
    for text in distributed.gather([fault]):
        if text:
            raise ConfigError(text)


def host_bytes(experiment: Experiment) -> float:
    """At least so many bytes are in this host's memory while a checkpoint is written.

    Every process must call.
    """
    # Each process copies its part, and processes may share the host.
    share = distributed.processes_of_host() / jax.process_count()
    return checkpoint_bytes(experiment) * share


def describe(experiment: Experiment, evaluate: bool, start: int = 0) -> dict[str, str]:
    """What a run that trains takes, for its table: tokens, memory, time. Every process must call.

    Args:
      evaluate: whether it evaluates, too.
      start: steps that are done, of a run that goes on.
    """
    found = {}
    if experiment.estimator.rationale == "sampled":
        most = step_tokens(experiment.config)
        found["tokens per step"] = f"at most {most:,}, where all rationales spend their budget"
    # ---- Memory ----
    largest = max(phases(experiment, True, evaluate), key=lambda phase: phase.bytes)
    there, host = memory.of_device(experiment.mesh), memory.of_host(experiment.mesh)
    found["memory"] = (
        f"at least {size_text(largest.bytes)} per device, for {_VERBS[largest.name]}"
        + (f"; {there.where}" if there else "")
    )
    held = host_bytes(experiment)
    if host is not None:
        found["host memory"] = f"at least {size_text(held)}, for a checkpoint; {host.where}"
    # ---- Time ----
    if (estimate := duration.estimate(experiment, start)) is not None and estimate.whole:
        parts = []
        if estimate.num_steps:
            steps = count_text(estimate.num_steps, "step")
            parts.append(f"{steps} of {time_text(estimate.step)}")
        if estimate.num_evaluations:
            evaluations = count_text(estimate.num_evaluations, "evaluation")
            parts.append(f"{evaluations} of {time_text(estimate.evaluation)}")
        if estimate.final:
            split = experiment.config.evaluation.final
            parts.append(f"the best step's on {split} of {time_text(estimate.final)}")
        left = " left" if start else ""
        found["time"] = (
            f"{time_text(estimate.whole)}{left}: {' + '.join(parts)}, were all budgets spent and "
            f"{estimate.kind} at its peaks"
        )
    return found


def step_tokens(config: ConfigDict) -> int:
    """Tokens of a step's rationales when all of them spend their budget."""
    rollouts = config.train.prompts_per_step * config.rollout.rollouts_per_prompt
    return rollouts * config.rollout.rationale_budget


def _sentence(experiment: Experiment, needs: Phase, there: Room) -> str:
    config, parts = experiment.config, needs.of_model | needs.of_batch
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    shown = ", ".join(f"{name} {size_text(parts[name])}" for name in largest)
    # ---- The field that most likely was mistyped, and what would do ----
    found: list[_Lowered] = []
    if sum(needs.of_model.values()) < there.bytes:
        found = _lowerings(experiment, needs, there.bytes)
    if found:
        field = max(found, key=lambda each: each.times_usual).field
        smaller = _lower_text(found, field)
    else:
        field = _field_of_model(config)
        smaller = "take a smaller model" if field == "model" else f"lower {field}"
    raised = _raise_text(needs.name if found else "update", experiment)
    return (
        f"config.{field} = {_get(config, field)!r}: {_VERBS[needs.name]} needs at least "
        f"{size_text(needs.bytes)} of memory per device ({shown}), and {there.where}: {smaller}, "
        f"or {raised}; --mode=compile "
        "--topology=v5e:4x4 tells whether it fits that TPU slice, and "
        f"{memory.VARIABLE}=BYTES sets what one device has, should it be more."
    )


def _sentence_of_host(config: ConfigDict, held: float, host: Room) -> str:
    hosts = count_text(jax.process_count(), "process", "processes")
    return (
        f"config.model = {config.model!r}: a checkpoint on its way to the disk takes at least "
        f"{size_text(held)} of each host's memory, and {host.where}: take a smaller model, more "
        f"hosts (the run has {hosts}), or hosts with more memory; "
        f"{memory.HOST_VARIABLE}=BYTES sets what a host has, should it be more."
    )


def remedy(name: str, experiment: Experiment) -> str:
    """The fields, with their values, that make a program of that name smaller.

    Args:
      name: as `--mode=compile` names its programs.
    """
    config = experiment.config
    # Prompts are prefilled, and gold answers scored, in the pools of decoding.
    of = {"prefill": "decode", "score": "decode"}.get(name, name)
    lower = [f"{field} = {_get(config, field)}" for field in _helpful(of, experiment)]
    texts = ["set train.remat=full"] if of == "gradient" and config.train.remat != "full" else []
    if lower:
        texts.append(f"lower {' or '.join(lower)}" + " (0 is all)" * (of != "evaluate"))
    return ", ".join([*texts, _raise_text(of, experiment)])


def _helpful(name: str, experiment: Experiment) -> list[str]:
    """The fields of `_SLICES` that make a program smaller when they are lowered."""
    config, fields = experiment.config, _SLICES.get(name, ())
    if name == "evaluate":  # compiled for whole batches, however many questions there are
        return [field for field in fields if _get(config, field) > 1]
    if not fields:
        return []
    state = {"parameters": bytes_per_device(experiment.abstract_params())}
    needs = phase(name, experiment, state)
    return [field for field in fields if _lower(experiment, needs, field, needs.bytes - 1)]


def _raise_text(name: str, experiment: Experiment) -> str:
    """The axes of the mesh that make a phase or program smaller."""
    mesh = experiment.config.mesh
    text = f"raise mesh.fsdp = {mesh.fsdp}"
    if name in ("update", "load", "cast"):
        text += f" or mesh.tensor = {mesh.tensor}"
    elif name == "decode":
        text += f" or mesh.tensor = {mesh.tensor} (a divisor of the key/value heads)"
    # An axis takes devices from `data`, or there have to be more.
    return text if experiment.mesh.shape["data"] > 1 else f"take more devices and {text}"


# ---- Fields that are lowered: the arithmetic is done again, nothing is guessed ----


class _Lowered(NamedTuple):
    """A field that makes a phase smaller when it is lowered."""

    field: str
    value: int  # the largest tried with which the phase fits; where none does, that helps at all
    is_enough: bool  # whether it fits then
    times_usual: float  # the field's own value, as a multiple of its default


def _lowerings(experiment: Experiment, needs: Phase, most: float) -> list[_Lowered]:
    """The fields that make a phase smaller; only those that are enough alone, if one is.

    Args:
      most: bytes that a device has.
    """
    usual, found = schema.default(), []
    for field in (*_SLICES[needs.name], *_AMOUNTS[needs.name]):
        if lower := _lower(experiment, needs, field, most):
            # 0 of a field that is cut into (prompts_per_wave) means all, which another one counts.
            times = _get(experiment.config, field) / (_get(usual, field) or 32)
            found.append(_Lowered(field, *lower, times))
    return [each for each in found if each.is_enough] or found


def _lower_text(found: list[_Lowered], blamed: str) -> str:
    """What to lower: first the blamed field, then the others in their order."""
    shown = sorted(found, key=lambda each: each.field != blamed)[:_MOST_FIELDS]
    if found[0].is_enough:
        return "lower " + " or ".join(f"{each.field} to {each.value}" for each in shown)
    less = lambda each: " or less" if each.value > 1 else ""  # 0 would be all
    texts = [f"{each.field} (to {each.value}{less(each)})" for each in shown]
    return "lower " + " and ".join(texts)


def _lower(
    experiment: Experiment, needs: Phase, field: str, most: float
) -> tuple[int, bool] | None:
    """`_Lowered.value` and `is_enough` of a field; None where lower values change nothing.

    Args:
      needs: with the field as it is.
    """
    helps = None
    for value in _smaller(experiment, field):
        lowered = _with(experiment, field, value)
        size = phase(needs.name, lowered, needs.of_model).bytes
        if size <= most and _is_taken(lowered):
            return value, True
        if helps is None and size < needs.bytes and _is_taken(lowered):
            helps = value, False
    return helps


def _smaller(experiment: Experiment, field: str) -> list[int]:
    """Values below a field's own, from large to small."""
    config, shards = experiment.config, sharding.num_batch_shards(experiment.mesh)
    train, value = config.train, _get(config, field)
    per_shard = train.prompts_per_step // shards
    whole = {
        "rollout.prompts_per_wave": per_shard,
        "train.prompts_per_microbatch": per_shard // train.updates_per_batch,
        "train.rollouts_per_microbatch": experiment.rollouts_per_prompt,
    }.get(field)
    if whole:
        return [part for part in range((value or whole) - 1, 0, -1) if whole % part == 0]
    unit = shards * train.updates_per_batch if field == "train.prompts_per_step" else 1
    halves, value = [], value // unit // 2
    while value:
        halves.append(value * unit)
        value //= 2
    return halves


def _is_taken(experiment: Experiment) -> bool:
    """Whether a run may have this config."""
    try:
        check_config(experiment.config)
        check_batches(experiment.config, experiment.mesh)
    except ConfigError:
        return False
    return True


def _with(experiment: Experiment, field: str, value: int) -> Experiment:
    """The experiment with another value of a field, as far as phases depend on it."""
    section, name = field.split(".")
    config = schema.merge(experiment.config, {section: {name: value}})
    budget, reserve = config.rollout.rationale_budget, config.rollout.answer_reserve
    usual = experiment.sampling
    lengths = {"rationale_budget": budget, "answer_reserve": reserve}
    return dataclasses.replace(
        experiment,
        config=config,
        sampling=dataclasses.replace(
            usual, **lengths, gold_tokens=reserve if usual.gold_tokens else 0
        ),
        evaluation_sampling=dataclasses.replace(experiment.evaluation_sampling, **lengths),
    )


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
