"""First use of a Hub id by two processes, against a server on this machine that speaks the Hub's
protocol and drops one connection halfway."""

import hashlib
import http.server
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading

import pytest
from safetensors.numpy import load_file

GOLDEN = pathlib.Path(__file__).parent / "golden" / "llama"
COMMIT = "a" * 40
WORKER = """
import sys
import jax
from jax.sharding import NamedSharding, PartitionSpec
from qlog import models
from qlog.models import huggingface

coordinator, process, out = sys.argv[1:]
jax.distributed.initialize(coordinator, 2, int(process))
folder = huggingface.resolve("owner/name")
config = huggingface.read_config(folder)
mesh = jax.make_mesh((4,), ("fsdp",))
kernels = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
whole = NamedSharding(mesh, PartitionSpec())
shardings = jax.tree.map_with_path(
    lambda path, _: kernels if path[-1].key == "kernel" else whole, models.shapes(config)
)
params = huggingface.load(folder, config, dtype="bfloat16", shardings=shardings)
assert not params["layers"]["q_proj"]["kernel"].is_fully_addressable
huggingface.export(params, config, out)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The four requests that huggingface_hub makes; `server.seen` lists the files it sent."""

    def do_GET(self):
        files = {file.name: file.read_bytes() for file in GOLDEN.iterdir() if file.suffix != ".npz"}
        if "/revision/" in self.path:
            siblings = [{"rfilename": name} for name in files]
            info = {"id": "owner/name", "sha": COMMIT, "siblings": siblings}
            self.answer(json.dumps(info).encode())
        elif "/tree/" in self.path:
            tree = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in files.items()]
            self.answer(json.dumps(tree).encode())
        elif "/resolve/" in self.path:
            self.answer(files[self.path.split("/")[-1]])
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, body):
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        name = self.path.split("/")[-1]
        first_time = name not in self.server.seen
        self.server.seen.append(name)
        cut = first_time and name == "model-00002-of-00003.safetensors"
        self.wfile.write(body[start : len(body) // 2] if cut else body[start:])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_process_0_downloads_and_two_processes_load_and_export(hub, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "JAX_NUM_CPU_DEVICES": "2",
        "PYTHONPATH": str(GOLDEN.parents[2]),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, coordinator, str(process), str(tmp_path / "out")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    for worker in workers:
        output, _ = worker.communicate(timeout=120)
        assert worker.returncode == 0, output
    downloads = [name for name in hub.seen if name.endswith(".safetensors")]
    assert sorted(downloads) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",  # cut short, then
        "model-00002-of-00003.safetensors",  # again
        "model-00003-of-00003.safetensors",
    ]
    exported = load_file(tmp_path / "out" / "model.safetensors")
    original = {}
    for file in GOLDEN.glob("*.safetensors"):
        original |= load_file(file)
    assert exported.keys() == original.keys()
    assert all((exported[name] == original[name]).all() for name in original)
