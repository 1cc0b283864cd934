"""JSON lines of any bytes: what is whole is read, the rest is told in a sentence or set aside."""

import json
import pathlib
import shutil

import fuzzing
import jax
import pytest
import tiny
from hypothesis import strategies as st

from qlog import evaluation
from qlog.data import Example
from qlog.errors import ConfigError
from qlog.experiment import prepare
from qlog.report import read as report
from qlog.runs import resumption
from qlog.runs.log import RunLog, read_jsonl
from qlog.storage import paths

pytestmark = pytest.mark.slow
ONE = jax.devices()[:1]

# ---- Lines ----

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([10**308, 10**309, -(10**400), 10**4000]),  # the first one fits a float
    st.floats(),
    fuzzing.TEXTS,
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(fuzzing.TEXTS, inner, max_size=3)
    ),
    max_leaves=5,
)
_RAW = st.sampled_from(
    [
        b"{}",
        b"[]",
        b"5",
        b"null",
        b'"a"',
        b"NaN",
        b"-",
        b"{",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\x00",
        b"[" * 500,
        b"[" * 100_000,
        b'{"a":' * 2000,
        b"[" * 99 + b"]" * 99,
        b'{"step": 1e999, "phase": "train", "source": 1e999, "answer": 1e999}',
        b'{"step": ' + b"9" * 6000 + b', "phase": "train", "source": "a", "answer": 1}',
        b'{"step": 1, "step": 2, "phase": "train"}',
        b'{"source": "ask amy", "source": "ask bob", "answer": "bob"}',
        b'{"source": "\\ud800", "answer": "bob"}',
        b'{"source": "ask amy", "answer": "\\ud800"}',
        b'{"step": 1, "phase": "\\udfff"}',
        b'{"step": true, "phase": "train"}',
        b'{"step": 1, "phase": ["train"]}',
        b'{"step": 1, "phase": "train", "steps_since_checkpoint": "nan"}',
        b'{"step": -1, "phase": "train", "loss": "x"}',
        b"version https://git-lfs.github.com/spec/v1",
        "{}".encode("utf-16"),
        b"\r",
        b"\xe2\x80\xa8",
    ]
)


def _dumped(value):
    return json.dumps(value).encode()


def lines(objects):
    """Files of JSON lines, whose objects are drawn from a strategy, and much else."""
    whole = objects.map(_dumped)
    cut = st.tuples(whole, st.floats(0, 1)).map(lambda case: case[0][: int(case[1] * len(case[0]))])
    line = st.one_of(whole, whole, whole, cut, _RAW, _VALUES.map(_dumped), st.binary(max_size=20))
    return st.tuples(
        st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\n"]),
        st.lists(line, max_size=6),
        st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n", b"\n \n"]),
        st.sampled_from([b"\n", b""]),
    ).map(lambda case: case[0] + case[2].join(case[1]) + case[3])


def mutated(record):
    """The record, with some of its fields gone, changed, or added."""
    changed = st.dictionaries(st.sampled_from([*record, "extra"]), _VALUES, max_size=2)
    gone = st.sets(st.sampled_from(list(record)), max_size=1)
    return st.tuples(changed, gone).map(
        lambda case: {k: v for k, v in {**record, **case[0]}.items() if k not in case[1]}
    )


# ---- Data ----

_RECORDS = st.one_of(
    st.builds(
        lambda i, name: {"id": f"{i}", "source": f"ask {name} {i}", "answer": name},
        st.integers(0, 99),
        st.sampled_from(["amy", "bob"]),
    ),
    mutated({"id": "1", "source": "ask amy", "answer": "bob", "aliases": ["amy"]}),
)


def test_data_files(record_property, tmp_path):
    tree = tiny.config(evaluation={"every": 0}, data={"name": "jsonl", "world": {}})
    tree.data.max_prompt_tokens = 200
    prepare(tiny.config(), ONE).formatter.tokenizer.save(tmp_path)
    tree.tokenizer.path = str(tmp_path)
    file = tmp_path / "a.jsonl"
    tree.data.files = {"train": str(file)}

    def examples(invalid):
        """All examples, or the sentence that refuses the file."""
        tree.data.invalid = invalid
        try:
            dataset = prepare(tree, ONE).train_data
        except ConfigError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            assert str(file) in str(error) or "config.data" in str(error), error
            return str(error)
        found = [dataset.encode(index) for index in range(len(dataset))]
        assert all(isinstance(each.example, Example) and each.prompt for each in found)
        return [each.example.id for each in found]

    def holds(content):
        file.write_bytes(content)
        strict, lenient = examples("error"), examples("skip")
        if not isinstance(strict, str):  # nothing was wrong: nothing is skipped
            assert lenient == strict
        elif not isinstance(lenient, str):
            assert len(lenient) < content.count(b"\n") + 1

    fuzzing.try_cases(record_property, "data files", 100, lines(_RECORDS), holds)


# ---- Logs ----

_EVENTS = st.one_of(
    st.builds(
        lambda step, phase: {"step": step, "phase": phase, "loss": 0.5},
        st.integers(0, 9),
        st.sampled_from(["train", "validation"]),
    ),
    mutated({"step": 3, "phase": "train", "loss": 1.0, "steps_since_checkpoint": 1.0}),
)


def _readable(content):
    """The lines of a log that hold an object, by number."""
    found = {}
    for number, line in enumerate(content.split(b"\n")):
        try:
            value = json.loads(line.decode())
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found[number] = value
    return found


def _same(one, two):
    return json.dumps(one) == json.dumps(two)  # NaN is no NaN


def test_logs(record_property, tmp_path):
    workdir = tmp_path / "run"
    config = tiny.config()

    def holds(case):
        content, name, start = case
        shutil.rmtree(workdir, ignore_errors=True)
        workdir.mkdir()
        file = workdir / f"{name}.jsonl"
        file.write_bytes(content)
        readable = list(_readable(content).values())
        assert _same(read_jsonl(file), readable)
        try:
            resumption.check_nothing_is_lost(paths.Path(workdir))
        except ConfigError as error:
            assert "metrics.jsonl tells of a checkpoint" in str(error)
        # ---- A run that resumes: each line of earlier steps stays, and nothing else ----
        is_event = lambda row: (
            type(row.get("step")) is int
            and (name == "rollouts" or isinstance(row.get("phase"), str))
        )
        with RunLog(workdir, start, config) as log:
            log.scalars(start, "train", {"loss": 1.0})
            log.rollouts(start, [{"answer": "a"}])
        kept = [row for row in readable if is_event(row) and row["step"] < start]
        now = read_jsonl(file)
        assert _same(now[:-1], kept) and now[-1]["step"] == start
        # ---- What was set aside is whole ----
        aside = workdir / f"{name}.jsonl.damaged"
        for line in filter(None, content[: content.rfind(b"\n") + 1].split(b"\n")):
            if not any(map(is_event, _readable(line).values())):
                assert line in aside.read_bytes().split(b"\n")

    cases = st.tuples(lines(_EVENTS), st.sampled_from(["metrics", "rollouts"]), st.integers(0, 10))
    fuzzing.try_cases(record_property, "logs", 500, cases, holds)


# ---- Samples ----

_ROW = {
    "id": "1",
    "golds": ["bob"],
    "answers": ["bob", "amy", "", "a</think>"],
    "rationales": ["", "", "", ""],
    "prompt": "ask",
    "source": "ask amy",
    "official_answer": None,
    "log_p": -1.5,
    "log_w": [-1.0, -2.0, -3.0, -4.0],
    "forced": [True, False, False, True],
    "complete": [True, True, True, True],
    "extra": {},
}
_ROWS = st.one_of(st.integers(0, 99).map(lambda i: {**_ROW, "id": str(i)}), mutated(_ROW))


def test_samples(record_property, tmp_path):
    config, file = tiny.config(), tmp_path / "samples.jsonl"

    def holds(content):
        file.write_bytes(content)
        try:
            found = evaluation.recompute(config, paths.Path(file))
        except ConfigError as error:
            assert "\n" not in str(error) and str(file) in str(error)
            return
        assert all(isinstance(value, int | float) for value in found.values())
        assert 0.0 <= found["p@1"] <= 1.0

    fuzzing.try_cases(record_property, "samples", 250, lines(_ROWS), holds)


# ---- A report of a run whose files are anything ----


def test_reports(record_property, tmp_path):
    tiny.run(tiny.config(evaluation={"every": 3}), tmp_path / "whole", ONE)
    workdir = tmp_path / "run"
    names = [f.relative_to(tmp_path / "whole") for f in (tmp_path / "whole").rglob("*.json*")]
    names = [name for name in names if name.parts[0] != "checkpoints"]
    # Files that the run had no reason to write.
    names += [pathlib.Path(name) for name in ("seconds.json", "final.json", "evaluation_test.json")]
    names = sorted({*names, pathlib.Path("samples/final.questions.json")})

    def holds(case):
        name, content = case
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", workdir, ignore=shutil.ignore_patterns("checkpoints"))
        (workdir / name).write_bytes(content)
        try:
            for run in report.read(report.find([str(workdir)])):
                assert isinstance(run.notes, tuple)
        except ConfigError as error:
            assert "\n" not in str(error)

    values = st.one_of(_VALUES.map(_dumped), mutated(_ROW).map(_dumped), _RAW, lines(_EVENTS))
    # What a file is made of, with any value in the place of each: drawn as often as all the rest.
    score = mutated({"value": 0.5, "of": "m@4"})
    results = mutated({"step": 3, "metrics": {"p@1": 0.5}, "evaluation": {}})
    owner = mutated({"owner": "x", "host": "y", "pid": 1, "time": 1.0, "step": 3, "released": True})
    questions = mutated({"ids": ["1"], "p@1": [0.5]})
    own = {
        "seconds.json": _SCALARS,
        "scores.json": st.dictionaries(st.one_of(fuzzing.TEXTS, st.just("3")), score, max_size=3),
        "owner.json": owner,
        "samples/final.questions.json": questions,
    }
    of_name = lambda name: st.tuples(st.just(name), own.get(str(name), results).map(_dumped))
    cases = st.one_of(
        st.tuples(st.sampled_from(names), values), st.sampled_from(names).flatmap(of_name)
    )
    fuzzing.try_cases(record_property, "reports", 300, cases, holds)
