"""From examples to padded batches of prompts, in an order that only (seed, step) decides.

    source of examples  --formatter-->  token ids  --limits-->  Dataset  --train_batches-->  batches

Exact resume: the position in the data is the step itself. Element i of the endless order is a
function of (seed, i) that can be computed for any i. There is no shuffle buffer, and no iterator
with a state that a checkpoint would have to save.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, cast

import grain
import numpy as np

from qlog.data import fields
from qlog.data.examples import Example, as_json
from qlog.data.formatting import Formatter
from qlog.data.invalid import CHOICES, InvalidRecord, Skipped
from qlog.errors import ConfigError, summary

OVERLONG = ("error", "skip")
INVALID = CHOICES
_CHUNK = 256  # examples that a thread measures at a time; part of what `Dataset.content` is


class Source(Protocol):
    """Random access to examples: a list, converted records, or a task that makes them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """B prompts with their gold answers, numpy, padded on the right.

    P, A and R are the same for all batches of a dataset: all run the same compiled programs.
    """

    tokens: np.ndarray  # int32 [B, P], prompts
    lengths: np.ndarray  # int32 [B], tokens of each prompt
    gold: np.ndarray  # int32 [B, A]: separator, gold answer, end of sequence
    gold_lengths: np.ndarray  # int32 [B]
    # int32 [B, R], annotated rationales with their thinking-end token; R = 1 and lengths 0 for a
    # dataset that was opened without them.
    rationale: np.ndarray
    rationale_lengths: np.ndarray  # int32 [B]
    uids: np.ndarray  # uint32 [B], from the example's id, for the sampling keys; see `_uids`
    # bool [B]: False where the last evaluation batch is filled up. There the first example of the
    # batch is repeated, so that the computation is a usual one.
    is_prompt: np.ndarray
    examples: tuple[Example, ...]  # the B examples themselves


class Encoded(NamedTuple):
    """One example with its token ids."""

    example: Example  # whose ids these are
    prompt: list[int]  # token ids of the formatted question
    gold: list[int]  # separator, gold answer, end of sequence
    rationale: list[int]  # [] where rationales were not asked for


class Lengths(NamedTuple):
    """Tokens of the three parts of an example."""

    prompt: int  # tokens of the formatted question
    gold: int  # separator and end of sequence included
    rationale: int  # annotated, thinking-end token included; 0 or 1 without rationales


class Limit(NamedTuple):
    """How long one part of an example may be, and what sets that, for messages."""

    field: str  # such as "config.data.max_prompt_tokens"
    value: int  # of that field
    uncounted: int = 0  # tokens that may come on top of it: a rationale's thinking-end token

    @property
    def tokens(self) -> int:
        """The most tokens of the part."""
        return self.value + self.uncounted


class Limits(NamedTuple):
    """How long the three parts of an example may be."""

    prompt: Limit
    gold: Limit  # separator and end of sequence included
    rationale: Limit | None  # None leaves rationales out of batches


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples of a source that fit their limits; made by `open_dataset`."""

    source: Source  # the examples as given
    kept: Sequence[int]  # the source's indices that belong to the dataset
    formatter: Formatter  # makes the token ids
    limits: Limits  # a longer example raises ConfigError when it is met
    widths: Lengths  # P, A and R of each batch; R is 1 without rationales
    skipped: dict[str, int]  # by the field of a limit: how many examples exceeded it, dropped
    # Ids of the source's examples in their order, those that are too long included; of an endless
    # source only of the first ones, which were measured.
    ids: Sequence[str]
    questions: np.ndarray  # uint64 [len(ids)], digests of source and answer of the same examples
    content: str  # a digest of all that the same examples hold, in their order
    endless: bool = False  # the source makes examples when asked for, and only some were measured
    invalid: Skipped = dataclasses.field(default_factory=Skipped)  # what could not be used, dropped

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.kept[index]]

    def encode(self, index: int) -> Encoded:
        """Token ids of one example.

        Raises:
          ConfigError: it exceeds a limit.
        """
        encoded = _encode(self.formatter, self[index], self.limits.rationale is not None)
        _check_lengths(np.array([_lengths(encoded)]), self.limits)
        return encoded


def open_dataset(
    source: Source,
    formatter: Formatter,
    limits: Limits,
    *,
    overlong: str = "error",
    invalid: str = "error",
    measure: int | None = None,
    name: str = "the dataset",
) -> Dataset:
    """Checks that examples exist and fit, before anything compiles.

    Args:
      source: any object with `len` and indexing that returns Examples.
      formatter: makes the token ids that are measured.
      limits: how long examples may be.
      overlong: 'error' stops at longer examples, 'skip' drops and counts them.
      invalid: 'error' stops at examples that cannot be used, 'skip' drops and counts them.
      measure: how many examples to measure now; all by default. The rest are checked when they are
        met. For tasks that make any number of examples on the fly.
      name: where the examples came from, for messages.

    Raises:
      ConfigError: no examples, examples over a limit, two with the same id, unknown `overlong`.
    """
    if overlong not in OVERLONG:
        raise ConfigError(
            f"{fields.OVERLONG} = {overlong!r} is unknown: use one of {', '.join(OVERLONG)}."
        )
    if invalid not in INVALID:
        raise ConfigError(
            f"{fields.INVALID} = {invalid!r} is unknown: use one of {', '.join(INVALID)}."
        )
    for field, value in ((fields.OVERLONG, overlong), (fields.INVALID, invalid)):
        if value == "skip" and measure is not None:
            raise ConfigError(
                f"{field} = 'skip' has to look at every example, which a task that makes them on "
                "the fly cannot: use 'error'."
            )
    size = len(source)
    if not size:
        raise ConfigError(
            f"{name} has no examples: check the split, {fields.FILES} and {fields.MANUAL_DIR}."
        )
    num_measured = size if measure is None else min(measure, size)
    unusable: dict[int, InvalidRecord] | None = {} if invalid == "skip" else None
    measured = _measure(
        source, formatter, num_measured, limits.rationale is not None, name, unusable
    )
    ids, lengths = measured.ids, measured.lengths
    skipped_invalid = Skipped()
    for index, error in sorted((unusable or {}).items()):
        skipped_invalid.add(error, f"example {index}")
    skipped_invalid.check_some_are_left(size, name)
    usable = [index for index in range(num_measured) if index not in (unusable or {})]
    _check_distinct(ids, name)
    if overlong == "error":
        _check_lengths(lengths, limits, name)
    over = _over(lengths, limits)  # bool [measured, 3]
    fits = ~over.any(axis=1)
    if not fits.any():
        needs = ", ".join(
            f"{limit.field} = {shortest - limit.uncounted}"
            for limit, shortest in zip(limits, lengths.min(axis=0), strict=True)
            if limit is not None
        )
        raise ConfigError(
            f"{fields.OVERLONG} = 'skip' drops all {size} examples of {name}: "
            f"the shortest need {needs}."
        )
    everything = fits.all() and len(usable) == num_measured
    kept = range(size) if everything else [usable[i] for i in np.flatnonzero(fits)]
    # Batches are as wide as the limits; if each example was measured, as wide as the longest.
    widths = Lengths(*(limit.tokens if limit else 1 for limit in limits))
    if num_measured == size:
        longest = lengths[fits].max(axis=0)
        widths = Lengths(*(bucket(int(n), m) for n, m in zip(longest, widths, strict=True)))
    skipped = {
        limit.field: int(n)
        for limit, n in zip(limits, over.sum(axis=0), strict=True)
        if limit is not None and n
    }
    return Dataset(
        source=source,
        kept=kept,
        formatter=formatter,
        limits=limits,
        widths=widths,
        skipped=skipped,
        ids=ids,
        questions=measured.questions,
        content=measured.content,
        endless=measure is not None,
        invalid=skipped_invalid,
    )


def measure_lengths(
    source: Source,
    formatter: Formatter,
    *,
    num_examples: int | None = None,
    rationales: bool = True,
) -> np.ndarray:
    """Measures the first examples of a source.

    Args:
      source, formatter: as in `open_dataset`.
      num_examples: how many, from the first one on; None is all.
      rationales: False leaves rationales out; their column is 0.

    Returns:
      int32 [N, 3]: tokens of prompt, gold answer and annotated rationale.
    """
    size = len(source) if num_examples is None else min(num_examples, len(source))
    return _measure(source, formatter, size, rationales).lengths


class _Measured(NamedTuple):
    """What one pass over N examples finds."""

    ids: list[str]  # N
    lengths: np.ndarray  # int32 [N, 3], as `Lengths`
    questions: np.ndarray  # uint64 [N], as `Dataset.questions`
    content: str  # as `Dataset.content`


def _measure(
    source: Source,
    formatter: Formatter,
    size: int,
    rationales: bool,
    name: str = "the dataset",
    unusable: dict[int, InvalidRecord] | None = None,
) -> _Measured:
    """Reads the first examples of a source, each once.

    Args:
      unusable: gets the examples that cannot be used, by index, which are left out; None: the
        first one is raised.
    """

    def measure(start: int) -> tuple[list[str], list[Lengths], list[int], bytes]:
        ids, lengths, questions, content = [], [], [], hashlib.sha256()
        for index in range(start, min(start + _CHUNK, size)):
            try:
                encoded = _encode(formatter, source[index], rationales)
            except InvalidRecord as error:
                if unusable is None:
                    raise
                unusable[index] = error
                continue
            ids.append(encoded.example.id)
            lengths.append(_lengths(encoded))
            questions.append(_question(encoded.example))
            content.update(_content(encoded.example, f"{name}: example {index}"))
        return ids, lengths, questions, content.digest()

    # The tokenizers release the GIL. Chunks, because a future for each of 1e6 examples takes
    # gigabytes.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        chunks = list(pool.map(measure, range(0, size, _CHUNK)))
    content = hashlib.sha256(b"".join(digest for *_, digest in chunks)).hexdigest()[:16]
    return _Measured(
        [each for ids, *_ in chunks for each in ids],
        np.array([each for _, lengths, *_ in chunks for each in lengths], np.int32).reshape(-1, 3),
        np.array([each for *_, questions, _ in chunks for each in questions], np.uint64),
        content,
    )


def _question(example: Example) -> int:
    """64 bits that are the same for the same source and answer, whatever the white space."""
    text = "\0".join(" ".join(part.split()) for part in (example.source, example.answer))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _content(example: Example, where: str) -> bytes:
    """All fields of an example; two examples have the same bytes only if they are equal.

    Raises:
      ConfigError: `extra` holds what JSON does not have.
    """
    try:
        as_json(example.extra)
        return json.dumps(vars(example), sort_keys=True, default=dict).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} (id {example.id!r}) {summary(error)}.") from error


def _check_distinct(ids: Sequence[str], name: str) -> None:
    """Raises ConfigError if two examples have the same id.

    Sampling keys come from ids, so both would get the same rollouts; evaluation keeps its rows by
    id.
    """
    first: dict[str, int] = {}
    for index, example_id in enumerate(ids):
        if first.setdefault(example_id, index) != index:
            raise ConfigError(
                f"{name}: examples {first[example_id]} and {index} have the same id "
                f"{example_id!r}: give each example its own."
            )


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

    Step s has the prompts s * B to (s + 1) * B - 1 of one endless order: the dataset shuffled anew
    in each epoch, epoch after epoch. Each process of a run gets the whole batch; the mesh decides
    which of its prompts a process computes on.

    Args:
      dataset: from `open_dataset`.
      seed: of the generator that shuffles.
      prompts_per_step: B.
      start_step: the first step to return.
      threads: how many prepare batches.
      prefetch: how many batches they keep ready.
    """
    # A MapDataset computes element i from i: a shuffle is a pseudorandom permutation of indices,
    # with another seed for each epoch. So neither the start nor the number of threads matters, and
    # an epoch may end inside a batch.
    order = grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat()

    def batch(step: int) -> tuple[int, PromptBatch]:
        indices = range(step * prompts_per_step, (step + 1) * prompts_per_step)
        encoded = [dataset.encode(cast(int, order[index])) for index in indices]
        return int(step), collate(dataset, encoded)

    # The elements of the iterator are the steps: to resume is to begin the range later.
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
    """The dataset once, in its order; the last batch is filled up to `batch_size`.

    Args:
      dataset: from `open_dataset`.
      batch_size: prompts per batch.
      limit: the number of examples after which it ends; all by default.
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
    filling = [encoded[0]] * (len(is_prompt) - len(encoded))
    encoded = [*encoded, *filling]
    widths, pad_id = dataset.widths, dataset.formatter.tokenizer.pad_id
    tokens, lengths = _pad([e.prompt for e in encoded], pad_id, widths.prompt)
    rationale, rationale_lengths = _pad([e.rationale for e in encoded], pad_id, widths.rationale)
    gold, gold_lengths = _pad([e.gold for e in encoded], pad_id, widths.gold)
    return PromptBatch(
        tokens=tokens,
        lengths=lengths,
        gold=gold,
        gold_lengths=gold_lengths,
        rationale=rationale,
        rationale_lengths=rationale_lengths,
        uids=_uids([e.example.id for e in encoded]),
        is_prompt=is_prompt,
        examples=tuple(e.example for e in encoded),
    )


def _uids(ids: Sequence[str]) -> np.ndarray:
    """uint32 [B], a number per prompt; another one where an example is there again.

    The end of an epoch and the beginning of the next may share a batch, and with few examples an
    epoch is shorter than a batch. With the number of its first occurrence an example would have the
    same M rollouts twice, which would count as 2 M.
    """
    seen: collections.Counter[str] = collections.Counter()
    uids = np.empty(len(ids), np.uint32)
    for place, example_id in enumerate(ids):
        uid = zlib.crc32(example_id.encode())
        occurrence = seen[example_id]
        # (The zero: a crc goes on as the crc of a longer text, and ids may end with a number.)
        uids[place] = zlib.crc32(b"\0%d" % occurrence, uid) if occurrence else uid
        seen[example_id] += 1
    return uids


def bucket(length: int, maximum: int) -> int:
    """The padded length: the next of 16, 24, 32, 48, 64, 96, ... but no more than `maximum`.

    Few lengths mean few compiled programs. Padding adds at most a half, and a fifth on average.
    """
    size = 16
    while size < length:
        # A power of two is followed by its 3/2, and that by the next power of two.
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return max(length, min(size, maximum))


def _encode(formatter: Formatter, example: Example, rationales: bool) -> Encoded:
    return Encoded(
        example,
        formatter.prompt(example),
        formatter.gold(example),
        formatter.rationale(example) if rationales else [],
    )


def _lengths(encoded: Encoded) -> Lengths:
    return Lengths(len(encoded.prompt), len(encoded.gold), len(encoded.rationale))


def _check_lengths(lengths: np.ndarray, limits: Limits, name: str = "the dataset") -> None:
    """Raises ConfigError if an example is too long. lengths: [N, 3]."""
    for limit, column, over in zip(limits, lengths.T, _over(lengths, limits).T, strict=True):
        if limit is not None and over.any():
            longest = column.max() - limit.uncounted
            raise ConfigError(
                f"{limit.field} = {limit.value} is too small for {over.sum()} of {len(over)} "
                f"examples of {name}, the longest with {longest} tokens: raise it to "
                f"{longest}, or set {fields.OVERLONG} to 'skip' to drop them."
            )


def _over(lengths: np.ndarray, limits: Limits) -> np.ndarray:
    """bool [N, 3]: which parts of which examples are too long."""
    return lengths > np.array([np.inf if limit is None else limit.tokens for limit in limits])


def _pad(
    sequences: Sequence[Sequence[int]], pad_id: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """int32 [N, width] and the lengths, int32 [N]."""
    padded = np.full((len(sequences), width), pad_id, np.int32)
    for i, ids in enumerate(sequences):
        padded[i, : len(ids)] = ids
    return padded, np.array([len(ids) for ids in sequences], np.int32)
