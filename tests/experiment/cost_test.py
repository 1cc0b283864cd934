"""Memory by arithmetic: what cannot be held is refused in seconds, and nothing else is."""

import itertools
import math
import os
from typing import NamedTuple

import jax
import pytest
import tiny

from qlog import train_metrics
from qlog.aot.compiler import compile_lowered
from qlog.aot.programs import step_programs
from qlog.config import schema
from qlog.errors import ConfigError
from qlog.experiment import cost, prepare, prepare_shapes
from qlog.losses import RECIPES
from qlog.parallel import sharding

ONE = jax.devices()[:1]

# What no machine of this kind holds: (changes, the field that is blamed, a part that is named).
TOO_LARGE = {
    "rollouts": (
        {"rollout": {"rollouts_per_prompt": 2**20, "rationale_budget": 4000}},
        "rollout.rollouts_per_prompt = 1048576",
        "caches",
    ),
    "budget": (
        {"rollout": {"rationale_budget": 10**7, "rollouts_per_prompt": 400}},
        "rollout.rationale_budget = 10000000",
        "caches",
    ),
    "prompts": (
        {"train": {"prompts_per_step": 10**6}, "rollout": {"rationale_budget": 4000}},
        "train.prompts_per_step = 1000000",
        "caches",
    ),
    "vocabulary": (
        {"architecture": {"vocab_size": 10**9, "width": 1024}},
        "architecture.vocab_size = 1000000000",
        "moments",
    ),
    "layers": (
        {"architecture": {"num_layers": 10**7, "width": 1024}},
        "architecture.num_layers = 10000000",
        "moments",
    ),
    "model": ({"model": "qwen3_32b", "architecture": {}}, "model = 'qwen3_32b'", "moments"),
    "evaluation": (
        {
            "evaluation": {"every": 1, "rollouts_per_prompt": 2**20},
            "rollout": {"rationale_budget": 4000},
        },
        "evaluation.rollouts_per_prompt = 1048576",
        "caches",
    ),
    "waves": (
        {
            "train": {"prompts_per_step": 2**16},
            "rollout": {"prompts_per_wave": 1, "rollouts_per_prompt": 2**16},
        },
        "train.prompts_per_step = 65536",
        "rollouts",
    ),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_what_this_machine_cannot_hold_is_refused(case):
    changes, field, part = TOO_LARGE[case]
    with pytest.raises(ConfigError) as caught:
        prepare(tiny.config(**changes), ONE)
    text = str(caught.value)
    assert text.startswith(f"config.{field}: "), text
    assert part in text and "this host has" in text and "--mode=compile" in text
    assert "\n" not in text and ("lower" in text or "take a smaller model" in text)


def test_what_fits_is_not_refused():
    """A step of the paper's sizes with a small model takes gigabytes here, and is allowed."""
    config = tiny.config(
        train={"prompts_per_step": 32},
        rollout={"rollouts_per_prompt": 32, "rationale_budget": 2944, "answer_reserve": 128},
        evaluation={"every": 1, "rollouts_per_prompt": 16},
    )
    run = prepare(config, ONE)
    largest = max(cost.phases(run, True, True), key=lambda phase: phase.bytes)
    assert largest.name == "decode"
    # 32 x 32 rollouts of 3,072 slots, keys and values of 2 layers with 1 head of 8 float32 numbers.
    assert largest.of_batch["caches"] == pytest.approx(32 * (32 * 3072 + 24) * 2 * 2 * 8 * 4)
    assert largest.bytes < cost.room(run.mesh).bytes
    table = train_metrics.describe(run, "x", 0)
    assert "GB per device, for decoding; this host has" in table["memory"]
    assert table["tokens per step"].startswith("at most 3,014,656,")


MESHES = {
    "one device": {"data": 1},
    "fsdp and tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}


def _compiled_cases():
    """Each value of each axis once by default: a case compiles three programs."""
    caches = [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "int8")]
    usual = {
        ("bfloat16", "int8", "garl", "one device"),
        ("float32", "auto", "grpo", "fsdp and tensor"),
        ("bfloat16", "auto", "garl", "fsdp and tensor"),
    }
    for (dtype, cache), loss, mesh in itertools.product(caches, ("garl", "grpo"), MESHES):
        case = (dtype, cache, loss, mesh)
        yield pytest.param(*case, marks=[] if case in usual else pytest.mark.slow)


@pytest.mark.parametrize("dtype, cache, loss, mesh", _compiled_cases())
def test_bounds_are_below_what_the_compiler_needs(dtype, cache, loss, mesh):
    """And not far below: most of what is left out are temporaries of the backward pass."""
    devices = jax.devices() if mesh != "one device" else ONE
    config = tiny.config(
        dtype=dtype,
        # Batches of a run without data have the least widths, so these are them.
        data={"max_prompt_tokens": 16},
        rollout={
            "rollouts_per_prompt": 8,
            "rationale_budget": 500,
            "answer_reserve": 16,
            "cache": cache,
        },
        train={"prompts_per_step": 8, "remat": "full"},
        evaluation={"every": 1, "prompts_per_batch": 1},
        mesh=MESHES[mesh],
    )
    config.loss = schema.loss(loss)
    config.architecture = dict(
        vocab_size=512,
        num_layers=6,
        width=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        mlp_width=128,
    )
    run = prepare_shapes(config, devices)
    bounds = {phase.name: phase.bytes for phase in cost.phases(run, True, True)}
    assert set(bounds) == {"decode", "gradient", "evaluate"}
    for program in step_programs(run):
        if program.name in bounds:
            memory = compile_lowered(program.lowered).memory_analysis()
            results = memory.output_size_in_bytes - memory.alias_size_in_bytes
            needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
            needed += program.resident
            assert bounds[program.name] <= needed, program.name
            assert bounds[program.name] > 0.1 * needed, program.name


@pytest.mark.parametrize("loss", RECIPES)
def test_every_loss_has_its_phases(loss):
    config = tiny.config(rollout={"rollouts_per_prompt": 1 if loss == "sft" else 4})
    config.loss = schema.loss(loss)
    run = prepare_shapes(config, ONE)
    names = [phase.name for phase in cost.phases(run, True, False)]
    assert names == (["gradient"] if loss == "sft" else ["decode", "gradient"])
    assert [phase.name for phase in cost.phases(run, False, True)] == ["evaluate"]
    assert [phase.name for phase in cost.phases(run, False, False)] == ["load"]


def test_int8_makes_the_caches_of_decoding_smaller_and_no_others():
    def caches(cache):
        run = prepare_shapes(tiny.config(dtype="bfloat16", rollout={"cache": cache}), ONE)
        return {
            phase.name: phase.of_batch["caches"]
            for phase in cost.phases(run, True, True)
            if "caches" in phase.of_batch
        }

    full, small = caches("auto"), caches("int8")
    # Heads of 8: a byte per number and 4 per vector, of 16 in bfloat16.
    assert small["decode"] == full["decode"] * 12 / 16
    assert small["gradient"] == full["gradient"]


def test_the_pool_holds_no_scores():
    """log w and the gold answers' log-probabilities lie only where rollouts are that are done."""
    config = tiny.config(rollout={"answer_reserve": 100})
    config.loss = schema.loss("r3")
    run = prepare_shapes(config, ONE)
    length, scores = run.sampling.max_length, 1 + run.sampling.gold_tokens
    assert scores == 101
    # Per token its id, its log-probability and whether it was sampled; two lengths, three flags.
    each = length * (4 + 4 + 1) + 2 * 4 + 3
    decode = cost.phases(run, True, False)[0]
    assert decode.of_batch["rollouts"] == 2 * 16 * each + 16 * scores * 4


# ---- What there is ----

GB = 10**9
_V1 = 9223372036854771712  # what version 1 holds where there is no limit


class Host(NamedTuple):
    """Files below / of a made host with 8 GB of swap, and the bytes of its tightest group."""

    groups: str  # /proc/self/cgroup
    files: dict[str, int | str]  # below /sys/fs/cgroup
    limit: float


HOSTS = {
    "no control groups": Host("", {}, math.inf),
    "version 2": Host("0::/a\n", {"a/memory.max": 2 * GB, "a/memory.swap.max": 1 * GB}, 3 * GB),
    "version 2, no swap": Host("0::/a\n", {"a/memory.max": 2 * GB, "a/memory.swap.max": 0}, 2 * GB),
    "version 2, any swap": Host(
        "0::/a\n", {"a/memory.max": 2 * GB, "a/memory.swap.max": "max"}, 10 * GB
    ),
    "version 2, more swap than there is": Host(
        "0::/a\n", {"a/memory.max": 2 * GB, "a/memory.swap.max": 99 * GB}, 10 * GB
    ),
    "version 2, swap is not counted": Host("0::/a\n", {"a/memory.max": 2 * GB}, 10 * GB),
    "version 2, no limit": Host(
        "0::/a\n", {"a/memory.max": "max", "a/memory.swap.max": 0}, math.inf
    ),
    "version 2, nested": Host(
        "0::/a/b/c\n",
        {
            "a/memory.max": 2 * GB,
            "a/memory.swap.max": 0,
            "a/b/memory.max": "max",
            "a/b/c/memory.max": 1 * GB,
            "a/b/c/memory.swap.max": "max",
        },
        2 * GB,
    ),
    "version 2, inside a container": Host(
        "0::/../../pod\n", {"memory.max": 2 * GB, "memory.swap.max": 0}, 2 * GB
    ),
    "version 1": Host(
        "4:cpu,memory:/a\n1:cpuset:/b\n",
        {
            "memory/a/memory.limit_in_bytes": 2 * GB,
            "memory/a/memory.memsw.limit_in_bytes": 3 * GB,
            "cpuset/b/memory.limit_in_bytes": 1,
        },
        3 * GB,
    ),
    "version 1, memory only": Host(
        "4:memory:/a\n",
        {
            "memory/a/memory.limit_in_bytes": 2 * GB,
            "memory/a/memory.memsw.limit_in_bytes": _V1,
        },
        10 * GB,
    ),
    "version 1, swap is not counted": Host(
        "4:memory:/a\n", {"memory/a/memory.limit_in_bytes": 2 * GB}, 10 * GB
    ),
    "version 1, no limit": Host(
        "4:memory:/a\n", {"memory/a/memory.limit_in_bytes": _V1}, float(_V1)
    ),
    "garbled": Host("0::/a\nx\n", {"a/memory.max": "x", "a/memory.swap.max": ""}, math.inf),
}


@pytest.mark.parametrize("name", HOSTS)
def test_the_limits_of_control_groups(name, tmp_path):
    host = HOSTS[name]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(host.groups)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 5 kB\nSwapTotal:  7812500 kB\n")
    for file, content in host.files.items():
        place = tmp_path / "sys/fs/cgroup" / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{content}\n")
    of_host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + 8 * GB
    assert cost.host_memory(tmp_path) == min(of_host, host.limit)


def test_a_host_without_proc_and_sys_has_its_memory(tmp_path):
    of_host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert cost.host_memory(tmp_path) == of_host


class Accelerator(NamedTuple):
    """An accelerator as JAX tells of it."""

    device_kind: str
    stats: dict[str, int] | None

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats


H100, UNKNOWN = "NVIDIA H100 80GB HBM3", "NVIDIA X1"
_GROWS = [
    {"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async"},
    {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
    {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
]


def test_what_jax_may_allocate_on_an_accelerator(monkeypatch):
    for variables in _GROWS:
        for name in variables:
            monkeypatch.delenv(name, raising=False)
    share = {"bytes_limit": 60 * GB}
    # ---- JAX takes its share at the start, and no more ----
    assert cost.device_memory(Accelerator(H100, share)) == 60 * GB
    assert cost.device_memory(Accelerator(UNKNOWN, share)) == 60 * GB
    # ---- JAX does not tell: what the maker says ----
    for stats in (None, {}, {"bytes_limit": 0}):
        assert cost.device_memory(Accelerator(H100, stats)) == 80 * 2**30
        assert cost.device_memory(Accelerator("TPU v5 lite", stats)) == 16 * 2**30
        assert cost.device_memory(Accelerator(UNKNOWN, stats)) is None
    # ---- The share is no limit ----
    for variables in _GROWS:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert cost.device_memory(Accelerator(H100, share)) == 80 * 2**30
            assert cost.device_memory(Accelerator(H100, {"bytes_limit": 99 * GB})) == 99 * GB
            assert cost.device_memory(Accelerator(UNKNOWN, share)) is None


def test_a_variable_says_what_a_device_has(monkeypatch):
    """A way past a refusal that would be false."""
    changes, field, _ = TOO_LARGE["rollouts"]
    config = tiny.config(**changes)
    with pytest.raises(ConfigError, match=r"QLOG_MEMORY=BYTES sets what one device has"):
        prepare(config, ONE)
    run = prepare_shapes(config, ONE)
    monkeypatch.setenv("QLOG_MEMORY", "1e15")
    cost.check(run, True, False)
    assert "QLOG_MEMORY says 1,000,000.0 GB" in cost.describe(run, False)
    monkeypatch.setenv("QLOG_MEMORY", "1000000")
    with pytest.raises(ConfigError, match=r"needs at least .*, and QLOG_MEMORY says 1.0 MB"):
        cost.check(run, True, False)
    for wrong in ("x", "0", "-1", "nan", "inf", "64GB"):
        monkeypatch.setenv("QLOG_MEMORY", wrong)
        with pytest.raises(ConfigError, match=f"QLOG_MEMORY = '{wrong}' is no number of bytes"):
            cost.check(run, True, False)


def test_the_memory_of_this_host_is_known():
    total = cost.host_memory()
    assert total and 2**28 < total < 2**50
    assert cost.room(sharding.make_mesh(-1, 1, 1)).bytes == pytest.approx(total / 8)
