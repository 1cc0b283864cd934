"""A run as its user has it: qlog installed as a wheel, everything else in a folder of one's own."""

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from places import ROOT

from qlog.runs.log import read_jsonl

_CONFIG = '''
"""Sums, from my own file, with my own reward and metric."""

from my_rewards import near

from qlog.config import default, loss, merge


def is_number(*, answer, example, **_):
    assert example.extra["level"] in (1, 2)
    return answer.strip().lstrip("-").isdigit()


def get_config():
    return merge(
        default(),
        {
            "dtype": "float32",
            "architecture": dict(
                vocab_size=48, num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_dim=8,
                mlp_width=16,
            ),
            "tokenizer": {"path": "tokenizer"},
            "data": {
                "name": "jsonl",
                "files": {"train": "sums-*.jsonl"},
                "fields": {"source": "question", "answer": "result.value"},
                "description": "Add the numbers.",
                "style": "warm",
                "max_prompt_tokens": 48,
            },
            "loss": loss("grpo"),
            "rollout": {
                "rollouts_per_prompt": 4,
                "rationale_budget": 4,
                "answer_reserve": 6,
                "reward": [("exact_match", 1.0), (near, 0.5)],
            },
            "train": {"steps": 2, "prompts_per_step": 4, "rollouts_every": 1, "remat": "none"},
            "evaluation": {
                "every": 2, "prompts": 4, "prompts_per_batch": 4, "rollouts_per_prompt": 2,
                "metrics": [is_number],
            },
        },
    )
'''

_REWARDS = '''
def near(*, answer, golds, **_):
    """1 for the right number, less the further away it is."""
    try:
        return 1 / (1 + abs(int(answer) - int(golds[0])))
    except ValueError:
        return 0.0
'''


_PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """qlog's wheel, built from a copy of this clone."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "qlog", source / "qlog", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([*_PIP, "wheel", "--no-deps", "--wheel-dir=dist", "."], cwd=source, check=True)
    (path,) = (source / "dist").glob("qlog-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with qlog alone, from its wheel; what it depends on is that of this environment."""
    target = tmp_path_factory.mktemp("installed")
    subprocess.run([*_PIP, "install", "--no-deps", f"--target={target}", wheel], check=True)
    return target


@pytest.fixture
def folder(tmp_path):
    """Two files of sums, a config and a tokenizer, far from any clone."""
    for part in range(2):
        lines = [
            {"question": f"{a} + {b}", "result": {"value": a + b}, "level": 1 + part}
            for a in range(6)
            for b in range(part, 6, 2)
        ]
        (tmp_path / f"sums-{part}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "mine.py").write_text(_CONFIG)
    (tmp_path / "my_rewards.py").write_text(_REWARDS)
    _tokenizer(tmp_path / "tokenizer")
    return tmp_path


def _tokenizer(folder: pathlib.Path) -> None:
    """A tokenizer.json of characters."""
    names = ["<pad>", "<eos>", "<think>", "</think>", "<unk>"]
    pieces = [*names, *sorted(set("Add the numbers.0123456789+- \n"))]
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": name, "special": True, "single_word": False, "lstrip": False}
            | {"rstrip": False, "normalized": False}
            for i, name in enumerate(names)
        ],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}}
        | {"behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "unk_token": "<unk>",
        },
    }
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def _main(folder, installed, *arguments, config="mine.py"):
    return subprocess.run(
        [sys.executable, "-P", "-m", "qlog.main", f"--config={config}", *arguments],
        cwd=folder,
        # One device, as a user has it who sets nothing.
        env=os.environ
        | {"PYTHONPATH": str(installed), "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_my_data_reward_and_metric_from_a_wheel(folder, installed):
    result = _main(folder, installed, "--config.loss.max_coefficient=5", "--workdir=out")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = read_jsonl(folder / "out/metrics.jsonl")
    assert [row["phase"] for row in rows] == ["train", "train", "validation"]
    for row in rows[:2]:
        parts = row["reward/exact_match"] + 0.5 * row["reward/near"]
        assert row["reward"] == pytest.approx(parts, abs=1e-6)
    assert 0 <= rows[2]["metrics/is_number"] <= 1
    assert rows[2]["questions"] == 3  # a tenth of the file is drawn for validation
    rollouts = read_jsonl(folder / "out/rollouts.jsonl")
    assert "Add the numbers." in rollouts[0]["prompt"]
    assert json.loads((folder / "out/config.json").read_text())["loss"]["max_coefficient"] == 5
    # The same command has nothing more to do.
    again = _main(folder, installed, "--config.loss.max_coefficient=5", "--workdir=out")
    assert "finished before" in again.stdout, again.stderr


def test_a_mistake_in_it_is_one_sentence(folder, installed):
    broken = textwrap.dedent(_CONFIG).replace('"question"', '"qestion"')
    (folder / "mine.py").write_text(broken)
    result = _main(folder, installed, "--workdir=out")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "qestion" in result.stderr and "question" in result.stderr
    assert not (folder / "out/checkpoints").exists()


def test_the_wheel_holds_every_file_of_the_package(installed):
    """Pages, tables and figures are read at run time, py.typed by type checkers."""
    there = {p.relative_to(installed / "qlog") for p in (installed / "qlog").rglob("*")}
    missing = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "qlog").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
        if path.relative_to(ROOT / "qlog") not in there
    ]
    assert not missing, missing


def test_the_config_that_build_md_shows_trains_from_a_wheel(tmp_path, installed):
    (block,) = _python_blocks("BUILD.md")
    (tmp_path / "mine.py").write_text(block)
    short = ["--config.train.steps=2", "--config.evaluation.prompts=4"]
    result = _main(tmp_path, installed, *short, config="mine.py:paft,q=0.5")
    assert result.returncode == 0, result.stdout + result.stderr
    workdir = tmp_path / "runs/mine-paft,q=0.5"
    rows = read_jsonl(workdir / "metrics.jsonl")
    assert [row["phase"] for row in rows] == ["train", "train", "validation"]
    assert json.loads((workdir / "config.json").read_text())["loss"]["name"] == "paft"


# ---- Only what `pip install qlog` brings ----

# Hides the packages that are named, wherever Python starts.
_HIDES = """
import os, sys


class Hides:
    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, path=None, target=None):
        if path is None and name.partition(".")[0] in hidden:
            return None
        return self._finder.find_spec(name, path, target)


hidden = set(os.environ["HIDDEN"].split(","))
sys.meta_path[:] = map(Hides, sys.meta_path)
"""


def _closure(package: str, seen: set[str]) -> set[str]:
    """A package and all that it requires, without extras: their names on the index."""
    if package not in seen:
        seen.add(package)
        for line in importlib.metadata.requires(package) or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                _closure(canonicalize_name(needed.name), seen)
    return seen


@pytest.fixture(scope="module")
def few(installed, tmp_path_factory):
    """Environment variables with which Python sees qlog's wheel, JAX, optax and what these need."""
    metadata = installed.glob("qlog-*.dist-info/METADATA")
    lines = [line for path in metadata for line in path.read_text().splitlines()]
    base = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    names: set[str] = set()
    for line in base:
        _closure(canonicalize_name(Requirement(line.partition(":")[2].strip()).name), names)
    hidden = {
        module
        for module, packages in importlib.metadata.packages_distributions().items()
        if not (names | {"qlog"}) & set(map(canonicalize_name, packages))
    }
    assert {"flax", "orbax", "rich", "ml_collections"} <= hidden
    assert not {"jax", "optax", "numpy", "qlog"} & hidden
    hides = tmp_path_factory.mktemp("hides")
    (hides / "sitecustomize.py").write_text(_HIDES)
    return {
        "PYTHONPATH": f"{hides}{os.pathsep}{installed}",
        "HIDDEN": ",".join(sorted(hidden)),
        "XLA_FLAGS": "",
    }


_IMPORTS = """
try:
    import {module}
except ImportError as error:
    print(error)
print("the program goes on")
"""


def _python(folder, variables, *arguments):
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def _page_of_losses() -> str:
    """The examples of the pages that use the losses and nothing else of qlog, as one program."""
    first, *_ = _python_blocks("README.md")
    return "\n".join([first, *_python_blocks("qlog/losses/README.md")[:3]])


def _python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_losses_need_jax_and_optax_only(tmp_path, few):
    (tmp_path / "page.py").write_text(_page_of_losses())
    result = _python(tmp_path, few, "page.py")
    assert result.returncode == 0, result.stderr
    assert "effective_reward_max" in result.stdout
    result = _python(tmp_path, few, "-m", "qlog.losses.examples.own_trainer")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["qlog.main", "--config=mine.py"],
        ["qlog.main"],
        ["qlog.commands.doctor"],
        ["qlog.commands.show", "mine.py"],
        ["qlog.report", "runs"],
        ["qlog.benchmark", "--config=mine.py"],
        ["qlog.benchmark.balance"],
    ],
    ids=lambda command: command[0],
)
def test_a_command_says_which_extra_it_needs(tmp_path, few, command):
    result = _python(tmp_path, few, "-m", *command)
    assert result.returncode == 2 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert (
        "absl" not in line and "run pip install 'qlog[train]' in the environment in which" in line
    )


def test_the_plots_of_the_theory_say_what_they_need(tmp_path, few):
    result = _python(tmp_path, few, "-m", "qlog.losses.theory.plots", "--out=figures")
    assert result.returncode == 2 and "run pip install matplotlib" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "module, sentence",
    [
        ("qlog.commands.program", "run pip install 'qlog[train]' in the environment in which"),
        ("qlog.config", "run pip install 'qlog[train]' in the environment in which"),
        ("qlog.losses.theory.plots", "run pip install matplotlib"),
    ],
)
def test_an_import_that_lacks_a_package_does_not_end_the_program(tmp_path, few, module, sentence):
    (tmp_path / "page.py").write_text(_IMPORTS.format(module=module))
    result = _python(tmp_path, few, "page.py")
    assert result.returncode == 0, result.stderr
    assert sentence in result.stdout and "the program goes on" in result.stdout
    assert not result.stderr


def test_a_program_of_ones_own_goes_on_without_the_extra(tmp_path, few):
    """Also one that is a package and started by -m, or that only asks what is there."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text(_IMPORTS.format(module="qlog.data"))
    (tmp_path / "mine/train.py").write_text(
        "import importlib.util, sys, types\n"
        "sys.modules['tensorboardX'] = types.ModuleType('tensorboardX')\n"
        "print(importlib.util.find_spec('qlog.data') is not None)\n"
        "print(importlib.util.find_spec('qlog.date') is not None)\n"
        + _IMPORTS.format(module="qlog.lossses")
        + _IMPORTS.format(module="qlog.config")
    )
    result = _python(
        tmp_path,
        few | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{few['PYTHONPATH']}"},
        "-Xdev",
        "-W",
        "ignore",
        "-sm",
        "mine.train",
    )
    assert result.returncode == 0, result.stderr
    first, goes_on, data, date, typo, goes_on_2, last, goes_on_3 = result.stdout.splitlines()
    assert goes_on == goes_on_2 == goes_on_3 == "the program goes on"
    assert "run pip install 'qlog[train]'" in first and "run pip install 'qlog[train]'" in last
    assert (data, date) == ("True", "False")
    assert typo == "No module named 'qlog.lossses'"


_EACH = """
import importlib, pathlib, qlog

for file in sorted(pathlib.Path(qlog.__path__[0]).rglob("*.py")):
    parts = ("qlog", *file.relative_to(qlog.__path__[0]).with_suffix("").parts)
    name = ".".join(parts).removesuffix(".__init__")
    try:
        importlib.import_module(name)
        print(name, "is there")
    except ImportError as error:
        print(name, error)
"""


def test_every_module_but_the_losses_says_which_extra_it_needs(tmp_path, few):
    (tmp_path / "page.py").write_text(_EACH)
    result = _python(tmp_path, few, "page.py")
    assert result.returncode == 0 and not result.stderr, result.stderr
    said = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert len(said) > 150
    package_itself = {"qlog.parallel", "qlog.parallel.libtpu"}  # `import qlog` has imported them
    for name, words in said.items():
        room = (name.split(".") + [""])[1]
        if name == "qlog.losses.theory.plots":
            assert "run pip install matplotlib" in words
        elif room in ("", "losses", "errors", "extras", "console") or name in package_itself:
            assert words == "is there", (name, words)
        else:
            assert "run pip install 'qlog[train]' in the environment" in words, (name, words)


def test_the_installed_script_says_which_extra_it_needs(tmp_path, few):
    (tmp_path / "qlog").write_text("from qlog.commands.program import run\nrun()\n")
    for words in ([], ["doctor"]):
        result = _python(tmp_path, few, "qlog", *words)
        assert result.returncode == 2 and not result.stdout
        assert len(result.stderr.splitlines()) == 1 and "'qlog[train]'" in result.stderr


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment(tmp_path, wheel):
    """Needs a package registry: first the losses, then what the sentence says, then a run."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    constraints = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PYTHONPATH": ""}

    def run(*command, status=0):
        result = subprocess.run(
            [python, *command],
            cwd=tmp_path,
            env=os.environ | constraints | {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"},
            capture_output=True,
            text=True,
            timeout=1500,
        )
        assert result.returncode == status, result.stdout + result.stderr
        return result.stdout + result.stderr

    run("-m", "pip", "install", "--quiet", wheel)
    listed = json.loads(run("-m", "pip", "list", "--format=json"))
    names = {package["name"] for package in listed}
    assert {"jax", "optax", "qlog"} <= names and not names & {"flax", "orbax-checkpoint", "rich"}
    (tmp_path / "page.py").write_text(_page_of_losses())
    assert "effective_reward_max" in run("page.py")
    (block,) = _python_blocks("BUILD.md")
    (tmp_path / "mine.py").write_text(block)
    told = run("-m", "qlog.main", "--config=mine.py", status=2)
    # The sentence's own command, in the environment where qlog is.
    found = re.search(r"run pip (install) '(\S+)'", told)
    assert found
    run("-m", "pip", *found.groups(), "--quiet")
    run("-m", "pip", "check")
    output = run("-m", "qlog.main", "--config=mine.py")
    rows = read_jsonl(tmp_path / "runs/mine/metrics.jsonl")
    assert [row["phase"] for row in rows].count("train") == 20, output
    run("-m", "qlog.report", "runs/mine")
    assert (tmp_path / "report/report.html").exists()
