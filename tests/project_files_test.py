"""What the clone's root says of the project: versions, CI, hooks, the citation, the changelog."""

import configparser
import os
import re

import pytest
import yaml
from places import ROOT

import qlog
from qlog import extras


@pytest.fixture(scope="module")
def setup():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def requirements(text):
    """The lines of a list in setup.cfg."""
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def name_of(requirement):
    """The package of a requirement, in lower case with dashes."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=; ]", requirement)[0].lower())


def test_the_losses_bring_jax_and_optax_only(setup):
    base = requirements(setup["options"]["install_requires"])
    assert {name_of(line) for line in base} == {"jax", "numpy", "optax"}


def test_extras_for_accelerators_and_buckets_bring_what_commands_need(setup):
    extras = setup["options.extras_require"]

    def brings_train(extra):
        lines = requirements(extras[extra])
        inner = [re.fullmatch(r"qlog\[(.*)\]", line) for line in lines]
        names = {name for match in inner if match for name in match[1].split(",")}
        return "train" in names or any(map(brings_train, names))

    assert {extra for extra in extras if brings_train(extra)} == set(extras) - {"train", "lint"}


def test_commands_look_for_every_package_of_the_extra_train(setup):
    modules = {"absl-py": "absl", "orbax-checkpoint": "orbax"}
    names = map(name_of, requirements(setup["options.extras_require"]["train"]))
    expected = {modules.get(name, name.replace("-", "_")) for name in names}
    assert {module.lower() for module in extras.TRAIN_MODULES} == expected


def versions_of(package):
    """{version: marker} in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split(" ; ") for line in lines if line.startswith(f"{package}==")]
    return {pin[0].partition("==")[2]: (pin[1] if pin[1:] else "") for pin in pins}


def test_python_3_11_keeps_its_jax_and_newer_ones_have_the_newest():
    old = "python_full_version < '3.12'"
    for package in ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin"):
        versions = versions_of(package)
        assert versions["0.10.2"] == old
        assert [m for m in versions.values() if m != old] == ["python_full_version >= '3.12'"]


def test_ci_runs_the_script_on_the_oldest_and_on_the_newest_python(setup):
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    steps = job["steps"]
    (script,) = [step["run"] for step in steps if "run" in step]
    assert os.access(ROOT / script, os.X_OK)
    (python,) = [s["with"]["python-version"] for s in steps if "python" in s.get("uses", "")]
    assert python == "${{ matrix.python }}"
    oldest = setup["options"]["python_requires"].removeprefix(">=")
    classifiers = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    assert job["strategy"]["matrix"]["python"] == [oldest, classifiers[-1]]
    assert workflow[True] == {"push": {"branches": ["main"]}, "pull_request": None}  # YAML's `on`


def test_hooks_before_a_commit_are_what_lint_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repo,) = config["repos"]
    assert repo["repo"] == "local"  # a hook from elsewhere would have a version of its own
    hooks = {" ".join(hook["entry"].split()) for hook in repo["hooks"]}
    lint = re.findall(r"\.venv/bin/\w+(?: \w+)?", (ROOT / "launch/test").read_text())
    assert hooks == {line for line in lint if not line.startswith(".venv/bin/python")}


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["title"] == "qlog"
    assert citation["version"] == qlog.__version__
    (paper,) = citation["references"]
    assert paper["url"].endswith("2604.25907")
    assert [author["family-names"] for author in paper["authors"]] == ["Lin", "Ie"]


def test_the_changelog_begins_with_what_is_not_released_and_then_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    titles = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert [title for title, _ in titles[:2]] == ["Unreleased", qlog.__version__]
    released = yaml.safe_load((ROOT / "CITATION.cff").read_text())["date-released"]
    assert titles[0][1] == "" and titles[1][1] == str(released)
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
