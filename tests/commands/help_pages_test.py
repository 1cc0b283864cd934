"""--help and --help-config: from the schema, for the config that is named, without waiting."""

import re
import sys

import processes
import pytest
import tiny
from absl import flags
from places import ROOT

from qlog import losses
from qlog.commands import doctor, help_pages, show
from qlog.config import schema
from qlog.errors import ConfigError

ALL = list(help_pages.fields(schema.default()))
HEAVY = ("jax", "optax", "flax", "grain", "orbax", "rich", "fsspec", "tokenizers", "numpy")

# Runs a module as `python -m` does, then prints which heavy libraries it imported.
_IMPORTED = f"""
import atexit, runpy, sys
atexit.register(lambda: print("imported:", *[n for n in {HEAVY!r} if n in sys.modules]))
module, *sys.argv = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def started(module, *words, code=0):
    """What the module printed, and the heavy libraries that it imported."""
    out = processes.run(sys.executable, "-c", _IMPORTED, module, module, *words, code=code)
    text, _, imported = out.partition("imported:")
    return text, set(imported.splitlines()[0].split()), imported.partition("\n")[2]


# ---- --help ----


def test_help_is_short_has_examples_and_only_our_flags():
    text, imported, err = started("qlog.main", "--help")
    assert "python -m qlog.main --config=configs/quickstart.py" in text and not err
    assert "--mode=train|evaluate|sample|export|compile" in text and "Default: train." in text
    assert "--help-config" in text and "verbosity" not in text and "pdb" not in text
    named = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    assert named[0] == "config" and {"workdir", "checkpoint", "distributed"} < set(named)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "jax" not in imported and "optax" not in imported, imported


def test_importing_qlog_imports_no_library():
    code = "import sys, qlog; from qlog import config, console\nprint(*sys.modules)"
    modules = processes.run(sys.executable, "-c", code).split()
    assert not set(HEAVY) & set(modules)


def test_helpfull_lists_the_flags_of_libraries():
    text = processes.run(sys.executable, "-m", "qlog.main", "--helpfull", code=1)
    assert "--verbosity" in text and "--config" in text


@pytest.mark.parametrize("command", [doctor, show])
def test_other_commands_have_a_page_too(command, capsys):
    assert command.main([command.__name__, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"python -m {command.__name__}" in out and "--config=CONFIG" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config=configs/quickstart.py", "--wrokdir=x"], "Did you mean: workdir"),
        (["--config=configs/quickstart.py", "--config.train.stepz=3"], "did you mean 'steps'?"),
        (["--workdir=x"], "--config=FILE is needed"),
    ],
)
def test_a_wrong_flag_is_told_without_reading_data_or_models(words, message):
    _, imported, err = started("qlog.main", *words, code=2)
    assert message in err and err.startswith("qlog: ")
    assert not {"flax", "grain", "orbax", "tokenizers"} & imported


# ---- --help-config ----


@pytest.mark.parametrize("name", [name for name in schema.FIELDS if name != "loss"])
def test_every_field_is_there_with_its_default_and_meaning(name):
    heads = [i for i, line in enumerate(ALL) if line.startswith(f"{name} = ")]
    assert len(heads) == 1
    after = " ".join(line.strip() for line in ALL[heads[0] + 1 : heads[0] + 20])
    assert schema.FIELDS[name].meaning.split(".")[0][:60] in after
    assert "default" not in ALL[heads[0]]


def test_a_field_is_shown_with_value_default_range_unit_and_resumption():
    config = schema.default()
    config.train.steps = 7
    lines = list(help_pages.fields(config, "train.steps"))
    assert lines[-2].startswith("train.steps = 7  (default 500)") or lines
    text = " ".join(" ".join(lines).split())
    assert "[whole number of steps, 1 to 1,000,000,000; may change]" in text
    assert "---- Learning ----" in lines and "train" in lines  # where the field is


def test_words_have_their_meanings_and_an_empty_one_is_seen():
    text = "\n".join(help_pages.fields(schema.default(), "evaluation.final"))
    assert "evaluation.final = ''" in text and "'' - nothing" in text and "test - its best" in text


def test_the_loss_is_shown_with_its_own_page_and_arguments():
    config = schema.default()
    config.loss = schema.loss("grpo", eps=0.1)
    text = "\n".join(help_pages.fields(config, "loss"))
    assert "loss.name = grpo  (default garl)" in text and "GRPO: (r_m - rbar)" in text
    assert "loss.eps = 0.1  (default 1e-06)" in text
    for name in losses.arguments("grpo"):
        assert f"loss.{name} = " in text


def test_a_loss_of_ones_own_is_shown_too():
    def mine(q, strength: int | None = None):
        """Mine: this and that."""

    config = schema.default()
    config.loss = schema.loss(mine, q=0.5)
    text = "\n".join(help_pages.fields(config, "loss"))
    assert ".mine  (default garl)" in text and "Mine: this" in text
    assert "loss.q = 0.5" in text and "whole number or None" in text


def test_a_world_and_a_shape_are_shown_with_their_fields():
    text = "\n".join(help_pages.fields(tiny.config()))
    assert "data.world.people = 4  (default 6)" in text
    assert "how many of them live in one example's ring" in text
    assert "architecture.width = 16  (default 1024)" in text


@pytest.mark.parametrize(
    "word, shown, hidden",
    [
        ("optimizer", "optimizer.b2 = 0.999", "seed ="),
        ("config.optimizer.b2", "optimizer.b2 = 0.999", "optimizer.b1"),
        ("MICROBATCH", "train.rollouts_per_microbatch = 0", "train.steps"),
        ("tensorboard", "logging.wandb = ''", "train.steps"),
    ],
)
def test_a_word_chooses_fields(word, shown, hidden):
    text = "\n".join(help_pages.fields(schema.default(), word))
    assert shown in text and hidden not in text


def test_a_word_of_no_field_is_told_with_the_closest():
    with pytest.raises(ConfigError, match=r"no field has it .*did you mean 'optimizer'"):
        list(help_pages.fields(schema.default(), "optimiser"))


def test_lines_fit_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    wide = [line for line in help_pages.fields(schema.default()) if len(line) > 60]
    assert not [line for line in wide if " " in line.strip()]


def test_the_command_shows_the_fields_of_a_config_and_its_flags():
    command = [sys.executable, "-m", "qlog.main", "--config=configs/hotpotqa.py:warm"]
    out = processes.run(*command, "--config.optimizer.b1=0.8", "--help-config=optimizer")
    assert "optimizer.b1 = 0.8  (default 0.9)" in out and "\x1b" not in out
    out = processes.run(*command, "--config.optimiser.b1=0.8", "--help-config", code=2)
    assert "did you mean 'optimizer'?" in out
    out = processes.run(*command, "--help-config=nonsense", code=2)
    assert out.startswith("qlog: --help-config=nonsense: no field has it")
    assert "seed = 0" in processes.run(*command[:3], "--help-config=seed")
    assert "seed = 1" in processes.run(*command, "--help-config", "seed", "--config.seed", "1")


def test_flags_of_libraries_are_left_out_of_a_page():
    values = flags.FlagValues()
    flags.DEFINE_bool("quietly", False, "Say less.", flag_values=values)
    flags.DEFINE_integer("number", 3, "How many.", flag_values=values)
    text = "\n".join(help_pages.usage("What it does.", values))
    assert "verbosity" not in text
    assert str(ROOT) not in text
