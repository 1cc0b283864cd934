"""Weak scaling on paper: the roofline of a step on growing slices, as many prompts on each chip.

    python -m qlog.main --config=configs/hotpotqa.py --mode=compile --workdir=FOLDER \\
        --topology=v5e:2x2,v5e:4x4,v5e:8x8,v5e:16x16

The config is that of the first topology. On a slice with n times the chips, a step has n times the
prompts. Writes weak_scaling.md and weak_scaling.json with the command, the versions and the config.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from qlog.aot import compile_run
from qlog.aot.compiler import topology_devices
from qlog.config import schema
from qlog.console import markdown_table, say, show_markdown, time_text
from qlog.errors import ConfigError
from qlog.experiment.cost import step_tokens
from qlog.parallel.chips import Chip
from qlog.storage import paths, strict_json


class SliceStep(NamedTuple):
    """A step on one slice, at the roofline: a row of weak_scaling.json, with these keys."""

    topology: str
    chips: int
    prompts: int  # of the step
    fits: bool  # in HBM
    seconds: float  # of the step; nan where the compiler gave up for memory
    phases: Mapping[str, float]  # seconds of the step by program
    arithmetic: float  # seconds of this resource, as if the other two took no time
    memory: float
    interconnect: float
    tokens_per_second: float  # of the whole slice


def run(config: ConfigDict, topologies: list[str], workdir: str | os.PathLike, command: str) -> int:
    """Prints the table, and writes it to `workdir`.

    Returns:
      0, or 1 when a step does not fit its slice.

    Raises:
      ConfigError: as `measure_slices` does.
    """
    steps, chip = measure_slices(config, topologies)
    inputs = compile_run.provenance(config, command)
    folder = paths.parse(workdir, "--workdir")
    text = page(steps, chip, inputs)
    rows = [step._asdict() for step in steps]
    paths.write(folder / "weak_scaling.md", text)
    paths.write(
        folder / "weak_scaling.json",
        strict_json.dumps({**inputs, "chip": chip._asdict(), "rows": rows}, indent=2),
    )
    show_markdown(text)
    return 0 if all(step.fits for step in steps) else 1


def measure_slices(config: ConfigDict, topologies: list[str]) -> tuple[list[SliceStep], Chip]:
    """A step on each topology, and their chip.

    Raises:
      ConfigError: a slice whose chips are not a multiple of the first one's, and what
        `compile_run.compile_run` raises.
    """
    slices = {topology: topology_devices(topology) for topology in topologies}
    # Before minutes of compiling: chips must be multiples, as prompts grow in whole batches.
    first, *_ = slices.values()
    num_first, kind = len(first), first[0].device_kind
    for topology, devices in slices.items():
        if len(devices) % num_first or devices[0].device_kind != kind:
            raise ConfigError(
                f"--topology={','.join(topologies)}: {topology} is {len(devices)} x "
                f"{devices[0].device_kind}, no multiple of {topologies[0]}, {num_first} x {kind}."
            )
    steps = []
    for topology, devices in slices.items():
        scaled = with_times_prompts(config, len(devices) // num_first)
        programs, chip = compile_run.compile_run(scaled, topology)
        step = _slice_step(scaled, topology, len(devices), programs, chip)
        say(f"{topology}: {time_text(step.seconds)} a step")
        steps.append(step)
    return steps, chip


def _slice_step(
    config: ConfigDict,
    topology: str,
    chips: int,
    programs: Mapping[str, compile_run.CompiledProgram],
    chip: Chip,
) -> SliceStep:
    # Programs run one after the other, so each resource's seconds add up over them.
    costs = [(each.runs, each.cost.times(chip)) for each in programs.values() if each.cost]
    resources = {
        resource: sum(runs * times[resource] for runs, times in costs)
        for resource in ("arithmetic", "memory", "interconnect")
    }
    phases = compile_run.step_seconds(programs, chip)
    seconds = sum(phases.values())
    return SliceStep(
        topology,
        chips,
        config.train.prompts_per_step,
        not compile_run.too_large(programs, chip),
        seconds,
        phases,
        **resources,
        tokens_per_second=step_tokens(config) / seconds,
    )


def with_times_prompts(config: ConfigDict, times: int) -> ConfigDict:
    """`config` with `times` as many prompts per step.

    No other field needs a change: those that count prompts count them per shard of the mesh.
    """
    return schema.merge(
        config, {"train": {"prompts_per_step": times * config.train.prompts_per_step}}
    )


def conclusion(steps: Sequence[SliceStep]) -> str:
    """Where communication begins to dominate, in sentences made from the numbers."""
    # Above 1, a chip waits for its links, if all three resources overlap as well as they can.
    share = {step.chips: step.interconnect / max(step.arithmetic, step.memory) for step in steps}
    dominated = [chips for chips, value in share.items() if value > 1]
    first, last = steps[0], steps[-1]
    shares = ", ".join(f"{value:.2f} on {chips} chips" for chips, value in share.items())
    growth = last.interconnect / max(first.interconnect, 1e-30)
    text = [
        f"Interconnect against the slower of arithmetic and memory: {shares}.",
        f"From {first.chips} to {last.chips} chips its seconds grow by {growth:.2f}, while "
        "arithmetic and memory, which follow a chip's own prompts, change by "
        f"{last.arithmetic / first.arithmetic:.2f} and {last.memory / first.memory:.2f}. "
        "Chips send parameters (gathered) and their gradients (reduced), each once per pass over a "
        "microbatch. On a ring of n chips, a chip sends (n - 1) / n of them, for any n.",
    ]
    if dominated:
        text.append(f"Communication dominates from {dominated[0]} chips on.")
    else:
        text.append(
            "Communication dominates nowhere in the table. It would where a chip has less to do "
            f"per pass: on {last.chips} chips from about {share[last.chips]:.2f} times the tokens "
            "per microbatch and chip, so with fewer prompts or rollouts in a microbatch, or at a "
            "fixed batch on more chips."
        )
    return " ".join(text)


def page(steps: Sequence[SliceStep], chip: Chip, inputs: Mapping[str, Any]) -> str:
    """The table in Markdown, with what it means and how it was made."""
    unfit = [step.topology for step in steps if not step.fits]
    paragraphs = [
        "# Weak scaling on paper",
        "Seconds of one training step at its longest (full prompts, every budget spent), from the "
        "programs that the TPU compiler made, each phase at the roofline of its slowest resource. "
        "Nothing was run: these are lower bounds, and they compare slices. They are no "
        "measurements.",
        markdown_table([_cells(step, steps[0]) for step in steps]),
        "arithmetic, memory, interconnect: seconds of each resource, over all phases, as if the "
        f"other two took no time. Per chip: {chip.flops / 1e12:.0f} TFLOP/s, "
        f"{chip.hbm_speed / 1e9:,.0f} GB/s of HBM, {chip.link_speed / 1e9:,.0f} GB/s sent over all "
        "links together. A ring on one axis of the slice cannot fill all links: interconnect "
        "seconds are the most optimistic of the three.",
        conclusion(steps),
        *([f"Does not fit in HBM: {', '.join(unfit)}."] if unfit else []),
        "Made by",
        f"    {inputs['command']}",
        f"with {inputs['versions']}. weak_scaling.json has the numbers and the whole config.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _cells(step: SliceStep, first: SliceStep) -> dict[str, str]:
    """A row of the table. Efficiency: seconds on the first slice over seconds on this one."""
    return {
        "chips": f"{step.chips}",
        "topology": step.topology,
        "prompts": f"{step.prompts}",
        "s / step": _number(step.seconds),
        **{name: _number(seconds) for name, seconds in step.phases.items()},
        "arithmetic": _number(step.arithmetic),
        "memory": _number(step.memory),
        "interconnect": _number(step.interconnect),
        "tokens/s per chip": f"{step.tokens_per_second / step.chips:,.0f}",
        "efficiency": f"{first.seconds / step.seconds:.2f}",
    }


def _number(seconds: float) -> str:
    return f"{seconds:,.3g}" if seconds < 1000 else f"{seconds:,.0f}"
