"""Parts of an interrupted evaluation are taken only where the samples would be the same."""

import dataclasses

import jax
import pytest
import tiny

from qlog import evaluation
from qlog.config import schema
from qlog.experiment import prepare
from qlog.storage import paths

# Fields that must stay in training and change no sample of an evaluation.
NOT_OF_SAMPLES = {
    "rollout.rollouts_per_prompt",  # evaluation has its own
    "rollout.temperature",  # likewise
    "rollout.reward",
    "data.invalid",  # what is left out is seen in the examples' digests
    # What they lead to is compared by content.
    "tokenizer.think_start",
    "tokenizer.think_end",
    "tokenizer.eos",
    "tokenizer.chat_template_kwargs",
}
OTHERS = {"rollout.cache": "int8", "data.overlong": "skip", "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def experiment():
    return prepare(tiny.config(), jax.devices()[:1])


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, field in schema.FIELDS.items()
        if not field.may_change
        and name.partition(".")[0] in ("seed", "dtype", "tokenizer", "data", "rollout")
        and name not in NOT_OF_SAMPLES
    ],
)
def test_parts_are_of_the_same_settings(name, experiment):
    before = schema.fields(experiment.config)[name]
    other = OTHERS.get(name)
    if other is None:
        other = {str: "other", int: 7, float: 0.5}.get(type(before), {"people": 5})
    change = other
    for part in reversed(name.split(".")):
        change = {part: change}
    changed = dataclasses.replace(experiment, config=schema.merge(experiment.config, change))
    assert evaluation._inputs(changed, "x") != evaluation._inputs(experiment, "x"), name


@pytest.mark.parametrize("changes", [{"log_p": None}, {"answers": ["b", 3]}, {"forced": []}])
def test_a_part_with_a_row_that_cannot_be_graded_is_sampled_again(changes, tmp_path):
    row = {"id": "a", "golds": ["b"], "answers": ["b"], "log_p": -1.0}
    row |= {"forced": [False], "complete": [True]}
    parts = evaluation._PartialSamples(paths.Path(tmp_path / "x.jsonl"), {"seed": 1})
    assert parts.read() == []
    parts.write(0, [row])
    parts.write(1, [row | {"id": "c"} | changes])
    assert parts.read() == [row]
