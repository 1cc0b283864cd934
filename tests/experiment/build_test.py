"""What `prepare` refuses when all parts are there."""

import json
import shutil

import jax
import pytest
import tiny
from places import TESTDATA

from qlog import train_metrics
from qlog.data import Example
from qlog.errors import ConfigError
from qlog.experiment import prepare

ONE = jax.devices()[:1]


def shared(split):
    first = {"train": 0, "validation": 6, "test": 0}[split]
    return [Example(str(i), f"ask amy {i}", "bob") for i in range(first, first + 8)]


def repeated(split):
    return [Example(f"{split}/{i}", f"ask {'amy ' * (i % 3)}", "bob") for i in range(5)]


def own(name, tmp_path, **changes):
    """The tiny run on a function's examples, with the synthetic task's tokenizer."""
    tree = tiny.config(evaluation={"every": 1, **changes})
    prepare(tree, ONE).formatter.tokenizer.save(tmp_path)
    tree.data.name, tree.data.world = name, {}
    tree.tokenizer.path = str(tmp_path)
    return tree


def test_examples_of_train_are_not_evaluated(tmp_path):
    with pytest.raises(ConfigError, match="2 of 8 examples of the validation split .* '6'"):
        prepare(own(shared, tmp_path), ONE)
    prepare(own(shared, tmp_path, split="train"), ONE)  # asked for
    prepare(own(shared, tmp_path), ONE, train=False)  # nothing is trained


def test_questions_that_repeat_are_told(tmp_path, capsys):
    prepare(own(repeated, tmp_path), ONE)
    assert "train has 5 questions of the validation split, too" in capsys.readouterr().out


def test_the_same_file_for_two_splits_is_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [{"id": str(i), "source": f"ask amy {i}", "answer": "bob"} for i in range(4)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree = own("jsonl", tmp_path)
    tree.data.files = {"train": str(file), "validation": str(file)}
    # Test takes one of the four, which train has no more.
    with pytest.raises(ConfigError, match="3 of 4 examples of the validation split are in train"):
        prepare(tree, ONE)


def with_unknown_words(split):
    return [Example(f"{split}/{i}", f"ask amy {i}", "bob" if i else "Zoë") for i in range(5)]


def test_golds_that_cannot_be_right_are_told(tmp_path, capsys):
    prepare(own(with_unknown_words, tmp_path), ONE)
    out = capsys.readouterr().out
    assert "warning: 1 of 5 gold answers of the validation split cannot be right" in out
    assert "under contains with this tokenizer, such as 'Zoë' (id 'validation/0')" in out


@pytest.mark.parametrize("train, prompt", [(True, 24), (False, 16)])
def test_more_tokens_than_the_models_context_are_told(train, prompt, capsys):
    # Behind the prompt: a rationale of 4, the token that closes it, and an answer of 8.
    fits = prompt + 4 + 1 + 8
    prepare(tiny.config(architecture={"max_positions": fits}), ONE, train=train)
    assert "warning:" not in capsys.readouterr().out
    prepare(tiny.config(architecture={"max_positions": fits - 1}), ONE, train=train)
    out = capsys.readouterr().out
    assert f"warning: prompts of up to {prompt} tokens and rollouts of up to 13 may exceed" in out
    assert f"architecture.max_positions = {fits - 1}: lower data.max_prompt_tokens" in out


def test_records_that_are_skipped_are_told(tmp_path, capsys):
    lines = [{"id": str(i), "source": f"ask amy {i}", "answer": "bob"} for i in range(8)]
    lines += [{"id": "x", "source": "ask amy", "answer": ""}] * 2
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree = own("jsonl", tmp_path)
    tree.data.files = {"train": str(tmp_path / "a.jsonl")}
    with pytest.raises(ConfigError, match="a.jsonl:9: the field 'answer' is empty: leave the rec"):
        prepare(tree, ONE)
    tree.data.invalid = "skip"
    experiment = prepare(tree, ONE)
    out = capsys.readouterr().out
    for split in ("train", "validation"):
        assert f"{split}: skipped 2 records, first {tmp_path}/a.jsonl:9: the field 'answer'" in out
    assert experiment.train_data.invalid.number == 2
    assert (
        "2 skipped that cannot be used" in train_metrics.describe(experiment, tmp_path, 0)["data"]
    )


def test_an_official_record_without_an_answer_is_skipped_where_asked(tmp_path, capsys):
    manual = shutil.copytree(TESTDATA / "hotpotqa", tmp_path / "manual")
    file = manual / "hotpot_train_v1.1.json"
    records = json.loads(file.read_text())
    records[3]["answer"], records[4]["context"] = " ", []
    file.write_text(json.dumps(records))
    tree = own("hotpotqa", tmp_path, every=0)
    tree.data.update(
        manual_dir=str(manual), data_dir=str(tmp_path / "data"), max_prompt_tokens=4000
    )
    tree.rollout.answer_reserve = 64
    with pytest.raises(ConfigError, match="has an empty gold answer|its context is empty"):
        prepare(tree, ONE)
    tree.data.invalid = "skip"
    assert len(prepare(tree, ONE).train_data) == len(records) - 2
    out = capsys.readouterr().out
    assert "has an empty gold answer" in out and "its context is empty" in out
