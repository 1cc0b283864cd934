"""Launch scripts at work: installing, supervising, several processes, stand-ins for clusters."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import launch_fixtures
import pytest
from places import ROOT
from processes import run

LAUNCH = ROOT / "launch"


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def write_program(path, text, **values):
    """An executable file; @NAME@ in the text is replaced by a value."""
    text = textwrap.dedent(text).lstrip()
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


# Writes its arguments to a file, and another file when SIGTERM makes it save.
SAVES_ON_TERM = """
    #!@PYTHON@
    import pathlib, signal, sys, time

    def save(*_):
        pathlib.Path("@STARTED@.saved").touch()
        sys.exit(0)

    signal.signal(signal.SIGTERM, save)
    pathlib.Path("@STARTED@").write_text("\\0".join(sys.argv[1:]))
    time.sleep(60)
"""


# Installing


@pytest.mark.parametrize("version", ["Python 3.9.2", None])
def test_install_says_which_python_it_needs(tmp_path, version):
    shutil.copytree(LAUNCH, tmp_path / "launch")
    (tmp_path / "constraints.txt").touch()
    python = tmp_path / "python3"
    if version:
        write_program(
            python,
            """
            #!/bin/sh
            [ "$1" != --version ] || { echo @VERSION@; exit 0; }
            exit 1
        """,
            VERSION=version,
        )
    output = run(tmp_path / "launch/install", code=1, env={"PYTHON": str(python)})
    assert "qlog needs Python 3.11 or later, and found" in output
    assert (version or "no ") in output and not (tmp_path / ".venv").exists()


@pytest.mark.slow
def test_install_from_nothing_again_and_after_an_interruption(tmp_path):
    """Needs a package registry. A kill while pip writes packages is made good by the next call."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("launch", "qlog"):
        shutil.copytree(ROOT / name, clone / name)
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, clone)
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([clone / "launch/install"], stdout=log, start_new_session=True)
    wait_until(lambda: b"Installing collected packages" in (tmp_path / "log").read_bytes(), 600)
    time.sleep(3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (clone / ".venv/qlog-installed").exists()
    subprocess.run([clone / "launch/install"], check=True, timeout=600)
    run(clone / ".venv/bin/python", "-m", "pip", "check")
    run(clone / ".venv/bin/python", "-c", "import flax, grain, jax, matplotlib, optax, qlog, scipy")
    assert run(clone / "launch/install") == ""


# One host


def environment(**changes):
    """This process's. `python` is the interpreter of the tests, and finds this clone's qlog."""
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **changes}


@pytest.mark.parametrize("group", [False, True], ids=["to supervise", "to the group, twice"])
def test_supervise_forwards_sigterm_and_does_not_call_it_finished(tmp_path, group):
    started, status = tmp_path / "started", tmp_path / "status"
    program = write_program(
        tmp_path / "program", SAVES_ON_TERM, PYTHON=sys.executable, STARTED=started
    )
    call = [LAUNCH / "supervise", "--restarts=3", f"--status={status}", "--digest=5", "--"]
    process = subprocess.Popen([*call, program], start_new_session=True)
    wait_until(started.exists)
    assert status.read_text().split() == ["running", str(process.pid), "5"]
    assert "runs already" in run(*call, "true", code=1)
    for _ in range(2 if group else 1):
        (os.killpg if group else os.kill)(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert (tmp_path / "started.saved").exists() and status.read_text() == "exited 143 5\n"


@pytest.mark.parametrize("code, tries", [(0, 1), (2, 1), (3, 1), (130, 1), (7, 3), (75, 3), (1, 3)])
def test_supervise_tries_again_what_may_pass(tmp_path, code, tries):
    """Without a newer checkpoint it gives up: a crash then has a code that is not tried again."""
    log = tmp_path / "log"
    call = [LAUNCH / "supervise", "--restarts=2", f"--log={log}", "--"]
    env = environment(**{"BASH_FUNC_sleep%%": "() { :; }"})  # No pause between the tries.
    run(*call, "bash", "-c", f"echo once; exit {code}", code=3 if code in (1, 7) else code, env=env)
    assert log.read_text().count("once") == tries
    assert ("giving up" in log.read_text()) == (tries > 1)


def test_supervise_goes_on_while_the_checkpoint_advances(tmp_path):
    log, checkpoints = tmp_path / "log", tmp_path / "run/checkpoints"
    program = write_program(
        tmp_path / "program",
        """
        #!/bin/bash
        n=$(ls @CHECKPOINTS@ 2>/dev/null | grep -c .)
        mkdir -p @CHECKPOINTS@/$((n < 4 ? n + 1 : n))
        exit 7
    """,
        CHECKPOINTS=checkpoints,
    )
    call = [
        LAUNCH / "supervise",
        "--restarts=1",
        f"--log={log}",
        "--",
        program,
        f"--workdir={tmp_path}/run",
    ]
    run(*call, code=3, env=environment(**{"BASH_FUNC_sleep%%": "() { :; }"}))
    # Four tries each left a newer checkpoint, the fifth did not.
    assert log.read_text().count("trying again") == 4
    assert "tried again 1 times without a newer checkpoint" in log.read_text()


@pytest.mark.parametrize("code", [None, 7], ids=["while it runs", "after a failure"])
def test_supervise_hears_signals_while_the_bucket_is_silent(tmp_path, code):
    started = tmp_path / "started"
    write_program(tmp_path / "bin/python", "#!/bin/sh\nexec sleep 60\n")  # qlog.commands.run_status
    program = write_program(
        tmp_path / "program",
        SAVES_ON_TERM if code is None else "#!/bin/sh\ntouch @STARTED@\nexit @CODE@\n",
        PYTHON=sys.executable,
        STARTED=started,
        CODE=code,
    )
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    call = [LAUNCH / "supervise", "--restarts=3", "--", program, "--workdir=gs://b/run"]
    process = subprocess.Popen(call, env=env)
    wait_until(started.exists)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == (code or 143)


def test_supervise_copies_the_log_while_the_run_goes_on(tmp_path):
    log, copy, go = tmp_path / "log", tmp_path / "bucket/host.log", tmp_path / "go"
    call = [
        LAUNCH / "supervise",
        f"--log={log}",
        f"--copy-log={copy}",
        "--",
        "bash",
        "-c",
        f"echo first; until [ -e {go} ]; do sleep 0.1; done; echo last",
    ]
    process = subprocess.Popen(call, env=environment(QLOG_COPY_SECONDS="0.2"))
    wait_until(lambda: copy.exists() and "first" in copy.read_text())
    assert process.poll() is None
    go.touch()
    assert process.wait(timeout=60) == 0 and copy.read_text() == log.read_text() == "first\nlast\n"


def test_supervise_reads_secrets_from_files_and_leaves_the_environment_alone(tmp_path):
    (tmp_path / "hf_token").write_text("token\n")
    command = ["bash", "-c", 'echo "$HF_TOKEN_PATH $JAX_PLATFORMS $QLOG_ASSETS"']
    env = {"QLOG_SECRETS": str(tmp_path), "JAX_PLATFORMS": "tpu,cpu", "QLOG_ASSETS": "/assets"}
    output = run(LAUNCH / "supervise", "--", *command, env=env)
    assert output == f"{tmp_path}/hf_token tpu,cpu /assets\n"


def test_run_status_tells_of_a_workdir_without_jax(tmp_path):
    def status(workdir, code=0):
        program = (
            "import sys; from qlog.commands import run_status; code = run_status.main(sys.argv); "
            "assert 'jax' not in sys.modules; sys.exit(code)"
        )
        return run(sys.executable, "-c", program, workdir, code=code, env=environment())

    assert json.loads(status(tmp_path)) == {"finished": False, "checkpoint": None, "beat": None}
    for step in ("9", "10", "12.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    (tmp_path / "owner.json").write_text('{"step": 11, "time": 5.0}')
    (tmp_path / "results.json").write_text("{}")
    assert json.loads(status(tmp_path)) == {
        "finished": True,
        "checkpoint": 10,
        "beat": {"step": 11, "time": 5.0},
    }
    assert "ftp://x" in status("ftp://x/y", code=2)


def test_run_status_and_logs_in_a_bucket(tmp_path):
    """In an object store on loopback. On gs://, the last file makes a checkpoint complete."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "gcp_storage_emulator",
        "start",
        "--host=127.0.0.1",
        f"--port={port}",
        "--in-memory",
        "--default-bucket=b",
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    host = f"http://127.0.0.1:{port}"
    env = environment(STORAGE_EMULATOR_HOST=host, no_proxy="127.0.0.1", NO_PROXY="127.0.0.1")
    try:
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        program = """
            import sys
            from qlog.storage import paths
            for name in sys.argv[1:]:
                paths.write(paths.parse(f"gs://b/run/{name}"), '{"step": 6, "time": 5.0}')
        """
        names = ["checkpoints/5/commit_success.txt", "checkpoints/6/params/x", "owner.json"]
        run(sys.executable, "-c", textwrap.dedent(program), *names, env=env)
        call = [
            LAUNCH / "supervise",
            f"--log={tmp_path}/log",
            "--copy-log=gs://b/run/logs/h.log",
            "--",
        ]
        run(*call, "echo", "last words", env=env)
        output = run(sys.executable, "-m", "qlog.commands.run_status", "gs://b/run", env=env)
        status = json.loads(output.splitlines()[0])  # gcsfs may complain on stderr
        assert status == {"finished": False, "checkpoint": 5, "beat": {"step": 6, "time": 5.0}}
        program = 'from qlog.storage import paths; print(paths.read(paths.parse("gs://b/run/logs/h.log")))'
        assert "last words" in run(sys.executable, "-c", program, env=env)
    finally:
        server.kill()
        server.wait()


# Stand-ins for clusters: what would run on their hosts runs here

FLAGS = [
    "--config=configs/hotpotqa.py:cold,garl,q=0.75",
    "--workdir=gs://bucket/runs/cold_garl",
    """--config.rollout.closing_text=it's "so" $HOME; *""",
]


@pytest.fixture
def tpu(tmp_path):
    """launch/tpu_vm with a `gcloud` whose hosts are folders: ssh runs the command there, by a
    `python` that does what tpu.program says."""
    homes = [tmp_path / "home0", tmp_path / "home1"]
    for home in homes:
        shutil.copytree(LAUNCH, home / "qlog/launch")
        write_program(
            home / "qlog/.venv/bin/python",
            """
            #!/bin/bash
            case "$*" in
                "-m qlog.commands.run_status "*) cat @DIR@/run_status ;;
                "-c "*) cp "$3" @DIR@/copied ;;
                *) echo start >>@DIR@/starts; exec @DIR@/program "$@" ;;
            esac
        """,
            DIR=tmp_path,
        )
    path = launch_fixtures.install(tmp_path, "gcloud")
    env = {"PATH": path, "QLOG_KEEP_SECONDS": "0.2"}

    def call(action, *words, flags=FLAGS, code=0, env=env):
        where = ["--name=n", "--zone=z", "--type=v6e-16", *words]
        return run(LAUNCH / "tpu_vm", action, *where, "--", *flags, code=code, env=env)

    def exits(code):
        write_program(tmp_path / "program", f"#!/bin/sh\nexit {code}\n")

    def verbs():
        return [
            verb
            for words in launch_fixtures.calls(tmp_path)
            for verb in ("delete", "create", "scp", "launch/supervise")
            if f" {verb} " in " ".join(words)
        ]

    def starts():
        return (tmp_path / "starts").read_text().count("start") // len(homes)

    call.homes, call.state, call.env, call.folder = homes, tmp_path / "state", env, tmp_path
    call.exits, call.verbs, call.starts = exits, verbs, starts
    call.state.write_text("ACTIVE")
    (tmp_path / "run_status").write_text('{"finished": true, "checkpoint": null, "beat": null}\n')
    write_program(
        tmp_path / "program", SAVES_ON_TERM, PYTHON=sys.executable, STARTED=tmp_path / "started"
    )
    yield call
    call.state.write_text("ACTIVE")
    call("stop")


def test_tpu_vm_starts_shows_and_stops_a_run(tpu):
    started, status = tpu.folder / "started", tpu.homes[1] / "qlog-cold-garl.status"
    tpu("run")
    wait_until(started.exists)
    assert started.read_text().split("\0") == ["-m", "qlog.main", "--distributed=on", *FLAGS]
    assert "ACTIVE" in (shown := tpu("status")) and "running" in shown
    assert "exited 143" in tpu("stop")
    assert (tpu.folder / "started.saved").exists() and "exited 143" in status.read_text()
    assert "stopping" in (tpu.folder / "copied").read_text()  # the log


def test_tpu_vm_setup_leaves_no_file_of_an_earlier_clone(tpu):
    (old := tpu.homes[0] / "qlog/launch/old").touch()
    (tpu.homes[0] / "qlog/.cache").mkdir()
    tpu("setup")
    assert not old.exists() and (tpu.homes[0] / "qlog/launch/tpu_vm").exists()
    assert (tpu.homes[0] / "qlog/.venv").exists() and (tpu.homes[0] / "qlog/.cache").exists()
    assert (tpu.homes[1] / "qlog/installed").read_text() == "tpu\n"


def test_tpu_vm_keep_makes_a_preempted_slice_again_and_stops_when_finished(tpu):
    tpu.state.write_text("SUSPENDED\n")
    tpu.exits(0)
    output = tpu("keep")
    assert "finished" in output and "still there and paid for" in output
    assert tpu.verbs() == ["delete", "create", "scp", "launch/supervise"]
    assert tpu.state.exists()


def test_tpu_vm_keep_deletes_the_slice_at_the_end_if_asked(tpu):
    tpu.exits(0)
    assert "finished" in tpu("keep", "--delete") and not tpu.state.exists()


def test_tpu_vm_keep_starts_the_run_of_a_restarted_host(tpu):
    (tpu.homes[0] / "qlog-cold-garl.status").write_text("running 99999999 1\n")  # long gone
    tpu.exits(0)
    assert "finished" in tpu("keep") and tpu.starts() == 1


@pytest.mark.parametrize("code", [2, 3])
def test_tpu_vm_keep_gives_up_on_what_would_go_wrong_again(tpu, code):
    tpu.exits(code)
    output = tpu("keep", "--delete", code=code)
    assert f"the run failed (exited {code})" in output and not tpu.state.exists()
    assert tpu.starts() == 1


def test_tpu_vm_keep_takes_other_flags_for_another_run(tpu):
    tpu.exits(0)
    tpu("keep")
    tpu("keep")
    assert tpu.starts() == 1  # finished already
    tpu("keep", flags=[*FLAGS, "--mode=evaluate"])
    assert tpu.starts() == 2


def test_tpu_vm_keep_refuses_a_slice_that_runs_something_else(tpu):
    tpu("run", flags=[*FLAGS, "--config.seed=1"])
    wait_until((tpu.folder / "started").exists)
    assert "another run is on this slice" in tpu("keep", code=1)


def test_tpu_vm_keep_replaces_hosts_that_do_not_answer(tpu):
    (tpu.homes[1] / "dead").touch()
    tpu.exits(0)
    output = tpu("keep", "--patience=0")
    assert "not every host answers" in output and "finished" in output
    assert tpu.verbs() == ["delete", "create", "scp", "launch/supervise"]


def test_tpu_vm_keep_does_not_wait_for_ever_for_capacity(tpu):
    tpu.state.write_text("WAITING_FOR_RESOURCES\n")
    assert "WAITING_FOR_RESOURCES for 0 minutes" in tpu("keep", "--patience=0", "--delete", code=1)
    assert not tpu.state.exists()
    tpu.state.write_text("FAILED\n")
    (tpu.folder / "next_state").write_text("FAILED")
    assert "could not be made, four times" in tpu("keep", code=1)


def test_tpu_vm_keep_starts_a_run_again_that_shows_no_sign_of_life(tpu):
    beat = {"step": 4, "phase": "decode", "moved": 5.0, "time": 5.0}
    status = {"finished": False, "checkpoint": 3, "beat": beat}
    (tpu.folder / "run_status").write_text(json.dumps(status) + "\n")
    write_program(
        tpu.folder / "program",
        """
        #!/bin/sh
        [ ! -e @DIR@/once ] || { echo '{"finished": true}' >@DIR@/run_status; exit 0; }
        trap 'touch @DIR@/once; exit 0' TERM
        while true; do sleep 0.1; done
    """,
        DIR=tpu.folder,
    )
    tpu("run")
    output = tpu("keep", env={**tpu.env, "QLOG_QUIET_SECONDS": "1"})
    assert "no sign of life" in output and "finished" in output


def test_tpu_vm_keep_says_that_the_bill_goes_on_when_it_is_interrupted(tpu):
    call = [LAUNCH / "tpu_vm", "keep", "--name=n", "--zone=z", "--type=v6e-16", "--", *FLAGS]
    process = subprocess.Popen(
        call,
        cwd=ROOT,
        env={**os.environ, **tpu.env},
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    wait_until((tpu.folder / "started").exists)
    process.send_signal(signal.SIGTERM)
    assert "the run and its bill go on" in process.communicate(timeout=60)[0]
    assert process.returncode == 130


@pytest.fixture
def kubernetes(tmp_path):
    env = {"PATH": launch_fixtures.install(tmp_path, "kubectl")}
    call = [
        LAUNCH / "gke",
        "--image=I",
        "--type=v6e",
        "--topology=4x4",
        "--assets=gs://b/a",
        "--",
        *FLAGS,
    ]

    def start(code=0):
        return run(*call, code=code, env=env)

    start.jobset = tmp_path / "jobsets/cold-garl"
    return start


def test_gke_applies_what_the_api_takes_and_shows_process_0(kubernetes):
    output = kubernetes()
    assert kubernetes.jobset.exists() and "batch.kubernetes.io/job-completion-index=0" in output


def test_gke_refuses_a_live_jobset_and_replaces_an_ended_one(kubernetes):
    kubernetes()
    assert "JobSet cold-garl is live" in kubernetes(code=1)
    for ended in ("Completed", "Failed"):
        conditions = [{"type": "Suspended", "status": "False"}, {"type": ended, "status": "True"}]
        kubernetes.jobset.write_text(json.dumps({"status": {"conditions": conditions}}))
        assert "a new one takes its place" in kubernetes()
        assert "spec" in json.loads(kubernetes.jobset.read_text())


@pytest.fixture
def slurm(tmp_path):
    """slurm.sbatch as SLURM would start it; slurm(PLAN) starts it and srun follows the plan."""
    for name in ("lib.sh", "env.sh", "slurm.sbatch"):
        (tmp_path / "launch").mkdir(exist_ok=True)
        shutil.copy(LAUNCH / name, tmp_path / "launch")
    (tmp_path / "run").mkdir()
    path = launch_fixtures.install(tmp_path, "srun", "scontrol")
    env = environment(
        PATH=f"{path.partition(':')[0]}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        SLURM_JOB_ID="17",
        SLURM_SUBMIT_DIR=str(tmp_path),
        SLURM_CPUS_PER_TASK="8",
    )

    def start(plan, *flags):
        (tmp_path / "plan").write_text(plan)
        (tmp_path / "started").unlink(missing_ok=True)
        call = ["bash", LAUNCH / "slurm.sbatch", "--config=c", f"--workdir={tmp_path}/run", *flags]
        process = subprocess.Popen(call, env=env, stdout=subprocess.PIPE, text=True)
        wait_until((tmp_path / "started").exists)
        return process

    start.folder, start.env = tmp_path, env
    start.requeued = lambda: ["scontrol", "requeue", "17"] in launch_fixtures.calls(tmp_path)
    return start


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_saves_and_queues_again_before_the_time_limit_and_when_preempted(slurm, number):
    process = slurm("wait")
    words = json.loads((slurm.folder / "started").read_text())
    assert {"--cpus-per-task=8", "--label", "--kill-on-bad-exit=1"} <= set(words)
    assert words[words.index("python") :] == [
        "python",
        "-m",
        "qlog.main",
        "--distributed=on",
        "--config=c",
        f"--workdir={slurm.folder}/run",
    ]
    process.send_signal(number)
    assert process.wait(timeout=60) == 0 and slurm.requeued()


def test_slurm_mounts_into_a_container_what_is_not_in_a_bucket(slurm):
    assets = slurm.folder / "assets"
    slurm.env |= {
        "QLOG_CONTAINER_IMAGE": "I",
        "QLOG_ASSETS": str(assets),
        "JAX_COMPILATION_CACHE_DIR": "gs://b/xla",
    }
    slurm("finish").wait(timeout=60)
    words = json.loads((slurm.folder / "started").read_text())
    folders = [slurm.folder, slurm.folder / "run", assets]
    assert "--container-mounts=" + ",".join(f"{f}:{f}" for f in folders) in words
    assert "--container-image=I" in words


@pytest.mark.parametrize(
    "plan, code, requeued",
    [
        ("", 0, True),  # SLURM's default preemption signals the steps only
        ("finish", 0, False),
        ("exit 2", 2, False),
        ("exit 3", 3, False),
        ("exit 75", 75, True),
        ("exit 1", 1, True),
        ("exit 143", 143, True),
    ],
)
def test_slurm_asks_whether_the_run_is_finished(slurm, plan, code, requeued):
    assert slurm(plan).wait(timeout=60) == code and slurm.requeued() == requeued


def test_slurm_queues_again_while_the_checkpoint_advances_and_three_times_without(slurm):
    requeued = []
    for plan in ["save 5, exit 75", "save 9, exit 1", "exit 1", "exit 1", "exit 1"]:
        (slurm.folder / "calls").unlink(missing_ok=True)
        process = slurm(plan)
        process.wait(timeout=60)
        requeued.append(slurm.requeued())
    assert requeued == [True, True, True, True, False]
    assert "no newer checkpoint" in process.stdout.read()


def test_slurm_leaves_a_cancelled_job_alone(slurm):
    (slurm.folder / "job_state").write_text("CANCELLED")
    process = slurm("wait")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0 and not slurm.requeued()


def test_a_run_that_asked_for_gpus_never_trains_on_the_cpu(tmp_path):
    if list(pathlib.Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there is a GPU")
    call = ["--config=configs/quickstart.py", f"--workdir={tmp_path}", "--distributed=off"]
    env = environment(JAX_PLATFORMS="cuda,cpu")
    output = run(sys.executable, "-m", "qlog.main", *call, code=2, env=env)
    assert "no cuda device is visible here" in output and len(output.splitlines()) == 1


# Several processes on this machine

JAX_PROGRAM = """
    import os, pathlib, sys, time
    import jax

    jax.distributed.initialize(
        num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
        process_id=int(os.environ["JAX_PROCESS_ID"]),
    )
    from jax.experimental import multihost_utils

    mine = jax.process_index()
    total = multihost_utils.process_allgather(jax.numpy.float32(10 + mine)).sum()
    devices = f"{jax.local_device_count()} of {jax.device_count()}"
    print(f"devices {devices} sum {int(total)}", flush=True)
    if sys.argv[1] == "die" and mine == 1:
        os._exit(5)
    if sys.argv[1] == "die":
        time.sleep(60)
"""


def test_local_runs_one_program_over_two_processes(tmp_path):
    program = write_program(tmp_path / "program.py", JAX_PROGRAM)
    output = run(LAUNCH / "local", "--processes=2", "--devices=2", "--", program, "end")
    for process in range(2):
        assert f"[{process}] devices 2 of 4 sum 21" in output


def test_local_stops_the_others_when_one_dies(tmp_path):
    program = write_program(tmp_path / "program.py", JAX_PROGRAM)
    call = ["--processes=2", f"--logs={tmp_path}/logs", "--", program, "die"]
    output = run(LAUNCH / "local", *call, code=5)
    assert "process 1 failed with exit code 5; stopping the others" in output
    assert "sum 21" in (tmp_path / "logs/process_1.log").read_text()


CONFIG = """
    import sys
    sys.path.insert(0, "@TESTS@")
    import tiny

    def get_config(_=""):
        return tiny.config(train={"steps": 100000}, checkpoint={"every": 100000})
"""


def test_local_lets_a_run_save_on_two_sigterms_and_takes_it_up(tmp_path):
    config = write_program(tmp_path / "config.py", CONFIG, TESTS=ROOT / "tests")
    workdir, logs = tmp_path / "run", tmp_path / "logs"
    call = [
        LAUNCH / "local",
        "--processes=2",
        f"--logs={logs}",
        f"--config={config}",
        f"--workdir={workdir}",
    ]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, text=True, env=environment())
    metrics = workdir / "metrics.jsonl"
    wait_until(
        lambda: metrics.exists() and metrics.read_text().count("\n") >= 1 or process.poll(), 240
    )
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors + (logs / "process_0.log").read_text()
    assert "SIGTERM passed on" in errors and "exit codes 0: 0, 1: 0" in errors
    status = json.loads(
        run(sys.executable, "-m", "qlog.commands.run_status", workdir, env=environment())
    )
    assert status["checkpoint"] >= 1 and not status["finished"]


# Answers each SIGINT and each SIGTERM with a line.
STUBBORN = """
    import signal, time
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: print("got", signal.Signals(n).name, flush=True))
    print("ready", flush=True)
    while True:
        time.sleep(0.1)
"""


def test_local_kills_on_the_second_ctrl_c_alone(tmp_path):
    program = write_program(tmp_path / "program.py", STUBBORN)
    call = [LAUNCH / "local", "--processes=1", "--grace=100", "--", program]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen = ""
    for number in (None, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        if number:
            process.send_signal(number)
        while (line := process.stdout.readline()) and not line.startswith("[0]"):
            pass
        seen += line
    assert [line.split()[-1] for line in seen.splitlines()] == [
        "ready",
        "SIGTERM",
        "SIGTERM",
        "SIGINT",
    ]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGKILL


def test_local_kills_what_has_not_saved_within_the_grace(tmp_path):
    program = write_program(tmp_path / "program.py", STUBBORN)
    call = [LAUNCH / "local", "--processes=1", "--grace=0.2", "--", program]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while "ready" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    assert "time is up" in process.communicate(timeout=60)[0]


def test_local_dry_run_shows_a_command_per_process():
    call = ["--processes=3", "--dry-run", "--config=configs/quickstart.py", "--mode=train"]
    lines = run(LAUNCH / "local", *call).splitlines()
    assert len(lines) == 3
    for process, line in enumerate(lines):
        assert f" JAX_PROCESS_ID={process} " in line and " JAX_NUM_PROCESSES=3 " in line
        assert line.endswith(
            " -m qlog.main --distributed=on --config=configs/quickstart.py --mode=train"
        )
