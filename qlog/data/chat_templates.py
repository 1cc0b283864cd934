"""Chat templates: how a model wants one user turn to be written.

A model's own template is a Jinja text in its folder (`ChatTemplate`). It is code from the internet,
so it runs in a sandbox (template_sandbox.py), with the names that transformers' apply_chat_template
gives it, and renders the same text. A vocabulary without one gets a turn of `BUILT_IN`.
"""

import pathlib
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import jinja2
import jinja2.nodes

from qlog.data import fields
from qlog.data.template_sandbox import BUDGET, ENVIRONMENT
from qlog.errors import ConfigError, summary

# The value of config.tokenizer.chat_template that asks for BUILT_IN.
BUILT_IN_NAME = "builtin"
# Variables that belong to qlog: users change them by other fields, or not at all.
_RESERVED = ("messages", "add_generation_prompt", "enable_thinking", "thinking")


class Turn(NamedTuple):
    """One user turn as (is control token, text) parts around the content.

    Attributes:
      before: parts in front of the content.
      after: parts behind it, up to where the model writes.
    """

    before: tuple[tuple[bool, str], ...]
    after: tuple[tuple[bool, str], ...]


# Chosen by the control token that opens a turn. Qwen3's is equal to its published template.
BUILT_IN = {
    "<|im_start|>": Turn(
        ((True, "<|im_start|>"), (False, "user\n")),
        ((True, "<|im_end|>"), (False, "\n"), (True, "<|im_start|>"), (False, "assistant\n")),
    ),
    "<|start_header_id|>": Turn(
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
    "<start_of_turn>": Turn(
        ((True, "<start_of_turn>"), (False, "user\n")),
        ((True, "<end_of_turn>"), (False, "\n"), (True, "<start_of_turn>"), (False, "model\n")),
    ),
}
# Of a vocabulary without one of these tokens: the content and a newline.
NO_TURN = Turn((), ((False, "\n"),))


def opening(control: Container[str]) -> str | None:
    """The key in BUILT_IN that is among a vocabulary's control tokens; None without one."""
    return next((token for token in BUILT_IN if token in control), None)


class ChatTemplate:
    """A Jinja chat template and the variables that it is rendered with.

    Attributes:
      source: the template's text.
      path: the file that it came from.
      is_given: whether config.tokenizer.chat_template named the file; else it is the model's own.
      variables: special tokens ({"bos_token": "<bos>"}) and the user's chat_template_kwargs.
    """

    def __init__(
        self,
        source: str,
        path: pathlib.Path,
        *,
        special_tokens: Mapping[str, str],
        arguments: Mapping[str, Any],
        is_given: bool = False,
    ):
        """Keeps what is given; nothing is compiled before `check` or `render` is called.

        Args:
          special_tokens: names and texts of special tokens, as tokenizer_config.json has them.
          arguments: the section config.tokenizer.chat_template_kwargs.
        """
        self.source = source
        self.path = path
        self.is_given = is_given
        self.variables = {**special_tokens, **arguments}
        self._arguments = dict(arguments)
        self._compiled: jinja2.Template | None = None

    def check(self) -> None:
        """Compiles the template and looks whether it reads each of the user's variables.

        Raises:
          ConfigError: it is not Jinja, or a variable is read by nothing or belongs to qlog.
        """
        # Jinja passes over variables that it does not need: a misspelt one would change nothing.
        for name in self._arguments:
            field = f"{fields.CHAT_TEMPLATE_KWARGS}.{name} = {self._arguments[name]!r}"
            if name in _RESERVED:
                raise ConfigError(f"{field} is a variable that qlog sets itself: remove it.")
            read = self._names()
            if name not in read:
                hint = fields.closest(name, read)
                raise ConfigError(
                    f"{field} is not read by the chat template {self.path}{hint}: remove it, or "
                    f"name one of its variables ({', '.join(sorted(read))})."
                )
        self._template()

    def render(self, content: str, *, thinking: bool) -> str:
        """The text of one user turn, up to where the model writes.

        Args:
          content: the user's text.
          thinking: what the template sees as `enable_thinking` (Qwen3, SmolLM3) and `thinking`
            (DeepSeek V3.1, Granite).

        Raises:
          ConfigError: the template raises.
        """
        template = self._template()
        # tools and documents are None, not undefined: some templates ask which of the two it is.
        variables = {
            "tools": None,
            "documents": None,
            **self.variables,
            "messages": [{"role": "user", "content": content}],
            "add_generation_prompt": True,
            "enable_thinking": thinking,
            "thinking": thinking,
        }
        try:
            BUDGET.begin(len(content))
            text = template.render(variables)
            # Half of a surrogate pair is no character. In the user's text it is not the template's.
            text.replace(content, "").encode()
            return text
        except Exception as error:  # a template is a program: it may fail in any way
            if name := self._culprit(variables, len(content)):
                raise ConfigError(
                    f"{fields.CHAT_TEMPLATE_KWARGS}.{name} = {self._arguments[name]!r} makes the "
                    f"chat template {self.path} fail ({type(error).__name__}: {summary(error)}): "
                    "give another value (text, where it is a number), or remove it."
                ) from error
            raise self._fault(error) from error

    def _culprit(self, variables: Mapping[str, Any], length: int) -> str | None:
        """The user's variable without which the template renders; None if there is none."""
        for name in self._arguments:
            try:
                BUDGET.begin(length)
                self._template().render({k: v for k, v in variables.items() if k != name})
            except Exception:  # it fails without this one, too
                continue
            return name
        return None

    def _template(self) -> jinja2.Template:
        if self._compiled is None:
            try:
                self._compiled = ENVIRONMENT.from_string(self.source)
            except Exception as error:  # Jinja's TemplateSyntaxError, or Python's RecursionError
                raise self._fault(error) from error
        return self._compiled

    def _names(self) -> set[str]:
        """All names that the template reads; those that it has set itself are among them."""
        try:
            tree = ENVIRONMENT.parse(self.source)
        except Exception as error:
            raise self._fault(error) from error
        return {name.name for name in tree.find_all(jinja2.nodes.Name) if name.ctx == "load"}

    def _fault(self, error: Exception) -> ConfigError:
        line = getattr(error, "lineno", None)  # of a syntax error
        where = f"{self.path}, line {line}" if line else f"{self.path}"
        return ConfigError(
            f"the chat template {where} cannot be rendered ({type(error).__name__}: "
            f"{summary(error)}): set {fields.CHAT_TEMPLATE} to the path of another .jinja file, or "
            f"to {BUILT_IN_NAME!r}."
        )
