"""The schema: what it says of every field, and what a run may change when it resumes."""

import json

import pytest
import tiny

from qlog import losses, models
from qlog.config import schema
from qlog.config.check import check_same_run
from qlog.data import formatting, pipeline
from qlog.errors import ConfigError

VALUES = schema.fields(schema.default())


def test_the_fields_are_those_of_a_config():
    assert set(VALUES) == set(schema.FIELDS)
    assert losses.arguments("garl").items() <= VALUES["loss"].to_dict().items()


@pytest.mark.parametrize("name", schema.ENTRIES)
def test_every_field_and_section_is_explained_in_sentences(name):
    meaning = schema.ENTRIES[name].meaning
    assert meaning.endswith(".") and meaning[0].isupper() | (meaning[0] in "0fk"), meaning
    assert "  " not in meaning and "\n" not in meaning


@pytest.mark.parametrize("name", schema.FIELDS)
def test_a_default_is_a_value_that_the_field_takes(name):
    field, value = schema.FIELDS[name], VALUES[name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    assert is_number == (field.range is not None), "every number has a range, nothing else has one"
    if field.range is not None:
        assert field.range[0] <= value <= field.range[1]
    if field.choices:
        assert value in field.choices
        assert all(field.choices.values()), "every word has a meaning"
    assert (name.split(".")[-1] in schema.CHOICES) == bool(field.keys)


def test_words_are_those_that_the_readers_know():
    def words(name):
        return tuple(schema.FIELDS[name].choices)

    assert words("train.remat") == tuple(models.REMAT)
    assert set(words("data.style")) == set(formatting.STYLES)
    assert set(words("data.overlong")) == set(pipeline.OVERLONG)
    assert set(words("data.invalid")) == set(pipeline.INVALID)


def test_defaults_are_made_anew():
    one = schema.default()
    one.data.files.train = "x"
    one.loss.q = 0.5
    assert not schema.default().data.files and schema.default().loss.q == 0.75


def test_what_a_section_says_its_fields_say_too():
    assert {"mesh", "mesh.fsdp", "evaluation.split", "train.remat"} <= schema.MAY_CHANGE
    for name in ("seed", "loss", "data.name", "optimizer.learning_rate", "train"):
        assert name not in schema.MAY_CHANGE


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": {"fsdp": 2}},
        {"train": {"steps": 9, "remat": "full"}},
        {"evaluation": {"temperature": 0.5}},
        {"architecture": {"rope_theta": 1.0}},
        {"init_from": "elsewhere"},
    ],
    ids=str,
)
def test_a_run_resumes_with_what_computes_the_same(changes):
    began = tiny.config()
    check_same_run(as_saved(began), schema.merge(began, changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 1}, "config.seed = 1 differs from the run in --workdir, which began with 0"),
        ({"train": {"prompts_per_step": 2}}, "config.train.prompts_per_step = 2 differs"),
        ({"data": {"world": {"people": 5}}}, "config.data.world = "),
        ({"loss": schema.loss("garl", q=0.5)}, "config.loss = "),
    ],
    ids=str,
)
def test_a_field_that_must_stay_is_named(changes, message):
    began = tiny.config()
    with pytest.raises(ConfigError, match=message):
        check_same_run(as_saved(began), schema.merge(began, changes))


def test_where_a_run_began_must_stay_while_the_loss_looks_back_at_it():
    began = tiny.config(loss=schema.loss("grpo", kl_weight=0.1))
    with pytest.raises(ConfigError, match="config.init_from = 'elsewhere' differs"):
        check_same_run(as_saved(began), schema.merge(began, {"init_from": "elsewhere"}))


def as_saved(config):
    return json.loads(schema.to_json(config))


def test_a_run_of_a_version_without_a_field_had_its_default():
    began = tiny.config()
    before = as_saved(began)
    for field in ("files", "fields", "description"):
        del before["data"][field]
    check_same_run(before, began)
    with pytest.raises(ConfigError, match=r"config.data.description = 'x' differs .* with ''"):
        check_same_run(before, schema.merge(began, {"data": {"description": "x"}}))


def test_the_name_of_the_data_may_become_a_function_and_a_text_again():
    def my_examples(split):
        return []

    config = schema.default()
    config.data.name = my_examples
    saved = json.loads(schema.to_json(config))
    assert saved["data"]["name"] == my_examples.__qualname__
    config.data.name = "jsonl"
    assert config.data.name == "jsonl"
