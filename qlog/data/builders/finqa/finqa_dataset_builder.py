"""FinQA: numerical questions about pages of financial reports (Chen et al., EMNLP 2021)."""

from qlog.data.builders import base
from qlog.data.builders.raw import RawFile

_COMMIT = "0f16e2867befa6840783e58be38c9efb9229d742"
_URL = f"https://raw.githubusercontent.com/czyssrs/FinQA/{_COMMIT}/dataset"


class Builder(base.RecordBuilder):
    """FinQA's train, dev and test files; private_test.json has no answers and is left out."""

    FILES = {
        "train": RawFile(
            "train.json",
            f"{_URL}/train.json",
            size=6251,
            git_blob="a6c2c5a60f9abe3fba5a793cc4d9e1dee2e09209",
        ),
        "dev": RawFile(
            "dev.json",
            f"{_URL}/dev.json",
            size=883,
            git_blob="970f239f591c782b17df420c0d343b780737f3da",
        ),
        "test": RawFile(
            "test.json",
            f"{_URL}/test.json",
            size=1147,
            git_blob="59958c7c3bb3b21f4dff6bc912a0fe0ae710aee0",
        ),
    }
    FIELDS = {
        "id": base.TEXT,
        "pre_text": base.TEXTS,
        "post_text": base.TEXTS,
        "table": base.JSONS,  # each row a list of cells
        "qa/question": base.TEXT,
        "qa/answer": base.TEXT,
        "qa/program": base.TEXT,
        "qa/exe_ans": base.JSON,  # a number, or "yes" or "no"
        "qa/steps": base.JSONS,
        "qa/gold_inds": base.JSON,
    }
