"""Signals that ask a process to end, and a watchdog for a run in which nothing happens any more.

A preempted host has seconds, and Python runs a signal's handler only between two instructions of
the main thread: not while that thread is inside the compiler, for minutes. So a thread of its own
reads the signals from a pipe. What SIGINT, SIGTERM or SIGHUP does depends on where the main thread
is:

| the main thread is                       | what happens                                          |
|------------------------------------------|-------------------------------------------------------|
| outside `deferred()`: it loads, exports  | the handler raises Stop at once, in this process      |
| inside: it trains, evaluates             | the next `check` or `beat` raises Stop, on every      |
|                                          | process of the run at the same call                   |
| inside, in the compiler; all is saved    | no call comes: the thread ends the process, after     |
|                                          | seconds, on every process at the same time            |
| outside, in code whose exceptions Python | Stop is lost there: the next `check` raises it, or    |
| drops (`__del__`, the collector's hooks) | the thread ends the process, as above                 |

Why signals are deferred: a Stop in the middle of a step, on one process, would leave the others in
a collective that never ends, and would lose the step.

A second Ctrl-C ends the process at once. All other further signals change nothing. SIGUSR1 prints
the stacks of all threads.
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
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qlog.console import discard, outlive_reader, put, time_text
from qlog.errors import PassingError, Stop
from qlog.parallel import batch_placement, distributed

_STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has none
_PATIENCE = 2.0  # seconds for the main thread to reach a call, where nothing would be lost
_PATIENCE_TOGETHER = 5.0  # the same, for all processes of a run to reach a call together
_KEY = "stop"  # of `distributed.set_key`: "SIGNAL DEADLINE", by which processes tell each other


class Interrupts:
    """The signals and the signs of life of this process; made by `listening`.

    Attributes:
      speaks: whether this process tells the user; of several processes the first.
      on_beat: called at each sign of life, so it must be cheap.
    """

    def __init__(self):
        self.speaks = True
        self.on_beat: Callable[[], None] = lambda: None
        self._tell: Callable[[str], None] = lambda doing: None  # of `telling`
        # Signals. The main thread and this object's thread both read and write these; each write is
        # one assignment, which Python does not interrupt.
        self._number = 0  # the first signal that came; 0: none
        self._deferred = 0  # how many `deferred()` blocks the main thread is in
        self._is_leaving = False  # Stop was raised: the thread need not end the process
        self._end_at: float | None = None  # wall clock; after it the thread may end the process
        self._asked_others = 0.0  # when the thread last asked the coordinator
        self._flags: dict[tuple[Mesh | None, bool], jax.Array] = {}  # of `flags`, on devices
        # What `watching` was given.
        self._is_saved: Callable[[], bool] = lambda: False
        self._at_exit: Callable[[], None] = lambda: None
        self._is_resumable = False
        # stdout and stderr, where they are a terminal. It is none any more when it is closed.
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        # The watchdog. Times are of time.monotonic(), in seconds.
        self._alive = time.monotonic()  # the last sign of life
        self._limit: float | None = None  # silence that ends the process; None: no limit
        self._first_limit: float | None = None
        self._seconds: list[float] = []  # of the last steps

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
        """While inside, signals act at once, within `deferred()` too: nothing could be lost yet."""
        before, self._deferred = self._deferred, 0
        try:
            if self._number:  # it came while signals were deferred
                self._receive(self._number, None)
            yield
        finally:
            self._deferred = before

    def check(self, doing: str = "") -> None:
        """A sign of life; Stop if a signal has reached any process. Every process must call.

        Args:
          doing: as `beat` takes it.
        """
        self.beat(distributed.any_process(self.asked), doing)

    def flags(self, mesh: Mesh | None) -> jax.Array:
        """bool [devices]: `asked` of this process on each of its devices.

        A compiled program that takes them returns whether any is set. So processes agree inside a
        program that they run anyway, without a collective for it.
        """
        asked = self.asked
        # Copied to the devices once for each of the two values: the decode loop asks often.
        if (mesh, asked) not in self._flags:
            host = np.full(mesh.size if mesh else 1, asked)
            self._flags[mesh, asked] = batch_placement.put_per_device(mesh, host)
        return self._flags[mesh, asked]

    def beat(self, any_asked: bool = False, doing: str = "") -> None:
        """A sign of life; raises Stop if `any_asked`, which must be the same on every process.

        Args:
          doing: what is under way, in words for the user, 'PHASE' or 'PHASE: how far  and more'; ''
            says nothing.
        """
        self._alive = time.monotonic()
        self.on_beat()
        if doing:
            self._tell(doing)
        if any_asked:
            self._is_leaving = True
            raise Stop(self._number or signal.SIGTERM)

    @contextlib.contextmanager
    def telling(self, tell: Callable[[str], None]) -> Iterator[None]:
        """While inside, `tell` gets what signs of life say is under way, instead of any before it.

        A step or an evaluation may take minutes: its user hears that it goes on, and how far it is.
        """
        before, self._tell = self._tell, tell
        try:
            yield
        finally:
            self._tell = before

    # ---- The watchdog ----

    @contextlib.contextmanager
    def watching(
        self,
        first_seconds: float,
        is_saved: Callable[[], bool],
        at_exit: Callable[[], None],
        is_resumable: bool = False,
    ) -> Iterator[None]:
        """While inside, a long silence (no `check` and no `beat`) ends the process with status 75.

        The process cannot raise instead: its main thread waits, in a collective for a process that
        is gone, or for a store that does not answer. Launchers restart what ends with status 75.

        Args:
          first_seconds: the longest silence, until `step_done` knows how long steps take; 0 is no
            limit.
          is_saved: whether the process may end at this moment and lose nothing.
          at_exit: called before the thread ends the process; may take a few seconds.
          is_resumable: a process that a signal ends has status 0, since the same command goes on.
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
        """While inside, the first limit holds: for saves to a slow store, programs that compile."""
        before, self._limit = self._limit, self._first_limit
        try:
            yield
        finally:
            self._alive, self._limit = time.monotonic(), before

    def step_done(self, seconds: float, steps: float, least_seconds: float) -> None:
        """Sets the limit after a step, from the third one on.

        Args:
          seconds: how long the step took.
          steps: the limit, in median steps; 0 is no limit.
          least_seconds: the limit is at least this.
        """
        # The median, since the first steps compile and some steps evaluate and save.
        self._seconds = [*self._seconds[-100:], seconds]
        if len(self._seconds) >= 3 and self._limit is not None:
            self._limit = (
                max(least_seconds, steps * statistics.median(self._seconds)) if steps else None
            )

    # ---- The thread ----

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """The handler of signals. Python calls it in the main thread, between two instructions."""
        self._number = self._number or number
        outlive_reader()
        if number == _HANGUP:
            self._leave_terminal()
        if not self._deferred and not self._is_leaving:
            self._is_leaving = True
            raise Stop(number)

    def _dropped(self, dropped: "sys.UnraisableHookArgs") -> bool:
        """Takes note of an exception that Python drops; whether it was a Stop of the handler."""
        if not isinstance(dropped.exc_value, Stop):
            return False
        # JAX has a hook of the garbage collector, so signals do come there. Stop reaches no caller.
        self._is_leaving = False
        return True

    def _run(self, wake: int) -> None:
        """The thread. `wake`: the end of the pipe from which it reads the numbers of signals."""
        ticked = time.monotonic()
        while True:
            numbers = _read(wake)
            if 0 in numbers:  # from `listening`, at its end
                return
            # Nothing that goes wrong here may end the thread: the next signal would not be heard.
            with contextlib.suppress(Exception):
                self._hear(numbers)
                self._hear_others()
                self._end_in_time()
            now = time.monotonic()
            # A loop takes a quarter of a second. Was it much longer, the whole process was stopped
            # (a laptop that slept, SIGSTOP), and its main thread could give no sign of life.
            if now - ticked > 5:
                self._alive = min(now, self._alive + now - ticked)
            ticked = now

    def _hear(self, numbers: bytes) -> None:
        """Takes note of the signals that came, and tells the other processes of the first."""
        for number in numbers:
            if number not in _STOPPING:
                continue
            self._note(number, is_first=self._end_at is None)
            if self._end_at is None:
                self._end_at = time.time() + self._patience()
                distributed.set_key(_KEY, f"{number} {self._end_at}")

    def _hear_others(self) -> None:
        """Asks the coordinator, once a second, whether a signal has reached another process.

        Not every host gets the signal (Ctrl-C at one of them), and all must end at the same time:
        the deadline that the first process chose is the one of all.
        """
        now = time.monotonic()
        if self._end_at is not None or now - self._asked_others <= 1:
            return
        self._asked_others = now
        if text := distributed.get_key(_KEY):
            number, end_at = text.split()
            self._end_at = float(end_at)
            self._note(int(number), is_first=True)

    def _end_in_time(self) -> None:
        """Ends the process where the main thread cannot: after a signal or a long silence."""
        is_late = self._end_at is not None and time.time() > self._end_at
        # Where something would be lost (a step not saved), the main thread takes the time it needs.
        if is_late and not self._is_leaving and (not self._deferred or self._is_saved()):
            self._say(
                "ended; nothing that was done is lost: the same command goes on"
                if self._is_resumable
                else "ended"
            )
            self._exit(0 if self._is_resumable else 128 + self._number)
        silence = time.monotonic() - self._alive
        if self._limit is not None and silence > self._limit:
            self._stalled(silence)

    def _patience(self) -> float:
        """Seconds from a signal until the thread may end the process."""
        return _PATIENCE_TOGETHER if jax.distributed.is_initialized() else _PATIENCE

    def _note(self, number: int, is_first: bool) -> None:
        """Remembers a signal and tells the user; a second SIGINT ends the process."""
        self._number = self._number or number
        outlive_reader()  # here, too: the main thread may be in the compiler
        if number == _HANGUP:
            self._leave_terminal()
        if is_first:
            again = "; Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            self._say(
                f"{signal.Signals(number).name}: {'saving' if self._deferred else 'ending'}{again}"
            )
        elif number == signal.SIGINT:
            self._exit(130)

    def _leave_terminal(self) -> None:
        for number in self._terminals:
            discard(number)

    def _say(self, text: str) -> None:
        if self.speaks:
            # Ctrl-C also ends the reader of `python ... | tee`: then no reader is left.
            with contextlib.suppress(OSError, ValueError):
                put(text)

    def _stalled(self, seconds: float) -> None:
        """Shows where each thread is, to find the cause, and ends the process."""
        print(
            f"qlog: nothing has happened for {time_text(seconds)}; the stacks of all threads "
            f"follow, then this process ends with status {PassingError.status}",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        self._exit(PassingError.status)

    def _exit(self, status: int) -> None:
        """Ends the process from this thread, as sys.exit cannot."""

        def clean() -> None:
            with contextlib.suppress(Exception):
                self._at_exit()

        # In a thread: the store that it writes to may be what does not answer.
        helper = threading.Thread(target=clean, daemon=True)
        helper.start()
        helper.join(timeout=5)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


_current: Interrupts | None = None  # a process has one set of signals, so one object for them


@contextlib.contextmanager
def listening() -> Iterator[Interrupts]:
    """The Interrupts of this process; blocks within the first one get the same object.

    When the first block ends, signals are handled as before it. Only Python's main thread can set
    handlers, so from another thread no signal is seen.
    """
    global _current
    if _current is not None:
        yield _current
        return
    _current = interrupts = Interrupts()
    # sys.__stderr__: it has a file descriptor, also where a notebook or a test replaced sys.stderr.
    if not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, sys.__stderr__, all_threads=True)
    # Python's C handler writes each signal's number into the pipe at once, whatever the main thread
    # does. It must not block when the pipe is full: it interrupts any instruction.
    read, write = os.pipe()
    os.set_blocking(write, False)
    previous: dict[int, Any] = {}  # the handlers before
    wakeup = None  # the descriptor before; -1: none
    show_dropped = sys.unraisablehook

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if not interrupts._dropped(dropped):
            show_dropped(dropped)

    sys.unraisablehook = hook
    try:
        if threading.current_thread() is threading.main_thread():
            wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            for number in _STOPPING:
                # Under nohup a terminal that closes is to change nothing.
                if number == _HANGUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
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
        sys.unraisablehook = show_dropped
        os.write(write, b"\0")
        thread.join()
        os.close(read)
        os.close(write)
        _current = None


def _read(wake: int) -> bytes:
    """The numbers of the signals that came within a quarter of a second, one byte each."""
    ready, _, _ = select.select([wake], [], [], 0.25)
    return os.read(wake, 64) if ready else b""
