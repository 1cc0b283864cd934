"""MuSiQue-Answerable: two- to four-hop questions, twenty paragraphs (Trivedi et al., TACL 2022)."""

from collections.abc import Mapping
from typing import Any

from qlog.data.builders import base
from qlog.data.builders.raw import RawFile

# musique_v1.0.zip. This address answers with the file itself; the usual one first asks to confirm
# that large files are not scanned for viruses. No checksum is published: the sizes are checked.
_URL = (
    "https://drive.usercontent.google.com/download"
    "?id=1tGdADlNjWFaHLeZZGShh2IRcpO6Lv24h&export=download&confirm=t"
)


class Builder(base.RecordBuilder):
    """MuSiQue-Answerable's train and dev files; the test file has no answers."""

    FILES = {
        split: RawFile(
            f"musique_ans_v1.0_{split}.jsonl",
            _URL,
            size=size,
            member=f"data/musique_ans_v1.0_{split}.jsonl",
        )
        for split, size in (("train", 19938), ("dev", 2417))
    }
    FIELDS = {
        "id": base.TEXT,
        "question": base.TEXT,
        "answer": base.TEXT,
        "answer_aliases": base.TEXTS,
        "answerable": base.FLAG,
        "paragraphs": base.JSONS,  # each {idx, title, paragraph_text, is_supporting}
        "question_decomposition": base.JSONS,  # each {id, question, answer, paragraph_support_idx}
    }

    @staticmethod
    def check(record: Mapping[str, Any]) -> None:
        # The full set has each question twice, once with paragraphs that do not answer it.
        if record["answerable"] is False:
            raise TypeError(
                "it has no answer ('answerable' is false), so this is MuSiQue-Full and not "
                "MuSiQue-Answerable (musique_ans_v1.0_*.jsonl)"
            )
