"""What every tokenizer offers, and the tokens with a meaning: ends, padding, thinking.

Text and control tokens never mix here. `encode` maps text to plain pieces only: a context that
contains "</think>" or "<|im_end|>" cannot end a rationale or a turn, because the encoder is built
without the control tokens. Code that needs one takes its id from `control`.
"""

import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from qlog.data import fields
from qlog.data.chat_templates import ChatTemplate
from qlog.data.tokenizers import companions
from qlog.data.tokenizers.companions import NO_FILES, TokenizerFiles
from qlog.errors import ConfigError
from qlog.storage import paths

# The names of these tokens in the known families. The end of a turn goes before the end of a text:
# the first one present closes gold answers, and a chat model ends its answers with its turn.
EOS_NAMES = (
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
        files: TokenizerFiles = NO_FILES,
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
            if name in (*EOS_NAMES, *_PAD_NAMES, *_BOS_NAMES):
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
                f"({', '.join(EOS_NAMES)}): name one of its control tokens in {fields.EOS}."
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
            paths.write(folder / companions.TEMPLATE, self.chat_template.source)
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


def is_markup(content: str) -> bool:
    """Whether a token is more than spaces and newlines ("▁" is SentencePiece's space)."""
    return bool(content.replace("▁", " ").strip())
