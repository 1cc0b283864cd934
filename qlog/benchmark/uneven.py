"""A training step whose rollouts end at planted lengths, timed with and without balance, in turns.

    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=16 python -m qlog.benchmark.uneven
    python -m qlog.benchmark.uneven --config=configs/hotpotqa.py --budget=2944 --mean=600

Random weights and tokens. "alone": one wave after the other, rollouts stay on their device, and the
learner takes whole prompts, each on its own device. "balanced": as a training step does it. Both
give the same tokens and the same gradient, up to rounding.

On virtual devices of a CPU time follows the work that all of them execute, not the slowest one's.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.table import Table

from qlog import losses, models
from qlog.benchmark import compare, work
from qlog.commands import entry
from qlog.config import command_line
from qlog.console import plain_console
from qlog.experiment import prepare_shapes
from qlog.learner.gradient import batch_gradient
from qlog.learner.trajectories import with_gold_answer
from qlog.learner.types import LearnerBatch, Microbatch, Objective
from qlog.parallel import batch_placement, process, sharding
from qlog.policy import Policy
from qlog.records import Samples
from qlog.rollouts import lengths as rollout_lengths
from qlog.rollouts import sampler
from qlog.rollouts.decoding import Sampling
from qlog.storage import strict_json

_CONFIG = command_line.define("Config file; '' takes the model of --size on all devices.")
_SIZE = flags.DEFINE_enum("size", "tiny", list(compare.SIZES), "Model, where no config is given.")
_PER_SHARD = flags.DEFINE_integer("prompts_per_shard", 2, "Prompts of a step on a shard.", 1)
_ROLLOUTS = flags.DEFINE_integer("rollouts", 32, "Rollouts of each prompt, M.", 1)
_PROMPT = flags.DEFINE_integer("prompt", 64, "Tokens of each prompt.", 1)
_BUDGET = flags.DEFINE_integer("budget", 380, "Tokens of the longest rationale.", 2)
_MEAN = flags.DEFINE_float("mean", 77, "Mean length of a rationale, in tokens.", 1)
_PACKS = flags.DEFINE_integer("packs", 2, "Packs of a prompt that the learner takes at a time.", 1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Repeats of each; medians count.", 1)
_OUT = flags.DEFINE_string("out", "", "JSON file for the numbers.")

_ANSWER = 4  # tokens of each gold answer


class Step(NamedTuple):
    """A step's prompts and rollouts, ready to be sampled and learned from."""

    params: models.Params
    policy: Policy
    batch: work.Batch
    budgets: jax.Array  # int32 [B, M]
    sampling: Sampling
    microbatch: Microbatch
    num_shards: int

    @classmethod
    def make(
        cls, policy: Policy, lengths: np.ndarray, prompt: int, budget: int, packs: int
    ) -> "Step":
        """`lengths`: int [B, M] of the rationales, at most `budget`."""
        mesh = policy.mesh
        num_shards = sharding.num_batch_shards(mesh) if mesh else 1
        size = work.Size(*lengths.shape, prompt, budget, _ANSWER)
        places = sharding.param_shardings(mesh, models.shapes(policy.config)) if mesh else None
        init = jax.jit(lambda key: models.init(policy.config, key), out_shardings=places)
        # The closing token ends a rationale, so it has one free token less.
        budgets = np.maximum(lengths - 1, 0).astype(np.int32)
        return cls(
            init(jax.random.key(0)),
            work.without_ends(policy),
            work.make_batch(policy, size),
            batch_placement.put_batch(mesh, budgets),
            work.full_length_sampling(policy, size),
            Microbatch(num_shards, packs),
            num_shards,
        )

    def sample(self, balanced: bool) -> list[Samples]:
        """All rollouts: of one call, or of one for each wave."""
        wave, whole = self.num_shards, (*self.batch.prompts[:2], self.batch.keys, self.batch.golds)
        num_waves = 1 if balanced else len(self.budgets) // wave
        parts = [
            batch_placement.every_nth((whole, self.budgets), index, num_waves)
            for index in range(num_waves)
        ]
        return [
            sampler.sample(
                self.params,
                self.policy,
                *part,
                self.sampling,
                wave,
                budgets=budgets,
                exchange=balanced,
            )
            for part, budgets in parts
        ]

    def learner_batch(self, samples: Samples) -> LearnerBatch:
        """What a gradient is taken on: every token of rationale and gold answer counts."""
        golds = self.batch.golds
        length = models.whole_tiles(self.sampling.max_length + golds.tokens.shape[1])
        trajectories = with_gold_answer(samples.rollouts, golds, length)
        ones = jnp.ones_like(samples.log_w) / samples.log_w.shape[1]
        none = jnp.zeros_like(ones)
        coefficients = losses.Coefficients(ones, ones, none, none)
        return LearnerBatch(self.batch.prompts, trajectories, coefficients)

    def learn(self, batch: LearnerBatch, balanced: bool) -> models.Params:
        """The gradient of a batch."""
        objective = Objective(losses.linear())
        grads, _ = batch_gradient(
            self.params, self.policy, batch, objective, self.microbatch, balanced=balanced
        )
        return grads


class Seconds(NamedTuple):
    """Of repeated calls, the first of which compiles and does not count."""

    all: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.all)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({min(self.all):.2f} - {max(self.all):.2f})"


def in_turns(calls: list[Callable[[], Any]], repeats: int) -> list[Seconds]:
    """Times calls one after the other, so that a machine's slow minutes slow all of them."""
    for call in calls:
        jax.block_until_ready(call())
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, mine in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            mine.append(time.perf_counter() - start)
    return [Seconds(each) for each in seconds]


def num_different(alone: list[Samples], balanced: Samples) -> int:
    """Rollouts with other tokens. Logits are rounded otherwise in products of other sizes, and one
    token in many thousands is chosen so near a boundary that this decides."""
    return sum(
        int(
            _different(
                part.rollouts.tokens,
                batch_placement.every_nth(balanced.rollouts, index, len(alone)).tokens,
            )
        )
        for index, part in enumerate(alone)
    )


@jax.jit
def _different(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a != b).any(-1).sum()


@jax.jit
def _difference(a: models.Params, b: models.Params) -> jax.Array:
    """The largest difference, relative to the largest number."""
    largest = lambda tree: jnp.stack([jnp.abs(x).max() for x in jax.tree.leaves(tree)]).max()
    return largest(jax.tree.map(jnp.subtract, a, b)) / largest(a)


def main(argv: list[str]) -> None:
    entry.only_flags(argv)
    process.set_up()
    process.look_for_devices()
    if _CONFIG.value:
        policy = prepare_shapes(_CONFIG.value).policy
    else:
        shape = models.DecoderConfig(**compare.SIZES[_SIZE.value])
        policy = Policy(shape, shape.vocab_size, mesh=sharding.make_mesh(-1, 1, 1))
    assert policy.mesh is not None
    num_shards = sharding.num_batch_shards(policy.mesh)
    lengths = rollout_lengths.drawn(
        np.random.default_rng(0),
        num_shards * _PER_SHARD.value,
        _ROLLOUTS.value,
        _MEAN.value,
        _BUDGET.value,
    )
    step = Step.make(policy, lengths, _PROMPT.value, _BUDGET.value, _PACKS.value)

    # ---- Both ways, in turns.
    sampled = {balanced: step.sample(balanced) for balanced in (False, True)}
    different = num_different(sampled[False], sampled[True][0])
    batch = step.learner_batch(sampled[True][0])
    grads = {balanced: step.learn(batch, balanced) for balanced in (False, True)}
    difference = float(_difference(grads[False], grads[True]))
    times = {
        "decode": in_turns(
            [functools.partial(step.sample, way) for way in (False, True)], _REPEATS.value
        ),
        "learn": in_turns(
            [functools.partial(step.learn, batch, way) for way in (False, True)], _REPEATS.value
        ),
    }
    # ---- For the user, and for a file.
    needed = int(lengths.sum())
    executed = [sum(each.lane_steps for each in sampled[way]) for way in (False, True)]
    device = policy.mesh.devices.flat[0]
    title = (
        f"{policy.mesh.size} x {device.device_kind}, jax {jax.__version__}: "
        f"{len(lengths)} prompts x {lengths.shape[1]}, mean {lengths.mean():.0f} of "
        f"{_BUDGET.value} tokens; medians of {_REPEATS.value} in seconds"
    )
    table = Table(title=title, title_justify="left")
    for column in ("phase", "alone", "balanced", "faster"):
        table.add_column(column)
    for phase, (alone, balanced) in times.items():
        table.add_row(phase, f"{alone}", f"{balanced}", f"{alone.median / balanced.median:.2f}x")
    whole = [sum(each[way].median for each in times.values()) for way in (0, 1)]
    table.add_row("step", f"{whole[0]:.2f}", f"{whole[1]:.2f}", f"{whole[0] / whole[1]:.2f}x")
    console = plain_console(120)
    console.print(table)
    console.print(
        f"lane-steps over tokens: alone {executed[0] / needed:.2f}, balanced "
        f"{executed[1] / needed:.2f}; {different} of {lengths.size} rollouts have other tokens "
        f"(rounding); gradients differ by {difference:.1e} of the largest entry"
    )
    if _OUT.value:
        facts = {
            "title": title,
            "seconds": {
                phase: {"alone": alone.all, "balanced": balanced.all}
                for phase, (alone, balanced) in times.items()
            },
            "faster": whole[0] / whole[1],
            "executed_over_needed": [each / needed for each in executed],
            "gradient_difference": difference,
            "different_rollouts": different,
        }
        with open(_OUT.value, "w", encoding="utf-8") as file:
            file.write(strict_json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    entry.run(main)
