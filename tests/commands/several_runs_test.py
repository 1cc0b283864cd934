"""Several runs that depend on each other, their report; numbers computed again from samples."""

import json

import jax
import numpy as np
import pytest
import tiny

from qlog import evaluation
from qlog.commands import modes, several_runs
from qlog.config import schema
from qlog.errors import ConfigError
from qlog.experiment import prepare
from qlog.grading import accuracy
from qlog.runs.log import read_jsonl
from qlog.storage import paths

ONE = jax.devices()[:1]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep")
    changes = {
        "train": {"steps": 2, "prompts_per_step": 8},
        "evaluation": {"every": 2, "prompts_per_batch": 1, "without_rationale": True},
    }
    config = tiny.config(**changes)
    config.runs = {
        "a_base": {
            "data": {"name": "multihop_text"},
            "loss": schema.loss("sft"),
            "rollout": {"rollouts_per_prompt": 1},
            "evaluation": {"every": 0},
        },
        "b_garl": {"init_from": "a_base"},
        # After the one that it begins from, whatever their names are.
        "a_paft": {"init_from": "b_garl", "loss": schema.loss("paft", q=0.75)},
    }
    several_runs.run(config, workdir, ONE)
    return config, workdir


def test_the_report_has_every_evaluated_run(swept):
    config, workdir = swept
    rows = json.loads((workdir / "report.json").read_text())
    assert [row["run"] for row in rows] == ["b_garl", "a_paft"]
    for row in rows:
        results = json.loads((workdir / row["run"] / "results.json").read_text())["metrics"]
        assert row["p@1"] == results["p@1"] and row["mean log P"] == results["log_p"]
        assert row["p@1 without rationale"] == results["no_rationale/p@1"]
    table = (workdir / "report.md").read_text()
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 4
    assert "| b_garl |" in table and "a_paft starts from the model that b_garl trained" in table
    page = (workdir / "report.html").read_text()
    content = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert [run["label"].partition(":")[0] for run in content["runs"]] == [
        "a_base",
        "b_garl",
        "a_paft",
    ]
    # What the loss made of a rollout is next to its text.
    rollout = content["rollouts"][1][0]["rollouts"][0]
    assert isinstance(rollout["coefficient"], float) and rollout["rationale"]
    assert "coefficient" in read_jsonl(workdir / "b_garl" / "rollouts.jsonl")[0]
    assert (workdir / "escape.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_run_again(swept):
    config, workdir = swept
    before = (workdir / "b_garl" / "metrics.jsonl").stat().st_mtime_ns
    (workdir / "report.md").unlink()
    (workdir / "a_paft" / "seconds.json").unlink()  # killed at the very end: taken up again
    several_runs.run(config, workdir, ONE)
    assert (workdir / "b_garl" / "metrics.jsonl").stat().st_mtime_ns == before
    assert (workdir / "report.md").exists()  # it needs no seconds


def test_what_a_run_began_from_is_told_where_it_is_another_one_now(swept, capsys):
    config, workdir = swept
    child, folder = schema.several(config)["b_garl"], paths.Path(workdir / "b_garl")
    for source, said in (("a_base", ""), ("a_paft", "NOTE: b_garl began from step 2 of ")):
        child.init_from = str(workdir / source)
        several_runs._tell_what_it_began_from("b_garl", child, folder)
        assert capsys.readouterr().out[: len(said) or None] == said


def test_a_flag_that_does_not_reach_all_runs_is_told_before_the_first_one(swept, capsys):
    config, workdir = swept
    flags = ["--config=small.py", "--config.evaluation.every=2", "--config.train.steps=2"]
    assert modes.run("train", config, workdir, argv=["main", *flags]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first == (
        "NOTE: --config.evaluation.every=2 does not reach a_base (0), where config.runs sets "
        "evaluation.every: --config.runs.a_base.evaluation.every=2 does."
    )
    assert others[0].endswith("finished before") and "NOTE" not in " ".join(others)


def test_a_run_that_an_older_version_finished_is_not_run_again(swept):
    """Its config lacks fields that are at their defaults; its text may be another, too."""
    config, workdir = swept
    file = workdir / "a_base" / "config.json"
    before = file.read_text()
    written = json.loads(before)
    del written["rollout"]["cache"], written["watchdog"]
    file.write_text(json.dumps(written))
    log = (workdir / "a_base" / "metrics.jsonl").stat().st_mtime_ns
    child = several_runs._children(config, workdir)["a_base"]
    assert several_runs._finished(workdir / "a_base", child)
    several_runs.run(config, workdir, ONE)
    assert (workdir / "a_base" / "metrics.jsonl").stat().st_mtime_ns == log
    assert json.loads(file.read_text()) == written  # a run that goes on writes its config anew
    # Another config is not finished, nor is one that cannot be read.
    for text in (json.dumps(written | {"seed": 5}), "[1]", '{"loss": 3}', "{", "\udcff", ""):
        file.write_bytes(text.encode(errors="surrogateescape"))
        assert not several_runs._finished(workdir / "a_base", child)
    file.write_text(before)


def test_runs_that_begin_from_each_other_are_refused(tmp_path):
    config = tiny.config()
    config.runs = {"a": {"init_from": "b"}, "b": {"init_from": "c"}, "c": {"init_from": "b"}}
    with pytest.raises(ConfigError, match=r"config\.runs: .*b, c begin from each other"):
        several_runs.run(config, tmp_path, ONE)


def test_a_wrong_run_stops_the_sweep_before_the_first_one(tmp_path):
    config = tiny.config()
    config.runs = {"good": {}, "wrong": {"train": {"steps": 0}}}
    with pytest.raises(ConfigError, match=r"run 'wrong': config\.train\.steps = 0"):
        several_runs.run(config, tmp_path, ONE)
    assert not (tmp_path / "good").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": {"name": "squad"}}, r"run 'wrong': config.data.name = 'squad' is unknown"),
        (
            {"data": {"name": "jsonl", "files": {"train": "nope.jsonl"}, "world": {}}},
            r"run 'wrong': .*(tokenizer.path is empty|nope.jsonl)",
        ),
        ({"architecture": {"vocab_size": 8}}, r"run 'wrong': the tokenizer has \d+ tokens but the"),
        ({"weights": "no/such/folder"}, r"run 'wrong': config.weights = 'no/such/folder' is not a"),
    ],
)
def test_what_a_later_run_reads_is_looked_for_before_the_first_one(changes, message, tmp_path):
    config = tiny.config()
    config.runs = {"good": {}, "wrong": changes}
    with pytest.raises(ConfigError, match=message):
        several_runs.run(config, tmp_path, ONE)
    assert not (tmp_path / "good").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"train": {"prompts_per_step": 2**14}, "rollout": {"rollouts_per_prompt": 2**20}},
            r"config\.rollout\..* needs at least .* of memory per device",
        ),
        ({"mesh": {"data": 3}}, r"mesh\.data=3, .* does not fit the 1 device here"),
        ({"evaluation": {"final": "validation"}}, r"config\.evaluation\.final = 'validation'"),
        ({"init_from": "no/such/run"}, r"config\.init_from = 'no/such/run' has no checkpoint"),
    ],
)
def test_a_later_run_that_cannot_be_prepared_is_found_before_the_first_one(
    changes, message, tmp_path
):
    config = tiny.config()
    config.runs = {"good": {}, "wrong": changes, "after": {"init_from": "good"}}
    with pytest.raises(ConfigError, match=rf"^run 'wrong': .*{message}"):
        several_runs.run(config, tmp_path, ONE)
    assert not (tmp_path / "good").exists()


def test_damaged_records_of_a_later_run_are_found_before_the_first_one(tmp_path):
    config = tiny.config()
    prepare(config, ONE).formatter.tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text('{"source": "ask amy", "answer": "bob"}\n{"source": "cut')
    config.runs = {
        "good": {},
        "wrong": {
            "data": {"name": "jsonl", "files": {"train": str(tmp_path / "a.jsonl")}, "world": {}},
            "tokenizer": {"path": str(tmp_path / "tokenizer")},
        },
    }
    with pytest.raises(ConfigError, match=r"run 'wrong': .*a.jsonl:2 is not JSON"):
        several_runs.run(config, tmp_path / "runs", ONE)
    assert not (tmp_path / "runs/good").exists()


def test_every_number_can_be_computed_again_from_the_samples(swept):
    config, workdir = swept
    results = json.loads((workdir / "b_garl" / "results.json").read_text())["metrics"]
    rows = read_jsonl(workdir / "b_garl" / "samples" / "step_000002.jsonl")
    assert len(rows) == config.evaluation.prompts
    again = accuracy.summarise(rows, k=4, dataset="multihop", seed=config.seed)
    for name, value in again.items():
        assert results[name] == pytest.approx(value), name
    by_hand = np.mean([np.logaddexp.reduce(row["log_w"]) - np.log(4) for row in rows])
    assert results["log_p"] == pytest.approx(by_hand, rel=1e-5)


def test_evaluation_uses_the_same_random_numbers_every_time(swept):
    config, _ = swept
    experiment = prepare(schema.merge(config, {"runs": {}}), ONE, train=False)
    params = experiment.init_params()
    first, second = (
        list(evaluation.sample_answers(experiment, params, experiment.evaluation_sampling))
        for _ in range(2)
    )
    assert first == second
