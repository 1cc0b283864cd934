"""Tokenizers of Hugging Face's library: a `tokenizer.json` (Qwen, Llama, Gemma), or a word list.

The library's encoder looks for control tokens in the text, and has no switch against that. So they
are taken out of the tokenizer's file before the library reads it.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers as hf_tokenizers

from qlog.data import fields
from qlog.data.tokenizers.companions import NO_FILES, TokenizerFiles
from qlog.data.tokenizers.interface import EOS_NAMES, Span, Tokenizer, is_markup
from qlog.errors import ConfigError
from qlog.storage import paths, strict_json

_QWEN_IDS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<think>": 151667,
    "</think>": 151668,
}
_QWEN_RANKS = 151643  # the size of Qwen's vocabulary without control tokens, by which it is known


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
        files: TokenizerFiles = NO_FILES,
    ):
        # ---- Which of the added tokens are control tokens ----
        model = _checked_model(spec, path)
        added = _checked(spec.get("added_tokens") or [], path)
        unknown = model.get("unk_token")
        # Gemma adds runs of spaces and newlines, which are text. All other added tokens are control
        # tokens, "special" or not: Qwen's <think> is not marked special.
        kept = [t for t in added if not is_markup(t["content"]) or t["content"] == unknown]
        control = {t["content"]: t["id"] for t in added if t not in kept}
        vocab = model["vocab"]
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
            "model": _without(model, control),
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
            eos_names=[n for n in EOS_NAMES if n in special],
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


def read(
    path: pathlib.Path,
    *,
    think_start: str,
    think_end: str,
    eos: Sequence[str],
    files: TokenizerFiles,
) -> JsonTokenizer:
    """The tokenizer in a tokenizer.json; the arguments are those of `JsonTokenizer`.

    Raises:
      ConfigError: a file that is not a tokenizer, or that has Qwen's control tokens at other ids.
    """
    try:
        spec = strict_json.loads(path.read_bytes())
    except strict_json.Unreadable as error:
        remedy = "take the file from the model's own folder"
        raise ConfigError(error.after(f"{fields.TOKENIZER} = {path}", remedy)) from None
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


# ---- The file of a tokenizer, checked and changed ----


def _without(model: Mapping[str, Any], control: Mapping[str, int]) -> dict[str, Any]:
    """The tokenizer model with the control tokens taken out of its vocabulary and merges."""
    vocab = model["vocab"]
    if not isinstance(vocab, dict) or control.keys().isdisjoint(vocab):
        return dict(model)
    vocab = {piece: id_ for piece, id_ in vocab.items() if piece not in control}
    # A merge that makes a control token, or is made of one, would name a piece that is gone.
    if not model.get("merges"):
        return {**model, "vocab": vocab}
    merges = [
        [a, b]
        for a, b in map(_pair, model["merges"])
        if a in vocab and b in vocab and a + b in vocab
    ]
    return {**model, "vocab": vocab, "merges": merges}


def _pair(merge: Any) -> list[str]:
    """The two pieces of a merge, in either spelling; whatever else stands there as it is."""
    return merge.split(" ") if isinstance(merge, str) else merge


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


def _checked_model(spec: Any, path: pathlib.Path | None) -> dict[str, Any]:
    """The tokenizer's model, if its vocabulary and merges can be walked through."""
    model = spec.get("model") if isinstance(spec, Mapping) else None
    if not isinstance(model, dict):
        raise _no_tokenizer(path, "it has no model")
    vocab, merges = model.get("vocab"), model.get("merges") or []
    if not isinstance(vocab, dict | list):  # a list: pieces and their scores
        raise _no_tokenizer(path, f"its vocabulary is {vocab!r:.60}")
    if isinstance(vocab, dict) and not all(type(id_) is int for id_ in vocab.values()):
        raise _no_tokenizer(path, "its vocabulary has ids that are not numbers")
    if not isinstance(merges, list):
        raise _no_tokenizer(path, f"its merges are {merges!r:.60}")
    for merge in merges:
        pair = _pair(merge)
        if not isinstance(pair, list) or [type(piece) for piece in pair] != [str, str]:
            raise _no_tokenizer(path, f"{merge!r:.60} among its merges is no pair of pieces")
    return model


def _checked(added: Any, path: pathlib.Path | None) -> list[dict[str, Any]]:
    """The added tokens, if each has a name, and an id that no other has."""
    if not isinstance(added, list):
        raise _no_tokenizer(path, f"its added_tokens are {added!r:.60}")
    ids = set()
    for token in added:
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
