"""A workdir belongs to one run at a time, and every process of the run sees the same one.

workdir/owner.json is the owner's: made where there is none, rewritten with a higher count every few
seconds; at the end it says "released", with the exit "status" and the "error", if any. Whoever finds one either knows the owner to be dead (a process of this
machine that is gone) or watches whether the count rises; clocks of two hosts are never compared.

    {"owner": ..., "host", "pid", "started": when, "beat": count, "step", "phase",
     "moved": seconds since the epoch when step or phase was last told, "time": when this was written}
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

import jax

from qlog.parallel import distributed
from qlog.storage import paths
from qlog.errors import ConfigError
from qlog.errors import PassingError
from qlog.console import say

FILE = "owner.json"
_PROOF = ".proof_"
_SEEN_WITHIN = 5.0  # seconds; NFS remembers for some that a file was not there


class Claim:
    """What a run holds while it owns its workdir; on processes other than the first, nothing."""

    INTERVAL = 10.0  # seconds between beats

    def __init__(self, file: paths.Path | None, me: dict):
        self._file, self._me = file, me
        self._lost, self._ended = threading.Event(), threading.Event()
        self._is_ill = False
        if file is not None:
            self._thread = threading.Thread(target=self._keep, name="owner", daemon=True)
            self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether another run has taken the workdir over, as far as this process knows."""
        return self._lost.is_set()

    def beat(self, step: int | None = None, phase: str | None = None) -> None:
        """Tells where the run is; costs nothing, the next beat writes it."""
        told = {"step": step, "phase": phase}
        self._me |= {k: v for k, v in told.items() if v is not None} | {"moved": time.time()}

    def check(self) -> None:
        """Every process must ask.

        Raises:
          PassingError: another run has taken the workdir over: nothing may be written any more.
        """
        if distributed.any_process(self.is_lost):
            raise PassingError(
                "another run has taken this workdir over (this one was silent for too long): it goes on "
                "there, this one stops."
            )

    def release(self, error: BaseException | None = None) -> None:
        """Gives the workdir back; the file says how the run ended.

        Args:
          error: what ended it, if anything did.
        """
        if self._file is None or self._ended.is_set():
            return
        self._ended.set()
        self._thread.join(2 * self.INTERVAL)  # longer only where the store does not answer
        if not self.is_lost:
            paths.within(2 * self.INTERVAL, lambda: self._leave(error))

    def _leave(self, error: BaseException | None):
        if _look(self._file).get("owner") != self._me["owner"]:
            return
        status = 0 if error is None else getattr(error, "status", 1)
        reason = "" if error is None else str(error) or type(error).__name__
        last = {"released": True, "status": status, "error": reason, "time": time.time()}
        paths.write(self._file, json.dumps(self._me | last))

    def _keep(self):
        while not self._ended.wait(self.INTERVAL):
            try:
                self._beat()
                self._is_ill = False
            except Exception as error:  # a beat left out is no harm, and the next may do better
                if not self._is_ill:
                    say(
                        f"{self._file} cannot be written ({type(error).__name__}: {error}); trying on"
                    )
                self._is_ill = True
            if self.is_lost:
                return

    def _beat(self):
        found = _look(self._file)
        self._me |= {"beat": self._me["beat"] + 1, "time": time.time()}
        text = json.dumps(self._me)
        if not found:  # removed by somebody: ours, unless another was faster
            if (
                not paths.create(self._file, text)
                and _look(self._file).get("owner") != self._me["owner"]
            ):
                self._lost.set()
        elif found.get("owner", self._me["owner"]) != self._me["owner"]:
            self._lost.set()
        else:
            paths.write(self._file, text)


@contextlib.contextmanager
def claim(workdir: paths.Path) -> Iterator[Claim]:
    """While inside, this run owns the workdir. Every process must enter; process 0 decides.

    Raises:
      ConfigError: the workdir cannot be written, or the processes do not all see the same one.
      PassingError: another run has it.
    """
    prove_shared(workdir, "--workdir")
    me = distributed.once_per_run(lambda: _take(workdir / FILE))
    held = Claim(workdir / FILE if jax.process_index() == 0 else None, me)
    try:
        yield held
    except BaseException as error:
        held.release(error)
        raise
    held.release()


def prove_shared(folder: paths.Path, field: str = "path") -> None:
    """Every process writes in the folder, and reads there what process 0 wrote. All must ask.

    Raises:
      ConfigError: on all of them, as soon as one of them cannot.
    """
    nonce = distributed.once_per_run(lambda: _leave_proof(folder, field))
    proof = folder / f"{_PROOF}{nonce}"
    trouble = ""
    if jax.process_index():
        try:
            paths.probe(folder, field)
            trouble = "" if _sees(proof) else "unshared"
        except ConfigError as error:
            trouble = str(error)
    found = distributed.gather([{"host": socket.gethostname(), "trouble": trouble}])
    if jax.process_index() == 0:
        paths.within(20.0, lambda: paths.remove(proof))
    wrong = [f"{i} on {row['host']}" for i, row in enumerate(found) if row["trouble"] == "unshared"]
    if wrong:
        raise ConfigError(
            f"{field} = {folder} is not shared: process {', '.join(wrong)} does not see what process 0 on "
            f"{found[0]['host']} wrote there; give a folder that all hosts mount, or a bucket."
        )
    for index, row in enumerate(found):
        if row["trouble"]:
            raise ConfigError(f"{row['trouble']} (process {index} on {row['host']})")


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


def _take(file: paths.Path) -> dict:
    """Makes the file ours; what it then says."""
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
    first = _look(file)
    _refuse_living(file, first)
    if (now_there := _look(file)).get("owner") != first.get("owner"):  # another start was faster
        _refuse(file, now_there)
    paths.remove(file)
    if not paths.create(file, json.dumps(me)):
        _refuse(file, _look(file))
    if first and not first.get("released"):
        say(f"took {file.parent} over from {_name(first)}, which is gone")
    return me


def _refuse_living(file: paths.Path, first: dict) -> None:
    """PassingError while the owner lives; returns when it is dead, or has gone meanwhile."""
    if not first or first.get("released"):
        return
    if first.get("machine") == _machine():
        if _lives(first):
            _refuse(file, first)
        return
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


def _refuse(file: paths.Path, owner: dict) -> None:
    raise PassingError(
        f"{file.parent} belongs to {_name(owner)}, which still runs: wait for its end, stop it, or use "
        "another --workdir."
    )


def _name(owner: dict) -> str:
    step = "" if owner.get("step") is None else f", at step {owner['step']}"
    return (
        f"the run on {owner.get('host', 'an unknown host')}, process {owner.get('pid', '?')}, "
        f"since {owner.get('started', '?')}{step}"
    )


def _look(file: paths.Path) -> dict:
    """The owner's file; {} where there is none. One that is being written names nobody yet."""
    try:
        found = json.loads(paths.read(file))
    except FileNotFoundError:
        return {}
    except ValueError:
        return {"beat": None}
    return found if isinstance(found, dict) else {"beat": None}


# ---- Processes of this machine ----


def _self() -> dict:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "process": _process_started(pid),
    }


def _machine() -> str:
    """Where a process id means the same: this boot of this machine, in this container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _lives(owner: dict) -> bool:
    """Whether the owner's process, of this machine, is still there: not another with its id."""
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:  # there, but another user's
        pass
    return _process_started(owner["pid"]) == owner.get("process")


def _process_started(pid: int) -> str | None:
    """When a process started, in clock ticks; None where unknown, "ended" of one that only waits to
    be buried."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()
    return "ended" if state in "ZX" else fields[18]
