"""Evaluation: n sampled answers per question, graded, saved; one path for training and commands."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from qlog import data, models
from qlog.config import schema
from qlog.config.streams import Stream, stream_key
from qlog.console import ProgressLine, clock, say
from qlog.errors import ConfigError
from qlog.experiment import Experiment, identity
from qlog.grading import accuracy
from qlog.parallel import distributed, sharding
from qlog.parallel.interrupts import Interrupts
from qlog.records import Golds, Rollouts
from qlog.rollouts import sampler
from qlog.rollouts.text import rollout_texts
from qlog.storage import paths
from qlog.storage.paths import Path

_BARE = "no_rationale/"  # before the names of metrics without a rationale
_FIELDS = {"id", "golds", "answers", "log_p", "forced", "complete"}  # that a row must have


def evaluate(
    experiment: Experiment,
    params: models.Params,
    samples: Path | None = None,
    *,
    source: str = "",
    interrupts: Interrupts | None = None,
) -> dict[str, float]:
    """p@1, p@k, m@k (k = evaluation.rollouts_per_prompt), mean log P and the rest of `summarise`.

    With evaluation.without_rationale also `no_rationale/...`: the same with a budget of 0.

    Args:
      samples: JSON-lines file for all samples, from which `recompute` gets every number again. Until
        it is there, the rows of each batch lie beside it, and an evaluation that was interrupted
        goes on after them.
      source: what the parameters are; only rows of the same source are gone on after.
      interrupts: looked at while decoding.

    Raises:
      Stop: a signal came.
    """
    passes = {"": experiment.evaluation_sampling}
    if experiment.config.evaluation.without_rationale:
        passes[_BARE] = dataclasses.replace(experiment.evaluation_sampling, rationale_budget=0)
    summary = {}
    for prefix, draws in passes.items():
        file = samples and _samples_file(samples, prefix)
        rows = _sample_all(experiment, params, draws, file, source, interrupts)
        found = distributed.once_per_run(lambda rows=rows: summarise(experiment.config, rows))
        summary |= _prefixed(prefix, found)
    return summary


def _sample_all(
    experiment, params, draws, file: Path | None, source: str, interrupts
) -> list[dict]:
    """All rows, on the first process; [] on the others."""
    parts = file and _Parts(file, _what_decides(experiment, source))
    rows: list[dict] = []

    def read() -> int:
        rows.extend(parts.read())
        return len(rows)

    first = done = distributed.once_per_run(read) if parts else 0
    total = _questions(experiment)
    if done:
        say(f"evaluation goes on after {done} of {total} questions")
    line, began, is_writer = ProgressLine(), time.monotonic(), jax.process_index() == 0
    for batch in sample_answers(experiment, params, draws, done, interrupts):
        if is_writer:
            rows += batch
            if parts:
                parts.write(first, batch)
        first += len(batch)
        left = (time.monotonic() - began) / (first - done) * (total - first)
        line.show(f"evaluating {source}: {first}/{total} questions  {clock(left)} left")
    if parts and is_writer:
        parts.join(rows)
    return rows


def _what_decides(experiment: Experiment, source: str) -> dict:
    """All on which samples depend."""
    config = experiment.config
    evaluation, rollout, data_ = config.evaluation, config.rollout, config.data
    found = {
        "source": source,
        "seed": config.seed,
        "dtype": config.dtype,
        "identity": identity(experiment),
        "evaluation": [
            evaluation[name]
            for name in (
                "split",
                "prompts",
                "rollouts_per_prompt",
                "temperature",
                "top_k",
                "top_p",
            )
        ],
        "rollout": [
            rollout[name] for name in ("rationale_budget", "answer_reserve", "closing_text")
        ],
        "data": [data_[name] for name in ("name", "style", "max_prompt_tokens", "overlong")],
        "world": data_.world.to_dict(),
    }
    return json.loads(json.dumps(found))


class _Parts:
    """Rows of an evaluation under way: one file per batch in FILE.parts, whole objects for buckets.

    Args:
      file: where all rows are put in the end.
      settings: parts of other settings are thrown away.
    """

    def __init__(self, file: Path, settings: dict):
        self._file, self._settings = file, settings
        self._folder = file.with_name(f"{file.name}.parts")

    def read(self) -> list[dict]:
        """The rows that are there, in their order, without a gap."""
        settings = self._folder / "settings.json"
        try:
            before = json.loads(paths.read(settings))
        except FileNotFoundError:
            before = None
        if before != self._settings:
            if before is not None:
                self._folder.rmtree()
            paths.write(settings, json.dumps(self._settings))
            return []
        rows = []
        while True:
            try:
                lines = paths.read(self._part(len(rows))).split("\n")[:-1]  # not at U+2028
            except FileNotFoundError:
                return rows
            rows += [json.loads(line) for line in lines]

    def write(self, first: int, rows: list[dict]) -> None:
        """Rows from number `first` on."""
        paths.write(self._part(first), _lines(rows))

    def join(self, rows: list[dict]) -> None:
        """Writes the file of all rows in the parts' place."""
        paths.write(self._file, _lines(rows))
        self._folder.rmtree()

    def _part(self, first: int) -> Path:
        return self._folder / f"{first:06d}.jsonl"


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def record(config: ConfigDict, metrics: dict[str, float], source: str, step: int | None) -> str:
    """The JSON of a file of numbers: what they are of stands beside them.

    source: the parameters, in words; step: of training, None where there is none. `config` is a
    digest of the resolved config, which config.json beside it has in full.
    """
    digest = hashlib.sha256(schema.to_json(config).encode()).hexdigest()[:16]
    about = {
        "data": config.data.name,
        "split": config.evaluation.split,
        "source": source,
        "step": step,
        "config": digest,
        "evaluation": config.evaluation.to_dict(),
    }
    return json.dumps(about | {"metrics": metrics}, indent=2, sort_keys=True)


def recompute(config: ConfigDict, samples: Path) -> dict[str, float]:
    """What `evaluate` returned when it wrote `samples`, from the file alone.

    Raises:
      ConfigError: no such file, or one that holds no samples.
    """
    summary = _recompute(config, samples)
    bare = _samples_file(samples, _BARE)
    if paths.exists(bare):
        summary |= _prefixed(_BARE, _recompute(config, bare))
    return summary


def _recompute(config: ConfigDict, file: Path) -> dict[str, float]:
    rows = _read_samples(file)
    try:
        return summarise(config, rows)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}; give a file as evaluation wrote it.") from None


def _read_samples(file: Path) -> list[dict]:
    try:
        # splitlines() would break rows at U+2028.
        rows = [json.loads(line) for line in paths.read(file).split("\n") if line]
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from None
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
    summary = accuracy.summarise(rows, k=count, dataset=config.data.name, seed=config.seed)
    numbers = np.array(
        [[row["log_p"], np.mean(row["forced"]), np.mean(row["complete"])] for row in rows]
    )
    log_p, forced, complete = numbers.mean(0)
    return summary | {
        "log_p": float(log_p),
        "budget_hits": float(forced),
        "truncated_answers": float(1 - complete),
    }


def _samples_file(samples: Path, prefix: str) -> Path:
    """STEM.jsonl, and STEM.no_rationale.jsonl beside it."""
    return samples.with_suffix(f".{_BARE[:-1]}{samples.suffix}") if prefix else samples


def _prefixed(prefix: str, summary: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in summary.items()}


def sample_answers(
    experiment: Experiment,
    params: models.Params,
    draws: sampler.Sampling,
    start: int = 0,
    interrupts: Interrupts | None = None,
) -> Iterator[list[dict]]:
    """By batch, a row per question of the evaluation split: id, golds, answers, log_w, log_p, flags.

    From question number `start` on; Stop is raised when a signal came while decoding.

    Each process decodes the texts of its rows of a batch, and all of them yield all rows. The keys depend
    on (seed, question, sample) alone, so runs and checkpoints are compared on the same random
    numbers.
    """
    config, formatter = experiment.config, experiment.formatter
    count = config.evaluation.rollouts_per_prompt
    # No more rows than questions, so that few of them on many chips are not filled up with copies.
    shards, total = experiment.prompts_at_once(1), _questions(experiment)
    batch_size = min(config.evaluation.prompts_per_batch, -(-total // shards)) * shards
    key = stream_key(config.seed, Stream.EVALUATION)
    batches = data.evaluation_batches(
        experiment.evaluation_data, batch_size=batch_size, limit=total, start=start
    )
    for batch in batches:
        tokens, lengths, gold, gold_lengths, uids = sharding.put_batch(
            experiment.mesh,
            (batch.tokens, batch.lengths, batch.gold, batch.gold_lengths, batch.uids),
        )
        keys = sampler.rollout_keys(key, uids, count)
        rollouts, log_w, _ = sampler.sample(
            params,
            experiment.policy,
            tokens,
            lengths,
            keys,
            Golds(gold, gold_lengths),
            draws,
            interrupts=interrupts,
        )
        rollouts, log_w = sharding.local_batch(experiment.mesh, (rollouts, log_w))
        size = len(batch.examples)
        found = _rows(
            formatter,
            batch,
            sharding.local_prompts(experiment.mesh, size),
            set(sharding.owned_prompts(experiment.mesh, size)),
            rollouts,
            log_w,
        )
        yield [row for _, row in sorted(distributed.gather(found), key=lambda pair: pair[0])]


def _questions(experiment: Experiment) -> int:
    size = len(experiment.evaluation_data)
    return min(size, experiment.config.evaluation.prompts or size)


def _rows(
    formatter,
    batch: data.PromptBatch,
    held: np.ndarray,
    owned: set[int],
    rollouts: Rollouts,
    log_w: np.ndarray,
) -> list[tuple[int, dict]]:
    """(row of the batch, its row of `sample_answers`), for those that this process answers for.

    Args:
      held: the rows of the batch that `rollouts` and `log_w`, on the host, have.
    """
    rows = []
    for row, index in enumerate(held):
        if batch.is_prompt[index] and index in owned:
            example, texts = batch.examples[index], rollout_texts(formatter, rollouts, row)
            rows.append(
                (
                    int(index),
                    {
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
                    },
                )
            )
    return rows
