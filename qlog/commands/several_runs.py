"""Several runs one after the other in one process, and one report of them all."""

import json
import os
import time
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from qlog import train
from qlog.config import schema
from qlog.config.check import check_config
from qlog.console import say
from qlog.errors import ConfigError
from qlog.experiment import prepare
from qlog.parallel import distributed, interrupts
from qlog.runs import report
from qlog.storage import paths


def run(
    config: ConfigDict, workdir: str | os.PathLike, devices: Sequence[jax.Device] | None = None
) -> None:
    """Runs every entry of `config.runs` in workdir/NAME, then writes the report into workdir.

    An entry holds what differs from `config`; an `init_from` that names an earlier entry means
    that entry's checkpoint. Runs that have finished are not run again, so the same command
    resumes an interrupted sweep. All configs are checked before the first run starts.

    Raises:
      ConfigError: as `train.run` does.
    """
    workdir = paths.parse(workdir, "--workdir")
    children = _children(config, workdir)
    for name, child in children.items():
        try:
            check_config(child)
        except ConfigError as error:
            raise ConfigError(f"run {name!r}: {error}") from None
    for index, (name, child) in enumerate(children.items(), 1):
        folder = workdir / name
        if distributed.once_per_run(lambda: _finished(folder, child)):
            say(f"run {index}/{len(children)} {name}: finished before")
            continue
        say(f"run {index}/{len(children)} {name}")
        start = time.monotonic()
        was_done = distributed.once_per_run(lambda: paths.exists(folder / train.RESULTS))
        with interrupts.listening() as stop:
            with train.claimed(child, folder) as claim:
                outcome = train.run(prepare(child, devices), folder, claim)
            if outcome.interrupted or distributed.any_process(stop.asked):
                return
        seconds = time.monotonic() - start
        if not was_done:
            distributed.once_per_run(
                lambda: paths.write(folder / "seconds.json", json.dumps(seconds))
            )
    distributed.once_per_run(lambda: report.write(workdir, list(children)))


def _children(config: ConfigDict, workdir: paths.Path) -> dict[str, ConfigDict]:
    children = {}
    for name, changes in config.runs.items():
        child = schema.merge(config, {**changes, "runs": {}})
        if child.init_from in children:
            child.init_from = str(workdir / child.init_from)
        children[name] = child
    return children


def _finished(folder: paths.Path, config: ConfigDict) -> bool:
    if not {"results.json", "seconds.json", "config.json"} <= set(paths.names(folder)):
        return False
    return paths.read(folder / "config.json") == schema.to_json(config)
