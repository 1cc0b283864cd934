"""Evaluation: n sampled answers per question, graded, saved; one path for training and commands."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from qlog import data, distributed, metrics, models, sampling, sharding
from qlog.errors import ConfigError
from qlog.experiment import Experiment

_BARE = "no_rationale/"  # before the names of metrics without a rationale
_FIELDS = {"id", "golds", "answers", "log_p", "forced", "complete"}  # that a row must have


def evaluate(
    experiment: Experiment, params: models.Params, samples: pathlib.Path | None = None
) -> dict[str, float]:
    """p@1, p@k, m@k (k = evaluation.rollouts_per_prompt), mean log P and the rest of `summarise`.

    With evaluation.without_rationale also `no_rationale/...`: the same with a budget of 0.

    Args:
      samples: JSON-lines file for all samples, from which `recompute` gets every number again.
    """
    passes = {"": experiment.evaluation_sampling}
    if experiment.config.evaluation.without_rationale:
        passes[_BARE] = dataclasses.replace(experiment.evaluation_sampling, rationale_budget=0)
    summary = {}
    for prefix, settings in passes.items():
        rows = list(sample_answers(experiment, params, settings))
        if samples is not None and jax.process_index() == 0:
            samples.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            _samples_file(samples, prefix).write_text("".join(lines), encoding="utf-8")
        summary |= _prefixed(prefix, summarise(experiment.config, rows))
    return summary


def recompute(config: ConfigDict, samples: pathlib.Path) -> dict[str, float]:
    """What `evaluate` returned when it wrote `samples`, from the file alone.

    Raises:
      ConfigError: no such file, or one that holds no samples.
    """
    summary = _recompute(config, samples)
    bare = _samples_file(samples, _BARE)
    if bare.is_file():
        summary |= _prefixed(_BARE, _recompute(config, bare))
    return summary


def _recompute(config: ConfigDict, file: pathlib.Path) -> dict[str, float]:
    rows = _read_samples(file)
    try:
        return summarise(config, rows)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}; give a file as evaluation wrote it.") from None


def _read_samples(file: pathlib.Path) -> list[dict]:
    try:
        with file.open(encoding="utf-8") as lines:  # splitlines() would break rows at U+2028
            rows = [json.loads(line) for line in lines]
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{file} holds no samples: {error}.") from None
    for number, row in enumerate(rows, 1):
        missing = _FIELDS - set(row if isinstance(row, dict) else ())
        if missing:
            raise ConfigError(f"{file}, line {number}: samples need {', '.join(sorted(missing))}.")
        # The sampler's own fields; metrics.summarise checks the others.
        flags = [value for name in ("forced", "complete") for value in _list(row[name]) or [None]]
        if type(row["log_p"]) not in (int, float) or not set(map(type, flags)) <= {bool}:
            raise ConfigError(
                f"{file}, line {number}: log_p must be a number, forced and complete lists of flags."
            )
    if not rows:
        raise ConfigError(f"{file} is empty.")
    return rows


def _list(value) -> list:
    return value if isinstance(value, list) else []


def summarise(config: ConfigDict, rows: list[dict]) -> dict[str, float]:
    """`metrics.summarise`, and the means of what only the sampler knows."""
    count = config.evaluation.rollouts_per_prompt
    summary = metrics.summarise(rows, k=count, dataset=config.data.name, seed=config.seed)
    numbers = np.array([[row["log_p"], np.mean(row["forced"]), np.mean(row["complete"])] for row in rows])
    log_p, forced, complete = numbers.mean(0)
    return summary | {
        "log_p": float(log_p), "budget_hits": float(forced), "truncated_answers": float(1 - complete),
    }  # fmt: skip


def _samples_file(samples: pathlib.Path, prefix: str) -> pathlib.Path:
    """STEM.jsonl, and STEM.no_rationale.jsonl beside it."""
    return samples.with_suffix(f".{_BARE[:-1]}{samples.suffix}") if prefix else samples


def _prefixed(prefix: str, summary: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in summary.items()}


def sample_answers(
    experiment: Experiment, params: models.Params, settings: sampling.Sampling
) -> Iterator[dict]:
    """One row per question of the evaluation split: id, golds, answers, log_w, log_p, flags.

    Each process samples its share of every batch, and all of them yield all rows. The keys depend
    on (seed, question, sample) alone, so runs and checkpoints are compared on the same random
    numbers.
    """
    config, formatter = experiment.config, experiment.formatter
    count = config.evaluation.rollouts_per_prompt
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    batches = data.evaluation_batches(
        experiment.evaluation_data, batch_size=config.evaluation.prompts_per_batch,
        limit=config.evaluation.prompts or None,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    for batch in batches:
        tokens, lengths, gold, gold_lengths, uids = sharding.put_batch(
            experiment.mesh,
            (batch.tokens, batch.lengths, batch.gold, batch.gold_lengths, batch.uids),
        )
        keys = sampling.rollout_keys(key, uids, count)
        rollouts, log_w, _ = sampling.sample(
            params, experiment.policy, tokens, lengths, keys, sampling.Golds(gold, gold_lengths), settings
        )
        rollouts, log_w = sharding.local_rows(experiment.mesh, (rollouts, log_w))
        yield from distributed.gather(_rows(formatter, batch, rollouts, log_w))


def _rows(formatter, batch: data.PromptBatch, rollouts: sampling.Rollouts, log_w) -> list[dict]:
    """A batch's rows of `sample_answers`; arrays on the host."""
    rows = []
    for row, example in enumerate(batch.examples):
        if batch.is_prompt[row]:
            texts = rollout_texts(formatter, rollouts, row)
            rows.append({
                "id": example.id,
                "golds": [example.answer, *example.aliases],
                "official_answer": example.official_answer,
                "source": example.source,
                "answers": [answer for _, answer in texts],
                "rationales": [rationale for rationale, _ in texts],
                "log_w": log_w[row].tolist(),
                "log_p": float(np.logaddexp.reduce(log_w[row]) - np.log(log_w.shape[1])),
                "forced": rollouts.forced[row].tolist(),
                "complete": rollouts.complete[row].tolist(),
            })  # fmt: skip
    return rows


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
