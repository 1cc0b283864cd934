"""From examples to padded batches of prompts, in an order that only (seed, step) decides."""

import concurrent.futures
import dataclasses
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import grain
import numpy as np

from qlog.data.examples import Example
from qlog.data.formatting import Formatter
from qlog.errors import ConfigError

OVERLONG = ("error", "skip")


class Source(Protocol):
    """Random access to examples: a list, converted records, or a task that makes them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """B prompts with their gold answers, numpy, padded on the right.

    Attributes:
        tokens: int32 [B, P] prompts; P, like A and R, is fixed for a dataset, so that every batch
            runs the same compiled programs.
        lengths: int32 [B] prompt tokens.
        gold: int32 [B, A] separator, gold answer, end of sequence.
        gold_lengths: int32 [B].
        rationale: int32 [B, R] annotated rationales with their thinking-end token; R = 1 and
            lengths 0 for a dataset opened without them.
        rationale_lengths: int32 [B].
        uids: uint32 [B] crc32 of the example's id, which feeds the sampling keys.
        is_prompt: bool [B], False for rows that fill up the last evaluation batch; such a row
            repeats the batch's first example, so that it computes something harmless.
        examples: the B examples themselves.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    gold: np.ndarray
    gold_lengths: np.ndarray
    rationale: np.ndarray
    rationale_lengths: np.ndarray
    uids: np.ndarray
    is_prompt: np.ndarray
    examples: tuple[Example, ...]


class Encoded(NamedTuple):
    """One example with its token ids."""

    example: Example
    prompt: list[int]
    gold: list[int]
    rationale: list[int]


class Limits(NamedTuple):
    """Longest allowed prompt, gold answer and annotated rationale, in tokens."""

    prompt: int
    gold: int
    rationale: int | None


# The config fields behind `Limits`, and the tokens that each does not count (the thinking-end).
_FIELDS = Limits(
    "config.data.max_prompt_tokens",
    "config.rollout.answer_reserve",
    "config.rollout.rationale_budget",
)
_UNCOUNTED = Limits(0, 0, 1)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples of a source that fit their limits; made by `open_dataset`.

    Attributes:
        source: the examples as given.
        kept: the source's indices that belong to the dataset; a range when none was dropped.
        formatter: makes the token ids.
        limits: token limits; a longer example raises ConfigError when it is met.
        widths: P, A and R of every batch; R is 1 without rationales.
        skipped: how many examples exceeded each limit and were dropped, by config field.
    """

    source: Source
    kept: Sequence[int]
    formatter: Formatter
    limits: Limits
    widths: Limits
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.kept[index]]

    def encode(self, index: int) -> Encoded:
        """Token ids of one example; ConfigError if it exceeds a limit."""
        encoded = _encode(self.formatter, self[index], self.limits.rationale is not None)
        _check_lengths([_lengths(encoded)], self.limits)
        return encoded


def open_dataset(
    source: Source,
    formatter: Formatter,
    *,
    max_prompt_tokens: int,
    max_answer_tokens: int,
    max_rationale_tokens: int | None = None,
    overlong: str = "error",
    measure: int | None = None,
    name: str = "config.data.name",
) -> Dataset:
    """Checks that examples exist and fit, before anything compiles.

    Args:
        source: any object with `len` and indexing that returns Examples.
        formatter: makes the token ids that are measured.
        max_prompt_tokens: longest prompt.
        max_answer_tokens: longest gold answer, separator and end of sequence included.
        max_rationale_tokens: longest annotated rationale, its thinking-end token included; None
            leaves rationales out of batches.
        overlong: 'error' stops at longer examples, 'skip' drops and counts them.
        measure: how many examples to measure now, None for all; the rest are checked when they
            are met. For tasks that make any number of examples on the fly.
        name: where the examples came from, for messages.

    Raises:
        ConfigError: no examples, examples over a limit, unknown `overlong`.
    """
    if overlong not in OVERLONG:
        raise ConfigError(
            f"config.data.overlong = {overlong!r} is unknown: use one of {', '.join(OVERLONG)}."
        )
    if overlong == "skip" and measure is not None:
        raise ConfigError(
            "config.data.overlong = 'skip' has to measure every example, which a "
            "task that makes them on the fly cannot: use 'error'."
        )
    size = len(source)
    if not size:
        raise ConfigError(f"{name} has no examples: check the split and config.data.manual_dir.")
    limits = Limits(max_prompt_tokens, max_answer_tokens, max_rationale_tokens)
    lengths = measure_lengths(
        source, formatter, count=measure, rationales=max_rationale_tokens is not None
    )
    measured = len(lengths)
    over = _over(lengths, limits)
    if overlong == "error":
        _check_lengths(lengths, limits, name)
    fits = ~over.any(axis=1)
    if measured and not fits.any():
        needs = ", ".join(
            f"{field} = {n - uncounted}"
            for field, n, uncounted in zip(_FIELDS, lengths.min(axis=0), _UNCOUNTED)
            if n
        )
        raise ConfigError(
            f"config.data.overlong = 'skip' drops all {size} examples of {name}: "
            f"the shortest need {needs}."
        )
    kept = range(size) if fits.all() else np.flatnonzero(fits).tolist()
    whole = limits._replace(rationale=limits.rationale or 1)
    widths = whole
    if measured == size:
        longest = lengths[fits].max(axis=0)
        widths = Limits(*(bucket(int(n), most) for n, most in zip(longest, whole)))
    skipped = {field: int(n) for field, n in zip(_FIELDS, over.sum(axis=0)) if n}
    return Dataset(source, kept, formatter, limits, widths, skipped)


def measure_lengths(
    source: Source, formatter: Formatter, *, count: int | None = None, rationales: bool = True
) -> np.ndarray:
    """Tokens of prompt, gold answer and annotated rationale, int32 [N, 3], of the first examples.

    Args:
        source, formatter: as in `open_dataset`.
        count: how many examples, None for all.
        rationales: False leaves rationales out; their column is 0.
    """
    size = len(source) if count is None else min(count, len(source))
    with concurrent.futures.ThreadPoolExecutor() as pool:  # the tokenizers release the GIL
        rows = pool.map(lambda i: _lengths(_encode(formatter, source[i], rationales)), range(size))
        return np.array(list(rows), np.int32).reshape(size, 3)


def train_batches(
    dataset: Dataset,
    *,
    seed: int,
    prompts_per_step: int,
    start_step: int = 0,
    threads: int = 2,
    prefetch: int = 4,
) -> Iterator[tuple[int, PromptBatch]]:
    """Endless (step, batch) pairs from `start_step` on.

    Step s holds prompts s * B to (s + 1) * B - 1 of one global order: the dataset shuffled anew
    in every epoch, epoch after epoch. The order depends on the seed alone, so a resumed run needs
    no state but its step, and threads do not change it. Several processes each get the whole batch:
    which rows of it they compute on is the mesh's business.

    Args:
        dataset: from `open_dataset`.
        seed: decides the order.
        prompts_per_step: B.
        start_step: the first step to return.
        threads, prefetch: threads that prepare batches and the batches they keep ready.
    """
    order = grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat()

    def batch(step: int) -> tuple[int, PromptBatch]:
        rows = range(step * prompts_per_step, (step + 1) * prompts_per_step)
        encoded = [dataset.encode(order[row]) for row in rows]
        return int(step), collate(dataset, encoded)

    steps = grain.MapDataset.range(start_step, sys.maxsize).map(batch)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(steps.to_iter_dataset(options))


def evaluation_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    limit: int | None = None,
    start: int = 0,
) -> Iterator[PromptBatch]:
    """The dataset once, in its own order; filling rows of the last batch are no prompts.

    Args:
        dataset: from `open_dataset`.
        batch_size: prompts per batch.
        limit: only the first so many examples.
        start: the first example.
    """
    size = len(dataset) if limit is None else min(limit, len(dataset))

    def batches() -> Iterator[PromptBatch]:
        for first in range(start, size, batch_size):
            encoded = [dataset.encode(i) for i in range(first, min(first + batch_size, size))]
            yield collate(dataset, encoded, batch_size)

    return batches()


def collate(
    dataset: Dataset, encoded: Sequence[Encoded], batch_size: int | None = None
) -> PromptBatch:
    """Pads encoded examples into one batch, filled up to `batch_size` with copies of the first."""
    is_prompt = np.arange(batch_size or len(encoded)) < len(encoded)
    encoded = [*encoded, *[encoded[0]] * (len(is_prompt) - len(encoded))]
    widths, pad_id = dataset.widths, dataset.formatter.tokenizer.pad_id
    tokens, lengths = _pad([e.prompt for e in encoded], pad_id, widths.prompt)
    rationale, rationale_lengths = _pad([e.rationale for e in encoded], pad_id, widths.rationale)
    gold, gold_lengths = _pad([e.gold for e in encoded], pad_id, widths.gold)
    uids = np.array([zlib.crc32(e.example.id.encode()) for e in encoded], np.uint32)
    return PromptBatch(
        tokens,
        lengths,
        gold,
        gold_lengths,
        rationale,
        rationale_lengths,
        uids,
        is_prompt,
        tuple(e.example for e in encoded),
    )


def bucket(length: int, maximum: int) -> int:
    """The padded length: the next of 16, 24, 32, 48, 64, 96, ... but no more than `maximum`.

    Few lengths mean few compiled programs; padding adds at most a half, a fifth on average.
    """
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return max(length, min(size, maximum))


def _encode(formatter: Formatter, example: Example, rationales: bool) -> Encoded:
    return Encoded(
        example,
        formatter.prompt(example),
        formatter.gold(example),
        formatter.rationale(example) if rationales else [],
    )


def _lengths(encoded: Encoded) -> tuple[int, int, int]:
    return len(encoded.prompt), len(encoded.gold), len(encoded.rationale)


def _check_lengths(lengths: Sequence, limits: Limits, name: str = "the dataset") -> None:
    lengths = np.asarray(lengths)
    for k, over in enumerate(_over(lengths, limits).T):
        if over.any():
            longest = lengths[:, k].max() - _UNCOUNTED[k]
            raise ConfigError(
                f"{_FIELDS[k]} = {limits[k] - _UNCOUNTED[k]} is too small for {over.sum()} of "
                f"{len(over)} examples of {name}, the longest with {longest} tokens: raise it to "
                f"{longest}, or set config.data.overlong to 'skip' to drop them."
            )


def _over(lengths: np.ndarray, limits: Limits) -> np.ndarray:
    return lengths > np.array([np.inf if limit is None else limit for limit in limits])


def _pad(rows: Sequence[Sequence[int]], pad_id: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    padded = np.full((len(rows), width), pad_id, np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded, np.array([len(row) for row in rows], np.int32)
