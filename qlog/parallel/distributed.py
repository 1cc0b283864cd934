"""Several processes as one program: JAX's multi-controller runtime.

Every process runs the same lines on the same global arrays. A collective (a computation over the
mesh, or a function here that says "every process must call") waits until all processes have come to
it. So a decision that leads to a collective must be the same everywhere: it is made by one process
and told to all (`once_per_run`), or by all together (`any_process`), never by each for itself.

| function        | who computes                       | who gets the result              |
|-----------------|------------------------------------|----------------------------------|
| `once_per_run`  | process 0                          | every process, errors included   |
| `once_per_host` | the lowest process of each host    | the processes of that host       |
| `any_process`   | every process gives a bool         | every process: is any true?      |
| `gather`        | every process gives a list         | every process: all lists, joined |
| `broadcast`     | process 0 gives a value            | every process                    |
| `set_key`       | one process, at any time           | each process that calls `get_key`|
"""

import contextlib
import itertools
import json
import os
import pathlib
import platform
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed as jax_distributed  # the client has no public name
from jax.experimental import multihost_utils

from qlog.console import complain, count_text, say
from qlog.errors import QLOG_ERRORS, ConfigError, PassingError, Stop, summary
from qlog.parallel import process
from qlog.storage import paths

CHOICES = ("auto", "on", "off")
HOST = "QLOG_HOST"  # in the environment: the name of this host, for `once_per_host`
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

# ---- Start and end ----


@contextlib.contextmanager
def processes(choice: str) -> Iterator[None]:
    """While inside, this process is connected to all others of its run.

    Enter it before the first JAX call that asks for devices. An exception that leaves the block
    while other processes run is printed and ends this process at once.

    Args:
      choice: 'on' connects to the others, or fails; 'off' runs without them; 'auto' is 'on' where
        the environment names several processes. Cloud TPU VMs name none there: use 'on'.

    Raises:
      ConfigError: the processes were named but could not be connected.
    """
    seen = "" if choice == "off" else environment(os.environ)
    if choice == "off" or (choice == "auto" and not seen):
        yield
        return
    _connect(seen)
    try:
        process.look_for_devices()
    except QLOG_ERRORS as error:  # without devices JAX does not say how many processes there are
        complain(str(error))
        _leave(error.status)
    try:
        number = count_text(jax.process_count(), "process", "processes")
        say(f"{number}, by {seen or 'what JAX detected'}")
        yield
    # From here on: an error of this process, while the others may wait for it in a collective.
    # A normal exit would run JAX's shutdown barrier, which waits minutes for them. So this process
    # says what happened and leaves without it; the coordinator then ends the others.
    except SystemExit as stop:
        if stop.code in (None, 0) or jax.process_count() == 1:
            raise
        _leave(stop.code if isinstance(stop.code, int) else 1)
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, QLOG_ERRORS):
            complain(str(error))
            _leave(error.status)
        if isinstance(error, Stop):
            _leave(error.status)
        if reason := paths.sentence(error) or sentence(error):
            complain(reason)
            _leave(PassingError.status)
        traceback.print_exc()
        _leave(130 if isinstance(error, KeyboardInterrupt) else 1)


# In what the runtime raises where another process is not there any more.
_GONE = re.compile(
    r"\b(gloo|coordination service|heartbeat|connection (reset|closed|refused)|socket closed|"
    r"broken pipe|remote process|barrier .*(failed|timed out|aborted))\b",
    re.IGNORECASE | re.DOTALL,
)


def sentence(error: BaseException) -> str:
    """One sentence about another process of the run that is gone; '' for other errors."""
    frames = traceback.extract_tb(error.__traceback__)
    is_of_runtime = isinstance(error, (ValueError, RuntimeError)) and bool(
        frames and re.search(r"/(jax|jaxlib|orbax)/", frames[-1].filename)
    )
    text = str(error)
    if not is_of_runtime or "RESOURCE_EXHAUSTED" in text or not _GONE.search(text):
        return ""
    return (
        f"process {jax.process_index()} lost another process of the run, or the network to it "
        f"({summary(error)}): what that one said tells why; the same command goes on."
    )


def environment(variables: Mapping[str, str]) -> str:
    """The variable, "NAME=value", that shows that several processes were started; '' without one.

    Raises:
      ConfigError: only some of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID are set,
        or the last two are not numbers.
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
    # What the launchers of clusters set; jax.distributed.initialize() reads the same variables.
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


def _above_one(value: str) -> bool:
    """Whether a variable's value is a number above 1."""
    return value.isdigit() and int(value) > 1


def _connect(seen: str) -> None:
    """Joins the run's other processes. `seen`: as `environment` found it."""
    # JAX's preemption service would take SIGTERM for itself; `qlog.parallel.interrupts` needs it.
    jax.config.update("jax_enable_preemption_service", False)
    if jax.config.jax_platforms == "cpu":
        # Without it, CPUs of several processes do not compute together.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX reads the coordinator's address from the environment, but not these two.
    named: dict[str, Any] = {}
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
            "(--distributed=off runs only this process)."
        ) from error


def _leave(code: int) -> NoReturn:
    """Ends the process without the handlers of exit, JAX's barrier among them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- Agreement ----


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process. Every process must call."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def once_per_run(function: Callable[[], Any]) -> Any:
    """Calls `function` on process 0 only, and returns its result on every process.

    For what is read from outside (files, a network) and steers the control flow: two processes
    that read at two moments may read two things. Every process must call.

    Args:
      function: returns what JSON can hold; tuples become lists.

    Raises:
      ConfigError, TrainingError, PassingError: what process 0 raised, on every process. Another
        exception of process 0 is a PassingError on the others.
    """
    if jax.process_count() == 1:
        return function()
    value, error = _attempt(function) if jax.process_index() == 0 else (None, None)
    # The error travels with the value: if process 0 raised it here and now, the others would wait
    # for its broadcast until their time is out.
    value, failed = broadcast([value, _as_json(error)])
    if error is not None:
        raise error  # on process 0, with its own traceback
    if failed is not None:
        _raise(failed, "process 0 failed")
    return value


def set_key(name: str, text: str) -> None:
    """Leaves a text with the coordinator, for `get_key`; from any thread. The first text stays.

    No collective: the other processes need not call. Does nothing in a run of one process.
    """
    client = jax_distributed.global_state.client
    if client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # it is set already
            client.key_value_set(f"qlog/{name}", text)


def get_key(name: str) -> str | None:
    """The text that a process has left under this name by `set_key`; None without one."""
    client = jax_distributed.global_state.client
    if client is None:
        return None
    try:
        return client.key_value_try_get(f"qlog/{name}")
    except jax.errors.JaxRuntimeError:  # not set
        return None


def once_per_host(function: Callable[[], Any]) -> Any:
    """Calls `function` on the lowest process of each host, and returns its result on that host.

    For what fills a host's disk, such as downloads. The others wait, however long it takes. Every
    process must call.

    A host is a host name and one boot of a kernel, so two containers of one machine are two hosts;
    QLOG_HOST, where it is set, is the name instead.

    Args:
      function: returns what JSON can hold, such as a path on this host; tuples become lists.

    Raises:
      ConfigError, TrainingError, PassingError: what the first host that failed raised, on every
        process. Another exception is a PassingError on other processes.
    """
    if jax.process_count() == 1:
        return function()
    hosts = gather([{"host": _host()}])
    leaders = [hosts.index(host) for host in hosts]  # by process: the first one with its host
    mine = leaders[jax.process_index()]
    value, error = _attempt(function) if jax.process_index() == mine else (None, None)
    _wait_for(sorted(set(leaders)))
    outcomes = gather([{"value": value, "failed": _as_json(error)}])
    if error is not None:
        raise error
    for index, outcome in enumerate(outcomes):
        if outcome["failed"] is not None:
            _raise(outcome["failed"], f"process {index} failed")
    return outcomes[mine]["value"]


def processes_of_host() -> int:
    """How many processes share this host, as `once_per_host` means it. Every process must call."""
    if jax.process_count() == 1:
        return 1
    hosts = gather([{"host": _host()}])
    return hosts.count(hosts[jax.process_index()])


def broadcast(value: Any) -> Any:
    """The value of process 0 (what JSON can hold), on every process. Every process must call."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    # JAX moves arrays of one shape, so the length goes first.
    size = int(multihost_utils.broadcast_one_to_all(np.array(text.size)))
    padded = np.resize(text, size) if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())


def gather(items: list) -> list:
    """The lists of all processes, joined in the order of processes, on every process.

    Items are what JSON can hold; lists may differ in length. Every process must call.
    """
    if jax.process_count() == 1:
        return items
    text = np.frombuffer(json.dumps(items).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(text.size))
    padded = np.zeros(sizes.max(), np.uint8)  # uint8 [longest text]
    padded[: text.size] = text
    texts = multihost_utils.process_allgather(padded)
    return [
        item
        for size, text in zip(sizes, texts, strict=True)
        for item in json.loads(text[:size].tobytes())
    ]


def _attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """(value, None), or (None, the exception)."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def _as_json(error: Exception | None) -> list | None:
    """An exception for `_raise` on another process: [its index in QLOG_ERRORS or -1, its text]."""
    if error is None:
        return None
    kind = next((i for i, kind in enumerate(QLOG_ERRORS) if isinstance(error, kind)), -1)
    return [kind, str(error)]


def _raise(failed: list, who: str) -> NoReturn:
    kind, text = failed
    raise QLOG_ERRORS[kind](text) if kind >= 0 else PassingError(f"{who}: {text}")


def _host() -> str:
    """What the processes of one host, and only they, have in common."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    which = boot.read_text().strip() if boot.is_file() else ""
    return os.environ.get(HOST) or f"{platform.node()} {which}"


_turns = itertools.count()  # calls of `_wait_for`: the same number on every process


def _wait_for(processes: list[int]) -> None:
    """Returns when all of these processes have come here."""
    # Through the coordinator's keys: a collective may give up when a process comes an hour late.
    client = jax_distributed.global_state.client
    turn = f"qlog/once_per_host/{next(_turns)}"
    if client is None:  # the runtime was started by something else
        return
    if jax.process_index() in processes:
        client.key_value_set(f"{turn}/{jax.process_index()}", "done")
    for index in processes:
        while True:
            try:  # in short waits, of 2 s: between them Python's handlers of signals run
                client.blocking_key_value_get(f"{turn}/{index}", 2_000)
                break
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
