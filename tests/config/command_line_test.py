"""Every field of a config is a flag, through the parser that the commands use."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict
from places import ROOT

from qlog import losses, models
from qlog.commands import entry
from qlog.config import check_config, command_line, schema
from qlog.data import synthetic
from qlog.errors import ConfigError
from qlog.grading import scorers

QUICKSTART = f"--config={ROOT / 'configs/quickstart.py'}"


def read(*words, config=QUICKSTART):
    """The config that a command gets of these words."""
    values = flags.FlagValues()
    command_line.define(values=values)
    rest = command_line.parse(["program", config, *words], values)
    assert rest == ["program"]
    return values.config


def at(config, path):
    for key in path.split("."):
        config = config[key]
    return config


def same(one, another):
    """Whether two sections hold the same; == of a ConfigDict wants them locked alike, too."""
    return one.to_dict() == another.to_dict()


def other(value):
    """Another value of the same type, and the text of its flag."""
    if isinstance(value, bool):
        return not value, str(not value)
    if isinstance(value, (int, float)):
        return value + 3, repr(value + 3)
    if isinstance(value, tuple):
        return (12, "a b"), "12,a b"
    assert isinstance(value, str) or value is None
    return f"x{value}", f"x{value}"


# ---- Every field ----

FIELDS = {k: v for k, v in schema.fields(schema.default()).items() if not isinstance(v, ConfigDict)}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_the_schema(field):
    wanted, text = other(FIELDS[field])
    for words in ([f"--config.{field}={text}"], [f"--config.{field}", text]):
        got = at(read(*words), field)
        assert got == wanted and type(got) is type(wanted)


@pytest.mark.parametrize(
    "recipe, key",
    [(recipe, key) for recipe in losses.RECIPES for key in losses.arguments(recipe)],
)
def test_every_argument_of_every_recipe(recipe, key):
    default = losses.arguments(recipe)[key]
    wanted, text = (5, "5") if default is None else other(default)
    given = [f"--config.loss.name={recipe}", f"--config.loss.{key}={text}"]
    loss = read(*given).loss
    assert same(loss, schema.loss(recipe, **{key: wanted})) and type(loss[key]) is type(wanted)
    if default is None:
        assert same(read(*given, f"--config.loss.{key}=None").loss, schema.loss(recipe))
    # A recipe as an object in the config file has the same arguments.
    config = ConfigDict({"loss": schema.loss(losses.RECIPES[recipe])})
    command_line.apply(config, command_line.split(given[1:])[1])
    assert config.loss[key] == wanted


@pytest.mark.parametrize("field", dataclasses.fields(models.DecoderConfig), ids=lambda f: f.name)
def test_every_key_of_the_architecture(field):
    texts = {
        "layer_windows": "0,512",
        "layer_rope": "true,false",
        "rope_scaling": '{"factor": 8.0, "original_length": null}',
    }
    value = getattr(models.PRESETS["qwen3_0p6b"], field.name)
    text = texts.get(field.name) or (other(value)[1] if value is not None else "2")
    got = at(read(f"--config.architecture.{field.name}={text}"), f"architecture.{field.name}")
    if field.name == "layer_windows":
        assert got == (0, 512)
    elif field.name == "layer_rope":
        assert got == (True, False)
    elif field.name == "rope_scaling":
        assert got.to_dict() == {"factor": 8.0, "original_length": None}
    else:
        assert str(got) == text or got == float(text)
        assert "float" not in str(field.type) or type(got) is float


@pytest.mark.parametrize("field", dataclasses.fields(synthetic.World), ids=lambda f: f.name)
def test_every_key_of_a_world(field):
    wanted, text = other(field.default)
    got = read(f"--config.data.world.{field.name}={text}").data.world[field.name]
    assert got == wanted and type(got) is type(wanted)


def with_any(**arguments):
    return losses.build("garl", **arguments)


def test_the_last_loss_wins_and_a_whole_one_has_all_its_arguments():
    whole = '--config.loss={"name": "grpo", "clip_high": 0.5}'
    grpo = schema.loss("grpo", clip_high=0.5).to_dict()
    assert read("--config.loss.name=rloo", whole).loss.to_dict() == grpo
    assert read(whole, "--config.loss.name=garl").loss.to_dict() == schema.loss("garl").to_dict()
    assert read(whole, "--config.loss.clip_high=0.1").loss.clip_high == 0.1


def test_a_function_with_any_arguments_and_a_recipe_with_other_defaults():
    config = ConfigDict({"loss": schema.loss(with_any, q=0.3)})
    command_line.apply(config, command_line.split(["--config.loss.q=0.5"])[1])
    assert config.loss.q == 0.5
    limited = dataclasses.replace(losses.RECIPES["garl"], overrides={"max_coefficient": 2.0})
    config = ConfigDict({"loss": schema.loss(limited)})
    command_line.apply(config, command_line.split(["--config.loss.max_coefficient=None"])[1])
    assert config.loss.max_coefficient is None


def test_none_turns_a_text_field_off_and_names_stay_names():
    assert read("--config.logging.wandb=x", "--config.logging.wandb=None").logging.wandb == ""
    got = read("--config.data.files.train=2024", "--config.data.fields.id=0").data
    assert (got.files.train, got.fields.id) == ("2024", "0")
    assert read('--config.data.files.train=["a", "b"]').data.files.train == ["a", "b"]


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.runs.grpo=3", "config.runs.grpo = 3 must be a section"),
        ("--config.runs.grpo=None", "config.runs.grpo = None must be a section"),
        ('--config.runs={"../x": {}}', "runs"),
        ('--config.runs={"a b": {}}', "config.runs has the name 'a b'"),
        ("--config.runs.grpo.runs.x.seed=3", "runs hold no runs"),
        (
            '--config.runs={"/abs/path": {}}',
            "config.runs has the name '/abs/path': it must be that",
        ),
        ('--config.runs={"..": {}}', r"does not accept dots in field names"),
        ('--config.runs={"x": 5}', "config.runs.x = 5 must be a section"),
        ("--config.runs=5", "config.runs is a section"),
        ("--config.loss={}", "a loss is given by its name"),
        ('--config.loss={"q": 0.5}', "a loss is given by its name"),
        ('--config.loss={"name": "gralo"}', "no loss is called 'gralo'"),
    ],
)
def test_runs_and_losses_that_are_none(flag, message):
    with pytest.raises(ConfigError, match=message):
        check_config(read(flag))


@pytest.mark.parametrize(
    "text, message",
    [
        ("def get_config(:", r"mine.py.*line 1"),
        ("import no_such_module", r"ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config():\n    return 1 / 0", r"ZeroDivisionError: .*mine.py.*2"),
        ("def get_config(): return None", "get_config must return a ConfigDict"),
        ("def get_config(): return {'seed': 1}", "must return a ConfigDict, got dict"),
        ("import sys\nsys.exit(0)", r"mine.py called sys.exit\(0\) in line 2: a config file has"),
        ("import sys\ndef get_config():\n    sys.exit()", r"called sys.exit\(None\) in line 3"),
        (b"\xff\xfe", "mine.py raised SyntaxError"),
        ("def get_config():\n    raise KeyError", r"raised KeyError: KeyError \(mine.py:2\)"),
        ("def get_config():\n    raise ValueError('no')", r"raised ValueError: no \(mine.py:2\)"),
        ("def get_config():\n    raise TypeError('no')", r"raised TypeError: no \(mine.py:2\)"),
        ("def get_config():\n    b'\\xff'.decode()", r"UnicodeDecodeError: .* \(mine.py:2\)"),
        ("import json\njson.loads('{')", r"JSONDecodeError: .* \(mine.py:2\)"),
        ("def get_config():\n    open('/gone')", r"FileNotFoundError: .*'/gone' \(mine.py:2\)"),
        ("open('/gone')", r"--config=.*mine.py could not be loaded: .*'/gone'"),
        ("def get_config(variant): pass", "needs a variant behind a colon"),
        (
            "import asyncio\nraise asyncio.CancelledError",
            r"raised CancelledError: CancelledError \(mine.py:2\)",
        ),
        (
            "from qlog.errors import ConfigError\nraise ConfigError('config.x = 1 is too low.')",
            "^config.x = 1 is too low.$",
        ),
    ],
)
def test_a_config_file_that_fails_is_told_in_a_sentence(text, message, tmp_path):
    (tmp_path / "mine.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ConfigError, OSError, flags.Error)) as caught:
        read(config=f"--config={tmp_path / 'mine.py'}")
    told = entry.sentence(caught.value)
    assert re.search(message, told) and "\n" not in told and "Traceback" not in told


@pytest.mark.parametrize(
    "text",
    [
        "raise KeyboardInterrupt",
        "try:\n    raise KeyboardInterrupt\nfinally:\n    raise ImportError",
        # As an extension in C does that is interrupted while it is imported: nothing says why.
        """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    pass
raise ImportError("an error while initializing the extension")
""",
    ],
)
def test_ctrl_c_in_a_config_file_is_no_fault_of_it(text, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        read(config=f"--config={tmp_path / 'mine.py'}")
    assert signal.getsignal(signal.SIGINT) is before


EXITS = ("import sys\nsys.exit(0)", r"mine.py called sys.exit\(0\) in line 2")


@pytest.mark.parametrize(
    "command, text, message",
    [
        ("main", *EXITS),
        ("commands.show", *EXITS),
        ("commands.doctor", *EXITS),
        ("main", "x = 3", "get_config"),
    ],
)
def test_a_config_file_that_exits_ends_no_command_in_silence(command, text, message, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    file = str(tmp_path / "mine.py")
    words = [file] if command == "commands.show" else [f"--config={file}"]
    result = subprocess.run(
        [sys.executable, "-m", f"qlog.{command}", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert re.search(message, result.stderr), result.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config=nope.py"], "--config=nope.py: nope.py is not a file: name a config file"),
        (["--config", "nope.py"], "nope.py is not a file"),
        (["--config=."], r"--config=.: . is not a file"),
        ([f"--config={ROOT / 'configs/quikstart.py'}"], "did you mean 'quickstart.py'"),
        (
            [QUICKSTART, "--config.model=\udcff"],
            r"'--config.model=\\udcff' on the command line is ",
        ),
    ],
)
def test_names_of_config_files_that_are_none(words, message):
    values = flags.FlagValues()
    command_line.define(values=values)
    with pytest.raises(ConfigError, match=message):
        command_line.parse(["program", *words], values)


def test_a_file_without_variants(tmp_path):
    file = tmp_path / "plain.py"
    file.write_text("from qlog.config import default\ndef get_config(): return default()")
    with pytest.raises(ConfigError, match="plain.py:warm: this config file has no variants: leave"):
        read(config=f"--config={file}:warm")


def test_a_reward_may_be_a_list():
    got = read(
        "--config.rollout.reward=exact_match,contains", "--config.evaluation.metrics=contains"
    )
    assert scorer_names(got.rollout.reward) == ["exact_match", "contains"]
    assert scorer_names(got.evaluation.metrics) == ["contains"]
    got = read("--config.rollout.reward=[('exact_match', 1.0), ('squad_f1', 0.5)]")
    assert [(s.name, s.weight) for s in scorers.read(got.rollout.reward, "f")] == [
        ("exact_match", 1.0),
        ("squad_f1", 0.5),
    ]
    assert read("--config.rollout.reward=").rollout.reward == ""


def scorer_names(value):
    return [scorer.name for scorer in scorers.read(value, "f")]


def test_keys_of_an_open_section_take_literals_and_text():
    got = read(
        "--config.tokenizer.chat_template_kwargs.train=a.jsonl",
        '--config.tokenizer.chat_template_kwargs.test=["a", "b"]',
        "--config.tokenizer.chat_template_kwargs.flag=false",
        "--config.tokenizer.chat_template_kwargs.nothing=null",
        "--config.tokenizer.chat_template_kwargs.id=007",
        "--config.tokenizer.chat_template_kwargs.deep.key=1.5",
    ).tokenizer.chat_template_kwargs.to_dict()
    assert got == {
        "train": "a.jsonl",
        "test": ["a", "b"],
        "flag": False,
        "nothing": None,
        "id": "007",
        "deep": {"key": 1.5},
    }
    assert read('--config.data.files={"train": "b"}').data.files.to_dict() == {"train": "b"}


# ---- Spellings, order ----


def test_spellings():
    config = read(
        "-config.train.steps=7",
        "--config.mesh.data",
        "-1",
        "--config.evaluation.without_rationale",
        "--noconfig.loss.pathwise",
        "--config.profile.steps=(12, 13)",
        "--config.rollout.closing_text=a=b, c",
        "--config.data.name=",
        "--config.optimizer.eps=1",
    )
    assert config.train.steps == 7 and config.mesh.data == -1
    assert config.evaluation.without_rationale is True and config.loss.pathwise is False
    assert config.profile.steps == (12, 13)
    assert config.rollout.closing_text == "a=b, c" and config.data.name == ""
    assert config.optimizer.eps == 1.0 and type(config.optimizer.eps) is float
    assert read("--config.profile.steps=").profile.steps == ()
    assert read("--config.profile.steps=3").profile.steps == (3,)
    assert len(read("--config.runs={}").runs) == 0


def test_the_last_flag_wins_and_a_file_is_changed_after_its_variants():
    assert read("--config.seed=1", "--config.seed=2").seed == 2
    file = f"--config={ROOT / 'configs/hotpotqa.py'}:warm,paft,q=0.25"
    config = read("--config.loss.k=4", "--config.data.style=cold", config=file)
    assert same(config.loss, schema.loss("paft", q=0.25, k=4)) and config.data.style == "cold"
    values = flags.FlagValues()
    command_line.define(values=values)
    command_line.parse(["program", "--config.seed=3", *file.split("=", 1)], values)
    assert values.config.seed == 3 and command_line.spec(values) == file.partition("=")[2]


def test_words_after_two_dashes_are_no_flags():
    rest, settings = command_line.split(["--a", "--", "--config.seed=1"])
    assert rest == ["--a", "--", "--config.seed=1"] and not settings


# ---- Another loss ----


def test_a_flag_file_is_read_once_wherever_it_stands(tmp_path):
    file = tmp_path / "flags"
    file.write_text("--config.train.steps=7\n--distributed=off\n--config.init_from=\n")
    argv = ["main", QUICKSTART, "--config.seed", "3", f"--flagfile={file}"]
    values = flags.FlagValues()
    config = command_line.define(values=values)
    flags.DEFINE_string("distributed", "auto", "", flag_values=values)
    whole = command_line.with_flag_files(argv, values)
    file.unlink()
    command_line.parse(whole, values)
    assert config.value.seed == 3 and config.value.train.steps == 7
    assert command_line.again(whole, ["distributed", "mode"]) == [
        QUICKSTART,
        "--config.seed=3",
        "--config.train.steps=7",
        "--config.init_from=",
        "--distributed=off",
    ]


def test_a_flag_file_that_may_never_end_is_refused(tmp_path):
    """A pipe with a name waits for a writer. The shell's own has one."""
    pipe, outer = tmp_path / "pipe", tmp_path / "outer"
    os.mkfifo(pipe)
    outer.write_text(f"--seed=3\n--flagfile={outer}\n  --flagfile={pipe}\n--flagfile={pipe}\n")
    for words in ([f"--flagfile={pipe}"], ["-flagfile", str(pipe)], [f"--flagfile={outer}"]):
        with pytest.raises(ConfigError, match=f"^--flagfile={pipe} is not a plain file"):
            command_line.with_flag_files(["main", *words])
    outer.write_bytes(b"--seed=\xff\n")
    with pytest.raises(ConfigError, match="a file of --flagfile is not UTF-8"):
        command_line.with_flag_files(["main", f"--flagfile={outer}"])
    read_end, write_end = os.pipe()
    os.write(write_end, b"--config.seed=3\n")
    os.close(write_end)
    words = [f"--flagfile=/dev/fd/{read_end}"]
    assert command_line.with_flag_files(["main", *words]) == ["main", "--config.seed=3"]
    os.close(read_end)


def test_another_recipe_keeps_what_was_chosen_and_what_it_has():
    file = f"--config={ROOT / 'configs/hotpotqa.py'}:q=0.25"
    config = read("--config.loss.name=paft", config=file)
    assert same(config.loss, schema.loss("paft", q=0.25))
    # The order of the two flags has no meaning: the name decides what there is to set.
    for words in (["name=paft", "k=3"], ["k=3", "name=paft"]):
        got = read(*[f"--config.loss.{word}" for word in words], config=file).loss
        assert same(got, schema.loss("paft", q=0.25, k=3))
    # GARL's baseline goes with it, and GRPO's own default of aggregation comes.
    given = ["--config.loss.name=grpo", "--config.loss.clip_high=0.3"]
    assert same(read(*given, config=file).loss, schema.loss("grpo", clip_high=0.3))
    with pytest.raises(ConfigError, match="loss.baseline=none: the config has no field 'baseline'"):
        read("--config.loss.name=paft", "--config.loss.baseline=none")


# ---- Several runs ----


def test_flags_that_do_not_reach_all_of_several_runs_are_named():
    def notes(*words):
        argv = ["program", QUICKSTART, *words]
        return list(command_line.out_of_reach(read(*words), argv))

    reach = ("--config.seed=4", "--config.rollout.rationale_budget=6", "--config.train.steps=1000")
    assert notes(*reach) == []  # which is what base has, too
    assert notes("--config.train.steps=9", "--config.train.steps=5") == [
        "--config.train.steps=5 does not reach base (1000), where config.runs sets train.steps: "
        "--config.runs.base.train.steps=5 does."
    ]
    assert notes("--config.train.steps=5", "--config.runs.base.train.steps=7") == []
    (note,) = notes("--config.loss.q", "0.5")
    assert note.startswith("--config.loss.q 0.5 does not reach base (None), garl_q000 (0.0),")
    assert "garl_q050" not in note and "--config.runs.NAME.loss.q=0.5 does." in note
    (note,) = notes('--config.loss={"name": "grpo"}')
    assert " base (" in note and " grpo (" not in note


def test_an_entry_of_several_runs():
    config = read(
        "--config.runs.base.train.steps=5",
        "--config.runs.garl_q075.loss.max_coefficient=2",
        "--config.runs.grpo.optimizer.b2=0.5",
        "--config.runs.grpo.loss.name=maxrl",
        "--config.loss.q=0.5",
        "--config.runs.grpo.data.world.hops=2",
    )
    assert config.runs.base.train.to_dict() == {"steps": 5, "prompts_per_step": 32}
    assert same(config.runs.garl_q075.loss, schema.loss("garl", q=0.75, max_coefficient=2))
    grpo = schema.merge(config, {**config.runs.grpo, "runs": {}})
    assert same(grpo.loss, schema.loss("maxrl")) and grpo.optimizer.b2 == 0.5
    assert grpo.data.world.hops == 2 and grpo.data.world.people == 6
    check_config(grpo)
    assert config.data.world.hops == 3 and config.loss.q == 0.5
    with pytest.raises(
        ConfigError, match="has no run 'bas' .did you mean 'base'\\?.; its runs are"
    ):
        read("--config.runs.bas.seed=1")


# ---- Mistakes ----


@pytest.mark.parametrize(
    "word, message",
    {
        "train.steps=abc": r"config\.train\.steps = 'abc' must be a whole number\.",
        "train.steps=1.5": r"config\.train\.steps = '1\.5' must be a whole number\.",
        "train.steps=": r"config\.train\.steps = '' must be a whole number\.",
        "train.steps=None": r"config\.train\.steps = 'None' must be a whole number\.",
        "optimizer.b1=x": r"config\.optimizer\.b1 = 'x' must be a number\.",
        "loss.pathwise=maybe": r"config\.loss\.pathwise = 'maybe' must be true or false\.",
        "loss.clip_lo=1": r"has no field 'clip_lo'; there are name, q, baseline",
        "loss.max_coeficient=1": r"did you mean 'max_coefficient'\?$",
        "loss.name=gral": r"no loss is called 'gral'.*did you mean 'garl'",
        "loss=garl": r"a loss is given by its name, as in --config\.loss\.name=garl",
        "seed.x=1": r"config\.seed is a value and has no key 'x'",
        "trian.steps=1": r"no field 'trian'; did you mean 'train'\?$",
        "train.=1": r"no field ''",
        "architecture.num_layer=2": r"did you mean 'num_layers'\?$",
        "architecture.num_layers=two": r"num_layers = 'two' must be a whole number",
        "architecture.layer_windows=a": r"layer_windows = 'a' must be values with commas",
        "architecture.rope_scaling=8": r"= '8' must be a dictionary of factor, original_length",
        "architecture.rope_scaling={'fac': 8}": r"must be a dictionary of factor, original_length",
        "architecture.rope_scaling.fac=8": r"did you mean 'factor'",
        "data.world.hop=2": r"no field 'hop'; did you mean 'hops'\?$",
    }.items(),
)
def test_mistakes_are_told_in_one_sentence(word, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(f"--config.{word}")
    assert "\n" not in str(caught.value)


def test_what_is_no_config(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def get_config():\n    return {'seed': 1}\n")
    with pytest.raises(ConfigError, match="must return a ConfigDict, got dict: start from"):
        read("--config.seed=1", config=f"--config={file}")
    values = flags.FlagValues()
    command_line.define(values=values)
    with pytest.raises(ConfigError, match="--config.seed=1 needs --config=FILE"):
        command_line.parse(["program", "--config.seed=1"], values)


def test_the_command_trains_with_what_its_flags_say(tmp_path):
    words = ["--config", "configs/quickstart.py", "--config.runs={}", "--config.train.steps", "1"]
    words += ["--config.loss.max_coefficient=5", "--config.loss.k=4", "--config.loss.name=paft"]
    words += ["--config.architecture.num_layers=1", "--config.data.world.hops=2"]
    words += ["--config.train.prompts_per_step=8", "--config.rollout.rollouts_per_prompt=2"]
    words += ["--config.evaluation.every=0", "--config.evaluation.prompts=8"]
    words += ["--config.evaluation.prompts_per_batch=8", "--config.profile.steps=12,13"]
    words += ["--noconfig.evaluation.without_rationale", f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "qlog.main", *words]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    written = json.loads((tmp_path / "run/config.json").read_text())
    assert written["loss"]["name"] == "paft" and written["loss"]["k"] == 4
    assert written["loss"]["max_coefficient"] == 5 and written["profile"]["steps"] == [12, 13]
    assert written["architecture"]["num_layers"] == 1 and written["data"]["world"]["hops"] == 2
