"""Copies what runs of a config read to where every host finds it: model, weights, tokenizer, data.

    python -m qlog.commands.stage --config=configs/hotpotqa.py --to=gs://BUCKET/assets
    python -m qlog.commands.stage --model=Qwen/Qwen3-1.7B --to=gs://BUCKET/assets

--to may also be s3://BUCKET/FOLDER, or a folder that all hosts share. What is not here yet is
downloaded and prepared here first; a second call copies only what has changed. With
QLOG_ASSETS=gs://BUCKET/assets, runs on every host find it by the names that the config has, and
ask neither the Hub nor a dataset's server. Local files of config.data.files are copied, too, and
runs are told where by flags, which the command prints. Uses no accelerator.
"""

import atexit
import dataclasses
import functools
import os
import pathlib
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable

from absl import flags
from ml_collections import ConfigDict

from qlog import data, models
from qlog.commands import entry
from qlog.config import command_line, schema
from qlog.config.check import check_config
from qlog.data import catalog, chat_templates
from qlog.data.record_files import JSON_SUFFIXES, PARQUET_SUFFIXES
from qlog.data.tokenizers import companions
from qlog.errors import ConfigError
from qlog.experiment.files import chat_template_path, tokenizer_path
from qlog.storage import assets, paths


@dataclasses.dataclass(frozen=True)
class Asset:
    """One folder of the layout in qlog/storage/assets.py.

    Attributes:
      what: for the user: 'config.model = ...'.
      name: where it goes, relative to --to.
      fetch: makes or finds it here; returns the local folder, or one file of it.
      is_wanted: which files of the folder go there.
      spec: what the config names; it tells apart two assets of the same `name`.
      flags: config fields that a run has to set to use it; () where the name that the config has
        already finds it.
      companions: names of files next to a single file that go there with it.
    """

    what: str
    name: str
    fetch: Callable[[], pathlib.Path]
    is_wanted: Callable[[str], bool]
    spec: str
    flags: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()


def plan(config: ConfigDict | None, model: str = "") -> list[Asset]:
    """What the runs of a config read, each asset once. Fetches nothing.

    Args:
      config: of one run or of several; None for only the model.
      model: a Hub id that is wanted besides; '' for none.

    Raises:
      ConfigError: the config is wrong, or --model is not a Hub id.
    """
    wanted = []
    if model:
        if not models.huggingface.is_hub_id(model):
            raise ConfigError(f"--model={model} is not a Hub id of the form owner/name.")
        wanted.append(_model("--model", model, weights=True))
    if config is not None:
        for each in list(schema.several(config).values()) or [config]:
            check_config(each)
            wanted += _read_by(each)
    # A model that is wanted with its weights and without them is wanted with them: those first.
    wanted.sort(key=lambda asset: not asset.is_wanted("model.safetensors"))
    found: dict[str, Asset] = {}
    for asset in wanted:
        other = found.setdefault(asset.name, asset)
        if other.spec != asset.spec:
            raise ConfigError(
                f"{asset.what} and {other.what} have the same last name, and would be one folder "
                "in the assets: rename one of them."
            )
        if asset.flags != other.flags:
            found[asset.name] = dataclasses.replace(
                other, flags=tuple(dict.fromkeys(other.flags + asset.flags))
            )
    return list(found.values())


def _read_by(config: ConfigDict) -> list[Asset]:
    """What one run reads."""
    found, path, section = [], config.tokenizer.path, config.data
    if config.weights != "random":
        found.append(_model("weights", config.weights, weights=True))
    if config.model not in models.PRESETS:
        found.append(_model("model", config.model, weights=False))
    if path and models.huggingface.is_hub_id(path):
        found.append(_model("tokenizer.path", path, weights=False))
    elif path:
        found.append(
            Asset(
                f"config.tokenizer.path = {path!r}",
                f"tokenizers/{_last(path)}",
                lambda: tokenizer_path(config),
                _files_of_model(weights=False),
                str(path),
                ("tokenizer.path",),
                companions=companions.NAMES,
            )
        )
    if config.tokenizer.chat_template not in ("", chat_templates.BUILT_IN_NAME):
        spec = config.tokenizer.chat_template
        found.append(
            Asset(
                f"config.tokenizer.chat_template = {spec!r}",
                f"chat_templates/{_last(spec)}",
                lambda: chat_template_path(config) or pathlib.Path(spec),
                lambda name: True,
                spec,
                ("tokenizer.chat_template",),
            )
        )
    corpus = data.find_corpus(section.to_dict())
    if corpus.asset:
        found.append(
            Asset(
                f"config.data.name = {section.name!r}",
                corpus.asset,
                lambda: pathlib.Path(corpus.prepare() or ""),
                lambda name: True,
                f"{section.name} {section.manual_dir}",
            )
        )
    for split, specs in corpus.files.items():
        if not all(map(paths.is_remote, specs)):  # every host reads a bucket by itself
            found.append(
                Asset(
                    f"config.data.files.{split}",
                    f"data/files/{split}",
                    functools.partial(_linked, corpus, split),
                    lambda name: True,
                    str([os.path.abspath(spec) for spec in specs]),
                    (f"data.files.{split}",),
                )
            )
    return found


def stage(wanted: Iterable[Asset], to: str, say: Callable[[str], object] = print) -> None:
    """Fetches and copies; says what it does, and which settings runs need.

    Args:
      to: a bucket's folder, or a local one.
      say: is told each line.

    Raises:
      ConfigError, PassingError: as fetching and copying do.
    """
    wanted = list(wanted)
    if not wanted:
        say("nothing to stage: the config reads no files")
        return
    target, flags_ = paths.parse(to, "--to"), []
    if not paths.is_remote(target):  # runs may start in another folder than this command
        target = paths.Path(os.path.abspath(target))
    paths.probe(target, "--to")  # before gigabytes are fetched
    for asset in wanted:
        source = pathlib.Path(asset.fetch())
        folder = source.parent if source.is_file() else source
        if source.is_file():
            names = [name for name in asset.companions if (folder / name).is_file()]
            names.append(source.name)  # the one that runs look for is copied last
        else:
            names = list(filter(asset.is_wanted, files(source)))
        if not names:
            raise ConfigError(
                f"{asset.what}: {source} holds no files that a run reads: correct the name."
            )
        # A reader takes a folder for whole as soon as this file is there: it is copied last.
        last = next(
            (n for n in ("ids.json", "config.json", "tokenizer.json") if n in names), names[-1]
        )
        copied = assets.publish(folder, target / asset.name, names, last)
        say(f"{asset.what}: {target / asset.name} ({copied} of {len(names)} files copied)")
        where = target / asset.name / (source.name if source.is_file() else "")
        flags_ += [f"--config.{flag}={where}" for flag in asset.flags]
    say(f"Runs find this with {assets.ENVIRONMENT}={shlex.quote(str(target))}")
    if flags_:
        say(f"and, for what the config names by a local path, {shlex.join(flags_)}")


def _linked(corpus: data.Corpus, split: str) -> pathlib.Path:
    """A new folder with links to the files of a split, in their order."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="qlog-stage-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Numbers keep apart two files of the same name. And no name says a split: all are read as files
    # of this one. Of the old name only the end is kept, which says the format.
    for i, file in enumerate(catalog.fetched_files(corpus.prepare())[split]):
        suffix = next(
            each for each in JSON_SUFFIXES + PARQUET_SUFFIXES if file.path.lower().endswith(each)
        )
        (folder / f"{i:05d}{suffix}").symlink_to(os.path.abspath(file.path))
    return folder


def _model(field: str, spec: str, weights: bool) -> Asset:
    """A model's folder, by Hub id, bucket or path.

    Args:
      field: what named it: a config field, or --model.
      weights: whether tensors are wanted besides config and tokenizer.
    """
    what = spec if field.startswith("--") else f"config.{field}"
    label = f"{field}={spec}" if field.startswith("--") else f"{what} = {spec!r}"
    # A Hub id is a folder's name in the assets, too. A path is not: its last part is, and runs
    # have to be told by a flag.
    local = not models.huggingface.is_hub_id(spec)
    return Asset(
        label,
        f"models/local/{_last(spec)}" if local else f"models/{spec}",
        lambda: models.huggingface.resolve(spec, weights=weights, field=what),
        _files_of_model(weights),
        spec,
        (field,) if local else (),
    )


def _files_of_model(weights: bool) -> Callable[[str], bool]:
    return functools.partial(models.huggingface.is_wanted, weights=weights)


def _last(spec: str) -> str:
    return pathlib.PurePath(spec.partition("://")[2] or spec).name


def files(folder: pathlib.Path) -> list[str]:
    """All its files, relative to it, without the hidden folders that tools keep in it."""
    names = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file())
    return [str(name) for name in names if not name.parts[0].startswith(".")]


class _Flags:
    """The command's flags. Defined when it runs: other commands have flags of the same names."""

    def __init__(self):
        self.config = command_line.define()
        self.model = flags.DEFINE_string(
            "model", "", "A Hub id to copy besides, or instead of, what a config names."
        )
        self.to = flags.DEFINE_string(
            "to", "", "gs://BUCKET/FOLDER, s3://BUCKET/FOLDER, or a folder all hosts see."
        )
        self.dry_run = flags.DEFINE_bool(
            "dry-run", False, "Say what would be copied where, and stop."
        )


def main(given: _Flags, argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    entry.only_flags(argv)
    if not given.to.value:
        raise ConfigError("--to is needed: gs://BUCKET/FOLDER, s3://BUCKET/FOLDER or a folder.")
    if given.config.value is None and not given.model.value:
        raise ConfigError("give a --config, a --model, or both.")
    wanted = plan(given.config.value, given.model.value)
    if given.dry_run.value:
        for asset in wanted:
            print(f"{asset.what}: to {paths.parse(given.to.value, '--to') / asset.name}")
        return 0
    stage(wanted, given.to.value)
    return 0


if __name__ == "__main__":
    entry.run(functools.partial(main, _Flags()))
