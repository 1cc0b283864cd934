"""Odd settings through the real command line: accepted and then run, or refused in a sentence."""

import contextlib
import dataclasses
import os

import fuzzing
import jax
import pytest
import tiny
from absl import flags
from hypothesis import strategies as st

from qlog import losses, models
from qlog.commands import entry
from qlog.config import command_line, schema
from qlog.data import synthetic
from qlog.errors import ConfigError, TrainingError
from qlog.experiment import prepare

pytestmark = pytest.mark.slow
ONE = jax.devices()[:1]
_FILE = """
import tiny

def get_config():
    return tiny.config(train={"steps": 1}, evaluation={"every": 1, "prompts": 3})
"""

# ---- Command lines ----

FIELDS = sorted(
    {
        *schema.fields(schema.default()),
        "loss.name",
        *(f"loss.{key}" for name in losses.RECIPES for key in losses.arguments(name)),
        *(f"architecture.{field.name}" for field in dataclasses.fields(models.DecoderConfig)),
        *(f"data.world.{field.name}" for field in dataclasses.fields(synthetic.World)),
        "data.files.train",
        "data.fields.id",
        "tokenizer.chat_template_kwargs.x",
        "architecture.rope_scaling.factor",
        "runs.a",
        "runs.a.seed",
    }
)
# What the Hub would be asked for: it is not to be asked hundreds of times.
_REPOSITORIES = {"model", "weights", "tokenizer.path", "init_from"}
_WORDS = sorted(
    {*losses.RECIPES, *models.PRESETS, *models.REMAT, "multihop", "multihop_text", "jsonl"}
    | {"warm", "skip", "contains", "exact_match", "numeric", "test", "train", "best_params"}
    | {"cosine", "linear", "float32", "bfloat16", "auto", "blocks", "tpu", "cudnn"}
)
_KEYS = st.one_of(
    st.sampled_from(FIELDS),
    st.sampled_from(FIELDS),
    st.sampled_from(FIELDS),
    st.tuples(st.sampled_from(FIELDS), st.sampled_from(["x", ".x", ".", "..x", "s", " "])).map(
        "".join
    ),
    st.sampled_from(["", ".", "x", "train", "loss", "optimizer", "mesh", "runs", "data.world"]),
)
_TEXTS = st.one_of(fuzzing.TEXTS, st.sampled_from(_WORDS), st.integers(-3, 40).map(str))
_ODD = st.tuples(_KEYS, _TEXTS).filter(
    lambda case: not (case[0] in _REPOSITORIES and "/" in case[1])
)


@st.composite
def _near(draw):
    """A number or a flag near the one that the run has: most of these are accepted."""
    fields = schema.fields(tiny.config())
    usual = {k: v for k, v in fields.items() if type(v) in (bool, int, float)}
    field = draw(st.sampled_from(sorted(usual)))
    value = usual[field]
    if isinstance(value, bool):
        return field, str(not value)
    others = [2 * value, value / 2] if isinstance(value, float) else [value + 1, 2 * value, 1]
    return field, str(draw(st.sampled_from(others)))


_COMMANDS = st.one_of(
    st.lists(_ODD, min_size=1, max_size=3),
    st.lists(st.one_of(_near(), _near(), _ODD), min_size=1, max_size=3),
)


def _small(config):
    """Whether a run of one step takes seconds on a CPU."""
    rollout, train, evaluation = config.rollout, config.train, config.evaluation
    length = rollout.rationale_budget + rollout.answer_reserve
    tokens = length * train.prompts_per_step * rollout.rollouts_per_prompt
    tokens += length * evaluation.prompts_per_batch * evaluation.rollouts_per_prompt
    shape = {**models.PRESETS["qwen3_0p6b"].__dict__, **config.architecture.to_dict()}
    width = max(shape[key] for key in ("width", "mlp_width", "head_dim", "num_heads"))
    return (
        tokens < 20_000
        and config.data.max_prompt_tokens <= 4096
        and width <= 256
        and shape["num_layers"] <= 8
        and shape["vocab_size"] <= 10_000
        and not config.runs
        and not config.logging.wandb
        # It ends the whole process.
        and (config.watchdog.seconds, config.watchdog.first_seconds) >= (600.0, 600.0)
        and config.watchdog.steps == 10.0
    )


def test_configs(record_property, tmp_path, capsys):
    file = tmp_path / "odd.py"
    file.write_text(_FILE)
    runs, held = [], []
    most = max(1, round(40 * fuzzing.TIMES))

    def holds(case):
        words = [f"--config.{key}={text}" for key, text in case]
        values = flags.FlagValues()
        command_line.define(values=values)
        try:
            command_line.parse(["program", f"--config={file}", *words], values)
            config = values.config
            with contextlib.chdir(tmp_path):
                prepare(schema.several(config).popitem()[1] if config.runs else config, ONE)
        except (ConfigError, flags.Error) as error:
            text = entry.sentence(error)  # as the command prints it
            # One sentence, with a field that was given or one that goes with it.
            assert "\n" not in text and "Traceback" not in text, text
            assert "config" in text or "mesh." in text or "DecoderConfig." in text, text
            return
        if not _small(config) or len(runs) >= most:
            return
        # ---- Accepted: then it must run ----
        config.train.steps = 1
        workdir = tmp_path / f"run{len(runs)}"
        runs.append(words)
        try:
            tiny.run(config, workdir, ONE)
        except (ConfigError, TrainingError) as error:
            assert "\n" not in str(error)
        else:
            assert os.path.exists(workdir / "results.json")
        held.append(words)

    try:
        fuzzing.try_cases(record_property, "configs", 400, _COMMANDS, holds)
    finally:
        record_property("fuzz", ["configs that were accepted and run", len(runs), len(held)])
