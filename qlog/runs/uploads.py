"""Uploads of a log to a bucket, from a thread, so that a run never waits for the network."""

import pathlib
import tempfile
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from qlog.console import say
from qlog.storage import paths


class _Followed(NamedTuple):
    """A local folder whose files are uploaded whenever they have grown."""

    folder: pathlib.Path
    target: paths.Path  # the folder in the bucket
    flush: Callable[[], None]  # makes the writer of the files write what it holds back


class Uploads:
    """Keeps objects in a bucket equal to lists of lines that their writer appends to.

    What cannot be uploaded is kept and tried again: a run does not end because of its log.

    Args:
      is_lost: whether another run has taken the workdir. Its objects have the same names, so from
        then on nothing is uploaded.
    """

    INTERVAL = 60.0  # seconds between uploads in the background
    PATIENCE = 60.0  # seconds that `flush` waits

    def __init__(self, is_lost: Callable[[], bool]):
        self._is_lost = is_lost
        self._lock = threading.Condition()  # guards what both threads write
        self._new: dict[paths.Path, list[str]] = {}  # object: all its lines; not yet uploaded
        self._followed: _Followed | None = None
        self._sizes: dict[pathlib.Path, int] = {}  # of followed files, as uploaded last
        self._num_asked = 0  # flushes that were asked for
        self._num_done = 0  # how many of them are done
        self._is_failing = self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def put(self, path: paths.Path, lines: list[str]) -> None:
        """`lines` is the content of an object, now and after whatever is appended to it."""
        with self._lock:
            self._new[path] = lines

    def follow(self, folder: pathlib.Path, target: paths.Path, flush: Callable[[], None]) -> None:
        """Uploads the files of a local folder, too, whenever they have grown.

        Args:
          target: the folder in the bucket.
          flush: called before the files are read.
        """
        self._followed = _Followed(folder, target, flush)

    def flush(self) -> bool:
        """Uploads all there is. Waits for it, but not for long; returns whether it was done."""
        # Flushes are counted, so that each caller waits for an upload that began after its call.
        with self._lock:
            self._num_asked += 1
            wanted = self._num_asked
            self._lock.notify_all()
            return self._lock.wait_for(lambda: self._num_done >= wanted, self.PATIENCE)

    def close(self) -> None:
        """Uploads all there is, and ends. What the bucket still refuses goes to a local folder."""
        done = self.flush()
        with self._lock:
            self._is_closed = True
            self._lock.notify_all()
        if done:
            self._thread.join()
            return
        # The thread may be inside a request without an answer, so it is not waited for.
        with self._lock:
            left = {path: "".join(lines) for path, lines in self._new.items()}
        if left:
            kept = pathlib.Path(tempfile.mkdtemp(prefix="qlog_unsent_"))
            for path, text in left.items():
                (kept / f"{path.parent.name}_{path.name}").write_text(text, encoding="utf-8")
            say(f"{', '.join(map(str, left))} could not be uploaded: kept in {kept}")

    def _work(self) -> None:
        """The thread."""
        while True:
            with self._lock:
                self._lock.wait_for(
                    lambda: self._num_asked > self._num_done or self._is_closed, self.INTERVAL
                )
                # Noted before the upload: a flush asked for during it may have newer lines to send.
                wanted = self._num_asked
                if self._is_closed and wanted == self._num_done:
                    return
            try:
                self._upload()
            except Exception as error:  # each client has kinds of its own
                if not self._is_failing:  # said once, not each second
                    say(
                        f"uploading fails ({type(error).__name__}: {error}); "
                        "what was logged is kept, trying on"
                    )
                self._is_failing = True
                if self._is_closed:
                    return
                time.sleep(1.0)
                continue
            if self._is_failing:
                say("uploading works again")
            self._is_failing = False
            with self._lock:
                self._num_done = wanted
                self._lock.notify_all()

    def _upload(self) -> None:
        # The lock is held only to look: the run must be able to log during an upload. So lines may
        # come meanwhile; an object is done with only if its list has not grown since.
        with self._lock:
            new = {path: (lines, len(lines)) for path, lines in self._new.items()}
        for path, (lines, length) in new.items():
            if self._is_lost():
                return
            paths.write(path, "".join(lines[:length]))
            with self._lock:
                if len(lines) == length and self._new.get(path) is lines:
                    del self._new[path]
        # TensorBoard's file only grows, so a new size is a new content.
        if self._followed and not self._is_lost():
            self._followed.flush()
            for file in self._followed.folder.iterdir():
                data = file.read_bytes()
                if len(data) != self._sizes.get(file):
                    paths.write(self._followed.target / file.name, data)
                    self._sizes[file] = len(data)
