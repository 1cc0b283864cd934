"""The page about data: its file is read, its config files work, its splits are as it says."""

import json
import pathlib
import re

import data_fixtures
import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from qlog import data
from qlog.commands import show
from qlog.config import default, schema
from qlog.config.check import check_config
from qlog.experiment import files

PAGE = pathlib.Path(data.__file__).with_name("README.md").read_text()
LINES = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SHOW = re.search(r"`python -m qlog.commands.show (.*?)`", PAGE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the page's file and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.jsonl").write_text(LINES[0])
    data_fixtures.write_spec(tmp_path, data_fixtures.byte_level_spec())
    return tmp_path


def trained(config, workdir):
    """One step of the tiny model, with the tokenizer in the current folder."""
    small = {
        "dtype": "float32",
        "architecture": {**tiny.config().architecture, "vocab_size": 272},
        "tokenizer": {"path": "tokenizer.json"},
        "data": {"max_prompt_tokens": 200},
        "rollout": {"rationale_budget": 4, "rollouts_per_prompt": 2, "answer_reserve": 8},
        "train": {"steps": 1, "prompts_per_step": 1, "remat": "none"},
        "evaluation": {"prompts_per_batch": 1, "rollouts_per_prompt": 2},
    }
    tiny.run(schema.merge(config, small), workdir, jax.devices()[:1])
    return json.loads((workdir / "splits.json").read_text())["splits"]


def test_the_json_lines_train(folder, capsys):
    names = {}
    exec(EXAMPLES[0], names)
    (folder / "mine.py").write_text(EXAMPLES[0])
    command = SHOW[1].replace("TOKENIZER", ".")
    assert show.main(["show", *command.split(), "--split=validation"]) == 0
    shown = capsys.readouterr().out
    assert "jsonl, warm: 1 example\n" in shown and "Solve the sum." in shown
    splits = trained(names["get_config"](), folder / "run")
    assert [len(split["ids"]) for split in splits.values()] == [1, 1]
    assert "paper_size" not in splits["train"]


def test_the_function_trains_and_resumes_by_its_name(folder):
    names = {"__name__": "mine"}
    exec(EXAMPLES[3], names)
    splits = trained(names["get_config"](), folder / "run")
    assert len(splits["train"]["ids"]) == len(splits["validation"]["ids"]) == 100
    written = json.loads((folder / "run/config.json").read_text())
    assert written["data"]["name"] == "sums"
    assert '"data": "sums"' in (folder / "run/results.json").read_text()
    trained(names["get_config"](), folder / "run")


def test_the_other_configs_open_what_they_name(folder):
    names = {"default": default}
    exec(EXAMPLES[1], names)
    config = names["config"]
    check_config(config)
    (folder / "gsm").mkdir()
    for split, size in (("train", 5), ("validation", 2)):
        rows = [{"question": f"{split} {i}", "final": i} for i in range(size)]
        pq.write_table(pa.Table.from_pylist(rows), f"gsm/{split}-00000-of-00001.parquet")
    prepared = files.prepare_data(config)
    assert len(files.open_source(config, "validation", prepared)) == 2
    # No file is named for the test split: it has one of the five.
    assert len(files.open_source(config, "train", prepared)) == 4
    exec(EXAMPLES[2], names)
    check_config(names["config"])


def test_the_page_names_every_file_of_the_room_and_every_part():
    for file in pathlib.Path(data.__file__).parent.glob("*.py"):
        assert file.name in PAGE or file.name == "__init__.py"
    for part in data.own.PARTS:
        assert f"`{part}`" in PAGE
