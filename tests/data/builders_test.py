"""The TFDS builders: records come back whole, are prepared once, and are never stale."""

import concurrent.futures
import functools
import hashlib
import http.server
import io
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import threading
import tracemalloc
import zipfile

import grain
import numpy as np
import pytest
from places import TESTDATA

from qlog.data import builders, finqa_program
from qlog.data.builders import raw
from qlog.data.builders.finqa import finqa_dataset_builder
from qlog.data.builders.musique import musique_dataset_builder
from qlog.errors import ConfigError, PassingError
from qlog.storage import assets

FILES = {
    ("finqa", "train"): "finqa/train.json",
    ("finqa", "dev"): "finqa/dev.json",
    ("hotpotqa", "train"): "hotpotqa/hotpot_train_v1.1.json",
    ("hotpotqa", "dev"): "hotpotqa/hotpot_dev_distractor_v1.json",
    ("musique", "train"): "musique/musique_ans_v1.0_train.jsonl",
    ("musique", "dev"): "musique/musique_ans_v1.0_dev.jsonl",
}


def official_records(path: pathlib.Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def prepared_in(data_dir: pathlib.Path) -> list[pathlib.Path]:
    """What is there besides downloads and locks: a temporary folder would be, too."""
    return [p for p in data_dir.iterdir() if p.name != "downloads" and p.suffix != ".lock"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture()
def manual_dir(tmp_path):
    """A copy of the dummy FinQA that a test may change."""
    return pathlib.Path(shutil.copytree(TESTDATA / "finqa", tmp_path / "manual"))


# ---- Records ----


@pytest.mark.parametrize("name, split", FILES)
def test_records_are_the_raw_records(name, split, data_dir):
    records = builders.open_records(name, split, manual_dir=TESTDATA / name, data_dir=data_dir)
    expected = official_records(TESTDATA / FILES[name, split])
    assert list(records) == expected
    key = "_id" if name == "hotpotqa" else "id"
    assert records.ids == [record[key] for record in expected]
    assert "tensorflow" not in sys.modules


def test_executed_answers_keep_their_two_types(data_dir):
    records = builders.open_records("finqa", "train", manual_dir=TESTDATA, data_dir=data_dir)
    assert {type(record["qa"]["exe_ans"]) for record in records} == {float, str}


def test_random_access(data_dir):
    records = builders.open_records("musique", "dev", manual_dir=TESTDATA, data_dir=data_dir)
    everything = list(records)
    assert records[-1] == everything[-1] and records[np.int64(3)] == everything[3]
    assert records[2:9:3] == everything[2:9:3]
    for index in (len(records), -len(records) - 1):
        with pytest.raises(IndexError):
            records[index]
    copy = pickle.loads(pickle.dumps(records))
    assert list(copy) == everything and copy.ids == records.ids
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(records.__getitem__, range(len(records)))) == everything


def test_grain_reads_them_in_threads(data_dir):
    records = builders.open_records("finqa", "train", manual_dir=TESTDATA, data_dir=data_dir)
    order = grain.MapDataset.source(records).seed(3).shuffle().map(lambda record: record["id"])
    ids = list(order.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)))
    assert ids == [order[i] for i in range(16)] and ids != records.ids
    assert sorted(ids) == sorted(records.ids)


def test_preparing_is_one_line_on_stderr(tmp_path, capfd):
    """TFDS's bars are for terminals, and nothing is downloaded here."""
    builders.prepare("musique", manual_dir=TESTDATA / "musique", data_dir=tmp_path)
    captured = capfd.readouterr()
    manual = TESTDATA / "musique"
    assert captured.err == f"qlog: preparing musique from {manual}, once, in {tmp_path}\n"
    assert not captured.out
    builders.prepare("musique", manual_dir=manual, data_dir=tmp_path)
    assert capfd.readouterr() == ("", "")


def test_tfds_reads_what_was_prepared(data_dir):
    import tensorflow_datasets as tfds

    builders.open_records("hotpotqa", "dev", manual_dir=TESTDATA, data_dir=data_dir)
    (folder,) = data_dir.glob("hotpotqa-*/hotpotqa/1.0.0")
    builder = tfds.builder_from_directory(folder)
    assert builder.info.splits["dev"].num_examples == 12
    assert "Yang" in builder.info.citation and "distractor" in builder.info.description
    assert (
        builder.as_data_source("dev")[0]["question"].decode()
        == official_records(TESTDATA / FILES["hotpotqa", "dev"])[0]["question"]
    )


def test_the_builder_works_as_tfds_users_call_it(tmp_path):
    import tensorflow_datasets as tfds

    builder = finqa_dataset_builder.Builder(data_dir=tmp_path, file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=TESTDATA / "finqa")
    builder.download_and_prepare(download_config=config)
    assert len(tfds.data_source("finqa", split="test", data_dir=tmp_path)) == 6


# ---- Preparing ----


def test_prepares_once_and_again_for_changed_files(manual_dir, tmp_path):
    data_dir = tmp_path / "data"

    def first_question():
        records = builders.open_records("finqa", "dev", manual_dir=manual_dir, data_dir=data_dir)
        return records[0]["qa"]["question"]

    before = first_question()
    (prepared,) = data_dir.glob("finqa-*")
    written = prepared.stat().st_mtime_ns
    assert first_question() == before
    assert [p.stat().st_mtime_ns for p in data_dir.glob("finqa-*")] == [written]

    # Another content of the same size and time, as rsync or tar would leave it.
    path = manual_dir / "dev.json"
    stat = path.stat()
    path.write_text(path.read_text().replace("what", "WHAT"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = builders.open_records("finqa", "dev", manual_dir=manual_dir, data_dir=data_dir)
    assert list(changed) == official_records(path) and path.stat().st_size == stat.st_size


def test_processes_may_prepare_at_the_same_time(tmp_path):
    code = (
        "from qlog.data import builders; import sys;"
        f"r = builders.open_records('musique', 'train', manual_dir={str(TESTDATA)!r}, "
        f"data_dir={str(tmp_path)!r}); print(len(r), r[15]['id'])"
    )
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    expected = official_records(TESTDATA / FILES["musique", "train"])
    assert {out for out, _ in outputs} == {f"16 {expected[15]['id']}\n"}
    assert len(prepared_in(tmp_path)) == 1


def test_a_failed_preparation_leaves_nothing_behind(manual_dir, tmp_path):
    data_dir = tmp_path / "data"
    path = manual_dir / "train.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="train.json cannot be read.*damaged"):
        builders.open_records("finqa", "dev", manual_dir=manual_dir, data_dir=data_dir)
    assert not prepared_in(data_dir)
    path.write_text(whole)
    records = builders.open_records("finqa", "dev", manual_dir=manual_dir, data_dir=data_dir)
    assert len(records) == 12


def test_a_damaged_preparation_is_named(manual_dir, tmp_path):
    data_dir = tmp_path / "data"
    builders.open_records("finqa", "dev", manual_dir=manual_dir, data_dir=data_dir)
    for shard in data_dir.glob("finqa-*/finqa/1.0.0/*dev.array_record*"):
        shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ConfigError, match="is damaged.*delete that folder"):
        builders.open_records("finqa", "dev", manual_dir=manual_dir, data_dir=data_dir)


def test_the_full_set_in_the_place_of_the_answerable_one_is_named(tmp_path):
    names = [pathlib.Path(FILES["musique", split]).name for split in ("train", "dev")]
    for name in names:
        records = official_records(TESTDATA / "musique" / name)
        full = [each for r in records for each in (r, {**r, "answerable": False})]
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in full))
    with pytest.raises(
        ConfigError, match="record 1 is not one of musique: .* this is MuSiQue-Full"
    ):
        builders.prepare("musique", manual_dir=tmp_path, data_dir=tmp_path / "data")
    for name in names:
        (tmp_path / name).rename(tmp_path / name.replace("ans", "full"))
    with pytest.raises(
        ConfigError, match="holds none of .*musique_full_v1.0_.* is of the full set"
    ):
        builders.prepare("musique", manual_dir=tmp_path, data_dir=tmp_path / "data")


def test_the_datasets_own_folder_goes_before_others(manual_dir, tmp_path):
    """A folder of several datasets; SQuAD's files, too, are called train.json and dev.json."""
    together = tmp_path / "together"
    (together / "finqa").mkdir(parents=True)
    for split in ("train", "dev"):
        (together / f"{split}.json").write_text('{"data": []}')
        shutil.copy(manual_dir / f"{split}.json", together / "finqa")
    shutil.copy(manual_dir / "test.json", together)  # each file is looked for by itself
    for split in ("train", "dev", "test"):
        opened = builders.open_records("finqa", split, manual_dir=together, data_dir=tmp_path / "d")
        assert list(opened) == official_records(manual_dir / f"{split}.json")


def test_what_a_killed_preparation_left_is_removed(manual_dir, tmp_path):
    """Killed for real, while it writes; another process's folder stays."""
    data_dir = tmp_path / "data"
    code = (
        "from qlog.data import builders; from qlog.data.builders import raw; import os, signal;"
        "read = raw.read\n"
        "def killed(path, member=''):\n"
        "    yield next(read(path, member)); os.kill(os.getpid(), signal.SIGKILL)\n"
        "raw.read = killed\n"
        f"builders.prepare('finqa', manual_dir={str(manual_dir)!r}, data_dir={str(data_dir)!r})"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    (left,) = prepared_in(data_dir)
    assert left.name.startswith(".finqa-1.0.0-")
    name = left.name.split(f"-{assets._host()}-")[0]
    others = [
        f"{name}-{assets._host()}-{os.getpid()}-x",  # of a process that runs
        f"{name}-elsewhere-1-x",  # of another host, a moment ago
        ".hotpotqa-1.0.0-official-elsewhere-1-x",
    ]
    for other in others:
        (data_dir / other).mkdir()
    folder = builders.prepare("finqa", manual_dir=manual_dir, data_dir=data_dir)
    assert sorted(p.name for p in prepared_in(data_dir)) == sorted([folder.name, *others])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("dev.json", b"\xef\xbb\xbf", ""),  # a mark in front
        ("dev.json", "utf-16", "dev.json is UTF-16 and not UTF-8: save it as UTF-8"),
        ("dev.json", b"version https://git-lfs.github.com/spec/v1\n", "dev.json is a pointer of G"),
        ("dev.json", b"[" * 100_000, "dev.json cannot be read after record 0 .RecursionError"),
        ("dev.json", b'[{"id": ' + b"1" * 6000 + b"}]", "dev.json cannot be read after record 0"),
        ("dev.json.gz", b"x", r"lacks dev.json \(dev.json.gz is there: unpack it\)"),
        ("dev.json", None, r"lacks dev.json \(dev.json is a link to .*nowhere, which is not there"),
    ],
)
def test_raw_files_in_odd_states(name, content, message, manual_dir, tmp_path):
    original = (manual_dir / "dev.json").read_bytes()
    (manual_dir / "dev.json").unlink()
    if content is None:
        (manual_dir / name).symlink_to(tmp_path / "nowhere")
    elif content == "utf-16":
        (manual_dir / name).write_bytes(original.decode().encode("utf-16"))
    else:
        whole = content if message else content + original
        (manual_dir / name).write_bytes(whole)
    open_dev = lambda: builders.open_records(
        "finqa", "dev", manual_dir=manual_dir, data_dir=tmp_path / "data"
    )
    if not message:
        assert list(open_dev()) == json.loads(original)
        return
    with pytest.raises(ConfigError, match=message):
        open_dev()


ARRAYS = ["[]", "[1]", " [ 1 , 2 ]\n", '[{"a": "]"}, {"b": [1, [2]]}, "x,y", 12, -1.5e3, null]']
NO_ARRAYS = ["[", "[1", "[1,", "[1,]", "[,1]", "[1 2]", "[1]]", "[1] x", '[{"a": 1]', "[1}", "[{]"]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("text", [*ARRAYS, *NO_ARRAYS, '{"a": 1}', "", "{"])
def test_an_array_is_read_piece_by_piece(text, block, monkeypatch):
    """As the whole at once would be, wherever the pieces end."""
    monkeypatch.setattr(raw, "_BLOCK", block)
    try:
        whole = json.loads(text)
        expected = whole if isinstance(whole, list) else [whole]
    except ValueError:
        with pytest.raises(ValueError):
            list(raw._array(io.StringIO(text)))
    else:
        assert list(raw._array(io.StringIO(text))) == expected


def test_a_large_array_is_never_whole_in_memory(tmp_path):
    record = json.dumps({"text": "x" * 1000, "more": list(range(50))})
    path = tmp_path / "a.json"
    path.write_text("[" + ",\n".join([record] * 30_000) + "]")  # 36 MB
    tracemalloc.start()
    assert sum(1 for _ in raw.read(path)) == 30_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 3


def test_a_prepared_folder_runs_no_code(manual_dir, tmp_path, monkeypatch):
    """TFDS would import what features.json names; ours are the features of the builder."""
    data_dir, payload = tmp_path / "data", tmp_path / "payload"
    builders.open_records("finqa", "dev", manual_dir=manual_dir, data_dir=data_dir)
    payload.mkdir()
    (payload / "strangers_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(str(payload))
    (features,) = data_dir.glob("finqa-*/finqa/1.0.0/features.json")
    old = '"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text"'
    new = '"pythonClassName": "strangers_module.Feature"'
    features.write_text(features.read_text().replace(old, new))
    records = builders.open_records("finqa", "dev", manual_dir=manual_dir, data_dir=data_dir)
    assert list(records) == official_records(manual_dir / "dev.json")
    assert not (tmp_path / "ran").exists() and "strangers_module" not in sys.modules


@pytest.mark.parametrize("place", ["/etc/{DATASET}-{SPLIT}", "../../../other/{DATASET}-{SPLIT}"])
def test_a_prepared_folder_names_no_file_outside(place, manual_dir, tmp_path):
    data_dir = tmp_path / "data"
    builders.open_records("finqa", "dev", manual_dir=manual_dir, data_dir=data_dir)
    (info,) = data_dir.glob("finqa-*/finqa/1.0.0/dataset_info.json")
    text = info.read_text().replace("{DATASET}-{SPLIT}", place)
    info.write_text(text)
    with pytest.raises(ConfigError, match="is damaged .*dataset_info.json names .*not in it"):
        builders.open_records("finqa", "dev", manual_dir=manual_dir, data_dir=data_dir)


def test_a_prepared_folder_may_be_made_of_links(manual_dir, tmp_path):
    data_dir = tmp_path / "data"
    builders.open_records("finqa", "dev", manual_dir=manual_dir, data_dir=data_dir)
    (prepared,) = data_dir.glob("finqa-*/finqa/1.0.0")
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(prepared.iterdir())):
        blob = tmp_path / "blobs" / str(number)
        file.rename(blob)
        file.symlink_to(blob)
    records = builders.open_records("finqa", "dev", manual_dir=manual_dir, data_dir=data_dir)
    assert list(records) == official_records(manual_dir / "dev.json")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r[3].pop("table"), "record 3 is not one of finqa: the field 'table' is missing"),
        (lambda r: r[0]["qa"].pop("program"), "record 0 .*'qa/program' is missing"),
        (lambda r: r[1].update(qa=None), "record 1 .*'qa/question' is missing"),
        (lambda r: r[2]["qa"].update(answer=7), "record 2 .*'qa/answer' is of type int"),
        (lambda r: r[2]["pre_text"].append(None), "record 2 .*'pre_text' holds None.*not text"),
        (lambda r: r[2]["table"][0].append("\ud800"), "record 2 .*'table' holds half a character"),
        (lambda r: r[5].update(id=r[4]["id"]), "two records have the id 'HM/"),
        (lambda r: r.insert(1, "x"), "record 1 is not a JSON object but str"),
        (lambda r: r.clear(), "dev.json holds no records"),
    ],
)
def test_records_that_are_none_are_named(change, message, manual_dir, tmp_path):
    path = manual_dir / "dev.json"
    records = official_records(path)
    change(records)
    path.write_text(json.dumps(records))
    with pytest.raises(ConfigError, match=message):
        builders.open_records("finqa", "dev", manual_dir=manual_dir, data_dir=tmp_path / "data")


def test_fields_that_the_schema_does_not_know_survive(manual_dir, tmp_path):
    path = manual_dir / "dev.json"
    records = official_records(path)
    records[0]["note"] = {"nested": [1, None, "é"]}
    records[0]["qa"]["checked"] = True
    path.write_text(json.dumps(records))
    data_dir = tmp_path / "data"
    opened = builders.open_records("finqa", "dev", manual_dir=manual_dir, data_dir=data_dir)
    assert opened[0] == records[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(name="squad", split="train"), "data.name = 'squad' has no builder: use one of finqa"),
        (dict(name="hotpotqa", split="test"), "no labelled official split 'test'.*train, dev"),
        (dict(name="finqa", split="dev", manual_dir="/no/such"), "dir = '/no/such' is not a"),
        (
            dict(name="musique", split="dev", manual_dir=TESTDATA / "finqa"),
            "none of musique's files",
        ),
        (
            dict(name="finqa", split="dev", manual_dir=TESTDATA, data_dir="gs://b"),
            "data_dir.*remote",
        ),
        (dict(name="finqa", split="dev", manual_dir="ftp://b/x"), "gs://BUCKET"),
        (
            dict(name="finqa", split="dev", manual_dir=TESTDATA, data_dir=__file__),
            "data_dir.*written",
        ),
    ],
)
def test_settings_that_cannot_work(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        builders.open_records(**{"data_dir": tmp_path, **arguments})


def test_a_missing_split_of_a_manual_download(manual_dir, tmp_path):
    (manual_dir / "test.json").unlink()
    assert builders.official_splits("finqa", manual_dir) == ("train", "dev")
    with pytest.raises(ConfigError, match="has no test.json, the test split of finqa"):
        builders.open_records("finqa", "test", manual_dir=manual_dir, data_dir=tmp_path / "data")


# ---- Downloads, from a server of our own ----


@pytest.fixture()
def server(tmp_path):
    """(folder, address): what is put into the folder is served."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def serve_finqa(server, monkeypatch, **changes) -> None:
    """The dummy FinQA as an official download, its digests and sizes published."""
    folder, address = server
    files = {}
    for split in ("train", "dev", "test"):
        content = (TESTDATA / "finqa" / f"{split}.json").read_bytes()
        (folder / f"{split}.json").write_bytes(content)
        published = dict(size=len(json.loads(content)), git_blob=git_blob(content))
        if split == "dev":
            published |= changes
        files[split] = raw.RawFile(f"{split}.json", f"{address}/{split}.json", **published)
    monkeypatch.setattr(finqa_dataset_builder.Builder, "FILES", files)


def test_downloads_once_and_then_needs_no_network(server, monkeypatch, tmp_path):
    serve_finqa(server, monkeypatch)
    data_dir = tmp_path / "data"
    records = builders.open_records("finqa", "dev", data_dir=data_dir)
    assert list(records) == official_records(TESTDATA / FILES["finqa", "dev"])
    shutil.rmtree(server[0])
    assert len(builders.open_records("finqa", "test", data_dir=data_dir)) == 6


def test_downloads_are_checked(server, monkeypatch, tmp_path):
    data_dir = tmp_path / "data"
    for wrong in (dict(git_blob="0" * 40), dict(git_blob="", sha256="0" * 64)):
        serve_finqa(server, monkeypatch, **wrong)
        with pytest.raises(ConfigError, match="dev.json served another file.*config.data.manual"):
            builders.open_records("finqa", "train", data_dir=data_dir)
    serve_finqa(server, monkeypatch, size=883)
    with pytest.raises(ConfigError, match="holds 12 records of dev.json, but the official .* 883"):
        builders.open_records("finqa", "train", data_dir=data_dir)
    # A refused download is not kept: with the right file, the next attempt succeeds.
    serve_finqa(server, monkeypatch)
    assert len(builders.open_records("finqa", "train", data_dir=data_dir)) == 16


def test_a_page_in_the_place_of_a_file_is_a_fault_that_passes(server, monkeypatch, tmp_path):
    serve_finqa(server, monkeypatch)
    (server[0] / "dev.json").write_text("<!DOCTYPE html><html>Quota exceeded</html>")
    with pytest.raises(PassingError, match="dev.json served a page instead of the file.*wait, or"):
        builders.open_records("finqa", "train", data_dir=tmp_path / "data")


def test_downloads_from_an_archive(server, monkeypatch, tmp_path):
    folder, address = server
    with zipfile.ZipFile(folder / "musique.zip", "w") as archive:
        for split in ("train", "dev"):
            name = pathlib.Path(FILES["musique", split]).name
            archive.write(TESTDATA / "musique" / name, f"data/{name}")
    sizes = {"train": 16, "dev": 12}
    files = {
        split: raw.RawFile(file.name, f"{address}/musique.zip", sizes[split], member=file.member)
        for split, file in musique_dataset_builder.Builder.FILES.items()
    }
    monkeypatch.setattr(musique_dataset_builder.Builder, "FILES", files)
    records = builders.open_records("musique", "dev", data_dir=tmp_path / "data")
    assert list(records) == official_records(TESTDATA / FILES["musique", "dev"])


def test_without_a_network_one_sentence_says_what_to_do(server, monkeypatch, tmp_path):
    serve_finqa(server, monkeypatch)
    (server[0] / "dev.json").unlink()  # 404
    with pytest.raises(ConfigError, match="'finqa' cannot be downloaded.*config.data.manual_dir"):
        builders.open_records("finqa", "dev", data_dir=tmp_path / "data")
    unreachable = raw.RawFile("dev.json", "http://127.0.0.1:9/dev.json", size=1)
    monkeypatch.setattr(finqa_dataset_builder.Builder, "FILES", {"dev": unreachable})
    with pytest.raises(PassingError) as caught:
        builders.open_records("finqa", "dev", data_dir=tmp_path / "data")
    url = "http://127.0.0.1:9/dev.json"
    for part in ("data.name = 'finqa'", url, "put dev.json", "set config.data.manual_dir"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_official_downloads_are_the_published_ones():
    files = finqa_dataset_builder.Builder.FILES
    assert [file.size for file in files.values()] == [6251, 883, 1147]
    assert all(len(file.git_blob) == 40 for file in files.values())
    assert "0f16e2867befa6840783e58be38c9efb9229d742/dataset/dev.json" in files["dev"].url
    members = [file.member for file in musique_dataset_builder.Builder.FILES.values()]
    assert members == ["data/musique_ans_v1.0_train.jsonl", "data/musique_ans_v1.0_dev.jsonl"]


# ---- Real records ----


@pytest.mark.parametrize("name, split", FILES)
def test_real_records_pass_through_whole(name, split, shared, data_dir):
    folder = shared / "data"
    records = builders.open_records(name, split, manual_dir=folder / name, data_dir=data_dir)
    assert list(records) == official_records(folder / FILES[name, split])


def test_real_gold_programs_execute_to_their_answers(shared, data_dir):
    manual_dir = shared / "data" / "finqa"
    for split in ("train", "dev"):
        records = builders.open_records("finqa", split, manual_dir=manual_dir, data_dir=data_dir)
        for record in records:
            value = finqa_program.run(record["qa"]["program"], record["table"])[-1].value
            value = value if isinstance(value, str) else round(value, 5)
            assert value == record["qa"]["exe_ans"], record["id"]
