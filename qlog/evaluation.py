"""Evaluation: n sampled answers per question, graded, saved; one path for training and commands."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator

import jax
import numpy as np

from qlog import data, metrics, models, sampling, scoring, sharding
from qlog.experiment import Experiment


def evaluate(
    experiment: Experiment, params: models.Params, samples: pathlib.Path | None = None
) -> dict[str, float]:
    """p@1, p@k, m@k (k = evaluation.rollouts_per_prompt), mean log P and the rest of `summarise`.

    With evaluation.without_rationale also `no_rationale/...`: the same with a budget of 0.

    Args:
      samples: JSON-lines file for all samples, from which every number can be computed again.
    """
    rows = list(sample_answers(experiment, params, experiment.evaluation_sampling))
    if samples is not None and jax.process_index() == 0:
        samples.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        samples.write_text("".join(lines), encoding="utf-8")
    summary = summarise(experiment, rows)
    if experiment.config.evaluation.without_rationale:
        bare = dataclasses.replace(experiment.evaluation_sampling, rationale_budget=0)
        bare_summary = summarise(experiment, list(sample_answers(experiment, params, bare)))
        summary |= {f"no_rationale/{name}": value for name, value in bare_summary.items()}
    return summary


def summarise(experiment: Experiment, rows: list[dict]) -> dict[str, float]:
    """`metrics.summarise`, and the means of what only the sampler knows."""
    config = experiment.config
    count = config.evaluation.rollouts_per_prompt
    summary = metrics.summarise(rows, k=count, dataset=config.data.name, seed=config.seed)
    numbers = np.array([[row["log_p"], np.mean(row["forced"]), np.mean(row["complete"])] for row in rows])
    log_p, forced, complete = numbers.mean(0)
    return summary | {
        "log_p": float(log_p), "budget_hits": float(forced), "truncated_answers": float(1 - complete),
    }  # fmt: skip


def sample_answers(
    experiment: Experiment, params: models.Params, settings: sampling.Sampling
) -> Iterator[dict]:
    """One row per question of the evaluation split: id, golds, answers, log_w, log_p, flags.

    The keys depend on (seed, question, sample) alone, so runs and checkpoints are compared on
    the same random numbers.
    """
    config, formatter = experiment.config, experiment.formatter
    count = config.evaluation.rollouts_per_prompt
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    batches = data.evaluation_batches(
        experiment.evaluation_data, batch_size=config.evaluation.prompts_per_batch,
        limit=config.evaluation.prompts or None,
    )  # fmt: skip
    for batch in batches:
        tokens, lengths, gold, gold_lengths, uids = sharding.put_batch(
            experiment.mesh,
            (batch.tokens, batch.lengths, batch.gold, batch.gold_lengths, batch.uids),
        )
        keys = sampling.rollout_keys(key, uids, count)
        rollouts, prefix, suffix = sampling.sample(
            params, experiment.policy, tokens, lengths, keys, settings
        )
        log_w = scoring.score_answers(
            params, experiment.policy, prefix, suffix, rollouts.tokens,
            rollouts.rationale_lengths, gold, gold_lengths,
        )  # fmt: skip
        rollouts, log_w = jax.device_get((rollouts, log_w))
        for row, example in enumerate(batch.examples):
            if batch.is_prompt[row]:
                texts = rollout_texts(formatter, rollouts, row)
                yield {
                    "id": example.id,
                    "golds": [example.answer, *example.aliases],
                    "official_answer": example.official_answer,
                    "source": example.source,
                    "answers": [answer for _, answer in texts],
                    "rationales": [rationale for rationale, _ in texts],
                    "log_w": log_w[row].tolist(),
                    "log_p": float(np.logaddexp.reduce(log_w[row]) - np.log(count)),
                    "forced": rollouts.forced[row].tolist(),
                    "complete": rollouts.complete[row].tolist(),
                }


def rollout_texts(
    formatter: data.Formatter, rollouts: sampling.Rollouts, row: int
) -> list[tuple[str, str]]:
    """(rationale, answer) texts of a prompt's rollouts; `rollouts` on the host."""
    texts = []
    for tokens, end, length in zip(
        rollouts.tokens[row], rollouts.rationale_lengths[row], rollouts.lengths[row]
    ):
        rationale = formatter.tokenizer.decode(tokens[: end - 1].tolist(), show_control=True)
        texts.append((rationale, formatter.answer_text(tokens[end:length].tolist())))
    return texts
