"""One kind of path for everything that a run reads and writes: on a disk, or in a bucket.

A bucket has whole objects: they cannot be appended to, nor renamed. So `write` and `copy` make a
file that is whole or not there, on a disk and in a bucket alike. And each question is asked of the
bucket itself, not of what its client remembers: another host may have written since.
"""

import contextlib
import errno
import logging
import os
import pathlib
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar, cast

import fsspec
import fsspec.config
from etils import epath

from qlog import extras
from qlog.errors import ConfigError, PassingError, summary

Path = epath.Path  # the interface of pathlib, for gs:// and s3:// too

_CLIENTS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme: (module, qlog's extra)
_OPTIONS = {"use_listings_cache": False}  # of fsspec's file systems: always ask the bucket
_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between tries after a fault that passes
_PATIENCE = 20.0  # seconds in which `probe` answers
_T = TypeVar("_T")

# ---- Which faults pass ----
#
# A fault passes if the same request may succeed later: the server was busy, the connection broke.
# The clients (gcsfs, s3fs and the libraries below them) each raise kinds of their own, and none of
# them has to be installed. So kinds are known by name here, not by import.

_LASTING = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
)
# Of other OSErrors. s3fs raises EINVAL, ENOSYS and EREMCHG (wrong region) for a wrong request.
_LASTING_NUMBERS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.EBADF,
    errno.EXDEV,
    errno.ENXIO,
    errno.EDQUOT,
    errno.EFBIG,
    getattr(errno, "EREMCHG", None),
}
# Exceptions of the clients that are not OSErrors: (package, name of the class or of a base).
_PASSING = {
    ("aiohttp", "ClientError"),
    ("botocore", "ConnectionError"),
    ("botocore", "HTTPClientError"),
    ("gcsfs", "ChecksumError"),
    ("google", "TransportError"),
    ("urllib3", "HTTPError"),
}


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}


def passes(error: BaseException) -> bool:
    """Whether the same request may succeed later: a busy or failing server, a broken connection.

    False where something is missing, forbidden or asked wrongly.
    """
    code = getattr(error, "code", None)
    if type(error).__name__ == "HttpError" and code is not None:  # of gcsfs
        # 408: timeout; 429: too many requests; 5xx: the server failed.
        return str(code) in ("408", "429") or str(code).startswith("5")
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    if kinds & _PASSING or getattr(error, "retryable", False):  # of google.auth
        return True
    if not isinstance(error, OSError) or isinstance(error, _LASTING):
        return False
    if str(error).startswith("Forbidden"):  # gcsfs's text of status 403, without an errno
        return False
    return error.errno not in _LASTING_NUMBERS


def retried(function: Callable[[], _T]) -> _T:
    """What `function` returns; after a fault that passes it is called again, for half a minute.

    The clients of buckets try again by themselves, too, within one call.
    """
    for pause in (*_PAUSES, None):
        try:
            return function()
        except Exception as error:  # each client has its own
            if pause is None or not passes(error):
                raise
        time.sleep(pause)
    raise AssertionError("unreachable")


def sentence(error: BaseException) -> str:
    """One sentence about a store or a disk that failed and may work later; '' for other errors."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"no room is left ({error}): make some; the same command goes on."
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return f"a disk refused ({error}): let this user write there; the same command goes on."
    if isinstance(error, Exception) and passes(error) and not isinstance(error, BrokenPipeError):
        reason = summary(error)
        return (
            f"a store or a network failed ({type(error).__name__}: {reason}); "
            "the same command goes on."
        )
    return ""


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """What writes to a file on a disk does so in here: its errors name the file and the remedy.

    Raises:
      PassingError: in the place of an OSError. What was whole before is still whole, so the run
        ends, and the same command goes on when the disk is as it should be.
    """
    try:
        yield
    except OSError as error:
        what, remedy = "cannot be written", "mend the disk or its mount"
        if error.errno in _FULL:
            what, remedy = "cannot be written, no room is left", "make some"
        elif isinstance(error, FileNotFoundError):
            what, remedy = "is gone", "put the folder back"
        reason = error.strerror or type(error).__name__
        raise PassingError(
            f"{path} {what} ({reason}): {remedy}; the same command goes on."
        ) from error


# ---- Paths ----


def parse(spec: str | os.PathLike, field: str = "path") -> Path:
    """`spec` as a path: a local one with ~ expanded, gs://BUCKET/... or s3://BUCKET/...

    Args:
      field: the flag or the config field that named it, for messages.

    Raises:
      ConfigError: another scheme, or a bucket whose client is not installed.
    """
    text = os.fspath(spec)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(expanded(text))
    if scheme not in _CLIENTS or not rest.strip("/"):
        raise ConfigError(f"{field} = {text!r}: give a folder, gs://BUCKET/... or s3://BUCKET/...")
    module, extra = _CLIENTS[scheme]
    if not extras.is_installed(module):
        raise ConfigError(
            f"{field} = {text!r} needs the package {module}: run launch/install {extra}, or "
            f'pip install "qlog[{extra}]".'
        )
    _set_up_clients()
    return Path(text)


def _set_up_clients() -> None:
    for name in ("gcsfs", "s3fs", "asyncio"):  # they log a traceback for each try
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # epath and Orbax make file systems of their own, without arguments: these are their defaults.
    for protocol in ("gcs", "s3"):
        fsspec.config.conf[protocol] = _OPTIONS | fsspec.config.conf.get(protocol, {})


def file_system(path: Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """fsspec's file system for a path, and the path in it; for what epath has no method for."""
    scheme = os.fspath(path).partition("://")[0] if is_remote(path) else "file"
    system = fsspec.filesystem(scheme, **(_OPTIONS if scheme in _CLIENTS else {}))
    return system, system._strip_protocol(os.fspath(path))


def is_remote(path: str | os.PathLike) -> bool:
    """Whether the path is in a bucket."""
    return "://" in os.fspath(path)


def expanded(path: str | os.PathLike) -> pathlib.Path:
    """A local path with ~ expanded, where there is such a user."""
    return pathlib.Path(os.path.expanduser(path))  # pathlib's own raises for an unknown user


def exists(path: Path | pathlib.Path) -> bool:
    """Whether there is such a file now, or a folder (in a bucket: with something in it)."""
    return _answer(lambda: retried(path.exists))


def is_file(path: Path | pathlib.Path) -> bool:
    """Whether there is such a file now, itself or by a link."""
    return _answer(path.is_file)


def is_folder(path: Path | pathlib.Path) -> bool:
    """Whether there is such a folder now, itself or by a link."""
    return _answer(path.is_dir)


def is_dangling(path: pathlib.Path) -> bool:
    """Whether a local path is a link to nothing."""
    return _answer(path.is_symlink) and not exists(path)


def _answer(question: Callable[[], bool]) -> bool:
    """What a path says of itself: one that is too long names nothing, and is no fault."""
    try:
        return question()
    except OSError as error:
        if _names_nothing(error):
            return False
        raise


def _names_nothing(error: OSError) -> bool:
    """Whether a path cannot be: then no file is there, as with one that only is not."""
    return error.errno == errno.ENAMETOOLONG


def refuse_what_is_no_file(path: str | os.PathLike, name: str) -> None:
    """Refuses a pipe, a device or a folder in the place of a file: some are waited for without end.

    Args:
      path: may be in a bucket, or not be there: then it is not refused.
      name: of the file, for the message.

    Raises:
      ConfigError: it is none.
    """
    if not is_remote(path) and os.path.exists(path) and not os.path.isfile(path):
        raise ConfigError(f"{name} is not a plain file: copy its content into one.")


def number(folder: Path) -> tuple[int, int] | None:
    """(device, number) of a folder on a disk, by which one in its place is told from it.

    None where there is none, and in a bucket.
    """
    try:
        about = None if is_remote(folder) else os.stat(folder)
    except OSError:
        return None
    return about and (about.st_dev, about.st_ino)


def names(folder: Path) -> list[str]:
    """The names of what is in a folder now, sorted; [] where there is no folder, nor could be."""
    try:
        return sorted(retried(lambda: [entry.name for entry in folder.iterdir()]))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        # Or links that lead to each other, and to no folder.
        if error.errno == errno.ELOOP or _names_nothing(error):
            return []
        raise


def read(path: Path, errors: str = "strict") -> str:
    """A file's text; FileNotFoundError where there is none.

    Args:
      errors: as `bytes.decode` takes it, for bytes that are no UTF-8.
    """
    try:
        return retried(lambda: path.read_bytes()).decode(errors=errors)
    except OSError as error:
        if _names_nothing(error):
            raise FileNotFoundError(errno.ENOENT, error.strerror, str(path)) from error
        raise


def open_bytes(path: Path) -> BinaryIO:
    """A file opened to be read in parts, which a large one is."""
    if is_remote(path):
        system, where = file_system(path)
        return cast(BinaryIO, retried(lambda: system.open(where, "rb")))
    return open(path, "rb")


def write(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all, over what was there; makes its folder."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        # In one request where it is small. A bucket shows an upload when it is complete.
        system, where = file_system(path)
        retried(lambda: system.pipe_file(where, data))
        return
    with _replacing(path) as fresh:
        fresh.write_bytes(data)


def copy(source: pathlib.Path, target: Path) -> None:
    """Copies a local file, whole or not at all, as `write` does; in parts, so of any size."""
    if is_remote(target):
        system, where = file_system(target)
        retried(lambda: system.put_file(str(source), where))
        return
    with _replacing(target) as fresh:
        shutil.copyfile(source, fresh)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to. When the block ends without an error, the file takes `path`'s place."""
    # In the same folder, since only within a file system a rename is atomic. The name is random: of
    # two processes that write the same file each has its own, and the last one wins.
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield fresh
            os.replace(fresh, path)
        except BaseException:
            with contextlib.suppress(OSError):  # on a disk that fails this fails too
                fresh.unlink(missing_ok=True)
            raise


def create(path: Path, content: str | bytes) -> bool:
    """Writes a file that is not there; False, and nothing is written, where one is.

    If several processes try at once, one succeeds, on a disk and in a bucket. On a disk another
    process may see the file before its content.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if is_remote(path):
            # The store decides: by ifGenerationMatch=0 (Google) or If-None-Match: * (S3).
            system, where = file_system(path)
            retried(lambda: system.pipe_file(where, data, mode="create"))
        else:
            _create_local(path, data)
    except FileExistsError:
        # A request whose answer was lost is tried again, and finds its own content.
        return is_remote(path) and retried(path.read_bytes) == data
    return True


def _create_local(path: Path, data: bytes) -> None:
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:  # O_EXCL: the file system decides
                file.write(data)
    except PassingError as error:
        if isinstance(error.__cause__, FileExistsError):
            raise error.__cause__ from None
        raise


def remove(path: Path) -> None:
    """Removes a file; nothing where there is none."""
    try:
        retried(path.unlink)
    except FileNotFoundError:
        pass


def move(source: Path, target: Path) -> None:
    """Renames a folder; in a bucket the store copies each object and then removes it."""
    if is_remote(source):
        system, where = file_system(source)
        retried(lambda: system.mv(where, file_system(target)[1], recursive=True))
    else:
        os.rename(source, target)


# ---- May this user write there? ----


def probe(folder: Path, field: str = "path", patience: float = _PATIENCE) -> None:
    """Makes a folder, and writes, reads and removes a file in it.

    Args:
      field: the flag or the config field that named the folder, for messages.
      patience: seconds until silence counts as a failure, whatever a client still tries.

    Raises:
      ConfigError: what cannot be done there, and the remedy.
      PassingError: a bucket does not answer, or not now.
    """
    text, file = secrets.token_hex(8), folder / f".probe_{secrets.token_hex(8)}"

    def work() -> None:
        if not is_remote(folder):
            folder.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        if file.read_text() != text:
            raise OSError("what was written came back changed")
        file.unlink()

    error = within(patience, work)
    if error is None:
        return
    if not is_remote(folder):
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ConfigError(
            f"{field} = {folder} cannot be written: {reason}; give a folder that this user may "
            "write."
        ) from error
    # What does not answer or is too busy may do so later: launchers try again then.
    kind = PassingError if isinstance(error, TimeoutError) or passes(error) else ConfigError
    raise kind(f"{field} = {folder}: {_why(error, folder)}") from error


def within(seconds: float, function: Callable[[], object]) -> Exception | None:
    """Calls `function` in a thread, and returns what it raised, or None.

    After `seconds` without an end that is a TimeoutError. The function still runs then, in a daemon
    thread: the process can end without it.
    """
    outcome: list[Exception | None] = []

    def work() -> None:
        try:
            function()
            outcome.append(None)
        except Exception as error:  # handed to the caller
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else TimeoutError(f"no answer within {seconds:g} s")


def _why(error: Exception, folder: Path) -> str:
    """What is wrong with a bucket, and the remedy."""
    scheme, _, rest = os.fspath(folder).partition("://")
    bucket = f"{scheme}://{rest.partition('/')[0]}"
    login = {
        "gs": "`gcloud auth application-default login`, or a service account",
        "s3": "`aws configure`, or a role",
    }[scheme]
    reason = summary(error)
    if isinstance(error, FileNotFoundError):
        return f"there is no bucket {bucket}: make it, or correct the name."
    code = str(getattr(error, "code", ""))
    if (
        isinstance(error, PermissionError)
        or reason.startswith("Forbidden")
        or code in ("401", "403")
    ):
        return (
            f"this account may not write in {bucket} ({reason}): give it the right, or use {login}."
        )
    if "redential" in type(error).__name__ or "redential" in reason:
        return f"no credentials for {bucket} ({reason}): use {login}."
    return (
        f"{bucket} cannot be used ({type(error).__name__}: {reason}): try again, or look at the "
        "network."
    )
