"""What a run takes, by arithmetic: before anything is fetched, allocated or compiled.

A run whose lower bounds (`phases`) exceed what this machine has (`qlog.parallel.memory`) cannot be
held, and is refused. One that is not refused may still be too large: `--mode=compile` asks the
compiler. Its time is estimated (`duration`) and said.
"""

from typing import Any

import jax
from ml_collections import ConfigDict

from qlog import models
from qlog.config import schema
from qlog.console import time_text
from qlog.errors import ConfigError
from qlog.experiment import duration
from qlog.experiment.parts import Experiment
from qlog.experiment.phases import Phase, checkpoint_bytes, phases
from qlog.parallel import distributed, memory
from qlog.parallel.memory import Room, size_text

_VERBS = {
    "decode": "decoding",
    "gradient": "the gradient",
    "evaluate": "evaluation",
    "load": "loading the model",
}


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
            fault = _sentence(experiment.config, largest, there)
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


def describe(experiment: Experiment, evaluate: bool) -> dict[str, str]:
    """What a run that trains takes, for its table: tokens, memory, time. Every process must call.

    Args:
      evaluate: whether it evaluates, too.
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
    if (estimate := duration.estimate(experiment)) is not None:
        evaluations = (
            f" and {estimate.num_evaluations} evaluations of {time_text(estimate.evaluation)}"
            if estimate.num_evaluations
            else ""
        )
        found["time"] = (
            f"{time_text(estimate.whole)}: {estimate.num_steps} steps of {time_text(estimate.step)}"
            f"{evaluations}, were all budgets spent and {estimate.kind} at its peaks"
        )
    return found


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
        "--topology=v5e:4x4 tells whether it fits that TPU slice, and "
        f"{memory.VARIABLE}=BYTES sets what one device has, should it be more."
    )


def _sentence_of_host(config: ConfigDict, held: float, host: Room) -> str:
    hosts = jax.process_count()
    return (
        f"config.model = {config.model!r}: a checkpoint on its way to the disk takes at least "
        f"{size_text(held)} of each host's memory, and {host.where}: take a smaller model, more "
        f"hosts (there are {hosts} processes), or hosts with more memory; "
        f"{memory.HOST_VARIABLE}=BYTES sets what a host has, should it be more."
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
