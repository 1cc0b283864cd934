"""FinQA, HotPotQA and MuSiQue through TensorFlow Datasets, without TensorFlow.

`prepare` makes or finds a dataset, `open_prepared` opens it, `open_records` does both. TFDS, too,
can read what is prepared here: `tfds.builder_from_directory(folder).as_data_source("train")`
(which imports the classes that the folder's features.json names: only for folders you trust).

A dataset is added as a package NAME/NAME_dataset_builder.py with a `base.RecordBuilder`, and its
name in `NAMES`. In reading order: raw.py (the official files), base.py (what the builders share),
musique/, hotpotqa/, finqa/ (the shortest builder first).
"""

import contextlib
import importlib
import io
import json
import operator
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from qlog.data import fields
from qlog.data.builders import raw
from qlog.errors import ConfigError, PassingError
from qlog.storage import assets, paths, strict_json

NAMES = ("finqa", "hotpotqa", "musique")
_IDS = "ids.json"  # next to what TFDS writes: {official split: [id]}


class Records(Sequence[dict[str, Any]]):
    """Random access to a prepared split: record i is record i of the official raw file.

    Records are plain dicts with the official field names, str and lists. Each access reads from
    disk. Threads may share the object; it is pickled by file name.

    Args:
      source: what TFDS reads, record by record.
      kinds: how each field is stored, `RecordBuilder.FIELDS`.
      ids: the ids of the records, in their order.

    Attributes:
      ids: the records' ids, known without reading the records.
    """

    def __init__(
        self, source: Sequence[Mapping[str, Any]], kinds: Mapping[str, str], ids: Sequence[str]
    ):
        self._source = source
        self._kinds = kinds
        self.ids = ids

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = operator.index(index)  # numpy's integers, too
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        from qlog.data.builders import base  # it imports TFDS, which takes seconds

        return base.decode(self._source[index % len(self)], self._kinds)


def open_records(
    name: str,
    split: str,
    *,
    manual_dir: str | os.PathLike | None = None,
    data_dir: str | os.PathLike | None = None,
) -> Records:
    """Opens an official split, preparing the dataset first where that has not been done.

    Args:
      name: "finqa", "hotpotqa" or "musique".
      split: "train", "dev", for FinQA also "test": the official files. The paper's splits, chosen
        from these, are opened by `qlog.data.splits.open_split`.
      manual_dir, data_dir: as in `prepare`. Of a manual download only the splits whose files are
        there can be opened.

    Raises:
      ConfigError: unknown split, and as `prepare`.
      PassingError: as `prepare`.
    """
    builder = _builder_class(name)
    if split not in builder.FILES:
        raise ConfigError(
            f"{fields.NAME} = {name!r} has no labelled official split {split!r}: use one of "
            f"{', '.join(builder.FILES)}."
        )
    if manual_dir and split not in official_splits(name, manual_dir):
        raise ConfigError(
            f"{fields.MANUAL_DIR} = {str(manual_dir)!r} has no {builder.FILES[split].name}, the "
            f"{split} split of {name}: put the file there."
        )
    return open_prepared(name, split, prepare(name, manual_dir=manual_dir, data_dir=data_dir))


def prepare(
    name: str,
    *,
    manual_dir: str | os.PathLike | None = None,
    data_dir: str | os.PathLike | None = None,
) -> pathlib.Path:
    """The local folder of a prepared dataset, for `open_prepared`; prepares it where there is none.

    Without manual_dir it looks into data_dir, then into QLOG_ASSETS (qlog.storage.assets), and then
    downloads. Preparing writes array_record files once, into a folder that appears when it is
    complete. Its name has the builder's version and a digest of the raw files, so changed files are
    prepared anew. If several processes ask at the same time, one prepares and the others wait; a
    run calls this within `distributed.once_per_host`.

    Args:
      name: "finqa", "hotpotqa" or "musique".
      manual_dir: folder with the official raw files, here or in a bucket; None or "" downloads
        them, and checks their digests and sizes.
      data_dir: where to prepare; None or "" is qlog/datasets in the user's cache folder. A bucket
        is only read: it has the prepared datasets that `launch/stage` put there.

    Raises:
      ConfigError: unknown name, missing or damaged files, or a data_dir that cannot be written.
      PassingError: the files cannot be downloaded now.
    """
    builder = _builder_class(name)
    if data_dir and paths.is_remote(data_dir):
        if manual_dir:
            raise ConfigError(
                f"{fields.DATA_DIR} = {str(data_dir)!r} is remote and only read: name a local "
                f"folder next to {fields.MANUAL_DIR}, or leave one of the two empty."
            )
        folder = assets.local(f"{str(data_dir).rstrip('/')}/{staged_name(name)}", fields.DATA_DIR)
        return _whole(folder)
    found = raw.find(_local(manual_dir, builder), builder.FILES, name) if manual_dir else {}
    # ---- Is it there already? ----
    # The name of the folder tells what is in it. Official files need no digest of ours: they are
    # checked against the published ones when they are downloaded.
    root = _root(data_dir)
    key = raw.fingerprint(found) if found else "official"
    folder = root / f"{name}-{builder.VERSION}-{key}"
    if paths.is_folder(folder):
        return folder
    # Staged assets are made of the official files. They cannot stand for files that a user named.
    if not found:
        if paths.is_file(root / staged_name(name) / _IDS):
            return root / staged_name(name)
        staged = assets.find(f"data/{staged_name(name)}", lambda names: _IDS in names)
        if staged is not None:
            return staged
    # ---- Prepare it ----
    _make(root)
    with assets.locked(folder) as is_locked:
        if is_locked:
            assets.remove_leftovers(folder)
        # Another process may have prepared it while this one waited for the lock.
        if not assets.is_there(folder):
            _prepare(builder, folder, _local(manual_dir, builder) if manual_dir else None)
    # The folder's name has the digest from before: it must be true of what was read.
    if found and raw.fingerprint(found) != key:
        shutil.rmtree(folder)
        raise ConfigError(
            f"{fields.MANUAL_DIR} = {str(manual_dir)!r}: files of {name} changed while they "
            "were read: start again when they are complete."
        )
    return folder


def open_prepared(name: str, split: str, folder: pathlib.Path) -> Records:
    """Opens an official split of what `prepare` returned.

    Raises:
      ConfigError: damaged files, or the split is not there.
    """
    builder = _builder_class(name)
    source, ids = _read(builder, folder, split)
    return Records(source, builder.FIELDS, ids)


def prepared_splits(folder: pathlib.Path) -> tuple[str, ...]:
    """The official splits in what `prepare` returned.

    Raises:
      ConfigError: it is damaged.
    """
    return tuple(_ids(folder))


def staged_name(name: str) -> str:
    """The name of a dataset's folder among staged assets: 'hotpotqa-1.0.0'."""
    return f"{name}-{_builder_class(name).VERSION}"


def official_splits(name: str, manual_dir: str | os.PathLike | None = None) -> tuple[str, ...]:
    """The official splits that `open_records` can open: of a manual download, those present.

    Raises:
      ConfigError: unknown name, or a manual_dir without any of the files.
    """
    builder = _builder_class(name)
    if not manual_dir:
        return tuple(builder.FILES)
    return tuple(raw.find(_local(manual_dir, builder), builder.FILES, name))


def _builder_class(name: str):
    if name not in NAMES:
        raise ConfigError(
            f"{fields.NAME} = {name!r} has no builder: use one of {', '.join(NAMES)}."
        )
    return importlib.import_module(f"qlog.data.builders.{name}.{name}_dataset_builder").Builder


def _local(manual_dir: str | os.PathLike, builder) -> pathlib.Path:
    names = {file.name for file in builder.FILES.values()}
    return assets.local(
        manual_dir, fields.MANUAL_DIR, lambda name: pathlib.PurePath(name).name in names
    )


def _root(data_dir: str | os.PathLike | None) -> pathlib.Path:
    return paths.expanded(data_dir).absolute() if data_dir else assets.cache("datasets")


def _make(root: pathlib.Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        raise _unwritable(root, error) from error


def _whole(folder: pathlib.Path) -> pathlib.Path:
    if not paths.is_file(folder / _IDS):
        raise ConfigError(
            f"{folder} is not a prepared dataset, it holds no {_IDS}: stage it again."
        )
    return folder


def _unwritable(root: pathlib.Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{fields.DATA_DIR} = {str(root)!r} cannot be written ({error.strerror or error}): set "
        f"{fields.DATA_DIR} to a local folder with room for the dataset."
    )


def _prepare(builder_class, folder: pathlib.Path, manual_dir: pathlib.Path | None) -> None:
    """Builds into a temporary folder next to `folder` and renames it: complete or not there.

    Args:
      manual_dir: the folder of the raw files; None downloads them.
    """
    import tensorflow_datasets as tfds  # here and not above: it takes seconds

    if not manual_dir:
        _check_reachable(builder_class)
    try:
        temporary = pathlib.Path(
            tempfile.mkdtemp(prefix=assets.temporary_prefix(folder), dir=folder.parent)
        )
    except OSError as error:
        raise _unwritable(folder.parent, error) from error
    where = f"from {manual_dir}" if manual_dir else "from the network"
    print(
        f"qlog: preparing {builder_class.name} {where}, once, in {folder.parent}",
        file=sys.stderr,
        flush=True,
    )
    if not sys.stderr.isatty():  # bars would fill a file with thousands of their states
        tfds.disable_progress_bar()
    try:
        # A folder that does not exist makes the builder download
        # (`RecordBuilder._split_generators`).
        manual_dir = manual_dir or temporary / "no_manual_dir"
        builder = builder_class(data_dir=temporary, file_format="array_record")
        # TFDS prints that it downloads, also what lies here.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(
                download_dir=folder.parent / "downloads",
                download_config=tfds.download.DownloadConfig(manual_dir=manual_dir),
            )
        # Splits are chosen by id: with this file that reads no record.
        (temporary / _IDS).write_text(json.dumps(builder.ids))
        temporary.chmod(0o755)  # temporary folders are private, data may be shared
        temporary.rename(folder)
    except (OSError, tfds.download.DownloadError) as error:
        if not assets.is_there(folder):  # else another process was first, with the same files
            raise _failed(builder_class, folder.parent, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _failed(builder_class, root: pathlib.Path, error: Exception) -> Exception:
    import requests

    # The errors of requests and of sockets are OSErrors, too; the rest of them are the disk's.
    network = (requests.RequestException, ConnectionError, TimeoutError)
    if isinstance(error, OSError) and not isinstance(error, network):
        return _unwritable(root, error)
    return _unreachable(builder_class, error)


def _check_reachable(builder_class) -> None:
    """Raises within seconds where TFDS would try again for minutes."""
    import requests

    for url in {file.url for file in builder_class.FILES.values()}:
        try:
            # stream: only the headers are fetched, not the archive.
            with requests.get(url, stream=True, timeout=10) as response:
                response.raise_for_status()
        except requests.RequestException as error:
            raise _unreachable(builder_class, error) from error


def _unreachable(builder_class, error: Exception) -> ConfigError | PassingError:
    """A ConfigError if the server refuses; a PassingError if it is silent, or fails itself."""
    files = builder_class.FILES.values()
    urls = " and ".join(dict.fromkeys(file.url for file in files))
    names = " and ".join(file.name for file in files)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:  # TFDS writes it into the text only
        seen = re.search(r"HTTP code: (\d+)", str(error))
        status = int(seen[1]) if seen else None
    # With these answers a server refuses for good. Others (429, 5xx) and silence may pass.
    kind = ConfigError if status in (400, 401, 403, 404, 405, 410) else PassingError
    return kind(
        f"{fields.NAME} = {builder_class.name!r} cannot be downloaded "
        f"({type(error).__name__}{f', status {status}' if status else ''}): run launch/stage where "
        f"there is a network, or download {urls} there, put {names}, "
        f"unpacked, into a folder, and set {fields.MANUAL_DIR} to it."
    )


def _read(
    builder_class, folder: pathlib.Path, split: str
) -> tuple[Sequence[Mapping[str, Any]], Sequence[str]]:
    try:
        ids = _ids(folder)[split]
        # A prepared folder is data. `tfds.builder_from_directory` would import the Python classes
        # that its features.json names: here the features are those of our own builder.
        builder: Any = builder_class(data_dir=folder, file_format="array_record")
        _check_inside(builder, split)
        source = builder.as_data_source(split=split)
        if len(source) != len(ids):
            raise ValueError(f"{len(source)} examples but {len(ids)} ids")
        source[len(source) - 1]  # opens the files: damage shows now, and not in the middle of a run
    except ConfigError:
        raise
    except Exception as error:  # TFDS and array_record raise many kinds
        raise _damaged(folder, error) from error
    return source, ids


def _check_inside(builder: Any, split: str) -> None:
    """Raises ValueError if dataset_info.json names files outside of the prepared folder."""
    for path in builder.info.splits[split].filepaths:
        name = os.path.relpath(path, builder.data_dir)
        # Of the names, not of what links lead to: a folder may be made of links.
        if not assets.is_inside(name):
            raise ValueError(f"its dataset_info.json names {path}, which is not in it")


def _ids(folder: pathlib.Path) -> dict[str, list[str]]:
    try:
        found = strict_json.loads((folder / _IDS).read_bytes())
        if not isinstance(found, dict) or not all(isinstance(ids, list) for ids in found.values()):
            raise TypeError(f"{_IDS} holds no lists of ids")
        return found
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: pathlib.Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{fields.DATA_DIR}: the dataset prepared in {folder} is damaged ({error}): delete "
        "that folder, and it will be prepared again."
    )
