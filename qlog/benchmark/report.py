"""The benchmark of a config: all phases timed, a table and JSON."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from qlog import models
from qlog.benchmark import measure, work
from qlog.console import ProgressLine, draw_table, plain_console, time_text
from qlog.experiment import prepare_shapes
from qlog.storage import strict_json

_COLUMNS = (
    "phase",
    "time",
    "first call",
    "tokens/s",
    "of FLOP/s",
    "of GB/s",
    "peak memory",
)


def report(
    config: ConfigDict,
    *,
    prompt: int = 0,
    rationale: int = 0,
    answer: int = 16,
    repeats: int = 5,
    out: str = "",
    profile: str = "",
    devices: Sequence[jax.Device] | None = None,
) -> None:
    """Times all phases of a step of `config` and prints the table.

    Args:
      prompt: tokens of each prompt; 0 takes data.max_prompt_tokens.
      rationale: tokens of each rationale; 0 takes rollout.rationale_budget.
      answer: tokens of each gold answer.
      repeats: of each phase; their median counts.
      out: JSON file for the numbers; '' is none.
      profile: folder for a trace of one step; '' is none.
      devices: all of them by default.

    Raises:
      ConfigError: what can be wrong with a config before data are read.
    """
    experiment = prepare_shapes(config, devices)
    policy, mesh = experiment.policy, experiment.mesh
    size = work.Size(
        config.train.prompts_per_step,
        config.rollout.rollouts_per_prompt,
        prompt or config.data.max_prompt_tokens,
        rationale or config.rollout.rationale_budget,
        answer,
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, experiment.abstract_params())
    # Weights are made where they will lie: no device ever has them whole.
    init = jax.jit(lambda key: models.init(policy.config, key), out_shardings=places)
    params = init(jax.random.key(0))
    batch = work.make_batch(policy, size)
    wave = experiment.prompts_at_once(config.rollout.prompts_per_wave)
    phases = work.rollout_phases(params, policy, size, batch, wave)
    trainer = work.Trainer(
        params, policy, size, batch, experiment.microbatch
    )  # owns params from here
    phases["train"] = trainer.phase()

    # ---- Every phase, next to the machine's own peaks.
    peaks = measure.measure_peaks(policy.dtype)
    num_devices = mesh.devices.size
    rows = {}
    line = ProgressLine()
    for name, phase in phases.items():
        line.begin(f"timing {name}: {1 + repeats} calls, of which the first compiles")
        times = measure.repeat(phase.call, repeats)
        kind, memory = measure.peak_memory()
        rows[name] = {
            "seconds": times.median,
            "shortest": times.shortest,
            "longest": times.longest,
            "first_call": times.first,
            "tokens_per_s": phase.tokens / times.median,
            "of_matmul_peak": phase.need.flops / times.median / (num_devices * peaks.flops),
            "of_bandwidth": phase.need.bytes / times.median / (num_devices * peaks.bandwidth),
            f"{kind}_peak_bytes": memory,
        }
    line.begin("timing the parts of train")
    parts = trainer.breakdown(rows["train"]["seconds"], repeats)
    if profile:
        with jax.profiler.trace(profile):
            for name in ("rollouts", "train"):
                jax.block_until_ready(phases[name].call())
    # ---- For the user, and for a file.
    device = mesh.devices.flat[0]
    facts = {
        "device": f"{num_devices} x {device.device_kind}",
        "jax": jax.__version__,
        "dtype": str(jnp.dtype(policy.dtype)),
        "matmul_peak_flops": peaks.flops,
        "bandwidth_bytes_per_s": peaks.bandwidth,
        "repeats": repeats,
        **size._asdict(),
        "microbatch": experiment.microbatch,
        "phases": rows,
        "train_parts": parts,
    }
    show(facts)
    if out:
        pathlib.Path(out).write_text(strict_json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def show(facts: Mapping[str, Any]) -> None:
    """Prints the facts that `report` writes."""
    flops, bandwidth = facts["matmul_peak_flops"], facts["bandwidth_bytes_per_s"]
    title = (
        f"{facts['device']}, {facts['dtype']}: {facts['prompts']} x {facts['rollouts']}, "
        f"prompt {facts['prompt']}, rationale {facts['rationale']}, answer {facts['answer']}; "
        f"peaks of one device {flops / 1e9:,.0f} GFLOP/s, {bandwidth / 1e9:,.0f} GB/s"
    )
    rows = []
    for name, row in facts["phases"].items():
        memory = row.get("device_peak_bytes", row.get("process_peak_bytes"))
        bandwidth = f"{row['of_bandwidth']:.2f}" if row["of_bandwidth"] else ""
        rows.append(
            (
                name,
                time_text(row["seconds"]),
                time_text(row["first_call"]),
                f"{row['tokens_per_s']:,.0f}",
                f"{row['of_matmul_peak']:.2f}",
                bandwidth,
                f"{memory / 2**30:.2f} GiB",
            )
        )
    console = plain_console(130)
    draw_table(console, [_COLUMNS, *rows], title, justify="right")
    whole = facts["phases"]["train"]["seconds"]
    shares = (
        f"{name} {time_text(seconds)} ({seconds / whole:.0%})"
        for name, seconds in facts["train_parts"].items()
    )
    console.print(f"time of train by part, each run by itself, then the rest: {', '.join(shares)}")
