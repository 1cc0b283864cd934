"""Measures the parts that go beyond the paper, against the paper's.

`python -m qlog.losses.theory.study` prints two kinds of tables. Bias: GARL with and without the
jackknife, and the Jensen bound, at equal M, exact, on models whose groups can all be enumerated.
Control of q: `adaptive_q` against fixed q and schedules, on tabular examples trained with noisy
labels, each method at the best of the given learning rates.
"""

import argparse
import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qlog import losses
from qlog.losses.theory import exact

# --- Bias -----------------------------------------------------------------------------------------

MODELS = {
    "smooth, P = 0.28": ([0.30, 0.55, 0.15], [-3.0, -1.0, 1.0]),
    "rare,   P = 0.05": ([0.05, 0.50, 0.45], [3.0, -7.0, -8.0]),
    "rare,   P = 0.01": ([0.01, 0.50, 0.49], [3.0, -7.0, -8.0]),
    "cold,   P = 8e-8": ([0.20, 0.40, 0.40], [-15.0, -17.0, -19.0]),
}


def bias_table(num_rollouts: Sequence[int] = (8, 32), prompts: int = 64) -> list[dict]:
    """Rows of errors of GARL + RLOO, plain and jackknifed, and of the Jensen bound's gradient.

    All are relative to the length of the exact gradient of -log_q P.

    Bias; standard deviation of one group; root mean square error of `prompts` such groups.
    """
    rows = []
    for name, (prior, answer_logits) in MODELS.items():
        model = exact.LatentModel(jnp.log(jnp.array(prior)), jnp.array(answer_logits))
        for m in num_rollouts:
            for q in (0.25, 0.5, 0.75, 1.0):
                row = {"model": name, "M": m, "q": q}
                gradient = exact.exact_gradient(model, q)
                size = np.linalg.norm(gradient)
                for label, transform in (
                    ("plain", losses.garl(q)),
                    ("jackknife", losses.garl(q, correction="jackknife")),
                    ("jensen", losses.jensen(q)),
                ):
                    found = exact.moments(model, transform, m)
                    bias = np.linalg.norm(found.mean - gradient) / size
                    deviation = np.sqrt(np.trace(found.covariance)) / size
                    row[f"{label} bias"] = float(bias)
                    row[f"{label} sd"] = float(deviation)
                    row[f"{label} rmse"] = float(np.sqrt(bias**2 + deviation**2 / prompts))
                rows.append(row)
    return rows


# --- Control of q ---------------------------------------------------------------------------------


class Population(NamedTuple):
    """E tabular examples of Z rationales and A answers. Answer 0 is right, 1 is the wrong label."""

    rationale: jax.Array  # [E, Z] float32, logits
    answer: jax.Array  # [E, Z, A] float32, logits after each rationale


RATIONALES, ANSWERS, ROLLOUTS = 8, 8, 32


def initial_population(key: jax.Array, examples: int, coldest: float) -> Population:
    """Examples whose right answer has probability log-uniform in [10^coldest, 0.1] at first."""
    level, spread, prior = jax.random.split(key, 3)
    log_p = jnp.log(10.0) * jax.random.uniform(level, (examples, 1), minval=coldest, maxval=-1.0)
    answer = 0.5 * jax.random.normal(spread, (examples, RATIONALES, ANSWERS))
    others = jax.nn.logsumexp(answer[..., 1:], -1)
    answer = answer.at[..., 0].set(log_p - jnp.log1p(-jnp.exp(log_p)) + others)
    # One rationale in eight makes the right answer e^3 times as likely.
    answer = answer.at[:, 0, 0].add(3.0)
    return Population(0.5 * jax.random.normal(prior, (examples, RATIONALES)), answer)


def answer_probabilities(population: Population) -> jax.Array:
    """[E, A] p(y | x), by enumeration."""
    prior = jax.nn.softmax(population.rationale)
    return jnp.einsum("ez,eza->ea", prior, jax.nn.softmax(population.answer))


def train(
    transform: losses.LossTransform,
    key: jax.Array,
    learning_rate: ArrayLike,
    noise: ArrayLike,
    steps: int,
    examples: int,
    coldest: float,
) -> tuple[jax.Array, jax.Array]:
    """Stochastic gradient descent; (mean p(right) [steps], mean p(wrong label) [steps]).

    Args:
      noise: share of the labels that are wrong, drawn anew at each step.
      coldest: log10 of the smallest probability of a right answer at first.
    """
    start, key = jax.random.split(key)
    population = initial_population(start, examples, coldest)
    state = transform.init(losses.abstract_scores(examples, ROLLOUTS))

    def step(carry, index):
        population, state = carry
        z_key, label_key, draw_key = jax.random.split(jax.random.fold_in(key, index), 3)
        z = jax.random.categorical(z_key, population.rationale[:, None], shape=(examples, ROLLOUTS))
        label = jax.random.bernoulli(label_key, noise, (examples, 1)).astype(jnp.int32)

        def log_probs(population):
            log_z = jnp.take_along_axis(jax.nn.log_softmax(population.rationale), z, 1)
            of_label = jnp.take_along_axis(
                jax.nn.log_softmax(population.answer), label[..., None], 2
            )
            return log_z, jnp.take_along_axis(of_label[..., 0], z, 1)

        scores = losses.Scores(log_w=log_probs(population)[1])
        found, state = losses.coefficients(transform, scores, state, key=draw_key)

        def surrogate(population):
            log_z, log_w = log_probs(population)
            return -jnp.sum(found.score * log_z + found.path * log_w)

        slope = jax.grad(surrogate)(population)
        population = jax.tree.map(lambda x, g: x - learning_rate * g, population, slope)
        # Progress is measured exactly, not on the samples that were trained on.
        p = answer_probabilities(population)
        return (population, state), (jnp.mean(p[:, 0]), jnp.mean(p[:, 1]))

    return jax.lax.scan(step, (population, state), jnp.arange(steps))[1]


def methods(steps: int) -> dict[str, dict]:
    """Arguments of GARL for every row of the second table."""
    fixed = {f"fixed q = {q}": dict(q=q) for q in (0.0, 0.25, 0.5, 0.75, 1.0)}
    moving = {
        "linear 1 to 0": dict(q=1.0, q_schedule="linear", q_steps=steps),
        "step 1 to 0 at half": dict(q=1.0, q_schedule="step", q_steps=steps // 2),
    }
    paces = {
        f"adaptive, pace {pace}": dict(q=1.0, q_schedule="adaptive", q_pace=pace)
        for pace in (0.25, 0.5, 0.8, 0.95)
    }
    return fixed | moving | paces


def control_tables(
    seeds: int,
    steps: int,
    learning_rates: Sequence[float] = (0.5, 2.0, 8.0, 32.0),
    noises: Sequence[float] = (0.0, 0.2),
    examples: int = 64,
    coldest: float = -6.0,
) -> dict[float, list[dict]]:
    """For every share of wrong labels, rows of means over seeds (+- one standard deviation).

    Each method stands at the learning rate with the highest final p.
    """
    tables = {noise: [] for noise in noises}
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    for name, arguments in methods(steps).items():
        transform = losses.build("garl", normalize=False, **arguments).transform
        one = functools.partial(train, transform, steps=steps, examples=examples, coldest=coldest)
        over_seeds = jax.vmap(one, (0, None, None))
        over_rates = jax.vmap(over_seeds, (None, 0, None))
        runs = jax.jit(jax.vmap(over_rates, (None, None, 0)))
        results = runs(keys, jnp.array(learning_rates), jnp.array(noises))
        # [noises, rates, seeds, steps] each.
        right_p, wrong_p = (np.asarray(x, np.float64) for x in results)
        for noise, right, wrong in zip(noises, right_p, wrong_p, strict=True):
            # Every method at its best rate, chosen by the final p, mean over seeds.
            best = int(np.argmax(right[:, :, -1].mean(1)))
            reached = right[best] >= 0.5
            # inf for a run that never gets there; the median copes with it, a mean would not.
            first = np.where(reached.any(1), reached.argmax(1) + 1, np.inf)
            final = right[best, :, -1]
            tables[noise].append(
                {
                    "method": name,
                    "rate": learning_rates[best],
                    "steps to p = 0.5": float(np.median(first)),
                    "mean p of all steps": float(right[best].mean()),
                    "final p": f"{final.mean():.3f} +- {final.std():.3f}",
                    "final p(wrong label)": float(wrong[best, :, -1].mean()),
                }
            )
    return tables


def show(rows: list[dict]) -> str:
    """A Markdown table."""
    write = lambda x: f"{x:.3g}" if isinstance(x, float) else str(x)
    cells = [list(rows[0])] + [[write(x) for x in row.values()] for row in rows]
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([lines[0], "|---" * len(cells[0]) + "|"] + lines[1:])


def main(argv: Sequence[str] | None = None) -> None:
    """The command: prints the tables."""
    parser = argparse.ArgumentParser(
        description="Measures the parts that go beyond the paper, against the paper's."
    )
    parser.add_argument(
        "--seeds", type=int, default=8, help="runs of every method, seeds 0, 1, ..."
    )
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args(argv)
    print(
        "Bias of GARL + RLOO, and of the Jensen bound, relative to the exact gradient of -log_q P "
        "(exact; rmse of 64 prompts)"
    )
    print(show(bias_table()))
    for noise, rows in control_tables(arguments.seeds, arguments.steps).items():
        print(
            f"\nControl of q: GARL + RLOO, M = {ROLLOUTS}, 64 examples of first p 1e-6 to 0.1, "
            f"{noise:.0%} wrong labels, {arguments.steps} steps of SGD at the best of the rates "
            f"0.5, 2, 8, 32, seeds 0 to {arguments.seeds - 1}"
        )
        print(show(rows))


if __name__ == "__main__":
    # Models of a few numbers: no accelerator is looked for, unless the environment names one.
    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
    main()
