"""Signals that ask a process to end, and a watchdog for when nothing happens any more.

A preempted host has seconds. So a thread reads the signals: it hears of them while the main thread
is inside the compiler, too. What follows depends on where the main thread is:

| the main thread is                              | SIGINT or SIGTERM                             |
|-------------------------------------------------|-----------------------------------------------|
| outside `deferred()`: loading, exporting        | raises Stop where it stands, in this process  |
| inside: training, evaluating                    | `check` or `beat` raises Stop at their next   |
|                                                 | call, on every process of the run at the same |
| inside, all saved, and no call comes: compiling | all processes end after some seconds          |

A process tells the others through the coordinator, once a second, so that they end together.

Further signals change nothing, but for a second Ctrl-C: it ends the process at once.
SIGUSR1 prints the stacks of all threads.
"""

import contextlib
import faulthandler
import os
import select
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from qlog.errors import PassingError, Stop
from qlog.parallel import distributed, sharding

_STOPPING = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 2.0  # seconds for the main thread to reach a call, where there is nothing to lose
_PATIENCE_TOGETHER = 5.0  # ... for all processes to reach it together
_WORD = "stop"  # under which a process tells the others


class Interrupts:
    """This process's signals and signs of life; made by `listening`.

    Attributes:
      speaks: whether this process tells the user; of several, the first.
      on_beat: called at each sign of life; cheap.
    """

    def __init__(self):
        self.speaks = True
        self._number = 0  # of the first signal
        self._deferred = 0
        self._is_leaving = False  # the main thread has taken note
        self._flags: dict[tuple[Mesh | None, bool], jax.Array] = {}
        self._is_saved: Callable[[], bool] = lambda: False
        self._at_exit: Callable[[], None] = lambda: None
        self._is_resumable = False
        self._asked_others = 0.0
        self.on_beat: Callable[[], None] = lambda: None
        self._alive = time.monotonic()
        self._limit: float | None = None
        self._first_limit: float | None = None
        self._seconds: list[float] = []

    # ---- Signals ----

    @property
    def asked(self) -> bool:
        """Whether a signal has reached this process."""
        return bool(self._number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """While inside, a signal only sets `asked`; it is `check` and `beat` that raise."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """While inside `deferred()`, as if outside: nothing has been done yet that could be lost."""
        before, self._deferred = self._deferred, 0
        try:
            if self._number:
                self._receive(self._number, None)
            yield
        finally:
            self._deferred = before

    def check(self) -> None:
        """A sign of life; raises Stop if a signal has reached any process. Every process must call."""
        self.beat(distributed.any_process(self.asked))

    def flags(self, mesh: Mesh | None) -> jax.Array:
        """bool [devices]: this process's `asked`, for a compiled program to tell whether any is set.

        So processes agree inside a program that they run anyway, at no cost of its own.
        """
        asked = self.asked
        if (mesh, asked) not in self._flags:
            host = np.full(mesh.size if mesh else 1, asked)
            self._flags[mesh, asked] = sharding.put_per_device(mesh, host)
        return self._flags[mesh, asked]

    def beat(self, any_asked: bool = False) -> None:
        """A sign of life; raises Stop where `any_asked`, which has to be the same on every process."""
        self._alive = time.monotonic()
        self.on_beat()
        if any_asked:
            self._is_leaving = True
            raise Stop(self._number or signal.SIGTERM)

    # ---- The watchdog ----

    @contextlib.contextmanager
    def watching(
        self,
        first_seconds: float,
        is_saved: Callable[[], bool],
        at_exit: Callable[[], None],
        is_resumable: bool = False,
    ) -> Iterator[None]:
        """While inside, too long a time without a sign of life ends the process with status 75.

        Args:
          first_seconds: how long that is until `step_done` knows better; 0 is no limit.
          is_saved: whether the process may end at any point without losing anything.
          at_exit: called before the thread ends the process; may take a few seconds.
          is_resumable: a process that a signal ends has status 0: the same command goes on.
        """
        self._alive, self._seconds = time.monotonic(), []
        self._limit = self._first_limit = first_seconds or None
        self._is_saved, self._at_exit, self._is_resumable = is_saved, at_exit, is_resumable
        try:
            yield
        finally:
            self._limit, self._is_resumable = None, False
            self.on_beat = lambda: None
            self._is_saved, self._at_exit = lambda: False, lambda: None

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """While inside, the limit is the first one: saving to a slow store, programs that compile."""
        before, self._limit = self._limit, self._first_limit
        try:
            yield
        finally:
            self._alive, self._limit = time.monotonic(), before

    def step_done(self, seconds: float, steps: float, least_seconds: float) -> None:
        """After a step: from the third on the limit is `steps` median steps, 0 for no limit."""
        self._seconds = [*self._seconds[-100:], seconds]
        if len(self._seconds) >= 3 and self._limit is not None:
            self._limit = (
                max(least_seconds, steps * statistics.median(self._seconds)) if steps else None
            )

    # ---- The thread ----

    def _receive(self, number: int, frame) -> None:
        """Python's handler: in the main thread, between two of its instructions."""
        self._number = self._number or number
        if not self._deferred and not self._is_leaving:
            self._is_leaving = True
            raise Stop(number)

    def _run(self, wake: int) -> None:
        """The thread. Nothing that goes wrong here may end it: the process would be deaf."""
        heard: list[float] = []
        ticked = time.monotonic()
        while True:
            numbers = _read(wake)
            if 0 in numbers:
                return
            with contextlib.suppress(Exception):
                self._look(numbers, heard)
            now = time.monotonic()
            if now - ticked > 5:  # the whole process slept: that is no standstill of the run
                self._alive = min(now, self._alive + now - ticked)
            ticked = now

    def _look(self, numbers: bytes, heard: list[float]) -> None:
        """heard: when to end at the latest, by the wall clock; empty until a signal comes."""
        for number in numbers:
            if number in _STOPPING:
                self._note(number, is_first=not heard)
                if not heard:
                    heard.append(time.time() + self._patience())
                    distributed.set_key(_WORD, f"{number} {heard[0]}")
        now = time.monotonic()
        if not heard and now - self._asked_others > 1:
            self._asked_others = now
            if word := distributed.get_key(_WORD):
                number, until = word.split()
                heard.append(float(until))
                self._note(int(number), is_first=True)
        if heard and not self._is_leaving and time.time() > heard[0]:
            if not self._deferred or self._is_saved():
                self._say("ended; nothing that was done is lost" if self._is_resumable else "ended")
                self._exit(0 if self._is_resumable else 128 + self._number)
        if self._limit is not None and now - self._alive > self._limit:
            self._stalled(now - self._alive)

    def _patience(self) -> float:
        return _PATIENCE_TOGETHER if jax.distributed.is_initialized() else _PATIENCE

    def _note(self, number: int, is_first: bool) -> None:
        self._number = self._number or number
        if is_first:
            again = "; Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            self._say(
                f"{signal.Signals(number).name}: {'saving' if self._deferred else 'ending'}{again}"
            )
        elif number == signal.SIGINT:
            self._exit(130)

    def _say(self, text: str) -> None:
        if self.speaks:
            with contextlib.suppress(
                OSError, ValueError
            ):  # nobody reads any more: python ... | tee
                print(f"\r\x1b[2K{text}" if sys.stdout.isatty() else text, flush=True)

    def _stalled(self, seconds: float) -> None:
        print(
            f"qlog: nothing has happened for {seconds:,.0f} s; the stacks of all threads follow, then this "
            f"process ends with status {PassingError.status}",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        self._exit(PassingError.status)

    def _exit(self, status: int) -> None:
        def clean():
            with contextlib.suppress(Exception):
                self._at_exit()

        helper = threading.Thread(target=clean, daemon=True)
        helper.start()
        helper.join(timeout=5)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


_current: Interrupts | None = None


@contextlib.contextmanager
def listening() -> Iterator[Interrupts]:
    """This process's Interrupts, from its first entering on; signals are as before afterwards.

    Outside of the main thread signals are somebody else's business: then none is seen.
    """
    global _current
    if _current is not None:
        yield _current
        return
    _current = interrupts = Interrupts()
    if not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, sys.__stderr__, all_threads=True)
    read, write = os.pipe()
    os.set_blocking(write, False)
    previous, wakeup = {}, None
    try:
        if threading.current_thread() is threading.main_thread():
            wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            for number in _STOPPING:
                previous[number] = signal.signal(number, interrupts._receive)
        thread = threading.Thread(
            target=interrupts._run, args=(read,), daemon=True, name="interrupts"
        )
        thread.start()
        yield interrupts
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: set outside Python
        if wakeup is not None:
            signal.set_wakeup_fd(wakeup)
        os.write(write, b"\0")
        thread.join()
        os.close(read)
        os.close(write)
        _current = None


def _read(wake: int) -> bytes:
    """The signals that came within a quarter of a second."""
    ready, _, _ = select.select([wake], [], [], 0.25)
    return os.read(wake, 64) if ready else b""
