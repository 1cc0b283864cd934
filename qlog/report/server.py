"""`--serve`: the page of runs that are still writing, read anew for whoever looks."""

import http.server
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from qlog.report import page, read
from qlog.report.records import Run

_FRESH = 5.0  # seconds in which a second look does not read the runs again
_HOST = "127.0.0.1"  # only this machine: a run's texts are not for the network


class Server(http.server.ThreadingHTTPServer):
    """Answers / with the page and /data.json with what it shows; nothing else.

    Args:
      places: what `read.find` takes; new runs in them are found as they appear.
      port: 0 takes a free one.

    Attributes:
      url: where the page is.
    """

    daemon_threads = True

    def __init__(self, places: Sequence[str], port: int = 0):
        self._places, self._lock = list(places), threading.Lock()
        self._runs: list[Run] = []
        self._read_at: float | None = None
        super().__init__((_HOST, port), _Handler)
        self.url = f"http://{_HOST}:{self.server_address[1]}/"

    def runs(self) -> list[Run]:
        """The runs as they are now, or were seconds ago."""
        with self._lock:
            if self._read_at is None or time.monotonic() - self._read_at > _FRESH:
                self._runs = read.read(read.find(self._places))
                self._read_at = time.monotonic()
            return self._runs


class _Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_GET(self) -> None:
        """Answers with a page, its data, or 404."""
        answers: dict[str, tuple[str, Callable[[], str]]] = {
            "/": ("text/html", self._page),
            "/data.json": ("application/json", self._data),
        }
        # A page elsewhere may point a name of its own at this address: it must not read the runs.
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if self.path not in answers or host not in (_HOST, "localhost"):
            self.send_error(404)
            return
        kind, make = answers[self.path]
        content = make().encode()
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def _page(self) -> str:
        return page.build(self.server.runs(), "qlog: live", is_live=True)

    def _data(self) -> str:
        return page.script_json(page.data(self.server.runs(), "qlog: live", is_live=True))

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the terminal shows where the page is."""
