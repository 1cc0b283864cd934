"""Evaluation: n sampled answers per question, graded and saved; training and the commands share it.

A question and its samples are a row: one line of a JSON-lines file, from which every number can be
computed again. The way of a row: `sample_answers` makes it, `_PartialSamples` keeps it while the
evaluation is under way, `_summarise` grades it, `recompute` reads it back.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from qlog import data, models
from qlog.config import schema
from qlog.config.check import evaluation_scorers
from qlog.config.streams import Stream, stream_key
from qlog.console import ProgressLine, say, time_text
from qlog.errors import ConfigError
from qlog.experiment import Experiment
from qlog.experiment.contents import identity
from qlog.experiment.parts import EvaluationCalls
from qlog.grading import accuracy
from qlog.parallel import batch_placement, distributed
from qlog.parallel.interrupts import Interrupts
from qlog.records import Golds, Rollouts
from qlog.rollouts import sampler
from qlog.rollouts.decoding import Sampling
from qlog.rollouts.text import rollout_texts
from qlog.runs import folder
from qlog.storage import json_lines, paths, strict_json
from qlog.storage.paths import Path

_BARE = "no_rationale/"  # before the names of metrics without a rationale


class Row(accuracy.Row):
    """A question and its n samples: what is scored, and what only the sampler knows."""

    lengths: list[int]  # n numbers, tokens of the rationale and the answer
    log_w: list[float]  # n numbers, log p(gold answer | prompt, rationale), in nats
    log_p: float  # log of the mean of w: the estimate of log p(gold answer | prompt)
    forced: list[bool]  # n flags: the rationale's budget was spent
    complete: list[bool]  # n flags: the answer ended by itself


# What a row that is read back must have.
_FIELDS = {"id", "golds", "answers", "log_p", "forced", "complete"}


# ---- Sample, save, grade ----


def evaluate(
    experiment: Experiment,
    params: models.Params,
    samples: Path | None = None,
    *,
    parameters_from: str = "",
    interrupts: Interrupts | None = None,
) -> dict[str, float]:
    """p@1, p@k, m@k (k = evaluation.rollouts_per_prompt), mean log P and all else of a summary.

    With evaluation.without_rationale also `no_rationale/...`: the same with a budget of 0.

    Args:
      samples: JSON-lines file for all rows, from which `recompute` gets every number again. While
        the evaluation is under way, the rows of each batch lie next to it, and an evaluation that
        was interrupted goes on after them.
      parameters_from: where they are from, in words; an evaluation goes on only after rows of the
        same.
      interrupts: checked while decoding.

    Returns:
      The numbers by name, the same on every process: those of `accuracy.summarise`, and log_p,
      budget_hits, truncated_answers.

    Raises:
      Stop: a signal came.
    """
    passes = {"": experiment.evaluation_sampling}
    if experiment.config.evaluation.without_rationale:
        passes[_BARE] = dataclasses.replace(experiment.evaluation_sampling, rationale_budget=0)
    summary = {}
    for prefix, sampling in passes.items():
        file = samples and _samples_file(samples, prefix)
        partial = _PartialSamples(file, _inputs(experiment, parameters_from)) if file else None
        rows = _sample_all(experiment, params, sampling, partial, parameters_from, interrupts)
        # On the first process only: scoring takes seconds, and the others have no rows.
        found = distributed.once_per_run(lambda rows=rows: _summarise(experiment.config, rows))
        summary |= _prefixed(prefix, found)
        if file and jax.process_index() == 0:
            _write_questions(experiment.config, file, rows)
        # Not before: if a scorer stopped the run, the next start has nothing to sample again.
        if partial and jax.process_index() == 0:
            partial.remove()
    return summary


def _sample_all(
    experiment: Experiment,
    params: models.Params,
    sampling: Sampling,
    partial: "_PartialSamples | None",
    parameters_from: str,
    interrupts: Interrupts | None,
) -> list[Row]:
    """All rows, on the first process; [] on the others."""
    is_first_process = jax.process_index() == 0
    rows: list[Row] = []

    # Resume: the first process reads the rows that are saved, and tells the others their number.
    def read(partial: _PartialSamples) -> int:
        rows.extend(partial.read())
        return len(rows)

    num_saved = distributed.once_per_run(lambda: read(partial)) if partial else 0
    total = _num_questions(experiment)
    if num_saved:
        say(f"evaluation goes on after {num_saved} of {total} questions")

    # Sample the rest, and save each batch at once.
    line, began, num_done = ProgressLine(), time.monotonic(), num_saved
    title = "evaluating" if sampling.rationale_budget else "evaluating without rationales"

    # What is longest comes last: on a narrow terminal it is left out.
    def text(*facts: str) -> str:
        far = f"{title}: {num_done}/{total} questions"
        return "  ".join(filter(None, [far, *facts, parameters_from]))

    line.begin(text(), num_done / total)  # the first call compiles
    tell = lambda doing: line.beat(text(doing), num_done / total)
    with interrupts.telling(tell) if interrupts else contextlib.nullcontext():
        for batch in sample_answers(experiment, params, sampling, num_saved, interrupts):
            if is_first_process:
                rows += batch
                if partial:
                    partial.write(num_done, batch)
            num_done += len(batch)
            left = (time.monotonic() - began) / (num_done - num_saved) * (total - num_done)
            facts = (f"{time_text(left, whole=True)} left",) if left else ()
            line.show(text(*facts), num_done / total)

    if partial and is_first_process:
        partial.finish(rows)
    return rows


def _inputs(experiment: Experiment, parameters_from: str) -> dict[str, Any]:
    """Everything that the samples depend on, as JSON gives it back (tuples become lists)."""
    config = experiment.config
    evaluation, rollout, data_ = config.evaluation, config.rollout, config.data
    # Parts of older versions name no cache: theirs was that of "auto".
    of_cache = {} if rollout.cache == "auto" else {"cache": rollout.cache}
    found = of_cache | {
        "source": parameters_from,
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
        "data": [data.label(data_.name), data_.style, data_.max_prompt_tokens, data_.overlong],
        "description": data_.description,
        "fields": data_.fields.to_dict(),
        "world": data_.world.to_dict(),
    }
    return json.loads(json.dumps(found))


def _summarise(config: ConfigDict, rows: list[Row]) -> dict[str, float]:
    """`accuracy.summarise`, and the means of the fields that only the sampler knows."""
    grader, metrics = evaluation_scorers(config)
    summary = accuracy.summarise(
        rows,
        k=config.evaluation.rollouts_per_prompt,
        dataset=data.label(config.data.name),
        grader=grader,
        metrics=metrics,
        example=_example,
        threads=config.rollout.reward_threads,
        seed=config.seed,
    )
    numbers = np.array(
        [[float(row["log_p"]), np.mean(row["forced"]), np.mean(row["complete"])] for row in rows]
    )
    log_p, forced, complete = numbers.mean(0)
    return summary | {
        "log_p": float(log_p),
        "budget_hits": float(forced),
        "truncated_answers": float(1 - complete),
    }


def _example(row: accuracy.Row) -> data.Example:
    """The example of a row, for scorers; without its annotated rationale."""
    answer, *aliases = row["golds"]
    return data.Example(
        id=row["id"],
        source=row.get("source") or "",
        answer=answer,
        aliases=tuple(aliases),
        official_answer=str(row.get("official_answer") or ""),
        extra=row.get("extra") or {},
    )


def _prefixed(prefix: str, summary: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in summary.items()}


# ---- Rows on disk, or in a bucket ----


def _samples_file(samples: Path, prefix: str) -> Path:
    """STEM.jsonl, and STEM.no_rationale.jsonl next to it."""
    return samples.with_suffix(f".{_BARE[:-1]}{samples.suffix}") if prefix else samples


def _write_rows(file: Path, rows: Iterable[Row]) -> None:
    """The file is there whole or not at all: `paths.write`, on a disk and in a bucket alike."""
    paths.write(file, "".join(map(json_lines.line, rows)))


def _write_questions(config: ConfigDict, samples: Path, rows: list[Row]) -> None:
    """Writes `accuracy.per_question` and the ids: runs are compared question by question."""
    k = config.evaluation.rollouts_per_prompt
    values = {name: each.tolist() for name, each in accuracy.per_question(rows, k).items()}
    content = {"ids": [row["id"] for row in rows], **values}
    paths.write(folder.questions(samples), strict_json.dumps(content))


def _read_rows(file: Path) -> list[tuple[int, Any]]:
    """The rows of a file, each after the number of its line."""
    # As bytes: what is not UTF-8 is told in a sentence.
    text = paths.read(file, errors="surrogateescape")
    return json_lines.numbered(text.encode("utf-8", "surrogateescape"))


class _PartialSamples:
    """The rows of an evaluation under way: FILE.parts, a folder with one file for each batch.

    A file for each batch, because nothing can be appended to an object in a bucket.

    Args:
      file: where all rows are put in the end.
      inputs: what the samples depend on. Rows that were sampled from other inputs are removed.
    """

    def __init__(self, file: Path, inputs: dict[str, Any]):
        self._file, self._inputs = file, inputs
        self._folder = file.with_name(f"{file.name}.parts")

    def read(self) -> list[Row]:
        """The rows that are there, in their order, up to the first that is missing."""
        settings_file = self._folder / "settings.json"
        try:
            before = json.loads(paths.read(settings_file))
        except FileNotFoundError:
            before = None
        except (ValueError, RecursionError):
            before = "damaged"
        if before != self._inputs:
            if before is not None:
                self._folder.rmtree()
            paths.write(settings_file, json.dumps(self._inputs))
            return []
        # A part has the number of its first row for a name, so the next name is known.
        rows: list[Row] = []
        while True:
            try:
                more = [row for _, row in _read_rows(self._part(len(rows)))]
            except FileNotFoundError:
                return rows
            except (ValueError, RecursionError):
                more = []
            # A damaged part is sampled again, and so are those behind it.
            if not more or any(map(_wrong, more)):
                say(f"{self._part(len(rows))} is damaged: its questions are sampled again")
                return rows
            rows += more

    def write(self, first: int, rows: list[Row]) -> None:
        """Saves a batch, the rows from number `first` on."""
        _write_rows(self._part(first), rows)

    def finish(self, rows: list[Row]) -> None:
        """Writes the file of all rows."""
        _write_rows(self._file, rows)

    def remove(self) -> None:
        """Removes the parts."""
        self._folder.rmtree()

    def _part(self, first: int) -> Path:
        return self._folder / f"{first:06d}.jsonl"


def record(
    config: ConfigDict, metrics: dict[str, float], parameters_from: str, step: int | None
) -> str:
    """The JSON of a file of numbers, with what they are of.

    Args:
      config: the resolved config; the file gets a digest of it, config.json next to it all of it.
      metrics: from `evaluate` or `recompute`.
      parameters_from: in words, the "source" of the file.
      step: of training; None where there is none.
    """
    digest = hashlib.sha256(schema.to_json(config).encode()).hexdigest()[:16]
    about = {
        "data": data.label(config.data.name),
        "split": config.evaluation.split,
        "source": parameters_from,
        "step": step,
        "config": digest,
        "evaluation": json.loads(schema.to_json(config.evaluation)),
    }
    return strict_json.dumps(about | {"metrics": metrics}, indent=2, sort_keys=True)


def recompute(config: ConfigDict, samples: Path) -> dict[str, float]:
    """What `evaluate` returned when it wrote `samples`, from nothing but the file.

    Raises:
      ConfigError: there is no such file, or it holds no samples.
    """
    summary = _recompute(config, samples)
    bare = _samples_file(samples, _BARE)
    if paths.exists(bare):
        summary |= _prefixed(_BARE, _recompute(config, bare))
    return summary


def _recompute(config: ConfigDict, file: Path) -> dict[str, float]:
    rows = _checked_rows(file)
    try:
        return _summarise(config, rows)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}; give a file as evaluation wrote it.") from None


def _checked_rows(file: Path) -> list[Row]:
    """The rows of a file that a user names.

    Raises:
      ConfigError: it cannot be read, is empty, or something is wrong with a row.
    """
    paths.refuse_what_is_no_file(file, str(file))
    try:
        rows = _read_rows(file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise ConfigError(f"{file} holds no samples: {error}.") from None
    for number, row in rows:
        if wrong := _wrong(row):
            raise ConfigError(
                f"{file}, line {number}: {wrong}; give a file as evaluation wrote it."
            )
    if not rows:
        raise ConfigError(f"{file} is empty.")
    return [row for _, row in rows]


def _wrong(row: Any) -> str:
    """What is wrong with a row that was read back, as a sentence without its end; else ''."""
    missing = _FIELDS - set(row if isinstance(row, dict) else ())
    if missing:
        return f"samples need {', '.join(sorted(missing))}"
    if not (_is_log(row["log_p"]) and _are_flags(row["forced"]) and _are_flags(row["complete"])):
        return "log_p must be a finite number, forced and complete lists of flags"
    wrong = accuracy.wrong(row)
    return wrong and f"the row {wrong}"


def _is_log(value: Any) -> bool:
    """Whether it is a finite number, or one of the words that are written for the others."""
    if value in ("nan", "inf", "-inf"):  # of a model whose parameters are too large
        return True
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _are_flags(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(flag) is bool for flag in value)


# ---- From questions to rows ----


def sample_answers(
    experiment: Experiment,
    params: models.Params,
    sampling: Sampling,
    start: int = 0,
    interrupts: Interrupts | None = None,
) -> Iterator[list[Row]]:
    """The rows of the evaluation split, some batches at a time, from question number `start` on.

    Every process yields all rows, but decodes the texts only of its own part of a batch. The keys
    depend only on (seed, question, sample), so runs and checkpoints are compared on the same random
    numbers.

    Raises:
      Stop: a signal came while decoding.
    """
    config, mesh, formatter = experiment.config, experiment.mesh, experiment.formatter
    assert formatter is not None, "evaluation needs experiment.formatter"
    num_shards, total = experiment.prompts_at_once(1), _num_questions(experiment)
    calls = EvaluationCalls.of(total, num_shards, config.evaluation.prompts_per_batch)
    key = stream_key(config.seed, Stream.EVALUATION)
    batch_size = calls.per_shard * num_shards
    num_rollouts = config.evaluation.rollouts_per_prompt
    for batch in data.evaluation_batches(
        _dataset(experiment), batch_size=batch_size * calls.batches, limit=total, start=start
    ):
        # What fills up the last call is done after an answer.
        budgets = np.where(batch.is_prompt[:, None], sampling.rationale_budget, 0)
        budgets = np.repeat(budgets, num_rollouts, axis=1).astype(np.int32)
        tokens, lengths, gold, gold_lengths, uids, budgets = batch_placement.put_batch(
            mesh,
            (
                batch.tokens,
                batch.lengths,
                batch.gold,
                batch.gold_lengths,
                batch.uids,
                budgets,
            ),
        )
        samples = sampler.sample(
            params,
            experiment.policy,
            tokens,
            lengths,
            sampler.rollout_keys(key, uids, num_rollouts),
            Golds(gold, gold_lengths),
            sampling,
            batch_size,
            interrupts=interrupts,
            budgets=budgets,
        )
        rollouts, log_w = batch_placement.local_batch(mesh, (samples.rollouts, samples.log_w))
        found = _rows(experiment, formatter, batch, rollouts, log_w)
        # All processes get all rows, in the order of the questions, whichever process made them.
        everything = distributed.gather(found)
        yield [part["row"] for part in sorted(everything, key=lambda part: part["index"])]


def _dataset(experiment: Experiment) -> data.Dataset:
    dataset = experiment.evaluation_data
    assert dataset is not None, "evaluation needs experiment.evaluation_data"
    return dataset


def _num_questions(experiment: Experiment) -> int:
    size = len(_dataset(experiment))
    return min(size, experiment.config.evaluation.prompts or size)


def _rows(
    experiment: Experiment,
    formatter: data.Formatter,
    batch: data.PromptBatch,
    rollouts: Rollouts,
    log_w: np.ndarray,
) -> list[dict[str, Any]]:
    """The rows that this process answers for, as {"index": of the batch, "row": Row}.

    Args:
      batch: of B prompts.
      rollouts: numpy arrays [b, n, ...] of the b prompts that this process holds.
      log_w: float32 [b, n].
    """
    size = len(batch.examples)
    held = batch_placement.local_prompts(experiment.mesh, size)
    owned = set(batch_placement.owned_prompts(experiment.mesh, size))
    found = []
    for local, index in enumerate(held):
        # Several processes may hold a prompt; one of them owns it. The last batch is filled up with
        # copies of a prompt, which are no questions.
        if not (batch.is_prompt[index] and index in owned):
            continue
        example = batch.examples[index]
        texts = rollout_texts(formatter, rollouts, local)
        row = Row(
            id=example.id,
            golds=[example.answer, *example.aliases],
            official_answer=example.official_answer,
            source=example.source,
            prompt=formatter.tokenizer.decode(
                batch.tokens[index, : batch.lengths[index]].tolist(), show_control=True
            ),
            answers=[text.answer for text in texts],
            rationales=[text.rationale for text in texts],
            lengths=rollouts.lengths[local].tolist(),
            log_w=log_w[local].tolist(),
            log_p=float(np.logaddexp.reduce(log_w[local]) - np.log(log_w.shape[1])),
            forced=rollouts.forced[local].tolist(),
            complete=rollouts.complete[local].tolist(),
        )
        if example.extra:
            row["extra"] = dict(example.extra)
        found.append({"index": int(index), "row": row})
    return found
