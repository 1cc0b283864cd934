"""Weak scaling on paper: the roofline of a step on growing slices, prompts in proportion to the chips.

    python -m qlog.main --config=configs/hotpotqa.py --mode=compile --workdir=FOLDER \\
        --topology=v5e:2x2,v5e:4x4,v5e:8x8,v5e:16x16

The config is that of the first topology; on a slice of n times the chips the prompts of a step
are n times as many. Writes weak_scaling.md and weak_scaling.json, with what they were made from.
"""

import json
import math
import os
from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from qlog.aot import compile_run
from qlog.config import schema
from qlog.console import say
from qlog.errors import ConfigError
from qlog.parallel.chips import Chip
from qlog.storage import paths


class Row(NamedTuple):
    """One slice; seconds of a step on each of its chips, at the roofline or of one resource alone."""

    topology: str
    chips: int
    prompts: int
    fits: bool
    seconds: float
    phases: Mapping[str, float]
    arithmetic: float
    memory: float
    interconnect: float
    tokens_per_second: float  # of the whole slice


def measure(config: ConfigDict, topologies: list[str]) -> tuple[list[Row], Chip]:
    """One row per topology, and their chip.

    Raises:
      ConfigError: slices that are no multiples of the first one, and what `aot.compile_run` raises.
    """
    slices = [compile_run.topology_devices(topology) for topology in topologies]
    first, kind = len(slices[0]), slices[0][0].device_kind
    for topology, devices in zip(topologies, slices):
        if len(devices) % first or devices[0].device_kind != kind:
            raise ConfigError(
                f"--topology={','.join(topologies)}: {topology} is {len(devices)} x "
                f"{devices[0].device_kind}, no multiple of {topologies[0]}, {first} x {kind}."
            )
    rows = []
    for topology, size in zip(topologies, map(len, slices)):
        scaled = grown(config, size // first)
        phases, chip = compile_run.compile_run(scaled, topology)
        costs = [(phase.runs, phase.cost.times(chip)) for phase in phases.values() if phase.cost]
        alone = {
            resource: sum(runs * times[resource] for runs, times in costs)
            for resource in ("arithmetic", "memory", "interconnect")
        }
        seconds = {name: phase.seconds(chip) for name, phase in phases.items() if phase.runs}
        total = sum(seconds.values())
        rows.append(
            Row(
                topology,
                size,
                scaled.train.prompts_per_step,
                not compile_run.remedies(phases, chip, scaled),
                total,
                seconds,
                **alone,
                tokens_per_second=compile_run.step_tokens(scaled) / total,
            )
        )
        say(f"{topology}: {total:,.1f} s a step")
    return rows, chip


def grown(config: ConfigDict, times: int) -> ConfigDict:
    """`config` with `times` as many prompts per step: whatever else counts prompts does so per shard."""
    return schema.merge(
        config, {"train": {"prompts_per_step": times * config.train.prompts_per_step}}
    )


def conclusion(rows: list[Row]) -> str:
    """Where communication begins to dominate, in sentences made from the rows."""
    share = {row.chips: row.interconnect / max(row.arithmetic, row.memory) for row in rows}
    over = [chips for chips, value in share.items() if value > 1]
    first, last = rows[0], rows[-1]
    text = [
        "Interconnect against the slower of arithmetic and memory: "
        + ", ".join(f"{value:.2f} on {chips} chips" for chips, value in share.items())
        + ".",
        f"From {first.chips} to {last.chips} chips its seconds grow by "
        f"{last.interconnect / max(first.interconnect, 1e-30):.2f}, while arithmetic and memory, which "
        f"follow a chip's own prompts, change by {last.arithmetic / first.arithmetic:.2f} and "
        f"{last.memory / first.memory:.2f}: what chips send are parameters (gathered) and their "
        "gradients (reduced), each once per pass over a microbatch, and on a ring of n a chip sends "
        "(n - 1) / n of them, whatever n.",
    ]
    if over:
        text.append(f"Communication dominates from {over[0]} chips on.")
    else:
        fewer = share[last.chips]
        text.append(
            "Communication dominates nowhere in the table. It would where a chip has less to do per "
            f"pass: on {last.chips} chips from about {fewer:.2f} times the tokens per microbatch and "
            "chip, so with fewer prompts or rollouts in a microbatch, or at a fixed batch on more chips."
        )
    return " ".join(text)


def markdown(rows: list[Row], chip: Chip, inputs: Mapping[str, object]) -> str:
    """The table with what it was made from."""
    names = list(rows[0].phases)
    header = [
        "chips",
        "topology",
        "prompts",
        "s / step",
        *names,
        "arithmetic",
        "memory",
        "interconnect",
        "tokens/s per chip",
        "efficiency",
    ]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [f"{row.chips}", row.topology, f"{row.prompts}", _number(row.seconds)]
        cells += [_number(row.phases[name]) for name in names]
        cells += [_number(x) for x in (row.arithmetic, row.memory, row.interconnect)]
        cells += [
            f"{row.tokens_per_second / row.chips:,.0f}",
            f"{rows[0].seconds / row.seconds:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    unfit = [row.topology for row in rows if not row.fits]
    return "\n".join(
        [
            "# Weak scaling on paper",
            "",
            "Seconds of one training step at its longest (full prompts, every budget spent), from the "
            "programs that the TPU compiler made, each phase at the roofline of its slowest resource. "
            "Nothing was run: these are lower bounds, and they compare slices, not measurements.",
            "",
            *lines,
            "",
            "arithmetic, memory, interconnect: seconds of each resource alone, over all phases. "
            f"Per chip: {chip.flops / 1e12:.0f} TFLOP/s, {chip.hbm_speed / 1e9:,.0f} GB/s of HBM, "
            f"{chip.link_speed / 1e9:,.0f} GB/s sent over all links together, which a ring on one axis "
            "of the slice cannot fill: interconnect seconds are the most optimistic of the three.",
            "",
            conclusion(rows),
            "",
            *([f"Does not fit in HBM: {', '.join(unfit)}.", ""] if unfit else []),
            "Made by",
            "",
            f"    {inputs['command']}",
            "",
            f"with {inputs['versions']}. weak_scaling.json has the numbers and the whole config.",
            "",
        ]
    )


def run(config: ConfigDict, topologies: list[str], workdir: str | os.PathLike, command: str) -> int:
    """Writes and prints the table; 1 when a row does not fit."""
    rows, chip = measure(config, topologies)
    inputs = compile_run.made_from(config, command)
    workdir = paths.parse(workdir, "--workdir")
    text = markdown(rows, chip, inputs)
    table = [{key: _plain(value) for key, value in row._asdict().items()} for row in rows]
    paths.write(workdir / "weak_scaling.md", text)
    paths.write(
        workdir / "weak_scaling.json",
        json.dumps({**inputs, "chip": chip._asdict(), "rows": table}, indent=2),
    )
    say(text)
    return 0 if all(row.fits for row in rows) else 1


def _plain(value):
    """JSON has no NaN: what is unknown is null."""
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(seconds: float) -> str:
    return f"{seconds:,.3g}" if seconds < 1000 else f"{seconds:,.0f}"
