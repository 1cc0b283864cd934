"""Compiles a run for an accelerator that is not here: does it fit, and how fast can it be?

    python -m qlog.main --config=configs/hotpotqa.py --workdir=FOLDER \\
        --mode=compile --topology=v5e:4x4

The programs are those of a training step at its longest: full prompts, full budgets. Needs the
extra `tpu` (libtpu), no TPU.
"""

import importlib.metadata
import json
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from qlog.aot.compiler import CompiledProgram, compile_program, topology_devices
from qlog.aot.programs import StepLoops, step_programs
from qlog.config import schema
from qlog.console import ProgressLine, draw_table, plain_console, say, time_text
from qlog.errors import ConfigError
from qlog.experiment import Experiment, duration, prepare_shapes
from qlog.experiment.cost import remedy, step_tokens
from qlog.parallel.chips import CHIPS, Chip
from qlog.storage import paths, strict_json

_GIB = 2**30


def run_compile(
    config: ConfigDict,
    topology: str,
    workdir: paths.Path,
    command: str,
    lengths: np.ndarray | None = None,
) -> int:
    """Prints what the compiler says of a step on `topology`.

    Args:
      lengths: int [B, M] of the step's rollouts; None: all at their longest.

    Writes the step's seconds to workdir/compile_TOPOLOGY.json, unless the compiler gave up on a
    program for memory.

    Returns:
      0, or 1 when the step does not fit.

    Raises:
      ConfigError: as `compile_run` does.
    """
    programs, chip = compile_run(config, topology, lengths)
    seconds = step_seconds(programs, chip)
    step, decode = sum(seconds.values()), seconds["decode"]
    tokens = step_tokens(config)
    if lengths is not None:
        tokens = int(np.minimum(lengths, config.rollout.rationale_budget).sum())
    experiment = prepare_shapes(config, topology_devices(topology))
    advice = remedies(programs, chip, experiment)
    by_arithmetic = duration.estimate(experiment)
    assert by_arithmetic, "the peaks of TPUs are known"

    # ---- For the user ----
    console = plain_console(150)
    rows = [[name, *_cells(program, chip)] for name, program in programs.items()]
    title = f"{topology}, per chip ({chip.usable / _GIB:.2f} GiB of HBM for programs)"
    draw_table(console, [_COLUMNS, *rows], title)
    console.print(
        f"Of a training step {_which(lengths)} (evaluate: between steps, so 0 runs of one). Pools "
        "that shrink count as parts of runs, loops as often as they run. FLOPs are those of matrix "
        "products, collectives the bytes that one chip sends. Roofline: the slowest of arithmetic, "
        "memory and interconnect at the vendor's peaks. nan: the compiler gave up for memory. "
        ">: a kernel without a cost estimate is left out."
    )
    console.print(
        f"decode: at most {tokens / decode:,.0f} tokens/s on the whole slice; "
        f"step: at least {time_text(step)}, at most {tokens / step:,.0f} tokens/s "
        f"({time_text(by_arithmetic.step)} by arithmetic alone, as a run says at its start)"
    )
    for line in advice:
        console.print(f"does not fit: {line}")
    if not advice:
        console.print("fits.")

    # ---- For launch/sweep --price ----
    if math.isfinite(step):
        row = {
            "topology": topology,
            "chips": len(topology_devices(topology)),
            "fits": not advice,
            "prompts": config.train.prompts_per_step,
            "seconds": step,
            "phases": seconds,
        }
        file = workdir / f"compile_{topology.replace(':', '-')}.json"
        facts = {**provenance(config, command), "rows": [row]}
        paths.write(file, strict_json.dumps(facts, indent=2))
    return 1 if advice else 0


def _which(lengths: np.ndarray | None) -> str:
    if lengths is None:
        return "at its longest: full prompts, every budget spent"
    return f"with full prompts and rollouts of {lengths.mean():,.0f} tokens on average, as given"


def compile_run(
    config: ConfigDict, topology: str, lengths: np.ndarray | None = None
) -> tuple[dict[str, CompiledProgram], Chip]:
    """Compiles all programs of a step of `config` for `topology`, 'v5e:4x4' for example.

    Args:
      lengths: int [B, M] of the step's rollouts; None: all at their longest.

    Returns:
      The programs by name, in the order in which they first run, and the chip of the topology.

    Raises:
      ConfigError: no libtpu, an unknown topology, or a mesh that does not fit it.
    """
    devices = topology_devices(topology)
    kind = devices[0].device_kind
    if kind not in CHIPS:
        raise ConfigError(
            f"--topology={topology}: no peaks known for {kind}, only {', '.join(CHIPS)}."
        )
    experiment = prepare_shapes(config, devices)
    expected = (config.train.prompts_per_step, config.rollout.rollouts_per_prompt)
    if lengths is not None and lengths.shape != expected:
        raise ConfigError(
            f"--lengths has {list(lengths.shape)} lengths: a step has {list(expected)} rollouts "
            "(train.prompts_per_step, rollout.rollouts_per_prompt)."
        )
    trips, programs = StepLoops.of(experiment, lengths).trips, {}
    for name, lowered, runs, resident in step_programs(experiment, lengths):
        start = time.monotonic()
        ProgressLine().begin(f"{topology} {name}: compiling")
        programs[name] = compile_program(lowered, runs, resident, trips)
        say(f"{topology} {name}: compiled in {time_text(time.monotonic() - start)}")
    return programs, CHIPS[kind]


def step_seconds(programs: Mapping[str, CompiledProgram], chip: Chip) -> dict[str, float]:
    """Seconds of a step at the roofline by program; nan where the compiler gave up."""
    return {name: program.seconds(chip) for name, program in programs.items() if program.runs}


def remedies(
    programs: Mapping[str, CompiledProgram], chip: Chip, experiment: Experiment
) -> list[str]:
    """What to change for each program that does not fit; [] when all fit."""
    return [
        f"{name} needs {programs[name].peak / _GIB:.1f} of {chip.usable / _GIB:.2f} GiB: "
        f"{remedy(name, experiment)}"
        for name in too_large(programs, chip)
    ]


def too_large(programs: Mapping[str, CompiledProgram], chip: Chip) -> list[str]:
    """The programs that do not fit."""
    return [name for name, program in programs.items() if program.peak > chip.usable]


def provenance(config: ConfigDict, command: str) -> dict[str, Any]:
    """What results on disk say about how they were made."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    return {
        "command": command,
        "versions": versions,
        "config": json.loads(schema.to_json(config)),
    }


_COLUMNS = (
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
)


def _cells(program: CompiledProgram, chip: Chip) -> list[str]:
    """All but the first of `_COLUMNS`; costs are those of all runs in a step."""
    runs, cost = program.runs, program.cost
    sizes = (program.arguments, program.temporaries, program.peak)
    cells = [f"{runs:.4g}", *(f"{size / _GIB:.2f} GiB" for size in sizes)]
    if cost is None:  # the compiler gave up for memory, so there is no program to read
        return [*cells, *["nan"] * 4, ""]
    sent = ", ".join(f"{kind} {runs * size / 1e9:,.2f}" for kind, size in cost.sent.items())
    # ">" marks FLOPs that are a lower bound, as some kernel does not tell its own.
    times = cost.times(chip)
    return [
        *cells,
        ("" if cost.is_whole else "> ") + f"{runs * cost.flops / 1e12:,.2f}",
        f"{runs * cost.bytes / 1e9:,.1f}",
        sent or "none",
        time_text(program.seconds(chip)),
        max(times, key=lambda resource: times[resource]),
    ]
