"""What a careless user gets wrong ends in one sentence, before anything compiles."""

import asyncio
import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from places import ROOT

from qlog import losses
from qlog.config import check, check_config, schema
from qlog.config.variants import estimator_variants, parse_variants
from qlog.errors import ConfigError
from qlog.experiment import prepare
from qlog.main import default_workdir
from qlog.parallel import sharding

ONE = jax.devices()[:1]


def cancelled(**arguments):
    raise asyncio.CancelledError("no")


WRONG = {
    "unknown key": ({"train": {"stepz": 3}}, r"config\.train\.stepz = 3 .*did you mean 'steps'"),
    "unknown section": ({"trian": {"steps": 3}}, r"config\.trian .*did you mean 'train'"),
    "key of another loss": (
        {"loss": {"name": "garl", "q": 0.5, "clip_low": 0.2}},
        r"config\.loss: garl: .*clip_low",
    ),
    "a loss that raises what is no Exception": (
        {"loss": {"name": cancelled}},
        r"config\.loss: .*cancelled raised CancelledError: no \(check_test\.py:\d+\)\.",
    ),
    "unknown loss": ({"loss": {"name": "gral"}}, r"config\.loss: no loss is called 'gral'"),
    "a loss's number that is a section": (
        {"loss": {"name": "garl", "q": 0.5, "max_coefficient": {}}},
        r"config\.loss: garl: max_coefficient must be one value, got a section",
    ),
    "a loss's number that is a list": (
        {"loss": {"name": "garl", "q": 0.5, "max_coefficient": (1, 2)}},
        r"config\.loss: garl: max_coefficient must be one value, got \(1, 2\)",
    ),
    "an empty section in place of a value": (
        {"rollout": {"reward": {}}},
        r"config\.rollout\.reward must be a value, not a section",
    ),
    "a section in place of a value": (
        {"train": {"steps": {"first": 1}}},
        r"config\.train\.steps must be of type int, not a section",
    ),
    "q out of range": (
        {"loss": {"name": "garl", "q": 1.5}},
        r"garl: q must be in \[0, 1\], got 1\.5",
    ),
    "M = 1": ({"rollout": {"rollouts_per_prompt": 1}}, r"at least 2 rollouts per prompt"),
    "M for SFT": ({"loss": {"name": "sft"}}, r"rollouts_per_prompt = 4: .*set it to 1"),
    "wrong type": (
        {"train": {"steps": "many"}},
        r"config\.train\.steps = 'many' must be of type int",
    ),
    "too small": ({"train": {"steps": 0}}, r"config\.train\.steps = 0 must be at least 1"),
    "negative rate": ({"optimizer": {"learning_rate": -1.0}}, r"learning_rate = -1\.0 must be"),
    "NaN": ({"optimizer": {"b1": float("nan")}}, r"optimizer\.b1 = nan must be a number from 0"),
    "NaN limit": (
        {"train": {"max_mismatch": float("nan")}},
        r"max_mismatch = nan must be a number",
    ),
    "infinite": (
        {"optimizer": {"weight_decay": float("inf")}},
        r"weight_decay = inf must be at most",
    ),
    "b2 of 1": ({"optimizer": {"b2": 1.0}}, r"optimizer\.b2 = 1\.0 must be at most 0\.99999994"),
    "negative eps": ({"optimizer": {"eps": -1.0}}, r"optimizer\.eps = -1\.0 must be at least 0"),
    "seed of 33 bits": ({"seed": 2**32}, r"config\.seed = 4294967296 must be at most 4294967295"),
    "negative seed": ({"seed": -1}, r"config\.seed = -1 must be at least 0"),
    "a billion prompts": (
        {"train": {"prompts_per_step": 10**9}},
        r"prompts_per_step = 10+ must be at",
    ),
    "steps without end": ({"train": {"steps": 10**20}}, r"train\.steps = 10+ must be at most"),
    "description of the cold style": (
        {"data": {"description": "Add."}},
        r"config\.data\.description = 'Add\.' is read only by the warm style",
    ),
    "microbatch": (
        {"train": {"rollouts_per_microbatch": 3}},
        r"rollouts_per_microbatch = 3 must divide 4: .*1, 2, 4",
    ),
    "updates": ({"train": {"updates_per_batch": 3}}, r"updates_per_batch = 3 must divide"),
    "top p": (
        {"evaluation": {"top_p": 0.0}},
        r"config\.evaluation\.top_p = 0\.0 must be at least 1e-06",
    ),
    "top k in training": (
        {"rollout": {"top_k": 20}},
        r"config\.rollout\.top_k = 20 is read by nothing",
    ),
    "cache": (
        {"rollout": {"cache": "fp4"}},
        r"config\.rollout\.cache = 'fp4' is unknown: use auto or int8",
    ),
    "cache of another type": (
        {"rollout": {"cache": 8}},
        r"config\.rollout\.cache = 8 must be of type str",
    ),
    "dtype": ({"dtype": "float8"}, r"config\.dtype = 'float8' is unknown: use float32 or bfloat16"),
    "task": ({"data": {"name": "squad"}}, r"config\.data\.name = 'squad' is unknown: use one of"),
    "style": ({"data": {"style": "hot"}}, r"config\.data\.style"),
    "world": (
        {"data": {"world": {"peple": 3}}},
        r"config\.data\.world\.peple = 3 is read by nothing",
    ),
    "world size": (
        {"data": {"world": {"people": 99}}},
        r"config\.data\.world\.people = 99 must be from",
    ),
    "unread path": ({"tokenizer": {"path": "x"}}, r"config\.tokenizer\.path = 'x' is not read"),
    "ends": ({"tokenizer": {"eos": (3,)}}, r"config\.tokenizer\.eos = \(3,\) must hold names"),
    "unread ends": ({"tokenizer": {"eos": ("</s>",)}}, r"tokenizer\.eos = \('</s>',\) is not read"),
    "template": (
        {"tokenizer": {"chat_template": "built-in"}},
        r"config\.tokenizer\.chat_template = 'built-in' must be .*did you mean 'builtin'",
    ),
    "template of a synthetic task": (
        {"tokenizer": {"chat_template": "x.jinja"}, "data": {"style": "warm"}},
        r"config\.tokenizer\.chat_template = 'x\.jinja' is not read by 'multihop'",
    ),
    "template of the cold style": (
        {"tokenizer": {"chat_template": "x.jinja"}},
        r"config\.tokenizer\.chat_template = 'x\.jinja' is read only by the warm style",
    ),
    "variables of the cold style": (
        {"tokenizer": {"chat_template_kwargs": {"date_string": "x"}}},
        r"config\.tokenizer\.chat_template_kwargs\.date_string = 'x' is read only by the warm",
    ),
    "variables of a built-in template": (
        {"tokenizer": {"chat_template": "builtin", "chat_template_kwargs": {"a": 1}}},
        r"config\.tokenizer\.chat_template_kwargs\.a = 1 is not read by a built-in template",
    ),
    "variables without names": (
        {"tokenizer": {"chat_template_kwargs": "date"}},
        r"config\.tokenizer\.chat_template_kwargs = 'date' must be a section",
    ),
    "variables of another type": (
        {"tokenizer": {"chat_template_kwargs": {"a": {1, 2}}}},
        r"config\.tokenizer\.chat_template_kwargs\.a = \{1, 2\} is of type set",
    ),
    "prompt budget": (
        {"data": {"max_prompt_tokens": 8}},
        r"config\.data\.max_prompt_tokens = 8 is too small",
    ),
    "answer reserve": (
        {"rollout": {"answer_reserve": 3}},
        r"config\.rollout\.answer_reserve = 3 is too small",
    ),
    "rope theta": (
        {"architecture": {"rope_theta": float("nan")}},
        r"config\.architecture\.rope_theta = nan must be a number above 0",
    ),
    "billion layers": (
        {"architecture": {"num_layers": 10**9}},
        r"config\.architecture\.num_layers = 10+ must be a whole number of at most 65536",
    ),
    "large epsilon": (
        {"architecture": {"norm_eps": 1e30}},
        r"config\.architecture\.norm_eps = 1e\+30 must be a number above 0 and at most 1\b",
    ),
    "heads of text": (
        {"architecture": {"num_heads": "many"}},
        r"config\.architecture\.num_heads = 'many' must be a whole number of at most 2147483647",
    ),
    "rows of no array": (
        {"architecture": {"vocab_size": 10**12}},
        r"config\.architecture\.vocab_size = 10+ must be a whole number of at most 2147483647",
    ),
    "split": (
        {"evaluation": {"split": "dev"}},
        r"config\.evaluation\.split = 'dev' is unknown: use one of train, validation, test",
    ),
    "model": ({"model": "qwen9"}, r"config\.model = 'qwen9' is unknown: use one of"),
    "architecture": (
        {"architecture": {"depth": 3}},
        r"config\.architecture\.depth = 3 is read by nothing",
    ),
    "heads": (
        {"architecture": {"num_heads": 3, "num_kv_heads": 2}},
        r"config\.architecture: .*num_heads = 3",
    ),
    "vocabulary": (
        {"architecture": {"vocab_size": 8}},
        r"tokenizer has \d+ tokens but the model only 8",
    ),
    "weights": (
        {"weights": "no_such_folder"},
        r"config\.weights = 'no_such_folder' is not a folder",
    ),
    "init_from": (
        {"init_from": "no_such_run"},
        r"config\.init_from = ?'no_such_run' has no checkpoint",
    ),
    "mesh": ({"mesh": {"data": 3}}, r"mesh\.data=3.* does not fit the 1 device"),
    "mesh zero": ({"mesh": {"data": 0}}, r"mesh\.data=0.*at least 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_named(case):
    changes, message = WRONG[case]
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(tiny.config(**changes), ONE)
    assert "\n" not in str(caught.value)


ODD = [
    *(5, -1, 2**63, 10**30, True, float("nan"), float("inf"), None, "", "x", "\x00", "\ud800"),
    *([], [1], (), {}, {"a": 1}, {1: 2}, ConfigDict({"b": 1}), {2}, range(3), b"x", ..., 1j, len),
    *(
        int,
        object(),
        pathlib.Path("x"),
        np.array(1.0),
        np.array([1, 2]),
        np.int64(2),
        np.bool_(True),
    ),
]


def test_whatever_a_config_file_puts_into_a_field_is_taken_or_named():
    """A file may do what flags cannot: objects, NumPy's numbers, values in place of sections."""
    places = [name.split(".") for name in schema.fields(schema.default())]
    places += {tuple(place[:n]) for place in places for n in range(1, len(place))}
    places += [("loss", name) for name in losses.arguments("garl")] + [("loss", "name")]
    places += [("architecture", "num_layers"), ("tokenizer", "chat_template_kwargs", "a")]
    places += [("runs", "a"), ("runs", "a", "loss")]
    escaped = []
    for *above, last in places:
        for value in ODD:
            config = section = schema.default()
            for key in above:
                section.unlock()
                if key not in section:
                    section[key] = ConfigDict()
                section = section[key]
            with section.unlocked(), section.ignore_type():
                section[last] = value
            try:
                check_config(config)
                schema.from_json(json.loads(schema.to_json(config)))
            except ConfigError as error:
                if "\n" in str(error):
                    escaped.append((*above, last, value, error))
            except Exception as error:
                escaped.append((*above, last, value, error))
    assert not escaped


def _two(q):
    return losses.build("garl", q=q)


def _annotated():
    return losses.build("sft")


def _misspelt():
    return dataclasses.replace(losses.build("star"), reward="exact_mach")


def _without_reward():
    return losses.Estimator(transform=losses.from_reward(), surrogate=losses.linear())


def _alone():
    """It does not say that its transform needs two rollouts."""
    return losses.Estimator(transform=losses.rb_rloo(), surrogate=losses.linear())


OWN_LOSSES = {
    "M = 1": (_two, {"q": 0.5}, 1, r"rollouts_per_prompt = 1: .*_two' needs at least 2"),
    "M of a transform": (_alone, {}, 1, r"config\.loss: M, the rollouts per prompt, must be at"),
    "M for annotated": (_annotated, {}, 4, r"rollouts_per_prompt = 4: .*_annotated'.*set it to 1"),
    "lambda": (losses.Recipe(lambda q=1.0: losses.garl(q)), {}, 4, r"of type function.*with def"),
    "a number of JAX": (_two, {"q": jnp.float32(1)}, 4, r"config\.loss\.q = .* is of type jax"),
    "a type": (losses.RECIPES["garl"], {"q": int}, 4, r"config\.loss.* \(ConcretizationTypeE"),
    "a word for a flag": (losses.RECIPES["garl"], {"score": "no"}, 4, r"score must be True or F"),
    "an unread number": (losses.RECIPES["garl"], {"max_ratio": 0.5}, 4, r"max_ratio must be in"),
    "argument": (_two, {"qq": 0.5}, 4, r"_two: unknown argument qq; .* \(did you mean 'q'\?\)"),
    "no argument": (tiny.graded_garl, {}, 4, r"graded_garl: argument q has no default: give it"),
    "q": (tiny.graded_garl, {"q": 2.0}, 4, r"config\.loss: q must be in \[0, 1\], got 2\.0"),
    "schedule": (tiny.graded_garl, {"q": 1.0, "q_end": 0.5}, 4, r"q_end=0\.5 is not read with"),
    "partial": (functools.partial(_two, q=1.0), {}, 4, r"of type partial.*made with def"),
    "reward": (_misspelt, {}, 4, r"config\.loss\.reward = 'exact_mach' is not a grader: .*match"),
    "unmeasured score": (_without_reward, {}, 4, r"config\.loss: .* reads scores\.reward, which"),
    "no estimator": (dict, {}, 4, r"config\.loss: .*dict must return a losses\.Estimator"),
}


@pytest.mark.parametrize("case", OWN_LOSSES)
def test_mistakes_of_a_loss_given_as_a_function_are_named(case):
    function, arguments, num_rollouts, message = OWN_LOSSES[case]
    changes = {"rollout": {"rollouts_per_prompt": num_rollouts}}
    with pytest.raises(ConfigError, match=message) as caught:
        check_config(tiny.config(**changes, loss=schema.loss(function, **arguments)))
    assert "\n" not in str(caught.value)


def test_checking_a_loss_takes_no_devices():
    code = (
        "import jax, tiny; from qlog.config import check_config; check_config(tiny.config());"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", check=True, timeout=120)


def test_prompts_must_split_over_the_mesh():
    config = tiny.config(train={"prompts_per_step": 4}, mesh={"data": 8})
    with pytest.raises(
        ConfigError, match=r"prompts_per_step = 4 is not a multiple of the 8 shards"
    ):
        prepare(config)


def test_a_mesh_takes_the_rest_of_the_devices():
    assert dict(sharding.make_mesh(-1, 2, 1).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    with pytest.raises(ConfigError, match="at most one may be -1"):
        sharding.make_mesh(-1, -1, 1)


def test_real_data_and_tokenizers_that_are_missing(tmp_path):
    tree = tiny.config(data={"name": "hotpotqa", "world": {}, "manual_dir": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"config\.tokenizer\.path is empty"):
        prepare(tree, ONE)
    tree.tokenizer.path = str(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"tokenizer\.path.*does not exist"):
        prepare(tree, ONE)
    tree.data.world = {"people": 3}
    with pytest.raises(ConfigError, match="read only by multihop, multihop_text: remove"):
        prepare(tree, ONE)


def test_variants_apply_in_order_and_mistakes_are_named():
    variants = estimator_variants()
    tree = parse_variants("grpo,garl,q=0.25", variants, schema.default())
    assert tree.loss.name == "garl" and tree.loss.q == 0.25 and "clip_low" not in tree.loss
    for arg, message in (
        ("gral", "did you mean 'garl'"),
        ("grpo,q=0.5", "not read by the loss 'grpo'"),
        ("q=high", "q='high' is not a number"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_variants(arg, variants, schema.default())


def test_choosing_sft_sets_the_number_of_rollouts():
    tree = parse_variants("sft", estimator_variants(), schema.default())
    assert tree.rollout.rollouts_per_prompt == 1


def test_merge_leaves_the_original_alone_and_replaces_choices_whole():
    tree = schema.default()
    merged = schema.merge(tree, {"train": {"steps": 7}, "loss": schema.loss("grpo")})
    assert merged.train.steps == 7 and tree.train.steps != 7
    assert merged.train.prompts_per_step == tree.train.prompts_per_step
    assert "q" not in merged.loss and "q" in tree.loss


def test_the_config_is_written_as_json():
    written = json.loads(schema.to_json(tiny.config()))
    assert written["loss"]["q"] == 0.75 and written["data"]["world"]["people"] == 4


def test_default_workdir_is_named_after_the_config():
    assert default_workdir("configs/hotpotqa.py:cold,garl") == "runs/hotpotqa-cold,garl"
    assert default_workdir("configs/quickstart.py") == "runs/quickstart"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=configs/hotpotqa.py:clod"], "did you mean 'cold'"),
        (
            ["--config=configs/hotpotqa.py", "--config.train.stepz=3"],
            "--config.train.stepz=3: the config has no field 'stepz'; did you mean 'steps'?",
        ),
        (["--config=configs/hotpotqa.py", "--config.trian.steps=3"], "did you mean 'train'?"),
        (["--config=configs/nowhere.py"], "nowhere.py"),
        (["--config=configs/quickstart.py", "--mode=fly"], "fly"),
        (["--config=configs/quickstart.py", "--config.runs.grpo.loss.clip_low=7.0"], "clip_low"),
    ],
)
def test_the_command_line_answers_in_one_sentence(arguments, message, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "qlog.main", *arguments, f"--workdir={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


# Losses that a single rollout per prompt teaches something.
OF_ONE = {"paft", "rb_reinforce", "iwae", "trice", "star", "reinforce_plus_plus", "sft"}


@pytest.mark.parametrize("loss", losses.RECIPES)
def test_one_rollout_is_refused_where_it_would_teach_nothing(loss):
    """Minus the mean of a group of one, every reward is 0."""
    config = schema.merge(tiny.config(), {"rollout": {"rollouts_per_prompt": 1}})
    config.loss = schema.loss(loss)
    if loss in OF_ONE:
        check.build_estimator(config)
        return
    with pytest.raises(ConfigError, match=rf"rollouts_per_prompt = 1: the loss '{loss}' needs at"):
        check.build_estimator(config)
