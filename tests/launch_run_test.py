"""The launch scripts at work: installing, supervising, several processes, stand-ins for clusters."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"


def run(*command, code=0, env=None):
    """Runs a command and returns its output; the exit code has to be the expected one."""
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, **(env or {})}, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert result.returncode == code, f"{result.returncode}: {result.stdout}{result.stderr}"
    return result.stdout + result.stderr


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
        write_program(python, """
            #!/bin/sh
            [ "$1" != --version ] || { echo @VERSION@; exit 0; }
            exit 1
        """, VERSION=version)  # fmt: skip
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


def test_supervise_forwards_sigterm_and_does_not_call_it_finished(tmp_path):
    started, status = tmp_path / "started", tmp_path / "status"
    program = write_program(
        tmp_path / "program", SAVES_ON_TERM, PYTHON=sys.executable, STARTED=started
    )
    call = [LAUNCH / "supervise", "--restarts=3", f"--status={status}", "--"]
    process = subprocess.Popen([*call, program])
    wait_until(started.exists)
    assert status.read_text().split() == ["running", str(process.pid)]
    assert "runs already" in run(*call, "true", code=1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert (tmp_path / "started.saved").exists() and status.read_text() == "exited 143\n"


@pytest.mark.parametrize("code, tries", [(0, 1), (2, 1), (7, 2)])
def test_supervise_restarts_failures_but_not_wrong_settings(tmp_path, code, tries):
    log = tmp_path / "log"
    call = [LAUNCH / "supervise", "--restarts=1", f"--log={log}", "--"]
    env = {"BASH_FUNC_sleep%%": "() { :; }"}  # No pause between the tries.
    run(*call, "bash", "-c", f"echo once; exit {code}", code=code, env=env)
    assert log.read_text().count("once") == tries


def test_supervise_reads_secrets_from_files(tmp_path):
    (tmp_path / "wandb_api_key").write_text("key\n")
    (tmp_path / "hf_token").write_text("token\n")
    command = ["bash", "-c", 'echo "$WANDB_API_KEY $HF_TOKEN_PATH"']
    output = run(LAUNCH / "supervise", "--", *command, env={"QLOG_SECRETS": str(tmp_path)})
    assert output == f"key {tmp_path}/hf_token\n"


def test_stage_copies_to_a_shared_folder(tmp_path):
    (tmp_path / "data/sub").mkdir(parents=True)
    (tmp_path / "data/sub/records").write_text("text")
    run(LAUNCH / "stage", f"--to={tmp_path}/shared", f"--data={tmp_path}/data")
    assert (tmp_path / "shared/data/sub/records").read_text() == "text"


# Stand-ins for clusters: what would run on their hosts runs here

FLAGS = ["--config=configs/hotpotqa.py:cold,garl,q=0.75", "--workdir=gs://bucket/runs/cold_garl",
         """--config.rollout.closing_text=it's "so" $HOME; *"""]  # fmt: skip


@pytest.fixture
def tpu(tmp_path):
    """launch/tpu_vm with a `gcloud` whose only host is a folder: ssh runs the command there."""
    home = tmp_path / "home"
    shutil.copytree(LAUNCH, home / "qlog/launch")
    write_program(
        home / "qlog/.venv/bin/python", SAVES_ON_TERM, PYTHON=sys.executable,
        STARTED=home / "started",
    )  # fmt: skip
    write_program(tmp_path / "bin/gcloud", """
        #!/bin/bash
        echo "$*" >>@DIR@/calls
        case "$*" in
            *"queued-resources describe"*) cat @DIR@/state || { echo NOT_FOUND >&2; exit 1; } ;;
            *"queued-resources create"*) echo ACTIVE >@DIR@/state ;;
            *"queued-resources delete"*) rm @DIR@/state ;;
            *"tpu-vm ssh"*launch/install*) ;;
            *"tpu-vm ssh"*)
                cd @DIR@/home
                command="${*: -1}"
                HOME=@DIR@/home exec bash -c "${command#--command=}" ;;
        esac
    """, DIR=tmp_path)  # fmt: skip
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "QLOG_KEEP_SECONDS": "0.2"}

    def call(action, *flags, **options):
        where = ["--name=n", "--zone=z", "--type=v6e-16"]
        return run(LAUNCH / "tpu_vm", action, *where, "--", *flags, env=env, **options)

    call.home, call.state, call.calls = home, tmp_path / "state", tmp_path / "calls"
    yield call
    call("stop")


def test_tpu_vm_starts_shows_and_stops_a_run(tpu):
    started, status = tpu.home / "started", tpu.home / "qlog-cold-garl.status"
    tpu("run", *FLAGS)
    wait_until(started.exists)
    assert started.read_text().split("\0") == ["-m", "qlog.main", "--distributed=on", *FLAGS]
    tpu.state.write_text("ACTIVE\n")
    assert "ACTIVE" in (shown := tpu("status")) and "running" in shown
    assert "exited 143" in tpu("stop")
    assert (tpu.home / "started.saved").exists() and status.read_text() == "exited 143\n"


def test_tpu_vm_keep_makes_a_preempted_slice_again_and_stops_when_finished(tpu):
    tpu.state.write_text("SUSPENDED\n")
    write_program(tpu.home / "qlog/.venv/bin/python", "#!/bin/sh\nexit 0\n")
    assert "finished" in tpu("keep", *FLAGS)
    verbs = [
        verb for line in tpu.calls.read_text().splitlines()
        for verb in ("delete", "create", "scp", "install", "supervise") if f"{verb} " in line
    ]  # fmt: skip
    assert verbs == ["delete", "create", "scp", "install", "supervise"]


def test_tpu_vm_keep_starts_the_run_of_a_restarted_host(tpu):
    tpu.state.write_text("ACTIVE\n")
    (tpu.home / "qlog-cold-garl.status").write_text("running 99999999\n")  # A process long gone.
    write_program(tpu.home / "qlog/.venv/bin/python", "#!/bin/sh\nexit 0\n")
    assert "finished" in tpu("keep", *FLAGS)
    assert "launch/supervise" in tpu.calls.read_text()


def test_tpu_vm_keep_gives_up_on_wrong_settings(tpu):
    tpu.state.write_text("ACTIVE\n")
    write_program(tpu.home / "qlog/.venv/bin/python", "#!/bin/sh\nexit 2\n")
    assert "the run failed (exited 2)" in tpu("keep", *FLAGS, code=1)


def test_slurm_saves_and_queues_again_before_the_time_limit(tmp_path):
    started, calls = tmp_path / "started", tmp_path / "calls"
    shutil.copytree(LAUNCH, tmp_path / "launch")
    write_program(tmp_path / "bin/srun", SAVES_ON_TERM, PYTHON=sys.executable, STARTED=started)
    write_program(tmp_path / "bin/scontrol", '#!/bin/sh\necho "$@" >>@CALLS@\n', CALLS=calls)
    env = {
        **os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }  # fmt: skip
    process = subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", *FLAGS], env=env)
    wait_until(started.exists)
    at = (words := started.read_text().split("\0")).index("python")
    assert words[at:] == ["python", "-m", "qlog.main", "--distributed=on", *FLAGS]
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "started.saved").exists() and calls.read_text() == "requeue 17\n"


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
    print(f"devices {jax.local_device_count()} of {jax.device_count()} sum {int(total)}", flush=True)
    if sys.argv[1] == "die" and mine == 1:
        os._exit(5)
    step = 0
    while sys.argv[1] != "end":
        time.sleep(0.05)
        step += 1
        if multihost_utils.reached_preemption_sync_point(step):
            print("saved", flush=True)
            break
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


def test_local_passes_sigterm_on_and_waits_until_all_have_saved(tmp_path):
    program = write_program(tmp_path / "program.py", JAX_PROGRAM)
    logs = tmp_path / "logs"
    call = [LAUNCH / "local", "--processes=2", f"--logs={logs}", "--", program, "wait"]
    process = subprocess.Popen(call)
    files = [logs / f"process_{i}.log" for i in range(2)]
    wait_until(lambda: all(file.exists() and "sum" in file.read_text() for file in files))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert all("saved" in file.read_text() for file in files)


def test_local_dry_run_shows_a_command_per_process():
    call = ["--processes=3", "--dry-run", "--config=configs/quickstart.py", "--mode=train"]
    lines = run(LAUNCH / "local", *call).splitlines()
    assert len(lines) == 3
    for process, line in enumerate(lines):
        assert f" JAX_PROCESS_ID={process} " in line and " JAX_NUM_PROCESSES=3 " in line
        assert line.endswith(
            " -m qlog.main --distributed=on --config=configs/quickstart.py --mode=train"
        )
