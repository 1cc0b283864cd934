"""What runs read beside their config, models, tokenizers and datasets, and where they find it.

QLOG_ASSETS names a folder, gs://BUCKET/... or s3://BUCKET/... that `python -m qlog.commands.stage` has filled:

    models/OWNER/NAME            a Hugging Face folder; config.json was written last
    tokenizers/NAME              tokenizers that are no Hub id
    data/NAME-VERSION            a prepared dataset; ids.json was written last

It is searched before any network is. What lies in a bucket is copied into the user's cache folder,
since safetensors, tokenizers and array_record read local files: once per host, under a name that
has a digest of the names, sizes and checksums there, so that a changed bucket is copied anew.
Nothing here knows of other processes but by locks on files; `qlog.parallel.distributed.once_per_host` does.
"""

import base64
import concurrent.futures
import contextlib
import errno
import fnmatch
import hashlib
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import filelock
import fsspec

from qlog.errors import QLOG_ERRORS, ConfigError, PassingError, summary
from qlog.storage import paths

ENVIRONMENT = "QLOG_ASSETS"
_CHECKSUMS = ("md5Hash", "crc32c", "etag", "ETag", "generation", "LastModified", "updated")
_SECONDS_BETWEEN_NEWS = 10.0
_AT_ONCE = 8  # files


class _Entry(NamedTuple):
    size: int  # bytes
    checksum: str  # '' where the store gives none


def cache(name: str) -> pathlib.Path:
    """A folder of qlog's in the user's cache folder (XDG_CACHE_HOME moves it); not made here."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (pathlib.Path(home) / "qlog" / name).expanduser().absolute()


def root() -> paths.Path | None:
    """What QLOG_ASSETS names; None without it. ConfigError if it cannot be a folder."""
    spec = os.environ.get(ENVIRONMENT, "")
    if not spec:
        return None
    folder = paths.parse(spec, ENVIRONMENT)
    if not paths.is_remote(spec) and not folder.is_dir():
        raise ConfigError(
            f"{ENVIRONMENT}={spec} is no folder on this host: mount or fill it (launch/stage), or unset it."
        )
    return folder


def find(
    name: str, is_complete: Callable[[set[str]], bool], wanted: Callable[[str], bool] | None = None
) -> pathlib.Path | None:
    """The local folder of ROOT/`name`, copied here from a bucket; None where it is not, or not whole.

    Args:
      is_complete: told the names of all files in the folder, relative to it.
      wanted: which of them to copy; None: all.

    Raises:
      ConfigError, PassingError: as `local`.
    """
    base = root()
    if base is None:
        return None
    found = _find(base / name, ENVIRONMENT, is_complete, wanted)
    if found is None:
        _say(
            f"{base / name} is not there, or not whole: looking elsewhere (launch/stage brings it there)"
        )
    return found


def local(
    spec: str | os.PathLike, field: str, wanted: Callable[[str], bool] | None = None
) -> pathlib.Path:
    """`spec` as a path on this host: itself if it is local (~ expanded, present or not), or else the
    copy of the folder, or the one file, that a bucket holds there.

    Args:
      field: what named it, for messages.
      wanted: which files of a bucket's folder to copy; None: all.

    Raises:
      ConfigError: the bucket holds nothing there, or does not let this user read it; no room here.
      PassingError: the bucket cannot be reached.
    """
    path = paths.parse(spec, field)
    if not paths.is_remote(path):
        return pathlib.Path(path)
    found = _find(path, field, bool, wanted)
    if found is None:
        raise ConfigError(
            f"{field} = {os.fspath(spec)!r} holds no files: stage them (launch/stage), or mend the name."
        )
    return found


def is_there(path: pathlib.Path) -> bool:
    """Whether another host's rename is seen: NFS may answer a look from memory, not a listing."""
    return path.is_dir() or path.name in os.listdir(path.parent)


@contextlib.contextmanager
def alone(target: pathlib.Path) -> Iterator[None]:
    """While inside, no other process on this file system is inside for the same target.

    Leaves an empty file .NAME.lock beside the target.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f".{target.name}.lock"
    lock = filelock.FileLock(path)
    try:
        try:
            lock.acquire(timeout=1)
        except filelock.Timeout:
            _say(f"another process makes {target}; waiting for it")
            lock.acquire()
    except (
        NotImplementedError,
        OSError,
    ):  # no locks here, or another user's: two may do the same work
        yield
        return
    try:
        yield
    finally:
        lock.release()


def publish(source: pathlib.Path, target: paths.Path, names: list[str], last: str) -> int:
    """Copies files of a local folder into a folder or bucket; returns how many had to be.

    What is there with the same content stays. The file `last` is written last and, where anything
    else changes, removed first: its presence says that the rest is there and belongs together.

    Args:
      names: files to copy, relative to `source`; `last` is one of them.

    Raises:
      ConfigError, PassingError: as `local`, of the target.
    """
    with _faults(f"--to={target}"):
        there = _listing(target) or {}
        changed = [
            name for name in names if not _is_same(source / name, target / name, there.get(name))
        ]
        if not changed:
            return 0
        stale = [name for name in there if name not in names]
        if last in there:
            (target / last).unlink()
        for name in stale:
            (target / name).unlink()
        rest = [name for name in changed if name != last]
        total = sum((source / name).stat().st_size for name in changed)
        news = _News(f"to {target}", total)
        with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
            for name, _ in zip(rest, pool.map(lambda n: put(source / n, target / n), rest)):
                news.add((source / name).stat().st_size)
        put(source / last, target / last)
    return len(changed)


def put(source: pathlib.Path, target: paths.Path) -> None:
    """Copies one local file to a path, whole or not at all, in parts of bounded memory."""
    if paths.is_remote(target):
        system, where = _system(target)
        paths.retried(lambda: system.put_file(str(source), where))
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f"{target.name}.tmp")
    shutil.copyfile(source, fresh)
    os.replace(fresh, target)


def exists(folder: paths.Path, pattern: str) -> bool:
    """Whether a folder, here or in a bucket, holds a file of that pattern; looked at afresh."""
    with _faults(str(folder)):
        return any(fnmatch.fnmatch(name, pattern) for name in _listing(folder) or {})


# ---- Buckets ----


def _system(path: paths.Path):
    """(file system, path in it); listings are always fresh, others write there too."""
    protocol = str(path).partition("://")[0] if paths.is_remote(path) else "file"
    options = {} if protocol == "file" else {"use_listings_cache": False}
    system = fsspec.filesystem(protocol, **options)
    return system, system._strip_protocol(str(path))


def _listing(path: paths.Path) -> dict[str, _Entry] | None:
    """{name relative to the path: entry} of all files below it; '' for the path itself as a file;
    None where there is nothing."""
    system, where = _system(path)
    try:
        found = paths.retried(lambda: system.find(where, detail=True))
    except FileNotFoundError:
        return None
    entries = {}
    for name, info in found.items():
        if name.endswith("/"):
            continue  # what consoles write as a folder
        checksum = next((str(info[key]) for key in _CHECKSUMS if info.get(key)), "")
        entries[name[len(where) :].lstrip("/")] = _Entry(int(info["size"]), checksum)
    return entries or None


def _find(path, field, is_complete, wanted):
    if not paths.is_remote(path):
        folder = pathlib.Path(path)
        if not folder.is_dir():
            return None
        names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        return folder if is_complete(names) else None
    with _faults(f"{field} = {str(path)!r}" if field != ENVIRONMENT else f"{ENVIRONMENT}: {path}"):
        listing = _listing(path)
        if not listing or not is_complete(set(listing)):
            return None
        chosen = {n: e for n, e in sorted(listing.items()) if not n or wanted is None or wanted(n)}
        return _copy(path, chosen) if chosen else None


def _copy(path: paths.Path, listing: dict[str, _Entry]) -> pathlib.Path:
    """A bucket's files in the cache folder: complete or not there."""
    digest = hashlib.sha256(f"{path}\n{sorted(listing.items())}".encode()).hexdigest()[:16]
    target = cache("assets") / f"{path.name}-{digest}"
    is_file = set(listing) == {""}
    result = target / path.name if is_file else target
    if target.is_dir():
        return result
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise ConfigError(
            f"the cache folder {target.parent} cannot be written ({error.strerror or error}): set "
            "XDG_CACHE_HOME to a local folder with room."
        ) from error
    with alone(target):
        if is_there(target):
            return result
        system, where = _system(path)
        news = _News(f"from {path}", sum(entry.size for entry in listing.values()))
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
            fresh = pathlib.Path(temporary) / "files"

            def fetch(name):
                file = fresh / (name or path.name)
                file.parent.mkdir(parents=True, exist_ok=True)
                remote = f"{where}/{name}" if name else where
                paths.retried(lambda: system.get_file(remote, str(file)))
                if file.stat().st_size != listing[name].size:
                    raise PassingError(
                        f"{path} changed while it was copied: start again when it is complete."
                    )
                return listing[name].size

            with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
                for size in pool.map(fetch, listing):
                    news.add(size)
            try:
                fresh.rename(target)
            except OSError:  # on a file system without locks another was first, with the same files
                if not is_there(target):
                    raise
    return result


def _is_same(source: pathlib.Path, target: paths.Path, entry: _Entry | None) -> bool:
    """Whether the target is known to have the source's content."""
    if entry is None or entry.size != source.stat().st_size:
        return False
    if not paths.is_remote(target):
        return _digest(source, "sha256") == _digest(pathlib.Path(target), "sha256")
    md5 = _digest(source, "md5")  # as the stores have it: GCS in base64, S3 in hex, quoted
    return entry.checksum.strip('"') in (md5.hex(), base64.b64encode(md5).decode())


def _digest(file: pathlib.Path, kind: str) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(
            opened, lambda: hashlib.new(kind, usedforsecurity=False)
        ).digest()


@contextlib.contextmanager
def _faults(where: str) -> Iterator[None]:
    """Turns what the stores' clients raise, and full disks, into qlog's errors."""
    try:
        yield
    except QLOG_ERRORS:
        raise
    except Exception as error:  # each client has its own kinds
        reason = f"{type(error).__name__}: {summary(error)}"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                f"{where}: no room ({error.strerror}; {cache('assets')} is the cache): make room, or set "
                "XDG_CACHE_HOME to a larger disk."
            ) from error
        if not paths.passes(error):
            message = (
                f"{where} cannot be used ({reason}): mend the name, or give this user the right."
            )
            raise ConfigError(message) from error
        raise PassingError(f"{where} cannot be reached now ({reason}).") from error


class _News:
    """Lines on stderr about a long copy: one at its begin, then one every few seconds."""

    def __init__(self, what: str, total: int):
        self._what, self._total, self._done, self._said = what, total, 0, time.monotonic()
        _say(f"copying {total / 1e6:,.1f} MB {what}")

    def add(self, size: int) -> None:
        self._done += size
        if time.monotonic() - self._said > _SECONDS_BETWEEN_NEWS:
            self._said = time.monotonic()
            _say(f"{self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB {self._what}")


def _say(text: str) -> None:
    print(f"qlog: {text}", file=sys.stderr, flush=True)
