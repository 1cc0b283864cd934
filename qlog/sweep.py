"""Several runs one after the other in one process, and one report of them all."""

import json
import pathlib
import time
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from qlog import config as settings
from qlog import report, train
from qlog.errors import ConfigError
from qlog.telemetry import say


def run(
    config: ConfigDict, workdir: pathlib.Path, devices: Sequence[jax.Device] | None = None
) -> None:
    """Runs every entry of `config.runs` in workdir/NAME, then writes the report into workdir.

    An entry holds what differs from `config`; an `init_from` that names an earlier entry means
    that entry's checkpoint. Runs that have finished are not run again, so the same command
    resumes an interrupted sweep. All configs are checked before the first run starts.

    Raises:
      ConfigError: as `train.run` does.
    """
    children = _children(config, workdir)
    for name, child in children.items():
        try:
            settings.check(child)
        except ConfigError as error:
            raise ConfigError(f"run {name!r}: {error}") from None
    for index, (name, child) in enumerate(children.items(), 1):
        folder = workdir / name
        if _finished(folder, child):
            say(f"run {index}/{len(children)} {name}: finished before")
            continue
        say(f"run {index}/{len(children)} {name}")
        start = time.monotonic()
        outcome = train.run(child, folder, devices)
        if outcome.interrupted:
            return
        (folder / "seconds.json").write_text(json.dumps(time.monotonic() - start))
    report.write(workdir, list(children))


def _children(config: ConfigDict, workdir: pathlib.Path) -> dict[str, ConfigDict]:
    children = {}
    for name, changes in config.runs.items():
        child = settings.merge(config, {**changes, "runs": {}})
        if child.init_from in children:
            child.init_from = str(workdir / child.init_from)
        children[name] = child
    return children


def _finished(folder: pathlib.Path, config: ConfigDict) -> bool:
    files = [folder / name for name in ("results.json", "seconds.json", "config.json")]
    if not all(file.exists() for file in files):
        return False
    return files[-1].read_text() == settings.to_json(config)
