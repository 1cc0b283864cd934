"""Tokenizers behind one interface: Hugging Face `tokenizer.json`, SentencePiece, word level.

Text and control tokens never mix here. `encode` maps text to plain pieces only: a context that
contains "</think>" or "<|im_end|>" cannot end a rationale or a turn, because the encoder is built
without the control tokens. Code that needs one takes its id from `control`.

The libraries do not offer this: their encoders look for control tokens in the text. So both classes
take the control tokens out of the tokenizer's file before the library reads it.
"""

import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import sentencepiece
import tokenizers as hf_tokenizers

from qlog.data import fields, tokenizer_files
from qlog.data.chat_templates import BUILT_IN_NAME, ChatTemplate
from qlog.data.tokenizer_files import TokenizerFiles
from qlog.errors import ConfigError
from qlog.storage import assets, git_lfs, paths, strict_json

# The names of these tokens in the known families. The end of a turn goes before the end of a text:
# the first one present closes gold answers, and a chat model ends its answers with its turn.
_EOS_NAMES = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
    "<｜end▁of▁sentence｜>",  # DeepSeek's names have fullwidth bars
)
_PAD_NAMES = ("<|endoftext|>", "<|finetune_right_pad_id|>", "<pad>")
_BOS_NAMES = ("<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>")
_QWEN_IDS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<think>": 151667,
    "</think>": 151668,
}
_QWEN_RANKS = 151643  # the size of Qwen's vocabulary without control tokens, by which it is known
_NO_FILES = TokenizerFiles()


class Span(NamedTuple):
    """A place in a text where a tokenizer that knows its control tokens would find one.

    Attributes:
      start: index of the first character.
      stop: index after the last one. Spaces around the name that the token takes with it belong to
        the place.
      name: the control token.
    """

    start: int
    stop: int
    name: str


class Tokenizer:
    """Text to token ids and back; a subclass encodes and decodes plain text.

    Attributes:
      vocab_size: the largest id + 1 (Qwen3: 151,669). The model's embedding may have more rows,
        which are padding.
      control: names and ids of all control tokens ("</think>": 151668, ...).
      eos_ids: ids that end an answer; the first one closes each gold answer. They are those that
        config.tokenizer.eos names (without it, the names of the known families), then eos_token of
        tokenizer_config.json, then eos_token_id of generation_config.json.
      pad_id: fills the padding of batches. It may be one of `eos_ids`, so masks come from lengths
        and never from this id.
      bos_id: the first token of each prompt that no chat template of the model writes; None for
        families without one.
      think_start_id: the token before a rationale.
      think_end_id: the token after it.
      path: the file that this tokenizer was read from; None if it was made in memory.
      chat_template: how the model wants a user turn to be written; None: `chat_templates.BUILT_IN`.
    """

    def __init__(
        self,
        control: Mapping[str, int],
        vocab_size: int,
        *,
        eos_names: Sequence[str],
        think_start: str,
        think_end: str,
        path: pathlib.Path | None = None,
        eos: Sequence[str] = (),
        files: TokenizerFiles = _NO_FILES,
    ):
        """Chooses the tokens with a meaning.

        Args:
          control, vocab_size, path: as the attributes.
          eos_names: control tokens that are known to end a text, the one that closes answers first.
          think_start, think_end: the control tokens around a rationale.
          eos: control tokens that the user names instead of `eos_names`.
          files: what the files next to the tokenizer say.

        Raises:
          ConfigError: one of these tokens is missing or has two meanings.
        """
        where = path or "the tokenizer"
        marks = ((fields.THINK_START, think_start), (fields.THINK_END, think_end))
        for field, name in marks:
            if name not in control:
                unused = [n for n in control if re.search("unused|reserved|extra", n)]
                some = [unused[0]] if unused else list(control)[:4]
                hint = f" ({', '.join(map(repr, some))}, ...)" if some else ""
                raise ConfigError(
                    f"{field} = {name!r} is not a control token of "
                    f"{where}: name one of its {len(control)} control tokens{hint}, or add "
                    f"{name!r} to the tokenizer as a special token."
                )
        if think_start == think_end:
            raise ConfigError(
                f"{fields.THINK_START} and {fields.THINK_END} are "
                f"both {think_end!r}: name two different control tokens."
            )
        for field, name in marks:
            if name in (*_EOS_NAMES, *_PAD_NAMES, *_BOS_NAMES):
                raise ConfigError(
                    f"{field} = {name!r} already begins, ends or pads sequences: "
                    "name a control token without another use."
                )
        # ---- Ends, beginning and padding ----
        self.control = dict(control)
        self.vocab_size = vocab_size
        self.think_start_id = control[think_start]
        self.think_end_id = control[think_end]
        self.path = path
        self.chat_template: ChatTemplate | None = None
        self.eos_ids = self._ends(eos or eos_names, files, named_by_user=bool(eos))
        if not self.eos_ids:
            raise ConfigError(
                f"{where} has no end-of-sequence token that qlog knows "
                f"({', '.join(_EOS_NAMES)}): name one of its control tokens in {fields.EOS}."
            )
        # The names of the known families go before the files: a folder that has got its
        # tokenizer_config.json later keeps its prompts.
        tokens = files.special_tokens or {}
        pads = (*_PAD_NAMES, tokens.get("pad_token", ""))
        self.pad_id = next((control[n] for n in pads if n in control), self.eos_ids[-1])
        known_bos = next((control[n] for n in _BOS_NAMES if n in control), None)
        self.bos_id = known_bos
        if known_bos is None and files.adds_bos and "bos_token" in tokens:
            self.bos_id = self._id_of("bos_token", tokens["bos_token"], files.special_tokens_file)
        # Whether the files add something to what the vocabulary alone says: see `digest`.
        known_eos = tuple(control[name] for name in eos_names)
        self._ends_as_known = (self.eos_ids, self.bos_id) == (known_eos, known_bos)
        self._names = {id_: name for name, id_ in control.items()}
        # The promise of this module, checked for each control token: its name, as text, becomes
        # plain pieces. A kind of tokenizer that keeps the names elsewhere is refused here.
        leaks = [
            name
            for name, ids in zip(control, self.encode_batch(list(control)), strict=True)
            if not self._names.keys().isdisjoint(ids)
        ]
        if leaks:
            raise ConfigError(
                f"{where} turns the plain text {leaks[0]!r} into a control token "
                "and cannot be used safely; name a tokenizer.json of type BPE or "
                "WordLevel, or a SentencePiece .model file."
            )

    def _ends(
        self, names: Sequence[str], files: TokenizerFiles, named_by_user: bool
    ) -> tuple[int, ...]:
        """The ids that end an answer, each once; the first one closes gold answers.

        Raises:
          ConfigError: one of them is not in the vocabulary, or is around a rationale.
        """
        found: dict[int, str] = {}  # {id: what named it}
        for name in names:
            if name not in self.control:
                hint = fields.closest(name, self.control)
                raise ConfigError(
                    f"{fields.EOS} = {name!r} is not a control token of "
                    f"{self.path or 'the tokenizer'}{hint}: name one of its {len(self.control)} "
                    "control tokens."
                )
            source = f"{fields.EOS} = {name!r}" if named_by_user else f"{name!r}"
            found.setdefault(self.control[name], source)
        # Chat models often have several ends, and only some of them in each file (Llama 3: of a
        # turn, of a message, of a text). One that is overlooked lets answers run on.
        if name := (files.special_tokens or {}).get("eos_token"):
            id_ = self._id_of("eos_token", name, files.special_tokens_file)
            found.setdefault(id_, f"{files.special_tokens_file}: eos_token = {name!r}")
        for id_ in files.eos_ids:
            found.setdefault(id_, f"{files.generation_file}: eos_token_id = {id_}")
        for id_, source in found.items():
            if not 0 <= id_ < self.vocab_size:
                raise ConfigError(
                    f"{source} is outside the vocabulary of {self.vocab_size} tokens: take the "
                    "file from the same folder as the tokenizer, or correct it."
                )
            if id_ not in self.control.values():
                raise ConfigError(
                    f"{source} is the plain text {self._decode([id_])!r}, at which answers would "
                    "be cut off: take the file from the same folder as the tokenizer, or correct "
                    "it."
                )
            if id_ in (self.think_start_id, self.think_end_id):
                raise ConfigError(
                    f"{source} ends answers, but it is {fields.THINK_START} or {fields.THINK_END}, "
                    "which is around a rationale: name another token for one of the two."
                )
        return tuple(found)

    def _id_of(self, key: str, name: str, file: pathlib.Path | None) -> int:
        """The id of a control token that a file next to the tokenizer names."""
        if name not in self.control:
            raise ConfigError(
                f"{file}: {key} = {name!r} is not a control token of {self.path}: take both files "
                "from the same folder, or correct it."
            )
        return self.control[name]

    @property
    def special_tokens(self) -> dict[str, str]:
        """{"eos_token": ..., "pad_token": ..., "bos_token": ...}, where there is such a token."""
        ids = {"eos_token": self.eos_ids[0], "pad_token": self.pad_id, "bos_token": self.bos_id}
        return {key: self._names[id_] for key, id_ in ids.items() if id_ in self._names}

    def control_spans(self, text: str) -> list[Span]:
        """Where a tokenizer that knows its control tokens would find them in `text`, in order.

        Longer names go before those that they contain.
        """
        names = sorted(self.control, key=len, reverse=True)
        found = re.finditer("|".join(map(re.escape, names)), text)
        return [Span(match.start(), match.end(), match[0]) for match in found]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; markup inside it becomes ordinary pieces, never a control token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; in parallel, if the library can."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int], *, show_control: bool = False) -> str:
        """The text of the ids.

        Args:
          ids: those outside the vocabulary (padding rows of the embedding) are dropped.
          show_control: True writes control tokens by name, False drops them.
        """
        # Runs of plain ids between control tokens: a run is decoded at once, since a character may
        # be made of several tokens.
        runs = itertools.groupby(map(int, ids), key=lambda i: self._names.get(i))
        if not show_control:
            kept = [i for name, run in runs if name is None for i in run if i < self.vocab_size]
            return self._decode(kept)
        return "".join(
            self._decode([i for i in run if i < self.vocab_size])
            if name is None
            else name * len(list(run))
            for name, run in runs
        )

    def describe_ends(self) -> str:
        """The tokens that end an answer, by name and id, the one of gold answers first."""
        return ", ".join(f"{self.token(id_)} ({id_})" for id_ in self.eos_ids)

    def token(self, id_: int) -> str:
        """One token as text, control tokens by name."""
        id_ = int(id_)
        if id_ in self._names:
            return self._names[id_]
        return self._decode([id_]) if id_ < self.vocab_size else f"<padding row {id_}>"

    def save(self, folder: str | os.PathLike) -> paths.Path:
        """Writes the tokenizer's file, unchanged, under the name that transformers looks for.

        A chat template is written as chat_template.jinja, where transformers looks first.

        Args:
          folder: here or in a bucket.

        Returns:
          The path of the file.
        """
        if self.path is None:
            raise ValueError("this tokenizer was made in memory from a file's text only")
        return self._save(folder, f"tokenizer{self.path.suffix}", self.path.read_bytes())

    def _save(self, folder: str | os.PathLike, name: str, content: str | bytes) -> paths.Path:
        folder = paths.parse(folder)
        if self.chat_template is not None:
            paths.write(folder / tokenizer_files.TEMPLATE, self.chat_template.source)
        paths.write(folder / name, content)
        return folder / name

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of its content and of the tokens chosen from it.

        The chat template is not among them: `Formatter.digest` adds it where it is used.
        """
        content = self._content() + f"{self.think_start_id} {self.think_end_id}".encode()
        # Only what the content does not say by itself: runs without such files keep their digest.
        if not self._ends_as_known:
            content += f" {self.eos_ids} {self.bos_id}".encode()
        return hashlib.sha256(content).hexdigest()[:16]

    def _content(self) -> bytes:
        """What decides how this tokenizer encodes."""
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError


class JsonTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json` (Qwen, Llama, Gemma), read without its control tokens."""

    def __init__(
        self,
        spec: Mapping[str, Any],
        *,
        think_start: str,
        think_end: str,
        path: pathlib.Path | None = None,
        eos: Sequence[str] = (),
        files: TokenizerFiles = _NO_FILES,
    ):
        # ---- Which of the added tokens are control tokens ----
        added = _checked(spec.get("added_tokens") or [], path)
        unknown = spec["model"].get("unk_token")
        # Gemma adds runs of spaces and newlines, which are text. All other added tokens are control
        # tokens, "special" or not: Qwen's <think> is not marked special.
        kept = [t for t in added if not _is_markup(t["content"]) or t["content"] == unknown]
        control = {t["content"]: t["id"] for t in added if t not in kept}
        vocab = spec["model"]["vocab"]
        if len(vocab) == _QWEN_RANKS:
            _check_qwen(control, path)
        pieces = vocab.items() if isinstance(vocab, dict) else ()
        size = max([len(vocab) - 1, *control.values(), *(i for _, i in pieces)]) + 1
        # ---- The encoder of plain text: the same file without them ----
        # Without the post-processor, too, which would put control tokens around each text.
        plain = {
            **spec,
            "added_tokens": kept,
            "post_processor": None,
            "padding": None,
            "truncation": None,
            "model": _without(spec["model"], control),
            "pre_tokenizer": _in_the_middle(spec.get("pre_tokenizer")),
        }
        try:
            self._plain = hf_tokenizers.Tokenizer.from_str(json.dumps(plain))
        except Exception as error:  # the library raises Exception itself
            raise _no_tokenizer(path, error) from error
        for t in kept:
            if self._plain.token_to_id(t["content"]) != t["id"]:
                raise ConfigError(
                    f"{path}: the added token {t['content']!r} has id {t['id']} but "
                    "is not in the vocabulary; this layout is not supported."
                )
        self.spec = spec
        try:
            self._finder = _control_finder(spec, added)
        except Exception as error:  # the library raises Exception itself
            raise _no_tokenizer(path, error) from error
        special = {t["content"] for t in added if t.get("special")}
        super().__init__(
            control,
            size,
            eos_names=[n for n in _EOS_NAMES if n in special],
            think_start=think_start,
            think_end=think_end,
            path=path,
            eos=eos,
            files=files,
        )

    def control_spans(self, text: str) -> list[Span]:
        # By the library itself: names may be matched in normalized text, take spaces with them, or
        # count only as whole words.
        found = self._finder.encode(text, add_special_tokens=False)
        names = map(self._finder.id_to_token, found.ids)
        return [
            Span(start, stop, name)
            for name, (start, stop) in zip(names, found.offsets, strict=True)
            if name in self.control
        ]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [e.ids for e in encodings]

    def _decode(self, ids: list[int]) -> str:
        return self._plain.decode(ids, skip_special_tokens=False)

    def save(self, folder: str | os.PathLike) -> paths.Path:
        return self._save(folder, "tokenizer.json", json.dumps(self.spec, ensure_ascii=False))

    def _content(self) -> bytes:
        return json.dumps(self.spec, sort_keys=True).encode()  # spaces in the file do not count


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `*.model` (Gemma, T5), read without its control tokens."""

    def __init__(
        self,
        path: pathlib.Path,
        *,
        think_start: str,
        think_end: str,
        eos: Sequence[str] = (),
        files: TokenizerFiles = _NO_FILES,
    ):
        from sentencepiece import sentencepiece_model_pb2  # needs protobuf

        schema: Any = sentencepiece_model_pb2  # its classes are made at run time
        model = schema.ModelProto()
        try:
            model.ParseFromString(path.read_bytes())
        except Exception as error:
            raise ConfigError(
                f"{fields.TOKENIZER} = {path} is not a SentencePiece model "
                f"({type(error).__name__}): take the file from the model's own folder."
            ) from error
        kinds = schema.ModelProto.SentencePiece
        control = {}
        for id_, piece in enumerate(model.pieces):
            if piece.type == kinds.CONTROL:
                control[piece.piece] = id_
            elif piece.type == kinds.USER_DEFINED and _is_markup(piece.piece):
                # SentencePiece finds user-defined pieces in any text. As an unused piece it has its
                # id still, and no text becomes it.
                control[piece.piece.strip("▁")] = id_
                piece.type = kinds.UNUSED
        self._plain = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        # The file names the end of a text; the end of a turn is known by its name.
        end = model.pieces[self._plain.eos_id()].piece if self._plain.eos_id() >= 0 else None
        ends = [n for n in _EOS_NAMES if n in control and (n == end or n == "<end_of_turn>")]
        super().__init__(
            control,
            len(model.pieces),
            eos_names=ends,
            think_start=think_start,
            think_end=think_end,
            path=path,
            eos=eos,
            files=files,
        )
        self._file = path

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._plain.encode(list(texts), out_type=int)

    def _content(self) -> bytes:
        return self._file.read_bytes()

    def _decode(self, ids: list[int]) -> str:
        return self._plain.decode(ids)


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
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        found = [path / "tokenizer.json"] if (path / "tokenizer.json").is_file() else []
        found += sorted(path.glob("*.model"))
        if not found:
            hint = assets.why_missing(path / "tokenizer.json")
            raise ConfigError(
                f"{fields.TOKENIZER} = {path} holds neither tokenizer.json nor a "
                f"SentencePiece *.model{hint}: copy one of them from the model's folder."
            )
        path = found[0]
    if not path.is_file():
        raise ConfigError(
            f"{fields.TOKENIZER} = {path} does not exist{assets.why_missing(path)}: give a folder "
            "or a file with tokenizer.json or a SentencePiece *.model."
        )
    if git_lfs.is_pointer_file(path):
        raise ConfigError(f"{fields.TOKENIZER} = {path} {git_lfs.SENTENCE}.")
    files = tokenizer_files.read(path.parent, with_template=not chat_template)
    tokenizer = _read(path, think_start, think_end, eos, files)
    # ---- The chat template: a given file, or the model's own ----
    is_given = chat_template not in ("", BUILT_IN_NAME)
    source, template_file = files.template, files.template_file
    if is_given:
        template_file = pathlib.Path(chat_template).expanduser()
        source = tokenizer_files.read_template(template_file)
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


def _read(
    path: pathlib.Path,
    think_start: str,
    think_end: str,
    eos: Sequence[str],
    files: TokenizerFiles,
) -> Tokenizer:
    """The tokenizer in a file, by its kind."""
    if path.suffix == ".model":
        return SentencePieceTokenizer(
            path, think_start=think_start, think_end=think_end, eos=eos, files=files
        )
    try:
        spec = strict_json.loads(path.read_bytes())
        vocab = spec["model"]["vocab"]
        if isinstance(vocab, dict) and not all(type(id_) is int for id_ in vocab.values()):
            raise TypeError("its vocabulary has ids that are not numbers")
    except strict_json.Unreadable as error:
        remedy = "take the file from the model's own folder"
        raise ConfigError(error.after(f"{fields.TOKENIZER} = {path}", remedy)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise _no_tokenizer(path, error) from error
    return JsonTokenizer(
        spec, think_start=think_start, think_end=think_end, path=path, eos=eos, files=files
    )


def word_level(words: Sequence[str]) -> Tokenizer:
    """A tokenizer that splits on whitespace, one id per word; for synthetic tasks.

    Ids 0 to 4 are <pad>, <eos>, <think>, </think> and <unk>. Then come `words`, in their order and
    without repeats. Decoding joins words with one space.

    Raises:
      ValueError: a word is empty, contains whitespace, or has the name of a control token.
    """
    names = ("<pad>", "<eos>", "<think>", "</think>", "<unk>")
    for word in words:
        if word in names or word.split() != [word]:
            raise ValueError(f"words: {word!r} is not a single plain word")
    vocab = {word: i for i, word in enumerate(dict.fromkeys((*names, *words)))}
    added = [
        {
            "id": vocab[n],
            "content": n,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for n in names
    ]
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    return JsonTokenizer(spec, think_start="<think>", think_end="</think>")


def _is_markup(content: str) -> bool:
    """Whether a token is more than spaces and newlines ("▁" is SentencePiece's space)."""
    return bool(content.replace("▁", " ").strip())


def _without(model: Mapping[str, Any], control: Mapping[str, int]) -> dict[str, Any]:
    """The tokenizer model with the control tokens taken out of its vocabulary and merges."""
    vocab = model["vocab"]
    if not isinstance(vocab, dict) or control.keys().isdisjoint(vocab):
        return dict(model)
    vocab = {piece: id_ for piece, id_ in vocab.items() if piece not in control}
    # A merge that makes a control token, or is made of one, would name a piece that is gone.
    if "merges" not in model:
        return {**model, "vocab": vocab}
    pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
    merges = [[a, b] for a, b in pairs if a in vocab and b in vocab and a + b in vocab]
    return {**model, "vocab": vocab, "merges": merges}


def _in_the_middle(pre_tokenizer: Any) -> Any:
    """The pre-tokenizer for text behind a control token.

    Metaspace "first" puts a space in front of the first word of a whole prompt only. Texts here are
    parts of prompts, and control tokens go before them.
    """
    if isinstance(pre_tokenizer, dict) and pre_tokenizer.get("prepend_scheme") == "first":
        return {**pre_tokenizer, "prepend_scheme": "never"}
    return pre_tokenizer


def _control_finder(
    spec: Mapping[str, Any], added: Sequence[Mapping[str, Any]]
) -> hf_tokenizers.Tokenizer:
    """A tokenizer that finds the added tokens in a text, and makes one token of all between two.

    It costs little: its vocabulary is one word, which stands for everything else.
    """
    unknown = ""  # no added token has this name
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    finder = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**switches, **token, "id": i} for i, token in enumerate(added, 1)],
        "normalizer": spec.get("normalizer"),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {unknown: 0}, "unk_token": unknown},
    }
    return hf_tokenizers.Tokenizer.from_str(json.dumps(finder))


def _no_tokenizer(path: pathlib.Path | None, reason: object) -> ConfigError:
    return ConfigError(
        f"{fields.TOKENIZER} = {path} is not a tokenizer.json of the Hugging Face tokenizers "
        f"library ({reason}): take the file from the model's own folder."
    )


def _checked(added: Any, path: pathlib.Path | None) -> list[dict[str, Any]]:
    """The added tokens, if each has a name, and an id that no other has."""
    ids = set()
    for token in added if isinstance(added, list) else [added]:
        id_ = token.get("id") if isinstance(token, dict) else None
        if type(id_) is not int or id_ < 0 or not isinstance(token.get("content"), str):
            raise _no_tokenizer(path, f"{token!r} among its added_tokens has no name or no id")
        if id_ in ids:
            raise _no_tokenizer(path, f"two of its added_tokens have the id {id_}")
        ids.add(id_)
    return added


def _check_qwen(control: Mapping[str, int], path: pathlib.Path | None) -> None:
    """Refuses a file with Qwen's control tokens at other ids: the model would see wrong tokens."""
    # Models that put other control tokens on Qwen's vocabulary have none of these three.
    turns = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    if control.keys().isdisjoint(turns):
        return
    for name, id_ in _QWEN_IDS.items():
        if (name in control or name in turns) and control.get(name) != id_:
            raise ConfigError(
                f"{path} has {name} at id {control.get(name)} where Qwen has {id_}: take "
                "tokenizer.json from the model's own folder."
            )
