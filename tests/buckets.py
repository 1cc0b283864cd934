"""Object stores on loopback, and a proxy that disturbs what passes between store and client."""

import contextlib
import re
import socket
import threading
import time
from http import HTTPStatus

BUCKET, FORBIDDEN = "bucket", "forbidden"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Proxy:
    """Passes requests on, one per connection. On demand the next ones meet a fault.

    Attributes:
      url: where clients find it.
      spoiled: first lines of the requests that met a fault.
    """

    def __init__(self, port: int):
        self._upstream, self._faults, self._lock = port, [], threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.spoiled = []
        threading.Thread(target=self._accept, daemon=True).start()

    def spoil(self, kind: str, times: int = 1, where: str = "", seconds: float = 5.0) -> None:
        """Some of the next requests meet a fault.

        Args:
          times: how many.
          where: a regular expression; only requests whose first line matches it count.
          kind: 503; cut: the connection ends before an answer; lost: it ends after the server has
            done what was asked; silence: nothing for `seconds`, then the answer.
        """
        with self._lock:
            self._faults.append([kind, times, re.compile(where), seconds])

    def heal(self) -> None:
        """No more faults."""
        with self._lock:
            self._faults.clear()

    def close(self) -> None:
        self._socket.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _fault(self, line: str):
        with self._lock:
            for fault in self._faults:
                if fault[1] > 0 and fault[2].search(line):
                    fault[1] -= 1
                    self.spoiled.append(line)
                    return fault[0], fault[3]
        if re.search(rf"/{FORBIDDEN}(/|\?|\s)", line):
            return "403", 0.0
        return "", 0.0

    def _serve(self, client: socket.socket):
        with contextlib.suppress(OSError), client:
            head = b""
            while b"\r\n\r\n" not in head:
                part = client.recv(65536)
                if not part:
                    return
                head += part
            head, _, body = head.partition(b"\r\n\r\n")
            kind, seconds = self._fault(head.split(b"\r\n")[0].decode())
            if kind == "cut":
                return
            if kind in ("503", "403"):
                self._refuse(client, head, body, int(kind))
                return
            if kind == "silence":
                time.sleep(seconds)
            lines = [
                line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")
            ]
            with socket.create_connection(("127.0.0.1", self._upstream)) as server:
                server.sendall(b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body)
                threading.Thread(target=_pump, args=(client, server), daemon=True).start()
                if kind == "lost":
                    if b"100-continue" in head.lower():
                        client.sendall(_CONTINUE)
                    _receive(server)
                else:
                    _pump(server, client)
                client.shutdown(socket.SHUT_RDWR)  # or the thread that still reads keeps it open

    @staticmethod
    def _refuse(client, head, body, status):
        """Refuses in the words of the store; reads the request first, or the client sees a cut."""
        length = re.search(rb"content-length: *(\d+)", head.lower())
        missing = (int(length[1]) if length else 0) - len(body)
        if b"100-continue" in head.lower() and missing > 0:
            client.sendall(_CONTINUE)
        while missing > 0:
            missing -= len(client.recv(65536)) or missing
        code = {503: "ServiceUnavailable", 403: "AccessDenied"}[status]
        text = f'{{"error": {{"code": {status}, "message": "{code}"}}}}'
        if b"aws" in head.lower():
            text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
        phrase = HTTPStatus(status).phrase
        head_lines = (
            f"HTTP/1.1 {status} {phrase}",
            f"Content-Length: {len(text)}",
            "Connection: close",
        )
        client.sendall("\r\n".join([*head_lines, "", text]).encode())


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(65536):
            target.sendall(part)


def _receive(source: socket.socket) -> None:
    while source.recv(65536):
        pass


@contextlib.contextmanager
def google():
    """A store as Google's; yields (proxy, environment of its clients: gcsfs and TensorStore)."""
    from gcp_storage_emulator import server

    _refuse_to_create_twice(server)
    emulator = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    emulator.start()
    proxy = Proxy(emulator._api._httpd.server_address[1])
    try:
        yield (
            proxy,
            {
                "STORAGE_EMULATOR_HOST": proxy.url,
                "TENSORSTORE_GCS_HTTP_URL": proxy.url,
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google itself, by gRPC
            },
        )
    finally:
        proxy.close()
        emulator.stop()


def _refuse_to_create_twice(server) -> None:
    """ifGenerationMatch=0, which this emulator does not read: 412 where the object exists."""
    for pattern, handlers in server.HANDLERS:
        insert = handlers.get(server.POST)
        if insert is server.objects.insert and "/upload/" in pattern:

            def guarded(request, response, storage, insert=insert):
                if request.query.get("ifGenerationMatch") == ["0"]:
                    name = request.query.get("name") or [request.data["meta"]["name"]]
                    try:
                        storage.get_file_obj(request.params["bucket_name"], name[0])
                    except server.objects.NotFound:
                        pass
                    else:
                        response.status = HTTPStatus.PRECONDITION_FAILED
                        return None
                return insert(request, response, storage)

            handlers[server.POST] = guarded


@contextlib.contextmanager
def amazon():
    """A store as S3; yields (proxy, environment of its clients)."""
    import boto3
    from moto.server import ThreadedMotoServer

    emulator = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    emulator.start()
    port = emulator._server.server_port
    keys = {
        "aws_access_key_id": "key",
        "aws_secret_access_key": "secret",
        "region_name": "us-east-1",
    }
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys).create_bucket(Bucket=BUCKET)
    proxy = Proxy(port)
    try:
        yield (
            proxy,
            {
                "AWS_ENDPOINT_URL": proxy.url,
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_REGION": "us-east-1",
                "AWS_DEFAULT_REGION": "us-east-1",
            },
        )
    finally:
        proxy.close()
        emulator.stop()
