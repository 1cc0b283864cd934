"""A workdir belongs to one run at a time, and every process of the run sees the same workdir.

The owner's file, WORKDIR/owner.json, is made by the run that finds none, and written again every
few seconds with a higher count:

| key                    | holds                                                                   |
|------------------------|-------------------------------------------------------------------------|
| owner                  | a random name of this start of the run                                  |
| host, machine, pid,    | which process it is                                                     |
| process                |                                                                         |
| started                | when, as text for people                                                |
| beat                   | the count                                                               |
| step, phase            | where the run is                                                        |
| moved                  | when it last told its step or phase, in seconds since the epoch         |
| time                   | when the file was written, in seconds since the epoch                   |
| released, status,      | at the end only: true, the exit status, and the error as text, '' if    |
| error                  | there was none                                                          |

A run that finds such a file must know whether its owner still runs. A process of this machine can
be looked up. Of other machines only the count is watched: it rises, or it does not. The clocks of
two hosts are never compared, since they may differ by more than the beats do.
"""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

from qlog.console import say
from qlog.errors import ConfigError, PassingError
from qlog.parallel import distributed
from qlog.storage import paths

FILE = "owner.json"
_PROOF = ".proof_"
_SEEN_WITHIN = 5.0  # seconds; NFS may remember for a while that a file was not there
_Owner = dict[str, Any]  # what owner.json holds; {} where there is no file
_held: set[str] = set()  # the owners that are claims of this process now


class Claim:
    """What a run holds while it owns its workdir; a thread writes the owner's file again and again.

    Args:
      workdir: the folder that is claimed.
      is_writer: whether this process writes the owner's file; of several processes the first.
      me: what the file says by now.

    Attributes:
      workdir: as given.
    """

    INTERVAL = 10.0  # seconds between beats

    def __init__(self, workdir: paths.Path, is_writer: bool, me: _Owner):
        self.workdir = workdir
        file = workdir / FILE if is_writer else None
        # Which folder it is: one that is mounted or made in its place has another number.
        self._number = paths.number(workdir)
        self._file, self._me = file, me
        self._lost, self._ended = threading.Event(), threading.Event()
        self._is_failing = False
        _held.add(me["owner"])
        if file is not None:
            self._thread = threading.Thread(
                target=self._keep, args=(file,), name="owner", daemon=True
            )
            self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether another run has taken the workdir over, as far as this process knows."""
        return self._lost.is_set()

    def beat(self, step: int | None = None, phase: str | None = None) -> None:
        """Tells where the run is. Costs nothing: the thread writes it at its next beat."""
        told = {"step": step, "phase": phase}
        self._me |= {k: v for k, v in told.items() if v is not None} | {"moved": time.time()}

    def check(self) -> None:
        """Ends a run that has lost its workdir. Every process must call.

        Raises:
          PassingError: another run has taken the workdir over: nothing may be written any more.
        """
        if not self._is_there():
            raise PassingError(
                f"{self.workdir} is gone (moved, deleted or unmounted): put it back; the same "
                "command goes on from its newest checkpoint."
            )
        if distributed.any_process(self.is_lost):
            raise PassingError(
                "another run has taken this workdir over (this one was silent for too long): it "
                "goes on there, this one stops."
            )

    def _is_there(self) -> bool:
        """Whether the workdir is still the folder that was claimed."""
        return paths.number(self.workdir) == self._number

    def release(self, error: BaseException | None = None) -> None:
        """Gives the workdir back; the file says how the run ended.

        Args:
          error: what ended the run, if it did not come to its end.
        """
        _held.discard(self._me["owner"])
        if self._file is None or self._ended.is_set():
            return
        self._ended.set()
        # The thread ends at once, unless the store does not answer: then the process need not wait.
        self._thread.join(2 * self.INTERVAL)
        if not self.is_lost:
            file = self._file
            paths.within(2 * self.INTERVAL, lambda: self._leave(file, error))

    def _leave(self, file: paths.Path, error: BaseException | None) -> None:
        if _look(file).get("owner") != self._me["owner"]:
            return
        status = 0 if error is None else getattr(error, "status", 1)
        reason = "" if error is None else str(error) or type(error).__name__
        last = {"released": True, "status": status, "error": reason, "time": time.time()}
        paths.write(file, json.dumps(self._me | last))

    def _keep(self, file: paths.Path) -> None:
        """The thread."""
        while not self._ended.wait(self.INTERVAL):
            try:
                self._beat(file)
                self._is_failing = False
            except Exception as error:  # one beat less does no harm: others wait for two intervals
                if not self._is_failing:
                    say(f"{file} cannot be written ({type(error).__name__}: {error}); trying on")
                self._is_failing = True
            if self.is_lost:
                return

    def _beat(self, file: paths.Path) -> None:
        """Writes the file again, unless it is another run's by now."""
        if not self._is_there():  # or the file would make the folder again
            raise FileNotFoundError(f"{self.workdir} is gone")
        found = _look(file)
        self._me |= {"beat": self._me["beat"] + 1, "time": time.time()}
        text = json.dumps(self._me)
        if not found:
            # The file was removed. It is ours again, unless another run is faster.
            if not paths.create(file, text) and _look(file).get("owner") != self._me["owner"]:
                self._lost.set()
        elif found.get("owner", self._me["owner"]) != self._me["owner"]:
            self._lost.set()
        else:
            paths.write(file, text)


@contextlib.contextmanager
def claim(workdir: paths.Path) -> Iterator[Claim]:
    """While inside, this run owns the workdir. Every process must enter; process 0 decides.

    Raises:
      ConfigError: the workdir cannot be written, or the processes do not all see the same one.
      PassingError: another run has it.
    """
    # First the folder, then the owner: if it is not shared, each host could have an owner.
    prove_shared(workdir, "--workdir")
    me = distributed.once_per_run(lambda: _take(workdir / FILE))
    owned = Claim(workdir, jax.process_index() == 0, me)
    try:
        yield owned
    except BaseException as error:
        owned.release(error)
        raise
    owned.release()


def prove_shared(folder: paths.Path, field: str = "path") -> None:
    """Makes sure that every process writes in the folder and reads there what process 0 wrote.

    A path such as /tmp/run exists on each host, and is another folder on each. Every process must
    call.

    Raises:
      ConfigError: on all processes, if one of them cannot.
    """
    # Process 0 leaves a file under a new random name; the others look for it.
    nonce = distributed.once_per_run(lambda: _leave_proof(folder, field))
    proof = folder / f"{_PROOF}{nonce}"
    trouble = ""  # of this process: '', 'unshared', or what `paths.probe` says
    if jax.process_index():
        try:
            paths.probe(folder, field)
            trouble = "" if _sees(proof) else "unshared"
        except ConfigError as error:
            trouble = str(error)
    # Each tells all what it saw: so all of them raise, and none goes on into a collective.
    found = distributed.gather([{"host": socket.gethostname(), "trouble": trouble}])
    if jax.process_index() == 0:
        paths.within(20.0, lambda: paths.remove(proof))
    wrong = [f"{i} on {one['host']}" for i, one in enumerate(found) if one["trouble"] == "unshared"]
    if wrong:
        raise ConfigError(
            f"{field} = {folder} is not shared: process {', '.join(wrong)} does not see what "
            f"process 0 on {found[0]['host']} wrote there; give a folder that all hosts mount, or "
            "a bucket."
        )
    for index, one in enumerate(found):
        if one["trouble"]:
            raise ConfigError(f"{one['trouble']} (process {index} on {one['host']})")


def _leave_proof(folder: paths.Path, field: str) -> str:
    paths.probe(folder, field)
    nonce = secrets.token_hex(8)
    paths.write(folder / f"{_PROOF}{nonce}", nonce)
    return nonce


def _sees(proof: paths.Path) -> bool:
    deadline = time.monotonic() + _SEEN_WITHIN
    while not paths.exists(proof):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _take(file: paths.Path) -> _Owner:
    """Makes the file ours, or raises PassingError; returns what it then says."""
    now = time.time()
    me = {
        "owner": secrets.token_hex(8),
        **_self(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "beat": 0,
        "step": None,
        "phase": "start",
        "moved": now,
        "time": now,
    }
    if paths.create(file, json.dumps(me)):
        return me
    # There is an owner. If it is dead, several runs may find that out at the same time: each looks
    # again before it removes the file, and only one of them can create the next one.
    first = _look(file)
    _refuse_living(file, first)
    if (now_there := _look(file)).get("owner") != first.get("owner"):
        _refuse(file, now_there)
    paths.remove(file)
    if not paths.create(file, json.dumps(me)):
        _refuse(file, _look(file))
    if first and not first.get("released"):
        say(f"took {file.parent} over from {_name(first)}, which is gone")
    return me


def _refuse_living(file: paths.Path, first: _Owner) -> None:
    """Raises PassingError if the owner lives; returns if it is dead, or has gone meanwhile."""
    if not first or first.get("released"):
        return
    # On this machine the process itself can be looked up, at once.
    if _is_here(first):
        if _lives(first):
            _refuse(file, first)
        return
    # Longer than two intervals: one beat may be late, or may fail.
    wait = 2.2 * Claim.INTERVAL
    say(f"{file.parent} belongs to {_name(first)}: {wait:.0f} s to see whether it still runs")
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        time.sleep(Claim.INTERVAL / 5)
        seen = _look(file)
        if not seen:
            return
        if (seen.get("owner"), seen.get("beat")) != (first.get("owner"), first.get("beat")):
            _refuse(file, seen)


def _refuse(file: paths.Path, owner: _Owner) -> NoReturn:
    raise PassingError(
        f"{file.parent} belongs to {_name(owner)}, which still runs: wait for its end, stop it, or "
        "use another --workdir."
    )


def _name(owner: _Owner) -> str:
    step = "" if owner.get("step") is None else f", at step {owner['step']}"
    return (
        f"the run on {owner.get('host', 'an unknown host')}, process {owner.get('pid', '?')}, "
        f"since {owner.get('started', '?')}{step}"
    )


def look(workdir: paths.Path) -> dict[str, Any]:
    """What the owner of a workdir last wrote of itself; {} where none did. For who only looks."""
    return _look(workdir / FILE)


def is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine, and has ended.

    Args:
      owner: from `look`, not {}.
    """
    return _is_here(owner) and not _lives(owner)


def _look(file: paths.Path) -> _Owner:
    """What the owner's file says; {} where there is none.

    A file that is just being made (on a disk it is seen before its content) names no owner yet.
    """
    try:
        found = json.loads(paths.read(file))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        return {"beat": None}
    return found if isinstance(found, dict) else {"beat": None}


# ---- Processes of this machine ----


def _self() -> _Owner:
    """What tells this process from all others, on all machines."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "process": _process_started(pid),
    }


def _machine() -> str:
    """The name of what process ids count in: a boot of this machine, and a container on it."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _is_here(owner: _Owner) -> bool:
    """Whether the owner is a process of this machine, which can be looked up."""
    return owner.get("machine") == _machine() and type(owner.get("pid")) is int


def _lives(owner: _Owner) -> bool:
    """Whether the owner, a process of this machine, still runs."""
    try:
        os.kill(owner["pid"], 0)  # signal 0 does nothing but ask
    except (ProcessLookupError, OverflowError):  # no process has such a number, or none now
        return False
    except OSError:  # there, but another user's
        pass
    # Ids are used again: a process that started at another moment is another one.
    if _process_started(owner["pid"]) != owner.get("process"):
        return False
    # A claim of this process may have ended without a word in the file, on a full disk.
    return owner["pid"] != os.getpid() or owner.get("owner") in _held


def _process_started(pid: int) -> str | None:
    """When a process started, in clock ticks since the boot, as text.

    "ended" for a zombie (it has ended, and its parent has not asked how); None where that cannot be
    read.
    """
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field, the command's name in parentheses, may itself have spaces and parentheses.
    state, *fields = text.rpartition(")")[2].split()
    return "ended" if state in "ZX" else fields[18]
