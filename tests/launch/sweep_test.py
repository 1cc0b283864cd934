"""launch/sweep brings tables of runs to their end, here and through launchers that only submit."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
from clusters import TICK, Cluster
from places import ROOT
from processes import run

from qlog.aot import run_cost
from qlog.config import schema
from qlog.errors import ConfigError
from qlog.storage import paths

LAUNCH = ROOT / "launch"
TABLES = sorted((LAUNCH / "tables").glob("*.txt"))


def environment(**values):
    return {
        **os.environ,
        "QLOG_SWEEP_SECONDS": str(TICK),
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        **values,
    }


def sweep(*options, code=0, env=None):
    """launch/sweep's output; the exit code has to be the expected one."""
    return run(LAUNCH / "sweep", *options, code=code, env=env or environment())


def table(tmp_path, *names, name="runs.txt", flags="--config=configs/quickstart.py"):
    """A table of runs that differ in their seed."""
    lines = [f"{run} {flags} --config.train.steps={7 + i}" for i, run in enumerate(names)]
    (tmp_path / name).write_text("# comment\n" + "\n\n".join(lines) + "  # why\n")
    return f"--runs={tmp_path / name}"


def summary(output, count):
    lines = [line.split(maxsplit=1) for line in output.splitlines()[-count:]]
    return {name: rest for name, rest in lines}


@pytest.fixture
def cluster(tmp_path, request):
    cluster = Cluster(tmp_path / "cluster", getattr(request, "param", {}))
    cluster.env = environment(PATH=f"{tmp_path}/cluster/bin:{os.environ['PATH']}")
    yield cluster
    cluster.release()
    cluster.close()


@pytest.fixture(scope="module")
def bucket():
    """gs://bucket on loopback; the environment that leads there."""
    from gcp_storage_emulator.server import create_server

    server = create_server("localhost", 0, in_memory=True, default_bucket="bucket")
    server.start()
    address = f"http://localhost:{server._api._httpd.server_address[1]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        yield "gs://bucket"
    server.stop()


SLURM = ["--", LAUNCH / "slurm", "--gpus-per-node=8"]

# Through a cluster


@pytest.mark.parametrize(
    "cluster",
    [{"b": ["fail", "finish"], "c": ["settings"], "d": ["fail"], "e": ["pause"]}],
    indirect=True,
)
def test_submitted_runs_are_waited_for_and_retried_and_never_too_many_live(tmp_path, cluster):
    runs, workdir = table(tmp_path, *"abcde"), f"--workdir={tmp_path}/w"
    output = sweep(runs, workdir, "--parallel=2", "--retries=1", *SLURM, code=1, env=cluster.env)
    assert cluster.most == 2
    assert {name: len(tries) for name, tries in cluster.commands.items()} == {
        "a": 1,
        "b": 2,
        "c": 1,
        "d": 2,
        "e": 1,
    }
    outcome = summary(output, 5)
    assert outcome["a"] == outcome["b"] == outcome["e"] == "ok"
    assert outcome["c"] == "failed: config.loss.q = 7 is too large."
    assert re.fullmatch(r"failed: its job d-\w{5} ended without results", outcome["d"])
    assert "b: its job" in output and "trying again (1 of 1)" in output

    status = summary(sweep(runs, workdir, "--status"), 5)
    assert status["a"] == status["b"] == "finished"
    assert status["c"] == "failed at step 1 of 9: config.loss.q = 7 is too large."
    assert status["d"].startswith("failed at step 1 of 10: its job")

    # Taken up: what is finished stays as it is; what failed is tried again, since it was asked for.
    cluster.behaviours.update(c=["settings", "finish"], d=["fail", "fail", "finish"])
    output = sweep(runs, workdir, "--parallel=2", *SLURM, env=cluster.env)
    assert "a: finished before" in output and len(cluster.commands["a"]) == 1
    assert len(cluster.commands["c"]) == 2 and len(cluster.commands["d"]) == 3


@pytest.mark.parametrize("cluster", [{"a": ["fail", "finish"], "b": ["pause"]}], indirect=True)
def test_a_jobset_that_failed_is_made_again_in_a_bucket(tmp_path, cluster, bucket):
    runs, workdir = table(tmp_path, "a", "b"), f"--workdir={bucket}/sweep"
    env = {**cluster.env, "STORAGE_EMULATOR_HOST": os.environ["STORAGE_EMULATOR_HOST"]}
    gke = ["--", LAUNCH / "gke", "--image=I", "--type=v5e", "--topology=4x4"]
    assert set(summary(sweep(runs, workdir, "--status", env=env), 2).values()) == {"not started"}
    output = sweep(runs, workdir, "--parallel=2", *gke, env=env)
    assert summary(output, 2) == {"a": "ok", "b": "ok"}
    assert len(cluster.commands["a"]) == 2 and len(cluster.calls("kubectl delete jobset a-")) == 1
    assert len(cluster.commands["b"]) == 1 and not cluster.calls("kubectl delete jobset b-")
    assert set(summary(sweep(runs, workdir, "--status", env=env), 2).values()) == {"finished"}
    record = json.loads(paths.read(paths.parse(f"{bucket}/sweep/a/command.json")))
    assert record["tries"] == 2 and record["flags"][0] == "--config=configs/quickstart.py"


@pytest.mark.parametrize("cluster", [{"a": ["queue"], "b": ["queue"]}], indirect=True)
def test_interrupted_it_says_what_goes_on_and_is_taken_up(tmp_path, cluster):
    call = [table(tmp_path, "a", "b", "c"), f"--workdir={tmp_path}/w", "--parallel=2", *SLURM]
    first = subprocess.Popen(
        [str(word) for word in (LAUNCH / "sweep", *call)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=cluster.env,
    )
    deadline = time.monotonic() + 60
    while len(cluster.commands) < 2 and time.monotonic() < deadline:
        time.sleep(TICK)
    first.send_signal(signal.SIGINT)
    output = first.communicate(timeout=60)[0]
    assert first.returncode == 143
    assert re.search(r"a goes on; to stop it: scancel --name=a-\w{5}\n", output)
    assert "the same command takes the sweep up" in output
    status = summary(sweep(*call[:2], "--status"), 3)
    assert re.fullmatch(r"submitted \d+ s ago, no beat yet", status["a"])
    assert status["c"] == "not started"

    refused = sweep(*call[:3], "--flags=--config.seed=5", *SLURM, code=2, env=cluster.env)
    assert "a is running with other flags" in refused
    cluster.release()
    assert set(summary(sweep(*call, env=cluster.env), 3).values()) == {"ok"}
    assert [len(cluster.commands[name]) for name in "abc"] == [1, 1, 1] and cluster.most == 2


# Here

PROGRAM = """
    #!@PYTHON@
    import json, pathlib, sys, time
    folder = pathlib.Path(next(a[10:] for a in sys.argv if a.startswith("--workdir=")))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "tries", "a") as file:
        print(sys.argv[1:], file=file)
    tries = len((folder / "tries").read_text().splitlines())
    code = {"bad": 3, "flaky": 75 if tries == 1 else 0, "lost": 1}.get(folder.name, 0)
    time.sleep(@SECONDS@)
    if code == 0:
        (folder / "results.json").write_text("{}")
    sys.exit(code)
"""


def program(tmp_path, seconds=0.0):
    """Stands in for launch/local, which runs the whole run and returns its exit code."""
    file = tmp_path / "local"
    text = "\n".join(line[4:] for line in PROGRAM.strip("\n").splitlines())
    file.write_text(text.replace("@PYTHON@", sys.executable).replace("@SECONDS@", str(seconds)))
    file.chmod(0o755)
    return file


def tries(folder):
    return len((folder / "tries").read_text().splitlines())


def test_exit_codes_decide_what_is_tried_again(tmp_path):
    runs = table(tmp_path, "good", "bad", "flaky", "lost")
    output = sweep(runs, f"--workdir={tmp_path}/w/", "--retries=2", "--", program(tmp_path), code=1)
    assert summary(output, 4) == {
        "good": "ok",
        "bad": "failed: exit code 3 (training went wrong)",
        "flaky": "ok",
        "lost": "failed: exit code 1",
    }
    counts = {path.name: tries(path) for path in (tmp_path / "w").iterdir()}
    assert counts == {"good": 1, "bad": 1, "flaky": 2, "lost": 3}


def test_several_at_a_time_share_the_terminal_line_by_line(tmp_path):
    file = tmp_path / "local"
    file.write_text(
        "#!/bin/sh\nfor w; do case $w in --workdir=*) d=${w#*=} ;; esac; done\n"
        'echo hello\nmkdir -p "$d"; echo {} >"$d/results.json"\n'
    )
    file.chmod(0o755)
    output = sweep(table(tmp_path, "a", "b"), f"--workdir={tmp_path}/w", "--parallel=2", "--", file)
    assert "[a] hello" in output and "[b] hello" in output


def test_flags_for_all_runs_and_seeds_keep_their_quotes(tmp_path):
    text = """it's "so" $HOME; *"""
    shared = shlex.join([f"--config.rollout.closing_text={text}"])
    output = sweep(
        table(tmp_path, "a"),
        f"--workdir={tmp_path}/w",
        "--seeds=0,1",
        f"--flags={shared}",
        "--dry-run",
    )
    commands = [shlex.split(line) for line in output.splitlines()]
    assert [command[-3:] for command in commands] == [
        [
            f"--config.rollout.closing_text={text}",
            f"--config.seed={seed}",
            f"--workdir={tmp_path}/w/a-{seed}",
        ]
        for seed in (0, 1)
    ]


def test_finished_with_other_flags_is_refused(tmp_path):
    call = [f"--workdir={tmp_path}/w", "--", program(tmp_path)]
    sweep(table(tmp_path, "a"), *call)
    other = table(tmp_path, "a", flags="--config=configs/quickstart.py --config.optimizer.b2=0.5")
    assert "optimizer.b2 = 0.95, not 0.5" in sweep(other, *call, code=2)
    cheaper = table(
        tmp_path, "a", flags="--config=configs/quickstart.py --config.checkpoint.every=5"
    )
    assert "finished before" in sweep(cheaper, *call)


@pytest.mark.parametrize("how", ["local", "tpu_vm"])
def test_a_run_that_is_live_here_is_waited_for(tmp_path, how):
    """launch/tpu_vm keep is started again, as it waits; any other run is left to its process."""
    stand_in = program(tmp_path)
    launcher = ["--", stand_in]
    if how == "tpu_vm":
        launcher = ["--", stand_in.rename(tmp_path / "tpu_vm"), "keep", "--name=n"]
    folder = tmp_path / "w/a"
    folder.mkdir(parents=True)
    is_seen = threading.Event()

    def beat():
        step = 0
        while not is_seen.wait(TICK):
            step += 1
            owner = {"owner": "somebody", "step": step, "time": time.time()}
            paths.write(folder / "owner.json", json.dumps(owner))
        paths.write(folder / "results.json", "{}")

    thread = threading.Thread(target=beat)
    thread.start()
    command = (LAUNCH / "sweep", table(tmp_path, "a"), f"--workdir={tmp_path}/w", *launcher)
    lines = []
    try:
        with subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment() | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
        ) as process:
            watchdog = threading.Timer(120, process.kill)
            watchdog.start()
            for line in process.stdout:
                lines.append(line)
                if "a: running at step" in line:  # the sweep has seen it: it may end
                    is_seen.set()
            watchdog.cancel()
    finally:
        is_seen.set()
        thread.join()
    output = "".join(lines)
    assert process.returncode == 0, output
    assert "a: running at step" in output and summary(output, 1) == {"a": "ok"}
    assert (folder / "tries").exists() == (how == "tpu_vm")


def test_a_run_here_whose_process_is_gone_is_started_again(tmp_path):
    (tmp_path / "w/a").mkdir(parents=True)
    owner = {"owner": "somebody", "step": 3, "time": time.time() + 60}  # whose clock is not ours
    (tmp_path / "w/a/owner.json").write_text(json.dumps(owner))
    output = sweep(table(tmp_path, "a"), f"--workdir={tmp_path}/w", "--", program(tmp_path))
    assert "a: no sign of it for" in output and summary(output, 1) == {"a": "ok"}


# Tables


def test_tables_share_runs_and_each_has_one_name(tmp_path):
    runs = "--runs=" + ",".join(map(str, TABLES))
    lines = sweep(runs, "--workdir=w", "--dry-run").splitlines()
    names = [line.rpartition("--workdir=w/")[2] for line in lines]
    assert len(names) == len(set(names)) == 31
    assert sum(name.endswith("-base") for name in names) == 3
    assert len(sweep(runs, "--workdir=w", "--only=finqa-cold-grpo", "--dry-run").splitlines()) == 1

    table(tmp_path, "a", "b", name="one.txt")
    table(tmp_path, "b", "c", name="two.txt")
    files = f"--runs={tmp_path}/one.txt,{tmp_path}/two.txt"
    assert "two.txt: b has other flags than in" in sweep(files, "--workdir=w", "--dry-run", code=2)
    table(tmp_path, "c", name="two.txt")
    assert "two.txt: c is the run a of" in sweep(files, "--workdir=w", "--dry-run", code=2)


@pytest.mark.parametrize(
    "call, message",
    [
        ("--runs=none --workdir=w", "--runs=none: no such file"),
        ("--parallel=0", "--parallel=0: not below 1"),
        ("--parallel=2 -- launch/tpu_vm keep --name=n --zone=z", "used by one run at a time"),
        ("--parallel=2 -- launch/tpu_vm run --name=n --zone=z", "used by one run at a time"),
        ("-- launch/tpu_vm create --name=n", "runs go through launch/tpu_vm keep"),
        ("-- launch/gke --name=n", "leave it out"),
        ("--price=1.2", "--price and --slice need each other"),
        ("--flags=--x='", "--flags: No closing quotation"),
        ("--only=x", "--only=x: the runs are a"),
        ("--flags=--workdir=x", "--workdir is the sweep's to give"),
        (
            "--flags=--config.train.stepz=4",
            "a: --config.train.stepz=4: the config has no field 'stepz'",
        ),
        ("--workdir=ftp://b/w --status", "give a folder, gs://BUCKET/... or s3://BUCKET/..."),
        ("--price=1 --slice=v4:2x2", "no roofline is known there for"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, call, message):
    output = sweep(table(tmp_path, "a"), "--workdir=w", *call.split(), code=2)
    assert message in output and "Traceback" not in output


def test_slots_name_a_slice_for_each_run_at_a_time(tmp_path):
    output = sweep(
        table(tmp_path, "a", "b", "c"),
        "--workdir=gs://b/w",
        "--parallel=2",
        "--dry-run",
        "--",
        "launch/tpu_vm",
        "keep",
        "--name=q{slot}",
        "--zone=z",
    )
    assert [shlex.split(line)[3] for line in output.splitlines()] == [
        "--name=q0",
        "--name=q1",
        "--name=q0",
    ]


# The price


def test_the_price_is_steps_and_evaluations_times_chips():
    rooflines = run_cost.read_rooflines(LAUNCH / "tables/roofline.json")
    config = schema.merge(
        schema.default(),
        {
            "model": "Qwen/Qwen3-0.6B",
            "data": {"name": "finqa", "max_prompt_tokens": 4096},
            "rollout": {"rationale_budget": 3968, "answer_reserve": 128},
        },
    )
    step = run_cost.roofline(config, "v5e:4x4", rooflines)
    assert step == run_cost.Roofline(16, 112, 0.82)
    run = run_cost.estimate(config, "train", step)
    one = 872 * 16 / (32 * 32) * 0.82 * 112
    assert (run.chips, run.steps, run.evaluations) == (16, 500, 10)
    assert math.isclose(run.evaluation_seconds, 10 * one)
    assert math.isclose(run.hours, (500 * 112 + 10 * one) / 3600)
    changed = schema.merge(
        config, {"train": {"steps": 120}, "evaluation": {"prompts": 100, "rollouts_per_prompt": 4}}
    )
    fewer = run_cost.estimate(changed, "train", step)
    assert fewer.evaluations == 3  # after 50, 100 and 120 steps
    assert math.isclose(fewer.evaluation_seconds, 3 * 100 * 4 / 1024 * 0.82 * 112)
    assert run_cost.estimate(config, "evaluate", step).hours == one / 3600
    # The best checkpoint on the test split, which has another size.
    final = schema.merge(config, {"evaluation": {"final": "test"}})
    with_test = run_cost.estimate(final, "train", step)
    assert with_test.evaluations == 11
    assert math.isclose(with_test.evaluation_seconds, (10 + 1132 / 872) * one)
    for other in (
        {"train": {"prompts_per_step": 64}},
        {"rollout": {"rationale_budget": 64}},
        {"rollout": {"cache": "int8"}},
    ):
        with pytest.raises(ConfigError, match="--slice=v5e:4x4: no roofline"):
            run_cost.roofline(schema.merge(config, other), "v5e:4x4", rooflines)


def test_rooflines_are_those_of_the_readme_and_of_a_compilation():
    """aot/README.md and launch/tables/roofline.json agree; a weak_scaling.json serves as well."""
    rooflines = run_cost.read_rooflines(LAUNCH / "tables/roofline.json")
    ours = sorted((r["rows"][0]["topology"], r["rows"][0]["seconds"]) for r in rooflines)
    rows = [line.split("|") for line in (ROOT / "qlog/aot/README.md").read_text().splitlines()]
    readme = sorted((r[2].strip(), float(r[-2])) for r in rows if len(r) == 11 and ":" in r[2])
    assert ours == readme and len(ours) == 8
    (scaling,) = run_cost.read_rooflines(ROOT / "qlog/aot/results/weak_scaling.json")
    config = schema.merge(schema.default(), scaling["config"])
    step = run_cost.roofline(config, "v5e:2x2", [scaling])
    assert step.chips == 4 and math.isclose(step.seconds, 64.9, abs_tol=0.1)
    share = run_cost.roofline(
        schema.merge(config, {"train": {"prompts_per_step": 32}}), "v5e:4x4", [scaling]
    )
    assert round(share.decode_share, 2) == rooflines[0]["decode_share"]


def test_the_price_of_tables_counts_shared_runs_once():
    files = ",".join(map(str, TABLES))
    output = sweep(f"--runs={files}", "--workdir=w", "--price=1.2", "--slice=v5e:4x4", "--dry-run")
    found = {
        label.rpartition("/")[2]: (
            int(runs),
            float(hours.replace(",", "")),
            float(money.replace(",", "")),
        )
        for label, runs, hours, money in re.findall(
            r"^(.*): (\d+) runs, ([\d,]+) h of v5e:4x4, [\d,]+ chip-hours x 1.2 = ([\d,]+)$",
            output,
            re.M,
        )
    }
    assert (
        found["table1.txt"][0] == 6 and found["table2.txt"][0] == 9 and found["table3.txt"][0] == 21
    )
    total = found["all, what tables share counted once"]
    assert total[0] == 31 and total[1] < sum(found[path.name][1] for path in TABLES) - 50
    assert math.isclose(total[2], total[1] * 16 * 1.2, rel_tol=0.01)
    assert "A lower bound" in output
