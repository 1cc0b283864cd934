"""From tokens to text."""

from qlog import data
from qlog.records import Rollouts


def rollout_texts(formatter: data.Formatter, rollouts: Rollouts, row: int) -> list[tuple[str, str]]:
    """(rationale, answer) texts of a prompt's rollouts; `rollouts` on the host."""
    texts = []
    for tokens, end, length in zip(
        rollouts.tokens[row], rollouts.rationale_lengths[row], rollouts.lengths[row]
    ):
        rationale = formatter.tokenizer.decode(tokens[: end - 1].tolist(), show_control=True)
        texts.append((rationale, formatter.answer_text(tokens[end:length].tolist())))
    return texts
