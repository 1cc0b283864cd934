"""Where runs find what they read: models, tokenizers and datasets.

QLOG_ASSETS names a folder, gs://BUCKET/... or s3://BUCKET/..., filled by `qlog.commands.stage`:

    models/OWNER/NAME            a Hugging Face folder; config.json was written last
    tokenizers/NAME              tokenizers that are not on the Hub
    chat_templates/NAME          chat templates of the user's
    data/NAME-VERSION            a prepared dataset; ids.json was written last

It is searched before any network is. What lies in a bucket is copied into the user's cache folder,
since safetensors, tokenizers and array_record read local files. The copy's name has a digest of the
names, sizes and checksums in the bucket: a host copies once, and again when the bucket has changed.
Several processes of a host share the copy by a lock on a file; a run calls these functions within
`qlog.parallel.distributed.once_per_host`.
"""

import base64
import concurrent.futures
import contextlib
import errno
import fnmatch
import glob
import hashlib
import os
import pathlib
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import filelock

from qlog.errors import QLOG_ERRORS, ConfigError, PassingError, summary
from qlog.storage import paths

ENVIRONMENT = "QLOG_ASSETS"
# Where stores say what an object's content is, the surest first.
_CHECKSUMS = ("md5Hash", "crc32c", "etag", "ETag", "generation", "LastModified", "updated")
_PACKED = (".gz", ".zip", ".bz2", ".xz", ".zst", ".tar.gz", ".tgz")
_SECONDS_BETWEEN_NEWS = 10.0
_LEFT_AFTER = 24 * 3600.0  # seconds after which what another host was making is not made any more
_AT_ONCE = 8  # files copied at the same time


class _Entry(NamedTuple):
    """A file in a listing."""

    size: int  # bytes
    checksum: str  # '' where the store gives none


def cache(name: str) -> pathlib.Path:
    """qlog/`name` in the user's cache folder, which XDG_CACHE_HOME moves; it may not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (pathlib.Path(home) / "qlog" / name).expanduser().absolute()


def root() -> paths.Path | None:
    """What QLOG_ASSETS names; None without it.

    Raises:
      ConfigError: no such folder on this host, or a bucket that `paths.parse` refuses.
    """
    spec = os.environ.get(ENVIRONMENT, "")
    if not spec:
        return None
    folder = paths.parse(spec, ENVIRONMENT)
    if not paths.is_remote(spec) and not paths.is_folder(folder):
        raise ConfigError(
            f"{ENVIRONMENT}={spec} is not a folder on this host: mount or fill it (launch/stage), "
            "or unset it."
        )
    return folder


def find(
    name: str, is_complete: Callable[[set[str]], bool], wanted: Callable[[str], bool] | None = None
) -> pathlib.Path | None:
    """The local folder of QLOG_ASSETS/`name`, copied here if that is a bucket.

    Args:
      is_complete: is given the names of all files in the folder, relative to it.
      wanted: which of them to copy; all by default.

    Returns:
      The folder; None where QLOG_ASSETS is not set, or the folder is missing or not complete.

    Raises:
      ConfigError, PassingError: as `local`.
    """
    base = root()
    if base is None:
        return None
    found = _find(base / name, ENVIRONMENT, is_complete, wanted)
    if found is None:
        _say(
            f"{base / name} is not there, or not whole: looking elsewhere (launch/stage brings it "
            "there)"
        )
    return found


def local(
    spec: str | os.PathLike,
    field: str,
    wanted: Callable[[str], bool] | None = None,
    companions: Sequence[str] = (),
) -> pathlib.Path:
    """`spec` as a path on this host: a local one as it is, or the copy of what a bucket has there.

    Args:
      spec: a local path (~ is expanded; it need not exist), or a folder or a file in a bucket.
      field: the flag or the config field that named it, for messages.
      wanted: which files of a bucket's folder to copy; all by default.
      companions: names of files that are copied along with a single file of a bucket, where they
        lie next to it there.

    Raises:
      ConfigError: the bucket holds nothing there, or this user may not read it; the disk is full.
      PassingError: the bucket cannot be reached now.
    """
    path = paths.parse(spec, field)
    if not paths.is_remote(path):
        return pathlib.Path(path)
    found = _find(path, field, bool, wanted, companions)
    if found is None:
        raise ConfigError(
            f"{field} = {os.fspath(spec)!r} holds no files: stage them (launch/stage), or correct "
            "the name."
        )
    return found


def names(spec: str, field: str) -> list[str]:
    """The files that `spec` names, sorted: itself, those in its folder, or those that match a glob.

    Args:
      spec: a path or a glob, here or in a bucket.
      field: as in `local`.

    Returns:
      Each as `spec` is written, relative or not. Hidden files of a folder are left out. [] where
      nothing is there.

    Raises:
      ConfigError, PassingError: as `local`.
    """
    path = paths.parse(spec, field)
    if paths.is_remote(path):
        with _faults(f"{field} = {spec!r}"):
            below = _listing(path)
            if below is None:
                system, where = paths.file_system(path)
                scheme = spec.partition("://")[0]
                found = paths.retried(lambda: system.glob(where))
                return sorted(f"{scheme}://{name}" for name in found)
    else:
        folder = pathlib.Path(path)
        if not paths.exists(folder):
            found = glob.glob(os.fspath(path), recursive=True)
            return sorted(name for name in found if os.path.isfile(name))
        below = {"": None}
        if folder.is_dir():
            below = dict.fromkeys(
                file.relative_to(folder).as_posix()
                for file in folder.rglob("*")
                if file.is_file() or paths.is_dangling(file)
            )
    # A cache of the Hub's client lies in a hidden folder of what it has downloaded.
    visible = [name for name in below if not any(p.startswith(".") for p in name.split("/"))]
    if not paths.is_remote(path):
        # Left out, a part of the data would be missing without a word.
        for name in visible:
            if name and paths.is_dangling(pathlib.Path(path) / name):
                raise ConfigError(
                    f"{field} = {spec!r} lacks {name}{why_missing(pathlib.Path(path) / name)}."
                )
    return sorted(f"{spec.rstrip('/')}/{name}" if name else spec for name in visible)


def is_inside(name: str) -> bool:
    """Whether a file's name, relative to a folder, stays in that folder on every system.

    Links in the folder may lead elsewhere: caches of the Hub are made of them.
    """
    plain = name.replace("\\", "/")
    parts = plain.split("/")
    return bool(name) and ".." not in parts and not plain.startswith("/") and ":" not in parts[0]


def why_missing(path: str | os.PathLike) -> str:
    """Why a local file is not there, in brackets for a message; '' where nothing tells.

    It is a link to nothing, as in a copy of one folder of a cache; or it is packed.
    """
    path = paths.expanded(path)
    if paths.is_dangling(path):
        return (
            f" ({path.name} is a link to {os.readlink(path)}, which is not there: copy with cp -rL)"
        )
    for suffix in _PACKED:
        if paths.is_file(path.with_name(path.name + suffix)):
            return f" ({path.name}{suffix} is there: unpack it)"
    return ""


def is_there(path: pathlib.Path) -> bool:
    """Whether a folder is there, although another host has just made it."""
    # NFS may answer the first question from memory, but not the second one.
    return path.is_dir() or path.name in os.listdir(path.parent)


@contextlib.contextmanager
def locked(target: pathlib.Path) -> Iterator[bool]:
    """While inside, no other process on this file system is inside for the same target.

    Leaves an empty file .NAME.lock next to the target.

    Yields:
      Whether that is so; False on a file system without locks.
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
    except (NotImplementedError, OSError):
        # A file system without locks, or a lock of another user. Then two processes may do the same
        # work at the same time; the renames at its end keep the result whole.
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def temporary_prefix(target: pathlib.Path) -> str:
    """How the name of a temporary folder begins in which this process makes `target`."""
    return f".{target.name}-{_host()}-{os.getpid()}-"


def remove_leftovers(target: pathlib.Path) -> None:
    """Removes temporary folders of processes that were killed while they made `target`.

    Only inside of `locked`. A lock may not hold between hosts, so what another host has changed
    within a day stays.
    """
    for leftover in target.parent.glob(f".{glob.escape(target.name)}-*"):
        host, _, rest = leftover.name.removeprefix(f".{target.name}-").partition("-")
        pid = rest.partition("-")[0]
        if host == _host() and pid.isdecimal():
            is_dead = not _is_running(int(pid))
        else:
            is_dead = time.time() - leftover.stat().st_mtime > _LEFT_AFTER
        if is_dead:
            _say(f"removing {leftover}, which a process that was killed has left")
            shutil.rmtree(leftover, ignore_errors=True)


def _host() -> str:
    """This host's name, without the sign that ends it in names of folders."""
    return platform.node().replace("-", "_") or "host"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def publish(source: pathlib.Path, target: paths.Path, names: list[str], last: str) -> int:
    """Copies files of a local folder into a folder or bucket.

    What is there with the same content stays; other files there are removed. Where the file `last`
    is, all the others are, and they belong together.

    Args:
      names: files to copy, relative to `source`.
      last: one of them.

    Returns:
      How many files had to be copied.

    Raises:
      ConfigError, PassingError: as `local`, for the target.
    """
    with _faults(f"--to={target}"):
        there = _listing(target) or {}
        changed = [
            name for name in names if not _is_same(source / name, target / name, there.get(name))
        ]
        if not changed:
            return 0
        stale = [name for name in there if name not in names]
        # `last` is removed first and written last: a process that reads in between, or after this
        # one was killed, sees that the folder is not complete.
        if last in there:
            (target / last).unlink()
        for name in stale:
            (target / name).unlink()
        rest = [name for name in changed if name != last]
        total = sum((source / name).stat().st_size for name in changed)
        news = _News(f"to {target}", total)
        with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
            copies = pool.map(lambda name: paths.copy(source / name, target / name), rest)
            for name, _ in zip(rest, copies, strict=True):
                news.add((source / name).stat().st_size)
        paths.copy(source / last, target / last)
    return len(changed)


def exists(folder: paths.Path, pattern: str) -> bool:
    """Whether a folder, here or in a bucket, now holds a file whose name matches `pattern`."""
    with _faults(str(folder)):
        return any(fnmatch.fnmatch(name, pattern) for name in _listing(folder) or {})


# ---- Buckets ----


def _listing(path: paths.Path) -> dict[str, _Entry] | None:
    """All files below a path: {name relative to it: entry}; None where there is nothing.

    If the path is a file, it is the one entry, with the name ''.
    """
    system, where = paths.file_system(path)
    try:
        found = paths.retried(lambda: system.find(where, detail=True))
    except FileNotFoundError:
        return None
    entries = {}
    for name, info in found.items():
        if name.endswith("/"):
            continue  # an empty object, by which web consoles show a folder
        checksum = next((str(info[key]) for key in _CHECKSUMS if info.get(key)), "")
        entries[name[len(where) :].lstrip("/")] = _Entry(int(info["size"]), checksum)
    return entries or None


def _find(
    path: paths.Path,
    field: str,
    is_complete: Callable[[set[str]], bool],
    wanted: Callable[[str], bool] | None,
    companions: Sequence[str] = (),
) -> pathlib.Path | None:
    """The local folder or file of a path, as `find` and `local` want it."""
    if not paths.is_remote(path):
        folder = pathlib.Path(path)
        if not paths.is_folder(folder):
            return None
        names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        return folder if is_complete(names) else None
    with _faults(f"{field} = {str(path)!r}" if field != ENVIRONMENT else f"{ENVIRONMENT}: {path}"):
        listing = _listing(path)
        if not listing or not is_complete(set(listing)):
            return None
        if companions and set(listing) == {""}:
            # Looked for by name, since the folder around a file may be a whole bucket.
            beside = {name: _listing(path.parent / name) for name in companions}
            files = {name: found[""] for name, found in beside.items() if found and "" in found}
            files[path.name] = listing[""]
            return _copy(path.parent, dict(sorted(files.items()))) / path.name
        chosen = {n: e for n, e in sorted(listing.items()) if not n or wanted is None or wanted(n)}
        return _copy(path, chosen) if chosen else None


def _copy(path: paths.Path, listing: dict[str, _Entry]) -> pathlib.Path:
    """Copies files of a bucket into the cache folder, where they appear all at once.

    Args:
      listing: the files to copy, as of `_listing`.

    Returns:
      The folder of the copies; or the file, if the path is one.
    """
    # The listing has sizes and checksums: another content is another folder, and a run that still
    # reads the old one is not disturbed.
    digest = hashlib.sha256(f"{path}\n{sorted(listing.items())}".encode()).hexdigest()[:16]
    target = cache("assets") / f"{path.name}-{digest}"
    is_file = set(listing) == {""}
    result = target / path.name if is_file else target
    if target.is_dir():
        return result
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()  # may this user write there?
    except OSError as error:
        raise ConfigError(
            f"the cache folder {target.parent} cannot be written ({error.strerror or error}): set "
            "XDG_CACHE_HOME to a local folder with room."
        ) from error
    with locked(target) as is_locked:
        if is_locked:
            remove_leftovers(target)
        if is_there(target):  # another process made it while this one waited
            return result
        system, where = paths.file_system(path)
        news = _News(f"from {path}", sum(entry.size for entry in listing.values()))
        with tempfile.TemporaryDirectory(
            prefix=temporary_prefix(target), dir=target.parent
        ) as temporary:
            fresh = pathlib.Path(temporary) / "files"

            def fetch(name: str) -> int:
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
            try:  # a rename is atomic: the folder appears with all its files
                fresh.rename(target)
            except OSError:  # without locks, another process was first, with the same files
                if not is_there(target):
                    raise
    return result


def _is_same(source: pathlib.Path, target: paths.Path, entry: _Entry | None) -> bool:
    """Whether the target is known to have the source's content."""
    if entry is None or entry.size != source.stat().st_size:
        return False
    if not paths.is_remote(target):
        return _digest(source, "sha256") == _digest(pathlib.Path(target), "sha256")
    md5 = _digest(source, "md5")
    # The stores keep it: Google in base64, S3 in hexadecimal digits and quotation marks.
    return entry.checksum.strip('"') in (md5.hex(), base64.b64encode(md5).decode())


def _digest(file: pathlib.Path, kind: str) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(
            opened, lambda: hashlib.new(kind, usedforsecurity=False)
        ).digest()


@contextlib.contextmanager
def _faults(where: str) -> Iterator[None]:
    """Turns what the clients of stores raise, and a full disk, into ConfigError or PassingError."""
    try:
        yield
    except QLOG_ERRORS:
        raise
    except Exception as error:  # each client has its own kinds
        reason = f"{type(error).__name__}: {summary(error)}"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                f"{where}: no room ({error.strerror}; {cache('assets')} is the cache): make room, "
                "or set XDG_CACHE_HOME to a larger disk."
            ) from error
        if not paths.passes(error):
            message = (
                f"{where} cannot be used ({reason}): correct the name, or give this user the right."
            )
            raise ConfigError(message) from error
        raise PassingError(f"{where} cannot be reached now ({reason}).") from error


class _News:
    """Lines on stderr about a long copy: one at its start, then one every few seconds."""

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
