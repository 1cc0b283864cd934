"""The schema: every field says whether a run may resume with another value of it."""

import json

import pytest
import tiny

from qlog.config import schema
from qlog.config.check import check_same_run
from qlog.errors import ConfigError


def test_every_field_may_change_in_a_resumed_run_or_must_stay():
    fields = schema.fields(schema.default())
    sections = {field.partition(".")[0] for field in fields}
    for name in schema.MAY_CHANGE | schema.MUST_STAY:
        assert name in fields or name in sections, f"{name} is neither field nor section"
    for field in fields:
        named = [
            table
            for table in (schema.MAY_CHANGE, schema.MUST_STAY)
            for name in (field, field.partition(".")[0])
            if name in table
        ]
        # A field at the top level, such as seed, is found by both names.
        assert len({id(table) for table in named}) == 1, (
            f"{field}: in one of the two, in config/schema.py"
        )


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
