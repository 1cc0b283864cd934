"""Compiles a run for an accelerator that is not here, from shapes alone: does it fit, how fast can it be?

The programs are those of a training step at its longest: full prompts, full budgets. Needs the
extra `tpu` (libtpu), no TPU.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import re
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from qlog import experiment as parts
from qlog import losses, step
from qlog.aot.hlo_cost import Cost, Module, Sweep
from qlog.config import schema
from qlog.console import say
from qlog.errors import ConfigError, summary
from qlog.learner import gradient
from qlog.learner.optimizer import apply_update
from qlog.parallel import sharding
from qlog.parallel.chips import CHIPS, Chip
from qlog.records import Golds, Prompts, Trajectories
from qlog.rollouts import sampler
from qlog.storage import paths

_FEW = 16  # tokens


class Phase(NamedTuple):
    """One compiled program on one chip: bytes of HBM, and what one run of it costs, loops in full.

    `peak` includes what lies in HBM beside the program, the optimizer's state. `cost` is None where
    the compiler gave up for memory: then only `peak` is known, roughly. `runs`: per training step,
    0 of what evaluation runs between steps.
    """

    arguments: float
    temporaries: float
    peak: float
    cost: Cost | None
    runs: int

    def seconds(self, chip: Chip) -> float:
        """All runs of a step, at the roofline; nan where the cost is unknown."""
        if not self.runs:
            return 0.0
        return math.nan if self.cost is None else self.runs * self.cost.seconds(chip)


def compile_run(config: ConfigDict, topology: str) -> tuple[dict[str, Phase], Chip]:
    """Compiles all phases of a step of `config` for `topology`, 'v5e:4x4' say.

    Raises:
      ConfigError: no libtpu, an unknown topology, or a mesh that does not fit it.
    """
    devices = topology_devices(topology)
    kind = devices[0].device_kind
    if kind not in CHIPS:
        raise ConfigError(
            f"--topology={topology}: no peaks known for {kind}, only {', '.join(CHIPS)}."
        )
    run = parts.prepare_shapes(config, devices)
    phases = {}
    for name, lowered, runs, beside in programs(run):
        start = time.monotonic()
        phases[name] = compile_phase(lowered, runs, beside, _trips(run))
        say(f"{topology} {name}: compiled in {time.monotonic() - start:,.0f} s")
    return phases, CHIPS[kind]


def topology_devices(topology: str):
    """Descriptions of the devices of a TPU slice, 'v5e:4x4', or of several, '2*v5e:4x4'; raises
    ConfigError."""
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--mode=compile needs the TPU compiler: install the extra 'tpu' (pip install libtpu)."
        ) from None
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used: nothing to lock
    count, star, one = topology.rpartition("*")
    try:
        several = {"num_slices": int(count)} if star else {}
        return topologies.get_topology_desc(one, platform="tpu", **several).devices
    except Exception as error:
        raise ConfigError(
            f"--topology={topology!r} is not known to libtpu ({summary(error)}): "
            "write v5e:4x4, v6e:2x4, v5p:4x4x4, or 2*v5e:4x4 for two slices."
        ) from None


def programs(run: parts.Experiment):
    """Yields (name, lowered, runs per step, bytes that lie beside it in HBM) of a step's programs."""
    yield from _rollout_programs(run)
    yield from _learner_programs(run)


def _rollout_programs(run: parts.Experiment):
    """A wave's sampling and scoring; each takes what the ones before gave, where they left it.

    Evaluation's decoding is there for its memory alone: it runs between steps.
    """
    config, policy = run.config, run.policy
    wave = run.prompts_at_once(config.rollout.prompts_per_wave) or config.train.prompts_per_step
    waves = config.train.prompts_per_step // wave
    opt_state, params = _bytes_per_chip(run.abstract_state().opt_state), run.abstract_params()
    weights = _results(sampler.decoding_weights, (params, policy), (params, policy))
    beside, step = opt_state + _bytes_per_chip(params), jax.ShapeDtypeStruct((), jnp.int32)
    flags = sharding.per_device_shape(run.mesh, bool)

    def decode(law, pool, results):
        lowered = sampler.decode.lower(weights, policy, pool, law, step, flags)
        return lowered, beside + _bytes_per_chip(results)

    prompts, pool, results = _pool(run, run.sampling, wave, run.rollouts_per_prompt)
    golds = Golds(_rows(run, wave)(config.rollout.answer_reserve), prompts[1])
    yield "cast", sampler.decoding_weights.lower(params, policy), 1, opt_state
    prefill = sampler.prefill.lower(params, policy, *prompts)
    yield "prefill", prefill, waves, opt_state + _bytes_per_chip(weights)
    lowered, held = decode(run.sampling, pool, results)
    yield "decode", lowered, waves, held
    yield (
        "score",
        sampler.score_and_store.lower(weights, policy, pool, results, golds),
        waves,
        beside,
    )
    if config.evaluation.every:
        evaluation, law = config.evaluation, run.evaluation_sampling
        batch = (run.prompts_at_once(evaluation.prompts_per_batch), evaluation.rollouts_per_prompt)
        lowered, held = decode(law, *_pool(run, law, *batch)[1:])
        yield "evaluate", lowered, 0, held


def _pool(run: parts.Experiment, law: sampler.Sampling, prompts: int, rollouts: int):
    """Shapes of (prompts, their lengths), the pool that decoding starts with, and its results."""
    policy, rows, params = run.policy, _rows(run, prompts), run.abstract_params()
    tokens, lengths = rows(run.config.data.max_prompt_tokens), rows()
    keys = rows(rollouts, dtype=jax.eval_shape(lambda: jax.random.key(0)).dtype)
    # Everything lies as small arrays of its kind do, which compile in no time.
    few, brief = rows(_FEW), dataclasses.replace(law, rationale_budget=_FEW)
    few_from = (params, policy, few, lengths)
    prefix = _results(sampler.prefill, (params, policy, tokens, lengths), few_from)
    few_prefix = _results(sampler.prefill, few_from, few_from)
    pool = _results(
        sampler.initial_pool,
        (policy, prefix, tokens, lengths, keys, law),
        (policy, few_prefix, few, lengths, keys, brief),
    )
    results = _results(
        sampler.empty_results, (policy, law, prompts, rollouts), (policy, brief, prompts, rollouts)
    )
    return (tokens, lengths), pool, results


def _learner_programs(run: parts.Experiment):
    """The gradient and the update."""
    config, estimator = run.config, run.estimator
    updates, rollouts_count = config.train.updates_per_batch, run.rollouts_per_prompt
    part = config.train.prompts_per_step // updates
    rows = _rows(run, part)
    longest = step.trajectory_length(
        run, run.sampling.max_rationale_length, config.rollout.answer_reserve
    )
    tokens = rows(rollouts_count, longest)
    mask = rows(rollouts_count, longest, dtype=bool)
    log_probs = rows(rollouts_count, longest, dtype=jnp.float32)
    per_rollout = rows(rollouts_count, dtype=jnp.float32)
    params, whole = run.abstract_params(), run.abstract_state()
    batch = (
        Prompts(rows(config.data.max_prompt_tokens), rows(), rows(dtype=bool)),
        Trajectories(tokens, mask, mask, log_probs, mask, rows(rollouts_count)),
        losses.Coefficients(*[per_rollout] * len(losses.Coefficients._fields)),
        log_probs if estimator.reference else None,
    )
    begun = (params, run.policy, *batch)
    grads, *packing = _results(gradient.begin, begun, begun)
    lowered = gradient.add_microbatch.lower(
        grads,
        *begun,
        *packing,
        jax.ShapeDtypeStruct((), jnp.int32),
        surrogate=estimator.surrogate,
        temperature=run.sampling.temperature,
        microbatch=run.microbatch,
    )
    runs = updates * (part // run.microbatch[0])
    yield "gradient", lowered, runs, _bytes_per_chip(whole.opt_state)
    update = apply_update.lower(
        whole, whole.loss_state, params, optimizer=run.optimizer, mesh=run.mesh
    )
    yield "update", update, updates, 0.0


def _rows(run: parts.Experiment, prompts: int):
    """Makes arrays of shapes alone whose first axis is the prompts."""

    def rows(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(
            (prompts, *shape), dtype, sharding=sharding.batch_sharding(run.mesh)
        )

    return rows


def _results(function, arguments, small):
    """Shapes of what `function` returns for `arguments`, where it puts its results for `small`."""
    places = compiled(function.lower(*small)).output_shardings
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        function.eval_shape(*arguments),
        places,
    )


def compiled(lowered):
    """Compiles without a trace in the persistent cache, which cannot read such programs back."""
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        return lowered.compile()
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def _bytes_per_chip(tree) -> float:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _trips(run: parts.Experiment):
    """How often loops run that end when the data say so, in a step at its longest."""
    config, shape = run.config, run.policy.config
    prompt, steps = config.data.max_prompt_tokens, run.sampling.max_length
    rollout = run.sampling.max_rationale_length + config.rollout.answer_reserve
    rows = run.rollouts_per_prompt
    chunks = rows // (config.train.rollouts_per_microbatch or rows)

    def trips(sweep: Sweep) -> float:
        if sweep.size == 1 and sweep.length >= steps:  # decoding, a token at a time
            return steps
        if len(sweep.shape) not in (4, 5) or sweep.shape[-1] != shape.head_dim:
            return chunks  # the learner's rows of rollouts; whatever else it slices is of one chip
        if len(sweep.shape) == 4 and sweep.length == prompt:
            return sweep.blocks
        # Attention among tokens of rollouts, several of which may lie side by side: each sees those
        # of its own rollout that came before, on average half.
        return (min(sweep.length, rollout) / sweep.size + 1) / 2

    return trips


def compile_phase(lowered, runs: int = 1, resident: float = 0.0, trips=None) -> Phase:
    """Compiles one program.

    Args:
      lowered: from `jax.jit(...).lower`, for the devices of a topology.
      runs: per training step.
      resident: bytes that lie beside it in HBM.
      trips: as `Module.cost` takes it; None is its default.
    """
    try:
        program = compiled(lowered)
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(
            r"required for .*?\((\d+\.?\d*)([KMGT])\)|Used (\d+\.?\d*)([KMGT])", str(error)
        )
        if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
            raise
        size, unit = needed.group(1) or needed.group(3), needed.group(2) or needed.group(4)
        peak = float(size) * 1024 ** (" KMGT".index(unit)) + resident
        return Phase(math.nan, math.nan, peak, None, runs)
    memory = program.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Phase(
        arguments,
        temporaries,
        arguments + temporaries + results + resident,
        Module(program.as_text()).cost(*[trips] if trips else []),
        runs,
    )


def step_tokens(config: ConfigDict) -> int:
    """Tokens of a step's rationales when all of them spend their budget."""
    rollouts = config.train.prompts_per_step * config.rollout.rollouts_per_prompt
    return rollouts * config.rollout.rationale_budget


def remedies(phases: Mapping[str, Phase], chip: Chip, config: ConfigDict) -> list[str]:
    """What to change where a phase does not fit; [] when all fit."""
    rollout, train, mesh = config.rollout, config.train, config.mesh
    advice = []
    for name, phase in phases.items():
        if phase.peak <= chip.usable:
            continue
        over = f"{name} needs {phase.peak / 2**30:.1f} of {chip.usable / 2**30:.2f} GiB"
        smaller = "" if train.remat == "full" else "set train.remat=full, "
        if name == "gradient":
            advice.append(
                f"{over}: {smaller}lower train.rollouts_per_microbatch = {train.rollouts_per_microbatch} "
                f"or train.prompts_per_microbatch = {train.prompts_per_microbatch} (0 is all), raise "
                f"mesh.fsdp = {mesh.fsdp}"
            )
        elif name == "evaluate":
            lower = f"evaluation.prompts_per_batch = {config.evaluation.prompts_per_batch}"
            advice.append(f"{over}: lower {lower}, raise mesh.fsdp = {mesh.fsdp}")
        elif name == "update":
            advice.append(f"{over}: raise mesh.fsdp = {mesh.fsdp} or mesh.tensor = {mesh.tensor}")
        else:
            advice.append(
                f"{over}: lower rollout.prompts_per_wave = {rollout.prompts_per_wave} (0 is all), raise mesh.fsdp = {mesh.fsdp}, or "
                f"mesh.tensor = {mesh.tensor} (a divisor of the key/value heads)"
            )
    return advice


def made_from(config: ConfigDict, command: str) -> dict:
    """What results on disk say of their making."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    return {
        "command": command,
        "versions": versions,
        "config": json.loads(schema.to_json(config)),
    }


def run_compile(config: ConfigDict, topology: str, workdir: paths.Path, command: str) -> int:
    """Prints what the compiler says of a step on `topology`, and writes the step's seconds to
    workdir/compile_TOPOLOGY.json; 1 when it does not fit."""
    phases, chip = compile_run(config, topology)
    console = Console(width=150)
    console.print(_table(phases, chip, topology))
    console.print(
        "Of a training step at its longest: full prompts, every budget spent (evaluate: between steps, "
        "so 0 runs of one); loops count as often as they run, FLOPs are those of matrix products, collectives the bytes that one chip sends. "
        "Roofline: the slowest of arithmetic, memory and interconnect at the vendor's peaks. "
        "nan: the compiler gave up for memory; >: a kernel without a cost estimate is not in it."
    )
    tokens, step = step_tokens(config), sum(phase.seconds(chip) for phase in phases.values())
    decode = phases["decode"].seconds(chip)
    console.print(
        f"decode: at most {tokens / decode:,.0f} tokens/s on the whole slice; "
        f"step: at least {step:,.2f} s, at most {tokens / step:,.0f} tokens/s"
    )
    advice = remedies(phases, chip, config)
    seconds = {name: phase.seconds(chip) for name, phase in phases.items() if phase.runs}
    if all(map(math.isfinite, seconds.values())):
        row = {
            "topology": topology,
            "chips": len(topology_devices(topology)),
            "fits": not advice,
            "prompts": config.train.prompts_per_step,
            "seconds": step,
            "phases": seconds,
        }
        file = workdir / f"compile_{topology.replace(':', '-')}.json"
        paths.write(file, json.dumps({**made_from(config, command), "rows": [row]}, indent=2))
    for line in advice:
        console.print(f"does not fit: {line}")
    if not advice:
        console.print("fits.")
    return 1 if advice else 0


def _table(phases: Mapping[str, Phase], chip: Chip, topology: str) -> Table:
    title = f"{topology}, per chip ({chip.usable / 2**30:.2f} GiB of HBM for programs)"
    table = Table(title=title, title_justify="left")
    for column in (
        "program",
        "runs",
        "arguments",
        "temporaries",
        "peak",
        "TFLOP",
        "GB moved",
        "collectives, GB",
        "roofline",
        "by",
    ):
        table.add_column(column)
    for name, phase in phases.items():
        row = [name, f"{phase.runs}", *(f"{size / 2**30:.2f} GiB" for size in phase[:3])]
        if phase.cost is None:
            table.add_row(*row, *["nan"] * 4, "")
            continue
        cost = phase.cost
        kinds = ", ".join(
            f"{kind} {phase.runs * sent / 1e9:,.2f}" for kind, sent in cost.sent.items()
        )
        times = cost.times(chip)
        table.add_row(
            *row,
            ("" if cost.is_whole else "> ") + f"{phase.runs * cost.flops / 1e12:,.2f}",
            f"{phase.runs * cost.bytes / 1e9:,.1f}",
            kinds or "none",
            f"{phase.seconds(chip):,.3f} s",
            max(times, key=times.get),
        )
    return table
