"""Hugging Face folders: reference logits, round trips, the mesh, and all that can be wrong."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from jax.sharding import NamedSharding, PartitionSpec
from models_fixtures import CONFIGS, jit, random_params
from places import GOLDEN
from safetensors.numpy import load_file, save_file

from qlog import models
from qlog.errors import ConfigError, PassingError
from qlog.models import huggingface
from qlog.models.families import FAMILIES

forward = jit(models.extend, static_argnums=1)
prefill = jit(models.prefill, static_argnums=1)
decode_step = jit(models.decode_step, static_argnums=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_continuation_equal_those_of_transformers(family):
    """Against tests/testdata/golden, which transformers wrote (make_golden.py)."""
    config = huggingface.read_config(GOLDEN / family)
    assert config.family == family
    params = huggingface.load(GOLDEN / family, config)
    huggingface.check(GOLDEN / family, config)
    expected = np.load(GOLDEN / family / "expected.npz")
    tokens, lengths = expected["tokens"], expected["lengths"]
    head = models.unembedding(params).T
    hidden = forward(params, config, tokens[:, None])
    is_token = np.arange(tokens.shape[1]) < lengths[:, None]
    difference = np.where(is_token[..., None], hidden[:, 0] @ head - expected["logits"], 0)
    assert np.abs(difference).max() < 1e-4

    # The prompt's last token is fed as the first of the rollout, as the sampler does.
    prefix = prefill(params, config, tokens, jnp.asarray(lengths - 1))
    steps = len(expected["greedy"])
    suffix = models.empty_suffix(config, 2, 1, steps, jnp.float32)
    last, continuation = tokens[np.arange(2), lengths - 1], []
    for slot in range(steps):
        last = jnp.asarray(last)[:, None]
        hidden, suffix = decode_step(params, config, last, prefix, suffix, jnp.int32(slot))
        last = (hidden[:, 0] @ head).argmax(-1)
        continuation.append(int(last[0]))
    assert continuation == expected["greedy"].tolist()


@pytest.mark.parametrize("name", ["qwen3", "untied", "smollm3", "golden gemma3"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_export_and_load_are_bit_equal(name, dtype, tmp_path):
    if name in CONFIGS:
        config = CONFIGS[name]
        params = random_params(config, dtype)
    else:
        config = huggingface.read_config(GOLDEN / "gemma3")
        params = huggingface.load(GOLDEN / "gemma3", config, dtype=dtype)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"eos_token_id": [1, 2], "temperature": 0.6}')
    carried = huggingface.tokenizer_files(tmp_path)
    assert set(carried) == {tokenizer, generation}

    folder = tmp_path / "out"
    huggingface.export(
        params,
        config,
        folder,
        tokenizer_files=carried,
        generation={"pad_token_id": 0},
        max_file_bytes=4000 if name == "untied" else 10**9,
    )
    assert huggingface.read_config(folder) == config
    again = huggingface.load(folder, config, dtype=dtype)
    trees.assert_equal(again, params)
    assert jax.tree.leaves(again)[0].dtype == dtype
    written = json.loads((folder / "config.json").read_text())
    assert written["eos_token_id"] == [1, 2] and written["pad_token_id"] == 0
    assert written["torch_dtype"] == np.dtype(dtype).name
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.6
    assert (folder / "tokenizer.json").read_text() == "{}"
    files = sorted(folder.glob("*.safetensors"))
    assert {file.stat().st_mode for file in folder.iterdir()} == {tokenizer.stat().st_mode}  # umask
    tensors = {key: file.name for file in files for key in load_file(file)}
    assert ("lm_head.weight" in tensors) == (name == "untied")
    if name == "untied":
        assert len(files) > 2 and max(file.stat().st_size for file in files) < 10_000
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == tensors
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        assert index["metadata"]["total_size"] == total
    with pytest.raises(ConfigError, match="holds safetensors already"):
        huggingface.export(params, config, folder)


def test_weights_land_on_the_mesh_and_leave_it_whole(tmp_path):
    config = CONFIGS["untied"]
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))

    def spec(path, leaf):
        if path[-1].key == "kernel":
            return NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
        is_table = leaf.shape[0] == 40
        return NamedSharding(mesh, PartitionSpec("fsdp") if is_table else PartitionSpec())

    params = random_params(config)
    shardings = jax.tree.map_with_path(spec, params)
    huggingface.export(params, config, tmp_path / "one")
    placed = huggingface.load(tmp_path / "one", config, shardings=shardings)
    trees.assert_equal(placed, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == shardings
    kernel = placed["layers"]["down_proj"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 12, 8)}
    huggingface.export(placed, config, tmp_path / "two")
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_the_text_half_of_a_model_with_images_loads(tmp_path):
    config = huggingface.read_config(GOLDEN / "gemma3")
    text = json.loads((GOLDEN / "gemma3" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    tensors = load_file(GOLDEN / "gemma3" / "model.safetensors")
    outer = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    outer["vision_tower.patch.weight"] = np.zeros(3, np.float32)
    outer["language_model.lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(outer, tmp_path / "model.safetensors")
    assert huggingface.read_config(tmp_path) == config
    alone = huggingface.load(GOLDEN / "gemma3", config)
    trees.assert_equal(huggingface.load(tmp_path, config), alone)


def without(name):
    return lambda tensors: tensors.pop(name)


def replaced(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("model.norm.weight"), "lacks 1 tensors, first 'model.norm.weight'"),
        (
            without("lm_head.weight"),
            r"'lm_head.weight': does its config.json have the right tie_word",
        ),
        (
            lambda tensors: tensors.update({"model.layers.3.mlp.up_proj.weight": np.zeros(3)}),
            "beyond what the config describes, 1 tensors, first 'model.layers.3.mlp.up_proj",
        ),
        (
            replaced("model.layers.1.self_attn.q_proj.weight", lambda x: x[:-8]),
            r"'model.layers.1.self_attn.q_proj.weight' has shape \(24, 16\).*asks for \(32, 16\)",
        ),
        (replaced("model.norm.weight", lambda x: x.astype("i1")), "is of type I8.*not quantised"),
    ],
)
def test_wrong_tensors_are_named_before_anything_is_read(damage, message, tmp_path):
    config = CONFIGS["untied"]
    huggingface.export(random_params(config), config, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    file.unlink()
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, file)
    with pytest.raises(ConfigError, match=message):
        huggingface.load(tmp_path, config)


def test_another_number_of_layers_is_told(tmp_path):
    config = CONFIGS["untied"]
    huggingface.export(random_params(config), config, tmp_path)
    for number in (1, 2**16):
        other = dataclasses.replace(config, num_layers=number)
        message = f"has {config.num_layers} layers where the config describes {number}: is config"
        with pytest.raises(ConfigError, match=message):
            huggingface.check(tmp_path, other)


def test_incomplete_folders_are_named(tmp_path):
    config = huggingface.read_config(GOLDEN / "llama")
    with pytest.raises(ConfigError, match="holds no config.json"):
        huggingface.resolve(tmp_path)
    with pytest.raises(ConfigError, match=r"holds no \*.safetensors"):
        huggingface.load(tmp_path, config)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json is not JSON"):
        huggingface.read_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 cut")
    with pytest.raises(ConfigError, match="is damaged .*download it again"):
        huggingface.load(tmp_path, config)
    index = (GOLDEN / "llama" / "model.safetensors.index.json").read_text()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match="lacks model-00001-of-00003.safetensors, model-00002"):
        huggingface.load(tmp_path, config)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no 'weight_map'"):
        huggingface.load(tmp_path, config)
    # Without an index, what an interrupted download or a second model left behind.
    (tmp_path / "model.safetensors.index.json").unlink()
    part = "model-00002-of-00003.safetensors"
    (tmp_path / part).write_bytes((GOLDEN / "llama" / part).read_bytes())
    with pytest.raises(ConfigError, match="lacks .* tensors, .* downloaded"):
        huggingface.load(tmp_path, config)
    (tmp_path / "other.safetensors").write_bytes((GOLDEN / "llama" / part).read_bytes())
    with pytest.raises(ConfigError, match="twice, the second time in other.safetensors"):
        huggingface.load(tmp_path, config)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/x.safetensors", "a/../../x", "..\\x", "C:\\x", ""]
)
def test_an_index_names_files_of_its_folder_only(name, tmp_path):
    config = huggingface.read_config(GOLDEN / "llama")
    (tmp_path / "model").mkdir()
    (tmp_path / "other.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 cut")
    index = {"weight_map": {"model.norm.weight": name}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="names '.*', which is not in its folder"):
        huggingface.load(tmp_path / "model", config)


def test_a_snapshot_of_the_hubs_cache_is_made_of_links(tmp_path):
    config = huggingface.read_config(GOLDEN / "llama")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for file in (GOLDEN / "llama").iterdir():
        (tmp_path / "blobs" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "snapshot" / file.name).symlink_to(tmp_path / "blobs" / file.name)
    folder = huggingface.resolve(tmp_path / "snapshot")
    huggingface.check(folder, config)
    expected = huggingface.load(GOLDEN / "llama", config)
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(folder, config), expected)
    # A copy of the snapshot's folder alone has links to nothing.
    part = "model-00002-of-00003.safetensors"
    (tmp_path / "blobs" / part).unlink()
    with pytest.raises(ConfigError, match=f"lacks {part} .*is a link to .* copy with cp -rL"):
        huggingface.resolve(folder)
    (tmp_path / "blobs/config.json").unlink()
    with pytest.raises(ConfigError, match="no config.json .config.json is a link to .*cp -rL"):
        huggingface.resolve(folder)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("model.safetensors", LFS, "model.safetensors is a pointer of Git LFS .*git lfs pull"),
        ("config.json", LFS, "config.json is a pointer of Git LFS .*git lfs pull"),
        ("config.json", "{}".encode("utf-16"), "config.json is UTF-16 and not UTF-8: save it"),
        ("config.json", b"[" * 100_000, "config.json has lists or objects more than 100 deep"),
        ("config.json", b'{"vocab_size": ' + b"1" * 6000 + b"}", "whole number of over 4,000 dig"),
        ("config.json", b"\xff", "config.json is not UTF-8"),
        ("config.json", b"", "config.json is not JSON"),
        ("config.json", b"null", "config.json holds no JSON object"),
    ],
)
def test_files_of_a_model_that_are_none(name, content, message, tmp_path):
    config = huggingface.read_config(GOLDEN / "qwen3")
    for file in (GOLDEN / "qwen3").iterdir():
        (tmp_path / file.name).write_bytes(content if file.name == name else file.read_bytes())
    with pytest.raises(ConfigError, match=message) as error:
        huggingface.read_config(huggingface.resolve(tmp_path))
        huggingface.load(tmp_path, config)
    assert "\n" not in str(error.value)


def test_a_mark_at_the_start_of_config_json_is_no_part_of_it(tmp_path):
    content = (GOLDEN / "qwen3/config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + content + b"\n\n")
    assert huggingface.read_config(tmp_path) == huggingface.read_config(GOLDEN / "qwen3")


@pytest.mark.parametrize("change, is_told", [(0.0, False), (1.0, True)])
def test_a_head_that_a_tied_model_does_not_read_is_told(change, is_told, tmp_path, caplog):
    config = CONFIGS["qwen3"]
    huggingface.export(random_params(config), config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(change)
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    huggingface.check(tmp_path, config)
    assert ("has an lm_head.weight that differs from the embedding" in caplog.text) == is_told


def test_a_spec_is_a_folder_or_a_hub_id(tmp_path, monkeypatch):
    assert huggingface.resolve(GOLDEN / "qwen3") == GOLDEN / "qwen3"
    for spec in ("no/such/folder", "./missing", "name"):
        with pytest.raises(
            ConfigError, match=f"'{re.escape(spec)}' is not a folder here and not a Hub id"
        ):
            huggingface.resolve(spec)
    # A port where nothing listens stands for a machine without a network.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PassingError) as caught:
        huggingface.resolve("Qwen/Qwen3-0.6B")
    message = str(caught.value)
    assert "\n" not in message and "hf download Qwen/Qwen3-0.6B --local-dir FOLDER" in message
