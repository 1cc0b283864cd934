"""Stand-ins for clusters: commands that keep state in a folder, and the jobs, played here.

`kubectl apply`, `sbatch` and the like leave a job in the folder; a thread writes what its run would
write into its workdir. A JobSet keeps its name, ended or not, until it is deleted, as in GKE.
"""

import contextlib
import json
import pathlib
import threading
import time

import yaml

from qlog.storage import paths

TICK = 0.05  # seconds between a run's heartbeats

KUBECTL = r"""#!/bin/bash
echo "kubectl $*" >>@DIR@/calls
case "$1 $2" in
    "apply --filename=-")
        cat >@DIR@/applied.$$
        name=$(sed -n 's/^  name: //p' @DIR@/applied.$$ | head -n 1)
        if [ -e "@DIR@/$name.job" ]; then echo "$name: field is immutable" >&2; exit 1; fi
        mv @DIR@/applied.$$ "@DIR@/$name.job" ;;
    "get jobset")
        [ -e "@DIR@/$3.job" ] || exit 0
        state=$(cat "@DIR@/$3.state" 2>/dev/null)
        condition="{\"type\": \"${state:-StartupPolicyCompleted}\", \"status\": \"True\"}"
        echo "{\"status\": {\"conditions\": [$condition]}}" ;;
    "delete jobset") rm -f "@DIR@/$3.job" "@DIR@/$3.state" ;;
    *) echo "unknown command: $*" >&2; exit 1 ;;
esac
"""

SBATCH = """#!/bin/bash
echo "sbatch $*" >>@DIR@/calls
for word; do case $word in --job-name=*) name=${word#*=} ;; esac; done
rm -f "@DIR@/$name.state"
printf '%s\\n' "$@" >"@DIR@/$name.part"
mv "@DIR@/$name.part" "@DIR@/$name.job"
echo "Submitted batch job 17"
"""

SQUEUE = """#!/bin/bash
for word; do case $word in --name=*) name=${word#*=} ;; esac; done
if [ -e "@DIR@/$name.job" ] && [ ! -e "@DIR@/$name.state" ]; then echo RUNNING; fi
"""


class Cluster:
    """Plays the jobs of a folder.

    Args:
      behaviours: the name of a run -> what each of its tries does:
        finish: it ends with results;
        fail: it ends without results, and does not say why;
        settings: it ends with exit code 2;
        pause: it is silent for a while and goes on, as after a preemption that the scheduler mends;
        queue: it waits until `release` is called.
    """

    def __init__(self, folder: pathlib.Path, behaviours=None):
        self.folder, self.behaviours = folder, behaviours or {}
        self.commands: dict[str, list[list[str]]] = {}  # of each run, as its host would run them
        self.most = 0  # jobs that were live at the same time
        self._live: dict[str, threading.Thread] = {}
        self._free, self._stop = threading.Event(), threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("kubectl", KUBECTL), ("sbatch", SBATCH), ("squeue", SQUEUE)):
            file = folder / "bin" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text.replace("@DIR@", str(folder)))
            file.chmod(0o755)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def release(self):
        self._free.set()

    def calls(self, start):
        file = self.folder / "calls"
        return (
            [c for c in file.read_text().splitlines() if c.startswith(start)]
            if file.exists()
            else []
        )

    def close(self):
        self._stop.set()
        self._watcher.join()

    def _watch(self):
        while not self._stop.wait(TICK / 2):
            for job in self.folder.glob("*.job"):
                name = job.stem
                if name in self._live or (self.folder / f"{name}.state").exists():
                    continue
                with contextlib.suppress(FileNotFoundError):
                    command = _command(job.read_text())
                    self._live[name] = threading.Thread(
                        target=self._play, args=(name, command), daemon=True
                    )
                    self.most = max(self.most, len(self._live))
                    self._live[name].start()

    def _play(self, job, command):
        workdir = next(w[10:] for w in command if w.startswith("--workdir="))
        run = workdir.rpartition("/")[2]
        tries = self.commands.setdefault(run, [])
        tries.append(command)
        tries_of = self.behaviours.get(run, ["finish"])
        behaviour = tries_of[min(len(tries), len(tries_of)) - 1]
        succeeded = self._run(paths.parse(workdir), run, behaviour, len(tries))
        (self.folder / f"{job}.state").write_text("Completed" if succeeded else "Failed")
        del self._live[job]

    def _run(self, workdir, run, behaviour, attempt):
        if behaviour == "queue":
            self._free.wait()
        owner = {"owner": f"{run}-{attempt}", "host": "pod", "pid": 1, "phase": "decode"}

        def beat(step, **values):
            owner.update(step=step, time=time.time(), **values)
            paths.write(workdir / "owner.json", json.dumps(owner))

        for step in range(3):
            beat(step)
            time.sleep(TICK)
            if behaviour in ("fail", "settings") and step == 1:
                if behaviour == "settings":
                    beat(step, released=True, status=2, error="config.loss.q = 7 is too large.")
                return False
            if behaviour == "pause" and step == 1:
                time.sleep(20 * TICK)  # far above the sweep's SILENT
        paths.write(workdir / "results.json", json.dumps({"m@16": 0.5}))
        beat(3, released=True)
        return True


def _command(text):
    """What a submitted job runs: a JobSet's container, or sbatch's words."""
    if text.startswith("--"):
        words = text.splitlines()
        return words[words.index("launch/slurm.sbatch") :]
    container = next(_containers(yaml.safe_load(text)))
    return [*container.get("command", []), *container["args"]]


def _containers(tree):
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "containers":
                yield from value
            else:
                yield from _containers(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _containers(value)
