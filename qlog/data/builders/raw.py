"""The datasets' official raw files: where they come from, how they are found, checked and read."""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

from qlog.data import fields
from qlog.errors import ConfigError, PassingError, summary
from qlog.storage import assets, git_lfs, paths, strict_json


@dataclasses.dataclass(frozen=True)
class RawFile:
    """One official raw file with the labelled records of one split.

    Attributes:
      name: its official file name; `.json` holds a list of records, `.jsonl` one record per line.
      url: the file itself, or the zip archive that has it as `member`.
      size: number of records in the official file.
      sha256, git_blob: digest of what the URL serves, as published ("" where there is none).
      member: path inside the zip archive at the URL.
    """

    name: str
    url: str
    size: int
    sha256: str = ""
    git_blob: str = ""
    member: str = ""


def find(
    manual_dir: str | os.PathLike, files: Mapping[str, RawFile], dataset: str
) -> dict[str, pathlib.Path]:
    """Paths of the raw files in a manual download, by split; splits without a file are left out.

    Each is looked for in a subfolder named as the dataset first, then in the folder itself; in both
    also where the official archives and repositories put them ("data", "dataset"). A folder of
    several datasets may have another dataset's train.json next to finqa/.

    Raises:
      ConfigError: no such folder, or none of the files in it; a file that is packed, or a link to
        nothing.
    """
    folder = paths.expanded(manual_dir)
    names = [file.name for file in files.values()]
    if not paths.is_folder(folder):
        raise ConfigError(
            f"{fields.MANUAL_DIR} = {str(manual_dir)!r} is not a folder: put {', '.join(names)} "
            f"of {dataset} into it."
        )
    places = [
        outer / inner for outer in (folder / dataset, folder) for inner in ("", "dataset", "data")
    ]
    found = {}
    for split, file in files.items():
        candidates = [place / file.name for place in places]
        path = next((path for path in candidates if paths.is_file(path)), None)
        if path is not None:
            found[split] = path
        # Left out, the split would come from another file without a word.
        elif hint := "".join(map(assets.why_missing, candidates)):
            raise ConfigError(f"{fields.MANUAL_DIR} = {str(manual_dir)!r} lacks {file.name}{hint}.")
    if found:
        return found
    full = next((n for n in os.listdir(folder) if n.startswith("musique_full")), "")
    hint = f" ({full} there is of the full set, with questions that have no answer)" if full else ""
    raise ConfigError(
        f"{fields.MANUAL_DIR} = {str(manual_dir)!r} holds none of {dataset}'s files "
        f"{', '.join(names)}{hint}: put them there, or leave {fields.MANUAL_DIR} empty to download."
    )


def fingerprint(files: Mapping[str, pathlib.Path]) -> str:
    """16 hexadecimal digits that change with the content of any of the files."""
    # Of the contents, not of names or dates: a copy in another folder is the same dataset.
    digest = hashlib.sha256()
    for split, path in sorted(files.items()):
        digest.update(f"{split}:{_sha256(path)}\n".encode())
    return digest.hexdigest()[:16]


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(file: RawFile, path: pathlib.Path) -> None:
    """Checks a download against its published digest.

    Raises:
      ConfigError: another digest, as of a truncated or an intercepted download.
      PassingError: a page in the file's place, as servers send whose quota is used up.
    """
    if file.sha256:
        expected, actual = file.sha256, _sha256(path)
    elif file.git_blob:
        # What git itself calls a file: SHA-1 of a header with the size, then the content. Of files
        # in a repository it is the one digest that is published.
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
        digest.update(path.read_bytes())
        expected, actual = file.git_blob, digest.hexdigest()
    else:  # no digest is published; `base.RecordBuilder` still checks the number of records
        return
    if actual != expected:
        with path.open("rb") as opened:
            is_page = opened.read(512).lstrip().lower().startswith((b"<!doctype html", b"<html"))
        path.unlink()  # or TFDS would take the same file at the next try
        if is_page:
            raise PassingError(
                f"{file.url} served a page instead of the file, as when too many people ask: "
                f"wait, or set {fields.MANUAL_DIR} to a folder with {file.name}."
            )
        raise ConfigError(
            f"{file.url} served another file than the official one (digest {actual}, not "
            f"{expected}): try again, or set {fields.MANUAL_DIR} to a folder with {file.name}."
        )


def read(path: pathlib.Path, member: str = "") -> Iterator[dict[str, Any]]:
    """The records of a raw file (of a member of it, if it is a zip archive), in their order.

    Raises:
      ConfigError: not UTF-8, not JSON, not records, or no record at all.
    """
    name = f"{path}:{member}" if member else str(path)
    lines_of = {".json": _array, ".jsonl": _lines}[pathlib.PurePath(member or path).suffix]
    # Records are checked while they are read, so a message can say after which one it broke.
    records_read = 0
    try:
        with _open(path, member) as file:
            for record in lines_of(file):
                if not isinstance(record, dict):
                    raise ConfigError(
                        f"{name}: record {records_read} is not a JSON object but "
                        f"{type(record).__name__}."
                    )
                yield record
                records_read += 1
    # KeyError: the archive has no such member.
    except (ValueError, RecursionError, zipfile.BadZipFile, KeyError, EOFError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{name} cannot be read after record {records_read} ({type(error).__name__}: "
            f"{summary(error)}): it is damaged or was not downloaded whole; download it again."
        ) from error
    if not records_read:
        raise ConfigError(f"{name} holds no records: download it again.")


def _open(path: pathlib.Path, member: str) -> io.TextIOWrapper:
    if not member:
        with path.open("rb") as file:
            start = file.read(64)
        if git_lfs.is_pointer(start):
            raise ConfigError(f"{path} {git_lfs.SENTENCE}.")
        if strict_json.is_utf16(start):
            raise ConfigError(f"{path} is UTF-16 and not UTF-8: save it as UTF-8.")
        return path.open(encoding="utf-8-sig")
    # The archive stays as it is: the member is unpacked while it is read.
    return io.TextIOWrapper(zipfile.ZipFile(path).open(member), encoding="utf-8")


_BLOCK = 1 << 20  # characters that are read at a time
_SPACE = re.compile(r"[ \t\r\n]*")


def _array(file: io.TextIOBase) -> Iterator[Any]:
    """The elements of a JSON array, one by one: HotPotQA's train file has 566 MB."""
    decoder, text, size = json.JSONDecoder(), file.read(_BLOCK), _BLOCK
    while text.isspace() and (more := file.read(_BLOCK)):
        text += more
    at = _past_space(text, 0)
    if text[at : at + 1] != "[":  # a single object counts as a list of one record
        yield json.loads(text + file.read())
        return
    expected, at = "[", at + 1
    while True:
        # ---- What separates two elements; the text may end in the middle of it ----
        at = _past_space(text, at)
        if at == len(text):
            text, at = file.read(_BLOCK), 0
            if not text:
                raise ValueError("the array has no end")
            continue
        if text[at] == "]" and expected != ",]":
            break
        if expected == ",":
            if text[at] != ",":
                raise ValueError(f"{text[at]!r} where a comma or the end of the array should be")
            expected, at = ",]", at + 1  # an element has to follow
            continue
        # ---- An element: whole in the text, or the text is made longer ----
        try:
            value, end = decoder.raw_decode(text, at)
            # 1 may be the beginning of 12 or of 1.5.
            is_whole = end < len(text) and text[end] not in "0123456789+-.eE"
        except json.JSONDecodeError:
            value, end, is_whole = None, at, False
        if not is_whole:
            more = file.read(size)
            if not more:
                decoder.raw_decode(text, at)  # raises what is wrong
                raise ValueError("the array has no end")
            # Twice as much each time: an element of any size is tried a few times only.
            text, at, size = text[at:] + more, 0, 2 * size
            continue
        yield value
        at, size, expected = end, _BLOCK, ","
    rest = text[at + 1 :] or file.read(_BLOCK)
    while rest:
        if rest.strip():
            raise ValueError("there is more behind the end of the array")
        rest = file.read(_BLOCK)


def _past_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _lines(file: io.TextIOBase) -> Iterator[Any]:
    return (json.loads(line) for line in file if line.strip())
