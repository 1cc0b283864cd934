"""Is this machine ready to train? One screen of checks, each ok or failed with its remedy.

    python -m qlog.commands.doctor
    python -m qlog.commands.doctor --config=configs/hotpotqa.py --workdir=gs://BUCKET/runs/first

On several hosts run it on all of them, as you would train: mesh and all-reduce span them all.
The exit status is 1 when a check has failed on any host.
"""

import importlib.metadata
import math
import pathlib
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from qlog import data, experiment, losses, models
from qlog.commands import entry
from qlog.config import command_line, schema
from qlog.config.check import check_config
from qlog.console import (
    complain,
    count_text,
    output,
    plain_console,
    printable,
    size_text,
    time_text,
)
from qlog.errors import QLOG_ERRORS, ConfigError, summary
from qlog.experiment import cost, files
from qlog.parallel import distributed, process, sharding
from qlog.runs import checkpoint_reader, ownership
from qlog.storage import paths

_PATIENCE = 120  # seconds for the all-reduce, its compilation included
_MIB_PER_DEVICE = 16  # reduced to take its speed
_BYTES_PER_PARAMETER = 12  # of a checkpoint: float32 parameters and AdamW's two moments
_LEAST_FREE = 5 * 10**9  # bytes, where no config says how large checkpoints are


class Check(NamedTuple):
    """One line of the screen."""

    name: str
    is_ok: bool
    text: str  # what was found; of a failed check, what is wrong and the remedy


def checks(config: ConfigDict | None, workdir: str) -> Iterator[Check]:
    """Runs every check in turn; a failure never stops the ones after it.

    Args:
      config: of the run that is planned; None checks only the machine.
      workdir: folder or bucket of the run, made if it is not there.
    """
    yield _check("versions", _versions)
    if config is not None:
        yield _check("config", lambda: _config(config))
    yield _check("devices", _devices)
    # Without a config, any mesh that takes all devices.
    sizes = dict(config.mesh) if config is not None else {"data": -1, "fsdp": 1, "tensor": 1}
    yield _check("mesh", lambda: _show_mesh(sharding.make_mesh(**sizes)))
    yield _check("all-reduce", _all_reduce)
    yield _check("workdir", lambda: _writes(workdir))
    yield _check("free disk", lambda: _free_disk(config, workdir))
    if config is not None:
        yield _check("weights", lambda: _weights(config))
        yield _check("tokenizer", lambda: _tokenizer(config))
        yield _check("memory", lambda: _memory(config))


def run(config: ConfigDict | None, workdir: str) -> int:
    """Prints all checks of the first process and the failed ones of others; the exit status.

    Every process of the run must call.

    Args:
      config, workdir: as `checks` takes them.
    """
    found = list(checks(config, workdir))
    failed = [check for check in found if not check.is_ok]
    shown = found if jax.process_index() == 0 else failed
    if shown:
        table = Table(title=f"qlog doctor, process {jax.process_index()}", title_justify="left")
        table.add_column("check", no_wrap=True)
        table.add_column("", no_wrap=True)
        table.add_column("found", overflow="fold")
        for check in shown:
            state = Text("ok") if check.is_ok else Text("failed", style="bold red")
            table.add_row(check.name, state, printable(check.text))
        plain_console().print(table)
    return int(distributed.any_process(bool(failed)))


def _check(name: str, function: Callable[[], str]) -> Check:
    """The check that `function` makes: it returns what it found, or raises what is wrong."""
    try:
        return Check(name, True, function())
    except ConfigError as error:
        return Check(name, False, str(error))
    except Exception as error:  # drivers, file systems, buckets' clients: each its own kind
        return Check(name, False, f"{type(error).__name__}: {summary(error)}")


def _versions() -> str:
    """Every requirement of the commands is there, in a version that it accepts."""
    unfit = []
    for line in importlib.metadata.requires("qlog") or ():
        needed = Requirement(line)
        if needed.marker and not needed.marker.evaluate({"extra": "train"}):
            continue  # of an extra that no command needs by itself
        try:
            has = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            has = "missing"
        if has == "missing" or not needed.specifier.contains(has, prereleases=True):
            unfit.append(f"{needed.name}{needed.specifier} ({has})")
    if unfit:
        raise ConfigError(f"needs {', '.join(unfit)}: run launch/install.")
    seen = [f"Python {platform.python_version()}"]
    for name in ("qlog", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "libtpu"):
        try:
            seen.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            seen.append(f"no {name}")
    return ", ".join(seen)


def _config(config: ConfigDict) -> str:
    check_config(config)
    name, loss = data.label(config.data.name), losses.label(config.loss.name)
    return f"{config.model}, {name} {config.data.style}, {loss}"


def _devices() -> str:
    devices = jax.devices()
    kind, backend = devices[0].device_kind, jax.default_backend()
    process.refuse_fallback()  # raises if JAX does not use an accelerator that is plugged in
    memory = (devices[0].memory_stats() or {}) if backend != "cpu" else {}
    size = f", {memory['bytes_limit'] / 2**30:.1f} GiB each" if "bytes_limit" in memory else ""
    return (
        f"{len(devices)} x {kind} ({backend}){size}; {jax.local_device_count()} in this process, "
        + count_text(jax.process_count(), "process", "processes")
    )


def _show_mesh(mesh: Mesh) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def _all_reduce() -> str:
    """All devices sum one array together, in time and right."""
    seconds: list[float] = []
    # In another thread: a collective that lacks a peer never returns.
    error = paths.within(_PATIENCE, lambda: seconds.append(_time_all_reduce()))
    if isinstance(error, TimeoutError):
        raise ConfigError(
            f"not done after {_PATIENCE} s: run this on every host of the slice at the same time, "
            "and let the network between them pass all ports."
        )
    if error is not None:
        raise error
    num_devices = count_text(jax.device_count(), "device")
    return f"{num_devices}, {_MIB_PER_DEVICE} MiB each in {time_text(seconds[0])}"


def _time_all_reduce() -> float:
    """Seconds of an all-reduce over all devices, without its compilation.

    Raises:
      ConfigError: the sum is wrong.
    """
    mesh = sharding.make_mesh(-1, 1, 1)
    num_devices, size = mesh.size, _MIB_PER_DEVICE * 2**20 // 4  # float32 per device
    add = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, "data"),
            mesh=mesh,
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec(),
        )
    )
    # Device i holds `size` times the number i + 1: a device left out shows in the sum.
    ranks = jax.jit(
        lambda: jnp.repeat(jnp.arange(1.0, num_devices + 1), size),
        out_shardings=NamedSharding(mesh, PartitionSpec("data")),
    )()
    total = jax.block_until_ready(add(ranks))
    start = time.perf_counter()
    jax.block_until_ready(add(ranks))
    seconds = time.perf_counter() - start
    if not (np.asarray(total.addressable_data(0)) == num_devices * (num_devices + 1) / 2).all():
        raise ConfigError(
            f"{num_devices} devices gave a wrong sum: replace the host, or report the chip."
        )
    return seconds


def _writes(workdir: str) -> str:
    """The workdir can be written, and every process sees the same one."""
    folder = paths.parse(workdir, "--workdir")
    ownership.prove_shared(folder, "--workdir")
    shared = (
        f", by {jax.process_count()} processes that see the same" if jax.process_count() > 1 else ""
    )
    return f"{folder}: written, read, removed{shared}"


def _free_disk(config: ConfigDict | None, workdir: str) -> str:
    """The checkpoints of the run fit on the workdir's disk."""
    folder = paths.parse(workdir, "--workdir")
    if paths.is_remote(folder):
        return f"{folder} is a bucket: no limit"
    needed, why = _LEAST_FREE, "no config given"
    if config is not None:
        shapes = jax.tree.leaves(models.shapes(files.model_shape(config)))
        parameters = sum(math.prod(leaf.shape) for leaf in shapes)
        # Besides the latest ones there are the best, and the one that is being written.
        kept = config.checkpoint.keep + 2
        needed = kept * _BYTES_PER_PARAMETER * parameters
        why = f"{kept} checkpoints of {parameters / 1e9:.2f}e9 parameters"
    # The workdir may not exist yet: the disk is that of the first folder above it that does.
    place = pathlib.Path(folder).absolute()
    while not paths.exists(place):
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ConfigError(
            f"{place} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed ({why}): make "
            "room, give another --workdir, or lower config.checkpoint.keep."
        )
    return f"{free / 1e9:,.1f} GB free, {needed / 1e9:,.1f} GB needed ({why})"


def _weights(config: ConfigDict) -> str:
    """They are there. A Hub id is downloaded, as training would."""
    if config.init_from:
        return f"from {checkpoint_reader.find_checkpoint(config.init_from, 'config.init_from')}"
    shape = files.model_shape(config)
    if config.weights == "random":
        return f"random, {count_text(shape.num_layers, 'layer')} of width {shape.width}"
    folder = models.huggingface.resolve(config.weights)
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ConfigError(
            f"{folder} holds no *.safetensors: download them, or stage the folder again."
        )
    size = sum(file.stat().st_size for file in shards)
    return f"{folder}: {count_text(len(shards), 'file')}, {size_text(size)}"


def _tokenizer(config: ConfigDict) -> str:
    """It loads, and the model has a row for each of its tokens."""
    # On one device: the mesh is checked above.
    config = schema.merge(config, {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}})
    prepared = experiment.prepare(config, jax.local_devices()[:1], train=False, evaluate=False)
    vocabulary, formatter = prepared.policy.config.vocab_size, prepared.formatter
    assert formatter  # `prepare` reads files
    return (
        f"{prepared.policy.valid_vocab} tokens, for {vocabulary} rows of the model; answers end "
        f"with {formatter.tokenizer.describe_ends()}; chat template: {formatter.template_name}"
    )


def _memory(config: ConfigDict) -> str:
    """The devices can hold a step, as far as a lower bound tells."""
    shapes, evaluate = experiment.prepare_shapes(config), config.evaluation.every > 0
    cost.check(shapes, train=True, evaluate=evaluate)
    found = cost.describe(shapes, evaluate)
    return "; ".join([found.pop("memory"), *(f"{name}: {text}" for name, text in found.items())])


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    with output():
        return _main(argv)


def _main(argv: list[str]) -> int:
    # Not the global flags: other commands of the same process have flags of the same names.
    own = flags.FlagValues()
    wanted = command_line.define(
        "Config file of the planned run, with variants after a colon.", own
    )
    workdir = flags.DEFINE_string(
        "workdir", "runs", "Where the run is to be kept.", flag_values=own
    )
    processes = flags.DEFINE_enum(
        "distributed",
        "auto",
        distributed.CHOICES,
        "Connect to the other processes: on, off, or auto, where the environment names them.",
        flag_values=own,
    )
    if entry.show_about(argv, __doc__ or "", own):
        return 0
    try:
        rest = command_line.parse(argv, own)
        config = wanted.value
        entry.only_flags(rest)
    except entry.MISTAKES as error:
        complain(entry.sentence(error))
        return 2
    with distributed.processes(processes.value):
        try:
            process.look_for_devices()  # no check can be made without
        except QLOG_ERRORS as error:
            complain(str(error))
            return error.status
        return run(config, workdir.value)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
