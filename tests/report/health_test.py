"""Verdicts name the number and the remedy; every metric of the page's table has one."""

import re

import report_fixtures as made
from places import ROOT

from qlog.config import schema
from qlog.report import health, read


def verdicts(tmp_path, lines, variants="cold,garl,q=0.25", **changes):
    config = schema.merge(made.paper_config("finqa", variants), changes)
    made.write_config(tmp_path, config)
    text = "".join(
        made.json_lines.line({"step": i, "phase": "train", **line}) for i, line in enumerate(lines)
    )
    (tmp_path / "metrics.jsonl").write_text(text)
    return {v.metric: v for v in health.verdicts(read.read_run(tmp_path, "run"))}


def test_every_metric_of_the_table_is_judged():
    page = (
        (ROOT / "qlog/report/README.md")
        .read_text()
        .partition("## Is my run healthy?")[2]
        .partition("##")[0]
    )
    named = re.findall(
        r"`([^`]+)`", "".join(line.split("|")[1] for line in page.splitlines()[4:] if line)
    )
    assert set(named) == set(health.metrics())


def test_no_escape_says_since_when_and_what_to_raise(tmp_path):
    rising = [-20 + min(i, 10) * 0.05 for i in range(200)]
    found = verdicts(tmp_path, [{"log_p": v} for v in rising])["log_p"]
    assert found.level == "warning"
    assert "no escape since step 1: log P is -19.50 after 200 steps; raise q (0.25)" in found.text
    found = verdicts(tmp_path, [{"log_p": -30.0}] * 50, "cold,grpo")["log_p"]
    assert "grpo has no q: use garl with q = 0.75" in found.text


def test_an_escape_is_good_and_a_collapse_names_its_top(tmp_path):
    escape = [-20.0] * 20 + [-1.0] * 30
    assert verdicts(tmp_path, [{"log_p": v} for v in escape])["log_p"].level == "good"
    collapse = [-8.0] * 10 + [-1.0] * 10 + [-35.0] * 30
    found = verdicts(tmp_path, [{"log_p": v} for v in collapse])["log_p"]
    assert found.level == "bad" and "has fallen by 34.0 from -1.00 at step" in found.text


def test_other_prompts_in_each_step_are_no_collapse(tmp_path):
    """Parameters that never change: log P wavers with the prompts."""
    wavering = [-22 + 2.5 * (-1) ** (i // 3) for i in range(40)]
    found = verdicts(tmp_path, [{"log_p": v} for v in wavering])["log_p"]
    assert found.level == "warning" and "no escape" in found.text


def test_numbers_that_ask_for_something(tmp_path):
    lines = [
        {
            "ess": 1.1,
            "no_signal": 1.0,
            "mismatch": 0.2,
            "budget_hits": 0.95,
            "ended_early": i / 50,
            "skipped_updates": i // 25,
            "steps_since_checkpoint": i * 10,
            "decode_waste": 3.0,
            "learn_waste": 4.0,
            "effective_reward": 1e-5,
            "repetition": 0.1 + i / 60,
            "entropy/rationale": 1 + i / 25,
            "grad_norm": "nan",
        }
        for i in range(50)
    ]
    found = verdicts(tmp_path, lines)
    assert [v.metric for v in health.worst(list(found.values()))][0] in ("no_signal", "mismatch")
    for metric, words in {
        "ess": "raise rollout.rollouts_per_prompt (32)",
        "no_signal": "100% of groups have no gradient",
        "mismatch": "0.2 nats per token",
        "budget_hits": "raise rollout.rationale_budget (3968)",
        "ended_early": "collapse",
        "skipped_updates": "the first at step 26",
        "repetition": "88% of their 4-grams occurred before, 13% at the start",
        "entropy/rationale": "rose by 1.8 nats",
        "steps_since_checkpoint": "490 steps without a checkpoint",
        "decode_waste": "3.0 lane-steps",
        "learn_waste": "lower train.rollouts_per_microbatch (8; 0 is all)",
        "effective_reward": "hardly any signal; raise q (0.25)",
    }.items():
        assert words in found[metric].text, metric


def test_an_int8_cache_may_differ_more_and_is_named_where_it_differs_too_much(tmp_path):
    def mismatch(value, cache):
        lines = [{"mismatch": value}] * 3
        return verdicts(tmp_path, lines, dtype="float32", rollout={"cache": cache})["mismatch"]

    assert mismatch(0.004, "int8").level == "good"
    assert mismatch(0.004, "auto").level == "bad"
    assert "rollout.cache=auto" in mismatch(0.06, "int8").text


def test_a_run_before_its_first_step_has_no_verdict(tmp_path):
    assert verdicts(tmp_path, []) == {}
