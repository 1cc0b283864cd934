"""Own data: what fields mean, which records are refused, how splits are drawn; functions."""

import asyncio
import datetime
import decimal
import gzip
import json
import os
import random
import re
import sys

import data_fixtures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlog import data
from qlog.config import schema
from qlog.errors import ConfigError

DATA = schema.default().data.to_dict()
ONE = '{"id": "a", "source": "1 + 1 =", "answer": "2"}\n'


def opened(split="train", **changes):
    corpus = data.find_corpus({**DATA, "name": "jsonl", **changes})
    return corpus.open(split, corpus.prepare())


def read(tmp_path, text, name="a.jsonl", **changes):
    """The examples of one file, which is both train and evaluation data."""
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(opened("validation", files={"validation": str(path)}, **changes))


def numbered(size):
    return [{"id": f"id-{i}", "source": f"{i} + 1 =", "answer": i + 1} for i in range(size)]


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


# ---- Records and fields ----


def test_fields_have_the_names_of_the_parts_and_the_rest_is_extra(tmp_path):
    record = {
        "id": 7,
        "source": "Où?\u2028 Là.",
        "answer": "Paris",
        "aliases": ["Paris, France", "Paris", "Paris, France"],
        "rationale": "It is the capital.",
        "level": {"hops": 2},
    }
    assert read(tmp_path, json.dumps(record, ensure_ascii=False)) == [
        data.Example(
            id="7",
            source="Où?\u2028 Là.",
            answer="Paris",
            aliases=("Paris, France",),
            rationale="It is the capital.",
            extra={"level": {"hops": 2}},
        )
    ]


def test_fields_name_keys_of_any_record(tmp_path):
    record = {
        "qid": "q1",
        "passage": {"text": "Amy is five."},
        "ask": "How old is {Amy}?",
        "answers": {"texts": ["5", "five"]},
    }
    fields = {"id": "qid", "answer": "answers.texts.0", "aliases": "answers.texts"}
    for source, text in (
        ("ask", "How old is {Amy}?"),
        (["passage.text", "ask"], "Amy is five.\n\nHow old is {Amy}?"),
        ("{passage.text}\nQ: {ask} {{}}", "Amy is five.\nQ: How old is {Amy}? {}"),
    ):
        (example,) = read(tmp_path, lines([record]), fields={**fields, "source": source})
        assert (example.id, example.source, example.answer) == ("q1", text, "5")
        assert example.aliases == ("five",)
        assert example.extra["passage"] == record["passage"] and "ask" not in example.extra


def test_answers_are_written_as_json_writes_them(tmp_path):
    answers = "0.50 3 -0.0 1e-7 true false 12345678901234567890 3.0".split()
    text = "".join(f'{{"source": "s{i}", "answer": {a}}}\n' for i, a in enumerate(answers))
    assert [example.answer for example in read(tmp_path, text)] == [
        "0.5",
        "3",
        "-0.0",
        "1e-07",
        "true",
        "false",
        "12345678901234567890",
        "3.0",
    ]


def test_a_record_without_an_id_is_known_by_its_content(tmp_path):
    records = [{"source": f"{i}", "answer": i} for i in range(3)]
    first = [example.id for example in read(tmp_path, lines(records))]
    assert len(set(first)) == 3
    assert first[::-1] == [example.id for example in read(tmp_path, lines(records[::-1]))]
    with pytest.raises(ConfigError, match=r"a.jsonl:2 and .*a.jsonl:5 hold the same record"):
        read(tmp_path, "\n" + lines([*records, records[0]]))
    with pytest.raises(ConfigError, match=r"a.jsonl:1 has no field 'uid'"):
        read(tmp_path, lines(records), fields={"id": "uid"})


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "a.jsonl: no records are in there"),
        ("\n \r\n", "a.jsonl: no records are in there"),
        (ONE + ONE[:20], "a.jsonl:2 is not JSON .*: put one whole JSON object on each line"),
        (ONE + ONE, "a.jsonl:1 and .*a.jsonl:2 hold the same record: leave one of them out"),
        (
            ONE + ONE.replace("1 +", "2 +"),
            "a.jsonl:1 and .*a.jsonl:2 have the same id 'a': leave one of them out",
        ),
        ("hello\n", "a.jsonl:1 is not JSON"),
        ('{"source": "s", "answer": 1, "answer": 2}', "the key 'answer' is there twice"),
        (
            "version https://git-lfs.github.com/spec/v1\n",
            "a.jsonl is a pointer of Git LFS .*git lf",
        ),
        (json.dumps({"source": "s"}, indent=1), "a.jsonl:1 is not JSON"),
        (ONE + "[1]", "a.jsonl:2 holds a JSON array and not an object"),
        ("null", "a.jsonl:1 holds a JSON null and not an object"),
        ("[1]", "a.jsonl, element 0 is a JSON number and not an object"),
        ("[1]\n[2]", r"a.jsonl is not JSON .*: it begins with \[, so the whole file must be one"),
        (ONE.encode("utf-16"), "a.jsonl is UTF-16 and not UTF-8: save it as UTF-8"),
        ("[" * 100_000, "a.jsonl has lists or objects more than 100 deep in each other: flat"),
        ('{"source": "s", "answer": ' + "[" * 100_000 + "}", "a.jsonl:1 has lists or objects"),
        ('{"source": "s", "answer": "a", "m": ' + "[" * 150 + "]" * 150 + "}", ":1 has lists or"),
        (
            '{"source": "s", "answer": ' + "1" * 6000 + "}",
            "a.jsonl:1 holds a whole number of over 4,000",
        ),
        (ONE.encode() + b'{"source": "\xff"}', "a.jsonl:2 is not UTF-8 .*: save it as UTF-8"),
        ("{}", "a.jsonl:1 has no field 'answer', it has none: name the key of the answer in"),
        (
            '{"sourse": "s", "answer": "a"}',
            r"a.jsonl:1 has no field 'source' \(did you mean 'sourse'\?\), it has 'sourse', 'answ",
        ),
        ('{"source": "s", "answer": null}', "a.jsonl:1: the field 'answer' is null, but must be"),
        (
            '{"source": "s", "answer": ""}',
            "a.jsonl:1: the field 'answer' is empty: leave the record out",
        ),
        ('{"source": "s", "answer": " "}', "a.jsonl:1: the field 'answer' is empty"),
        (
            '{"source": "s", "answer": ["a"]}',
            r"the field 'answer' is the list \['a'\], .*fields.answer = 'answer.0'",
        ),
        ('{"source": "s", "answer": {}}', "the field 'answer' is {}, but must be text"),
        ('{"source": "s", "answer": NaN}', r"a.jsonl:1 is not JSON \(NaN is no JSON value\)"),
        ('{"source": "s", "answer": 1e999}', "the field 'answer' is inf"),
        ('{"source": 1, "answer": "a"}', "the field 'source' is 1, but must be text"),
        ('{"source": " ", "answer": "a"}', "a.jsonl:1: the source is empty"),
        ('{"source": "s", "answer": "a", "id": true}', "the field 'id' is True, but must be text"),
        ('{"source": "s", "answer": "a", "aliases": [null]}', "the field 'aliases' is null"),
        ('{"source": "s", "answer": "a", "rationale": 3}', "'rationale' is 3, but must be text"),
        ('{"source": "\\ud800", "answer": "a"}', "the field 'source' holds half a character"),
        ('{"source": "s", "answer": "a", "id": ""}', "a.jsonl:1 has an empty id: give each record"),
        ('{"source": "s", "answer": "a", "id": " "}', "a.jsonl:1 has an empty id"),
        ('{"source": "s", "answer": "a", "m": {"n": [1e999]}}', "has inf .* its extra at 'm.n.0'"),
        ('{"source": "s", "answer": "a", "m": "\\ud800"}', "in its extra at 'm', which JSON does"),
    ],
    ids=lambda text: repr(text)[:40],
)
def test_careless_records_are_named_by_file_and_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, text)
    assert "\n" not in str(error.value)


GOOD = [{"id": f"good-{i}", "source": f"{i} + 1 =", "answer": i + 1} for i in range(3)]


@pytest.mark.parametrize("skip_from", ["jsonl", "json"])
def test_invalid_records_are_skipped_and_counted_where_asked(tmp_path, skip_from):
    bad = [
        {"id": "b", "source": "s", "answer": ""},
        {"id": "c", "source": "s", "answer": " "},
        {"id": "d", "source": "s", "answer": None},
        {"id": "e", "answer": "a"},
        {"id": "good-0", "source": "s", "answer": "a"},
        [1],
    ]
    several = [GOOD[0], *bad[:3], GOOD[1], *bad[3:], GOOD[2]]
    name = f"a.{skip_from}"
    text = json.dumps(several) if skip_from == "json" else lines(several) + '{"id": "cut'
    (tmp_path / name).write_text(text)
    files = {"validation": str(tmp_path / name)}
    with pytest.raises(ConfigError, match="'answer' is empty: leave .*or set config.data.invalid"):
        opened("validation", files=files)
    source = opened("validation", files=files, invalid="skip")
    assert [example.id for example in source] == ["good-0", "good-1", "good-2"] == source.ids
    assert source.skipped.number == (6 if skip_from == "json" else 7)
    told = source.skipped.lines()
    assert re.match(
        r"2 records, first .*a.json(l:2|, element 1): the field 'answer' is empty", told[0]
    )
    for reason in ("'answer' is null", "has no field 'source'", "has the id of an earlier record"):
        assert any(reason in line for line in told), told


def test_more_reasons_than_can_be_told_and_nothing_left(tmp_path):
    records = [{"id": str(i), "source": "s", "answer": {"n": i}} for i in range(9)]
    (tmp_path / "a.jsonl").write_text(lines([*records, *GOOD]))
    files = {"validation": str(tmp_path / "a.jsonl")}
    told = opened("validation", files=files, invalid="skip").skipped.lines()
    assert len(told) == 6 and told[-1] == "4 records for other reasons"
    (tmp_path / "a.jsonl").write_text(lines(records))
    with pytest.raises(
        ConfigError, match="invalid = 'skip' skips all 9 records of .*a.jsonl: 1 re"
    ):
        opened("validation", files=files, invalid="skip")


def test_drawn_splits_are_drawn_of_the_records_that_are_left(tmp_path):
    records = numbered(40)
    (tmp_path / "whole.jsonl").write_text(lines(records))
    broken = [*records[:20], {"id": "x", "source": "s", "answer": ""}, *records[20:]]
    (tmp_path / "broken.jsonl").write_text(lines(broken))
    for split in ("train", "validation", "test"):
        whole = opened(split, files={"train": str(tmp_path / "whole.jsonl")})
        left = opened(split, files={"train": str(tmp_path / "broken.jsonl")}, invalid="skip")
        assert list(left) == list(whole)


def test_an_empty_context_is_told(tmp_path):
    records = [{"id": str(i), "context": "", "ask": "Why?", "answer": "a"} for i in range(2)]
    records.append({"id": "2", "context": "Because.", "ask": "Why?", "answer": "a"})
    (tmp_path / "a.jsonl").write_text(lines(records))
    files = {"validation": str(tmp_path / "a.jsonl")}
    source = opened("validation", files=files, fields={"source": ["context", "ask"]})
    (note,) = source.notes
    assert re.match(r"2 of 3 records have an empty 'context' \(first .*a.jsonl:1\)", note)


def test_examples_of_a_function_that_cannot_be_used_are_skipped(tmp_path):
    def mine(split):
        return [example(0), example(1, answer=""), example(2)]

    formatter = data.Formatter(data.word_level(["s", "a"]), data.Task("mine", ""), "cold")
    limits = data_fixtures.limits(20, 20)
    source = opened(name=mine)
    with pytest.raises(ConfigError, match=r"mine\('train'\)\[1\] has an empty answer"):
        data.open_dataset(source, formatter, limits)
    dataset = data.open_dataset(source, formatter, limits, invalid="skip")
    assert [dataset[i].id for i in range(len(dataset))] == ["0", "2"] == dataset.ids
    assert dataset.encode(1).example.id == "2" and dataset.invalid.number == 1
    assert "has an empty answer" in dataset.invalid.lines()[0]
    with pytest.raises(ConfigError, match="invalid = 'skip' has to look at every example"):
        data.open_dataset(source, formatter, limits, invalid="skip", measure=2)
    with pytest.raises(ConfigError, match="config.data.invalid = 'drop' is unknown"):
        data.open_dataset(source, formatter, limits, invalid="drop")


def test_careless_files_that_mean_what_they_say(tmp_path):
    (expected,) = read(tmp_path, ONE)
    for text in ("\ufeff" + ONE, ONE.replace("\n", "\r\n"), "\n\n" + ONE.strip(), f"[{ONE}]"):
        assert read(tmp_path, text) == [expected], repr(text)
    assert read(tmp_path, gzip.compress(ONE.encode()), "a.jsonl.gz") == [expected]
    with pytest.raises(ConfigError, match="a.jsonl.gz cannot be read"):
        read(tmp_path, gzip.compress(ONE.encode())[:-9], "a.jsonl.gz")


def test_a_key_that_no_record_has_is_named(tmp_path):
    """Sparse fields are usual, but a misspelt name would leave out all of them."""
    records = [*numbered(2), {**numbered(3)[2], "why": "It follows."}]
    examples = read(tmp_path, lines(records), fields={"rationale": "why"})
    assert [example.rationale for example in examples] == ["", "", "It follows."]
    with pytest.raises(
        ConfigError, match=r"fields.aliases = 'anwser': no record has .*did you mean 'answer'"
    ):
        read(tmp_path, lines(records), fields={"aliases": "anwser"})


# ---- Files ----


def test_files_are_paths_globs_folders_and_lists(tmp_path, monkeypatch):
    records = numbered(6)
    for name, part in (("a", records[:2]), ("b", records[2:3]), ("c", records[3:])):
        (tmp_path / f"{name}.jsonl").write_text(lines(part))
    monkeypatch.chdir(tmp_path)
    everything = [f"id-{i}" for i in range(6)]
    for files in ("*.jsonl", ".", ["a.jsonl", "[bc].jsonl"], ["c.jsonl", "*.jsonl"]):
        examples = opened("validation", files={"validation": files})
        assert sorted(example.id for example in examples) == everything, files
    for files, message in (
        ("d.jsonl", r"files.train = 'd.jsonl' is neither a file nor a folder, and no file matches"),
        (["a.jsonl", "nope/*.jsonl"], r"files.train = 'nope/\*.jsonl' is neither"),
        ("gs:/bucket/a.jsonl", "is neither a file nor a folder"),
        ("http://host/a.jsonl", "give a folder, gs://BUCKET"),
    ):
        with pytest.raises(ConfigError, match=message):
            opened(files={"train": files})
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(ConfigError, match="holds no file of the train split whose name ends with"):
        opened(files={"train": "notes.txt"})


def test_of_a_folder_of_the_hub_the_files_of_the_split_are_taken(tmp_path):
    records = numbered(5)
    parts = {
        "data/train-00000-of-00002.parquet": records[:2],
        "data/train-00001-of-00002.parquet": records[2:3],
        "data/validation-00000-of-00001.parquet": records[3:4],
        "data/dev.parquet": records[4:],
        ".cache/train.parquet": records[:1],
    }
    for name, part in parts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(part), tmp_path / name)
    (tmp_path / "data/dataset_info.json").write_text("{}")
    files = {split: str(tmp_path) for split in ("train", "validation", "test")}
    opened_ids = lambda split, files: [
        e.id for e in opened(split, files={split: files}, name="parquet")
    ]
    assert opened_ids("validation", files["train"]) == ["id-4", "id-3"]
    assert opened_ids("validation", str(tmp_path / "data" / "train-*")) == ["id-0", "id-1", "id-2"]
    train = opened(files={**files, "test": str(tmp_path / "data/dev.parquet")}, name="parquet")
    assert [example.id for example in train] == ["id-0", "id-1", "id-2"]
    with pytest.raises(ConfigError, match="files.test = .* holds no file of the test split"):
        opened(files=files, name="parquet")


def folder_of(tmp_path, *names):
    """A folder with files of one record each, whose id is the file's name."""
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines([{"id": name, "source": f"{name}?", "answer": "a"}]))
    return str(tmp_path)


@pytest.mark.parametrize(
    "train, validation, test",
    [
        ("gsm-train.jsonl", "gsm-val.jsonl", "gsm-test.jsonl"),
        ("my_train.jsonl", "my_dev.jsonl", "my_test.jsonl"),
        ("TRAIN.jsonl", "Valid.jsonl", "a.b.test.v2.jsonl"),
        ("training/0.jsonl", "validation/0.jsonl", "testing/0.jsonl"),
        ("main/train/latest.jsonl", "main/dev/contest.jsonl", "main/test/attest.jsonl"),
        (
            "train-test-split/train2.jsonl",
            "train-test-split/val2.jsonl",
            "train-test-split/test2.jsonl",
        ),
    ],
)
def test_a_split_takes_only_its_files_wherever_the_name_says_it(tmp_path, train, validation, test):
    folder = folder_of(tmp_path, train, validation, test)
    files = dict.fromkeys(("train", "validation", "test"), folder)
    for split, name in (("train", train), ("validation", validation), ("test", test)):
        assert [example.id for example in opened(split, files=files)] == [name]


@pytest.mark.parametrize(
    "names, message",
    [
        (
            ("gsm-train.jsonl", "more.jsonl"),
            "'gsm-train.jsonl' in there is named after a split, and 'more.jsonl' is not: name the",
        ),
        (("train-test.jsonl", "a.jsonl"), "is named after test and train: name the files of each"),
        (
            ("main/train-0.jsonl", "socratic/train-0.jsonl"),
            "has files of the train split in several folders: name one of main, socratic, or list",
        ),
        (
            ("train.jsonl", "dev.jsonl", "test.jsonl"),
            r"has files of the test split, too \('test.jsonl'\), but .* set config.data.files.test",
        ),
    ],
)
def test_a_folder_of_which_it_is_not_clear_what_is_meant(tmp_path, names, message):
    folder = folder_of(tmp_path, *names)
    with pytest.raises(ConfigError, match=f"files.train = '{folder}'.* {message}"):
        opened(files={"train": folder, "validation": folder})


def test_a_folder_without_names_of_splits_is_taken_whole(tmp_path):
    folder = folder_of(tmp_path, "2023/latest.jsonl", "2024/contest.jsonl", "dataset_infos.json")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert len(opened("validation", files={"validation": folder})) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="files.train = .* is an empty folder"):
        opened(files={"train": str(tmp_path / "empty")})


def test_files_that_are_packed_or_links_to_nothing_are_told(tmp_path):
    (tmp_path / "a.jsonl.zip").write_bytes(b"x")
    with pytest.raises(
        ConfigError, match=r"no file matches it \(a.jsonl.zip is there: unpack it\)"
    ):
        opened(files={"train": str(tmp_path / "a.jsonl")})
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(ConfigError, match=r"a.jsonl is a link to .*gone.jsonl, which is not there"):
        opened(files={"train": str(tmp_path / "a.jsonl")})
    # A part of a folder's files would be left out without a word.
    (tmp_path / "b.jsonl").write_text(ONE)
    with pytest.raises(ConfigError, match=r"lacks a.jsonl \(a.jsonl is a link to .* copy with cp"):
        opened("validation", files={"validation": str(tmp_path)})
    (tmp_path / "gone.jsonl").write_text(ONE.replace('"a"', '"b"'))
    (tmp_path / "gone.jsonl").rename(tmp_path / "blob")
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "blob")
    assert len(opened("validation", files={"validation": str(tmp_path)})) == 2


@pytest.mark.parametrize("name", ["pipe.jsonl", "/dev/zero"])
def test_what_would_be_read_without_end_is_refused(name, tmp_path):
    if not os.path.isabs(name):
        os.mkfifo(tmp_path / name)
    (tmp_path / "zero.jsonl").symlink_to(name)
    for file in (str(tmp_path / "zero.jsonl"), str(tmp_path / name)):
        with pytest.raises(ConfigError, match="is not a plain file: copy|whose name ends with"):
            opened("validation", files={"validation": file})


def test_rows_of_parquet_are_as_lines_of_json(tmp_path):
    records = [
        {"id": "a", "source": "s", "answer": 1.5, "aliases": ["x"], "more": {"n": [1, None]}},
        {"id": "b", "source": "t", "answer": 2.0, "aliases": None, "more": None},
    ]
    table = pa.Table.from_pylist(records)
    pq.write_table(table, tmp_path / "a.parquet")
    files = {"validation": str(tmp_path / "a.parquet")}
    assert list(opened("validation", files=files, name="parquet")) == read(tmp_path, lines(records))
    # 0.1 stays 0.1 in fewer bits; what is missing, NaN too, is named.
    narrow = table.set_column(2, "answer", pa.array([0.1, None], pa.float32()))
    pq.write_table(narrow, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="a.parquet, row 1: the field 'answer' is null"):
        opened("validation", files=files, name="parquet")
    pq.write_table(narrow.slice(0, 1), tmp_path / "a.parquet")
    assert opened("validation", files=files, name="parquet")[0].answer == "0.1"
    nan = table.set_column(2, "answer", pa.array([1.0, float("nan")]))
    pq.write_table(nan, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="a.parquet, row 1: the field 'answer' is null"):
        opened("validation", files=files, name="parquet")
    (tmp_path / "a.parquet").write_text("PAR1")
    with pytest.raises(ConfigError, match="a.parquet cannot be read as Parquet"):
        opened("validation", files=files, name="parquet")


def test_binary_columns_are_text_where_they_are_named(tmp_path):
    columns = {"id": ["a"], "source": [b"Caf\xc3\xa9?"], "answer": [b"yes"], "raw": [b"\xff"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    files = {"validation": str(tmp_path / "a.parquet")}
    (found,) = opened("validation", files=files, name="parquet")
    assert (found.source, found.answer, found.extra) == ("Café?", "yes", {"raw": "/w=="})
    assert type(found.extra["raw"]) is str
    with pytest.raises(
        ConfigError, match="a.parquet, row 0: the field 'raw' is binary and not UTF"
    ):
        opened("validation", files=files, name="parquet", fields={"source": "raw"})


def parquet(path, **columns):
    """The examples of a file of these columns besides ids and sources."""
    arrays = {name: pa.array(column) for name, column in columns.items()}
    rows = len(next(iter(arrays.values())))
    ids = [f"row-{row}" for row in range(rows)]
    pq.write_table(pa.table({"id": ids, "source": ids, **arrays}), path)
    return {"name": "parquet", "files": {"validation": str(path)}}


NOT_UTF8 = pa.array([b"2", b"\xff"]).view(pa.string())
BEYOND_PYTHON = {
    "nanoseconds": pa.array([1000, 1001], pa.timestamp("ns")),
    "time": pa.array([1000, 1001], pa.time64("ns")),
    "duration": pa.array([1000, 1001], pa.duration("ns")),
    "zone": pa.array([1, 2], pa.timestamp("us", tz="Mars/Olympus")),
    "year": pa.array([0, 10**12], pa.timestamp("ms")).cast(pa.timestamp("s")),
    "far": pa.array([0, 10**9], pa.int32()).cast(pa.date32()),
    "text": NOT_UTF8,
    "twice": pa.StructArray.from_arrays([pa.array([1, 2]), pa.array([3, 4])], ["k", "k"]),
    "infinite": pa.array([1.0, float("inf")]),
    "inside": pa.array([[1], [1001]], pa.list_(pa.timestamp("ns"))),
}


def test_columns_that_python_cannot_hold_harm_only_where_they_are_named(tmp_path):
    found = opened("validation", **parquet(tmp_path / "a.parquet", answer=[1, 2], **BEYOND_PYTHON))
    assert [example.answer for example in found] == ["1", "2"]
    assert found[0].extra["nanoseconds"] == "1970-01-01T00:00:00.000001"
    assert found[1].extra["nanoseconds"] == "1970-01-01 00:00:00.000001001"
    assert found[1].extra["text"] == "\\xff"
    assert json.loads(json.dumps(found[1].extra)) == found[1].extra


@pytest.mark.parametrize("name", ["nanoseconds", "time", "far", "text", "infinite"])
def test_a_named_value_that_python_cannot_hold_is_an_invalid_record(tmp_path, name):
    data_of = parquet(tmp_path / "a.parquet", answer=BEYOND_PYTHON[name])
    with pytest.raises(ConfigError, match="a.parquet, row 1: the field 'answer' is the .*: write"):
        opened("validation", **data_of)
    left = opened("validation", **data_of, invalid="skip")
    assert [example.id for example in left] == ["row-0"] and left.skipped.number == 1


def test_numbers_of_parquet_keep_their_digits(tmp_path):
    numbers = ["12345678901234567.89", "1.10", "2.00", "0.00000012"]
    decimals = pa.array([decimal.Decimal(number) for number in numbers], pa.decimal128(38, 8))
    found = opened("validation", **parquet(tmp_path / "a.parquet", answer=decimals))
    # As the numbers of JSON are written, where one has these digits.
    texts = ["12345678901234567.89", "1.1", "2", "0.00000012"]
    assert [example.answer for example in found] == texts
    narrow = {
        "answer": pa.array([{"v": 0.1}], pa.struct([("v", pa.float32())])),
        "aliases": pa.array([[0.2]], pa.list_(pa.float32())),
        "half": pa.array([[np.float16(0.1)]], pa.list_(pa.float16())),
    }
    changes = parquet(tmp_path / "b.parquet", **narrow) | {"fields": {"answer": "answer.v"}}
    (example,) = opened("validation", **changes)
    assert (example.answer, example.aliases, example.extra["half"]) == ("0.1", ("0.2",), [0.1])


def test_names_in_parquet_that_are_not_utf8_are_a_sentence(tmp_path):
    inside = pa.array([{"inner-name": 1}])
    for name in (b"outer-name", b"inner-name"):
        changes = parquet(tmp_path / "a.parquet", **{"answer": [1], "outer-name": inside})
        whole = (tmp_path / "a.parquet").read_bytes()
        (tmp_path / "a.parquet").write_bytes(whole.replace(name, b"\xff" + name[1:]))
        with pytest.raises(ConfigError, match="a.parquet cannot be read as Parquet"):
            opened("validation", **changes)


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["source", "answer", "answer"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="a.parquet has two columns 'answer': rename one"):
        opened("validation", files={"validation": str(tmp_path / "a.parquet")}, name="parquet")


# ---- Splits ----


def ids(path, split, **files):
    return [e.id for e in opened(split, files={"train": str(path), **files})]


def test_missing_splits_are_drawn_from_train_by_the_ids(tmp_path):
    path, shuffled = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    records = numbered(200)
    path.write_text(lines(records))
    random.Random(0).shuffle(records)
    shuffled.write_text(lines(records))
    drawn = {split: ids(path, split) for split in ("validation", "test", "train")}
    assert [len(each) for each in drawn.values()] == [20, 20, 160]
    assert len(set(sum(drawn.values(), []))) == 200
    for split, chosen in drawn.items():  # each alone, and in another order of the file
        assert ids(shuffled, split) == chosen
    assert drawn["validation"][:3] == ["id-155", "id-97", "id-163"], "published numbers rest on it"
    # Files of a split are that split; the other one is drawn as before.
    own = tmp_path / "own.jsonl"
    own.write_text(lines(numbered(203)[200:]))
    assert ids(path, "test", test=str(own)) == ["id-200", "id-201", "id-202"]
    assert ids(path, "validation", test=str(own)) == drawn["validation"]
    assert len(ids(path, "train", test=str(own))) == 180
    assert ids(path, "train", test=str(own), validation=str(own)) == [f"id-{i}" for i in range(200)]


def test_few_records_and_missing_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(numbered(3)))
    assert sorted(ids(path, "train") + ids(path, "validation") + ids(path, "test")) == [
        "id-0",
        "id-1",
        "id-2",
    ]
    path.write_text(lines(numbered(2)))
    assert len(ids(path, "train")) == 2
    with pytest.raises(ConfigError, match="files.train has 2 records, and 3 are needed to draw"):
        ids(path, "validation")
    with pytest.raises(ConfigError, match="files names only validation, and the train split was"):
        opened("train", files={"validation": str(path)})
    with pytest.raises(ConfigError, match="the split 'dev' is unknown"):
        ids(path, "dev")


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(numbered(5)))
    source = opened("validation", files={"validation": str(path)})
    with path.open("r+") as file:  # in place
        file.write(lines([{"id": "id-9", "source": "9 + 1 =", "answer": 1}]))
    for index in (0, 4):  # a record that was not touched, too: who knows what the edit means
        with pytest.raises(ConfigError, match=f"a.jsonl:{index + 1}: the file changed while it wa"):
            source[index]
    path.write_text("")
    with pytest.raises(ConfigError, match="a.jsonl:2"):
        source[1]


# ---- Functions ----


def example(index=0, **changes):
    return data.Example(**{"id": f"{index}", "source": "s", "answer": "a", **changes})


class Lazy:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise KeyError("no such page")


class Leaves:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        sys.exit(0)


def test_extra_of_a_function_is_as_json_keeps_it():
    given = {"n": np.int64(3), "t": (1, (2.5,)), "m": {"b": np.bool_(True), "x": None}}

    def my_examples(split):
        return [example(extra=given, aliases=["b"])]

    (found,) = list(opened(name=my_examples))
    assert found.extra == {"n": 3, "t": [1, [2.5]], "m": {"b": True, "x": None}}
    assert found.extra == json.loads(json.dumps(found.extra, allow_nan=False))
    assert found.aliases == ("b",)


@pytest.mark.parametrize(
    "returned, message",
    [
        (ZeroDivisionError("no"), r"my_examples\('train'\) raised ZeroDivisionError: no\.$"),
        (None, r"my_examples\('train'\) returned an object of type NoneType: return a list of"),
        (iter([]), "returned an object of type list_iterator"),
        ({"a": 1}, "returned an object of type dict"),
        ("text", "returned an object of type str"),
        ([{"source": "s"}], r"my_examples\('train'\)\[0\] is an object of type dict, but must be"),
        ([example(), None], r"\[1\] is an object of type NoneType"),
        ([example(id=3)], r"\[0\] has the id 3, which must be text"),
        ([example(answer=3.5)], r"\[0\] has the answer 3.5, which must be text"),
        ([example(id="\ud800")], r"\[0\] has half a character in its id '.ud800'"),
        ([example(source=" ")], r"\[0\] has an empty source"),
        ([example(aliases="abc")], r"\[0\] has the aliases 'abc', which must be a tuple of texts"),
        ([example(aliases=(1,))], r"\[0\] has the aliases \(1,\)"),
        ([example(rationale=None)], r"\[0\] has the rationale None, which must be text"),
        ([example(extra=3)], r"\[0\] has the extra 3, which must be a mapping"),
        ([example(aliases=None)], r"\[0\] has the aliases None, which must be a tuple of texts"),
        ([example(aliases={"a"})], r"\[0\] has the aliases {'a'}, which must be a tuple of texts"),
        ([example(aliases=("\ud800",))], r"\[0\] has half a character in its aliases"),
        ([example(id=" ")], r"\[0\] has an empty id"),
        ([example(extra={1: 2})], r"\[0\] \(id '0'\) has the key 1 in its extra: keys must be"),
        ([example(extra={"a": [{"b": {1}}]})], r"has .1. \(set\) in its extra at 'a.0.b', which"),
        ([example(extra={"d": datetime.date(2024, 1, 2)})], r"\(date\) in its extra at 'd'"),
        ([example(extra={"x": np.float32("nan")})], r"has nan \(float\) in its extra at 'x'"),
        (SystemExit(0), r"my_examples\('train'\) raised SystemExit: 0\.$"),
        (asyncio.CancelledError("no"), r"my_examples\('train'\) raised CancelledError: no\.$"),
        (Leaves(), r"my_examples\('train'\)\[0\] raised SystemExit: 0\.$"),
        (Lazy(), r"my_examples\('train'\)\[0\] raised KeyError: 'no such page'"),
    ],
)
def test_what_a_function_returns_is_checked(returned, message):
    def my_examples(split):
        if isinstance(returned, BaseException):
            raise returned
        return returned

    with pytest.raises(ConfigError, match=message):
        list(opened(name=my_examples))


def test_a_function_takes_one_argument_and_has_a_name():
    def no_argument():
        return []

    def two(split, size):
        return []

    for function in (no_argument, two):
        with pytest.raises(ConfigError, match=f"{function.__name__} must be a function of one arg"):
            opened(name=function)

    class Callable:
        def __call__(self, split):
            return []

    with pytest.raises(ConfigError, match="is an object of type Callable, which has no name"):
        opened(name=Callable())
