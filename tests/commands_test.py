"""What the commands do beside training: real configs, Hugging Face folders in and out, saved samples."""

import importlib.util
import json
import pathlib

import jax
import pytest

from qlog import config as qconfig
from qlog.experiment import prepare

ROOT = pathlib.Path(__file__).resolve().parents[1]
ONE = jax.devices()[:1]
DATASETS = ("finqa", "hotpotqa", "musique")
# The paper's numbers: total budget and splits are its Section 7.
RATIONALE_BUDGETS = {"finqa": 3968, "hotpotqa": 2944, "musique": 1920}


def get_config(name, arg=""):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


@pytest.mark.parametrize("name", DATASETS)
def test_the_papers_configs_hold_its_numbers(name):
    config = get_config(name, "warm,paft,q=0.25")
    qconfig.check(config)
    assert config.data.name == name and config.data.style == "warm"
    assert config.model == config.weights == "Qwen/Qwen3-0.6B"
    assert config.rollout.rationale_budget == RATIONALE_BUDGETS[name]
    assert config.rollout.answer_reserve == 128 and config.rollout.rollouts_per_prompt == 32
    assert config.evaluation.rollouts_per_prompt == 16
    assert (config.loss.name, config.loss.q) == ("paft", 0.25)
    assert get_config(name).data.style == "cold"
    assert get_config(name, "sft").rollout.rationale_budget == RATIONALE_BUDGETS[name]
    for arg in ("sft,tiny", "tiny,sft"):
        tiny = get_config(name, arg)
        qconfig.check(tiny)
        assert tiny.rollout.rationale_budget == 384 and tiny.rollout.rollouts_per_prompt == 1
    assert get_config(name, "tiny,grpo").rollout.rationale_budget == 24


@pytest.mark.parametrize("name", DATASETS)
def test_tiny_configs_prepare_on_real_records(name, shared, tmp_path_factory):
    config = get_config(name, "warm,tiny,sft")  # SFT's data: prompts, answers and rationales
    config.data.manual_dir = str(shared / "data" / name)
    config.data.data_dir = str(tmp_path_factory.getbasetemp() / "prepared")
    config.tokenizer.path = str(shared / "tokenizers" / "qwen3")
    experiment = prepare(config, ONE)
    assert experiment.policy.config.vocab_size == 151_936
    assert experiment.policy.valid_vocab == 151_669
    assert experiment.formatter.closing == (151_668,)
    dropped = experiment.train_data.skipped
    assert set(dropped) <= {"config.data.max_prompt_tokens"}  # every rationale and answer fits
    assert len(experiment.train_data) + sum(dropped.values()) == 100 and sum(dropped.values()) <= 2
    assert len(experiment.evaluation_data) > 40
    encoded = experiment.train_data.encode(0)
    assert 1 < len(encoded.rationale) <= 385 and encoded.rationale[-1] == 151_668
