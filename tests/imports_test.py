"""Imports lead downwards, and each room keeps to what it may know (no module is run here)."""

import ast
import pathlib
import sys

import pytest
from places import ROOT

# The house, floor by floor, as a rollout lives: a room imports only from floors below its own.
FLOORS = """
    main benchmark
    commands
    train
    aot train_metrics
    evaluation step
    experiment report
    learner rollouts runs
    config policy records
    data models parallel
    grading storage
    extras
    console errors losses
"""
# All that these rooms may import from the rest of qlog.
KNOWS = {
    "losses": set(),
    "grading": {"errors"},
    "errors": set(),
    "console": set(),
    "extras": {"errors"},
    "storage": {"errors", "extras"},
    "models": {"errors", "storage"},
    "data": {"errors", "storage"},
}
# Who may import what from outside; everybody may import what is not named.
ONLY_IN = {
    "flax": {"models"},
    "orbax": {"runs", "models"},
    "grain": {"data"},
    "tensorflow_datasets": {"data"},
    "tokenizers": {"data"},
    "sentencepiece": {"data"},
    "jinja2": {"data"},
    "torch": {"benchmark"},
    "tensorflow": set(),
    "transformers": {"benchmark"},
}
NEVER_IN = {name: {"jax", "flax", "optax", "orbax"} for name in ("data", "grading", "storage")}


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: pathlib.Path, modules: set[str]) -> set[str]:
    """Every module imported anywhere in the file, inside functions too; relative ones resolved."""
    name, found = module_name(path), set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in modules else base)
    return found - {name}


def unit(module: str) -> str:
    """'losses' for qlog.losses.tsallis; '' for qlog itself."""
    return (module.split(".") + [""])[1]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """{module of qlog: all modules it imports}."""
    paths = {module_name(p): p for p in sorted((ROOT / "qlog").glob("**/*.py"))}
    return {name: imports(path, set(paths)) for name, path in paths.items()}


def inside(graph):
    """(importer, imported) within qlog, across its top-level modules and packages."""
    for name, targets in graph.items():
        for target in targets:
            if target.split(".")[0] == "qlog" and unit(target) != unit(name) and unit(name):
                yield name, target


def test_every_room_is_on_a_floor(graph):
    rooms = {unit(name) for name in graph} - {""}
    assert rooms == set(FLOORS.split())
    assert len(rooms) + 1 <= 26  # with __init__.py: more than one reads at a glance


def test_imports_lead_downwards(graph):
    floor = {room: i for i, line in enumerate(FLOORS.split("\n")) for room in line.split()}
    wrong = [
        f"{name} imports {target}"
        for name, target in inside(graph)
        if unit(target) and floor[unit(name)] >= floor[unit(target)]
    ]
    assert not wrong, f"upwards or sideways: {wrong}"


def test_packages_keep_to_what_they_may_know(graph):
    wrong = [
        f"{name} imports {target}"
        for name, target in inside(graph)
        if unit(target) and unit(target) not in KNOWS.get(unit(name), {unit(target)})
    ]
    assert not wrong, wrong


def test_the_package_itself_imports_nothing_that_imports_more(graph):
    """`import qlog` comes before all of it, in every program: it needs no JAX, and no time."""
    light = graph["qlog"]
    assert light == {"qlog.extras", "qlog.parallel.libtpu"}
    light |= {"qlog.errors"}
    targets = {target for name in light for target in graph[name]} - light
    libraries = {target.split(".")[0] for target in targets}
    assert libraries <= set(sys.stdlib_module_names)


def test_nothing_imports_main(graph):
    assert not [name for name, target in inside(graph) if unit(target) == "main"]


def test_no_cycle_among_modules(graph):
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done or name not in graph:
            return
        path.append(name)
        for target in graph[name]:
            visit(target)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_libraries_stay_where_they_belong(graph):
    wrong = []
    for name, targets in graph.items():
        for library in {target.split(".")[0] for target in targets}:
            if unit(name) not in ONLY_IN.get(library, {unit(name)}):
                wrong.append(f"{name} imports {library}")
            if library in NEVER_IN.get(unit(name), set()):
                wrong.append(f"{name} imports {library}")
    assert not wrong, wrong


def test_relative_imports_are_resolved(tmp_path, monkeypatch):
    """The checker itself: a forbidden import is seen however it is written."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    package = tmp_path / "qlog" / "losses"
    package.mkdir(parents=True)
    file = package / "a.py"
    file.write_text(
        "from .. import data\nfrom ..models import decoder\ndef f():\n    import qlog.train"
    )
    modules = {"qlog.data", "qlog.models", "qlog.models.decoder", "qlog.train", "qlog.losses.a"}
    assert imports(file, modules) == {"qlog.data", "qlog.models.decoder", "qlog.train"}
