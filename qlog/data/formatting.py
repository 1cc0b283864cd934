"""The one place where examples become token ids, for training, evaluation and sampling."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qlog.data import fields
from qlog.data.examples import Example, Task
from qlog.data.tokenizers import Tokenizer
from qlog.errors import ConfigError

STYLES = ("warm", "cold")

# What follows the thinking-end token before the answer, as Qwen3 writes it.
SEPARATOR = "\n\n"


class ChatTemplate(NamedTuple):
    """One user turn as (is control token, text) parts around the content."""

    before: tuple[tuple[bool, str], ...]
    after: tuple[tuple[bool, str], ...]


# Chosen by the control token that opens a turn. Qwen3's is equal to its published template.
CHAT_TEMPLATES = {
    "<|im_start|>": ChatTemplate(
        ((True, "<|im_start|>"), (False, "user\n")),
        ((True, "<|im_end|>"), (False, "\n"), (True, "<|im_start|>"), (False, "assistant\n")),
    ),
    "<|start_header_id|>": ChatTemplate(
        (
            (True, "<|start_header_id|>"),
            (False, "user"),
            (True, "<|end_header_id|>"),
            (False, "\n\n"),
        ),
        (
            (True, "<|eot_id|>"),
            (True, "<|start_header_id|>"),
            (False, "assistant"),
            (True, "<|end_header_id|>"),
            (False, "\n\n"),
        ),
    ),
    "<start_of_turn>": ChatTemplate(
        ((True, "<start_of_turn>"), (False, "user\n")),
        ((True, "<end_of_turn>"), (False, "\n"), (True, "<start_of_turn>"), (False, "model\n")),
    ),
}


def compose(tokenizer: Tokenizer, parts: Iterable[tuple[bool, str]]) -> list[int]:
    """Token ids of (is control token, text) parts.

    Raises:
      KeyError: the vocabulary lacks a control token.
    """
    # Plain parts next to each other are encoded as one text, as by a tokenizer that splits a whole
    # prompt at its control tokens: two pieces could become other ids than their concatenation.
    ids: list[int] = []
    text = ""
    for is_control, part in parts:
        if not is_control:
            text += part
            continue
        ids += tokenizer.encode(text) if text else []
        ids.append(tokenizer.control[part])
        text = ""
    return ids + (tokenizer.encode(text) if text else [])


def chat_prompt(tokenizer: Tokenizer, content: str, *, thinking: bool = True) -> list[int]:
    """One user turn in the tokenizer's chat template, up to where the model writes.

    Args:
      thinking: True ends the prompt with the thinking-start token and a newline, so the first
        sampled token belongs to the rationale. False ends it with an empty rationale and the
        separator, so the first sampled token belongs to the answer (Qwen3's
        enable_thinking=False).

    A vocabulary without a known chat template gets the content and a newline instead of a turn.
    """
    template = next(
        (t for opening, t in CHAT_TEMPLATES.items() if opening in tokenizer.control),
        ChatTemplate((), ((False, "\n"),)),
    )
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids += compose(tokenizer, (*template.before, (False, content), *template.after))
    ids.append(tokenizer.think_start_id)
    if thinking:
        return ids + tokenizer.encode("\n")
    return ids + tokenizer.encode("\n\n") + [tokenizer.think_end_id] + tokenizer.encode(SEPARATOR)


class Formatter:
    """Examples of one task as token ids.

    Args:
      tokenizer: vocabulary and control tokens.
      task: gives the description that the warm style opens with.
      style: 'warm', the description, the answer format and the source in the chat template with
        thinking on; or 'cold', the source only, so that the gold answer is very
        unlikely at first.
      closing_text: text that is forced in front of the thinking-end token when a rationale has
        used up its budget; none by default.

    Attributes:
      closing: ids of the closing text and the thinking-end token.

    Raises:
      ConfigError: unknown style.
    """

    def __init__(
        self, tokenizer: Tokenizer, task: Task, style: str = "warm", closing_text: str = ""
    ):
        if style not in STYLES:
            raise ConfigError(
                f"{fields.STYLE} = {style!r} is unknown: use one of {', '.join(STYLES)}."
            )
        self.tokenizer = tokenizer
        self.task = task
        self.style = style
        closing = tokenizer.encode(closing_text) if closing_text else []
        self.closing = (*closing, tokenizer.think_end_id)

    def prompt(self, example: Example) -> list[int]:
        """The prompt's ids; the next token is the first of the rationale."""
        if self.style == "warm":
            return chat_prompt(self.tokenizer, f"{self.task.description}\n\n{example.source}")
        parts = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        parts += self.tokenizer.encode(example.source + "\n")
        return parts + [self.tokenizer.think_start_id] + self.tokenizer.encode("\n")

    def gold(self, example: Example) -> list[int]:
        """What must follow the thinking-end token: separator, gold answer, end of sequence.

        These are the ids after the first in the text "</think>\\n\\nANSWER<|im_end|>", as the model
        would write it.

        Raises:
          ConfigError: the answer is empty.
        """
        answer = example.answer.strip()
        if not answer:
            raise ConfigError(f"example {example.id!r} has an empty gold answer: leave it out.")
        return self.tokenizer.encode(SEPARATOR + answer) + [self.tokenizer.eos_ids[0]]

    def rationale(self, example: Example) -> list[int]:
        """The annotated rationale, ended as the model ends one: newline, thinking-end token.

        An example without annotation has the thinking-end token only.
        """
        text = example.rationale.strip()
        ids = self.tokenizer.encode(text + "\n") if text else []
        return ids + [self.tokenizer.think_end_id]

    def answer_text(self, ids: Sequence[int]) -> str:
        """A sampled answer as text: what comes before the first end of sequence, stripped.

        Other control tokens in it are written by name, so that graders do not take the answer.
        """
        ends = set(self.tokenizer.eos_ids)
        stop = next((i for i, id_ in enumerate(ids) if int(id_) in ends), len(ids))
        return self.tokenizer.decode(ids[:stop], show_control=True).strip()
