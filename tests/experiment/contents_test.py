"""What a run is made of: a resumed run notices other examples, whatever they are read from."""

import dataclasses
import json
import os
import subprocess
import sys

import data_fixtures
import jax
import pytest
import tiny
from places import ROOT

from qlog import data
from qlog.commands import modes
from qlog.config import schema
from qlog.errors import ConfigError
from qlog.experiment import contents, prepare

WORLD = {"people": 4, "shortest": 1, "longest": 4}


def made(size=40, answer="answer [ met amy ]"):
    """Examples in the words of the synthetic task's vocabulary."""
    return [data.Example(f"{i}", "ask " + "amy " * (i % 5 + 1), answer) for i in range(size)]


def of(train, evaluation=None, **changes):
    """The identity of the tiny run, on other examples."""
    experiment = prepare(tiny.config(**changes), jax.devices()[:1], evaluate=False)
    dataset = experiment.train_data
    open_ = lambda source: data.open_dataset(source, experiment.formatter, dataset.limits)
    mine = {"train_data": open_(train)}
    if evaluation is not None:
        mine["evaluation_data"] = open_(evaluation)
    return contents.identity(dataclasses.replace(experiment, **mine))


def test_examples_of_ones_own_are_compared():
    began = of(made())
    contents.check_same_parts(began, of(made()))
    edited = made()
    edited[1] = dataclasses.replace(edited[1], answer="answer [ met bob ]")
    retold = made()
    retold[39] = dataclasses.replace(retold[39], extra={"level": 2})  # for a reward
    renamed = made()
    renamed[33] = data.Example("x", renamed[33].source, renamed[33].answer)
    for other in (made(39), made()[::-1], edited, renamed, retold):
        with pytest.raises(ConfigError, match="the run there has another split train"):
            contents.check_same_parts(began, of(other))
    # A split that only one of the two starts opened is not compared.
    both = of(made(), evaluation=made(3))
    assert set(both["examples"]) == {"train", "validation"}
    contents.check_same_parts(both, began)
    contents.check_same_parts(began, both)


def test_endless_data_are_known_by_their_first_examples():
    one = contents.identity(prepare(tiny.config(), jax.devices()[:1]))
    other = tiny.config(data={"world": {**WORLD, "people": 5}})
    assert one["examples"] != contents.identity(prepare(other, jax.devices()[:1]))["examples"]


def test_a_checkpoint_of_an_older_version_is_resumed():
    before = of(made())
    before["splits"] = {"train": "0123456789abcdef"}
    del before["examples"]
    contents.check_same_parts(before, of(made()))


def test_what_json_does_not_have_is_refused_before_training():
    strange = [data.Example("1", "ask amy", "answer [ met amy ]", extra={"at": object()})]
    with pytest.raises(ConfigError, match=r"example 0 \(id '1'\) has .*object.* extra at 'at'"):
        of(strange)


def test_two_examples_with_the_same_id_are_refused():
    with pytest.raises(ConfigError, match="examples 3 and 7 have the same id '3': give each"):
        of([*made(7), made(4)[3]])


def test_a_field_that_the_decoder_got_later_is_no_other_model():
    now = {"model": json.loads(json.dumps(dataclasses.asdict(tiny.SHAPE))), "examples": {}}
    older = {name: value for name, value in now["model"].items() if name != "layer_rope"}
    contents.check_same_parts({"model": older}, now)
    for other in (older | {"width": 2 * older["width"]}, older | {"depth": 3}, {}):
        with pytest.raises(ConfigError, match="the run there has another model"):
            contents.check_same_parts({"model": other}, now)


# ---- What is evaluated is new to the model ----


def own(folder, records, **changes):
    """The tiny run on files of records, given by split; their texts are digits."""
    files = {}
    for split, some in records.items():
        files[split] = str(folder / f"{split}.jsonl")
        text = "".join(json.dumps(record) + "\n" for record in some)
        (folder / f"{split}.jsonl").write_text(text)
    data_fixtures.write_spec(folder, data_fixtures.byte_level_spec())
    tree = {
        "architecture": {**tiny.config().architecture, "vocab_size": 272},
        "tokenizer": {"path": str(folder / "tokenizer.json")},
        "data": {"name": "jsonl", "files": files, "world": {}, "style": "cold"},
        "evaluation": {"every": 1, "prompts": 2, "prompts_per_batch": 1},
        "train": {"steps": 1, "prompts_per_step": 1},
    }
    return schema.merge(schema.merge(tiny.config(), tree), changes)


def sums(first, last, **more):
    return [{"source": f"{i} + 1", "answer": i + 1, **more} for i in range(first, last)]


def opened(config):
    return prepare(config, jax.devices()[:1])


def test_an_id_names_one_example_of_the_whole_data(tmp_path):
    numbered = lambda records: [{**each, "id": i} for i, each in enumerate(records)]
    splits = {"train": sums(0, 9), "validation": sums(9, 20), "test": sums(20, 22)}
    config = own(tmp_path, {split: numbered(records) for split, records in splits.items()})
    with pytest.raises(ConfigError, match="9 of 11 examples .* set config.data.fields.id to ''"):
        opened(config)
    digests = schema.merge(config, {"data": {"fields": {"id": ""}}})
    assert len(opened(digests).train_data) == 9


def test_a_run_is_not_evaluated_on_what_it_was_trained_on(tmp_path):
    config = own(tmp_path, {"train": sums(0, 9), "validation": sums(9, 20), "test": sums(8, 12)})
    tiny.run(config, tmp_path / "run", jax.devices()[:1])
    test = schema.merge(config, {"evaluation": {"split": "test"}})
    with pytest.raises(
        ConfigError, match=r"splits.json lists 1 of its 4 ids in train.*test.jsonl:1"
    ):
        modes.run("evaluate", test, tmp_path / "run")
    assert not (tmp_path / "run/evaluation_test.json").exists()


_HOSTS = """
import sys
import jax
from qlog.errors import QLOG_ERRORS
from qlog.experiment import contents
from qlog.parallel import distributed

with distributed.processes("on"):
    read = {"examples": {"train": str(jax.process_index())}}
    try:
        contents.check_hosts(read, is_function=sys.argv[1] == "function")
    except QLOG_ERRORS as error:
        print(error, flush=True)
        status = error.status
sys.exit(status)
"""


def test_a_function_of_other_examples_in_each_process_is_not_started_again(tmp_path):
    (tmp_path / "program.py").write_text(_HOSTS)
    for kind, status, said in (
        ("function", 2, "the function returns other"),
        ("files", 75, "differ"),
    ):
        program = [str(tmp_path / "program.py"), kind]
        result = subprocess.run(
            [sys.executable, "launch/local", "--processes=2", "--", *program],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert result.returncode == status, result.stdout + result.stderr
        assert said in result.stdout + result.stderr
