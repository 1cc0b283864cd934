"""One kind of path for everything that a run reads and writes: a folder here, or in a bucket.

A bucket has whole objects. Nothing here appends to one or renames one; `write` puts a file there
at once, whole or not at all, on a disk and in a bucket alike.
"""

import importlib.util
import os
import pathlib
import time
from collections.abc import Callable
from typing import TypeVar

from etils import epath

from qlog.errors import ConfigError

Path = epath.Path  # pathlib's interface; gs:// and s3:// too

_CLIENTS = {"gs://": ("gcsfs", "gcs"), "s3://": ("s3fs", "s3")}  # module, qlog's extra
_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between tries after a passing fault
# What trying again does not mend.
_LASTING = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_T = TypeVar("_T")


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
    if f"{scheme}://" not in _CLIENTS or not rest.strip("/"):
        raise ConfigError(f"{field} = {text!r}: give a folder, gs://BUCKET/... or s3://BUCKET/...")
    module, extra = _CLIENTS[f"{scheme}://"]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{field} = {text!r} needs the package {module}: run launch/install {extra}.")
    return Path(text)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether the path is in a bucket."""
    return "://" in os.fspath(path)


def write(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all, over what was there; makes its folder."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        retried(lambda: path.write_bytes(data))  # an upload is seen when it is complete
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.tmp")
    fresh.write_bytes(data)
    os.replace(fresh, path)


def read(path: Path) -> str:
    """A file's text; FileNotFoundError where there is none."""
    return retried(path.read_text)


def retried(function: Callable[[], _T]) -> _T:
    """What `function` returns; a fault that may pass (OSError, but no missing file or right) is
    tried again for half a minute."""
    for pause in (*_PAUSES, None):
        try:
            return function()
        except OSError as error:
            if pause is None or isinstance(error, _LASTING):
                raise
        time.sleep(pause)
    raise AssertionError("unreachable")
