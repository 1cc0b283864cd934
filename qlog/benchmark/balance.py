"""How much work chips do in vain, since rollouts end at different lengths: host arithmetic.

    python -m qlog.benchmark.balance                                # HotPotQA on 1 to 256 chips
    python -m qlog.benchmark.balance --config=configs/finqa.py --chips=16 --mean=300
    python -m qlog.benchmark.balance --chips=16 --lengths=FILE.npy  # int [prompts, M], in tokens
    python -m qlog.benchmark.balance --chips=16 --samples=WORKDIR/samples/step_000050.jsonl
    python -m qlog.benchmark.balance --topology=v5e:4x4             # what moves cost; needs libtpu

The real planning code runs (`rollouts.schedule`, `learner.blocks`), on lengths instead of devices.
Executed over needed: of decoding lanes times steps over tokens, of the learner packs that pass
through the model over packs that hold something. "alone" is what chips execute that exchange
nothing and decode one wave after the other.

Seconds are a model: weights, and the keys and values of all lanes, read once per decode step at the
chip's bandwidth. They are to compare schedules with, not a measurement.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich.table import Table

from qlog.aot.compiler import topology_devices
from qlog.aot.move_cost import move_cost
from qlog.commands import entry
from qlog.config import command_line, schema
from qlog.console import plain_console, time_text
from qlog.errors import ConfigError
from qlog.experiment import Experiment, prepare_shapes
from qlog.learner.blocks import Work as LearnerWork
from qlog.learner.planning import planned_work
from qlog.learner.types import Microbatch
from qlog.parallel import process
from qlog.parallel.chips import CHIPS, Chip
from qlog.rollouts import lengths as rollout_lengths
from qlog.rollouts import sampler, schedule
from qlog.rollouts.balance import Shards
from qlog.rollouts.schedule import Schedule, Work
from qlog.storage import strict_json

# ---- A config on a pod ----


class Pod(NamedTuple):
    """A config on so many chips, as far as plans depend on it."""

    experiment: Experiment  # on one device: shapes and budgets are the same
    num_shards: int  # that prompts are split over
    chip: Chip
    prompt_tokens: int  # of each prompt, filled; its cache has data.max_prompt_tokens slots

    @classmethod
    def of(cls, config: ConfigDict, num_chips: int, chip: Chip, prompt_tokens: int = 0) -> "Pod":
        """`num_chips`: all of them, a multiple of mesh.tensor."""
        if num_chips < 1 or num_chips % config.mesh.tensor:
            raise ConfigError(
                f"--chips={num_chips} is not a positive multiple of config.mesh.tensor = "
                f"{config.mesh.tensor}."
            )
        alone = schema.merge(config, {"mesh": {"data": 1, "fsdp": 1, "tensor": 1, "slices": 0}})
        return cls(
            prepare_shapes(alone, jax.devices()[:1]),
            num_chips // config.mesh.tensor,
            chip,
            prompt_tokens or config.data.max_prompt_tokens,
        )

    def schedule(self, num_prompts: int, num_rollouts: int, alone: bool = False) -> Schedule:
        """Of a training step's rollouts. `alone`: one wave of them, on shards for themselves."""
        config = self.experiment.config
        per_shard = num_prompts // self.num_shards
        in_memory = min(config.rollout.prompts_per_wave or per_shard, per_shard)
        shape = sampler.shape_of(
            self.experiment.sampling,
            in_memory if alone else per_shard,
            num_rollouts,
            config.data.max_prompt_tokens,
            in_memory,
        )
        neighbours = 1 if alone else self.num_shards
        return Schedule(shape, Shards(self.num_shards, neighbours, num_rollouts))

    def decode(self, lengths: np.ndarray, alone: bool = False) -> list[Work]:
        """What decoding rollouts of these lengths, int [B, M], executes: of each call."""
        whole = self.schedule(*lengths.shape)
        if not alone:
            return [schedule.planned_work(whole, lengths)]
        plan = self.schedule(*lengths.shape, alone=True)
        num_waves = len(lengths) // plan.num_prompts
        return [schedule.planned_work(plan, lengths[wave::num_waves]) for wave in range(num_waves)]

    def learn(self, lengths: np.ndarray, alone: bool = False) -> LearnerWork:
        """What the gradient of rollouts of these lengths executes, in one update."""
        config, experiment = self.experiment.config, self.experiment
        train = config.train
        packs = train.rollouts_per_microbatch
        if packs and lengths.shape[1] % packs:
            packs = 0  # of another M: as if the field were 0
        per_shard = len(lengths) // self.num_shards
        prompts = min(train.prompts_per_microbatch or per_shard, per_shard)
        return planned_work(
            lengths,
            experiment.policy.config,
            config.data.max_prompt_tokens,
            experiment.trajectory_length(
                experiment.sampling.max_rationale_length,
                config.rollout.answer_reserve,
            ),
            self.num_shards,
            Microbatch(prompts * self.num_shards, packs or lengths.shape[1]),
            balanced=not alone,
        )

    # ---- The model of seconds

    def seconds(self, work: list[Work]) -> float:
        """Of decoding, on each chip, at the bandwidth of its memory."""
        policy = self.experiment.policy
        itemsizes = jnp.dtype(policy.dtype).itemsize, policy.cache_itemsize
        read = sum(
            schedule.read_bytes(stretch, policy.config, self.prompt_tokens, *itemsizes)
            for each in work
            for stretch in each.stretches
        )
        return read / (self.chip.hbm_speed * self._tensor)

    def move_seconds(self, work: list[Work]) -> float:
        """Of the exchanges, at the bandwidth of the chip's links."""
        sent = 0.0
        for moved in (moved for each in work for moved in each.moves):
            rollouts, prompts = moved.sent
            slots = rollouts * moved.old.slots
            slots += prompts * self.experiment.config.data.max_prompt_tokens
            sent += slots * self._slot_bytes
        return sent / (self.chip.link_speed * self._tensor)

    def host_bytes(self, work: list[Work]) -> float:
        """Of caches, on each shard, that are copied to the host's memory and back."""
        return sum(each.host_slots for each in work) * self._slot_bytes / self.num_shards

    @property
    def _tensor(self) -> int:
        return self.experiment.config.mesh.tensor

    @property
    def _slot_bytes(self) -> float:
        """Keys and values of a token in all layers."""
        policy = self.experiment.policy
        shape = policy.config
        numbers = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
        return numbers * policy.cache_itemsize


# ---- The command ----

_CONFIG = command_line.define(
    "Config file, with variants after a colon; HotPotQA of the paper where none is given."
)
_CHIPS = flags.DEFINE_list("chips", ["1", "16", "64", "256"], "Numbers of chips.")
_MEAN = flags.DEFINE_list("mean", ["600", "1200"], "Mean lengths of drawn rollouts, in tokens.")
_DRAWS = flags.DEFINE_integer("draws", 3, "Draws of lengths; their mean is shown.", 1)
_PER_CHIP = flags.DEFINE_integer("prompts_per_shard", 2, "Prompts of a step on a shard.", 1)
_LENGTHS = flags.DEFINE_string("lengths", "", "NumPy file with lengths, int [prompts, M].")
_SAMPLES = flags.DEFINE_string("samples", "", "Samples of an evaluation, whose lengths are taken.")
_PROMPT = flags.DEFINE_integer("prompt", 0, "Prompt tokens; 0 is data.max_prompt_tokens.")
_CHIP = flags.DEFINE_enum("chip", "TPU v5 lite", list(CHIPS), "Whose bandwidths seconds are of.")
flags.mark_flag_as_required("config")
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "Compile the moves for a TPU slice, and show what each of them sends."
)
_JSON = flags.DEFINE_bool("json", False, "End with a line of JSON, of the worst case.")


class _Case(NamedTuple):
    """A row of the table: the same law on the same chips, in one or more draws."""

    chips: int
    label: str  # of the lengths
    draws: list[np.ndarray]  # int [B, M]


def main(argv: list[str]) -> None:
    entry.only_flags(argv)
    process.look_for_devices()
    config = _CONFIG.value
    if _TOPOLOGY.value:
        _show_moves(config, _TOPOLOGY.value)
        return
    rows = [(case, _measure(config, case)) for case in _cases(config)]
    plain_console(120).print(_table(rows))
    if _JSON.value:
        cases = [
            {"chips": case.chips, "lengths": case.label, "decode": m.decode, "learn": m.learn}
            for case, m in rows
        ]
        worst = {name: max(case[name] for case in cases) for name in ("decode", "learn")}
        print(strict_json.dumps(worst if len(cases) == 1 else {**worst, "cases": cases}))


def _choose_default_config() -> None:
    """Adds --config=configs/hotpotqa.py to a command line without --config."""
    named = [word for word in sys.argv[1:] if word.lstrip("-").split("=")[0] == "config"]
    file = pathlib.Path(__file__).parents[2] / "configs/hotpotqa.py"
    if not named and file.exists():  # else a message says that --config is missing
        sys.argv.insert(1, f"--config={file}")


def _cases(config: ConfigDict) -> Iterator[_Case]:
    numbers = [_positive("chips", each) for each in _CHIPS.value]
    for chips in numbers:
        if _LENGTHS.value or _SAMPLES.value:
            file = _LENGTHS.value or _SAMPLES.value
            read = rollout_lengths.read if _LENGTHS.value else rollout_lengths.of_samples
            yield _Case(chips, file, [read(file)])
            continue
        for mean in (_positive("mean", each) for each in _MEAN.value):
            shards = max(1, chips // config.mesh.tensor)
            size = (shards * _PER_CHIP.value, config.rollout.rollouts_per_prompt)
            longest = config.rollout.rationale_budget
            draws = [
                rollout_lengths.drawn(np.random.default_rng(seed), *size, mean, longest)
                for seed in range(_DRAWS.value)
            ]
            yield _Case(chips, f"mean {mean}", draws)


def _positive(name: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"--{name}={value}: give whole numbers of at least 1, with commas.")
    return int(value)


@dataclasses.dataclass
class _Measured:
    """Means over the draws of a case."""

    decode_alone: float
    decode: float
    learn_alone: float
    learn: float
    prompt_passes: float  # over prompts
    seconds_alone: float
    seconds: float
    move_seconds: float
    host: float  # GB per shard


def _measure(config: ConfigDict, case: _Case) -> _Measured:
    pod = Pod.of(config, case.chips, CHIPS[_CHIP.value], _PROMPT.value)
    longest = pod.experiment.sampling.max_length
    draws = []
    for lengths in case.draws:
        if len(lengths) % pod.num_shards:
            raise ConfigError(
                f"{len(lengths)} prompts do not spread evenly over {pod.num_shards} shards "
                f"(--chips={case.chips} / config.mesh.tensor): give a multiple."
            )
        lengths = np.minimum(lengths, longest)
        alone, together = pod.decode(lengths, alone=True), pod.decode(lengths)
        learned, learned_alone = pod.learn(lengths), pod.learn(lengths, alone=True)
        needed = lengths.sum()
        draws.append(
            _Measured(
                sum(work.lane_steps for work in alone) / needed,
                sum(work.lane_steps for work in together) / needed,
                learned_alone.executed_rows / learned_alone.needed_rows,
                learned.executed_rows / learned.needed_rows,
                learned.prompt_passes / len(lengths),
                pod.seconds(alone),
                pod.seconds(together),
                pod.move_seconds(together),
                pod.host_bytes(together) / 1e9,
            )
        )
    fields = [dataclasses.astuple(each) for each in draws]
    return _Measured(*[float(value) for value in np.mean(fields, axis=0)])


_COLUMNS = (
    "chips",
    "lengths",
    "decode: alone",
    "balanced",
    "learn: alone",
    "balanced",
    "prompt passes",
    "decode s: alone",
    "balanced",
    "moves s",
    "to host GB",
)


def _table(rows: list[tuple[_Case, _Measured]]) -> Table:
    title = f"executed over needed; seconds of a step's decoding, modelled for {_CHIP.value}"
    table = Table(title=title, title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "lengths" else "right")
    for case, found in rows:
        ratios = (found.decode_alone, found.decode, found.learn_alone, found.learn)
        table.add_row(
            f"{case.chips}",
            case.label,
            *(f"{value:.2f}" for value in (*ratios, found.prompt_passes)),
            *(f"{value:.1f}" for value in (found.seconds_alone, found.seconds)),
            f"{found.move_seconds:.2f}",
            f"{found.host:.1f}",
        )
    return table


# ---- What moves cost ----


def _show_moves(config: ConfigDict, topology: str) -> None:
    """A table of the moves of a step on a slice, from the programs that libtpu makes of them."""
    devices = topology_devices(topology)
    chip = CHIPS[devices[0].device_kind]
    pod = Pod.of(config, len(devices), chip, _PROMPT.value)
    prompts = pod.num_shards * _PER_CHIP.value
    on_slice = prepare_shapes(
        schema.merge(config, {"train": {"prompts_per_step": prompts}}), devices
    )
    mean = _positive("mean", _MEAN.value[0])
    size = (prompts, config.rollout.rollouts_per_prompt)
    longest = config.rollout.rationale_budget
    lengths = rollout_lengths.drawn(np.random.default_rng(0), *size, mean, longest)
    plan = pod.schedule(*size)
    work = schedule.planned_work(plan, lengths)
    table = Table(title=f"{topology}, mean {mean}: moves of a step", title_justify="left")
    for column in ("step", "lanes", "rounds", "GB sent", "GB in HBM", "time"):
        table.add_column(column, justify="right")
    total = 0.0
    for moved in work.moves:
        cost = move_cost(on_slice, moved, plan.shards)
        total += cost.seconds(chip)
        sent = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in cost.sent.items())
        table.add_row(
            f"{moved.step}",
            f"{moved.old.num_lanes} -> {moved.new.num_lanes}",
            f"{moved.rounds}",
            sent or "0",
            f"{cost.bytes / 1e9:.2f}",
            time_text(cost.seconds(chip)),
        )
    alone, together = (pod.seconds(pod.decode(lengths, alone=way)) for way in (True, False))
    console = plain_console(120)
    console.print(table)
    console.print(
        f"all moves {time_text(total)}; decoding {time_text(alone)} alone, {time_text(together)} "
        f"balanced, modelled at the bandwidth of {devices[0].device_kind}"
    )


if __name__ == "__main__":
    _choose_default_config()
    entry.run(main)
