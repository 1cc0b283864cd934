"""Weights & Biases, the real package offline: what it holds is what metrics.jsonl holds."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

import buckets
import jax
import pytest
import tiny
import wandb
from places import ROOT
from wandb.proto import wandb_internal_pb2

from qlog.config import check_config, schema
from qlog.errors import ConfigError
from qlog.runs import trackers
from qlog.runs.log import RunLog, read_jsonl
from qlog.storage import paths

ONE = jax.devices()[:1]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    wandb.teardown()  # its settings are those of the process, read once


def config(**changes):
    return schema.merge(tiny.config(logging={"wandb": "team/demo"}), changes)


def records(file):
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB."""
    data, position, whole, found = file.read_bytes(), 7, b"", []
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:  # too short for a header: padding
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def offline_runs(workdir):
    """{its file: its records} of every start of a run, in their order."""
    wandb.teardown()  # its own process writes what it still has, and ends
    files = sorted(workdir.glob("wandb/offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime_ns)
    return {file: records(file) for file in files}


def history(of):
    """The rows that were logged, as dictionaries."""
    rows = []
    for record in of:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def lines(rows, phase):
    """Rows of one phase as lines of metrics.jsonl."""
    return [
        {k.removeprefix(f"{phase}/"): v for k, v in row.items() if not k.startswith("_")}
        for row in rows
        if f"{phase}/step" in row
    ]


def test_a_training_leaves_an_offline_run_that_equals_its_log(tmp_path, capfd):
    workdir = tmp_path / "cold,garl"
    run = config(evaluation={"every": 2}, train={"rollouts_every": 2, "rollouts_prompts": 1})
    tiny.run(run, workdir, ONE)
    ((file, of),) = offline_runs(workdir).items()
    rows, written = history(of), read_jsonl(workdir / "metrics.jsonl")
    for phase, steps in (("train", [0, 1, 2]), ("validation", [1, 2])):
        want = [
            {k: v for k, v in line.items() if k != "phase"}
            for line in written
            if line["phase"] == phase
        ]
        assert lines(rows, phase) == want and [line["step"] for line in want] == steps

    # Each phase has its own axis.
    metrics = {r.metric.name or r.metric.glob_name: r.metric for r in of if r.HasField("metric")}
    for phase in ("train", "validation", "rollouts"):
        assert metrics[f"{phase}/*"].step_metric == f"{phase}/step"

    # The config, the names, the ending.
    (began,) = [r.run for r in of if r.HasField("run")]
    held = {i.key: json.loads(i.value_json) for i in began.config.update}
    resolved = json.loads((workdir / "config.json").read_text())
    assert {key: held[key] for key in resolved} == resolved and held["workdir"] == str(workdir)
    assert (began.entity, began.project) == ("team", "demo")
    assert began.display_name == "cold,garl" and list(began.tags) == ["multihop", "garl"]
    assert json.loads((workdir / "wandb.json").read_text())["id"] == began.run_id
    assert [r.exit.exit_code for r in of if r.HasField("exit")] == [0]

    # The table is rollouts.jsonl.
    tables = [row for row in rows if "rollouts/table/path" in row]
    assert [row["rollouts/step"] for row in tables] == [0, 2]
    got = []
    for row in tables:
        table = json.loads((file.parent / "files" / row["rollouts/table/path"]).read_text())
        for cells in table["data"]:
            line = dict(zip(table["columns"], cells, strict=True))
            got.append({"step": row["rollouts/step"], **line})
    assert got == read_jsonl(workdir / "rollouts.jsonl")
    assert {"prompt", "rationale", "answer", "gold", "reward", "log_w"} <= set(got[0])

    # On the console one line of ours.
    said = capfd.readouterr()
    assert [line for line in said.out.splitlines() if "W&B" in line] == [
        f"W&B: offline, in {file.parent}: `wandb sync {file.parent}` uploads it"
    ]
    assert "wandb:" not in said.out + said.err


def test_a_resumed_run_continues_and_sends_no_step_twice(tmp_path):
    tiny.run(config(train={"steps": 2}), tmp_path, ONE)
    tiny.run(config(train={"steps": 4}), tmp_path, ONE)
    first, second = offline_runs(tmp_path).values()
    ids = {r.run.run_id for of in (first, second) for r in of if r.HasField("run")}
    assert len(ids) == 1
    assert [line["step"] for line in lines(history(first), "train")] == [0, 1]
    assert [line["step"] for line in lines(history(second), "train")] == [2, 3]


def log_steps(workdir, start, end, ending=None):
    """A start of a run that logs steps from a checkpoint at `start`, and ends somehow."""
    with RunLog(workdir, start, config(train={"steps": 100})) as log:
        for step in range(start, end):
            log.scalars(step, "train", {"loss": float(step)})
            if step % 2 == 1:
                log.scalars(step, "validation", {"p@1": step / 100})
        if ending == "interrupted":
            log.interrupted()
        elif ending:
            raise ending


def test_steps_done_again_after_a_crash_are_neither_lost_nor_doubled(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        log_steps(tmp_path, 0, 6, KeyboardInterrupt())
    log_steps(tmp_path, 4, 9, "interrupted")  # from a checkpoint at 4
    log_steps(tmp_path, 8, 10)
    runs = list(offline_runs(tmp_path).values())
    rows = [row for of in runs for row in history(of)]
    assert [line["step"] for line in lines(rows, "train")] == list(range(10))
    assert [line["step"] for line in lines(rows, "validation")] == [1, 3, 5, 7, 9]
    for step, line in enumerate(lines(rows, "train")):
        assert line == {"step": step, "loss": step}
    codes = [r.exit.exit_code for of in runs for r in of if r.HasField("exit")]
    assert codes == [1, 1, 0]
    preempted = [any(r.HasField("preempting") for r in of) for of in runs]
    assert preempted == [False, True, False]
    assert len({r.run.run_id for of in runs for r in of if r.HasField("run")}) == 1


def test_without_a_checkpoint_it_is_a_new_run(tmp_path):
    """The config may be another one: its steps must not be taken for those of the first."""
    log_steps(tmp_path, 0, 3)
    log_steps(tmp_path, 0, 2)
    first, second = offline_runs(tmp_path).values()
    assert [line["step"] for line in lines(history(second), "train")] == [0, 1]
    ids = [r.run.run_id for of in (first, second) for r in of if r.HasField("run")]
    assert ids[0] != ids[1]


_RUNS = """
import pathlib, sys, time
sys.path[:0] = ["tests", "tests/runs"]
import trackers_test as t
log = t.RunLog(pathlib.Path(sys.argv[1]), 0, t.config(train={"steps": 100}))
for step in range(4):
    log.scalars(step, "train", {"loss": float(step)})
time.sleep(600)
"""


def test_a_run_whose_process_is_killed_goes_on(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", _RUNS, tmp_path], cwd=ROOT)
    train = lambda: [
        line["step"]
        for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime)
        for line in lines(history(records(file)), "train")
    ]
    deadline = time.monotonic() + 120
    while train() != [0, 1, 2, 3] and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    log_steps(tmp_path, 2, 6)
    wandb.teardown()
    assert train() == list(range(6))


def test_a_run_that_begins_without_it_is_sent_whole(tmp_path):
    began = config(train={"steps": 100}, logging={"wandb": ""})
    with RunLog(tmp_path, 0, began) as log:
        for step in range(3):
            log.scalars(step, "train", {"loss": step / 2, "kl": float("nan")})
        log.rollouts(1, [{"prompt": "p"}])
    assert not (tmp_path / "wandb.json").exists()
    log_steps(tmp_path, 2, 4)
    (of,) = offline_runs(tmp_path).values()
    assert [line["loss"] for line in lines(history(of), "train")] == [0, 0.5, 2, 3]
    assert [line["step"] for line in lines(history(of), "rollouts")] == [1]


def test_a_bucket_keeps_the_id_and_a_disk_the_files(monkeypatch, capsys):
    with buckets.google() as (_, clients):
        for name, value in clients.items():
            monkeypatch.setenv(name, value)
        workdir = paths.parse(f"gs://{buckets.BUCKET}/tracked", "--workdir")
        log_steps(workdir, 0, 4)
        began = json.loads(paths.read(workdir / "wandb.json"))
        log_steps(workdir, 2, 6)
        ended = json.loads(paths.read(workdir / "wandb.json"))
        assert "wandb" not in paths.names(workdir)
    assert began["id"] == ended["id"] and ended["steps"] == {"train": 5, "validation": 5}
    wandb.teardown()
    said = re.findall(r"W&B: offline, in (\S+):", capsys.readouterr().out)
    rows = []
    for folder in map(pathlib.Path, said):  # a disk keeps what is still to be uploaded
        (file,) = folder.glob("*.wandb")
        assert began["id"] in file.name
        rows += history(records(file))
        shutil.rmtree(folder.parent.parent)
    assert [line["step"] for line in lines(rows, "train")] == list(range(6))


# ---- W&B fails ----


def test_a_server_that_does_not_answer_lets_the_run_train(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "PATIENCE", 2.0)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    tiny.run(config(train={"steps": 1}), tmp_path, ONE)
    said = capsys.readouterr().out
    assert said.count("W&B does not answer") == 1 and "W&B: offline, in" in said
    (of,) = offline_runs(tmp_path).values()
    assert len(lines(history(of), "train")) == 1


def test_without_a_key_nobody_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    log_steps(tmp_path / "run", 0, 2)
    said = capsys.readouterr().out
    assert "W&B has no API key here: set WANDB_API_KEY, or run `wandb login`." in said
    (of,) = offline_runs(tmp_path / "run").values()
    assert len(lines(history(of), "train")) == 2


def test_a_bad_key_goes_offline_as_no_key_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "xxxx")
    log_steps(tmp_path, 0, 2)
    assert "W&B refuses its API key" in capsys.readouterr().out
    (of,) = offline_runs(tmp_path).values()
    assert len(lines(history(of), "train")) == 2


def test_a_table_has_the_columns_of_all_lines():
    table = trackers._table([{"a": 1}, {"b": 2, "a": 3}])
    assert (table.columns, table.data) == (["a", "b"], [[1, None], [3, 2]])


def test_what_raises_is_told_once_and_turned_off(tmp_path, capsys):
    with RunLog(tmp_path, 0, config(train={"steps": 100})) as log:
        log.scalars(0, "train", {"loss": 1.0})
        wandb.run.finish()  # W&B refuses whatever comes after it
        for step in range(1, 4):
            log.scalars(step, "train", {"loss": 1.0})
            log.rollouts(step, [{"prompt": "p"}])
    said = [line for line in capsys.readouterr().out.splitlines() if "W&B failed" in line]
    assert len(said) == 1 and "is off for this start of the run" in said[0]
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 4


def test_the_death_of_its_process_does_not_hold_the_run(tmp_path, monkeypatch):
    show = RunLog.progress

    def progress(self, step, text):
        show(self, step, text)
        if step == 0:
            for entry in pathlib.Path("/proc").glob("[0-9]*"):
                # Its process is our child, or a child's.
                with contextlib.suppress(OSError):
                    environment = (entry / "environ").read_bytes()
                    if b"wandb-core" in (entry / "cmdline").read_bytes() and mine in environment:
                        os.kill(int(entry.name), signal.SIGKILL)
                        killed.append(entry.name)

    mine, killed = str(tmp_path).encode(), []
    monkeypatch.setenv("QLOG_TEST_OWNER", str(tmp_path))
    monkeypatch.setattr(RunLog, "progress", progress)
    outcome = tiny.run(config(train={"steps": 4}), tmp_path, ONE)
    assert killed and not outcome.interrupted
    with contextlib.suppress(Exception):  # as its process ended
        wandb.teardown()
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_disabled_it_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log_steps(tmp_path, 0, 2)
    assert "W&B: disabled" in capsys.readouterr().out and not offline_runs(tmp_path)
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3


def test_rollouts_whose_cells_differ_in_type(tmp_path):
    table = [{"reward": 1.0, "log_w": -1.5}, {"reward": None, "log_w": float("-inf")}]
    with RunLog(tmp_path, 0, config()) as log:
        log.rollouts(0, table)
    ((file, of),) = offline_runs(tmp_path).items()
    (row,) = history(of)
    written = json.loads((file.parent / "files" / row["rollouts/table/path"]).read_text())
    assert written["data"] == [[1.0, -1.5], [None, "-inf"]]


# ---- The field ----


@pytest.mark.parametrize("project", ["a/b/c", "/b", "a/", "a b", "a?b"])
def test_a_project_that_wandb_would_refuse(project):
    with pytest.raises(ConfigError, match=r"config\.logging\.wandb = .* must be a project, or"):
        check_config(tiny.config(logging={"wandb": project}))


def test_without_the_package_it_is_refused_and_otherwise_not_imported(tmp_path):
    """In a process whose metadata do not know the package."""
    code = (
        "import sys, importlib.metadata as m; sys.path[:0] = ['tests']; version = m.version\n"
        "def hidden(name):\n"
        "    if name == 'wandb': raise m.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "m.version = hidden\n"
        "import tiny, jax; from qlog.config import check_config\n"
        "tiny.run(tiny.config(train={'steps': 1}), sys.argv[1], jax.devices()[:1])\n"
        "assert 'wandb' not in sys.modules\n"
        "check_config(tiny.config(logging={'wandb': 'demo'}))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    wanted = "config.logging.wandb = 'demo' needs the package wandb: pip install 'qlog[wandb]'"
    assert wanted in failed.stderr.splitlines()[-1]
