"""Gold answers that no answer of the model could match."""

from collections.abc import Sequence
from typing import NamedTuple

from qlog.data import Dataset, Formatter
from qlog.grading import graders
from qlog.grading.scorers import Sample, Scorer

_LOOKED_AT = 2000  # gold answers: a second or so


class Unreachable(NamedTuple):
    """Gold answers whose own tokens a grader does not take."""

    number: int
    looked_at: int  # gold answers, from the first one on
    grader: str  # the first of the graders that refused one
    example_id: str  # the first such example's
    gold: str  # as the dataset has it
    spelt: str  # what its tokens spell


def unreachable(
    dataset: Dataset, formatter: Formatter, scorers: Sequence[Scorer]
) -> Unreachable | None:
    """Counts gold answers that cannot be right, however good the model is; None if there are none.

    The tokens of a gold answer are turned into text and graded as a sampled answer is. A vocabulary
    that lacks a letter, or a normalizer that drops accents, shows here. Only graders by name are
    asked: a function of the user's may call a server, and may want to see a rationale.
    """
    named = [scorer for scorer in scorers if scorer.function in graders.GRADERS.values()]
    number, first = 0, None
    size = min(len(dataset), _LOOKED_AT)
    for index in range(size if named else 0):
        example = dataset[index]
        spelt = formatter.answer_text(formatter.gold(example))
        golds = (example.answer, *example.aliases)
        sample = Sample("", "", spelt, golds, example.source, example)
        refused = next((scorer.name for scorer in named if scorer(sample) < 1), None)
        if refused is not None:
            number += 1
            first = first or (refused, example.id, example.answer, spelt)
    return Unreachable(number, size, *first) if first else None
