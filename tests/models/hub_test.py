"""First use of a Hub id by two processes, of one host and of two.

The server runs on this machine. It speaks the Hub's protocol, drops one connection halfway, and has
faults when asked.
"""

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading

import pytest
from places import GOLDEN, ROOT
from safetensors.numpy import load_file

from qlog.errors import ConfigError
from qlog.models import huggingface

GOLDEN_LLAMA = GOLDEN / "llama"
COMMIT = "a" * 40
WORKER = """
import sys
import jax
from jax.sharding import NamedSharding, PartitionSpec
from qlog import models
from qlog.models import huggingface
from qlog.parallel import distributed

coordinator, process, out = sys.argv[1:]
jax.distributed.initialize(coordinator, 2, int(process))
folder = distributed.once_per_host(lambda: str(huggingface.resolve("owner/name")))
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
        if self.server.fault:
            return self.send_error(self.server.fault)
        files = {
            file.name: file.read_bytes() for file in GOLDEN_LLAMA.iterdir() if file.suffix != ".npz"
        }
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
    server.seen, server.fault = [], 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def run_workers(hub, program, tmp_path, own=({}, {}), arguments=()):
    """[(status, output)] of two processes of one program; `own`: variables of only one of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "JAX_NUM_CPU_DEVICES": "2",
        "PYTHONPATH": str(ROOT),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, coordinator, str(process), *arguments],
            env=environment | own[process],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    return [(worker.returncode, output) for worker, output in zip(workers, outputs, strict=True)]


def downloads(hub) -> list[str]:
    return sorted(name for name in hub.seen if name.endswith(".safetensors"))


def test_one_process_downloads_and_two_load_and_export(hub, tmp_path):
    for status, output in run_workers(hub, WORKER, tmp_path, arguments=[str(tmp_path / "out")]):
        assert status == 0, output
    assert downloads(hub) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",  # cut short, then
        "model-00002-of-00003.safetensors",  # again
        "model-00003-of-00003.safetensors",
    ]
    exported = load_file(tmp_path / "out" / "model.safetensors")
    original = {}
    for file in GOLDEN_LLAMA.glob("*.safetensors"):
        original |= load_file(file)
    assert exported.keys() == original.keys()
    assert all((exported[name] == original[name]).all() for name in original)


FETCH = """
import sys
import jax
from qlog.experiment import files
from qlog.errors import QLOG_ERRORS
from qlog.parallel import distributed

coordinator, process, spec = sys.argv[1:]
jax.distributed.initialize(coordinator, 2, int(process))
try:
    folder = files.resolve(spec, "config.weights", weights=True)
    assert (folder / "config.json").is_file() and list(folder.glob("*.safetensors"))
    print("folder", folder)
except QLOG_ERRORS as error:
    print(type(error).__name__, error)
"""


def hosts(tmp_path):
    """Environments of two hosts: a name and a cache of their own each."""
    return [{"QLOG_HOST": str(i), "HF_HOME": str(tmp_path / f"home{i}")} for i in range(2)]


def test_each_of_two_hosts_downloads_once_for_itself(hub, tmp_path):
    results = run_workers(hub, FETCH, tmp_path, hosts(tmp_path), ["owner/name"])
    for process, (status, output) in enumerate(results):
        assert status == 0 and f"folder {tmp_path}/home{process}" in output, output
    assert downloads(hub).count("model-00001-of-00003.safetensors") == 2


@pytest.mark.parametrize(
    "status, kind", [(503, "PassingError"), (429, "PassingError"), (404, "ConfigError")]
)
def test_a_fault_of_one_host_is_a_sentence_on_all(hub, tmp_path, status, kind):
    own = hosts(tmp_path)
    run_workers(hub, FETCH, tmp_path, [own[0], own[0]], ["owner/name"])
    seen = len(hub.seen)
    hub.fault = (
        status  # the first host has it already, and does with what it has where the Hub is down
    )
    results = run_workers(hub, FETCH, tmp_path, own, ["owner/name"])
    assert len(hub.seen) == seen
    for code, output in results:
        assert code == 0 and f"{kind} 'owner/name' is not a folder here" in output, output


def test_a_snapshot_that_was_cut_off_is_no_model_without_a_network(tmp_path, monkeypatch):
    """Before data are prepared: offline, the Hub's client takes what is there for the model."""
    snapshot = tmp_path / "models--o--n/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--o--n/refs").mkdir()
    (tmp_path / "models--o--n/refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (snapshot / "tokenizer.json").write_text("{}")
    assert huggingface.resolve("o/n", weights=False) == snapshot  # all that a tokenizer needs
    with pytest.raises(
        ConfigError, match="'o/n' is not a Hugging Face model, since .* no config.j"
    ):
        huggingface.resolve("o/n")
    for file in ("config.json", "model.safetensors.index.json"):
        (snapshot / file).write_bytes((GOLDEN / "llama" / file).read_bytes())
    with pytest.raises(ConfigError, match="lacks model-00001-of-00003.safetensors, model-00002"):
        huggingface.resolve("o/n")
    for file in (GOLDEN / "llama").glob("*.safetensors"):
        (snapshot / file.name).write_bytes(file.read_bytes())
    assert huggingface.resolve("o/n") == snapshot
