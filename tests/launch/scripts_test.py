"""The launch scripts as files, and what they would run: shellcheck, YAML, dry runs, mistakes."""

import ast
import configparser
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from launch_fixtures import FLAGS as DOCUMENTED
from launch_fixtures import JOBSET, check, misfits
from places import ROOT
from processes import run

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(p for p in LAUNCH.iterdir() if p.is_file() and p.stat().st_mode & 0o100)
SHELL = [p for p in SCRIPTS if p.read_text().startswith("#!/usr/bin/env bash")]
SOURCED = [LAUNCH / "lib.sh", LAUNCH / "env.sh", LAUNCH / "slurm.sbatch", ROOT / ".ci/run"]
CLOUD = ["docker", "gcluster", "gke", "skypilot", "slurm", "stage", "sweep", "tpu_vm", "xpk"]

WORKDIR = "gs://bucket/runs/cold_garl"
# The last one breaks every careless quoting.
FLAGS = [
    "--config=configs/hotpotqa.py:cold,garl,q=0.75",
    f"--workdir={WORKDIR}",
    """--config.rollout.closing_text=it's "so" $HOME; *""",
]


def printed(output):
    """The commands that a dry run printed, as the words a shell would see."""
    output = re.sub(r"^launch/.*\n", "", output, flags=re.MULTILINE)  # what a script says on stderr
    commands = [shlex.split(part) for part in re.split(r"^\+ ", output, flags=re.MULTILINE)[1:]]
    for words in commands:
        if words[0] in {name.split()[0] for name in DOCUMENTED}:
            check(words)  # a flag that the tool does not have
    return commands


# The files themselves


@pytest.mark.parametrize("script", SHELL + SOURCED, ids=lambda p: p.name)
def test_bash_parses(script):
    run("bash", "-n", script)


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:/usr/bin")
    if not shellcheck:
        pytest.skip("no shellcheck for this machine")
    run(shellcheck, "--external-sources", *SHELL, *SOURCED)


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - set(SHELL)), ids=lambda p: p.name)
def test_python_scripts_parse(script):
    ast.parse(script.read_text())


@pytest.mark.parametrize("name", [*CLOUD, "local", "supervise"])
def test_help_shows_how_to_call_it(name):
    output = run(LAUNCH / name, "--help")
    assert f"launch/{name} " in output and "shellcheck" not in output


def test_readme_names_every_script():
    readme = (LAUNCH / "README.md").read_text()
    names = {path.name for path in LAUNCH.iterdir()} - {"README.md"}
    assert not [name for name in names if name not in readme]


@pytest.mark.parametrize("name", ["skypilot.yaml", "jobset.yaml"])
def test_yaml_parses(name):
    assert isinstance(yaml.safe_load((LAUNCH / name).read_text()), dict)


def test_dockerfile_copies_what_is_there():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    sources = [w for line in lines if line.startswith("COPY") for w in line.split()[1:-1]]
    assert sources and not [s for s in sources if not (ROOT / s).exists()]


def test_constraints_pin_every_requirement():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    wanted = "\n".join([config["options"]["install_requires"], *extras.values()])
    names = {
        re.split(r"[\[<>=; ]", line)[0]
        for line in wanted.splitlines()
        if line and not line.startswith(("#", "qlog["))
    }
    pins = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.lstrip().startswith("#")
    ]
    assert all(re.match(r"[a-z0-9-]+==\d", pin) for pin in pins)
    pinned = {pin.partition("==")[0] for pin in pins}
    assert {re.sub(r"[-_.]+", "-", name.lower()) for name in names} <= pinned


# Dry runs: the printed command, read back as a shell would read it

PRINTED = {
    "docker --image=I --push": [
        "docker build --file=launch/Dockerfile --build-arg=EXTRA=tpu "
        "--build-arg=PLATFORM=tpu --tag=I .",
        "docker push I",
    ],
    "tpu_vm create --name=n --zone=z --type=v5litepod-16 --spot": [
        "gcloud compute tpus queued-resources create n --node-id=n --zone=z "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"
    ],
    "tpu_vm create --name=n --zone=z --type=v6e-16 --service-account=a@b --network=n "
    "--subnetwork=s --internal-ips --labels=team=x --valid-until-duration=6h": [
        "gcloud compute tpus queued-resources create n --node-id=n --zone=z "
        "--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --internal-ips "
        "--service-account=a@b --network=n --subnetwork=s --labels=team=x "
        "--valid-until-duration=6h"
    ],
    "tpu_vm delete --name=n --zone=z --project=p": [
        "gcloud compute tpus queued-resources delete n --zone=z --project=p --force --quiet"
    ],
}


@pytest.mark.parametrize("call", PRINTED)
def test_dry_run_prints_the_commands(call):
    script, *options = call.split()
    output = printed(run(LAUNCH / script, *options, "--dry-run"))
    assert output == [shlex.split(line) for line in PRINTED[call]]


PROGRAM = ["python", "-m", "qlog.main", "--distributed=on", *FLAGS]
SUPERVISE = ["launch/supervise", "--restarts=3", "--"]
ON_CLOUD = {
    "gcluster": (
        "gcluster --cluster=c --location=l --image=I --type=ct6e-standard-4t --topology=4x4"
    ),
    "xpk": "xpk --cluster=c --zone=z --image=I --type=v6e-16",
}


def on_host(name, *options, flags=FLAGS):
    """(the command line but its last word, the words that the host runs)."""
    script, *rest = [*ON_CLOUD[name].split(), *options]
    output = run(LAUNCH / script, *rest, "--dry-run", "--", *flags)
    ((*command, last),) = printed(output)
    return command, shlex.split(last.removeprefix("--command="))


def test_gcluster_and_xpk_hand_over_one_command():
    command, words = on_host("gcluster", "--assets=gs://b/some/assets", "--service-account=s")
    assert (
        command
        == (
            "gcluster job submit --cluster=c --location=l --name=cold-garl --image=I "
            "--compute-type=ct6e-standard-4t --topology=4x4 --num-slices=1 --restarts=3 "
            "--grace-period=300s --restart-on-exit-codes=1,75,132,134,135,136,137,139,143 "
            "--service-account=s --mount=gs://b:/bucket:ro"
        ).split()
    )
    environment = ["env", "JAX_PLATFORMS=tpu,cpu", "QLOG_ASSETS=/bucket/some/assets"]
    assert words == [*environment, *SUPERVISE, *PROGRAM]
    options = ["--name=mine", "--grace=60", "--compile-cache=gs://b/xla", "--assets=gs://b/a"]
    command, words = on_host("xpk", *options)
    assert (
        command
        == (
            "xpk workload create --cluster=c --zone=z --workload=mine --tpu-type=v6e-16 "
            "--num-slices=1 --docker-image=I --max-restarts=3 --termination-grace-period-seconds=60"
        ).split()
    )
    environment = environment[:2] + ["QLOG_ASSETS=gs://b/a", "JAX_COMPILATION_CACHE_DIR=gs://b/xla"]
    assert words == [*environment, *SUPERVISE, *PROGRAM]


def test_slurm_submits_the_flags_as_they_are():
    call = [
        "--nodes=2",
        "--gpus-per-node=8",
        "--partition=p",
        "--grace=90",
        "--mem=0",
        "--exclusive",
        "--container-image=I",
        "--assets=/shared/assets",
        "--dry-run",
        "--",
    ]
    (command,) = printed(run(LAUNCH / "slurm", *call, *FLAGS))
    assert command[:4] == [
        "env",
        "JAX_PLATFORMS=cuda,cpu",
        "QLOG_ASSETS=/shared/assets",
        "QLOG_CONTAINER_IMAGE=I",
    ]
    at = command.index("launch/slurm.sbatch")
    assert check(command[4:at]) == "sbatch" and command[at + 1 :] == FLAGS
    assert {
        "--nodes=2",
        "--ntasks-per-node=8",
        "--signal=B:USR1@90",
        "--mem=0",
        "--exclusive",
        "--export=ALL",
    } <= set(command[:at])


DOCTOR = ["-m", "qlog.commands.doctor", "--config=configs/hotpotqa.py:cold,garl"]


@pytest.mark.parametrize(
    "call",
    [
        *ON_CLOUD.values(),
        "slurm --gpus-per-node=8",
        "skypilot --gpus=H100:8",
        "tpu_vm run --name=n --zone=z",
        "gke --image=I --type=v6e --topology=4x4",
        "local --processes=1",
    ],
)
def test_another_module_starts_through_every_launcher(call):
    script, *options = call.split()
    output = run(LAUNCH / script, *options, "--dry-run", "--", *DOCTOR)
    assert "qlog.main" not in output
    words = output.replace('"', " ").replace(",", " ").replace("'", " ").replace("=", " ").split()
    assert (
        "qlog.commands.doctor" in words and words[words.index("qlog.commands.doctor") - 1] == "-m"
    )


def test_skypilot_passes_the_flags_through_the_environment():
    call = ["--gpus=tpu-v6e-16", "--spot", "--managed", "--dry-run", "--"]
    (command,) = printed(run(LAUNCH / "skypilot", *call, *FLAGS))
    assert command[:4] == ["sky", "jobs", "launch", "--name=cold-garl"]
    assert {"--gpus=tpu-v6e-16", "--use-spot", "launch/skypilot.yaml"} <= set(command)
    assert "--env=JAX_PLATFORMS=tpu,cpu" in command
    (value,) = [word for word in command if word.startswith("--env=QLOG_COMMAND=")]
    script = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["run"].splitlines()[0]
    output = run(
        "bash",
        "-c",
        f'{script}\nprintf "%s\\0" "$@"',
        env={"QLOG_COMMAND": value.removeprefix("--env=QLOG_COMMAND=")},
    )
    assert output.split("\0")[:-1] == PROGRAM


def test_skypilot_never_repeats_what_would_go_wrong_again():
    recovery = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75, 143]}


@pytest.mark.parametrize("platforms, extra", [("tpu,cpu", "tpu"), ("cuda,cpu", "cuda")])
def test_skypilot_installs_for_the_accelerator(tmp_path, platforms, extra):
    setup = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["setup"]
    for path in (".venv/bin/python", "launch/install"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text("#!/bin/sh\necho $1\n")
        (tmp_path / path).chmod(0o755)
    # SkyPilot counts TPUs in it as well.
    env = {"JAX_PLATFORMS": platforms, "SKYPILOT_SETUP_NUM_GPUS_PER_NODE": "1"}
    assert run("bash", "-c", f"cd {tmp_path}; {setup}", env=env) == f"{extra}\n"


def gke(*options):
    call = ["--image=I", "--type=v6e", "--dry-run", *options, "--", *FLAGS]
    job = yaml.safe_load(run(LAUNCH / "gke", *call))
    assert not misfits(job, JOBSET)
    return job, job["spec"]["replicatedJobs"][0]["template"]["spec"]


def as_run(words):
    """The words as Kubernetes hands them on."""
    return [word.replace("$$", "$") for word in words]


def test_gke_fills_in_the_jobset():
    job, slice_ = gke("--topology=4x8", "--slices=2", "--grace=120")
    pod = slice_["template"]["spec"]
    container = pod["containers"][0]
    assert job["metadata"]["name"] == "cold-garl"
    assert job["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert slice_["completions"] == slice_["parallelism"] == 8 and slice_["backoffLimit"] == 0
    assert pod["terminationGracePeriodSeconds"] == 120
    assert container["command"] + as_run(container["args"]) == [*SUPERVISE, *PROGRAM]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["env"] == [{"name": "JAX_PLATFORMS", "value": "tpu,cpu"}]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    assert "kueue.x-k8s.io/queue-name" not in job["metadata"]["labels"]
    assert [volume["name"] for volume in pod["volumes"]] == ["secrets"]
    assert pod["hostNetwork"] and pod["dnsPolicy"] == "ClusterFirstWithHostNet"


# The messages of Kubernetes' Job controller (pkg/controller/job/pod_failure_policy.go).
EXITED = (
    "Container qlog for pod default/n-0-1 failed with exit code {} matching FailJob rule at index 0"
)
EVICTED = "Pod default/n-0-1 has condition DisruptionTarget matching FailJob rule at index 1"


@pytest.mark.parametrize(
    "reason, message, action",
    [
        ("PodFailurePolicy", EXITED.format(2), "FailJobSet"),
        ("PodFailurePolicy", EXITED.format(3), "FailJobSet"),
        ("PodFailurePolicy", EVICTED, "RestartJobSetAndIgnoreMaxRestarts"),
        ("BackoffLimitExceeded", "Job has reached the specified backoff limit", "RestartJobSet"),
    ],
)
def test_gke_restarts_what_was_preempted_and_fails_what_would_go_wrong_again(
    reason, message, action
):
    job, slice_ = gke("--topology=4x4")
    policy = job["spec"]["failurePolicy"]
    taken = [
        rule["action"]
        for rule in policy["rules"]
        if reason in rule["onJobFailureReasons"]
        and any(re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"])
    ]
    assert [*taken, "RestartJobSet"][0] == action and policy[
        "maxRestarts"
    ] == 3  # its default action
    codes, conditions = slice_["podFailurePolicy"]["rules"]
    assert codes["onExitCodes"]["values"] == [2, 3]
    assert conditions["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_gke_options_add_their_lines():
    options = [
        "--queue=q",
        "--spot",
        "--service-account=s",
        "--assets=gs://b/some/assets",
        "--reservation=r",
        "--flex-start",
        "--node-selector=pool=mine",
        "--env=LIBTPU_INIT_ARGS=--a=b $X",
        "--compile-cache=gs://b/xla",
    ]
    job, slice_ = gke("--topology=2x2", *options)
    pod = slice_["template"]["spec"]
    container = pod["containers"][0]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    assert pod["serviceAccountName"] == "s" and slice_["completions"] == 1
    selector = {
        "cloud.google.com/gke-spot": "true",
        "cloud.google.com/gke-flex-start": "true",
        "cloud.google.com/reservation-name": "r",
        "pool": "mine",
    }
    assert selector.items() <= pod["nodeSelector"].items()
    assert {e["name"]: as_run([e["value"]])[0] for e in container["env"]} == {
        "JAX_PLATFORMS": "tpu,cpu",
        "QLOG_ASSETS": "/assets",
        "JAX_COMPILATION_CACHE_DIR": "gs://b/xla",
        "LIBTPU_INIT_ARGS": "--a=b $X",
    }
    attributes = pod["volumes"][1]["csi"]["volumeAttributes"]
    assert attributes == {"bucketName": "b", "mountOptions": "only-dir=some/assets,implicit-dirs"}
    assert container["volumeMounts"][1]["mountPath"] == "/assets"
    assert slice_["template"]["metadata"]["annotations"]["gke-gcsfuse/cpu-limit"] == "0"
    assert "hostNetwork" not in pod
    _, slice_ = gke("--topology=4x4", "--slices=2", "--assets=gs://b/a")
    attributes = slice_["template"]["spec"]["volumes"][1]["csi"]["volumeAttributes"]
    assert attributes["hostNetworkPodKSA"] == "true"


@pytest.mark.parametrize(
    "options, hosts, chips",
    [
        ("--type=v5e --topology=2x4", 1, 8),
        ("--type=v6e --topology=2x4", 1, 8),
        ("--type=v6e --topology=1x1", 1, 1),
        ("--type=v5e --topology=2x4 --chips-per-host=4", 2, 4),
        ("--type=v6e --topology=2x4 --slices=2", 2, 4),
        ("--type=v5e --topology=4x4", 4, 4),
        ("--type=v5p --topology=2x2x1", 1, 4),
        ("--type=tpu7x --topology=2x2x2", 2, 4),
    ],
)
def test_gke_knows_the_chips_of_a_host(options, hosts, chips):
    _, slice_ = gke(*options.split())
    limits = slice_["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (slice_["completions"], limits["google.com/tpu"]) == (hosts, chips)


# The flags against the tools themselves


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [c for c in DOCUMENTED if c.startswith(("gcloud", "kubectl", "sbatch", "srun"))]
)
def test_the_tools_know_the_flags(command):
    """Where they are installed: `TOOL --help` names every flag that the stand-in takes."""
    tool = command.split()[0]
    if not shutil.which(tool):
        pytest.skip(f"no {tool} on this machine")
    known = re.sub(r"\x1b\[[0-9;]*m", "", run(*command.split(), "--help"))
    pyxis = {flag for flag in DOCUMENTED[command] if flag.startswith("--container-")}
    assert not [f for f in DOCUMENTED[command] - pyxis if not re.search(rf"{f}\b", known)]


def environment_with(folder, *packages):
    """The Python of a new environment with the packages; needs a package registry."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin/pip", "install", "--quiet", *packages], check=True, timeout=900)
    return folder / "bin/python"


@pytest.fixture(scope="module")
def pypi(tmp_path_factory):
    return environment_with(
        tmp_path_factory.mktemp("pypi"), "xpk==1.16.0", "kubernetes==35.0.0", "pyyaml"
    )


SKYPILOT = """
import json, sys
import jsonschema, yaml
from sky.client.cli.command import cli
from sky.utils import schemas

task = yaml.safe_load(open(sys.argv[1]))
jsonschema.validate(task, schemas.get_task_schema())
jsonschema.validate(task["resources"], schemas.get_resources_schema())
for words, flags in json.loads(sys.argv[2]).items():
    command = cli
    for word in words.split()[1:]:
        command = command.commands[word]
    known = {flag for parameter in command.params for flag in getattr(parameter, "opts", [])}
    assert set(flags) <= known, (words, set(flags) - known)
"""


@pytest.mark.slow
def test_skypilot_takes_the_task_and_the_flags(tmp_path):
    python = environment_with(tmp_path / "sky", "skypilot==0.14.1")
    flags = {name: sorted(flags) for name, flags in DOCUMENTED.items() if name.startswith("sky")}
    run(
        python,
        "-c",
        SKYPILOT,
        LAUNCH / "skypilot.yaml",
        json.dumps(flags),
        env={"HOME": str(tmp_path)},
    )


XPK = """
import argparse, sys
from xpk.parser.core import set_parser

parser = argparse.ArgumentParser()
set_parser(parser)
options = parser.parse_args(sys.argv[1:])
grace = options.termination_grace_period_seconds
print(options.workload, options.tpu_type, options.max_restarts, grace)
print(options.command)
"""


@pytest.mark.slow
def test_xpk_parses_what_it_is_given(pypi):
    call = [
        "--project=p",
        "--spot",
        "--slices=2",
        "--name=mine",
        "--grace=60",
        "--dry-run",
        "--",
        *FLAGS,
    ]
    ((_, *words),) = printed(run(LAUNCH / "xpk", *ON_CLOUD["xpk"].split()[1:], *call))
    output = run(pypi, "-c", XPK, *words).splitlines()
    assert output[-2] == "mine v6e-16 3 60"
    assert shlex.split(output[-1]) == ["env", "JAX_PLATFORMS=tpu,cpu", *SUPERVISE, *PROGRAM]


# Every field of the Job's template is one of the API's models, with the model's type.
TEMPLATE = """
import sys, yaml
from kubernetes.client import models

def check(value, kind, where):
    if kind.lower().startswith("list["):
        assert isinstance(value, list), where
        for item in value:
            check(item, kind[5:-1], where)
    elif kind.lower().startswith("dict("):
        for key, item in value.items():
            check(item, kind[5:-1].split(", ")[1], f"{where}.{key}")
    elif hasattr(models, kind):
        model = getattr(models, kind)
        fields = {name: field for field, name in model.attribute_map.items()}
        for key, item in value.items():
            assert key in fields, f"{where}.{key}: {kind} has no such field"
            check(item, model.openapi_types[fields[key]], f"{where}.{key}")
        checked.append(where)
    elif ".limits." not in where:  # a quantity may be a number
        assert type(value).__name__ == kind, f"{where}: {value!r} is no {kind}"

checked = []
job = yaml.safe_load(sys.stdin)["spec"]["replicatedJobs"][0]
check(job["template"], "V1JobTemplateSpec", "template")
print(len(checked))
"""


@pytest.mark.slow
def test_kubernetes_models_take_the_job(pypi):
    call = [
        "--image=I",
        "--type=v6e",
        "--topology=4x4",
        "--slices=2",
        "--assets=gs://b/a",
        "--service-account=s",
        "--dry-run",
        "--",
        *FLAGS,
    ]
    manifest = run(LAUNCH / "gke", *call)
    result = subprocess.run(
        [pypi, "-c", TEMPLATE], input=manifest, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 15


# Mistakes


@pytest.mark.parametrize(
    "call, message",
    [
        ("gcluster --clustr=c", "unknown option --clustr=c"),
        ("gcluster --cluster=c", "--location is needed"),
        ("docker --image=I --extra=gpu", "--extra=gpu: choose tpu, cuda or cuda13"),
        ("xpk --cluster=c --zone=z --image=I --type=v6e-16 -- --config=x", "--workdir=gs://"),
        ("slurm --gpus-per-node=8 -- --config=x", "--workdir="),
        ("tpu_vm create --name=n --zone=z --type=tpu7x-8", "use launch/gke"),
        ("tpu_vm run --name=n --zone=z -- --workdir=runs/x", "--workdir=gs://"),
        ("tpu_vm create --name=n --zone=z --type=v6e-16 --slices=2", "launch/gke --slices"),
        (
            f"{ON_CLOUD['gcluster']} --assets=gs://b -- --workdir=gs://b/r",
            "give gs://BUCKET/FOLDER",
        ),
        ("supervise --restarts=x -- true", "--restarts=x"),
        ("skypilot --gpus=H100:8 -- --workdir=runs/x", "a gs:// bucket is needed"),
        ("supervise", "give the command to run"),
        (
            "install gpu",
            "there is no extra 'gpu'; choose from train, gcs, s3, wandb, test, tpu, cuda",
        ),
        ("install cuda13 cuda", "cuda and cuda13 drive the same GPUs: choose one"),
    ],
)
def test_mistakes_end_in_one_sentence(call, message):
    script, *options = call.split()
    output = run(LAUNCH / script, *options, code=1)
    assert message in output and len(output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "call, message",
    [
        ("gke --image=I --type=v6e --topology=4by4 -- --workdir=gs://b/r", "--topology=4by4"),
        ("gke --image=I --type=v6e --topology=4x4 -- --workdir=runs/r", "--workdir=gs://"),
        ("gke --image=I --type=v6e --topology=2x2 --slices=2 -- --workdir=gs://b/r", "--slices=2"),
        ("local --processes=0 --config=x", "--processes=0"),
        ("local", "nothing to run"),
        ("local --proceses=2 -- x.py", "--proceses=2: unknown option"),
        ("sweep --runs=none --workdir=w", "--runs=none: no such file"),
    ],
)
def test_mistakes_of_python_scripts(call, message):
    script, *options = call.split()
    assert message in run(LAUNCH / script, *options, code=2)
