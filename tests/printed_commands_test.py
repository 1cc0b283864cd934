"""Every command that the documents print: extracted, checked, and run against stand-ins.

By default the hosts' `python` is a stand-in that notes what it is called with. In the tests marked
slow it trains: the same flags with the config's tiny variant on this machine's CPU, up to step 1.
"""

import configparser
import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import time

import launch_fixtures
import pytest
from absl import flags as absl_flags
from gcp_storage_emulator.server import create_server
from places import ROOT

import qlog.main
from qlog.commands import help_pages
from qlog.config import command_line, schema

PAGES = [str(page.relative_to(ROOT)) for page in sorted((ROOT / "qlog").rglob("*.md"))]
DOCUMENTS = ["README.md", "launch/README.md", "BUILD.md", *PAGES]
CLOUD = ("gcloud", "kubectl", "sbatch", "scontrol", "gcluster", "xpk", "docker", "sky")
PROGRAMS = {*CLOUD, "python", "python3", "pip", "uv", "source", "squeue", "scancel", "srun", "hf"}

# What is not run, and why. Matched against the beginning of a command; what it names is checked.
NOT_RUN = {
    "launch/install": "downloads packages; its extras are checked",
    "launch/quickstart": "installs, then trains for minutes; its flags are checked",
    "launch/test": "is this suite; its marks are checked",
    "python3 -m venv": "makes an environment",
    ".venv/bin/pip": "downloads packages",
    "pip install": "downloads packages",
    "uv pip": "downloads packages",
    "source": "changes the reader's own shell",
    "launch/tpu_vm logs": "follows a file without end; its dry run is checked",
    "launch/tpu_vm keep": "ends with a run, in tests/launch/runs_test.py; its dry run is checked",
    "launch/stage": "downloads weights and data; its dry run is checked",
    "python -m qlog.report": "reads runs that are not there; tests/report runs it",
    "python -m qlog.main --config=configs/miniature.py": "87 runs; tests/report runs some of them",
    "launch/sweep": "tests/launch/sweep_test.py runs it; its first run is started as it prints it",
}
# Words that stand for something of the reader's own.
PLACEHOLDERS = {"my_program.py", "mine.py"}


# ---- Extracting ----


def blocks(text):
    """(is it fenced as bash, its lines) of the code blocks of a Markdown text."""
    lines, found, indented = text.splitlines(), [], []
    fence = None
    for line in [*lines, ""]:
        if line.startswith("```"):
            if fence is None:
                fence = (line[3:].strip(), [])
            else:
                found += [(True, fence[1])] if fence[0] in ("bash", "sh") else []
                fence = None
        elif fence is not None:
            fence[1].append(line)
        elif line.startswith("    "):
            indented.append(line[4:])
        elif indented:
            found.append((False, indented))
            indented = []
    return found


def is_command(words):
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    return bool(words) and (words[0].startswith(("launch/", ".venv/bin/")) or words[0] in PROGRAMS)


def commands(text):
    """The command lines of a Markdown text, as the reader would type them.

    `[--option]` is taken for given, the first of `a|b` chosen. In a block fenced as bash every line
    has to be a command.
    """
    result = []
    for is_bash, lines in blocks(text):
        for line in "\n".join(lines).replace("\\\n", " ").splitlines():
            line = re.sub(r"\[(--[^\]|]*)(?:\|[^\]]*)?\]", r"\1", line)
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # prose or a formula
                words = line.split()
            if is_command(words):
                result.append(re.sub(r"\s+#\s.*", "", line).strip())
            else:
                assert not (is_bash and words), f"{line!r} is no command that this test knows"
    return result


def mentions(text):
    """Commands inside sentences: `launch/x --y`, `python -m z`; may lack what they need."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", outside)
    return [
        span
        for span in spans
        if re.match(r"(launch/\w+(?![\w.])|(\.venv/bin/)?python -m \w)", span)
    ]


COMMANDS = {name: commands((ROOT / name).read_text()) for name in DOCUMENTS}
MENTIONS = [(name, span) for name in DOCUMENTS for span in mentions((ROOT / name).read_text())]


def test_commands_are_found():
    assert len(COMMANDS["launch/README.md"]) > 10 and len(COMMANDS["README.md"]) >= 4
    text = (
        "a\n\n    launch/x --a=b [--c=d|e] \\\n        -- --f='g h'   # why\n    l = q # no\n\n"
        "```bash\npython -m z\n```\n"
    )
    assert [shlex.split(command) for command in commands(text)] == [
        ["launch/x", "--a=b", "--c=d", "--", "--f=g h"],
        ["python", "-m", "z"],
    ]
    with pytest.raises(AssertionError, match="'frobnicate' is no command"):
        commands("```bash\nfrobnicate\n```\n")


# ---- What a command names has to exist ----


def check_config(spec):
    """configs/NAME.py:VARIANTS: the file is there, and knows the variants."""
    file, _, variants = spec.partition(":")
    if file not in PLACEHOLDERS and file != "...":
        assert (ROOT / file).is_file(), f"{file}: no such config"
        return runpy.run_path(str(ROOT / file))["get_config"](variants)


def check_main_flags(words):
    """qlog.main takes these flags, and their values."""
    values = absl_flags.FlagValues()
    own = ["main", *(word for word in words if re.match(r"--config[.=]", word))]
    named = [word for word in own if word.startswith("--config=")]
    for word in named:
        check_config(word.partition("=")[2])
    if named and not re.fullmatch(r"--config=(\.\.\.|mine\.py)", named[0]):
        command_line.define(values=values)
        command_line.parse(own, values)  # a field that is not there is an error
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if name == "help-config":  # a word that chooses no field is an error
            assert list(help_pages.fields(schema.default(), value))
        elif not word.startswith("--config") and value != "...":
            assert word.startswith("--") and name in absl_flags.FLAGS, (
                f"qlog.main has no flag {word}"
            )
            absl_flags.FLAGS[name].parser.parse(value)


def check_module(words):
    """`-m MODULE FLAGS`: there is such a module, and its source names each flag."""
    module, flags = words[1], words[2:]
    spec = importlib.util.find_spec(module)
    assert spec, f"no module {module}"
    if module == "qlog.main":
        check_main_flags([word for word in flags if word.startswith("-")])
    elif module.startswith("qlog"):
        file = pathlib.Path(spec.origin)
        source = (file.with_name("__main__.py") if file.name == "__init__.py" else file).read_text()
        for word in flags:
            name = word.partition("=")[0].removeprefix("--")
            if word.startswith("--") and not name.startswith("config"):
                assert re.search(rf"""["'](--)?{name}["']""", source), (
                    f"{module} has no flag --{name}"
                )
    for word in flags:
        if re.match(r"(--config=)?configs/", word):
            check_config(word.removeprefix("--config="))


def check(command):
    """Fails where the command names a script, flag, module, config or variant that is not there."""
    words = [w for w in shlex.split(command, comments=True) if not re.fullmatch(r"[A-Z_]+=\S*", w)]
    if "&&" in words:  # one command after another
        where = words.index("&&")
        check(shlex.join(words[:where]))
        return check(shlex.join(words[where + 1 :]))
    program, rest = words[0], words[1:]
    if program.startswith("launch/"):
        assert os.access(ROOT / program, os.X_OK), f"{program}: no such script"
    if program == "launch/install":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        assert set(rest) <= set(setup["options.extras_require"]), f"{command}: no such extra"
    elif program == "launch/test":
        marks = (ROOT / "setup.cfg").read_text().partition("markers =")[2]
        for mark in (after for word, after in itertools.pairwise(rest) if word == "-m"):
            assert f" {mark}:" in marks, f"{command}: no such mark"
    elif program.endswith("python") and rest[:1] == ["-m"]:
        check_module(rest)
    elif program.startswith("launch/"):
        own = rest[rest.index("--") + 1 :] if "--" in rest else rest
        if program == "launch/sweep" and own[:1] and own[0].startswith("launch/"):
            assert os.access(ROOT / own[0], os.X_OK), f"{own[0]}: no such script"
        elif own[:1] == ["-m"]:
            check_module(own)
        elif own and own[0].startswith("--config"):
            check_main_flags(own)
        elif program == "launch/quickstart" or (
            program == "launch/local" and own[0].startswith("-")
        ):
            check_main_flags(
                [w for w in own if not re.match(r"--(processes|devices|logs|grace)=", w)]
            )


@pytest.mark.parametrize(
    "command", [pytest.param(c, id=f"{d}: {c[:60]}") for d in DOCUMENTS for c in COMMANDS[d]]
)
def test_what_a_printed_command_names_exists(command):
    check(command)


@pytest.mark.parametrize("command", commands(qlog.main.__doc__))
def test_what_the_page_of_help_names_exists(command):
    check(command)


@pytest.mark.parametrize("document, span", MENTIONS, ids=lambda x: str(x)[:60])
def test_what_a_sentence_names_exists(document, span):
    words = shlex.split(span)
    if words[0].startswith("launch/"):
        if len(words) == 1 and pathlib.PurePath(words[0]).suffix:  # a file, not a command
            assert (ROOT / words[0]).is_file(), f"{document}: {span}"
            return
        assert os.access(ROOT / words[0], os.X_OK), f"{document}: {span}"
        source = (ROOT / words[0]).read_text()
        for word in words[1:]:
            if word.startswith("--config."):
                check_main_flags(["--config=configs/quickstart.py", word.replace("=...", "=0")])
            elif word.startswith("--") and word != "--":
                name = word.partition("=")[0][2:]
                assert re.search(rf"\b({name}|{name.replace('-', '_')})\b", source), (
                    f"{document}: {span}"
                )
    else:
        check_module(words[words.index("-m") :])


@pytest.mark.parametrize(
    "command, message",
    [
        ("launch/gkee --image=I", "no such script"),
        ("launch/install gpu", "no such extra"),
        ("launch/test -m slwo", "no such mark"),
        ("python -m qlog.trian", "no module qlog.trian"),
        ("python -m qlog.main --config=configs/finqa2.py", "no such config"),
        ("python -m qlog.main --config=configs/finqa.py:clod", "clod"),
        ("python -m qlog.main --config=configs/finqa.py --mode=trian", "value should be one of"),
        ("python -m qlog.main --config=configs/finqa.py --wrokdir=x", "no flag --wrokdir"),
        ("launch/gke --image=I -- --config=configs/finqa.py --config.train.stepz=3", "stepz"),
        ("python -m qlog.losses.theory.plots --uot=x", "no flag --uot"),
    ],
)
def test_a_wrong_command_is_noticed(command, message):
    with pytest.raises(Exception, match=message):
        check(command)


# ---- Running them ----

# The `python` of the reader's clone and of every host.
PYTHON = """#!@PYTHON@
import json, os, pathlib, subprocess, sys

words = sys.argv[1:]
folder = pathlib.Path("@FOLDER@")
trains = words[:2] == ["-m", "qlog.main"]
with open(folder / "started", "a") as file:
    file.write(json.dumps(words) + "\\n")
if trains and not @TRAINS@:
    sys.exit()
if not trains:
    os.execv("@PYTHON@", ["@PYTHON@", *words])
spec = next(w for w in words if w.startswith("--config="))
replaced = ("--config=", "--workdir=", "--distributed=", "--config.data.manual_dir",
            "--config.tokenizer.path")
words = [w for w in words if not w.startswith(replaced)]
name = pathlib.Path(spec.partition("=")[2].partition(":")[0]).stem
if name == "quickstart":
    spec = "--config=@FOLDER@/quick.py"
elif "tiny" not in spec:
    spec += (":" if ":" not in spec else ",") + "tiny"
words += [spec, f"--workdir=@FOLDER@/runs/{os.environ.get('QLOG_TEST_RUN', 'run')}"]
if name != "quickstart":
    words += [f"--config.data.manual_dir=@SHARED@/data/{name}",
              "--config.data.data_dir=@FOLDER@/prepared",
              "--config.tokenizer.path=@SHARED@/tokenizers/qwen3", "--config.evaluation.every=0",
              "--config.train.steps=1", "--config.data.max_prompt_tokens=1024"]
if "JAX_NUM_PROCESSES" in os.environ:
    words += ["--distributed=on"]
env = {**os.environ, "JAX_PLATFORMS": "cpu"}
code = subprocess.run(["@PYTHON@", *words], env=env, cwd="@ROOT@").returncode
with open(folder / "ended", "a") as file:
    file.write(f"{code}\\n")
sys.exit(code)
"""

# configs/quickstart.py, cut down to two runs of two steps.
QUICK = """from configs import quickstart

def get_config(arg=""):
    config = quickstart.get_config(arg)
    base = {**config.runs["base"].to_dict(), "train": {"steps": 2, "prompts_per_step": 8}}
    config.runs = {"base": base, "grpo": config.runs["grpo"]}
    config.train.steps, config.evaluation.prompts, config.evaluation.prompts_per_batch = 2, 8, 8
    return config
"""

SRUN = """#!/bin/bash
while [ "$1" != python ]; do options+=("$1"); shift; done
"@PYTHON@" -c 'import sys; sys.path.insert(0, "@TESTS@")
import launch_fixtures; launch_fixtures.check(sys.argv[1:])' srun "${options[@]}" || exit
exec "$@"
"""


class Reader:
    """Someone with a clone, at a terminal whose clouds and clusters are stand-ins.

    Jobs run on this machine as soon as they are submitted.
    """

    def __init__(self, folder, trains=False, shared=""):
        self.folder, self.clone, self.home = folder, folder / "clone", folder / "home0"
        self.limit = 590 if trains else 60  # seconds for a command
        self.clone.mkdir()
        shutil.copytree(ROOT / "launch", self.clone / "launch")
        for name in ("qlog", "configs", "setup.cfg", "pyproject.toml", "constraints.txt"):
            (self.clone / name).symlink_to(ROOT / name)
        (self.clone / ".gitignore").write_text(".venv\n.cache\n")
        values = {
            "PYTHON": str(ROOT / ".venv/bin/python"),
            "FOLDER": str(folder),
            "ROOT": str(ROOT),
            "SHARED": str(shared),
            "TRAINS": str(trains),
            "TESTS": str(ROOT / "tests"),
        }
        path = launch_fixtures.install(folder, *CLOUD)
        for file, text in (
            (self.clone / ".venv/bin/python", PYTHON),
            (self.home / "qlog/.venv/bin/python", PYTHON),
            (folder / "bin/python", PYTHON),
            (folder / "bin/srun", SRUN),
            (folder / "quick.py", QUICK),
        ):
            file.parent.mkdir(parents=True, exist_ok=True)
            for name, value in values.items():
                text = text.replace(f"@{name}@", value)
            file.write_text(text)
            file.chmod(0o755)
        (self.home / "tensorflow_datasets").mkdir()
        (self.clone / "my_program.py").write_text("print('any program')\n")
        self.env = {
            **os.environ,
            "JAX_NUM_CPU_DEVICES": "1",
            "PATH": path,
            "HOME": str(self.home),
            "SLURM_JOB_ID": "17",
            "SLURM_SUBMIT_DIR": str(self.clone),
            "PYTHONPATH": str(ROOT),
            "GIT_CONFIG_GLOBAL": os.devnull,
        }
        git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-c", "init.defaultBranch=m"]
        for words in (["init", "--quiet"], ["add", "-A"], ["commit", "--quiet", "-m", "all"]):
            self.run(shlex.join([*git, *words]))

    def run(self, command, env=None):
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=self.clone,
            env={**self.env, **(env or {})},
            text=True,
            timeout=self.limit,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}"
        return result.stdout

    def leave(self):
        """What a host still runs ends."""
        for file in self.home.glob("*.status"):
            state, pid, *_ = file.read_text().split()
            if state == "running":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGTERM)

    def started(self):
        """The words of every `python -m qlog.main` so far."""
        file = self.folder / "started"
        words = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )
        return [w for w in words if w[:2] == ["-m", "qlog.main"]]

    def ended(self):
        file = self.folder / "ended"
        return file.read_text().split() if file.exists() else []

    def type(self, command):
        """Runs a printed command; what was submitted runs, too."""
        words = shlex.split(command)
        reason = next((why for start, why in NOT_RUN.items() if command.startswith(start)), "")
        if words[0].startswith("launch/") and words[0] not in (
            "launch/install",
            "launch/test",
            "launch/quickstart",
        ):
            at = words.index("--") if "--" in words else len(words)
            dry = self.run(f"{_joined(words[:at])} --dry-run {_joined(words[at:])}")
            if words[0] == "launch/sweep" and "--status" not in words:
                first = next(line[2:] for line in dry.splitlines() if line.startswith("+ "))
                return self.type(first) if first.startswith("launch/") else self.run(first)
        if reason:
            return None
        before = len(launch_fixtures.calls(self.folder))
        self.run(command)
        for call in launch_fixtures.calls(self.folder)[before:]:
            self.host(call)
        return None

    def host(self, call):
        """What a cluster does with what a command submitted."""
        if call[0] == "sbatch":
            at = call.index("launch/slurm.sbatch")
            self.run(shlex.join(["bash", *call[at:]]))
        elif call[:2] == ["kubectl", "apply"]:
            for file in (self.folder / "jobsets").iterdir():
                job = json.loads(file.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
                pod = job["template"]["spec"]["containers"][0]
                env = {e["name"]: e["value"].replace("$$", "$") for e in pod.get("env", [])}
                command = [*pod.get("command", []), *pod["args"]]
                self.run(shlex.join([word.replace("$$", "$") for word in command]), env)
                file.unlink()
        elif call[0] in ("gcluster", "xpk"):
            self.run(next(w for w in call if w.startswith("--command=")).partition("=")[2])
        elif call[0] == "sky":
            self.run(next(w for w in call if w.startswith("--env=QLOG_COMMAND=")).split("=", 2)[2])


def _joined(words):
    """For a shell that still expands the reader's variables."""
    return " ".join(word if word.startswith("--data=$") else shlex.quote(word) for word in words)


def qlog_flags(command):
    """The flags that a command hands to qlog.main on some host; [] where it starts none."""
    words = shlex.split(command)
    if words[0] in (
        "launch/gke",
        "launch/slurm",
        "launch/gcluster",
        "launch/xpk",
        "launch/skypilot",
    ) or (words[:2] == ["launch/tpu_vm", "run"]):
        flags = words[words.index("--") + 1 :]
        return [] if flags[:1] == ["-m"] else flags
    return []


def wait_for_hosts(reader, count):
    """launch/tpu_vm run returns at once."""
    deadline = time.monotonic() + reader.limit
    while len(reader.started()) < count and time.monotonic() < deadline:
        time.sleep(0.1)


@pytest.fixture
def bucket(monkeypatch):
    """gs://B of the documents, on loopback."""
    server = create_server("localhost", 0, in_memory=True, default_bucket="B")
    server.start()
    address = f"http://localhost:{server._api._httpd.server_address[1]}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    yield
    server.stop()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_run_against_stand_ins_in_the_order_printed(document, tmp_path, bucket):
    reader = Reader(tmp_path)
    try:
        for command in COMMANDS[document]:
            count = len(reader.started())
            reader.type(command)
            if flags := qlog_flags(command):
                wait_for_hosts(reader, count + 1)
                assert reader.started()[-1][2:] == ["--distributed=on", *flags], command
    finally:
        reader.leave()


def trains(command):
    """Whether a printed command makes a run of qlog.main on some host."""
    if re.match(r"\.venv/bin/python -m qlog\.main|launch/local .*--config=", command):
        return "--mode=" not in command
    return bool(qlog_flags(command)) and "--mode=" not in command


@pytest.mark.slow
@pytest.mark.parametrize(
    "document, command",
    [pytest.param(d, c, id=f"{d}: {c[:60]}") for d in DOCUMENTS for c in COMMANDS[d] if trains(c)],
)
def test_printed_runs_train_up_to_step_1(document, command, tmp_path, bucket, shared):
    reader = Reader(tmp_path, trains=True, shared=shared)
    try:
        if command.startswith("launch/tpu_vm run"):
            for before in COMMANDS[document][: COMMANDS[document].index(command)]:
                if before.startswith(("launch/tpu_vm create", "launch/tpu_vm setup")):
                    reader.type(before)
        reader.type(command)
        processes = 4 if "--processes=4" in command else 1
        deadline = time.monotonic() + reader.limit
        while len(reader.ended()) < processes and time.monotonic() < deadline:
            time.sleep(1)  # launch/tpu_vm run returns at once
        assert reader.ended() == ["0"] * processes
        assert list((tmp_path / "runs").rglob("results.json"))
    finally:
        reader.leave()
