"""The paper's splits, chosen by a fixed rule on record ids.

The paper gives sizes, but not which records. Our rule, for an official split with enough records:
order its ids by sha256("qlog-splits-1/<dataset>/<official split>/<id>"), and give the first ones to
the paper's splits that come from it, to each its size, train before validation before test. So the
choice depends on the set of ids only: not on their order in a file, nor on a generator's seed.

| dataset | train | validation | test |
|---|---|---|---|
| finqa | 6145 of train | 872 of dev | 1132 of test (of dev, where there is no test file) |
| hotpotqa | 9067 of train | 342 of dev | 343 of dev |
| musique | 9985 of train | 579 of dev | 445 of dev |

The official test files of HotPotQA and MuSiQue have no answers, so both evaluation sets come from
dev. Where an official split has fewer records than needed, all its records are used: if validation
and test both come from it, in proportion to the paper's sizes. Splits never overlap.

Files of your own are their splits. A validation or test split for which no file is named is drawn
from train by the same kind of rule: train's ids ordered by sha256("qlog-splits-1/own/train/<id>"),
the first tenth for validation, the next tenth for test, of those two that have no file; at least 1
and at most 500 records each. What is left is train. This holds whichever split is opened, and
whether or not the others are.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qlog.data import builders, fields
from qlog.data.invalid import Skipped
from qlog.errors import ConfigError
from qlog.storage import paths

NAMES = ("train", "validation", "test")
RULE = "qlog-splits-1"
# Sizes of the paper's splits (section 7), and where each may come from: the first one present.
SIZES = {
    "finqa": {"train": 6145, "validation": 872, "test": 1132},
    "hotpotqa": {"train": 9067, "validation": 342, "test": 343},
    "musique": {"train": 9985, "validation": 579, "test": 445},
}
_OWN_SHARE, _OWN_MOST = 10, 500  # a drawn split has a tenth of the records, at most so many
_SOURCES = {"train": ("train",), "validation": ("dev",), "test": ("test", "dev")}


class Records(Protocol):
    """Random access to records whose ids are known."""

    @property
    def ids(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Split(Sequence[dict[str, Any]]):
    """A subset of the records of an official split, in the order of the rule's hashes.

    That order is a random one: the first n records are a random sample, too.

    Attributes:
      ids: the records' ids, in this order.
      official: the official split they come from.
      skipped: records that could not be used, of all of the official split.
    """

    def __init__(self, records: Records, indices: Sequence[int], official: str):
        self._records = records
        self._indices = indices
        self.ids = [records.ids[index] for index in indices]
        self.official = official
        self.skipped: Skipped = getattr(records, "skipped", Skipped())

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._records[self._indices[index]]


def official_split(name: str, split: str, available: Sequence[str]) -> str:
    """The official split that the records of a split of the paper come from.

    Args:
      name: a dataset of `SIZES`.
      split: "train", "validation" or "test".
      available: the official splits that there are.

    Raises:
      ConfigError: unknown name or split, or none of the official splits that it can come from.
    """
    if name not in SIZES:
        raise ConfigError(f"{fields.NAME} = {name!r} has no splits: use one of {', '.join(SIZES)}.")
    if split not in NAMES:
        raise ConfigError(f"the split {split!r} is unknown: use one of {', '.join(NAMES)}.")
    source = _source(split, available)
    if source is not None:
        return source
    raise ConfigError(
        f"{fields.NAME} = {name!r}: the {split} split comes from the official "
        f"{' or '.join(_SOURCES[split])} file, but {fields.MANUAL_DIR} or {fields.FILES} has only "
        f"{', '.join(available)}: add the file."
    )


def choose(name: str, split: str, ids: Sequence[str], available: Sequence[str]) -> list[int]:
    """Indices into `ids` of the records of a split of the paper, in the order of their hashes.

    Args:
      name, split, available: as in `official_split`.
      ids: the ids of the official split that `official_split` names.

    Raises:
      ConfigError: as `official_split`; or too few records to give each split at least one.
    """
    source = official_split(name, split, available)
    # The paper's splits that come from the same official one take its records in turn, so that they
    # never overlap.
    sharing = [s for s in NAMES if _source(s, available) == source]
    sizes = [SIZES[name][s] for s in sharing]
    if len(ids) < len(sharing):
        raise ConfigError(
            f"{fields.NAME} = {name!r}: the official {source} split has {len(ids)} records, too "
            f"few for {' and '.join(sharing)}: add records."
        )
    if len(ids) < sum(sizes):
        sizes = _shares(sizes, len(ids))
    place = sharing.index(split)
    start = sum(sizes[:place])  # after the splits that come first
    # The hash of an id is as good as a random number, and the same in every order of the file.
    order = sorted(range(len(ids)), key=lambda index: _hash(name, source, ids[index]))
    return order[start : start + sizes[place]]


def open_split(
    name: str,
    split: str,
    *,
    manual_dir: str | os.PathLike | None = None,
    data_dir: str | os.PathLike | None = None,
    prepared: str | os.PathLike | None = None,
) -> Split:
    """Opens a split of the paper: "train", "validation" or "test" of finqa, hotpotqa or musique.

    Args:
      manual_dir, data_dir: as in `builders.prepare`, where `prepared` is None.
      prepared: what `builders.prepare` returned.

    Raises:
      ConfigError, PassingError: as `builders.open_records` and `choose`.
    """
    if prepared is None:
        # Raises before anything is downloaded.
        official_split(name, split, builders.official_splits(name, manual_dir))
        prepared = builders.prepare(name, manual_dir=manual_dir, data_dir=data_dir)
    prepared = pathlib.Path(prepared)
    available = builders.prepared_splits(prepared)  # what was staged may lack some
    official = official_split(name, split, available)
    records = builders.open_prepared(name, official, prepared)
    return Split(records, choose(name, split, records.ids, available), official)


def own_source(split: str, files: Sequence[str]) -> str:
    """The split whose files of your own hold the records of `split`: itself, or train.

    Args:
      split: "train", "validation" or "test".
      files: the splits for which files are named.

    Raises:
      ConfigError: an unknown split, or none of the files that it can come from.
    """
    if split not in NAMES:
        raise ConfigError(f"the split {split!r} is unknown: use one of {', '.join(NAMES)}.")
    for source in (split, "train"):
        if source in files:
            return source
    raise ConfigError(
        f"{fields.FILES} names only {' and '.join(files)}, and the {split} split was asked for: "
        f"name its files in {fields.FILES}.{split}, or those of train, from which it is drawn."
    )


def choose_own(split: str, ids: Sequence[str], files: Sequence[str]) -> list[int] | None:
    """Which records of files of your own belong to a split, in the order of the rule.

    Args:
      split, files: as in `own_source`.
      ids: the ids of the records of `own_source`.

    Returns:
      Indices into `ids`; None where all of them do, in their own order.

    Raises:
      ConfigError: too few records to draw the split.
    """
    source = own_source(split, files)
    drawn = [each for each in NAMES if own_source(each, [*files, "train"]) == "train"]
    if source != "train" or drawn == ["train"]:
        return None
    held_out = [each for each in drawn if each != "train"]
    if len(ids) < len(drawn):
        if split == "train":  # nothing can be drawn, so all are left
            return None
        raise ConfigError(
            f"{fields.FILES}.train has {len(ids)} records, and {len(drawn)} are needed to draw "
            f"{split} from them: add records, or name its files in {fields.FILES}.{split}."
        )
    size = min(max(len(ids) // _OWN_SHARE, 1), _OWN_MOST)
    # In the order of the hashes: what one split takes does not depend on the order of the file.
    order = sorted(range(len(ids)), key=lambda index: _hash("own", "train", ids[index]))
    if split == "train":
        return order[size * len(held_out) :]
    start = size * held_out.index(split)
    return order[start : start + size]


class Identified(Protocol):
    """What knows the ids of its examples or records, in their order."""

    @property
    def ids(self) -> Sequence[str]: ...


def write_ids(path: str | os.PathLike, name: str, splits: Mapping[str, Identified]) -> None:
    """Writes the ids of a run's splits as JSON, or checks them against what is already there.

    Args:
      path: the file, in the run's folder.
      name: the dataset.
      splits: what is open by name, for instance {"train": ..., "validation": ...}.

    Raises:
      ConfigError: the file exists and lists other ids for one of the splits (the data has changed
        since the run began), or it is damaged.
    """
    path = paths.parse(path)
    # What was written stays: a later start may open other splits (evaluation only), and adds them.
    content = _written(path) or {"dataset": name, "rule": RULE, "splits": {}}
    written = {split: content["splits"][split]["ids"] for split in content["splits"]}
    for split, opened in splits.items():
        if written.get(split, list(opened.ids)) != list(opened.ids):
            raise ConfigError(
                f"{path} lists other ids for the {split} split than {name} has now "
                f"({len(written[split])} and {len(opened.ids)}): restore the data that the "
                "run began with, or start a new run."
            )
    for split, opened in splits.items():
        about = {}
        if isinstance(opened, Split):  # your own data come from no official split
            about = {"official_split": opened.official, "paper_size": SIZES[name][split]}
        content["splits"][split] = {**about, "ids": list(opened.ids)}
    paths.write(path, json.dumps(content, indent=1))


def read_ids(path: str | os.PathLike, split: str) -> list[str] | None:
    """The ids of a split that `write_ids` has written; None where it has written none.

    Raises:
      ConfigError: the file is damaged.
    """
    content = _written(paths.parse(path)) or {"splits": {}}
    return content["splits"].get(split, {}).get("ids")


def _written(path: paths.Path) -> dict[str, Any] | None:
    """What `write_ids` has written; None where there is no file.

    Raises:
      ConfigError: it is damaged.
    """
    try:
        content = json.loads(paths.read(path))
        for split in content["splits"].values():
            if not isinstance(split["ids"], list):
                raise TypeError("ids must be a list")
    except FileNotFoundError:
        return None
    except (AttributeError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}): restore it, or start a new run."
        ) from error
    return content


def _source(split: str, available: Sequence[str]) -> str | None:
    """The first official split that `split` may come from and that is there."""
    return next((source for source in _SOURCES[split] if source in available), None)


def _hash(name: str, official: str, record_id: str) -> str:
    return hashlib.sha256(f"{RULE}/{name}/{official}/{record_id}".encode()).hexdigest()


def _shares(sizes: Sequence[int], available: int) -> list[int]:
    """Shares of `available` records in proportion to one or two sizes, at least one each."""
    if len(sizes) == 1:
        return [available]
    first = min(max(round(available * sizes[0] / sum(sizes)), 1), available - 1)
    return [first, available - first]
