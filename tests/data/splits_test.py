"""The paper's splits: sizes, disjointness, and a draw that depends only on the set of ids."""

import json
import random

import pytest
from places import TESTDATA

from qlog.data import splits
from qlog.errors import ConfigError

OFFICIAL = {
    "finqa": {"train": 6251, "dev": 883, "test": 1147},
    "hotpotqa": {"train": 90447, "dev": 7405},
    "musique": {"train": 19938, "dev": 2417},
}
PAPER = {
    "finqa": (6145, 872, 1132),
    "hotpotqa": (9067, 342, 343),
    "musique": (9985, 579, 445),
}


def made_up_ids(name: str, official: str, count: int) -> list[str]:
    return [f"{name}/{official}/{number:06d}" for number in range(count)]


def drawn_ids(name: str, split: str, counts: dict[str, int], seed: int | None = None) -> list[str]:
    source = splits.official_split(name, split, tuple(counts))
    ids = made_up_ids(name, source, counts[source])
    if seed is not None:
        random.Random(seed).shuffle(ids)
    return [ids[index] for index in splits.choose(name, split, ids, tuple(counts))]


@pytest.mark.parametrize("name", OFFICIAL)
def test_full_data_give_the_papers_sizes_without_overlap(name):
    drawn = {split: drawn_ids(name, split, OFFICIAL[name]) for split in splits.NAMES}
    assert tuple(len(ids) for ids in drawn.values()) == PAPER[name]
    together = sum(drawn.values(), [])
    assert len(set(together)) == sum(PAPER[name])


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_files_order_does_not_matter(name):
    for split in splits.NAMES:
        assert drawn_ids(name, split, OFFICIAL[name], seed=3) == drawn_ids(
            name, split, OFFICIAL[name]
        )


def test_the_draw_is_frozen():
    """These ids must never change: published numbers rest on them. A new rule needs a new name."""
    assert splits.RULE == "qlog-splits-1"
    assert drawn_ids("hotpotqa", "validation", OFFICIAL["hotpotqa"])[:3] == [
        "hotpotqa/dev/004994",
        "hotpotqa/dev/003513",
        "hotpotqa/dev/005328",
    ]
    assert drawn_ids("musique", "test", OFFICIAL["musique"])[-1] == "musique/dev/002165"


def test_the_draw_is_no_prefix_of_the_file():
    """A sample of all parts of the official split, as records are often sorted by kind."""
    ids = drawn_ids("hotpotqa", "train", OFFICIAL["hotpotqa"])
    quarters = [0] * 4
    for id_ in ids:
        quarters[int(id_.rsplit("/")[-1]) * 4 // 90447] += 1
    assert min(quarters) > len(ids) / 4 * 0.9 and max(quarters) < len(ids) / 4 * 1.1


@pytest.mark.parametrize(
    "name, dev, sizes",
    [
        ("finqa", 200, (100, 87, 113)),  # no test file: 200 in proportion 872 : 1132
        ("hotpotqa", 198, (100, 99, 99)),
        ("musique", 100, (100, 57, 43)),
        ("hotpotqa", 684, (100, 342, 342)),
        ("hotpotqa", 685, (100, 342, 343)),
        ("musique", 2, (100, 1, 1)),
        ("finqa", 5000, (100, 872, 1132)),
    ],
)
def test_fewer_records_are_shared_in_proportion(name, dev, sizes):
    counts = {"train": 100, "dev": dev}
    drawn = [drawn_ids(name, split, counts) for split in splits.NAMES]
    assert tuple(map(len, drawn)) == sizes
    assert not set(drawn[1]) & set(drawn[2])


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(ConfigError, match="data.name = 'squad' has no splits: use one of finqa"):
        splits.official_split("squad", "train", ("train",))
    with pytest.raises(ConfigError, match="split 'dev' is unknown: use one of train, validation"):
        splits.official_split("finqa", "dev", ("train", "dev"))
    with pytest.raises(ConfigError, match="the test split comes from the official test or dev"):
        splits.official_split("finqa", "test", ("train",))
    with pytest.raises(ConfigError, match="has 1 records, too few for validation and test"):
        splits.choose("musique", "test", ["only"], ("train", "dev"))


def test_opened_splits_are_records_of_the_official_files(tmp_path):
    opened = {
        split: splits.open_split("hotpotqa", split, manual_dir=TESTDATA, data_dir=tmp_path)
        for split in splits.NAMES
    }
    assert [len(split) for split in opened.values()] == [16, 6, 6]
    assert opened["test"].official == "dev"
    for split in opened.values():
        assert [record["_id"] for record in split] == list(split.ids)
        assert split[1:3] == [split[1], split[2]] and split[-1] == list(split)[-1]
    assert not set(opened["validation"].ids) & set(opened["test"].ids)


def test_ids_are_written_and_then_checked(tmp_path):
    def opened(*names):
        folders = dict(manual_dir=manual_dir, data_dir=tmp_path / "data")
        return {name: splits.open_split("finqa", name, **folders) for name in names}

    manual_dir, path = TESTDATA, tmp_path / "splits.json"
    splits.write_ids(path, "finqa", opened("train", "validation"))
    splits.write_ids(path, "finqa", opened("test", "train"))  # adds one, agrees on the other
    content = json.loads(path.read_text())
    assert content["rule"] == "qlog-splits-1" and content["dataset"] == "finqa"
    assert {k: len(v["ids"]) for k, v in content["splits"].items()} == {
        "train": 16,
        "validation": 12,
        "test": 6,
    }
    assert content["splits"]["test"]["paper_size"] == 1132

    manual_dir = tmp_path / "finqa"
    manual_dir.mkdir()
    records = json.loads((TESTDATA / "finqa" / "train.json").read_text())
    (manual_dir / "train.json").write_text(json.dumps(records[:-1]))
    with pytest.raises(ConfigError, match="other ids for the train split.*16 and 15"):
        splits.write_ids(path, "finqa", opened("train"))
    path.write_text(path.read_text()[:100])
    with pytest.raises(ConfigError, match="splits.json is damaged"):
        splits.write_ids(path, "finqa", opened("train"))


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("finqa", (100, 87, 113)),
        ("hotpotqa", (100, 99, 99)),
        ("musique", (100, 57, 43)),
    ],
)
def test_real_records_make_all_three_splits(name, sizes, shared, tmp_path):
    opened = [
        splits.open_split(name, split, manual_dir=shared / "data" / name, data_dir=tmp_path)
        for split in splits.NAMES
    ]
    assert tuple(map(len, opened)) == sizes
    assert not set(opened[1].ids) & set(opened[2].ids)
