"""The modes besides training: real configs, Hugging Face folders in and out, saved samples."""

import importlib.util
import json
import math
import os
import pathlib
import shutil

import data_fixtures
import jax
import pytest
import tiny
import trees
from places import ROOT

from qlog import data, models
from qlog.commands import modes
from qlog.config import schema
from qlog.config.check import check_config
from qlog.errors import ConfigError, PassingError
from qlog.experiment import files, prepare
from qlog.runs import checkpoint_reader
from qlog.storage import json_lines, strict_json

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
    check_config(config)
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
        check_config(tiny)
        assert tiny.rollout.rationale_budget == 384 and tiny.rollout.rollouts_per_prompt == 1
    assert get_config(name, "tiny,grpo").rollout.rationale_budget == 24
    card = get_config(name, "model_card")
    assert (card.evaluation.temperature, card.evaluation.top_k, card.evaluation.top_p) == (
        0.6,
        20,
        0.95,
    )
    assert card.rollout.temperature == 1.0


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One step of training from a Hugging Face folder, on records in HotPotQA's own format."""
    root = tmp_path_factory.mktemp("commands")
    model = root / "model"
    shape = models.DecoderConfig(
        vocab_size=272,
        num_layers=2,
        width=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_width=24,
        family="llama",
        qk_norm=False,
        tied_embeddings=False,
    )
    models.huggingface.export(models.init(shape, jax.random.key(5)), shape, model)
    data_fixtures.write_spec(model, data_fixtures.byte_level_spec())
    (model / "generation_config.json").write_text('{"top_k": 20, "eos_token_id": 257}')
    (model / "tokenizer_config.json").write_text('{"chat_template": "as it was"}')
    records = root / "records"
    records.mkdir()
    for file, count in (("hotpot_train_v1.1.json", 9), ("hotpot_dev_distractor_v1.json", 8)):
        rows = [data_fixtures.HOTPOTQA | {"_id": f"{file}{i}"} for i in range(count)]
        (records / file).write_text(json.dumps(rows))
    config = tiny.config(
        model=str(model),
        weights=str(model),
        architecture={},
        data={
            "name": "hotpotqa",
            "world": {},
            "manual_dir": str(records),
            "max_prompt_tokens": 256,
            "data_dir": str(root / "prepared"),
        },
        rollout={"answer_reserve": 24},
        train={"steps": 1, "prompts_per_step": 8},
        evaluation={"every": 1, "prompts_per_batch": 1, "without_rationale": True},
    )
    tiny.run(config, root / "run")
    return config, root / "run", shape


def test_a_folder_is_trained_exported_and_read_again(trained):
    config, workdir, shape = trained
    experiment = prepare(config, train=False, evaluate=False)
    assert experiment.policy.config == shape
    assert experiment.evaluation_data is None and experiment.train_data is None
    best = checkpoint_reader.load_params(workdir, experiment.abstract_params())
    before = experiment.init_params()
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), best, before)
    assert all(jax.tree.leaves(changed))

    assert modes.run("export", config, workdir) == 0
    exported = workdir / "export"
    again = schema.merge(config, {"model": str(exported), "weights": str(exported)})
    reread = prepare(again, train=False, evaluate=False)
    assert reread.policy == experiment.policy
    trees.assert_equal(reread.init_params(), best)
    tokenizers = [e.formatter.tokenizer for e in (experiment, reread)]
    assert tokenizers[0].encode("Dune (novel)") == tokenizers[1].encode("Dune (novel)")
    generation = json.loads((exported / "generation_config.json").read_text())
    ends = list(tokenizers[0].eos_ids)
    assert generation["top_k"] == 20 and generation["eos_token_id"] == ends
    assert json.loads((exported / "config.json").read_text())["eos_token_id"] == ends
    assert "as it was" in (exported / "tokenizer_config.json").read_text()
    with pytest.raises(ConfigError, match="export needs a folder of its own"):
        modes.run("export", config, workdir)


def test_an_export_has_the_template_that_prompts_were_written_in(trained, tmp_path, capsys):
    config, workdir, _ = trained
    shutil.copytree(workdir, tmp_path / "run", ignore=lambda *_: {"export"})
    model = pathlib.Path(shutil.copytree(config.model, tmp_path / "model"))
    (model / "chat_template.jinja").write_text("the model's own")
    given = tmp_path / "given.jinja"
    given.write_text("Q: {{ messages[0].content }} A:\n")
    warm = {"data": {"style": "warm"}, "model": str(model), "weights": str(model)}
    tokenizer = {"chat_template": str(given), "eos": ("<|endoftext|>",)}
    config = schema.merge(config, {**warm, "tokenizer": tokenizer})
    assert modes.run("export", config, tmp_path / "run") == 0
    # The run itself wrote its prompts without a template.
    assert "NOTE: the checkpoint was trained on prompts of another" in capsys.readouterr().out
    exported = tmp_path / "run/export"
    assert (exported / "chat_template.jinja").read_text() == given.read_text()
    # eos_token_id 257 of the model's generation_config.json ends answers still.
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == [
        256,
        257,
    ]
    again = {"model": str(exported), "weights": str(exported), "tokenizer": {"chat_template": ""}}
    reread = prepare(schema.merge(config, again), train=False, evaluate=False).formatter
    example = data.Example("1", "Why?", "a")
    assert reread.prompt(example) == files.load_formatter(config).prompt(example)


def test_an_export_has_no_template_that_prompts_were_not_written_in(trained, tmp_path, capsys):
    config, workdir, _ = trained
    shutil.copytree(workdir, tmp_path / "run", ignore=lambda *_: {"export"})
    model = pathlib.Path(shutil.copytree(config.model, tmp_path / "model"))
    (model / "chat_template.jinja").write_text("the model's own")
    warm = {"data": {"style": "warm"}, "model": str(model), "weights": str(model)}
    config = schema.merge(config, {**warm, "tokenizer": {"chat_template": "builtin"}})
    assert modes.run("export", config, tmp_path / "run") == 0
    exported = tmp_path / "run/export"
    assert not (exported / "chat_template.jinja").exists()
    assert "chat_template" not in json.loads((exported / "tokenizer_config.json").read_text())
    assert "without a chat template" in capsys.readouterr().out


def test_what_is_exported_is_what_the_config_names(trained, tmp_path):
    config, workdir, _ = trained
    for mode in ("export", "evaluate", "sample"):  # a mistyped workdir is not the base model
        with pytest.raises(
            ConfigError, match=r"--workdir = .* has no checkpoint.*--checkpoint=base"
        ):
            modes.run(mode, config, tmp_path / "mistyped")
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        ConfigError, match=r"--checkpoint=7: .*has the steps 1; ask for best, latest"
    ):
        modes.run("export", config, workdir, checkpoint="7")
    with pytest.raises(ConfigError, match="--checkpoint=latest is not read by --mode=train"):
        modes.run("train", config, workdir, checkpoint="latest")

    def exported(changes, into):
        modes.run("export", schema.merge(config, changes), into, checkpoint="base")
        return (into / "export" / "model.safetensors").read_bytes()

    weights = exported({}, tmp_path / "weights")
    of_another_run = exported({"init_from": str(workdir)}, tmp_path / "another")
    original = pathlib.Path(config.weights) / "model.safetensors"
    assert weights == original.read_bytes() != of_another_run
    # A synthetic task's vocabulary exists only in memory; it is written out.
    task = tiny.config(init_from="", model=str(workdir / "export"), architecture={})
    task.weights = str(pathlib.Path(config.weights))
    modes.run(
        "export",
        schema.merge(
            task, {"train": {"prompts_per_step": 8}, "evaluation": {"prompts_per_batch": 1}}
        ),
        tmp_path / "task",
        checkpoint="base",
    )
    assert (tmp_path / "task" / "export" / "tokenizer.json").is_file()


def test_metrics_are_computed_again_from_saved_samples(trained, tmp_path, capsys):
    config, workdir, _ = trained
    samples = workdir / "samples" / "step_000001.jsonl"
    assert modes.run("evaluate", config, tmp_path, from_samples=str(samples)) == 0
    report = json.loads((tmp_path / "evaluation_step_000001.json").read_text())
    again = report["metrics"]
    assert again == json.loads((workdir / "results.json").read_text())["metrics"]
    assert "no_rationale/m@4" in again and report == json.loads(capsys.readouterr().out)
    assert report["source"] == f"samples of {samples}" and report["step"] is None

    # A command evaluates the checkpoint as training did, sample for sample.
    assert modes.run("evaluate", config, workdir) == 0
    assert "NOTE" not in capsys.readouterr().out
    assert (workdir / "samples" / "validation.jsonl").read_text() == samples.read_text()
    report = json.loads((workdir / "evaluation_validation.json").read_text())
    assert report["metrics"] == again and report["step"] == 1
    assert report["source"] == f"{workdir}/checkpoints/1" and report["split"] == "validation"

    # No model and no data are needed; other numbers come from the same samples.
    elsewhere = schema.merge(
        config,
        {
            "data": {"manual_dir": "/nowhere"},
            "model": "gone",
            "evaluation": {"rollouts_per_prompt": 2},
        },
    )
    row = json.loads(samples.read_text().splitlines()[0])
    right = row | {"answers": [row["golds"][0] + "\u2028", row["golds"][0], "x", "x"]}
    file = tmp_path / "right.jsonl"
    file.write_text(json.dumps(right, ensure_ascii=False) + "\n", encoding="utf-8")
    modes.run("evaluate", elsewhere, tmp_path, from_samples=str(file))
    numbers = json.loads((tmp_path / "evaluation_right.json").read_text())["metrics"]
    assert numbers["p@1"] == 0.5 and numbers["m@2"] == 0.5
    assert numbers["p@2"] == pytest.approx(1 - 1 / 6)


def test_samples_that_cannot_be_read_are_named(tmp_path):
    config, file = tiny.config(), tmp_path / "samples.jsonl"
    row = {
        "id": "a",
        "golds": ["b"],
        "answers": ["b"],
        "log_p": -1.0,
        "forced": [False],
        "complete": [True],
    }
    for text, message in (
        (None, "samples.jsonl cannot be read: No such file"),
        ("", "is empty"),
        ('{"id": "a"', "holds no samples"),
        ('{"id": "a", "golds": ["b"], "answers": ["b"]}', "line 1: samples need complete, forced"),
        (json.dumps(row | {"forced": []}), "line 1: log_p must be a finite number, forced and"),
        (json.dumps(row | {"golds": "b"}), "line 1: the row has no 'golds' that is a list of str"),
        ("\n\n" + json.dumps(row | {"log_p": 10**400}), "samples.jsonl, line 3: log_p must be"),
        (json.dumps(row).replace("-1.0", "-1e999"), "line 1: log_p must be a finite number"),
        (json.dumps(row | {"official_answer": 10**400}), "line 1: .*'official_answer' that is a"),
        (json.dumps(row | {"official_answer": True}), "line 1: .*'official_answer' that is a"),
        (json.dumps(row | {"rationales": 5}), "line 1: the row has no 'rationales' that is a"),
        (json.dumps(row | {"rationales": ["a", "b"]}), "line 1: the row has other numbers of ra"),
        (json.dumps(row | {"extra": [1]}), "line 1: the row has no 'extra' that is an object"),
    ):
        if text is not None:
            file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            modes.run("evaluate", config, tmp_path, from_samples=str(file))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ConfigError, match="samples.jsonl is not a plain file: copy its content"):
        modes.run("evaluate", config, tmp_path, from_samples=str(file))
    with pytest.raises(ConfigError, match="--lengths=.*samples.jsonl is not a plain file"):
        modes.run("compile", config, tmp_path, topology="v5e:2x2", lengths=str(file))
    with pytest.raises(ConfigError, match="is not read by --mode=train: add --mode=evaluate"):
        modes.run("train", config, tmp_path, from_samples=str(file))


def test_numbers_that_are_not_finite_leave_json_as_words(tmp_path, monkeypatch):
    """Of a model that has exploded: what evaluation wrote is JSON, and is read again."""
    row = {"id": "a", "golds": ["b"], "answers": ["b"], "log_p": -math.inf}
    file = tmp_path / "samples.jsonl"
    file.write_text(json_lines.line(row | {"forced": [False], "complete": [True]}))
    modes.run("evaluate", tiny.config(), tmp_path, from_samples=str(file))
    written = tmp_path / "evaluation_samples.json"
    assert strict_json.loads(written.read_bytes())["metrics"]["log_p"] == "-inf"
    monkeypatch.setattr(modes, "is_live", lambda: True)  # the table takes the words, too
    modes.run("evaluate", tiny.config(), tmp_path, from_samples=str(file))


@pytest.mark.parametrize("model", ["Qwen/Qwen3-0.6B", "qwen3_0p6b"])
def test_weights_out_of_reach_are_one_sentence(model, tmp_path, monkeypatch):
    # A port where nothing listens stands for a machine without a network.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    config = get_config("hotpotqa")
    config.model = model
    config.data.manual_dir = str(tmp_path / "never_read")
    config.tokenizer.path = str(data_fixtures.write_spec(tmp_path, data_fixtures.byte_level_spec()))
    with pytest.raises(PassingError) as caught:
        prepare(config, ONE)
    message = str(caught.value)
    assert "\n" not in message and "hf download Qwen/Qwen3-0.6B --local-dir FOLDER" in message
