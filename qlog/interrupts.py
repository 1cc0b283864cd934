"""Signals that ask a process to end, and a watchdog for when nothing happens any more.

A preempted host has seconds. So a thread reads the signals: it hears of them while the main thread
is inside the compiler, too. What follows depends on where the main thread is:

| the main thread is                              | SIGINT or SIGTERM                             |
|-------------------------------------------------|-----------------------------------------------|
| outside `deferred()`: loading, exporting        | raises Stop where it stands                   |
| inside: training                                | `check` or `beat` raises Stop at their next   |
|                                                 | call, on every process of the run at the same |
| inside, all saved, and no call comes: compiling | the process ends at once with status 0        |

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

from qlog import distributed, sharding
from qlog.errors import PassingError, Stop

_STOPPING = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 2.0  # seconds for the main thread to reach a call, where there is nothing to lose
_PATIENCE_TOGETHER = 5.0  # ... for all processes to reach it together


class Interrupts:
    """This process's signals and signs of life; made by `listening`.

    Attributes:
      speaks: whether this process tells the user; of several, the first.
    """

    def __init__(self):
        self.speaks = True
        self._number = 0  # of the first signal
        self._deferred = 0
        self._is_leaving = False  # the main thread has taken note
        self._flags: dict[tuple[Mesh | None, bool], jax.Array] = {}
        self._is_saved: Callable[[], bool] = lambda: True
        self._at_exit: Callable[[], None] = lambda: None
        self._alive = time.monotonic()
        self._limit: float | None = None
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

    def check(self) -> None:
        """A sign of life; raises Stop if a signal has reached any process. Every process must call."""
        self.beat(distributed.agree(self.asked))

    def flags(self, mesh: Mesh | None) -> jax.Array:
        """bool [devices]: this process's `asked`, for a compiled program to tell whether any is set.

        So processes agree inside a program that they run anyway, at no cost of its own.
        """
        asked = self.asked
        if (mesh, asked) not in self._flags:
            host = np.full(mesh.size if mesh else 1, asked)
            self._flags[mesh, asked] = sharding.put_own(mesh, host)
        return self._flags[mesh, asked]

    def beat(self, any_asked: bool = False) -> None:
        """A sign of life; raises Stop where `any_asked`, which has to be the same on every process."""
        self._alive = time.monotonic()
        if any_asked:
            self._is_leaving = True
            raise Stop(self._number or signal.SIGTERM)

    # ---- The watchdog ----

    @contextlib.contextmanager
    def watching(
        self, first_seconds: float, is_saved: Callable[[], bool], at_exit: Callable[[], None]
    ) -> Iterator[None]:
        """While inside, too long a time without a sign of life ends the process with status 75.

        Args:
          first_seconds: how long that is until `step_done` knows better; 0 is no limit.
          is_saved: whether the process may end at any point without losing anything.
          at_exit: called before the thread ends the process; may take a few seconds.
        """
        self._alive, self._limit, self._seconds = time.monotonic(), first_seconds or None, []
        self._is_saved, self._at_exit = is_saved, at_exit
        try:
            yield
        finally:
            self._limit, self._is_saved, self._at_exit = None, lambda: True, lambda: None

    def step_done(self, seconds: float, steps: float, least_seconds: float) -> None:
        """After a step: from the third on the limit is `steps` median steps, 0 for no limit."""
        self._seconds = [*self._seconds[-100:], seconds]
        if len(self._seconds) >= 3 and self._limit is not None:
            self._limit = max(least_seconds, steps * statistics.median(self._seconds)) if steps else None

    # ---- The thread ----

    def _receive(self, number: int, frame) -> None:
        """Python's handler: in the main thread, between two of its instructions."""
        if not self._deferred and not self._is_leaving:
            self._is_leaving = True
            raise Stop(number)

    def _note(self, number: int) -> None:
        if not self._number:
            self._number = number
            name = signal.Signals(number).name
            again = "; Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            self._say(f"{name}: {'saving' if self._deferred else 'ending'}{again}")
        elif number == signal.SIGINT:
            self._exit(130)

    def _run(self, wake: int) -> None:
        asked_at, ticked = None, time.monotonic()
        while True:
            for number in _read(wake):
                if number == 0:
                    return
                if signal.Signals(number) in _STOPPING:
                    asked_at = asked_at or time.monotonic()
                    self._note(number)
            now = time.monotonic()
            if now - ticked > 5:  # the whole process slept: that is no standstill of the run
                self._alive += now - ticked
            ticked = now
            patience = _PATIENCE_TOGETHER if jax.distributed.is_initialized() else _PATIENCE
            stuck = asked_at and not self._is_leaving and now - asked_at > patience
            if stuck and (self._is_saved() or not self._deferred):
                self._say("ended; everything that was done is saved" if self._deferred else "ended")
                self._exit(0 if self._deferred else 128 + self._number)
            if self._limit is not None and now - self._alive > self._limit:
                self._stalled(now - self._alive)

    def _say(self, text: str) -> None:
        if self.speaks:
            print(f"\r\x1b[2K{text}" if sys.stdout.isatty() else text, flush=True)

    def _stalled(self, seconds: float) -> None:
        print(
            f"qlog: nothing has happened for {seconds:,.0f} s; the stacks of all threads follow, then this "
            f"process ends with status {PassingError.status}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        self._exit(PassingError.status)

    def _exit(self, status: int) -> None:
        def clean():
            with contextlib.suppress(Exception):
                self._at_exit()

        helper = threading.Thread(target=clean, daemon=True)
        helper.start()
        helper.join(timeout=5)
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
        thread = threading.Thread(target=interrupts._run, args=(read,), daemon=True, name="interrupts")
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
