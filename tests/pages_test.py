"""The pages name files that exist: links, and paths in backticks."""

import re

import pytest
from places import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "BUILD.md",
    ROOT / "CHANGELOG.md",
    ROOT / "launch/README.md",
    *sorted((ROOT / "qlog").rglob("*.md")),
]
_LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
_PATH = re.compile(r"`((?:qlog|configs|launch|tests)/[\w./]+|[\w/]+\.(?:py|md))`")


def _named(page):
    """Paths that a page names, as (text, the places where it may be)."""
    text = page.read_text()
    for link in _LINK.findall(text):
        yield link, [page.parent / link]
    for path in _PATH.findall(text):
        yield path, [page.parent / path, ROOT / path, *(ROOT / "qlog").rglob(path)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    missing = [name for name, places in _named(page) if not any(p.exists() for p in places)]
    assert not missing, missing


def test_a_room_that_newcomers_look_for_has_a_page():
    for room in (
        *("aot", "benchmark", "grading", "learner", "losses", "models", "parallel", "rollouts"),
        "runs",
    ):
        page = (ROOT / "qlog" / room / "README.md").read_text()
        files = {file.name for file in (ROOT / "qlog" / room).glob("*.py")} - {"__init__.py"}
        assert not [file for file in files if file not in page], room
