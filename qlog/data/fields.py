"""The config fields that errors of this package name. Only catalog.py reads a section of one: other
values come as arguments, and what a user can change about them is written down here, once."""

import difflib
from collections.abc import Iterable

NAME = "config.data.name"
STYLE = "config.data.style"
OVERLONG = "config.data.overlong"
INVALID = "config.data.invalid"
MANUAL_DIR = "config.data.manual_dir"
DATA_DIR = "config.data.data_dir"
WORLD = "config.data.world"
FILES = "config.data.files"
FIELDS = "config.data.fields"
TOKENIZER = "config.tokenizer.path"
THINK_START = "config.tokenizer.think_start"
THINK_END = "config.tokenizer.think_end"
EOS = "config.tokenizer.eos"
CHAT_TEMPLATE = "config.tokenizer.chat_template"
CHAT_TEMPLATE_KWARGS = "config.tokenizer.chat_template_kwargs"


def closest(value: str, choices: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the choice that `value` is close to, '' where there is none."""
    close = difflib.get_close_matches(value, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
