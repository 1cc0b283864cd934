"""From tokens to text."""

from typing import NamedTuple

from qlog import data
from qlog.records import Rollouts


class RolloutText(NamedTuple):
    """A rollout as text; the thinking-end token is in neither part."""

    rationale: str
    answer: str  # '' where the rollout stopped at the thinking end


def rollout_texts(formatter: data.Formatter, rollouts: Rollouts, index: int) -> list[RolloutText]:
    """The texts of one prompt's M rollouts.

    Args:
      rollouts: on the host, numpy arrays [b, M, ...] as from `batch_placement.local_batch`.
      index: which of the b prompts.
    """
    texts = []
    for tokens, end, length in zip(
        rollouts.tokens[index],
        rollouts.rationale_lengths[index],
        rollouts.lengths[index],
        strict=True,
    ):
        rationale = formatter.tokenizer.decode(tokens[: end - 1].tolist(), show_control=True)
        texts.append(RolloutText(rationale, formatter.answer_text(tokens[end:length].tolist())))
    return texts
