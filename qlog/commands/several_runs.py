"""Several runs one after the other in one process, and one report of them all."""

import contextlib
import functools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
from ml_collections import ConfigDict

from qlog import train
from qlog.config import schema
from qlog.config.check import check_config
from qlog.console import say
from qlog.errors import ConfigError, PassingError
from qlog.experiment import build, files
from qlog.experiment.contents import BEGUN_FROM
from qlog.parallel import distributed, interrupts, process
from qlog.report import comparison
from qlog.runs import checkpoint_reader
from qlog.storage import paths


def run(
    config: ConfigDict, workdir: str | os.PathLike, devices: Sequence[jax.Device] | None = None
) -> None:
    """Runs every entry of `config.runs` in workdir/NAME, then writes the report into workdir.

    An entry holds what differs from `config`. Its `init_from` may name another entry, and then
    means that entry's checkpoint, which is made first. Runs that have finished are not run again,
    so the same command takes up what was interrupted. All configs are checked before the first run
    starts, the memory that they need too, and all that they read is read once.

    Args:
      devices: of every run; None takes all.

    Raises:
      ConfigError, TrainingError, PassingError, Stop: as `train.run` does.
    """
    workdir = paths.parse(workdir, "--workdir")
    children = _children(config, workdir)
    # ---- All checks first: a mistake in the last run would else show after hours ----
    for name, child in children.items():
        with _naming(name):
            check_config(child)
    # What a finished run read may be gone by now, and this machine may be a smaller one.
    unfinished = {
        name: child
        for name, child in children.items()
        if not distributed.once_per_run(functools.partial(_finished, workdir / name, child))
    }
    _check_parts(unfinished, workdir, [str(workdir / name) for name in children], devices)
    _check_files(unfinished)
    # ---- The runs ----
    # Around all runs, so that a signal between two of them, or while one closes, is heard: it ends
    # the whole series.
    with interrupts.listening() as stop:
        for index, (name, child) in enumerate(children.items(), 1):
            process.forget_programs()
            title = f"run {index}/{len(children)} {name}"
            interrupted = _run_one(title, child, workdir / name, devices)
            if interrupted or distributed.any_process(stop.asked):
                say(f"stopped after {title}: the same command goes on.")
                return
        distributed.once_per_run(lambda: comparison.write(workdir, list(children)))


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """An error inside says which run it is of."""
    try:
        yield
    except (ConfigError, PassingError) as error:
        raise type(error)(f"run {name!r}: {error}") from error


def _check_parts(
    children: Mapping[str, ConfigDict],
    workdir: paths.Path,
    folders: Sequence[str],
    devices: Sequence[jax.Device] | None,
) -> None:
    """Whether each run can be prepared here: its mesh, its memory, the checkpoint it begins from.

    Args:
      workdir: has the folder of each run, by its name.
      folders: of all runs; the checkpoint of one that begins from another comes later.

    Raises:
      ConfigError, PassingError: as `build.check`, with the run's name.
    """
    for name, child in children.items():
        if child.init_from in folders:
            child = schema.merge(child, {"init_from": ""})
        with _naming(name):
            build.check(child, devices, begins=not checkpoint_reader.has_steps(workdir / name))


def _check_files(children: Mapping[str, ConfigDict]) -> None:
    """Reads what each run reads.

    Raises:
      ConfigError, PassingError: as `files.check`, with the run's name.
    """
    checked = set()
    for name, child in children.items():
        # Most runs read the same.
        reads = {key: child[key] for key in ("model", "architecture", "weights", "tokenizer")}
        reads |= {"data": child.data, "splits": (child.evaluation.split, child.evaluation.final)}
        key = schema.to_json(ConfigDict(reads))
        if key in checked:
            continue
        checked.add(key)
        with _naming(name):
            files.check(child)


def _run_one(
    title: str, config: ConfigDict, workdir: paths.Path, devices: Sequence[jax.Device] | None
) -> bool:
    """One run, unless it has finished before; whether a signal ended it."""
    _tell_what_it_began_from(title, config, workdir)
    if distributed.once_per_run(lambda: _finished(workdir, config)):
        say(f"{title}: finished before")
        return False
    say(title, "bold")
    start = time.monotonic()
    # Results without seconds.json: an earlier start was cut short between the two.
    was_done = distributed.once_per_run(lambda: paths.exists(workdir / train.RESULTS))
    # Each run has its own claim on its own folder.
    outcome = train.start(config, workdir, devices)
    if outcome.interrupted:
        return True
    if not was_done:  # else only this start's seconds are known, not those of the training
        seconds = time.monotonic() - start
        distributed.once_per_run(lambda: paths.write(workdir / "seconds.json", json.dumps(seconds)))
    return False


def _tell_what_it_began_from(title: str, config: ConfigDict, workdir: paths.Path) -> None:
    """Says so where a run began from another checkpoint than it would begin from now."""
    if not config.init_from or not checkpoint_reader.has_steps(workdir):
        return
    try:
        newest = checkpoint_reader.find_checkpoint(workdir, "--workdir", "latest")
        now = checkpoint_reader.find_checkpoint(config.init_from, "config.init_from")
    except ConfigError:  # for `train.run` to tell, if it has anything to do
        return
    made_of = distributed.once_per_run(lambda: checkpoint_reader.made_of(newest))
    before, version = made_of[1].get(BEGUN_FROM), checkpoint_reader.version(now)
    if before and before != version:
        say(
            f"NOTE: {title} began from step {before['step']} of {config.init_from}, and would "
            f"begin from step {version['step']} now: remove {workdir}, and it runs again."
        )


def _children(config: ConfigDict, workdir: paths.Path) -> dict[str, ConfigDict]:
    """The whole config of each entry, by name, in an order in which they can run.

    Raises:
      ConfigError: entries that begin from each other.
    """
    entries = schema.several(config)
    names = {
        name: child.init_from if child.init_from in entries and child.init_from != name else None
        for name, child in entries.items()
    }
    ordered = {name: entries[name] for name in _in_order(names)}
    for name, other in names.items():
        if other is not None:
            ordered[name].init_from = str(workdir / other)
    return ordered


def _in_order(begins_from: Mapping[str, str | None]) -> list[str]:
    """The keys in their order, but each behind the one that it begins from.

    Raises:
      ConfigError: a circle.
    """
    order: list[str] = []
    for name in begins_from:
        chain: list[str] = []
        at: str | None = name
        while at is not None and at not in order:
            if at in chain:
                raise ConfigError(
                    f"config.runs: {', '.join(sorted(chain))} begin from each other (init_from): "
                    "one of them must begin elsewhere."
                )
            chain.append(at)
            at = begins_from[at]
        order += reversed(chain)
    return order


def _finished(workdir: paths.Path, config: ConfigDict) -> bool:
    """Whether this very config has finished there, and all that the report reads is written."""
    if not {train.RESULTS, "seconds.json", "config.json"} <= set(paths.names(workdir)):
        return False
    # Results of another config do not count: then the run is not finished. Fields are compared, not
    # the text: an older version wrote fewer of them.
    try:
        written = schema.from_json(json.loads(paths.read(workdir / "config.json")))
    except (ValueError, TypeError, AttributeError):  # no JSON, or no config
        return False
    return written == schema.from_json(json.loads(schema.to_json(config)))
