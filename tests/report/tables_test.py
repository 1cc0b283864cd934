"""The paper's tables from folders of runs: which run is which cell, and what each cell says."""

import csv
import io
import json

import numpy as np
import pytest
import report_fixtures as made

from qlog.report import groups, read, statistics, tables, texts


def cells_of(*places, table=1):
    runs = read.read(read.find(map(str, places)))
    return {(c.dataset, c.style, c.row, c.metric): c for c in tables.cells(runs, [table])}


def test_a_table_has_a_state_for_each_of_its_cells(tmp_path):
    # Names of folders mean nothing; one has a dot near its end.
    made.finished(tmp_path / "zz-0.75", made.paper_config("finqa", "cold,garl,q=0.75"), 0.4)
    for seed in (1, 2):
        config = made.paper_config("finqa", "cold,garl,q=0.75", seed)
        made.finished(tmp_path / "deep" / f"b{seed}", config, 0.4, step=300)
    made.write_config(tmp_path / "c", made.paper_config("finqa", "cold,grpo"))
    made.owner(tmp_path / "c", step=120)
    made.write_config(tmp_path / "d", made.paper_config("finqa", "cold,garl,q=1"))
    made.owner(tmp_path / "d", released=True, status=3, error="gradients | were\nnot finite")
    made.write_config(tmp_path / "e", made.paper_config("finqa", "cold,garl,q=0.5"))
    made.owner(tmp_path / "e", released=True, status=0, error="", step=9)
    made.write_config(tmp_path / "f", made.paper_config("finqa", "cold,garl,q=0.25"))
    made.owner(tmp_path / "f", time=0.0)
    found = cells_of(tmp_path, tmp_path / "c")
    cell = lambda row, metric="m@16": found["finqa", "cold", row, metric]

    ours = cell("GARL q=0.75")
    assert ours.published == 38.3 and ours.state == "run" and len(ours.folders) == 3
    assert "seed 0, best step 350; seed 1, best step 300" in ours.detail
    assert ours.ours and ours.ours.over == "seeds" and len(ours.ours.values) == 3
    values = []
    for seed in range(3):
        questions = made.accuracy.per_question(made.rows(0.4, seed=seed), 16)
        values.append(100 * questions["substring/m@16"].mean())
    assert ours.ours.mean == pytest.approx(np.mean(values))
    assert ours.ours.spread == pytest.approx(np.std(values, ddof=1))
    assert not ours.notes

    assert (cell("GRPO").state, cell("GRPO").ours) == ("running", None)
    assert "step 120 of 500" in cell("GRPO").detail
    assert cell("GARL q=1").state == "failed" and "not finite" in cell("GARL q=1").detail
    assert cell("GARL q=0.5").state == "stopped" and "step 9 of 500" in cell("GARL q=0.5").detail
    assert cell("GARL q=0.25").state == "silent"
    assert cell("GARL q=0 (RB-RLOO)").state == "not run"

    text = texts.markdown(list(found.values()))
    # A bar or a line break in a reason spoils no row.
    lines = [line for line in text.splitlines() if line.startswith("|")]
    bars = {line.replace("\\|", "").count("|") for line in lines}
    assert bars == {5, 6} and "| GARL q=0.75 |" in text and "(38.3)" in text
    parsed = json.loads(texts.json_text(list(found.values())))
    assert parsed[0]["row"] == "GRPO" and parsed[0]["ours"] is None
    read_back = list(csv.DictReader(io.StringIO(texts.csv_text(list(found.values())))))
    assert len(read_back) == 18 and read_back[12]["seeds"] == "3"
    assert r"\\" in texts.latex(list(found.values())) and "$q" not in texts.latex([])


def test_the_base_and_a_paired_test_against_grpo(tmp_path):
    grpo = made.paper_config("hotpotqa", "warm,grpo")
    made.finished(tmp_path / "grpo", grpo, 0.02)
    better = made.paper_config("hotpotqa", "warm,paft,q=0.75")
    made.finished(tmp_path / "paft", better, 0.9)
    base = made.paper_config("hotpotqa", "warm")
    made.write_config(tmp_path / "base", base)
    made.write_evaluation(
        tmp_path / "base",
        base,
        "evaluation_test_base.json",
        "test_base.jsonl",
        made.rows(0.2, seed=9),
        None,
    )
    found = cells_of(tmp_path, table=3)
    cell = lambda row: found["hotpotqa", "warm", row, "m@16"]
    assert cell("Base").state == "run" and cell("Base").ours.over == "questions"
    assert cell("PAFT q=0.75").against.num_questions == 40
    assert cell("PAFT q=0.75").against.difference > 10
    assert cell("PAFT q=0.75").against.p_value < 0.05
    assert cell("GRPO").against is None
    # The base's folder has a config of GARL, which was not trained.
    assert cell("GARL q=0.75").state == "not run"
    assert found["finqa", "warm", "Base", "m@16"].state == "not run"


def test_another_experiment_is_never_taken_for_the_papers(tmp_path):
    """Other arguments of the loss are another method; other settings are left out, or said."""
    config = made.paper_config("finqa", "cold,garl,q=0.75")
    made.finished(tmp_path / "mine", config, 0.5)
    ablated = made.paper_config("finqa", "cold,garl,q=0.75")
    ablated.loss.pathwise = False
    made.finished(tmp_path / "ablated", ablated, 0.0)
    slower = made.paper_config("finqa", "cold,garl,q=0.75", seed=1)
    slower.rollout.rollouts_per_prompt = 8
    made.finished(tmp_path / "slower", slower, 0.1)
    cell = cells_of(tmp_path)["finqa", "cold", "GARL q=0.75", "m@16"]
    assert [folder.rpartition("/")[2] for folder in cell.folders] == ["mine"]
    assert cell.notes == ("left out, since rollout.rollouts_per_prompt differ: slower",)
    alone = cells_of(tmp_path / "slower")["finqa", "cold", "GARL q=0.75", "m@16"]
    assert "rollouts_per_prompt = 8 (the paper: 32)" in alone.notes[0]


def test_a_number_of_another_checkpoint_is_said(tmp_path):
    config = made.paper_config("finqa", "cold,garl,q=0.75")
    made.finished(tmp_path, config, 0.5, step=300)
    scores = json.loads((tmp_path / "scores.json").read_text())
    (tmp_path / "scores.json").write_text(json.dumps(scores | {"400": {"value": 1, "of": "m@16"}}))
    cell = cells_of(tmp_path)["finqa", "cold", "GARL q=0.75", "m@16"]
    assert "step 300 was evaluated, the best on validation is step 400" in cell.notes[0]


def test_files_that_are_cut_short_or_not_ours_are_no_runs(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"hidden_size": 8}')
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text('{"loss": {"na')
    config = made.paper_config("finqa", "cold,grpo")
    made.finished(tmp_path / "run", config, 0.5)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "phase": "train", "log_p": -3.0}\n{"step": 4, "pha')
    (tmp_path / "run" / "samples" / "final.questions.json").write_text('{"ids": ["qu')
    runs = read.read(read.find([str(tmp_path), str(tmp_path / "nowhere")]))
    assert [run.name for run in runs] == ["run"]
    assert runs[0].steps[-1]["step"] == 3
    assert len(runs[0].final.ids) == 40  # from the samples themselves
    (tmp_path / "run" / "final.json").write_text('{"metrics": {"p@')
    assert read.read(read.find([str(tmp_path)]))[0].final is None


def test_runs_that_begin_from_other_runs_are_grouped_by_what_those_are(tmp_path):
    """Not by the path: each seed has its own base."""
    base = made.paper_config("finqa", "cold,sft")
    for seed in (0, 1):
        made.write_config(tmp_path / f"base{seed}", base)
        config = made.paper_config("finqa", "cold,grpo", seed)
        config.init_from = str(tmp_path / f"base{seed}")
        made.write_config(tmp_path / f"run{seed}", config)
    other = made.paper_config("finqa", "cold,sft")
    other.train.steps = 7
    made.write_config(tmp_path / "other", other)
    config.init_from = str(tmp_path / "other")
    made.write_config(tmp_path / "run2", config)
    runs = read.read([p for p in read.find([str(tmp_path)]) if p.name.startswith("run")])
    found = groups.group(runs)
    assert [[run.name for run in group.runs] for group in found] == [["run0", "run1"], ["run2"]]
    assert found[0].label != found[1].label


def test_the_p_value_of_no_difference_is_one_and_of_a_large_one_small():
    ids = tuple(map(str, range(50)))
    make = lambda values: read.Evaluation("test", 1, "", {}, {}, ids, {"m": np.array(values)})
    one, zero = make([1.0] * 50), make([0.0] * 50)
    assert statistics.paired([one], [one], "m").p_value == 1.0
    against = statistics.paired([one], [zero], "m")
    assert against.p_value < 1e-3 and against.difference == 100.0
    other = one._replace(ids=tuple(f"x{i}" for i in ids))
    assert statistics.paired([one], [other], "m") is None
