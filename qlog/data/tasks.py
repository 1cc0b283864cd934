"""FinQA, HotPotQA and MuSiQue as text: descriptions, sources, annotated rationales.

The paper does not print its prompts; the texts here are our choice. The source puts the context
first and the question last. Only supervised fine-tuning uses the rationales. They lead to the
answer, which follows the thinking-end token.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qlog.data import fields, finqa_program, splits
from qlog.data.examples import Converted, Example, Task
from qlog.errors import ConfigError

Record = Mapping[str, Any]  # one record with the dataset's official field names

FINQA_DESCRIPTION = (
    "Answer the question about a page of a financial report. The page consists of text and a "
    'table, whose cells are separated by " | ". Find the numbers that the question needs, then '
    "calculate step by step.\n"
    "Reply with the answer alone, without words or units around it: a plain number such as 407 or "
    "-2.4, a percentage such as 34.7%, or yes or no."
)
HOTPOTQA_DESCRIPTION = (
    "Answer the question from the paragraphs below. It takes facts from more than one of them; "
    "the other paragraphs do not matter.\n"
    "Reply with the answer alone: a short phrase copied from the paragraphs, or yes or no. Do not "
    "write a sentence or an explanation."
)
MUSIQUE_DESCRIPTION = (
    "Answer the question from the paragraphs below. It takes two to four steps, each of which "
    "uses the result of an earlier one and a fact from another paragraph; most paragraphs do not "
    "matter.\n"
    "Reply with the answer alone: a short phrase copied from the paragraphs. Do not write a "
    "sentence or an explanation."
)


def finqa_example(record: Record) -> Example:
    """A FinQA record -> Example.

    The answer is the annotator's string ("34.7%"), or the executed value where that string is
    empty. The two disagree in about one of twelve records. The official script scores the executed
    value only: it is kept as `official_answer`.
    """
    qa = record["qa"]
    executed = finqa_program.number_text(qa["exe_ans"])
    # Some answers end with a newline that was escaped once too often: the letters "\\n".
    answer = re.sub(r"(\\+n|\s)+$", "", qa["answer"].strip())
    # Text, table, text, as on the page; empty parts are left out below.
    table = "\n".join(" | ".join(map(_line, row)) for row in record["table"])
    parts = [
        _sentences(record["pre_text"]),
        f"Table:\n{table}",
        _sentences(record["post_text"]),
        f"Question: {_line(qa['question'])}",
    ]
    return Example(
        id=record["id"],
        source="\n\n".join(filter(None, parts)),
        answer=answer or executed,
        rationale=_finqa_rationale(record),
        official_answer=executed,
    )


def hotpotqa_example(record: Record) -> Example:
    """A HotPotQA record (distractor setting) -> Example; the sentences carry their own spaces."""
    paragraphs = [(title, "".join(sentences)) for title, sentences in record["context"]]
    _check_context(text for _, text in paragraphs)
    sentences = {title: sentences for title, sentences in record["context"]}
    # The annotated supporting sentences; what points past the end of a paragraph is left out.
    facts = [
        f"{title}: {sentences[title][i].strip()}"
        for title, i in record["supporting_facts"]
        if 0 <= i < len(sentences.get(title, ()))
    ]
    return Example(
        id=record["_id"],
        source=_passage(paragraphs, record["question"]),
        answer=record["answer"].strip(),
        rationale="\n".join(facts),
    )


def musique_example(record: Record) -> Example:
    """A MuSiQue record -> Example; its aliases count as right answers."""
    paragraphs = [(p["title"], p["paragraph_text"]) for p in record["paragraphs"]]
    _check_context(text for _, text in paragraphs)
    answer = record["answer"].strip()
    # Without repetitions, and in the order of the file.
    aliases = dict.fromkeys(alias.strip() for alias in record["answer_aliases"])
    return Example(
        id=record["id"],
        source=_passage(paragraphs, record["question"]),
        answer=answer,
        aliases=tuple(a for a in aliases if a and a != answer),
        rationale=_musique_rationale(record),
    )


TASKS = {
    "finqa": Task("finqa", FINQA_DESCRIPTION, finqa_example),
    "hotpotqa": Task("hotpotqa", HOTPOTQA_DESCRIPTION, hotpotqa_example),
    "musique": Task("musique", MUSIQUE_DESCRIPTION, musique_example),
}


def open_examples(
    name: str,
    split: str,
    *,
    manual_dir: str | None = None,
    data_dir: str | None = None,
    prepared: str | os.PathLike | None = None,
) -> Converted:
    """The examples of one of the paper's splits; each is read when it is asked for.

    Args:
      name: a key of TASKS.
      split: 'train', 'validation' or 'test'; `qlog.data.splits` says how they are chosen.
      manual_dir, data_dir, prepared: as in `qlog.data.splits.open_split`.

    Raises:
      ConfigError: unknown name or split, or records that cannot be read.
    """
    if name not in TASKS:
        raise ConfigError(f"{fields.NAME} = {name!r} is unknown: use one of {', '.join(TASKS)}.")
    records = splits.open_split(
        name, split, manual_dir=manual_dir, data_dir=data_dir, prepared=prepared
    )
    return Converted(records, TASKS[name])


def _line(text: str) -> str:
    return " ".join(text.split())


def _sentences(sentences: Sequence[str]) -> str:
    """Sentences, one per line, without the bare dots that some records are filled with."""
    return "\n".join(_line(s) for s in sentences if any(c.isalnum() for c in s))


def _check_context(texts: Iterable[str]) -> None:
    """Raises ValueError where all paragraphs are empty: the question alone would be trained on."""
    if not any(text.strip() for text in texts):
        raise ValueError("its context is empty")


def _passage(paragraphs: Sequence[tuple[str, str]], question: str) -> str:
    blocks = [
        f"[{i}] {_line(title)}\n{_line(text)}" for i, (title, text) in enumerate(paragraphs, 1)
    ]
    return "\n\n".join([*blocks, f"Question: {_line(question)}"])


def _finqa_rationale(record: Record) -> str:
    """The annotated evidence, then the program with the value of every step."""
    qa = record["qa"]
    evidence = [_line(text) for text in qa["gold_inds"].values()]
    try:
        steps = [
            f"#{i} = {step.text} = {finqa_program.number_text(step.value)}"
            for i, step in enumerate(finqa_program.run(qa["program"], record["table"]))
        ]
    except ValueError:  # a program that breaks the rules; its text still shows the way
        steps = [qa["program"]]
    return "\n".join([*evidence, *steps])


def _musique_rationale(record: Record) -> str:
    """The decomposition, references filled in: "1. [7] Gisvi, place of birth -> Windhoek"."""
    steps = record["question_decomposition"]
    answers = {str(i): step["answer"] for i, step in enumerate(steps, 1)}
    lines = []
    for i, step in enumerate(steps, 1):
        # "#1" in a question stands for the answer of step 1.
        question = re.sub(r"#(\d+)", lambda m: answers.get(m[1], m[0]), step["question"])
        question = _line(question.replace(" >> ", ", "))
        support = step["paragraph_support_idx"]
        # The source numbers paragraphs from 1 in their order, the records from 0.
        place = next(
            (
                f"[{n}] "
                for n, p in enumerate(record["paragraphs"], 1)
                if support is not None and p["idx"] == support
            ),
            "",
        )
        lines.append(f"{i}. {place}{question} -> {step['answer']}")
    return "\n".join(lines)
