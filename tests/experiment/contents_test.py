"""Whether a run that resumes is made of the same parts."""

import dataclasses
import json

import pytest
import tiny

from qlog.errors import ConfigError
from qlog.experiment.contents import check_same_parts


def test_a_field_that_the_decoder_got_later_is_no_other_model():
    now = {"model": json.loads(json.dumps(dataclasses.asdict(tiny.SHAPE))), "splits": {}}
    older = {name: value for name, value in now["model"].items() if name != "layer_rope"}
    check_same_parts({"model": older}, now)
    for other in (older | {"width": 2 * older["width"]}, older | {"depth": 3}, {}):
        with pytest.raises(ConfigError, match="the run there has another model"):
            check_same_parts({"model": other}, now)
