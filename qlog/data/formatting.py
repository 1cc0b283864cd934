"""The one place where examples become token ids, for training, evaluation and sampling."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence

from qlog.data import chat_templates, fields
from qlog.data.chat_templates import ChatTemplate
from qlog.data.examples import Example, Task
from qlog.data.invalid import InvalidRecord
from qlog.data.tokenizers import Tokenizer
from qlog.errors import ConfigError

STYLES = ("warm", "cold")

# What follows the thinking-end token before the answer, as Qwen3 writes it.
SEPARATOR = "\n\n"
# Characters to which Unicode gives no meaning: in the basic plane, and in the two last planes.
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
# What a chat template is tried with before a run begins: long, in lines, with what HTML escapes.
_PROBE = "\n\n".join(f"{i}. <b>How</b> many are {i} & 'two'?" for i in range(100))
# Stands for the content where only the text around it is wanted.
_STAND_IN = "\U0010fffd"


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

    The text in `content` never becomes a control token. The ids are otherwise those of
    transformers' apply_chat_template with add_generation_prompt, and then what opens or closes the
    rationale, unless the template has written it. A vocabulary without a known chat template gets
    the content and a newline instead of a turn.

    Args:
      content: what the user says, any text.
      thinking: True ends the prompt with the thinking-start token and a newline, so the first
        sampled token belongs to the rationale. False ends it in the template's own way of not
        thinking or, where it has none, with an empty rationale and the separator, so the first
        sampled token belongs to the answer (Qwen3's enable_thinking=False).

    Raises:
      ConfigError: the model's own template raises, leaves out, changes or repeats the content, or
        writes another thing than an open rationale behind it although thinking is on.
    """
    # ---- The turn ----
    start = tokenizer.token(tokenizer.think_start_id)
    end = tokenizer.token(tokenizer.think_end_id)
    template = tokenizer.chat_template
    if template is None:
        parts = _built_in(tokenizer, content)
    else:
        parts = _rendered(tokenizer, template, content, thinking=True)
        if not thinking:
            own = _rendered(tokenizer, template, content, thinking=False)
            # A template that writes the same in both cases knows no way of not thinking.
            if own != parts and _last(own) != (True, start):
                return compose(tokenizer, own)
            parts = own
        elif _last(parts) == (True, end):
            raise ConfigError(
                f"the chat template {template.path} closes the rationale although thinking is on: "
                f"set {fields.CHAT_TEMPLATE_KWARGS} so that it does not, or {fields.CHAT_TEMPLATE} "
                f"to {chat_templates.BUILT_IN_NAME!r}."
            )
        elif _last(parts) == (True, start) and _last(parts[: _at_last(parts)]) == (True, start):
            raise ConfigError(
                f"the chat template {template.path} opens the rationale twice: set "
                f"{fields.CHAT_TEMPLATE} to the path of another .jinja file, or to "
                f"{chat_templates.BUILT_IN_NAME!r}."
            )
    # ---- The rationale: opened, or opened and closed ----
    # DeepSeek-R1's template opens it itself. GLM's writes no newline behind the token; then none is
    # added, since the model has learned to write what follows.
    is_open = _last(parts) == (True, start)
    if thinking:
        return compose(tokenizer, parts if is_open else [*parts, (True, start), (False, "\n")])
    if is_open and parts[-1] != (True, start):
        parts.pop()  # the newline that the template has written behind it
    opening = [] if is_open else [(True, start)]
    return compose(tokenizer, [*parts, *opening, (False, "\n\n"), (True, end), (False, SEPARATOR)])


def _built_in(tokenizer: Tokenizer, content: str) -> list[tuple[bool, str]]:
    """The parts of a turn in one of qlog's own templates, and the token that opens every text."""
    opening = chat_templates.opening(tokenizer.control)
    turn = chat_templates.BUILT_IN[opening] if opening else chat_templates.NO_TURN
    bos = [] if tokenizer.bos_id is None else [(True, tokenizer.token(tokenizer.bos_id))]
    return [*bos, *turn.before, (False, content), *turn.after]


def _rendered(
    tokenizer: Tokenizer, template: ChatTemplate, content: str, *, thinking: bool
) -> list[tuple[bool, str]]:
    """The parts of a turn in the model's own template.

    In the rendered text, control tokens that the template wrote and the same names in the user's
    text look alike. So the latter are disguised before the template sees them: their first
    character is replaced by one of Unicode's private use, which occurs nowhere else. Everything
    else that the template does with the content (trim, length, startswith) sees the true text.
    """
    content, disguise = _disguised(tokenizer, content, template)
    text = template.render(content, thinking=thinking)
    if not _holds_once(template, text, content, thinking=thinking):
        raise ConfigError(
            f"the chat template {template.path} does not write the user's text exactly once and "
            f"unchanged: set {fields.CHAT_TEMPLATE} to the path of another .jinja file, or to "
            f"{chat_templates.BUILT_IN_NAME!r}."
        )
    # What lies between two control tokens of the template is plain, and is encoded as such.
    parts: list[tuple[bool, str]] = []
    plain_from = 0
    for span in tokenizer.control_spans(text):
        if not disguise.keys().isdisjoint(map(ord, text[span.start : span.stop])):
            continue  # a normalizer has dropped the private character: it is the user's text still
        if span.start > plain_from:
            parts.append((False, text[plain_from : span.start].translate(disguise)))
        parts.append((True, span.name))
        plain_from = span.stop
    if plain_from < len(text):
        parts.append((False, text[plain_from:].translate(disguise)))
    return parts


def _holds_once(template: ChatTemplate, text: str, content: str, *, thinking: bool) -> bool:
    """Whether a rendered text has the content once, whole; spaces around it may be trimmed."""
    stripped = content.strip()
    if text.count(stripped) == 1:
        return True
    # A short content ("user") may stand in the template's own words, too. Then the text must be
    # the one around a stand-in, with the content in its place.
    around = template.render(_STAND_IN, thinking=thinking)
    written = (content, stripped, content.lstrip(), content.rstrip())
    return around.count(_STAND_IN) == 1 and any(
        text == around.replace(_STAND_IN, each) for each in written
    )


def _disguised(
    tokenizer: Tokenizer, content: str, template: ChatTemplate
) -> tuple[str, dict[int, str]]:
    """The content without control-token names, and what turns its private characters back."""
    used = {*map(ord, content), *map(ord, template.source), *map(ord, str(template.variables))}
    private = (code for code in itertools.chain(*_PRIVATE_USE) if code not in used)
    codes: dict[str, int] = {}  # {a first character: the private one in its place}
    # Again until none is left: without its first character, a name may show another one behind it.
    while True:
        letters = list(content)
        for span in tokenizer.control_spans(content):
            # The place may begin with spaces that the token would take with it.
            at = next(i for i in range(span.start, span.stop) if not content[i].isspace())
            if ord(content[at]) not in codes.values():
                letters[at] = chr(codes.setdefault(content[at], next(private)))
        changed = "".join(letters)
        if changed == content:
            return content, {code: letter for letter, code in codes.items()}
        content = changed


def _last(parts: Sequence[tuple[bool, str]]) -> tuple[bool, str] | None:
    """The last part that is more than spaces and newlines."""
    at = _at_last(parts)
    return None if at is None else parts[at]


def _at_last(parts: Sequence[tuple[bool, str]]) -> int | None:
    """Where that part is; None where all are spaces and newlines."""
    return next(
        (i for i in reversed(range(len(parts))) if parts[i][0] or parts[i][1].strip()), None
    )


def _check_template(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """Refuses a template that cannot be rendered, or that changes what the user says.

    Raises:
      ConfigError: as described.
    """
    template.check()
    chat_prompt(tokenizer, _PROBE)


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
      ConfigError: unknown style, or a chat template that cannot be used.
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
        if style == "warm" and tokenizer.chat_template is not None:
            _check_template(tokenizer, tokenizer.chat_template)
        closing = tokenizer.encode(closing_text) if closing_text else []
        self.closing = (*closing, tokenizer.think_end_id)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of what turns text into ids: tokenizer, and template where used."""
        if self._template is None:
            return self.tokenizer.digest
        # Only the warm style reads a template: other runs keep the digest of their tokenizer.
        parts = [self.tokenizer.digest, self._template.source, self._template.variables]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def template_name(self) -> str:
        """Which chat template prompts are written in, for people."""
        if self.style == "cold":
            return "none (style 'cold')"
        if self._template is not None:
            whose = "given" if self._template.is_given else "the model's own"
            return f"{self._template.path} ({whose})"
        opening = chat_templates.opening(self.tokenizer.control)
        return f"built-in, {opening}" if opening else "built-in, the text and a newline"

    @property
    def _template(self) -> ChatTemplate | None:
        return self.tokenizer.chat_template if self.style == "warm" else None

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
            where = f"example {example.id!r}"
            raise InvalidRecord(
                f"{where} has an empty gold answer: leave it out, or set {fields.INVALID} to "
                "'skip'.",
                where,
            )
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
