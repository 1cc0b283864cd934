"""A tokenizer from a file or a folder, with the small files next to it."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from qlog.data import fields
from qlog.data.chat_templates import BUILT_IN_NAME, ChatTemplate
from qlog.data.tokenizers import companions, json_file
from qlog.data.tokenizers.interface import Tokenizer
from qlog.data.tokenizers.sentence_piece import SentencePieceTokenizer
from qlog.errors import ConfigError
from qlog.storage import assets, git_lfs, paths


def load(
    path: str | pathlib.Path,
    *,
    think_start: str = "<think>",
    think_end: str = "</think>",
    eos: Sequence[str] = (),
    chat_template: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """Reads a tokenizer from a file, or from a folder that holds one.

    The files next to it count, too: tokenizer_config.json and special_tokens_map.json (special
    tokens), generation_config.json (ends of answers) and the chat template, which is looked for in
    chat_template.jinja, then tokenizer_config.json, then chat_template.json.

    Args:
      path: `tokenizer.json`, a SentencePiece `*.model`, or a folder with either. Of both the JSON
        file is read, as transformers does.
      think_start, think_end: the control tokens around a rationale. In a vocabulary without such
        tokens name two unused ones (Gemma "<unused0>", T5 "<extra_id_0>").
      eos: control tokens that end an answer, the one that closes gold answers first; () takes those
        of the known families.
      chat_template: the path of a .jinja file, 'builtin' for `chat_templates.BUILT_IN`, or '' for
        the model's own and, where it has none, the built-in one.
      chat_template_kwargs: variables for the chat template besides those of the tokenizer.

    Raises:
      ConfigError: nothing to read at `path`, a file that is not a tokenizer, no such control token,
        or Qwen's control tokens at other ids than Qwen's.
    """
    path = paths.expanded(path)
    if paths.is_folder(path):
        found = [path / "tokenizer.json"] if paths.is_file(path / "tokenizer.json") else []
        found += sorted(path.glob("*.model"))
        if not found:
            hint = assets.why_missing(path / "tokenizer.json")
            raise ConfigError(
                f"{fields.TOKENIZER} = {path} holds neither tokenizer.json nor a "
                f"SentencePiece *.model{hint}: copy one of them from the model's folder."
            )
        path = found[0]
    if not paths.is_file(path):
        raise ConfigError(
            f"{fields.TOKENIZER} = {path} does not exist{assets.why_missing(path)}: give a folder "
            "or a file with tokenizer.json or a SentencePiece *.model."
        )
    if git_lfs.is_pointer_file(path):
        raise ConfigError(f"{fields.TOKENIZER} = {path} {git_lfs.SENTENCE}.")
    files = companions.read(path.parent, with_template=not chat_template)
    read = SentencePieceTokenizer if path.suffix == ".model" else json_file.read
    tokenizer = read(path, think_start=think_start, think_end=think_end, eos=eos, files=files)
    # ---- The chat template: a given file, or the model's own ----
    is_given = chat_template not in ("", BUILT_IN_NAME)
    source, template_file = files.template, files.template_file
    if is_given:
        template_file = paths.expanded(chat_template)
        source = companions.read_template(template_file)
    if source is not None and template_file is not None:
        # Without a file that names the special tokens, a template gets those that are known.
        named = files.special_tokens
        tokenizer.chat_template = ChatTemplate(
            source,
            template_file,
            special_tokens=tokenizer.special_tokens if named is None else named,
            arguments=chat_template_kwargs or {},
            is_given=is_given,
        )
    elif chat_template_kwargs:
        name = next(iter(chat_template_kwargs))
        raise ConfigError(
            f"{fields.CHAT_TEMPLATE_KWARGS}.{name} = {chat_template_kwargs[name]!r} is read by "
            f"nothing, since {path} is used with a built-in chat template: remove it, or set "
            f"{fields.CHAT_TEMPLATE} to the path of a .jinja file."
        )
    return tokenizer
