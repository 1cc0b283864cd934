"""The log of a run: what a resumed run keeps, drops, and sets aside."""

import json

import buckets
import pytest
import tiny

from qlog import console
from qlog.runs import log
from qlog.runs.log import RunLog, numbers, read_events, read_jsonl
from qlog.storage import paths

# Each is one line in the middle of a log.
DAMAGE = {
    "garbage": b"\x00\x01garbage",
    "cut": b'{"step": 3, "phase": "tra',
    "a number": b"5",
    "no step": b'{"phase": "train"}',
    "a step of text": b'{"step": "three"}',
    "no UTF-8": b'{"step": 3, "phase": "\xff\xfe"}',
    "no phase": b'{"step": 3}',
    "a phase that is a list": b'{"step": 3, "phase": ["train"]}',
    "half a character": b'{"step": 3, "phase": "\\ud800"}',
    "deeply nested": b"[" * 100_000,
}


def lines(steps):
    return b"".join(b'{"step": %d, "phase": "train"}\n' % step for step in steps)


def steps(workdir, name="metrics"):
    return [line["step"] for line in read_jsonl(workdir / f"{name}.jsonl")]


@pytest.mark.parametrize("damage", DAMAGE)
def test_one_damaged_line_costs_no_other(damage, tmp_path, capsys):
    log = lines(range(3)) + DAMAGE[damage] + b"\n" + lines(range(4, 8))
    (tmp_path / "metrics.jsonl").write_bytes(log)
    expected = [0, 1, 2, 4, 5, 6, 7]
    if damage not in ("no step", "no phase", "a step of text", "a phase that is a list"):
        assert steps(tmp_path) == expected
    with RunLog(tmp_path, 6, tiny.config()) as run_log:
        run_log.scalars(6, "train", {"loss": 1.0})
    assert steps(tmp_path) == [0, 1, 2, 4, 5, 6]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == DAMAGE[damage] + b"\n"
    said = capsys.readouterr().out.replace("\n", "")
    assert "metrics.jsonl: no events in line 4" in said
    RunLog(tmp_path, 6, tiny.config()).close()  # once only
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == DAMAGE[damage] + b"\n"


def test_a_last_line_that_a_crash_has_cut_is_no_damage(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(lines(range(4)) + b'{"step": 4, "pha')
    RunLog(tmp_path, 4, tiny.config()).close()
    assert steps(tmp_path) == [0, 1, 2, 3]
    assert not (tmp_path / "metrics.jsonl.damaged").exists()


def test_segments_in_a_bucket_are_mended_too(tmp_path):
    with buckets.google() as (_, clients), pytest.MonkeyPatch.context() as patch:
        for name, value in clients.items():
            patch.setenv(name, value)
        workdir = paths.parse(f"gs://{buckets.BUCKET}/damaged")
        paths.write(workdir / "metrics/000000.jsonl", lines(range(3)))
        paths.write(workdir / "metrics/000003.jsonl", lines([3]) + b"{}\n5\n" + lines([4, 5]))
        paths.write(workdir / "metrics/000006.jsonl", lines([6]))
        with RunLog(workdir, 5, tiny.config()) as run_log:
            run_log.scalars(5, "train", {"loss": 1.0})
        assert steps(workdir) == [0, 1, 2, 3, 4, 5]
        assert paths.read(workdir / "metrics.jsonl.damaged") == "{}\n5\n"


def test_lines_of_any_text_are_read_back(tmp_path):
    with RunLog(tmp_path, 0, tiny.config()) as run_log:
        run_log.rollouts(0, [{"answer": "a\u2028b\n\x85c"}])
    (line,) = read_jsonl(tmp_path / "rollouts.jsonl")
    assert line == {"step": 0, "answer": "a\u2028b\n\x85c"}
    assert json.loads((tmp_path / "rollouts.jsonl").read_text()) == line


def test_numbers_of_a_line_are_read_and_nothing_else():
    line = {"step": 1, "phase": "train", "a": 2, "b": "nan", "c": "x", "d": [1], "e": True}
    found = numbers(line | {"f": 10**400})
    assert found.pop("b") != 0.0 and found == {"a": 2.0}


def test_a_long_step_says_what_it_does(tmp_path, capsys, monkeypatch):
    config = tiny.config(train={"steps": 9})
    with RunLog(tmp_path, 3, config) as run_log:
        run_log.begins(3)
        for what in ("compiling: 1 of 2", "decoding: token 8", "decoding: token 16", "learning"):
            run_log.doing(what)
        run_log.progress(3, "loss 1")
        # From now on nothing compiles, and only silence is broken.
        run_log.doing("decoding: token 8")
        monkeypatch.setattr(console, "_SILENCE", 0.0)
        run_log.doing("decoding: token 16")
        run_log.progress(8, "loss 2")
    assert capsys.readouterr().out.splitlines() == [
        "step 4/9  compiling, which later steps do not",
        "step 4/9  decoding: token 8",
        "step 4/9  learning",
        "step 4/9  loss 1",
        "step 5/9  decoding: token 16",
        "step 9/9  loss 2",
    ]


def _lines(*steps):
    return "".join(json.dumps({"step": step, "phase": "train"}) + "\n" for step in steps)


def test_a_log_that_was_copied_from_a_disk_to_a_bucket_or_back_goes_on(tmp_path):
    with buckets.google() as (_, clients), pytest.MonkeyPatch.context() as patch:
        for name, value in clients.items():
            patch.setenv(name, value)
        bucket, disk = paths.parse(f"gs://{buckets.BUCKET}/moved"), paths.Path(tmp_path)
        steps = lambda workdir: [row["step"] for row in read_events(workdir)]

        def goes_on(workdir, start, last):
            with RunLog(workdir, start, tiny.config()) as log:
                assert steps(workdir) == list(range(start))
                for step in range(start, last):
                    log.scalars(step, "train", {"loss": 1.0})
                    log.flush()
            assert steps(workdir) == list(range(last))

        goes_on(disk, 0, 3)
        paths.write(bucket / "metrics.jsonl", paths.read(disk / "metrics.jsonl"))
        paths.write(bucket / "metrics/notes.txt", "not ours")
        goes_on(bucket, 2, 5)
        assert "metrics.jsonl" not in paths.names(bucket)
        for name in paths.names(bucket / "metrics"):
            paths.write(disk / "metrics" / name, paths.read(bucket / "metrics" / name))
        paths.remove(disk / "metrics.jsonl")
        assert steps(disk) == list(range(5))
        goes_on(disk, 4, 7)
        assert paths.names(disk / "metrics") == ["notes.txt"]
        # A run that went on before its log was adopted has both, either one first.
        paths.write(bucket / "metrics.jsonl", _lines(5, 6))
        goes_on(bucket, 6, 8)


def test_a_log_is_adopted_as_it_was(tmp_path):
    """Whatever its lines hold, and also where a start before was killed in the middle of it."""
    segments, adopted = tmp_path / "metrics", tmp_path / "metrics.jsonl"
    odd = json.dumps({"step": 1, "phase": "a\u2028b\x85c"}, ensure_ascii=False) + "\n"
    content = _lines(0) + odd + '{"step": 1e999}\ngarbage\n' + _lines(2)
    segments.mkdir()
    segments.joinpath("000000.jsonl").write_text(content, encoding="utf-8")
    for _ in range(2):
        log._adopt(paths.Path(adopted))
        assert adopted.read_text(encoding="utf-8") == content
        assert not list(segments.iterdir())
        segments.joinpath("000001.jsonl").write_text(odd, encoding="utf-8")  # not yet removed
