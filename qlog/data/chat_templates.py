"""Chat templates: how a model wants one user turn to be written.

A model's own template is a Jinja text in its folder (`ChatTemplate`). It is code from the internet,
so it runs in Jinja's sandbox, with the names that transformers' apply_chat_template gives it, and
renders the same text. A vocabulary without one gets a turn of `BUILT_IN`.
"""

import datetime
import json
import pathlib
import threading
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from qlog.data import fields
from qlog.errors import ConfigError, summary

# The value of config.tokenizer.chat_template that asks for BUILT_IN.
BUILT_IN_NAME = "builtin"
# What every template sees as today. The true date would change prompts from day to day, so that a
# run that resumes tomorrow would train on other prompts. This one is the default of Llama 3's own
# template; users set another one by the template's own variable (Llama 3: date_string).
TODAY = datetime.datetime(2024, 7, 26)
_MOST_STEPS = 100_000  # bodies of loops and macros, in one prompt
_MOST_BITS = 10_000  # of a number
_MOST_CHARACTERS = 10**8  # of a text that is repeated, or items of a list
_STEP = "_qlog_step"  # what templates know `_STEPS` by; the names that they read begin otherwise
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
            _STEPS.reset()
            text = template.render(variables)
            # Half of a surrogate pair is no character. In the user's text it is not the template's.
            text.replace(content, "").encode()
            return text
        except Exception as error:  # a template is a program: it may fail in any way
            if name := self._culprit(variables):
                raise ConfigError(
                    f"{fields.CHAT_TEMPLATE_KWARGS}.{name} = {self._arguments[name]!r} makes the "
                    f"chat template {self.path} fail ({type(error).__name__}: {summary(error)}): "
                    "give another value (text, where it is a number), or remove it."
                ) from error
            raise self._fault(error) from error

    def _culprit(self, variables: Mapping[str, Any]) -> str | None:
        """The user's variable without which the template renders; None if there is none."""
        for name in self._arguments:
            try:
                _STEPS.reset()
                self._template().render({k: v for k, v in variables.items() if k != name})
            except Exception:  # it fails without this one, too
                continue
            return name
        return None

    def _template(self) -> jinja2.Template:
        if self._compiled is None:
            try:
                self._compiled = _ENVIRONMENT.from_string(self.source)
            except Exception as error:  # Jinja's TemplateSyntaxError, or Python's RecursionError
                raise self._fault(error) from error
        return self._compiled

    def _names(self) -> set[str]:
        """All names that the template reads; those that it has set itself are among them."""
        try:
            tree = _ENVIRONMENT.parse(self.source)
        except Exception as error:
            raise self._fault(error) from error
        names = {name.name for name in tree.find_all(jinja2.nodes.Name) if name.ctx == "load"}
        return names - {_STEP}

    def _fault(self, error: Exception) -> ConfigError:
        line = getattr(error, "lineno", None)  # of a syntax error
        where = f"{self.path}, line {line}" if line else f"{self.path}"
        return ConfigError(
            f"the chat template {where} cannot be rendered ({type(error).__name__}: "
            f"{summary(error)}): set {fields.CHAT_TEMPLATE} to the path of another .jinja file, or "
            f"to {BUILT_IN_NAME!r}."
        )


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks text for loss masks; here it is plain text."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, as in transformers: what is set inside does not reach the outside.
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace`; its names must not begin with an underscore, a way out of sandboxes."""

    def __init__(*args: Any, **given: Any):
        self, *rest = args  # so that a template may name a variable `self`
        attributes = dict(*rest, **given)
        for name in attributes:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: str) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the name {name!r} begins with an underscore")


def _plain(value: Any) -> Any:
    """What a template prints, if it is text, a number, undefined, or a list or dict of these.

    Any other object prints a memory address, or is in an order of its own in each process.
    """
    if isinstance(value, dict):
        _plain([*value.keys(), *value.values()])
    elif isinstance(value, (list, tuple)):
        for each in value:
            _plain(each)
    elif value is not None and not isinstance(value, (str, int, float, jinja2.Undefined)):
        raise jinja2.TemplateRuntimeError(f"it prints a {type(value).__name__}, which is no text")
    return value


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return TODAY.strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter writes <, > and & as escapes, for HTML pages."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with an end: a template that loops, recurses or grows too far is an error.

    Work is counted, not timed, so that a template that renders does so on every machine. Each body
    of a loop and of a macro begins with a call of `_step`.
    """

    # What one operation can make too large: 9 ** (9 ** 9) alone runs for hours.
    intercepted_binops = frozenset(["*", "**"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock)):
            call = jinja2.nodes.Call(jinja2.nodes.Name(_STEP, "load"), [], [], None, None)
            node.body.insert(0, jinja2.nodes.ExprStmt(call, lineno=node.lineno))
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            times = abs(right) if operator == "**" else 1
            is_large = left.bit_length() * times + right.bit_length() > _MOST_BITS
        else:  # a text or a list, repeated
            sizes = [abs(x) if isinstance(x, int) else len(x) for x in (left, right) if _sized(x)]
            is_large = len(sizes) == 2 and sizes[0] * sizes[1] > _MOST_CHARACTERS
        if is_large:
            raise jinja2.exceptions.SecurityError(f"{operator} makes more than a prompt can hold")
        return super().call_binop(context, operator, left, right)


def _sized(value: Any) -> bool:
    return isinstance(value, (int, str, list, tuple))


class _Steps:
    """How many bodies of loops and macros a template may still begin, in this thread."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def reset(self) -> None:
        self._of_thread.left = _MOST_STEPS

    def __call__(self) -> None:
        self._of_thread.left -= 1
        if self._of_thread.left < 0:
            raise jinja2.exceptions.SecurityError(
                f"its loops and macros do not end within {_MOST_STEPS:,} steps"
            )


def _environment() -> _Environment:
    """Jinja as transformers sets it up: templates are written for exactly these settings."""
    # Immutable: a template cannot change the lists and dicts that it is given. The sandbox refuses
    # attributes that begin with an underscore, by which Python objects lead out of it.
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
        finalize=_plain,
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    environment.globals[_STEP] = _STEPS
    return environment


_STEPS = _Steps()
_ENVIRONMENT = _environment()
