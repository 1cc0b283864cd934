"""The official datasets in the layouts of the Hugging Face Hub give the official examples."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from places import TESTDATA

from qlog import data
from qlog.config import schema
from qlog.data import builders, splits
from qlog.errors import ConfigError

DATA = schema.default().data.to_dict()
OFFICIAL = {"train": "train", "validation": "dev", "test": "test"}


def records(name, official):
    """The raw records of an official file of the test data."""
    file = {"finqa": "{}.json", "musique": "musique_ans_v1.0_{}.jsonl"}.get(name)
    if name == "hotpotqa":
        file = {"train": "hotpot_train_v1.1.json", "dev": "hotpot_dev_distractor_v1.json"}[official]
    text = (TESTDATA / name / file.format(official)).read_text()
    return json.loads(text) if text.startswith("[") else [json.loads(x) for x in text.splitlines()]


def columns(objects):
    """A list of objects as an object of lists."""
    return {key: [each[key] for each in objects] for key in objects[0]}


def hotpotqa_structs(record, store=columns):
    record = dict(record)
    context = [{"title": t, "sentences": s} for t, s in record.pop("context")]
    facts = [{"title": t, "sent_id": i} for t, i in record.pop("supporting_facts")]
    id_ = record.pop("_id")
    return {"id": id_, **record, "context": store(context), "supporting_facts": store(facts)}


def hotpotqa_sequences(record):
    return hotpotqa_structs(record, store=list)


def musique_columns(record):
    steps = record["question_decomposition"]
    return {
        **record,
        "paragraphs": columns(record["paragraphs"]),
        "question_decomposition": columns(steps),
    }


_TOP = ("id", "pre_text", "post_text", "table")


def finqa_nested(record):
    """wujian123/finqa: in a column of Parquet, numbers and words are text."""
    qa = {**record["qa"], "exe_ans": str(record["qa"]["exe_ans"])}
    for key in ("steps", "tfidftopn"):
        qa.pop(key)
    return {**{key: record[key] for key in _TOP}, "qa": qa}


def finqa_card(record):
    """rootsautomation/FinQA."""
    qa = record["qa"]
    flat = {key: qa[key] for key in ("question", "answer", "program", "program_re")}
    about = {"exe_ans": str(qa["exe_ans"]), "gold_inds": json.dumps(qa["gold_inds"])}
    return {**{key: record[key] for key in _TOP}, **flat, **about}


def finqa_ibm(record):
    """ibm-research/finqa."""
    qa = record["qa"]
    return {
        **{key: record[key] for key in _TOP},
        "question": qa["question"],
        "answer": qa["answer"],
        "final_result": str(qa["steps"][-1]["res"]),
        "program_re": qa["program"],
        "gold_inds": list(qa["gold_inds"].values()),
    }


def finqa_dreamerdeo(record):
    """dreamerdeo/finqa."""
    qa = record["qa"]
    return {
        **{key: record[key] for key in _TOP},
        "question": qa["question"],
        "answer": qa["answer"],
        "final_res": str(qa["steps"][-1]["res"]),
        "steps": str(qa["steps"]),
        "program": qa["program"],
        "gold_evidence": list(qa["gold_inds"].values()),
    }


LAYOUTS = [
    ("hotpotqa", dict),  # the official records, as lines
    ("hotpotqa", hotpotqa_structs),
    ("hotpotqa", hotpotqa_sequences),
    ("musique", dict),
    ("musique", musique_columns),
    ("finqa", dict),
    ("finqa", finqa_nested),
    ("finqa", finqa_card),
    ("finqa", finqa_ibm),
    ("finqa", finqa_dreamerdeo),
]


def write(folder, name, layout, kind):
    """The dataset in a layout; returns `data.files`."""
    files = {}
    for split, official in OFFICIAL.items():
        if official not in builders.official_splits(name):
            continue
        rows = [layout(record) for record in records(name, official)]
        files[split] = str(folder / f"{split}-*.{kind}")
        for part, some in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
            path = folder / f"{split}-0000{part}-of-00002.{kind}"
            if kind == "parquet":
                pq.write_table(pa.Table.from_pylist(some), path)
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return files


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """(name, split) -> the examples by the official route, and the ids of the split."""
    data_dir = str(tmp_path_factory.mktemp("data"))

    def opened(name, split):
        source = find(name, manual_dir=str(TESTDATA), data_dir=data_dir)
        return list(source.open(split, source.prepare()))

    return opened


def find(name, **changes):
    return data.find_corpus({**DATA, "name": name, **changes})


@pytest.mark.parametrize(
    "name, layout, kind",
    [
        pytest.param(name, layout, kind, id=f"{name}-{layout.__name__}-{kind}")
        for name, layout in LAYOUTS
        for kind in ("jsonl", "parquet")
        # Pairs of a text and a number, and columns of both, are not for Parquet.
        if kind == "jsonl" or layout is not dict or name == "musique"
    ],
)
def test_examples_and_splits_are_the_official_ones(name, layout, kind, official, tmp_path):
    corpus = find(name, files=write(tmp_path, name, layout, kind))
    prepared = corpus.prepare()
    assert corpus.task == data.TASKS[name]
    for split in splits.NAMES:
        source = corpus.open(split, prepared)
        expected = official(name, split)
        assert [example.id for example in source] == [example.id for example in expected]
        for example, same in zip(source, expected, strict=True):
            assert example == same
        assert source.records.official == (
            "dev" if split != "train" and name != "finqa" else OFFICIAL[split]
        )


def test_a_split_that_the_files_lack(official, tmp_path):
    files = write(tmp_path, "finqa", finqa_card, "parquet")
    del files["test"]
    corpus = find("finqa", files=files)
    # Without a test file both come from dev, as by the official route.
    ids = {s: [e.id for e in corpus.open(s, corpus.prepare())] for s in ("validation", "test")}
    assert ids["test"] and not set(ids["validation"]) & set(ids["test"])
    corpus = find("finqa", files={"train": files["train"]})
    with pytest.raises(ConfigError, match="the validation split comes from the official dev file"):
        corpus.open("validation", corpus.prepare())


def test_a_folder_with_files_of_a_split_that_is_not_named(tmp_path):
    write(tmp_path, "finqa", finqa_card, "parquet")
    files = {"train": str(tmp_path), "validation": str(tmp_path)}
    with pytest.raises(ConfigError, match="has files of the test split, too .*files.test to the"):
        find("finqa", files=files).prepare()


def test_lists_may_be_json_text(official, tmp_path):
    texts = ("table", "pre_text", "post_text")

    def as_text(record):
        card = finqa_card(record)
        return {**card, **{key: json.dumps(card[key]) for key in texts}}

    corpus = find("finqa", files=write(tmp_path, "finqa", as_text, "parquet"))
    assert list(corpus.open("train", corpus.prepare())) == official("finqa", "train")


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("finqa", {"program_re": None, "program": None}, "qlog knows .*program_re"),
        ("finqa", {"program": "guess(1)"}, "cannot read the step 'guess"),
        ("finqa", {"program": "divide(1, 0)"}, "cannot compute the step 'divide"),
        ("finqa", {"exe_ans": "about 3"}, "could not convert string to float: 'about 3'"),
        ("finqa", {"exe_ans": "nan"}, "its exe_ans is 'nan'"),
        ("finqa", {"answer": None}, "its answer is None, which is not text"),
        ("musique", {"answerable": False}, "it is not answerable: use the configuration 'answ"),
        ("musique", {"paragraphs": {"title": "a"}}, "a list or an object of lists is wanted"),
        ("hotpotqa", {"context": {"title": ["a"], "sentences": []}}, "is shorter|shorter"),
        ("hotpotqa", {"context": None}, "is None, which is not a list"),
        ("hotpotqa", {"context": []}, "its context is empty"),
        (
            "hotpotqa",
            {"context": {"title": ["a"], "sentences": ["abc"]}},
            "sentences is 'abc', whi",
        ),
        ("hotpotqa", {"context": [["a", ["b"], "c"]]}, "no pairs of title and sentences"),
        ("hotpotqa", {"answer": ""}, "its answer is empty"),
        ("hotpotqa", {"id": " "}, "its id is empty"),
        ("musique", {"answer_aliases": "abc"}, "answer_aliases is 'abc', which is not a list"),
        ("musique", {"answer_aliases": [None]}, "answer_aliases.0 is None, which is not text"),
        ("musique", {"paragraphs": []}, "its paragraphs are empty"),
        ("musique", {"paragraphs": "abc"}, "'abc', which is not a list"),
        ("musique", {"answer": " "}, "its answer is empty"),
        ("finqa", {"pre_text": "One. Two."}, "pre_text is 'One. Two.', which is not a list"),
        ("finqa", {"table": "a | b"}, "table is 'a . b', which is not a list"),
        ("finqa", {"table": ["abc"]}, "table.0 is 'abc', which is not a list"),
        ("finqa", {"table": [[None]]}, "a cell of its table is None"),
        ("finqa", {"gold_evidence": 3}, "gold_inds is 3, which is not a list"),
        ("finqa", {"exe_ans": True}, "its exe_ans is True, which is neither"),
    ],
    ids=str,
)
def test_records_in_other_layouts_are_refused(name, change, message, tmp_path):
    layout = {"finqa": finqa_dreamerdeo, "musique": dict, "hotpotqa": hotpotqa_structs}[name]
    row = {**layout(records(name, "train")[0]), **change}
    row = {key: value for key, value in row.items() if not (key == "program_re" and value is None)}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    corpus = find(name, files={"train": str(path)})
    with pytest.raises(ConfigError, match=f"a.jsonl:1 is not a record of {name} .*({message})"):
        corpus.open("train", corpus.prepare())


def test_a_mirror_without_program_and_value_is_refused(tmp_path):
    row = finqa_dreamerdeo(records("finqa", "train")[0])
    del row["program"]
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    corpus = find("finqa", files={"train": str(tmp_path / "a.jsonl")})
    with pytest.raises(ConfigError, match="a.jsonl:1 is not a record of finqa .*program"):
        corpus.open("train", corpus.prepare())


def test_records_that_cannot_be_used_are_skipped_where_asked(tmp_path):
    """MuSiQue-Full from the Hub: half of its records have no answer in their paragraphs."""
    good = records("musique", "dev")
    full = [each for r in good for each in (r, {**r, "id": r["id"] + "x", "answerable": False})]
    full += [{**good[0], "id": "deep", "paragraphs": "[" * 100_000}, {**good[0], "id": ""}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in full))
    section = {**DATA, "name": "musique", "files": {"validation": str(tmp_path / "a.jsonl")}}
    corpus = data.find_corpus(section)
    with pytest.raises(ConfigError, match="a.jsonl:2 is not a record .*it is not answerable"):
        corpus.open("validation", corpus.prepare())
    corpus = data.find_corpus({**section, "invalid": "skip"})
    examples = corpus.open("validation", corpus.prepare())
    assert {e.id for e in examples} <= {r["id"] for r in good} and len(examples) > 3
    told = examples.records.skipped.lines()
    assert told[0].startswith(f"{len(good)} records, first ") and "not answerable" in told[0]
    assert examples.records.skipped.number == len(good) + 2
