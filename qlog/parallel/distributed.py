"""Several processes as one program: JAX's multi-controller runtime, started or refused, never guessed.

Every process runs the same lines on the same global arrays; what a process may do alone is read
its own rows, and, process 0, write files.
"""

import contextlib
import itertools
import json
import os
import pathlib
import platform
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed  # its client has no public name; Orbax, too
from jax.experimental import multihost_utils

from qlog.console import say
from qlog.errors import QLOG_ERRORS, ConfigError, PassingError, Stop
from qlog.storage import paths

CHOICES = ("auto", "on", "off")
HOST = "QLOG_HOST"
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@contextlib.contextmanager
def processes(choice: str) -> Iterator[None]:
    """While inside, this process is one of all that were started.

    Enter it before the first JAX call that asks for devices. An exception that leaves the block
    while other processes run is printed and ends this process at once: JAX's own exit would wait
    minutes for peers that wait for this one.

    Args:
      choice: 'on' connects to the others, or fails; 'off' stays alone; 'auto' is 'on' where the
        environment tells of several processes. Cloud TPU VMs tell nothing there: say 'on'.

    Raises:
      ConfigError: the processes were named but could not be connected.
    """
    seen = "" if choice == "off" else environment(os.environ)
    if choice == "off" or (choice == "auto" and not seen):
        yield
        return
    _connect(seen)
    try:
        say(f"{jax.process_count()} process(es), by {seen or 'what JAX detected'}")
        yield
    except SystemExit as stop:
        if stop.code in (None, 0) or jax.process_count() == 1:
            raise
        _leave(stop.code if isinstance(stop.code, int) else 1)
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, QLOG_ERRORS):
            print(f"qlog: {error}", file=sys.stderr)
            _leave(error.status)
        if isinstance(error, Stop):
            _leave(error.status)
        if reason := paths.sentence(error):
            print(f"qlog: {reason}", file=sys.stderr)
            _leave(PassingError.status)
        traceback.print_exc()
        _leave(130 if isinstance(error, KeyboardInterrupt) else 1)


def environment(variables: Mapping[str, str]) -> str:
    """What in the environment tells of several processes; '' when nothing does.

    Raises:
      ConfigError: only some of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID are set,
        or the latter are no numbers.
    """
    if any(variables.get(name) for name in _EXPLICIT[1:]):
        missing = [name for name in _EXPLICIT if not variables.get(name)]
        if missing:
            raise ConfigError(
                f"{', '.join(missing)} not set: several processes need all of "
                f"{', '.join(_EXPLICIT)}, or none and --distributed=off."
            )
        for name in _EXPLICIT[1:]:
            if not variables[name].isdigit():
                raise ConfigError(f"{name}={variables[name]!r} must be a whole number.")
        return "JAX_NUM_PROCESSES={}".format(variables["JAX_NUM_PROCESSES"])
    for name, several in (
        ("JAX_COORDINATOR_ADDRESS", bool),
        ("SLURM_STEP_NUM_TASKS", _above_one),
        ("OMPI_COMM_WORLD_SIZE", _above_one),
        ("MEGASCALE_NUM_SLICES", _above_one),
        ("TPU_WORKER_HOSTNAMES", lambda value: "," in value),
    ):
        if several(variables.get(name, "")):
            return f"{name}={variables[name]}"
    return ""


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process; every process must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def once_per_run(function: Callable[[], Any]) -> Any:
    """What `function` returns on process 0, on every process: for what steers control flow.

    Values that JSON keeps (tuples become lists). Every process must ask; the others do not call it.

    Raises:
      ConfigError, TrainingError, PassingError: what process 0 raised, on every process. Another
        exception of process 0 is a PassingError on the others.
    """
    if jax.process_count() == 1:
        return function()
    value, error = _attempt(function) if jax.process_index() == 0 else (None, None)
    value, failed = broadcast([value, _told(error)])
    if error is not None:
        raise error
    if failed is not None:
        _raise(failed, "process 0 failed")
    return value


def set_key(name: str, text: str) -> None:
    """Leaves a word for the other processes with the coordinator, from any thread; nothing where
    there are none. The first word stays."""
    client = jax_distributed.global_state.client
    if client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # told before
            client.key_value_set(f"qlog/{name}", text)


def get_key(name: str) -> str | None:
    """What another process, or this one, has left under that name; None where nobody has."""
    client = jax_distributed.global_state.client
    if client is None:
        return None
    try:
        return client.key_value_try_get(f"qlog/{name}")
    except jax.errors.JaxRuntimeError:  # nobody
        return None


def once_per_host(function: Callable[[], Any]) -> Any:
    """What `function` returns on the lowest process of this host, which alone calls it here: for what
    fills a host's disk, downloads say. The others wait, however long it takes.

    Values that JSON keeps, as of `once_per_run`; a path belongs to the host. Every process must ask. A host is
    a running kernel with a host name, so two containers of one machine are two; QLOG_HOST, where it
    is set, is the name instead.

    Raises:
      ConfigError, TrainingError, PassingError: what the first host that failed raised, on every
        process. Another exception is a PassingError elsewhere.
    """
    if jax.process_count() == 1:
        return function()
    hosts = gather([{"host": _host()}])
    leaders = [hosts.index(host) for host in hosts]
    mine = leaders[jax.process_index()]
    value, error = _attempt(function) if jax.process_index() == mine else (None, None)
    _wait_for(sorted(set(leaders)))
    outcomes = gather([{"value": value, "failed": _told(error)}])
    if error is not None:
        raise error
    for index, outcome in enumerate(outcomes):
        if outcome["failed"] is not None:
            _raise(outcome["failed"], f"process {index} failed")
    return outcomes[mine]["value"]


def broadcast(value: Any) -> Any:
    """Process 0's value, of JSON, on every process; every process must call."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(text.size)))
    padded = np.resize(text, size) if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())


def gather(rows: list[dict]) -> list[dict]:
    """The rows of all processes, in their order, on every process; values that JSON keeps."""
    if jax.process_count() == 1:
        return rows
    text = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(text.size))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: text.size] = text
    texts = multihost_utils.process_allgather(padded)
    return [row for size, text in zip(sizes, texts) for row in json.loads(text[:size].tobytes())]


def _attempt(function):
    """(value, None) or (None, the exception)."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def _told(error: Exception | None) -> list | None:
    """An exception as JSON: [its kind among QLOG_ERRORS or -1, its text]."""
    if error is None:
        return None
    return [
        next((i for i, kind in enumerate(QLOG_ERRORS) if isinstance(error, kind)), -1),
        str(error),
    ]


def _raise(told: list, who: str):
    kind, text = told
    raise QLOG_ERRORS[kind](text) if kind >= 0 else PassingError(f"{who}: {text}")


def _host() -> str:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    which = boot.read_text().strip() if boot.is_file() else ""
    return os.environ.get(HOST) or f"{platform.node()} {which}"


_turns = itertools.count()


def _wait_for(processes: list[int]) -> None:
    """Returns when all of these processes have come here.

    Through the coordinator: a collective that a process is late for by an hour may give up.
    """
    client = jax_distributed.global_state.client
    turn = f"qlog/once_per_host/{next(_turns)}"
    if client is None:  # the runtime was started by something else
        return
    if jax.process_index() in processes:
        client.key_value_set(f"{turn}/{jax.process_index()}", "done")
    for process in processes:
        while True:
            try:  # in short waits: between them Python sees signals
                client.blocking_key_value_get(f"{turn}/{process}", 2_000)
                break
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise


def _above_one(value: str) -> bool:
    return value.isdigit() and int(value) > 1


def _connect(seen: str) -> None:
    # Its handler would take SIGTERM, and look at it once a second; `qlog.parallel.interrupts` reads signals.
    jax.config.update("jax_enable_preemption_service", False)
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    named = {}
    if seen.startswith("JAX_NUM_PROCESSES"):
        named = {
            "num_processes": int(os.environ["JAX_NUM_PROCESSES"]),
            "process_id": int(os.environ["JAX_PROCESS_ID"]),
        }
    try:
        jax.distributed.initialize(**named)
    except Exception as error:  # whatever a cluster's detection or the runtime raises
        where = f"the environment has {seen}" if seen else "--distributed=on was asked"
        raise ConfigError(
            f"{where}, but the processes could not be connected: {str(error).strip()} "
            "(--distributed=off runs this process alone)."
        ) from error


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
