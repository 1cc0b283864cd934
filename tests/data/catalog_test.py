"""Which data a config names: files, functions, the official datasets, and what is refused."""

import pytest
from places import TESTDATA

from qlog import data
from qlog.config import schema
from qlog.data import builders, synthetic
from qlog.errors import ConfigError

DATA = schema.default().data.to_dict()


def find(**changes):
    return data.find_corpus({**DATA, **changes})


def test_every_kind_of_data_has_a_task_and_opens_its_splits(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"source": "1 + 1 =", "answer": 2}\n')

    def my_examples(split):
        return [data.Example("1", "1 + 1 =", "2")]

    own = {"files": {split: str(tmp_path / "a.jsonl") for split in ("train", "validation")}}
    official = {"manual_dir": str(TESTDATA), "data_dir": str(tmp_path)}
    for name, changes in {
        "jsonl": own,
        my_examples: {},
        "multihop": {"world": {"people": 4, "longest": 4, "shortest": 2}},
        **dict.fromkeys(builders.NAMES, official),
    }.items():
        corpus = find(name=name, **changes)
        source = corpus.open("validation", corpus.prepare())
        assert isinstance(source[0], data.Example)
        assert corpus.task.name == (name if isinstance(name, str) else "my_examples")
        assert corpus.task.description and corpus.endless == (name in synthetic.TASKS)
        assert (corpus.tokenizer is not None) == corpus.endless
        assert bool(corpus.asset) == (name in builders.NAMES)


def test_the_description_is_what_the_config_says():
    for name in ("hotpotqa", "multihop"):
        assert find(name=name, description="Say it.").task.description == "Say it."
        assert find(name=name).task.description != ""


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": "jsnl"}, r"name = 'jsnl' is unknown \(did you mean 'jsonl'\?\): use one of"),
        ({"name": "jsonl"}, r"files is empty and config.data.name = 'jsonl' reads files"),
        ({"files": {"trian": "a"}}, r"files.trian = 'a' .*\(did you mean 'train'\?\)"),
        ({"files": "a.jsonl"}, r"files = 'a.jsonl' must be a section, such as {.train"),
        ({"name": ["a"]}, r"name = \['a'\] is unknown: use one of"),
        ({"files": {"train": 3}}, r"files.train = 3 must be a path, a glob, or a list of them"),
        ({"files": {"train": []}}, r"files.train = \[\] must be a path"),
        ({"files": {"train": ""}}, r"files.train = '' must be a path"),
        ({"fields": {"sorce": "a"}}, r"fields.sorce = 'a' .*\(did you mean 'source'\?\)"),
        ({"fields": {"answer": 3}}, r"fields.answer = 3 must be a key of the records"),
        ({"fields": {"answer": ["a", "b"]}}, r"fields.answer = \['a', 'b'\] must be a key"),
        ({"fields": {"source": "{a"}}, r"fields.source = '{a': .* write {key} for a field"),
        ({"fields": {"source": "{}"}}, r"fields.source = '{}': write only keys in braces"),
        ({"world": {"hops": 2}}, r"world = {'hops': 2} is not read by 'jsonl'.*: remove it"),
        ({"manual_dir": "a"}, r"manual_dir = 'a' is not read by 'jsonl'"),
        ({"name": "multihop"}, r"files = .* is not read by 'multihop'"),
        ({"name": "hotpotqa", "fields": {"id": "a"}}, r"fields = .* is not read by 'hotpotqa'"),
        ({"name": "hotpotqa", "manual_dir": "a"}, r"manual_dir = 'a' is not read next to"),
        (
            {"name": "hotpotqa", "files": {"test": "a"}},
            r"files.test = 'a': the official test split of hotpotqa has no answers",
        ),
        ({"name": "multihop", "files": {}, "world": {"hop": 2}}, r"did you mean 'hops'"),
    ],
    ids=str,
)
def test_mistakes_are_named_before_a_file_is_read(changes, message):
    files = {"files": {"train": "a.jsonl"}} if changes != {"name": "jsonl"} else {}
    with pytest.raises(ConfigError, match=message):
        find(**{"name": "jsonl", **files, **changes})
