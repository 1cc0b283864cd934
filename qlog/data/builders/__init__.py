"""FinQA, HotPotQA and MuSiQue through TensorFlow Datasets, without TensorFlow.

`open_records` is all that the rest needs. TFDS itself can read what it prepares, too:
`tfds.builder_from_directory(folder).as_data_source("train")`.
"""

import contextlib
import importlib
import json
import logging
import operator
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from qlog.data.builders import raw
from qlog.errors import ConfigError

NAMES = ("finqa", "hotpotqa", "musique")
_IDS = "ids.json"  # beside what TFDS writes: {official split: [id]}


class Records(Sequence[dict[str, Any]]):
    """Random access to a prepared split: record i is record i of the official raw file.

    Records are plain dicts with the official field names, str and lists; each call reads from disk.
    Safe to share between threads; pickles by file name.

    Attributes:
        ids: the records' ids, known without reading the records.
    """

    def __init__(
        self, source: Sequence[Mapping[str, Any]], fields: Mapping[str, str], ids: Sequence[str]
    ):
        self._source = source
        self._fields = fields
        self.ids = ids

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        from qlog.data.builders import base

        return base.decode(self._source[index % len(self)], self._fields)


def open_records(
    name: str,
    split: str,
    *,
    manual_dir: str | os.PathLike | None = None,
    data_dir: str | os.PathLike | None = None,
) -> Records:
    """Opens an official split, preparing the dataset first where that has not been done.

    Preparing writes array_record files once, into a folder that appears only when it is complete:
    any number of processes may ask at the same time. The folder's name has the builder's version
    and a digest of the raw files' content, so that changed files are prepared anew.

    Args:
        name: "finqa", "hotpotqa" or "musique".
        split: "train", "dev", for FinQA also "test": the official files. The paper's splits, drawn
            from these, are opened by `qlog.data.splits.open_split`.
        manual_dir: folder with the official raw files; None or "" downloads them, and checks their
            digests and sizes. Only the splits whose files are there can be opened.
        data_dir: where to prepare; None or "" means qlog/datasets in the user's cache folder.

    Raises:
        ConfigError: unknown name or split, missing, damaged or unreachable files, or a data_dir
            that cannot be written.
    """
    builder = _builder_class(name)
    if split not in builder.FILES:
        raise ConfigError(
            f"config.data.name = {name!r} has no labelled official split {split!r}: use one of "
            f"{', '.join(builder.FILES)}."
        )
    paths = raw.find(manual_dir, builder.FILES, name) if manual_dir else {}
    if manual_dir and split not in paths:
        raise ConfigError(
            f"config.data.manual_dir = {str(manual_dir)!r} has no {builder.FILES[split].name}, the "
            f"{split} split of {name}: put the file there."
        )
    root = _root(data_dir)
    key = raw.fingerprint(paths) if paths else "official"
    folder = root / f"{name}-{builder.VERSION}-{key}"
    if not folder.is_dir():
        _prepare(builder, folder, paths)
        if paths and raw.fingerprint(paths) != key:
            shutil.rmtree(folder)
            raise ConfigError(
                f"config.data.manual_dir = {str(manual_dir)!r}: files of {name} changed while they "
                "were read: start again when they are complete."
            )
    source, ids = _read(folder, folder / name / str(builder.VERSION), split)
    return Records(source, builder.FIELDS, ids)


def official_splits(name: str, manual_dir: str | os.PathLike | None = None) -> tuple[str, ...]:
    """The official splits that `open_records` can open: of a manual download, those present.

    Raises:
        ConfigError: unknown name, or a manual_dir without any of the files.
    """
    files = _builder_class(name).FILES
    return tuple(raw.find(manual_dir, files, name) if manual_dir else files)


def _builder_class(name: str):
    if name not in NAMES:
        raise ConfigError(
            f"config.data.name = {name!r} has no builder: use one of {', '.join(NAMES)}."
        )
    return importlib.import_module(f"qlog.data.builders.{name}.{name}_dataset_builder").Builder


def _root(data_dir: str | os.PathLike | None) -> pathlib.Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = pathlib.Path(data_dir or pathlib.Path(cache) / "qlog" / "datasets").expanduser()
    if "://" in str(data_dir or ""):
        raise ConfigError(
            f"config.data.data_dir = {str(data_dir)!r} is remote: name a local folder."
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(root, error) from error
    return root.absolute()


def _unwritable(root: pathlib.Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"config.data.data_dir = {str(root)!r} cannot be written ({error.strerror or error}): set "
        "config.data.data_dir to a local folder with room for the dataset."
    )


def _prepare(builder_class, folder: pathlib.Path, paths: Mapping[str, pathlib.Path]) -> None:
    """Builds into a temporary folder beside `folder` and renames it: complete or not there."""
    import tensorflow_datasets as tfds

    if not paths:
        _check_reachable(builder_class)
    try:
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder.parent, error) from error
    logging.info("Preparing %s in %s", builder_class.name, folder)
    try:
        manual_dir = next(iter(paths.values())).parent if paths else temporary / "no_manual_dir"
        builder = builder_class(data_dir=temporary, file_format="array_record")
        with contextlib.redirect_stdout(sys.stderr):  # TFDS prints what it does
            builder.download_and_prepare(
                download_dir=folder.parent / "downloads",
                download_config=tfds.download.DownloadConfig(manual_dir=manual_dir),
            )
        (temporary / _IDS).write_text(json.dumps(builder.ids))
        temporary.chmod(0o755)  # temporary folders are private, data may be shared
        temporary.rename(folder)
    except (OSError, tfds.download.DownloadError) as error:
        if not folder.is_dir():  # else another process was first, with the same files
            raise _failed(builder_class, folder.parent, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _failed(builder_class, root: pathlib.Path, error: Exception) -> ConfigError:
    import requests

    # requests' errors are OSErrors, too.
    is_disk = isinstance(error, OSError) and not isinstance(
        error, (requests.RequestException, ConnectionError, TimeoutError)
    )
    return _unwritable(root, error) if is_disk else _unreachable(builder_class, error)


def _check_reachable(builder_class) -> None:
    """Fails within seconds where TFDS would retry for long."""
    import requests

    for url in {file.url for file in builder_class.FILES.values()}:
        try:
            with requests.get(url, stream=True, timeout=10) as response:
                response.raise_for_status()
        except requests.RequestException as error:
            raise _unreachable(builder_class, error) from error


def _unreachable(builder_class, error: Exception) -> ConfigError:
    files = builder_class.FILES.values()
    urls = " and ".join(dict.fromkeys(file.url for file in files))
    names = " and ".join(file.name for file in files)
    return ConfigError(
        f"config.data.name = {builder_class.name!r} cannot be downloaded "
        f"({type(error).__name__}): download {urls} where there is a network, put {names}, "
        "unpacked, into a folder, and set config.data.manual_dir to it."
    )


def _read(
    folder: pathlib.Path, prepared: pathlib.Path, split: str
) -> tuple[Sequence[Mapping[str, Any]], Sequence[str]]:
    import tensorflow_datasets as tfds

    try:
        ids = json.loads((folder / _IDS).read_text())[split]
        source = tfds.builder_from_directory(prepared).as_data_source(split=split)
        if len(source) != len(ids):
            raise ValueError(f"{len(source)} examples but {len(ids)} ids")
        source[len(source) - 1]  # opens the files
    except Exception as error:  # TFDS and array_record raise many kinds
        raise ConfigError(
            f"config.data.data_dir: the dataset prepared in {folder} is damaged ({error}): delete "
            "that folder, and it will be prepared again."
        ) from error
    return source, ids
