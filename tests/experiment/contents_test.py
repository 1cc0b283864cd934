"""What a run is made of: a resumed run notices other examples, whatever they are read from."""

import dataclasses
import json

import jax
import pytest
import tiny

from qlog import data
from qlog.errors import ConfigError
from qlog.experiment import contents, prepare

WORLD = {"people": 4, "shortest": 1, "longest": 4}


def made(size=40, answer="answer [ met amy ]"):
    """Examples in the words of the synthetic task's vocabulary."""
    return [data.Example(f"{i}", "ask " + "amy " * (i % 5 + 1), answer) for i in range(size)]


def of(train, evaluation=None, **changes):
    """The identity of the tiny run, on other examples."""
    experiment = prepare(tiny.config(**changes), jax.devices()[:1], evaluate=False)
    dataset = experiment.train_data
    open_ = lambda source: data.open_dataset(source, experiment.formatter, dataset.limits)
    mine = {"train_data": open_(train)}
    if evaluation is not None:
        mine["evaluation_data"] = open_(evaluation)
    return contents.identity(dataclasses.replace(experiment, **mine))


def test_examples_of_ones_own_are_compared():
    began = of(made())
    contents.check_same_parts(began, of(made()))
    edited = made()
    edited[1] = dataclasses.replace(edited[1], answer="answer [ met bob ]")
    retold = made()
    retold[39] = dataclasses.replace(retold[39], extra={"level": 2})  # for a reward
    renamed = made()
    renamed[33] = data.Example("x", renamed[33].source, renamed[33].answer)
    for other in (made(39), made()[::-1], edited, renamed, retold):
        with pytest.raises(ConfigError, match="the run there has another split train"):
            contents.check_same_parts(began, of(other))
    # A split that only one of the two starts opened is not compared.
    both = of(made(), evaluation=made(3))
    assert set(both["examples"]) == {"train", "validation"}
    contents.check_same_parts(both, began)
    contents.check_same_parts(began, both)


def test_endless_data_are_known_by_their_first_examples():
    one = contents.identity(prepare(tiny.config(), jax.devices()[:1]))
    other = tiny.config(data={"world": {**WORLD, "people": 5}})
    assert one["examples"] != contents.identity(prepare(other, jax.devices()[:1]))["examples"]


def test_a_checkpoint_of_an_older_version_is_resumed():
    before = of(made())
    before["splits"] = {"train": "0123456789abcdef"}
    del before["examples"]
    contents.check_same_parts(before, of(made()))


def test_what_json_does_not_have_is_refused_before_training():
    strange = [data.Example("1", "ask amy", "answer [ met amy ]", extra={"at": object()})]
    with pytest.raises(ConfigError, match=r"example 0 \(id '1'\) has .*object.* extra at 'at'"):
        of(strange)


def test_two_examples_with_the_same_id_are_refused():
    with pytest.raises(ConfigError, match="examples 3 and 7 have the same id '3': give each"):
        of([*made(7), made(4)[3]])


def test_a_field_that_the_decoder_got_later_is_no_other_model():
    now = {"model": json.loads(json.dumps(dataclasses.asdict(tiny.SHAPE))), "examples": {}}
    older = {name: value for name, value in now["model"].items() if name != "layer_rope"}
    contents.check_same_parts({"model": older}, now)
    for other in (older | {"width": 2 * older["width"]}, older | {"depth": 3}, {}):
        with pytest.raises(ConfigError, match="the run there has another model"):
            contents.check_same_parts({"model": other}, now)
