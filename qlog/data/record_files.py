"""Files of records: JSON lines, JSON arrays and Parquet, here or in a bucket, by random access.

`expand` lists the files that a config names, `local` brings them onto this host, `open_files` opens
them. What is held in memory, for a file of 1e6 records of 1 KB:

    a.jsonl        24 MB: where each record is; it is read when it is asked for
    a.jsonl.gz     the text, unpacked: 1 GB
    a.json         of an array, the parsed records: a few GB
    a.parquet      the columns as Arrow has them: 1 GB

And for each open split its ids and digests of its questions: 0.1 GB.
"""

import array
import bisect
import gzip
import io
import itertools
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from qlog.data import fields, parquet_values
from qlog.data.invalid import InvalidRecord, Skipped
from qlog.errors import ConfigError, summary
from qlog.storage import assets, git_lfs, paths, strict_json

Record = dict[str, Any]  # one record, values as JSON has them

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)
# How files and folders are named after a split: train-0-of-2.parquet, gsm_dev.json, test/...
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# A whole word, between any characters that are no letters: 'latest' is none, 'train2' is one.
_SPLIT_WORD = re.compile(rf"(?<![^\W\d_])({'|'.join(_SPLIT_WORDS)})(?![^\W\d_])", re.IGNORECASE)
# Files about a dataset that lie next to its data, as the Hub's libraries write them.
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_BOM = b"\xef\xbb\xbf"  # U+FEFF in UTF-8, which some editors write first


class File(NamedTuple):
    """One file of records."""

    name: str  # as the user named it, for messages
    path: str  # on this host; until `local` has fetched it, the address in a bucket


# ---- Which files ----


def expand(
    specs: Sequence[str],
    split: str,
    field: str,
    suffixes: Sequence[str],
    drawn: Sequence[str] = (),
) -> list[str]:
    """The files that the entries of `config.data.files` name.

    Args:
      specs: paths, folders or globs, here or in a bucket. Of a folder in which files or folders
        are named after splits, as on the Hugging Face Hub, those of `split` are taken.
      split: 'train', 'validation' or 'test'.
      field: the config field that names them, for messages.
      suffixes: the kinds of files that are wanted.
      drawn: splits that would be drawn from these files, because the config names none for them.

    Raises:
      ConfigError: nothing is there, or nothing of a kind that can be read; a folder of which it is
        not clear which files are meant; a folder that has files of a split in `drawn`.
      PassingError: the bucket cannot be reached now.
    """
    found: dict[str, None] = {}  # in order, each file once
    for spec in specs:
        names = assets.names(spec, field)
        if not names:
            raise ConfigError(_nothing_there(spec, field))
        folder = spec.rstrip("/") + "/"
        readable = [name for name in names if name.lower().endswith(tuple(suffixes))]
        if all(name.startswith(folder) for name in names):
            inside = [name[len(folder) :] for name in readable]
            chosen = _of_split(inside, split, f"{field} = {spec!r}", drawn)
            readable = [folder + name for name in chosen]
        if not readable:
            raise ConfigError(
                f"{field} = {spec!r} holds no file of the {split} split whose name ends with "
                f"{' or '.join(suffixes)}: correct the path or {fields.NAME}, or "
                "convert other formats (CSV, text) to JSON lines."
            )
        found |= dict.fromkeys(readable)
    return list(found)


def _nothing_there(spec: str, field: str) -> str:
    if "://" not in spec and os.path.isdir(os.path.expanduser(spec)):
        return f"{field} = {spec!r} is an empty folder: put the files there, or correct the path."
    return (
        f"{field} = {spec!r} is neither a file nor a folder, and no file matches it"
        f"{'' if '://' in spec else assets.why_missing(spec)}: "
        "correct the path (relative ones begin at the current folder)."
    )


def _of_split(
    names: Sequence[str], split: str, what: str, drawn: Sequence[str] = ()
) -> Sequence[str]:
    """Of a folder's files those of a split; all, where no name says a split.

    Args:
      names: relative to the folder.
      what: the field and the folder, for messages.
      drawn: as in `expand`.

    Raises:
      ConfigError: as `expand`.
    """
    # Parquet first: a snapshot of the Hub may hold JSON files about the data next to it.
    names = [name for name in names if name.lower().endswith(PARQUET_SUFFIXES)] or [
        name for name in names if pathlib.PurePosixPath(name).name not in _ABOUT
    ]
    places = {name: _split_of(name, what) for name in names}
    unnamed = [name for name, place in places.items() if not place.split]
    if len(unnamed) == len(names):
        return names
    # A guess would take test files for training, or leave out files of the split.
    if unnamed:
        named = next(name for name in names if name not in unnamed)
        raise ConfigError(
            f"{what}: {named!r} in there is named after a split, and {unnamed[0]!r} is not: name "
            "the files of each split by a glob or a list, or rename them."
        )
    for other in drawn:
        if example := next((name for name in names if places[name].split == other), None):
            raise ConfigError(
                f"{what} has files of the {other} split, too ({example!r}), but {fields.FILES} "
                f"names none, so {other} would be drawn from other records: set "
                f"{fields.FILES}.{other} to the same folder, or name only the files of {split} "
                "by a glob."
            )
    # The Hub keeps each configuration of a dataset in a folder of its own: main, socratic.
    chosen = [name for name in names if places[name].split == split]
    folders = sorted({places[name].folder for name in chosen})
    if len(folders) > 1:
        raise ConfigError(
            f"{what} has files of the {split} split in several folders: name one of "
            f"{', '.join(each or '.' for each in folders)}, or list the files that belong together."
        )
    return chosen


class _SplitOf(NamedTuple):
    """The split that a path is named after."""

    split: str  # '' if none
    folder: str  # what the path has before the part that says it


def _split_of(name: str, what: str) -> _SplitOf:
    """Reads the parts of a path, the nearest to the file first.

    Raises:
      ConfigError: a part that names two splits.
    """
    parts = name.split("/")
    for place in reversed(range(len(parts))):
        said = {_SPLIT_WORDS[word.lower()] for word in _SPLIT_WORD.findall(parts[place])}
        if len(said) > 1:
            raise ConfigError(
                f"{what}: {name!r} in there is named after {' and '.join(sorted(said))}: name the "
                "files of each split by a glob or a list, or rename it."
            )
        if said:
            return _SplitOf(said.pop(), "/".join(parts[:place]))
    return _SplitOf("", "")


def local(names: Sequence[str], field: str) -> list[File]:
    """The files on this host; those of a bucket are copied into the user's cache folder.

    Raises:
      ConfigError, PassingError: as `assets.local`.
    """
    return [File(name, str(assets.local(name, field))) for name in names]


# ---- One file ----


class _Opened(Protocol):
    """Random access to the records of one file."""

    def __len__(self) -> int: ...

    def record(self, index: int) -> Record: ...

    def where(self, index: int) -> str:
        """The file and the line or row, for messages."""
        ...


class _Lines:
    """JSON lines. Blank lines are left out; lines are numbered from 1 with them."""

    def __init__(self, name: str, file: BinaryIO):
        self._name = name
        # A file that can be read at any place stays on the disk. One that is unpacked is held. It
        # is not mapped: a file that is cut short while it is mapped ends the process.
        self._file = file if isinstance(file, io.BufferedReader) else None
        self._held = b"" if self._file else file.read()
        self._stamp = self._stamped()
        # int64 arrays: lists of Python's integers would take 4 times as much.
        self._starts, self._sizes = array.array("q"), array.array("q")
        self._numbers = array.array("q")
        place = 0
        for number, line in enumerate(file if self._file else io.BytesIO(self._held), 1):
            if (line.removeprefix(_BOM) if number == 1 else line).strip():
                self._starts.append(place)
                self._sizes.append(len(line))
                self._numbers.append(number)
            place += len(line)

    def _stamped(self) -> tuple[int, int]:
        """Size and time of the last change of a file that is read when it is needed."""
        stat = os.fstat(self._file.fileno()) if self._file else None
        return (stat.st_size, stat.st_mtime_ns) if stat else (0, 0)

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        return f"{self._name}:{self._numbers[index]}"

    def record(self, index: int) -> Record:
        start, size = self._starts[index], self._sizes[index]
        if self._file:
            # Unlike seek and read, this is one step: threads share the file.
            line = os.pread(self._file.fileno(), size, start)
            # Asked after the record was read: a change before that is seen.
            if self._stamped() != self._stamp:
                raise ConfigError(
                    f"{self.where(index)}: the file changed while it was read: start again when it "
                    "is whole."
                )
        else:
            line = self._held[start : start + size]
        where = self.where(index)
        value = _parsed(line, where, "put one whole JSON object on each line")
        if not isinstance(value, dict):
            raise InvalidRecord(
                f"{where} holds a JSON {_json_type(value)} and not an object: put one "
                'object such as {"source": ..., "answer": ...} on each line.'
            )
        return value


class _Array:
    """One JSON array of records."""

    def __init__(self, name: str, file: BinaryIO):
        self._name = name
        self._records = _parsed(
            file.read(), name, "it begins with [, so the whole file must be one array of objects"
        )

    def __len__(self) -> int:
        return len(self._records)

    def where(self, index: int) -> str:
        return f"{self._name}, element {index}"

    def record(self, index: int) -> Record:
        record = self._records[index]
        if not isinstance(record, dict):
            raise InvalidRecord(
                f"{self.where(index)} is a JSON {_json_type(record)} and not an object: the array "
                "must hold objects."
            )
        return record


class _Parquet:
    """The rows of a Parquet file, numbered from 0."""

    def __init__(self, name: str, path: str):
        # Not above: most runs read no Parquet.
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._name = name
        try:
            table = pq.ParquetFile(path).read()
            names = table.schema.names  # decoded when they are asked for
        # A ValueError: names or notes in the file's footer that are not UTF-8.
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ConfigError(
                f"{name} cannot be read as Parquet ({summary(error)}): download or write it again."
            ) from error
        if twice := [each for each in names if names.count(each) > 1]:
            raise ConfigError(f"{name} has two columns {twice[0]!r}: rename one of them.")
        self._columns = dict(zip(names, table.columns, strict=True))
        self._size = table.num_rows

    def __len__(self) -> int:
        return self._size

    def where(self, index: int) -> str:
        return f"{self._name}, row {index}"

    def record(self, index: int) -> Record:
        return {
            name: parquet_values.as_json(column[index]) for name, column in self._columns.items()
        }


def _open(file: File) -> _Opened:
    is_parquet = file.path.lower().endswith(PARQUET_SUFFIXES)
    is_packed = file.path.lower().endswith(".gz")
    paths.refuse_what_is_no_file(file.path, file.name)
    try:
        if git_lfs.is_pointer_file(file.path):
            raise ConfigError(f"{file.name} {git_lfs.SENTENCE}.")
        if is_parquet:
            return _Parquet(file.name, file.path)
        opened = gzip.open(file.path) if is_packed else open(file.path, "rb")
        # What the content is, not what the name says: both are called .json.
        start = opened.read(4096)
        if strict_json.is_utf16(start):  # lines of bytes would be cut in the middle of characters
            raise ConfigError(f"{file.name} is UTF-16 and not UTF-8: save it as UTF-8.")
        is_array = start.removeprefix(_BOM).lstrip()[:1] == b"["
        opened.seek(0)
        records = (_Array if is_array else _Lines)(file.name, cast(BinaryIO, opened))
        if is_array or is_packed:  # all of it is in memory
            opened.close()
        return records
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"{file.name} cannot be read ({summary(error)}): correct the path, or write it again."
        ) from error


def _parsed(text: bytes, where: str, remedy: str) -> Any:
    try:
        return strict_json.loads(text, unique_keys=True)
    except strict_json.Unreadable as error:
        # Python counts columns from the line's beginning, and a cut line ends where it was cut.
        raise InvalidRecord(error.after(where, remedy)) from None


def _json_type(value: object) -> str:
    kinds = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


# ---- All files of a split ----


class RecordFiles(Sequence[Record]):
    """The records of some files, one file after the other. Threads may share the object.

    Args:
      files: from `local`.

    Raises:
      ConfigError: a file that cannot be read, or no record in all of them.
    """

    def __init__(self, files: Sequence[File]):
        self._files = [_open(file) for file in files]
        # Record i is in the last file whose first record is at most i.
        sizes = [len(file) for file in self._files]
        self._firsts = list(itertools.accumulate(sizes, initial=0))
        if not len(self):
            raise ConfigError(
                f"{' and '.join(file.name for file in files)}: no records are in there; name a "
                f"file with records in {fields.FILES}."
            )

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index):
        file, place = self._place(index)
        return file.record(place)

    def where(self, index: int) -> str:
        """The file and line (from 1), row or element (from 0) of a record, for messages."""
        file, place = self._place(index)
        return file.where(place)

    def _place(self, index: int) -> tuple[_Opened, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect.bisect_right(self._firsts, index) - 1
        return self._files[number], index - self._firsts[number]


class Usable(NamedTuple):
    """The records that can be used, in their order."""

    indices: Sequence[int]
    ids: list[str]


def usable(
    records: RecordFiles, id_of: Callable[[int], str], skipped: Skipped | None = None
) -> Usable:
    """Looks at each record once.

    Args:
      id_of: the id of record i; raises InvalidRecord where it cannot be used.
      skipped: what is told of records that cannot be used, which are left out; None: an error.

    Raises:
      ConfigError: a record that cannot be used, or that has the id of another (both places are
        named); or none is left.
    """
    first: dict[str, int] = {}
    for index in range(len(records)):
        try:
            record_id = id_of(index)
            other = first.setdefault(record_id, index)
            if other != index:
                # Records without ids are known by content, which a reader of the message is not.
                is_copy = records[other] == records[index]
                what = "hold the same record" if is_copy else f"have the same id {record_id!r}"
                raise InvalidRecord(
                    f"{records.where(other)} and {records.where(index)} {what}: leave one of them "
                    f"out, or set {fields.INVALID} to 'skip'."
                )
        except InvalidRecord as error:
            if skipped is None:
                raise
            # Of a repeated id the message names two places.
            where = records.where(index)
            skipped.add(error if str(error).startswith(where) else _repeated(where), where)
    if skipped:
        skipped.check_some_are_left(len(records), records.where(0).partition(":")[0])
    indices = list(first.values())
    return Usable(range(len(records)) if len(indices) == len(records) else indices, list(first))


def _repeated(where: str) -> InvalidRecord:
    return InvalidRecord(f"{where} has the id of an earlier record.")
