"""Stand-ins for the tools of clouds and clusters.

They keep state, and refuse flags that the real tools do not have. `install(folder, *names)` puts
them on a PATH of their own.

The flags were read in `gcloud ... --help` (SDK 528.0.0) and `kubectl ... --help` (1.32.4), in the
manuals of sbatch and srun (SchedMD/slurm 284c3b95f0; the --container ones are pyxis's), in
cmd/job/submit.go of Cluster Toolkit (104708037), in xpk's parser (1.16.0) and in SkyPilot's command
line (0.14.1). Only flags that qlog might use are listed.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from places import ROOT

_WHERE = {"--zone", "--project", "--quiet", "--format"}
_SSH = _WHERE | {
    "--worker",
    "--command",
    "--internal-ip",
    "--ssh-flag",
    "--ssh-key-file",
    "--output-directory",
}
FLAGS = {
    "gcloud compute tpus queued-resources create": _WHERE
    | {
        "--accelerator-type",
        "--async",
        "--data-disk",
        "--description",
        "--guaranteed",
        "--internal-ips",
        "--labels",
        "--metadata",
        "--metadata-from-file",
        "--network",
        "--node-count",
        "--node-id",
        "--node-prefix",
        "--range",
        "--reserved",
        "--runtime-version",
        "--scopes",
        "--service-account",
        "--shielded-secure-boot",
        "--spot",
        "--subnetwork",
        "--tags",
        "--topology",
        "--type",
        "--valid-after-duration",
        "--valid-after-time",
        "--valid-until-duration",
        "--valid-until-time",
    },
    "gcloud compute tpus queued-resources delete": _WHERE | {"--async", "--force"},
    "gcloud compute tpus queued-resources describe": _WHERE,
    "gcloud compute tpus tpu-vm ssh": _SSH,
    "gcloud compute tpus tpu-vm scp": (_SSH - {"--ssh-flag", "--output-directory"})
    | {
        "--compress",
        "--recurse",
        "--scp-flag",
    },
    "gcloud storage rsync": {
        "--recursive",
        "--delete-unmatched-destination-objects",
        "--exclude",
        "--dry-run",
    },
    "kubectl apply": {"--filename", "--dry-run", "--server-side", "--validate"},
    "kubectl delete": {"--wait", "--ignore-not-found", "--timeout"},
    "kubectl get": {"--ignore-not-found", "--output", "--selector", "--watch"},
    "kubectl logs": {"--follow", "--selector", "--container", "--tail", "--prefix"},
    "sbatch": {
        "--account",
        "--constraint",
        "--cpus-per-task",
        "--exclusive",
        "--export",
        "--gpus-per-node",
        "--gres",
        "--job-name",
        "--mem",
        "--nodes",
        "--ntasks-per-node",
        "--open-mode",
        "--output",
        "--partition",
        "--qos",
        "--requeue",
        "--signal",
        "--time",
    },
    "srun": {
        "--cpu-bind",
        "--cpus-per-task",
        "--export",
        "--gpu-bind",
        "--kill-on-bad-exit",
        "--label",
        "--mem",
        "--output",
        "--signal",
        "--container-image",
        "--container-mounts",
        "--container-workdir",
    },
    "scontrol requeue": set(),
    "scontrol show": set(),
    "gcluster job submit": {
        "--await-job-completion",
        "--cluster",
        "--command",
        "--compute-type",
        "--cpu-affinity",
        "--gke-nap-provisioning",
        "--gke-nap-reservation",
        "--gke-scheduler",
        "--gke-ttl-after-finished",
        "--grace-period",
        "--image",
        "--image-pull-secret",
        "--location",
        "--mount",
        "--name",
        "--node-constraint",
        "--num-nodes",
        "--num-slices",
        "--placement-policy",
        "--priority",
        "--project",
        "--queue",
        "--restart-on-exit-codes",
        "--restarts",
        "--service-account",
        "--timeout",
        "--topology",
        "--verbose",
    },
    "xpk workload create": {
        "--cluster",
        "--command",
        "--docker-image",
        "--env",
        "--env-file",
        "--flex",
        "--max-restarts",
        "--num-slices",
        "--on-demand",
        "--priority",
        "--project",
        "--reservation",
        "--restart-on-exit-codes",
        "--scheduler",
        "--spot",
        "--storage",
        "--termination-grace-period-seconds",
        "--tpu-type",
        "--ttl-seconds-after-finished",
        "--workload",
        "--zone",
    },
    "docker build": {"--build-arg", "--file", "--platform", "--tag"},
    "docker push": set(),
    "sky launch": {"--cluster", "--env", "--gpus", "--num-nodes", "--use-spot", "--yes"},
    "sky jobs launch": {"--env", "--gpus", "--name", "--num-nodes", "--use-spot", "--yes"},
}

# A JobSet's fields that qlog may use, of v1alpha2 as of v0.10.0 (config/components/crd) and
# batch/v1: a type, [a type] for a list, {field: ...}, {str: type} for any names, or the values
# allowed.
_POD = {
    "restartPolicy": {"Never"},
    "hostNetwork": bool,
    "dnsPolicy": {"ClusterFirstWithHostNet", "ClusterFirst"},
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
    "automountServiceAccountToken": bool,
    "nodeSelector": {str: str},
    "tolerations": [{"key": str, "operator": {"Exists", "Equal"}, "effect": str, "value": str}],
    "containers": [
        {
            "name": str,
            "image": str,
            "workingDir": str,
            "command": [str],
            "args": [str],
            "env": [{"name": str, "value": str}],
            "ports": [{"containerPort": int}],
            "resources": {"limits": {str: int}},
            "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
        }
    ],
    "volumes": [
        {
            "name": str,
            "secret": {"secretName": str, "optional": bool},
            "csi": {"driver": str, "readOnly": bool, "volumeAttributes": {str: str}},
        }
    ],
}
_JOB = {
    "backoffLimit": int,
    "completionMode": {"Indexed"},
    "completions": int,
    "parallelism": int,
    "podFailurePolicy": {
        "rules": [
            {
                "action": {"FailJob", "Ignore", "Count", "FailIndex"},
                "onExitCodes": {"containerName": str, "operator": {"In", "NotIn"}, "values": [int]},
                "onPodConditions": [{"type": str, "status": {"True", "False"}}],
            }
        ]
    },
    "template": {"metadata": {"labels": {str: str}, "annotations": {str: str}}, "spec": _POD},
}
JOBSET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {"name": str, "labels": {str: str}, "annotations": {str: str}},
    "spec": {
        "ttlSecondsAfterFinished": int,
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": {"Recreate", "BlockingRecreate", "InPlaceRestart"},
            "rules": [
                {
                    "name": str,
                    "onJobFailureReasons": [str],
                    "onJobFailureMessagePatterns": [str],
                    "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
                }
            ],
        },
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool, "subdomain": str},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": _JOB}}],
    },
}


def misfits(value, schema, where="") -> list[str]:
    """What in `value` is not as `schema` says."""
    if isinstance(schema, set):
        return [] if value in schema else [f"{where}: {value!r}, not one of {sorted(schema)}"]
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{where}: {value!r} is no {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return [
            m for i, item in enumerate(value) for m in misfits(item, schema[0], f"{where}[{i}]")
        ]
    if not isinstance(value, dict):
        return [f"{where}: {value!r} has no fields"]
    found = []
    for key, item in value.items():
        known = schema.get(key, schema.get(str))
        found += (
            [f"{where}.{key}: no such field"]
            if known is None
            else misfits(item, known, f"{where}.{key}")
        )
    return found


def check(words: list[str]) -> str:
    """The subcommand that `words` call; exits with 2 on a flag that it does not have."""
    for name in sorted(FLAGS, key=len, reverse=True):
        if words[: len(name.split())] == name.split():
            # What follows a program's name is its own.
            mine = words[len(name.split()) :]
            if name in ("sbatch", "srun"):
                end = next(
                    (i for i, word in enumerate(mine) if not word.startswith("--")), len(mine)
                )
                mine = mine[:end]
            for word in mine:
                flag = word.partition("=")[0]
                if word.startswith("-") and flag not in FLAGS[name]:
                    sys.exit(f"{name}: unrecognized arguments: {word}")
            return name
    sys.exit(f"no such command: {' '.join(words[:5])}")


def install(folder: pathlib.Path, *names: str) -> str:
    """Makes stand-ins whose state is in `folder`; returns the PATH that finds them first."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / "bin" / name
        path.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
            f"import pathlib, launch_fixtures\n"
            f"launch_fixtures.main(pathlib.Path({str(folder)!r}), [{name!r}, *sys.argv[1:]])\n"
        )
        path.chmod(0o755)
    return f"{folder}/bin:{os.environ['PATH']}"


def main(folder: pathlib.Path, words: list[str]):
    """What a stand-in does."""
    with open(folder / "calls", "a") as calls:
        calls.write(json.dumps(words) + "\n")
    command = check(words)
    options = dict(w.partition("=")[::2] for w in words if w.startswith("--"))
    rest = [w for w in words[len(command.split()) :] if not w.startswith("-")]
    sys.exit(_TOOLS[words[0]](folder, command, options, rest, words) or 0)


def calls(folder: pathlib.Path) -> list[list[str]]:
    """The command lines that the stand-ins got."""
    file = folder / "calls"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# gcloud: one queued resource in `folder/state`, whose hosts are the folders home*.


def _gcloud(folder, command, options, rest, words):
    state = folder / "state"
    if command.startswith("gcloud storage"):
        return 0
    if not options.get("--zone"):
        return "--zone is needed"
    if command.endswith("create"):
        if state.exists():
            return "ALREADY_EXISTS"
        if "--node-id" not in options or "--runtime-version" not in options:
            return "--node-id and --runtime-version are needed"
        for dead in folder.glob("home*/dead"):
            dead.unlink()
        state.write_text(
            (folder / "next_state").read_text() if (folder / "next_state").exists() else "ACTIVE"
        )
        return 0
    if command.endswith("describe") or command.endswith("delete"):
        if not state.exists():
            return "NOT_FOUND: no such queued resource"
        if command.endswith("describe"):
            print(state.read_text().strip())
        else:
            state.unlink()
        return 0
    if not state.exists() or state.read_text().strip() != "ACTIVE":
        return "the TPU is not there"
    homes = sorted(folder.glob("home*"))
    if options.get("--worker", "0") != "all":
        homes = [homes[int(options.get("--worker", "0"))]]
    codes = []
    for home in homes:
        if (home / "dead").exists():
            codes.append(255)
        elif command.endswith("scp"):
            source, _, target = rest[0], *rest[1].partition(":")[::2]
            shutil.copy(source, home / (target or pathlib.Path(source).name))
        else:
            script = options["--command"].replace("launch/install tpu", "echo tpu >installed")
            codes.append(
                subprocess.run(
                    ["bash", "-c", script],
                    cwd=home,
                    check=False,
                    env={**os.environ, "HOME": str(home)},
                ).returncode
            )
    return max(codes, default=0)


# kubectl: JobSets as files in `folder/jobsets`, of fields that the API has.


def _kubectl(folder, command, options, rest, words):
    jobsets = folder / "jobsets"
    jobsets.mkdir(exist_ok=True)
    if command == "kubectl apply":
        import yaml

        manifest = yaml.safe_load(sys.stdin)
        if wrong := misfits(manifest, JOBSET):
            return "; ".join(wrong)
        file = jobsets / manifest["metadata"]["name"]
        if file.exists():
            return "JobSet is immutable"
        file.write_text(json.dumps(manifest))
        return 0
    file = jobsets / rest[1]
    if command == "kubectl delete":
        file.unlink()
    elif file.exists():
        print(file.read_text())
    elif "--ignore-not-found" not in options:
        return "NotFound"
    return 0


# SLURM: srun follows `folder/plan`, a line per start: "exit 7", or "wait" for SIGTERM, then exit 0;
# before it, "save 5" makes a checkpoint and "finish" results.json in the workdir.


def _srun(folder, command, options, rest, words):
    lines = (folder / "plan").read_text().splitlines()
    (folder / "plan").write_text("\n".join(lines[1:]))
    at = words.index("python")
    flags = dict(w.partition("=")[::2] for w in words[at:])
    (folder / "started").write_text(json.dumps(words[1:]))
    for word in filter(None, (lines or [""])[0].split(", ")):
        verb, _, argument = word.partition(" ")
        if verb == "wait":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            time.sleep(60)
        elif verb == "exit":
            return int(argument)
        elif verb == "save":
            pathlib.Path(flags["--workdir"], "checkpoints", argument).mkdir(parents=True)
        elif verb == "finish":
            pathlib.Path(flags["--workdir"], "results.json").write_text("{}")
    return 0


def _scontrol(folder, command, options, rest, words):
    if command.endswith("show"):
        state = folder / "job_state"
        print(f"JobId=17 JobState={state.read_text() if state.exists() else 'RUNNING'}")
    return 0


def _prints(folder, command, options, rest, words):
    return 0


_TOOLS = {
    "gcloud": _gcloud,
    "kubectl": _kubectl,
    "srun": _srun,
    "scontrol": _scontrol,
    "sbatch": _prints,
    "gcluster": _prints,
    "xpk": _prints,
    "docker": _prints,
    "sky": _prints,
}
