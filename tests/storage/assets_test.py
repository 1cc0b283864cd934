"""What runs read, from folders and from buckets (emulators of GCS and S3 on loopback).

It is found before any network is asked, copied once, and staged by one command, from which a whole
run then starts.
"""

import dataclasses
import gzip
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jax
import pytest
import trees
from data_fixtures import byte_level_spec, write_spec
from places import GOLDEN, ROOT, TESTDATA
from safetensors.numpy import load_file, save_file

from qlog import experiment, models
from qlog.commands import stage
from qlog.config import paper, schema
from qlog.data import builders, tokenizers
from qlog.errors import ConfigError, PassingError
from qlog.experiment import files
from qlog.experiment.contents import identity as contents_of
from qlog.experiment.files import load_formatter
from qlog.models import huggingface
from qlog.storage import assets, paths


@pytest.fixture(scope="module")
def google():
    """Environment of clients of a store as Google's, with an empty bucket `bucket`."""
    from gcp_storage_emulator import server

    emulator = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    emulator.start()
    port = emulator._api._httpd.server_address[1]
    yield {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google itself
    }
    emulator.stop()


@pytest.fixture(scope="module")
def amazon():
    """The same for S3."""
    import boto3
    from moto.server import ThreadedMotoServer

    emulator = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    emulator.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{emulator._server.server_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    ).create_bucket(Bucket="bucket")
    yield environment
    emulator.stop()


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """Empty caches, no assets, and a Hub that is not there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("QLOG_ASSETS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(params=["folder", "google", "amazon"])
def place(request, alone, monkeypatch, tmp_path):
    """A new folder, here or in a bucket."""
    if request.param == "folder":
        return paths.parse(tmp_path / "shared")
    import fsspec

    for name, value in request.getfixturevalue(request.param).items():
        monkeypatch.setenv(name, value)
    for kind in ("gs", "s3"):
        fsspec.get_filesystem_class(kind).clear_instance_cache()
    scheme = {"google": "gs", "amazon": "s3"}[request.param]
    return paths.parse(f"{scheme}://bucket/{tmp_path.name}")


def copies(tmp_path) -> list[pathlib.Path]:
    return [p for p in (tmp_path / "cache/qlog/assets").glob("*") if p.suffix != ".lock"]


# ---- Copies of what is in a bucket ----


def test_a_bucket_is_copied_once_and_again_when_it_changes(place, tmp_path):
    for name, text in (("a.json", "1"), ("sub/b.txt", "two"), ("c.safetensors", "3")):
        paths.write(place / name, text)
    paths.write(place.parent / f"{place.name}-Base/d.json", "of another whose name begins alike")
    folder = assets.local(place, "config.model")
    assert not paths.is_remote(place) or len(list(folder.rglob("*.*"))) == 3
    assert (folder / "sub/b.txt").read_text() == "two"
    if not paths.is_remote(place):
        assert folder == pathlib.Path(place) and not copies(tmp_path)
        return
    assert assets.local(place, "config.model") == folder and copies(tmp_path) == [folder]
    some = assets.local(place, "config.model", lambda name: name.endswith(".json"))
    assert [p.name for p in some.iterdir()] == ["a.json"]
    assert assets.local(place / "sub/b.txt", "config.tokenizer.path").read_text() == "two"
    paths.write(place / "a.json", "9")  # of the same size
    changed = assets.local(place, "config.model")
    assert changed != folder and (changed / "a.json").read_text() == "9"
    assert (folder / "a.json").read_text() == "1"  # a run that began with it still reads it


def test_a_tokenizer_that_is_one_file_comes_with_its_neighbours(place, tmp_path):
    template = "{{ messages[0].content }}"
    files = {
        "mine.json": json.dumps(byte_level_spec()),
        "tokenizer_config.json": json.dumps({"chat_template": template}),
        "generation_config.json": json.dumps({"eos_token_id": [258, 257]}),
        "weights.safetensors": "large",
        "sub/chat_template.jinja": "of another model",
    }
    for name, text in files.items():
        paths.write(place / name, text)
    paths.write(place / "own/x.jinja", template + "!")
    config = paper.experiment("warm", dataset="hotpotqa", total_budget=192, max_prompt_tokens=512)
    config.tokenizer.path = str(place / "mine.json")
    tokenizer = load_formatter(config).tokenizer
    assert tokenizer.path.name == "mine.json" and tokenizer.eos_ids == (258, 256, 257)
    assert tokenizer.chat_template.source == template
    if paths.is_remote(place):
        copied = {p.name for p in tokenizer.path.parent.iterdir()}
        assert copied == {"mine.json", "tokenizer_config.json", "generation_config.json"}
    config.tokenizer.chat_template = str(place / "own/x.jinja")
    assert load_formatter(config).tokenizer.chat_template.source == template + "!"
    # Staged, they lie next to each other again, and the flags name them.
    said = []
    wanted = [a for a in stage.plan(config) if a.name.startswith(("tokenizers/", "chat_"))]
    stage.stage(wanted, str(tmp_path / "to"), said.append)
    staged = set(stage.files(tmp_path / "to"))
    folder = "tokenizers/mine.json"
    assert staged == {
        f"{folder}/mine.json",
        f"{folder}/tokenizer_config.json",
        f"{folder}/generation_config.json",
        "chat_templates/x.jinja/x.jinja",
    }
    flags = dict(word.split("=") for word in shlex.split(said[-1]) if word.startswith("--"))
    config.tokenizer.path = flags["--config.tokenizer.path"]
    config.tokenizer.chat_template = flags["--config.tokenizer.chat_template"]
    again = load_formatter(config).tokenizer
    assert again.eos_ids == tokenizer.eos_ids and again.chat_template.source == template + "!"


def test_what_is_missing_or_out_of_reach_is_a_sentence(place, monkeypatch):
    if not paths.is_remote(place):
        monkeypatch.setenv("QLOG_ASSETS", str(place))
        with pytest.raises(ConfigError, match="QLOG_ASSETS=.* is not a folder on this host"):
            assets.find("models/a/b", bool)
        return
    with pytest.raises(ConfigError, match="config.weights = '.*' holds no files"):
        assets.local(place, "config.weights")
    with pytest.raises(ConfigError):
        assets.local(f"{str(place).partition('://')[0]}://no-such-bucket/x", "config.weights")


def test_publishing_copies_what_changed_and_the_mark_last(place, tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    for name in ("config.json", "a.txt", "sub/b.txt"):
        (source / name).write_text(name)
    names = ["a.txt", "config.json", "sub/b.txt"]
    assert assets.publish(source, place, names, "config.json") == 3
    assert assets.publish(source, place, names, "config.json") == 0
    (source / "a.txt").write_text("A.TXT")  # of the same size
    assert assets.publish(source, place, ["a.txt", "config.json"], "config.json") == 1
    assert paths.read(place / "a.txt") == "A.TXT"
    assert not (place / "sub/b.txt").exists(), "what no longer belongs to it is gone"
    assert paths.read(place / "config.json") == "config.json"


def test_runs_side_by_side_on_one_host_copy_once(google, tmp_path):
    """Two processes that know nothing of each other, as a sweep's are."""
    environment = (
        os.environ | google | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    )
    where = f"gs://bucket/{tmp_path.name}"
    fill = (
        f"from qlog.storage import paths; p = paths.parse('{where}'); "
        "paths.write(p / 'a', b'x' * 4_000_000)"
    )
    run([sys.executable, "-c", fill], environment)
    program = f"from qlog.storage import assets; print(assets.local('{where}', 'x'))"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "".join(outputs).count("copying") == 1
    assert len({output.split()[-1] for output in outputs}) == 1 and len(copies(tmp_path)) == 1


# ---- Models ----


def test_a_hub_id_is_found_in_the_assets_first(place, monkeypatch):
    monkeypatch.setenv("QLOG_ASSETS", str(place))
    paths.write(place / "models/else", "")
    target = place / "models/owner/name"
    files = [file.name for file in (GOLDEN / "qwen3").iterdir() if file.suffix != ".npz"]
    for name in sorted(files, key=lambda name: name == "config.json"):
        with pytest.raises(PassingError, match="launch/stage --model=owner/name"):
            huggingface.resolve("owner/name")  # half of it is nothing
        paths.copy(GOLDEN / "qwen3" / name, target / name)
    folder = huggingface.resolve("owner/name")
    assert load_file(next(folder.glob("*.safetensors")))
    with pytest.raises(PassingError):
        huggingface.resolve("other/name")  # another owner's
    assert huggingface.resolve(str(target), field="config.weights").is_dir()
    (target / "config.json").unlink()
    with pytest.raises(ConfigError, match="config.weights = .* holds no config.json"):
        huggingface.resolve(str(target), field="config.weights")


def test_an_export_goes_to_a_bucket_and_comes_back(place, tmp_path):
    config = huggingface.read_config(GOLDEN / "llama")
    params = huggingface.load(GOLDEN / "llama", config, dtype="float32")
    target = place / "export"
    huggingface.export(params, config, target, max_file_bytes=50_000)
    again = huggingface.load(huggingface.resolve(str(target)), config)
    trees.assert_equal(params, again)
    with pytest.raises(ConfigError, match="holds safetensors already"):
        huggingface.export(params, config, target)


def test_the_digest_is_of_the_weights_however_they_lie(tmp_path):
    config = huggingface.read_config(GOLDEN / "llama")
    params = huggingface.load(GOLDEN / "llama", config)
    for name, limit in (("one", 10**9), ("many", 3_000)):
        huggingface.export(params, config, tmp_path / name, max_file_bytes=limit)
    digest = huggingface.digest(tmp_path / "one", config)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert digest == huggingface.digest(tmp_path / "many", config)
    tensors = load_file(tmp_path / "one/model.safetensors")
    tensors[max(tensors)] = tensors[max(tensors)] * 1.001
    save_file(tensors, tmp_path / "one/model.safetensors")
    assert digest != huggingface.digest(tmp_path / "one", config)


# ---- Data ----


def test_raw_and_prepared_data_may_be_in_a_bucket(place, monkeypatch):
    for file in (TESTDATA / "hotpotqa").iterdir():
        paths.copy(file, place / "raw/hotpotqa" / file.name)
    prepared = builders.prepare("hotpotqa", manual_dir=str(place / "raw"))
    target = place / "data" / builders.staged_name("hotpotqa")
    assets.publish(prepared, target, stage.files(prepared), "ids.json")
    ids = list(builders.open_prepared("hotpotqa", "dev", prepared).ids)

    monkeypatch.setenv(
        "XDG_CACHE_HOME", str(pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "another")
    )
    opened = builders.open_records("hotpotqa", "dev", data_dir=str(place / "data"))
    assert opened.ids == ids and opened[0]["_id"] == ids[0]
    monkeypatch.setenv("QLOG_ASSETS", str(place))
    assert builders.open_records("hotpotqa", "dev").ids == ids
    if paths.is_remote(place):
        with pytest.raises(ConfigError, match="data_dir = .* holds no files: stage"):
            builders.prepare("musique", data_dir=str(place / "data"))


def test_files_of_ones_own_may_be_in_a_bucket(place, monkeypatch, tmp_path):
    line = lambda i: json.dumps({"id": f"{i}", "source": f"{i} + 1 =", "answer": i + 1}) + "\n"
    for name, numbers in (
        ("a/train-0.jsonl", [0, 1]),
        ("a/train-1.jsonl", [2]),
        ("a/dev.jsonl", [3]),
    ):
        paths.write(place / name, "".join(map(line, numbers)))
    paths.write(place / "b.jsonl.gz", gzip.compress(line(4).encode()))
    paths.write(place / "a/.hidden/train-2.jsonl", "not JSON")
    config = schema.default()
    config.data.name = "jsonl"
    for spec, expected in (
        ("a/train-*.jsonl", ["0", "1", "2"]),
        ("a", ["0", "1", "2"]),
        ("a/", ["0", "1", "2"]),
        ("b.jsonl.gz", ["4"]),
        (["b.jsonl.gz", "a/*-1.jsonl"], ["4", "2"]),
    ):
        several = spec if isinstance(spec, list) else [spec]
        # A trailing slash would be lost in a path.
        named = [f"{place}/{each}" for each in several]
        validation = f"{place}/a/dev.jsonl"
        config.data.files = {"train": named, "validation": validation, "test": validation}
        prepared = files.prepare_data(config)
        assert [e.id for e in files.open_source(config, "train", prepared)] == expected, spec
    if paths.is_remote(place):
        before = copies(tmp_path)
        assert before
        files.prepare_data(config)
        assert copies(tmp_path) == before  # nothing is copied twice
    for spec in ("none.jsonl", "none/*.jsonl", "none"):
        config.data.files = {"train": f"{place}/{spec}"}
        with pytest.raises(ConfigError, match=f"files.train = '{place}/.* is neither a file nor"):
            files.prepare_data(config)


def test_files_of_ones_own_are_staged(place, tmp_path):
    for folder, i in (("a", 0), ("b", 1)):
        file = tmp_path / folder / "train.jsonl"
        file.parent.mkdir()
        file.write_text(json.dumps({"id": f"{i}", "source": "s", "answer": i}))
    config = schema.default()
    config.data.name = "jsonl"
    config.weights, config.tokenizer.path = "random", ""
    config.data.files = {
        "train": str(tmp_path / "*" / "train.jsonl"),
        "validation": "gs://bucket/elsewhere.jsonl",
    }
    wanted = stage.plan(config)
    assert [asset.name for asset in wanted] == ["data/files/train"]
    config.data.files = {"train": config.data.files.train}
    said = []
    stage.stage(stage.plan(config), str(place), said.append)
    flag = re.search(r"--config.data.files.train=(\S+)", said[-1])[1]
    config.data.files = {"train": flag}
    source = files.open_source(config, "train", files.prepare_data(config))
    assert [example.id for example in source] == ["0", "1"]
    # A file that is named after another split stays one of the split that the config says.
    config.data.files = {"validation": str(tmp_path / "b" / "test.jsonl.gz")}
    (tmp_path / "b/test.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    stage.stage(stage.plan(config), str(place), said.append)
    flag = re.search(r"--config.data.files.validation=(\S+)", said[-1])[1]
    config.data.files = {"validation": flag}
    source = files.open_source(config, "validation", files.prepare_data(config))
    assert [example.id for example in source] == ["1"]


# ---- One command, then a run ----

_BUDGETS = [  # of two CPU cores
    "--config.rollout.rationale_budget=6",
    "--config.rollout.answer_reserve=24",
    "--config.rollout.rollouts_per_prompt=2",
    "--config.rollout.prompts_per_wave=0",
    "--config.train.steps=1",
    "--config.train.prompts_per_step=2",
    "--config.evaluation.every=0",
    "--config.train.prompts_per_microbatch=0",
    "--config.train.rollouts_per_microbatch=0",
    "--config.evaluation.prompts_per_batch=2",
    "--config.dtype=float32",
    "--config.data.max_prompt_tokens=20000",
]


def make_model(folder: pathlib.Path) -> None:
    """A small Qwen3 with a tokenizer, as a Hub's folder."""
    shape = dataclasses.replace(
        models.PRESETS["qwen3_0p6b"],
        vocab_size=320,
        num_layers=1,
        width=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_width=16,
    )
    huggingface.export(models.init(shape, jax.random.key(0)), shape, folder)
    write_spec(folder, byte_level_spec())


def run(command, environment, status=0) -> str:
    done = subprocess.run(
        list(map(str, command)),
        env=environment,
        cwd=ROOT,
        text=True,
        timeout=300,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.mark.slow
def test_readmes_command_starts_from_a_staged_bucket(google, tmp_path):
    """Two processes, nothing but QLOG_ASSETS set, no Hub, no data server."""
    make_model(tmp_path / "here/models/Qwen/Qwen3-0.6B")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "QLOG_"))}
    environment |= google | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "hub"),
    }
    config = "--config=configs/hotpotqa.py:cold,garl,q=0.75"
    to = f"gs://bucket/{tmp_path.name}/assets"
    stage_ = [ROOT / "launch/stage", config, f"--to={to}", f"--config.data.manual_dir={TESTDATA}"]
    laptop = environment | {
        "QLOG_ASSETS": str(tmp_path / "here"),
        "XDG_CACHE_HOME": str(tmp_path / "laptop"),
    }
    printed = run(stage_, laptop)
    assert (
        f"config.weights = 'Qwen/Qwen3-0.6B': {to}/models/Qwen/Qwen3-0.6B (4 of 4 files" in printed
    )
    assert f"config.data.name = 'hotpotqa': {to}/data/hotpotqa-1.0.0" in printed
    assert f"QLOG_ASSETS={to}" in printed and "--config." not in printed
    assert re.findall(r"\((\d+) of", run(stage_, laptop)) == ["0", "0"], (
        "staged again, nothing is copied"
    )

    pod = environment | {"QLOG_ASSETS": to, "XDG_CACHE_HOME": str(tmp_path / "pod")}
    workdir = tmp_path / "run"
    command = [
        sys.executable,
        "launch/local",
        "--processes=2",
        config,
        f"--workdir={workdir}",
        *_BUDGETS,
    ]
    printed = run(command, pod)
    assert "step 1/1" in printed, printed
    assert printed.count("copying") == 3, (
        printed
    )  # shape and tokenizer, weights, data; by one process
    ids = json.loads((workdir / "splits.json").read_text())["splits"]["train"]["ids"]
    assert set(ids) <= {
        r["_id"] for r in json.loads((TESTDATA / "hotpotqa/hotpot_train_v1.1.json").read_text())
    }


def test_a_config_of_several_runs_is_planned_whole():
    config = paper.experiment("cold", dataset="hotpotqa", total_budget=192, max_prompt_tokens=512)
    small = {"model": "Qwen/Qwen3-0.6B", "weights": "random", "tokenizer": {"path": "a/tokenizer"}}
    config.runs = {"one": small, "two": {}, "three": {"data": {"name": "musique"}}}
    wanted = {
        asset.name: asset.is_wanted("model.safetensors") for asset in stage.plan(config, "b/more")
    }
    assert wanted == {
        "models/b/more": True,
        "models/Qwen/Qwen3-0.6B": True,
        "models/a/tokenizer": False,
        "data/hotpotqa-1.0.0": True,
        "data/musique-1.0.0": True,
    }


def test_what_has_no_name_of_its_own_is_told_as_flags(alone, tmp_path, capsys):
    write_spec(tmp_path, byte_level_spec())
    path = tmp_path / "tokenizer.json"
    config = paper.experiment("tiny", dataset="hotpotqa", total_budget=64, max_prompt_tokens=64)
    config.tokenizer.path, config.data.manual_dir = str(path), str(TESTDATA)
    stage.stage(stage.plan(config), str(tmp_path / "to"))
    flag = f"--config.tokenizer.path={tmp_path}/to/tokenizers/tokenizer.json/tokenizer.json"
    assert flag in capsys.readouterr().out
    assert tokenizers.load(flag.partition("=")[2]).digest == tokenizers.load(path).digest


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model=a/b"], "--to is needed"),
        (["--to=x"], "give a --config, a --model"),
        (["--to=ftp://b", "--model=a/b"], "gs://BUCKET"),
        (["--to=x", "--model=./b"], "--model=./b is not a Hub id"),
    ],
)
def test_mistakes_of_stage_are_sentences(flags, message, tmp_path):
    output = run([ROOT / "launch/stage", *flags], os.environ | {"PYTHONPATH": str(ROOT)}, status=2)
    assert message in output and len(output.strip().splitlines()) == 1


# ---- Identity ----


def test_identity_is_of_content_not_of_paths(alone, tmp_path):
    def identity(folder):
        config = paper.experiment(
            "cold", dataset="hotpotqa", total_budget=192, max_prompt_tokens=20000
        )
        config.weights = config.model = str(folder)
        config.data.manual_dir = str(TESTDATA)
        return contents_of(experiment.prepare(config))

    make_model(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = identity(tmp_path / "a")
    assert first == json.loads(json.dumps(first)) == identity(tmp_path / "b")
    assert set(first["examples"]) == {"train", "validation", "test"} and first["weights"]
    tensors = load_file(tmp_path / "b/model.safetensors")
    save_file({k: v + 1e-3 for k, v in tensors.items()}, tmp_path / "b/model.safetensors")
    other = identity(tmp_path / "b")
    assert {part for part in first if first[part] != other[part]} == {"weights"}


# ---- One process per host ----

_PREPARE = """
import sys
from qlog.config import paper, schema
from qlog.experiment import files
from qlog.parallel import distributed

config = paper.experiment("cold", dataset="musique", total_budget=192, max_prompt_tokens=512)
config.data.manual_dir = sys.argv[1]
with distributed.processes("on"):
    print("prepared", files.prepare_data(config))
"""


_OWN = """
import sys
from qlog.config import default
from qlog.experiment import files
from qlog.parallel import distributed

config = default()
config.data.name = "jsonl"
config.data.files = {"train": sys.argv[1]}
with distributed.processes("on"):
    prepared = files.prepare_data(config)
    print("opened", [e.id for e in files.open_source(config, "validation", prepared)])
"""


@pytest.mark.parametrize("broken", [False, True])
def test_one_process_of_a_host_copies_own_files_for_all(broken, google, tmp_path, monkeypatch):
    for name, value in google.items():
        monkeypatch.setenv(name, value)
    bucket = paths.parse(f"gs://bucket/{tmp_path.name}")
    text = "".join(f'{{"id": "i{i}", "source": "s", "answer": {i}}}\n' for i in range(20))
    paths.write(bucket / "a.jsonl", text[:-5] if broken else text)
    (tmp_path / "program.py").write_text(_OWN)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    program = [tmp_path / "program.py", f"{bucket}/*.jsonl"]
    command = [sys.executable, "launch/local", "--processes=2", "--", *program]
    printed = run(command, environment, status=2 if broken else 0)
    assert printed.count("copying") == 1, printed
    assert printed.count("a.jsonl:20 is not JSON" if broken else "opened ['i15', 'i14']") == 2, (
        printed
    )


@pytest.mark.parametrize("broken", [False, True])
def test_one_process_of_a_host_prepares_for_all(broken, tmp_path):
    raw = shutil.copytree(TESTDATA / "musique", tmp_path / "raw")
    if broken:
        (raw / "musique_ans_v1.0_dev.jsonl").write_text("{")
    (tmp_path / "program.py").write_text(_PREPARE)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "launch/local", "--processes=2", "--", tmp_path / "program.py", raw]
    printed = run(command, environment, status=2 if broken else 0)
    assert printed.count("preparing musique from") == 1, printed
    assert (
        printed.count("is damaged or was not downloaded whole" if broken else "] prepared /") == 2
    ), printed
