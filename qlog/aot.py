"""Compiles a run for an accelerator that is not here, from shapes alone: does it fit, how fast can it be?

The programs are those of a training step at its longest: full prompts, full budgets. Needs the
extra `tpu` (libtpu), no TPU.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from qlog import config as settings
from qlog import experiment as parts
from qlog import learner, losses, models, sampling, scoring, sharding
from qlog.errors import ConfigError
from qlog.policy import Policy


class Chip(NamedTuple):
    """Public peaks of one device: bf16 FLOP/s, HBM bytes and bytes/s, interconnect bytes/s."""

    flops: float
    hbm: float
    hbm_speed: float
    link_speed: float


# By the device kind that the topology reports. Written from memory, not yet checked against the
# vendor's pages: rooflines are no better than these. A TPU7x chip shows as two devices: halved.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95 * 2**30, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1640e9, 448e9),
    "TPU7x": Chip(1153e12, 96 * 2**30, 3690e9, 600e9),
}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(_COLLECTIVES)})(?:-start)?\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")


class Phase(NamedTuple):
    """One compiled program, per chip: bytes, FLOPs, and bytes by kind of collective.

    `runs`: how often a training step executes it. XLA counts a loop's body once, and so do the
    FLOPs, bytes and collectives here: decode is one token, gradient one microbatch's layer.
    """

    arguments: float
    temporaries: float
    peak: float
    flops: float
    bytes: float
    collectives: Mapping[str, float]
    runs: int


def compile_run(config: ConfigDict, topology: str) -> tuple[dict[str, Phase], Chip]:
    """Compiles all phases of a step of `config` for `topology`, 'v5e:4x4' say.

    Raises:
      ConfigError: no libtpu, an unknown topology, or a mesh that does not fit it.
    """
    devices = topology_devices(topology)
    kind = devices[0].device_kind
    if kind not in CHIPS:
        raise ConfigError(f"--topology={topology}: no peaks known for {kind}, only {', '.join(CHIPS)}.")
    return _compile(_without_data(config, devices)), CHIPS[kind]


def topology_devices(topology: str):
    """Descriptions of the devices of a TPU slice; raises ConfigError."""
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--mode=compile needs the TPU compiler: install the extra 'tpu' (pip install libtpu)."
        ) from None
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used: nothing to lock
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except Exception as error:
        raise ConfigError(
            f"--topology={topology!r} is not known to libtpu ({str(error).splitlines()[0]}): "
            "write v5e:4x4, v6e:2x4, v5p:4x4x4."
        ) from None


def _without_data(config: ConfigDict, devices) -> parts.Experiment:
    """An Experiment of shapes: no weights, tokenizer or data are read."""
    preset = config.model.rpartition("/")[2].lower().replace("-", "_").replace(".", "p")
    if preset in models.PRESETS:
        config = settings.merge(config, {"model": preset, "weights": "random"})
    settings.check(config)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    estimator = settings.estimator(config)
    draws = sampling.Sampling(
        rationale_budget=config.rollout.rationale_budget, closing=(1,), eos=(2,), pad=0,
        answer_reserve=config.rollout.answer_reserve, with_answer=estimator.reward is not None,
        temperature=float(config.rollout.temperature),
    )  # fmt: skip
    shape = parts.model_shape(config)
    policy = Policy(shape, shape.vocab_size - 1, jnp.dtype(config.dtype), config.train.remat, mesh)
    return parts.Experiment(
        config=config, estimator=estimator, optimizer=parts.make_optimizer(config), mesh=mesh,
        policy=policy, sampling=draws, evaluation_sampling=draws, formatter=None, grader=None,
        train_data=None, evaluation_data=None,
    )  # fmt: skip


def _compile(run: parts.Experiment) -> dict[str, Phase]:
    """Each phase takes what the phase before gave, where that left it."""
    config, policy, mesh = run.config, run.policy, run.mesh
    prompts_count, rollouts_count = config.train.prompts_per_step, run.rollouts_per_prompt
    length, reserve = config.data.max_prompt_tokens, config.rollout.answer_reserve

    def rows(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(
            (prompts_count, *shape), dtype, sharding=sharding.batch_sharding(mesh)
        )

    params = run.abstract_params()
    prompts = learner.Prompts(rows(length), rows(), rows(dtype=bool))
    key = jax.eval_shape(lambda: jax.random.key(0)).dtype
    gold, gold_lengths = rows(reserve), rows()
    slots = run.sampling.max_length
    whole = run.abstract_state()
    resident = _bytes_per_chip(whole.opt_state)  # lies there while the other programs run
    updates = config.train.updates_per_batch
    prefill_arguments = (params, policy, prompts.tokens, prompts.lengths)
    prefill = sampling.prefill.lower(*prefill_arguments)
    phases = {"prefill": _phase(prefill, 1, resident)}
    prefix = _output(prefill.compile(), sampling.prefill, prefill_arguments)
    start = (policy, prompts.tokens, prompts.lengths, rows(rollouts_count, dtype=key), run.sampling)
    small = sampling._start.lower(*start, 16).compile()  # buffers of all sizes lie in the same way
    state = _output(small, sampling._start, (*start, slots))
    decode = sampling._decode.lower(params, policy, prefix, state, run.sampling)
    phases["decode"] = _phase(decode, slots, resident)
    rollouts = state.rollouts
    score = scoring.score_answers.lower(
        params, policy, prefix, state.suffix, rollouts.tokens, rollouts.rationale_lengths, gold, gold_lengths
    )
    phases["score"] = _phase(score, 1, resident)

    longest = slots + (reserve if run.estimator.answer == "gold" else 0)
    part = prompts_count // config.train.updates_per_batch
    microbatch = (
        config.train.prompts_per_microbatch or part,
        config.train.rollouts_per_microbatch or rollouts_count,
    )
    share = lambda x: jax.ShapeDtypeStruct((part, *x.shape[1:]), x.dtype, sharding=x.sharding)  # noqa: E731
    tokens = rows(rollouts_count, longest)
    mask = rows(rollouts_count, longest, dtype=bool)
    trajectories = learner.Trajectories(
        tokens, mask, mask, rows(rollouts_count, longest, dtype=jnp.float32), mask
    )
    per_rollout = rows(rollouts_count, dtype=jnp.float32)
    coefficients = losses.Coefficients(*[per_rollout] * len(losses.Coefficients._fields))
    reference = trajectories.old_log_probs if run.estimator.reference else None
    batch = jax.tree.map(share, (prompts, trajectories, coefficients, reference))
    gradient = learner.gradient.lower(
        params, policy, *batch, surrogate=run.estimator.surrogate,
        temperature=run.sampling.temperature, microbatch=microbatch,
    )  # fmt: skip
    update = learner.update.lower(
        whole, whole.loss_state, params, jax.ShapeDtypeStruct((), jnp.int32),
        optimizer=run.optimizer, mesh=mesh,
    )  # fmt: skip
    phases["gradient"] = _phase(gradient, updates, resident)
    phases["update"] = _phase(update, updates, 0.0)
    return phases


def _output(compiled, function, arguments):
    """Shapes of a program's results, where the compiler left them."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        function.eval_shape(*arguments), compiled.output_shardings,
    )  # fmt: skip


def _bytes_per_chip(tree) -> float:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _phase(lowered, runs: int, resident: float) -> Phase:
    """Compiles; a program that the compiler itself finds too large is known by its peak alone."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"required for .*?\((\d+\.?\d*)([KMGT])\)|Used (\d+\.?\d*)([KMGT])", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
            raise
        size, unit = needed.group(1) or needed.group(3), needed.group(2) or needed.group(4)
        peak = float(size) * 1024 ** (" KMGT".index(unit)) + resident
        return Phase(math.nan, math.nan, peak, math.nan, math.nan, {}, runs)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Phase(
        arguments, temporaries, arguments + temporaries + results + resident,
        cost.get("flops", 0.0), cost.get("bytes accessed", 0.0), collectives(compiled.as_text()), runs,
    )  # fmt: skip


def collectives(hlo: str) -> dict[str, float]:
    """Bytes of the results of each kind of collective in an optimised HLO module, per chip."""
    found = {}
    for types, kind in _COLLECTIVE.findall(hlo):
        size = sum(
            math.prod(int(n) for n in dimensions.split(",") if n) * _item_size(dtype)
            for dtype, dimensions in _SHAPE.findall(types)
        )
        found[kind] = found.get(kind, 0.0) + size
    return found


def _item_size(dtype: str) -> float:
    return 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype)) / 8


def roofline(phase: Phase, chip: Chip) -> float:
    """Seconds of one run: the slowest of arithmetic, memory and interconnect, each at its peak."""
    return max(
        phase.flops / chip.flops, phase.bytes / chip.hbm_speed,
        sum(phase.collectives.values()) / chip.link_speed,
    )  # fmt: skip


def remedies(phases: Mapping[str, Phase], chip: Chip, config: ConfigDict) -> list[str]:
    """What to change where a phase does not fit; [] when all fit."""
    advice = []
    for name, phase in phases.items():
        if phase.peak <= chip.hbm:
            continue
        over = f"{name} needs {phase.peak / 2**30:.1f} of {chip.hbm / 2**30:.0f} GiB"
        if name == "gradient":
            advice.append(
                f"{over}: lower train.rollouts_per_microbatch = {config.train.rollouts_per_microbatch} or "
                f"train.prompts_per_microbatch = {config.train.prompts_per_microbatch}"
                + ("" if config.train.remat else ", set train.remat=True")
            )
        elif name == "update":
            advice.append(f"{over}: raise mesh.fsdp = {config.mesh.fsdp}")
        else:
            advice.append(
                f"{over}: lower train.prompts_per_step = {config.train.prompts_per_step}, or raise "
                f"mesh.tensor = {config.mesh.tensor} (a divisor of the key/value heads)"
            )
    return advice


def run_compile(config: ConfigDict, topology: str) -> int:
    """Prints what the compiler says of a step on `topology`; 1 when it does not fit."""
    phases, chip = compile_run(config, topology)
    table = Table(title=f"{topology}, per chip ({chip.hbm / 2**30:.0f} GiB)", title_justify="left")
    for column in (
        "program", "arguments", "temporaries", "peak", "GFLOP", "GB moved", "collectives", "roofline"
    ):  # fmt: skip
        table.add_column(column)
    for name, phase in phases.items():
        kinds = ", ".join(f"{kind} {size / 2**20:.1f} MiB" for kind, size in phase.collectives.items())
        table.add_row(
            name, *(f"{size / 2**30:.2f} GiB" for size in phase[:3]), f"{phase.flops / 1e9:,.1f}",
            f"{phase.bytes / 1e9:,.2f}", kinds or "none", f"{roofline(phase, chip) * 1e3:,.2f} ms",
        )  # fmt: skip
    console = Console(width=140)
    console.print(table)
    console.print(
        "A loop's body counts once: decode is one token of all rollouts; prefill and gradient are one "
        "layer of one microbatch, so their times are lower bounds. nan: the compiler gave up for memory."
    )
    rollouts = config.train.prompts_per_step * config.rollout.rollouts_per_prompt
    speed = rollouts / roofline(phases["decode"], chip)
    console.print(f"decode: at most {speed:,.0f} tokens/s on the whole slice")
    advice = remedies(phases, chip, config)
    for line in advice:
        console.print(f"does not fit: {line}")
    if not advice:
        console.print("fits.")
    return 1 if advice else 0
