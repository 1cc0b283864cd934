"""One kind of path for everything that a run reads and writes: a folder here, or in a bucket.

A bucket has whole objects. Nothing here appends to one or renames one; `write` puts a file there
at once, whole or not at all, on a disk and in a bucket alike. Nor does anything here answer from
what a client remembers of a bucket: another host may have written since.
"""

import errno
import importlib.util
import logging
import os
import pathlib
import secrets
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from etils import epath

from qlog.errors import ConfigError, summary

Path = epath.Path  # pathlib's interface; gs:// and s3:// too

_CLIENTS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # module, qlog's extra
# Of fsspec's file systems, which epath and Orbax make without arguments: listings are not remembered.
_OPTIONS = {"use_listings_cache": False}
_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between tries after a passing fault
_PATIENCE = 20.0  # seconds in which `probe` answers
_T = TypeVar("_T")

# ---- Which faults pass ----

_LASTING = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
)
# Of other OSErrors; s3fs gives EINVAL, ENOSYS and EREMCHG (wrong region) to requests that are wrong.
_LASTING_NUMBERS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENAMETOOLONG,
    getattr(errno, "EREMCHG", None),
}
# Exceptions of the clients that are no OSErrors, by package and name (or that of a base).
_PASSING = {
    ("aiohttp", "ClientError"),
    ("botocore", "ConnectionError"),
    ("botocore", "HTTPClientError"),
    ("gcsfs", "ChecksumError"),
    ("google", "TransportError"),
    ("urllib3", "HTTPError"),
}


def passes(error: BaseException) -> bool:
    """Whether trying again may mend it: the server was busy or failed, the connection was cut or
    silent. Not where something is missing, forbidden or asked wrongly."""
    code = getattr(error, "code", None)
    if type(error).__name__ == "HttpError" and code is not None:  # of gcsfs; other OSErrors below
        return str(code) in ("408", "429") or str(code).startswith("5")
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    if kinds & _PASSING or getattr(error, "retryable", False):  # of google.auth
        return True
    if not isinstance(error, OSError) or isinstance(error, _LASTING):
        return False
    return error.errno not in _LASTING_NUMBERS and not str(error).startswith(
        "Forbidden"
    )  # gcsfs: 403


def retried(function: Callable[[], _T]) -> _T:
    """What `function` returns; a fault that may pass is tried again for half a minute, beside what
    the client of a bucket tries itself."""
    for pause in (*_PAUSES, None):
        try:
            return function()
        except Exception as error:  # each client has its own
            if pause is None or not passes(error):
                raise
        time.sleep(pause)
    raise AssertionError("unreachable")


def sentence(error: BaseException) -> str:
    """What to tell of a store or a disk that failed, where trying again later may help; '' of others."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no room is left ({error}): make some; the same command goes on."
    if isinstance(error, Exception) and passes(error) and not isinstance(error, BrokenPipeError):
        reason = summary(error)
        return f"a store or a network failed ({type(error).__name__}: {reason}); the same command goes on."
    return ""


# ---- Paths ----


def parse(spec: str | os.PathLike, field: str = "path") -> Path:
    """`spec` as a path: a local one with ~ expanded, gs://BUCKET/... or s3://BUCKET/...

    Args:
      field: what named it, for messages.

    Raises:
      ConfigError: another scheme, or a bucket whose client is not installed.
    """
    text = os.fspath(spec)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(pathlib.Path(text).expanduser())
    if scheme not in _CLIENTS or not rest.strip("/"):
        raise ConfigError(f"{field} = {text!r}: give a folder, gs://BUCKET/... or s3://BUCKET/...")
    module, extra = _CLIENTS[scheme]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"{field} = {text!r} needs the package {module}: run launch/install {extra}."
        )
    _set_up_clients()
    return Path(text)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether the path is in a bucket."""
    return "://" in os.fspath(path)


def exists(path: Path) -> bool:
    """Whether there is such a file, or a folder with something in it, now."""
    return retried(path.exists)


def names(folder: Path) -> list[str]:
    """Names of what is in a folder now, sorted; none where there is no folder."""
    try:
        return sorted(retried(lambda: [entry.name for entry in folder.iterdir()]))
    except (FileNotFoundError, NotADirectoryError):
        return []


def read(path: Path) -> str:
    """A file's text; FileNotFoundError where there is none."""
    return retried(lambda: path.read_bytes()).decode()


def write(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all, over what was there; makes its folder."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        # In one request where it is small; an upload is seen when it is complete.
        retried(lambda: _file_system(path).pipe_file(os.fspath(path), data))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(
        f".{path.name}.{secrets.token_hex(4)}.tmp"
    )  # of two writers each its own
    fresh.write_bytes(data)
    os.replace(fresh, path)


def create(path: Path, content: str | bytes) -> bool:
    """Writes a file that is not there; False, and nothing is written, where one is.

    Of several that try at once one succeeds, on a disk and in a bucket. On a disk another may see
    the file before its content.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if is_remote(path):
            # ifGenerationMatch=0 on Google's, If-None-Match: * on S3.
            retried(lambda: _file_system(path).pipe_file(os.fspath(path), data, mode="create"))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:
                file.write(data)
    except FileExistsError:
        # A try that was cut off after it had arrived finds its own content.
        return is_remote(path) and retried(path.read_bytes) == data
    return True


def remove(path: Path) -> None:
    """Removes a file; nothing where there is none."""
    try:
        retried(path.unlink)
    except FileNotFoundError:
        pass


# ---- Is it there, and ours? ----


def probe(folder: Path, field: str = "path", patience: float = _PATIENCE) -> None:
    """Makes a folder, and writes, reads and removes a file in it.

    Args:
      field: what named the folder, for messages.
      patience: seconds after which no answer is one, whatever a client still tries.

    Raises:
      ConfigError: in one sentence, what cannot be done there and the remedy.
    """
    text, file = secrets.token_hex(8), folder / f".probe_{secrets.token_hex(8)}"

    def work():
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
            f"{field} = {folder} cannot be written: {reason}; give a folder that this user may write."
        ) from error
    raise ConfigError(f"{field} = {folder}: {_why(error, folder)}") from error


def within(seconds: float, function: Callable[[], object]) -> Exception | None:
    """What `function` raised, or None; TimeoutError when it has not returned after `seconds`.

    It then goes on in its thread, which does not keep the process.
    """
    outcome: list[Exception | None] = []

    def work():
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
    return f"{bucket} cannot be used ({type(error).__name__}: {reason}): try again, or look at the network."


def _file_system(path: Path):
    import fsspec  # comes with the clients

    return fsspec.filesystem("gcs" if os.fspath(path).startswith("gs://") else "s3")


def _set_up_clients() -> None:
    import fsspec.config

    for name in ("gcsfs", "s3fs", "asyncio"):  # their logs have a traceback for each try
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for protocol in ("gcs", "s3"):
        fsspec.config.conf[protocol] = _OPTIONS | fsspec.config.conf.get(protocol, {})
