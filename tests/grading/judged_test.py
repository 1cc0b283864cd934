"""Answers judged by hand, right and wrong: how far each grader agrees. README.md has the table."""

import json
import types

import pytest
from places import ROOT, TESTDATA

from qlog.grading import graders

DATASETS = ("finqa", "hotpotqa", "musique")
README = (ROOT / "qlog/grading/README.md").read_text()


def judged(dataset: str) -> list[dict]:
    text = (TESTDATA / "judged" / f"{dataset}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def is_right(grader: str, row: dict) -> bool:
    if grader == "numeric":
        example = types.SimpleNamespace(official_answer=row["official_answer"])
        return graders.numeric(row["answer"], row["golds"], example) >= 0.5
    return graders.by_name(grader)(row["answer"], row["golds"]) >= 0.5


def table() -> list[str]:
    lines = []
    for dataset in DATASETS:
        rows = judged(dataset)
        for grader in graders.GRADERS:
            if grader == "numeric" and dataset != "finqa":
                continue
            found = [(is_right(grader, row), row["right"]) for row in rows]
            right, wrong = [sum(want == side for _, want in found) for side in (True, False)]
            taken = sum(got and want for got, want in found)
            fooled = sum(got and not want for got, want in found)
            agree = sum(got == want for got, want in found) / len(found)
            literal = " (the paper's literal rule)" if grader == "substring" else ""
            lines.append(
                f"| {dataset} | `{grader}`{literal} | {agree:.0%} | {taken} of {right} "
                f"| {fooled} of {wrong} |"
            )
    return lines


@pytest.mark.parametrize("dataset", DATASETS)
def test_there_are_a_hundred_answers_of_both_kinds(dataset):
    rows = judged(dataset)
    assert len(rows) >= 100 and 0.5 < sum(row["right"] for row in rows) / len(rows) < 0.7
    keys = [(tuple(row["golds"]), row["answer"]) for row in rows]
    assert len(set(keys)) == len(keys)


def test_the_table_of_the_readme_is_true():
    lines = table()
    print("\n" + "\n".join(lines))
    for line in lines:
        assert line in README, f"README.md has another line than {line}"


@pytest.mark.parametrize("dataset", DATASETS)
def test_contains_is_fooled_less_often_than_the_literal_rule(dataset):
    wrong = [row for row in judged(dataset) if not row["right"]]
    fooled = {name: sum(is_right(name, row) for row in wrong) for name in ("contains", "substring")}
    assert fooled["contains"] < fooled["substring"]
