"""FinQA, HotPotQA and MuSiQue as the Hugging Face Hub has them -> their official records.

Layouts differ in names and nesting. A list of objects may also be an object of lists, which is how
the library `datasets` stores a Sequence of objects. What is read here, and where it was seen:

    hotpotqa  hotpotqa/hotpot_qa, distractor (its features are in the catalogue of TFDS)
              id; context {title, sentences}; supporting_facts {title, sent_id}
    musique   bdsaglam/musique, answerable; dgslibisey/MuSiQue (code that reads them)
              the official names
    finqa     wujian123/finqa (code that reads it)
              the official names, qa nested
              rootsautomation/FinQA (its card)
              qa flattened; exe_ans is text, gold_inds JSON text
              ibm-research/finqa (its script)
              qa flattened; the program is called program_re; gold_inds a list; no exe_ans
              dreamerdeo/finqa (its script)
              qa flattened; the list of gold_inds is called gold_evidence; no exe_ans

`final_result` and `final_res` of the last two are what the annotator wrote for the last step, and
not the executed value that the official script scores. So the program is executed: its value is
`exe_ans`. A record without both is refused.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlog.data import fields, finqa_program, record_files
from qlog.data.invalid import InvalidRecord, Skipped
from qlog.data.parquet_values import Binary, Unconverted
from qlog.data.record_files import RecordFiles
from qlog.errors import summary
from qlog.storage import strict_json

Record = Mapping[str, Any]


class HubRecords(Sequence[dict[str, Any]]):
    """Records of the Hub with the official field names; each is read when it is asked for.

    Args:
      name: 'finqa', 'hotpotqa' or 'musique'.
      records: the files' records, in any of the layouts above.
      skip_invalid: whether records that cannot be used are left out and counted.

    Attributes:
      ids: the records' ids.
      skipped: the records that were left out.

    Raises:
      ConfigError: a record in another layout, or two with the same id.
    """

    def __init__(self, name: str, records: RecordFiles, skip_invalid: bool = False):
        self._name, self._records = name, records
        self.skipped = Skipped()
        key = "_id" if name == "hotpotqa" else "id"
        found = record_files.usable(
            records,
            lambda index: self._official(index)[key],
            self.skipped if skip_invalid else None,
        )
        self._indices = found.indices
        self.ids: Sequence[str] = found.ids

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index):
        return self._official(self._indices[index])

    def _official(self, index: int) -> dict[str, Any]:
        """Record `index` of the files, with the official names."""
        record = self._records[index]
        try:
            return OFFICIAL[self._name](record)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else summary(error)
            raise InvalidRecord(
                f"{self._records.where(index)} is not a record of {self._name} in a layout of the "
                f"Hub that qlog knows ({what}): the layouts are listed in qlog/data/README.md; "
                f"other ones are read with {fields.NAME} = 'jsonl' or 'parquet'."
            ) from error


def hotpotqa_record(record: Record) -> dict[str, Any]:
    """A HotPotQA record -> the official names."""
    return {
        **record,
        "_id": _nonempty(record.get("_id") or record["id"], "id"),
        "question": _nonempty(record["question"], "question"),
        "answer": _nonempty(record["answer"], "answer"),
        "context": _context(record["context"]),
        "supporting_facts": _pairs(record["supporting_facts"], "title", "sent_id"),
    }


def musique_record(record: Record) -> dict[str, Any]:
    """A MuSiQue record -> the official names."""
    # The full release has each question twice, once with paragraphs that do not answer it.
    if record.get("answerable") is False:
        raise ValueError("it is not answerable: use the configuration 'answerable'")
    return {
        **record,
        "id": _nonempty(record["id"], "id"),
        "question": _nonempty(record["question"], "question"),
        "answer": _nonempty(record["answer"], "answer"),
        "answer_aliases": _texts(record["answer_aliases"], "answer_aliases"),
        "paragraphs": _paragraphs(record["paragraphs"]),
        "question_decomposition": _objects(record["question_decomposition"]),
    }


def finqa_record(record: Record) -> dict[str, Any]:
    """A FinQA record -> the official names, and what the official example is made of."""
    qa = record.get("qa", record)
    table = _table(record["table"])
    # rootsautomation/FinQA has both, and program_re is the nested form. Where it stands alone it is
    # the program under another name.
    program = qa.get("program") or qa["program_re"]
    return {
        "id": _nonempty(record["id"], "id"),
        "pre_text": _texts(record["pre_text"], "pre_text"),
        "post_text": _texts(record["post_text"], "post_text"),
        "table": table,
        "qa": {
            "question": _nonempty(qa["question"], "question"),
            # May be empty where the annotator wrote none: the executed value is what is scored.
            "answer": _text(qa["answer"], "answer"),
            "program": _nonempty(program, "program"),
            "exe_ans": _executed(qa.get("exe_ans"), program, table),
            "gold_inds": _evidence(qa["gold_inds"] if "gold_inds" in qa else qa["gold_evidence"]),
        },
    }


OFFICIAL: dict[str, Callable[[Record], dict[str, Any]]] = {
    "finqa": finqa_record,
    "hotpotqa": hotpotqa_record,
    "musique": musique_record,
}


def _text(value: Any, name: str) -> str:
    if isinstance(value, Binary):
        return value.text()
    if isinstance(value, Unconverted):
        raise TypeError(f"its {name} {value.wrong}")
    if not isinstance(value, str):
        raise TypeError(f"its {name} is {value!r}, which is not text")
    return value


def _nonempty(value: Any, name: str) -> str:
    text = _text(value, name)
    if not text.strip():
        raise ValueError(f"its {name} is empty")
    return text


def _list(value: Any, name: str) -> list[Any]:
    """A list, or its JSON. Any other text would be taken for a list of its letters."""
    if isinstance(value, str):
        try:
            value = strict_json.loads(_text(value, name))
        except ValueError:
            pass  # the sentence below shows the text
    if not isinstance(value, list | tuple):
        raise TypeError(f"its {name} is {value!r:.60}, which is not a list")
    return list(value)


def _texts(value: Any, name: str) -> list[str]:
    return [_text(each, f"{name}.{index}") for index, each in enumerate(_list(value, name))]


def _table(value: Any) -> list[list[str]]:
    """Rows of cells; numbers are cells, too."""
    rows = [_list(row, f"table.{index}") for index, row in enumerate(_list(value, "table"))]
    for cell in (cell for row in rows for cell in row):
        if isinstance(cell, bool) or not isinstance(cell, str | int | float):
            raise TypeError(f"a cell of its table is {cell!r:.60}, which is not text")
    return [[str(cell) for cell in row] for row in rows]


def _context(value: Any) -> list[list[Any]]:
    """The paragraphs of HotPotQA: pairs of a title and sentences."""
    pairs = _pairs(value, "title", "sentences")
    if not pairs:
        raise ValueError("its context is empty")
    return [[_text(title, "title"), _texts(lines, "sentences")] for title, lines in pairs]


def _paragraphs(value: Any) -> list[dict[str, Any]]:
    """The paragraphs of MuSiQue."""
    found = _objects(value)
    if not found:
        raise ValueError("its paragraphs are empty")
    for each in found:
        _text(each["title"], "title")
        _text(each["paragraph_text"], "paragraph_text")
    return found


def _objects(value: Any) -> list[dict[str, Any]]:
    """A list of objects, which may be stored as an object of lists."""
    if not isinstance(value, Mapping):
        return [dict(each) for each in _list(value, "list of objects")]
    # {"title": [a, b], "idx": [0, 1]} -> [{"title": a, "idx": 0}, {"title": b, "idx": 1}]
    columns = [value[key] for key in value]
    if not all(isinstance(column, list) for column in columns):
        raise TypeError(f"a list or an object of lists is wanted, not {value!r}")
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _pairs(value: Any, first: str, second: str) -> list[list[Any]]:
    """Objects with two fields as the official pairs; pairs stay as they are."""
    if isinstance(value, list) and all(isinstance(pair, list) for pair in value):
        if any(len(pair) != 2 for pair in value):
            raise ValueError(f"it has no pairs of {first} and {second}, but {value!r:.60}")
        return value
    return [[each[first], each[second]] for each in _objects(value)]


def _executed(value: Any, program: str, table: Sequence[Sequence[str]]) -> float | str:
    """The executed value of a FinQA record: a number, 'yes' or 'no'."""
    if value is None or value == "":
        # The official script's own rule; it raises where the program breaks it.
        value = finqa_program.run(program, table)[-1].value
        return value if isinstance(value, str) else round(value, 5)
    if value in ("yes", "no"):
        return value
    if isinstance(value, bool):  # float(True) is 1.0
        raise TypeError(f"its exe_ans is {value!r}, which is neither a number nor yes or no")
    number = float(value)  # numbers and words in one column are text in Parquet
    if not math.isfinite(number):
        raise ValueError(f"its exe_ans is {value!r}")
    return number


def _evidence(value: Any) -> dict[str, str]:
    """The annotated evidence by its place; lists of it have lost the places."""
    if isinstance(value, str):
        value = strict_json.loads(value)
    if not isinstance(value, Mapping):
        value = {str(index): text for index, text in enumerate(_list(value, "gold_inds"))}
    # In Parquet an object has the keys of all records: those of other records are null. Their order
    # is that of the column, so the lines of a rationale may stand in another order.
    return {
        place: _text(text, f"gold_inds.{place}")
        for place, text in value.items()
        if text is not None
    }
