"""Digests of a checkpoint's files: whether what is read is what was written.

The store of the arrays (OCDBT) checks its indexes when it reads them, but not the numbers: a byte
that a disk changed would be taken as it is. So CHECKPOINT/digests.json has

| key   | holds                                                                                |
|-------|--------------------------------------------------------------------------------------|
| step  | the step of training, so that a copy under another name is noticed                   |
| files | {name: [bytes, digest]} of each file, named from the checkpoint's folder on          |
| table | the digest of `files`, so that a changed entry is noticed, too                       |
| about | the digest of what the run said of the checkpoint, which Orbax puts into             |
|       | _CHECKPOINT_METADATA: as given, since Orbax writes that file in a thread of its own  |

It is written when all other files are, and before the checkpoint gets its name: so a checkpoint
has it from its first moment. A digest is the SHA-256 of the content. A bucket has one of each
object already (crc32c or md5), checks it itself, and tells it without the content being read: there
it is that one. A checkpoint may be copied from one to the other: then its files are read.

A file without `table` is an older one, whose `about` followed another rule: its files are checked,
and these two are not.
"""

import base64
import concurrent.futures
import hashlib
import json
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax

from qlog import extras
from qlog.console import count_text, say
from qlog.parallel import distributed
from qlog.storage import paths
from qlog.storage.paths import Path

FILE = "digests.json"
COMMITTED = "commit_success.txt"  # Orbax writes it after the digests, to say that all is there
_ABOUT = "_CHECKPOINT_METADATA"  # the config, and what is in the checkpoint
_LATE = (FILE, COMMITTED, _ABOUT)  # no digests of these files
# What a damaged file of digests raises; OverflowError of a number like 1e999.
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
_TRIES, _PAUSE = 3, 0.5  # seconds between them
# Lengths of the kinds of digests: in hexadecimal digits; a bucket's, in base64.
_KINDS = _SHA256, _MD5, _CRC32C = 64, 24, 8
_BLOCK = 1 << 20  # bytes
_THREADS = 8  # hashing leaves Python's lock to others
# {file: ((bytes, time of change, digest), when)} of files that this process has read and found
# whole, so that who looks for a checkpoint and then loads it reads its files once. Not longer: what
# a disk loses changes neither size nor time.
_seen: dict[str, tuple[tuple[int, int, str], float]] = {}
_SEEN_FOR = 300.0  # seconds


def is_step(name: str) -> bool:
    """Whether a folder or a flag of this name is a step: 12, and not 012 or a digit like ²."""
    return len(name) < 19 and name.isascii() and name.isdecimal() and str(int(name)) == name


def write(folder: Path, step: int, about: Mapping[str, Any]) -> None:
    """Writes the digests of all files in the folder of a checkpoint; one process calls it.

    Args:
      step: of training.
      about: what Orbax was given as the checkpoint's custom metadata.

    Raises:
      OSError: a file cannot be read, or the digests cannot be written.
    """
    if paths.is_remote(folder):
        found = {name: [size, digest] for name, (size, digest) in _objects(folder).items()}
    else:
        local = pathlib.Path(folder)
        names = _files(local)
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            digests = pool.map(lambda name: _digest(folder / name), names)
            found = {
                name: [(local / name).stat().st_size, digest]
                for name, digest in zip(names, digests, strict=True)
            }
    _save(folder, step, found, digest_of(about))


def forget(folder: Path, item: str) -> None:
    """Takes the files of an item out, before it is deleted for good."""
    if known := _read(folder):
        files = {n: entry for n, entry in known["files"].items() if not n.startswith(f"{item}/")}
        _save(folder, known["step"], files, known["about"])


def is_forgotten(folder: Path, item: str) -> bool:
    """Whether `forget` took an item out, so that what is left of its files is none."""
    try:
        known = _read(folder)
    except _UNREADABLE:
        return False
    return known is not None and item not in _items(known["files"])


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint under whatever name; None where no digests tell."""
    try:
        known = _read(folder)
    except _UNREADABLE:
        return None
    return None if known is None else known["step"]


def exist(folder: Path) -> bool:
    """Whether the checkpoint in the folder has digests; older ones have none."""
    return paths.exists(folder / FILE)


def fault(folder: Path, items: Sequence[str], content: bool = True) -> str:
    """What is wrong with a checkpoint, in words; '' where nothing is. Every process must call.

    The processes share the work: each reads its part of the files.

    Args:
      folder: of one step.
      items: those that are wanted: 'params', 'training'. A damaged file of another does no harm.
      content: whether files are read; without, only whether they are there, with their sizes.
    """
    plan = distributed.once_per_run(lambda: _plan(folder, items))
    if plan["fault"] or not content:
        return plan["fault"]
    mine = plan["files"][jax.process_index() :: jax.process_count()]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        wrong = [text for text in pool.map(lambda one: _compare(folder, *one), mine) if text]
    return next(iter(distributed.gather(wrong)), "")


def _plan(folder: Path, items: Sequence[str]) -> dict[str, Any]:
    """{"fault": what sizes tell, "files": [[name, digest], ...] whose content is to be read}."""
    try:
        known = _read(folder)
    except _UNREADABLE:
        return {"fault": f"{FILE} cannot be read", "files": []}
    except OSError as error:
        if paths.is_remote(folder) and paths.passes(error):
            raise
        return {"fault": f"{FILE} cannot be read", "files": []}
    if known is None:
        return {"fault": "", "files": []}
    if is_step(folder.name) and int(folder.name) != known["step"]:
        return {"fault": f"its files are those of step {known['step']}", "files": []}
    if not _is_as_said(folder, known):
        return {"fault": f"{_ABOUT} is missing or has changed", "files": []}
    wanted = {
        name: entry
        for name, entry in known["files"].items()
        if "/" not in name or name.partition("/")[0] in items
    }
    there = _objects(folder) if paths.is_remote(folder) else _sizes(folder, wanted)
    for name, (size, digest) in wanted.items():
        if name not in there:
            return {"fault": f"{name} is missing", "files": []}
        size_now, digest_now = there[name]
        if size_now != size:
            return {
                "fault": f"{name} has {count_text(size_now, 'byte')}, not {size:,}",
                "files": [],
            }
        if _is_told(digest, digest_now) and digest_now != digest:
            return {"fault": f"the content of {name} has changed", "files": []}
    unread = [
        [name, digest]
        for name, (_, digest) in wanted.items()
        if digest and not _is_told(digest, there[name][1])
    ]
    if any(len(digest) not in _KINDS for _, digest in unread):
        return {"fault": f"{FILE} cannot be read", "files": []}
    readable = [[name, digest] for name, digest in unread if _function_of(digest)]
    if len(readable) < len(unread):
        say(
            f"{folder}: of some files only the sizes are compared, since they have a store's "
            "checksums, for which the package google-crc32c is missing"
        )
    return {"fault": "", "files": readable}


def _is_told(digest: str, digest_now: str) -> bool:
    """Whether a store tells a digest of the same kind: each kind has a length of its own."""
    return bool(digest_now) and len(digest) == len(digest_now)


def _compare(folder: Path, name: str, digest: str) -> str:
    """What is wrong with the content of a file; '' where nothing is."""
    file, now = folder / name, None
    try:
        if not paths.is_remote(file):
            about = pathlib.Path(file).stat()
            now = (about.st_size, about.st_mtime_ns, digest)
            seen, when = _seen.get(str(file), (None, 0.0))
            if seen == now and time.monotonic() - when < _SEEN_FOR:
                return ""
        if _digest(file, digest) != digest:
            return f"the content of {name} has changed"
        if now:
            _seen[str(file)] = now, time.monotonic()
    except OSError as error:  # such as EIO, of a bad place on the disk
        if paths.is_remote(file) and paths.passes(error):
            raise
        return f"{name} cannot be read: {error.strerror or error}"
    return ""


def _digest(file: Path, like: str = "") -> str:
    """The digest of a file's content.

    Args:
      like: a digest of the same kind; '' stands for SHA-256.
    """
    digest = _function_of(like)
    assert digest, "the kind is known"
    with paths.open_bytes(file) as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
    binary = digest.digest()
    return base64.b64encode(binary).decode() if like and len(like) < _SHA256 else binary.hex()


def _function_of(like: str) -> Any:
    """A new object that takes bytes (`update`) and gives a digest; None where its kind is unknown.

    Args:
      like: a digest of the same kind; '' stands for SHA-256.
    """
    if len(like) in (0, _SHA256):
        return hashlib.sha256()
    if len(like) == _MD5:
        return hashlib.md5(usedforsecurity=False)
    if len(like) == _CRC32C and extras.is_installed("google_crc32c"):
        import google_crc32c  # comes with the extra gcs

        return google_crc32c.Checksum()
    return None


def _files(folder: pathlib.Path) -> list[str]:
    """The names of all files that have digests, from the folder on."""
    names = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
    return sorted(name for name in names if name not in _LATE)


def _sizes(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """{name: (bytes, '')} of the local files that are there."""
    found = {}
    for name in names:
        file = pathlib.Path(folder) / name
        if file.is_file():
            found[name] = file.stat().st_size, ""
    return found


def _objects(folder: Path) -> dict[str, tuple[int, str]]:
    """{name: (bytes, the bucket's own checksum; '' without)} of all objects in a folder."""
    system, where = paths.file_system(folder)
    found = cast(dict[str, Any], paths.retried(lambda: system.find(where, detail=True)))
    named = {name[len(where) :].lstrip("/"): about for name, about in found.items()}
    return {
        name: (int(about["size"]), str(about.get("crc32c") or about.get("md5Hash") or ""))
        for name, about in named.items()
        if name not in _LATE
    }


def _read(folder: Path) -> dict[str, Any] | None:
    """What digests.json holds; None where there is none."""
    try:
        known = json.loads(paths.read(folder / FILE))
    except (FileNotFoundError, NotADirectoryError):
        return None
    is_older = "table" not in known
    if not is_older and digest_of(known["files"]) != known["table"]:
        raise ValueError(f"{FILE} has changed")
    files = {name: (int(size), str(digest)) for name, (size, digest) in known["files"].items()}
    about = None if is_older else str(known["about"])
    return {"step": int(known["step"]), "files": files, "about": about}


def _items(files: Iterable[str]) -> set[str]:
    """The items whose files these are: a folder of each."""
    return {name.partition("/")[0] for name in files if "/" in name}


def _save(folder: Path, step: int, files: Mapping[str, Sequence[Any]], about: str | None) -> None:
    known = {"step": step, "files": files}
    if about is not None:
        known |= {"about": about, "table": digest_of(files)}
    paths.write(folder / FILE, json.dumps(known, indent=1))


def _is_as_said(folder: Path, known: Mapping[str, Any]) -> bool:
    """Whether _CHECKPOINT_METADATA holds what it did, but for the times that Orbax adds."""
    try:
        said = json.loads(_read_about(folder / _ABOUT))
        # How each item is read. Orbax goes on without it and guesses. All of ours are trees.
        handlers = said["item_handlers"]
        is_whole = _items(known["files"]) <= handlers.keys() and len(set(handlers.values())) == 1
        return is_whole and known["about"] in (None, digest_of(said["custom_metadata"]))
    except (*_UNREADABLE, OSError) as error:
        if paths.is_remote(folder) and paths.passes(error):
            raise
        return False


def digest_of(about: Any) -> str:
    """A digest of what JSON can hold: the same for what it makes equal (tuples and lists)."""
    as_read = json.loads(json.dumps(about))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _read_about(file: Path) -> str:
    # Orbax writes it a second time when all is there. Not every store replaces an object at once.
    for _ in range(_TRIES):
        try:
            return paths.read(file)
        except FileNotFoundError:
            if not paths.is_remote(file):
                raise
            time.sleep(_PAUSE)
    return paths.read(file)
