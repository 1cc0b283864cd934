"""The command and the report of several runs: their files, and runs in a bucket."""

import json
import shutil

import buckets
import pytest
import report_fixtures as made

from qlog.report import __main__ as command
from qlog.report import comparison, read
from qlog.storage import paths


def evaluated(folder, config, **metrics):
    """A run with one evaluation of 16 samples."""
    made.write_config(folder, config)
    line = {"step": 99, "phase": "validation", "p@1": 0.5, "p@16": 0.75, "m@16": 0.625}
    (folder / "metrics.jsonl").write_text(made.json_lines.line(line | metrics))
    (folder / "results.json").write_text(json.dumps({"step": 100, "metrics": line | metrics}))


def test_a_run_that_lacks_a_column_has_a_dash_there(tmp_path, capsys):
    """Not the next column's number."""
    config = made.paper_config("finqa", "cold,grpo")
    evaluated(tmp_path / "plain", config, log_p=-7.5)
    evaluated(tmp_path / "bare", config, **{"no_rationale/p@1": 0.25, "log_p": -1.5})
    (tmp_path / "bare/seconds.json").write_text("103.1234")
    made.write_config(tmp_path / "base", config)  # never evaluated: no line
    comparison.write(paths.Path(tmp_path), ["base", "plain", "bare"])
    header, _, plain, bare = (tmp_path / "report.md").read_text().splitlines()
    cells = lambda line: [cell.strip() for cell in line.strip("|").split("|")]
    plain = dict(zip(cells(header), cells(plain), strict=True))
    bare = dict(zip(cells(header), cells(bare), strict=True))
    assert plain["mean log P"] == "-7.500" and plain["p@1 without rationale"] == "-"
    assert bare["mean log P"] == "-1.500" and bare["p@1 without rationale"] == "0.250"
    assert list(plain)[-1] == "time" and plain["time"] == "-" and bare["time"] == "1 min 43 s"
    rows = json.loads((tmp_path / "report.json").read_text())
    assert [row["seconds"] for row in rows] == ["-", 103.1234]  # programs get all of it
    assert f"The report is {tmp_path / 'report.html'}" in capsys.readouterr().out
    assert "plain" in (tmp_path / "report.html").read_text()


def test_a_curve_that_goes_on_from_another_one_says_so(tmp_path, capsys):
    """PAFT from GARL's model next to GARL from the base: they do not begin alike."""
    runs = tmp_path / "moved" / "runs"
    for name, method, init_from in (
        ("base", "sft", ""),
        ("garl", "garl,q=0.75", "runs/base"),
        ("paft", "paft,q=0.75", "/elsewhere/runs/garl/checkpoints/7"),
        ("other", "grpo", "/elsewhere/others/garl"),
    ):
        config = made.paper_config("finqa", f"cold,{method}")
        config.init_from = init_from
        evaluated(runs / name, config, log_p=-3.0)
        line = {"step": 0, "phase": "train", "effective_reward": 0.5}
        # The base learned from annotated rationales: no mean log P, and no curve to go on from.
        line |= {} if name == "base" else {"log_p": -2.0}
        with open(runs / name / "metrics.jsonl", "a") as file:
            file.write(made.json_lines.line(line))
    names = ["base", "garl", "paft", "other"]
    comparison.write(paths.Path(runs), names)
    sentence = "paft starts from the model that garl trained."
    assert sentence in (runs / "report.md").read_text() and sentence in capsys.readouterr().out
    svg = (runs / "escape.svg").read_text()
    assert svg.count("starts from") == svg.count("paft (starts from garl)") > 0
    assert '"paft: paft(q=0.75) (starts from garl)"' in (runs / "report.html").read_text()
    # Experiments are called by their method, whoever draws them.
    found = [read.read_run(paths.Path(runs) / name, name) for name in names]
    comparison.write_report(found, (), paths.Path(tmp_path / "report"))
    sentence = "paft(q=0.75) starts from the model that garl(q=0.75) trained."
    assert sentence in (tmp_path / "report/report.md").read_text()
    svg = (tmp_path / "report/escape-finqa-cold.svg").read_text()
    assert "paft(q=0.75) (starts from garl(q=0.75))" in svg


def test_runs_of_several_seeds_are_a_table_of_methods_by_setting(tmp_path, capsys):
    names = []
    for method in ("garl,q=0.75", "grpo"):
        for rate in (1e-6, 1e-5):
            for seed in (0, 1):
                config = made.paper_config("finqa", f"cold,{method}", seed)
                config.optimizer.learning_rate = rate
                names.append(f"{method[:4]}_{rate:.0e}_{seed}")
                made.finished(tmp_path / names[-1], config, 0.5, curve=[0.0, 0.1, 0.3])
    comparison.write(paths.Path(tmp_path), names)
    report = (tmp_path / "report.md").read_text()
    first = report.partition("**p@16**")[0].splitlines()
    assert first[2] == "| method | optimizer.learning_rate=1e-06 | optimizer.learning_rate=1e-05 |"
    assert [line.split("|")[1].strip() for line in first[4:6]] == ["garl(q=0.75)", "grpo"]
    assert all(line.count("±") == 2 for line in first[4:6])
    assert "## Every run" in report and "**p@1**" in capsys.readouterr().out
    for rate in ("1e-06", "1e-05"):
        assert (tmp_path / f"figure3-finqa-cold-optimizer.learning_rate_{rate}.svg").exists()


def test_no_method_is_missing_and_unlike_ones_are_named(tmp_path):
    names = []
    for method, rates, size in (("garl,q=0.75", (1e-6,), 32), ("grpo", (1e-6, 1e-5), 64)):
        for rate in rates:
            for seed in (0, 1):
                config = made.paper_config("finqa", f"cold,{method}", seed)
                config.optimizer.learning_rate = rate
                config.rollout.rollouts_per_prompt = size
                names.append(f"{method[:4]}_{rate:.0e}_{seed}")
                made.finished(tmp_path / names[-1], config, 0.5)
    comparison.write(paths.Path(tmp_path), names)
    report = (tmp_path / "report.md").read_text()
    first = report.partition("**p@16**")[0]
    assert "| garl(q=0.75) | " in first and "| grpo | " in first
    comparison.write(paths.Path(tmp_path), names[2:])  # one method alone
    assert "| grpo | " in (tmp_path / "report.md").read_text().partition("**p@16**")[0]
    same = names[:2] + names[4:]
    for name in same[2:]:
        config = made.paper_config("finqa", "cold,grpo", int(name[-1]))
        config.rollout.rollouts_per_prompt = 64
        made.finished(tmp_path / name, config, 0.5)
    comparison.write(paths.Path(tmp_path), same)
    assert (
        "In the column else rollout.rollouts_per_prompt differs: garl(q=0.75) 32; grpo 64."
        in (tmp_path / "report.md").read_text()
    )


def test_the_command_writes_tables_figures_and_a_page(tmp_path, capsys):
    for seed in (0, 1):
        config = made.paper_config("finqa", "cold,garl,q=0.75", seed)
        made.finished(tmp_path / "runs" / str(seed), config, 0.5, curve=[0.0, 0.1, 0.3])
    out = tmp_path / "out"
    assert command.main([str(tmp_path / "runs"), f"--out={out}"]) == 0
    names = {file.name for file in out.iterdir()}
    assert {f"table1.{kind}" for kind in ("md", "json", "csv", "tex")} <= names
    assert "table2.md" in names and "table3.md" not in names  # no run belongs to it
    assert {"figure3-finqa-cold.svg", "figure3-finqa-cold.png", "report.html"} <= names
    text = (out / "report.md").read_text()
    assert (
        "| garl(q=0.75) | finqa, cold | 0, 1 | finished 500/500 | test, best step 350, 350" in text
    )
    assert str(out / "report.html") in capsys.readouterr().out
    assert command.main([str(tmp_path / "runs"), "--table=3", f"--out={tmp_path / 'three'}"]) == 0
    assert (tmp_path / "three" / "table3.csv").exists()
    assert not (tmp_path / "three" / "table1.md").exists()


def test_a_place_without_runs_is_one_sentence(tmp_path, capsys):
    assert command.main([str(tmp_path / "nowhere")]) == 2
    assert "no run is in" in capsys.readouterr().err
    assert command.main(["ftp://x/y"]) == 2
    # A table can be asked for before its runs are there.
    assert command.main([str(tmp_path / "nowhere"), "--table=1", f"--out={tmp_path}"]) == 0
    assert "not run (38.3)" in (tmp_path / "table1.md").read_text()


def test_runs_in_a_bucket_are_read_as_on_a_disk(tmp_path):
    config = made.paper_config("finqa", "cold,garl,q=0.75")
    made.finished(tmp_path / "run", config, 0.5, curve=[0.0, 0.1, 0.3])
    with buckets.google() as (_, clients), pytest.MonkeyPatch.context() as patch:
        for name, value in clients.items():
            patch.setenv(name, value)
        there = paths.parse(f"gs://{buckets.BUCKET}/paper/run-0.75")
        for file in (tmp_path / "run").rglob("*.json*"):
            name = str(file.relative_to(tmp_path / "run"))
            # In a bucket the log is in segments.
            name = name.replace("metrics.jsonl", "metrics/000000.jsonl")
            paths.write(there / name, file.read_text())
        found = read.read(read.find([f"gs://{buckets.BUCKET}/paper"]))
        here = read.read_run(paths.Path(tmp_path / "run"), "run-0.75")
        assert [run.name for run in found] == ["run-0.75"]
        assert found[0].steps == here.steps and len(found[0].steps) == 3
        assert found[0].final.metrics == here.final.metrics and found[0].state == here.state
        # And the report can be written there.
        out = paths.parse(f"gs://{buckets.BUCKET}/report")
        comparison.write_report(found, (1,), out)
        assert "table1.csv" in paths.names(out) and "report.html" in paths.names(out)
    shutil.rmtree(tmp_path / "run")
