"""Folders of runs, in the format that real runs write, with numbers that a test chooses."""

import importlib.util
import json
import time

import numpy as np
from places import ROOT

from qlog import evaluation
from qlog.config import schema
from qlog.grading import accuracy
from qlog.storage import json_lines


def paper_config(dataset, variants, seed=0):
    """The config that `qlog.main --config=configs/DATASET.py:VARIANTS` runs."""
    spec = importlib.util.spec_from_file_location(dataset, ROOT / "configs" / f"{dataset}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variants)
    config.seed = seed
    return config


def rows(share, num_questions=40, num_samples=16, seed=0):
    """Rows of an evaluation in which each question is answered right with probability `share`."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(num_questions):
        right = rng.random(num_samples) < share
        gold = f"gold{index}"
        answers = [f"the {gold}" if each else f"wrong{j}" for j, each in enumerate(right)]
        found.append(
            {
                "id": f"question/{index}",
                "golds": [gold],
                "answers": answers,
                "rationales": ["because"] * num_samples,
                "log_w": [-1.0] * num_samples,
                "log_p": -1.0,
                "forced": [False] * num_samples,
                "complete": [True] * num_samples,
            }
        )
    return found


def write_config(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(schema.to_json(config))


def write_evaluation(folder, config, file, samples, found, step, split="test"):
    """What `evaluation.evaluate` and the command leave of these rows."""
    of_split = schema.merge(config, {"evaluation": {"split": split}})
    path = folder / "samples" / samples
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(map(json_lines.line, found)))
    metrics = evaluation._summarise(of_split, found)
    (folder / file).write_text(evaluation.record(of_split, metrics, f"{folder}, step {step}", step))
    questions = accuracy.per_question(found, config.evaluation.rollouts_per_prompt)
    content = {"ids": [row["id"] for row in found]} | {k: v.tolist() for k, v in questions.items()}
    (path.parent / f"{path.stem}.questions.json").write_text(json.dumps(content))


def finished(folder, config, share, step=350, curve=()):
    """A run that has come to its end, `share` of its answers right on the test split."""
    write_config(folder, config)
    write_evaluation(
        folder, config, "final.json", "final.jsonl", rows(share, seed=config.seed), step
    )
    (folder / "scores.json").write_text(
        json.dumps({"50": {"value": 0.1, "of": "m@16"}, str(step): {"value": 0.3, "of": "m@16"}})
    )
    lines = [
        {"step": s, "phase": "train", "log_p": -5.0, "effective_reward": value}
        for s, value in enumerate(curve)
    ]
    (folder / "metrics.jsonl").write_text("".join(map(json_lines.line, lines)))
    (folder / "results.json").write_text(json.dumps({"step": config.train.steps, "metrics": {}}))


def owner(folder, **changes):
    """The owner's file of a process on another host that wrote it just now."""
    content = {
        "owner": "abc",
        "host": "elsewhere",
        "machine": "elsewhere 1",
        "pid": 1,
        "process": "1",
        "beat": 3,
        "step": 7,
        "phase": "train",
        "time": time.time(),
    }
    (folder / "owner.json").write_text(json.dumps(content | changes))


def write_rollouts(folder, groups):
    """rollouts.jsonl from [(step from 0, id, prompt, gold, [changes of each rollout])]."""
    lines = []
    for step, question, prompt, gold, changes in groups:
        for index, change in enumerate(changes):
            line = {
                "step": step,
                "id": question,
                "prompt": prompt,
                "rollout": index,
                "rationale": "because",
                "answer": "",
                "gold": gold,
                "log_w": -1.0,
                "reward": 0.0,
                "coefficient": 0.0,
                "path_coefficient": 0.0,
                "forced": False,
            }
            lines.append(line | change)
    (folder / "rollouts.jsonl").write_text("".join(map(json_lines.line, lines)))
