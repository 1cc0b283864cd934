"""Times the phases of a training step of any config on the devices that are here.

    python -m qlog.benchmark --config=configs/hotpotqa.py:tiny
    python -m qlog.benchmark --config=configs/hotpotqa.py --rationale=512 --out=result.json --profile=trace

Random weights and tokens: nothing is read or downloaded. Every rollout has the full length.
"""

import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.table import Table

from qlog import aot, models, runtime
from qlog.benchmark import measure, work

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with variants after a colon.")
_PROMPT = flags.DEFINE_integer("prompt", 0, "Prompt tokens; 0 is data.max_prompt_tokens.")
_RATIONALE = flags.DEFINE_integer("rationale", 0, "Rationale tokens; 0 is rollout.rationale_budget.")
_ANSWER = flags.DEFINE_integer("answer", 16, "Gold answer tokens.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Repeats; their median counts.")
_OUT = flags.DEFINE_string("out", "", "JSON file for the numbers.")
_PROFILE = flags.DEFINE_string("profile", "", "Folder for a profiler's trace of one step.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? Settings are given as --config.section.key=value")
    runtime.set_up()
    report(
        _CONFIG.value, prompt=_PROMPT.value, rationale=_RATIONALE.value, answer=_ANSWER.value,
        repeats=_REPEATS.value, out=_OUT.value, profile=_PROFILE.value,
    )  # fmt: skip


def report(
    config: ConfigDict, *, prompt: int = 0, rationale: int = 0, answer: int = 16, repeats: int = 5,
    out: str = "", profile: str = "", devices: Sequence[jax.Device] | None = None,
) -> None:  # fmt: skip
    """Times all phases of a step of `config` and prints the table; arguments as the flags."""
    run = aot.without_data(config, devices or jax.devices())
    policy, mesh = run.policy, run.mesh
    size = work.Size(
        config.train.prompts_per_step, config.rollout.rollouts_per_prompt,
        prompt or config.data.max_prompt_tokens,
        rationale or config.rollout.rationale_budget, answer,
    )  # fmt: skip
    microbatch = (
        config.train.prompts_per_microbatch or size.prompts,
        config.train.rollouts_per_microbatch or size.rollouts,
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, run.abstract_params())
    init = jax.jit(lambda key: models.init(policy.config, key), out_shardings=places)
    params = init(jax.random.key(0))
    batch = work.make_batch(policy, size)
    phases = work.rollout_phases(params, policy, size, batch, config.rollout.prompts_per_wave)
    phases["train"] = work.Trainer(params, policy, size, batch, microbatch).phase()

    peaks = measure.measure_peaks(policy.dtype)
    count = mesh.devices.size
    rows = {}
    for name, phase in phases.items():
        times = measure.repeat(phase.call, repeats)
        kind, memory = measure.peak_memory()
        rows[name] = {
            "seconds": times.median, "shortest": times.shortest, "longest": times.longest,
            "first_call": times.first, "tokens_per_s": phase.tokens / times.median,
            "of_matmul_peak": phase.need.flops / times.median / (count * peaks.flops),
            "of_bandwidth": phase.need.bytes / times.median / (count * peaks.bandwidth),
            f"{kind}_peak_bytes": memory,
        }  # fmt: skip
    if profile:
        with jax.profiler.trace(profile):
            for name in ("rollouts", "train"):
                jax.block_until_ready(phases[name].call())
    device = mesh.devices.flat[0]
    facts = {
        "device": f"{count} x {device.device_kind}", "jax": jax.__version__,
        "dtype": str(jnp.dtype(policy.dtype)), "matmul_peak_flops": peaks.flops,
        "bandwidth_bytes_per_s": peaks.bandwidth, "repeats": repeats, **size._asdict(),
        "microbatch": microbatch, "phases": rows,
    }  # fmt: skip
    show(facts)
    if out:
        pathlib.Path(out).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def show(facts: dict) -> None:
    title = (
        f"{facts['device']}, {facts['dtype']}: {facts['prompts']} x {facts['rollouts']}, prompt "
        f"{facts['prompt']}, rationale {facts['rationale']}, answer {facts['answer']}; peaks of one device "
        f"{facts['matmul_peak_flops'] / 1e9:,.0f} GFLOP/s, {facts['bandwidth_bytes_per_s'] / 1e9:,.0f} GB/s"
    )
    table = Table(title=title, title_justify="left")
    for column in ("phase", "seconds", "first call", "tokens/s", "of FLOP/s", "of GB/s", "peak memory"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name, row in facts["phases"].items():
        memory = row.get("device_peak_bytes", row.get("process_peak_bytes"))
        bandwidth = f"{row['of_bandwidth']:.2f}" if row["of_bandwidth"] else ""
        table.add_row(
            name, f"{row['seconds']:.3f}", f"{row['first_call']:.1f}", f"{row['tokens_per_s']:,.0f}",
            f"{row['of_matmul_peak']:.2f}", bandwidth, f"{memory / 2**30:.2f} GiB",
        )  # fmt: skip
    Console(width=130).print(table)


if __name__ == "__main__":
    app.run(main)
