"""The page's code, as it is printed."""

import re

import report_fixtures as made
from places import ROOT

PAGE = (ROOT / "qlog/report/README.md").read_text()


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        config = made.paper_config("finqa", "cold,garl,q=1", seed)
        made.finished(tmp_path / "runs/paper" / f"r{seed}", config, 0.5)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(block, names)
    printed = capsys.readouterr().out
    assert "r0 finished 500" in printed and "garl(q=1.0) [0, 1]" in printed
    assert {cell.row for cell in names["cells"] if cell.ours} == {"GARL q=1"}


def test_the_page_names_every_file_of_the_package():
    files = {file.name for file in (ROOT / "qlog/report").glob("*.py")} - {"__init__.py"}
    assert not [file for file in files if file not in PAGE and file != "__main__.py"]
