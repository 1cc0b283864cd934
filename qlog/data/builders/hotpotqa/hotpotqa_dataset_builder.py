"""HotPotQA, distractor setting: two-hop questions over ten paragraphs (Yang et al., EMNLP 2018)."""

from qlog.data.builders import base
from qlog.data.builders.raw import RawFile

_URL = "http://curtis.ml.cmu.edu/datasets/hotpot"


class Builder(base.RecordBuilder):
    """HotPotQA's train and dev files; the distractor setting has no test file with answers."""

    FILES = {
        "train": RawFile(
            "hotpot_train_v1.1.json",
            f"{_URL}/hotpot_train_v1.1.json",
            size=90447,
            sha256="26650cf50234ef5fb2e664ed70bbecdfd87815e6bffc257e068efea5cf7cd316",
        ),
        "dev": RawFile(
            "hotpot_dev_distractor_v1.json",
            f"{_URL}/hotpot_dev_distractor_v1.json",
            size=7405,
            sha256="4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
        ),
    }
    KEY = "_id"
    FIELDS = {
        "_id": base.TEXT,
        "question": base.TEXT,
        "answer": base.TEXT,
        "type": base.TEXT,
        "level": base.TEXT,
        "supporting_facts": base.JSONS,  # each [title, sentence's index]
        "context": base.JSONS,  # each [title, [sentence]]
    }
