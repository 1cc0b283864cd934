"""Made-up vocabularies and records in the official formats, and a second byte-level BPE."""

import functools
import itertools
import json
import re
import unicodedata

import tokenizers

from qlog import data


def limits(prompt: int, gold: int, rationale: int | None = None) -> data.Limits:
    """Limits in tokens, under the names of the config fields that set them."""
    return data.Limits(
        data.Limit("config.data.max_prompt_tokens", prompt),
        data.Limit("config.rollout.answer_reserve", gold),
        data.Limit("config.rollout.rationale_budget", rationale - 1, 1) if rationale else None,
    )


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


def added_token(id_: int, content: str, special: bool = True) -> dict:
    return {
        "id": id_,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def byte_level_spec(control=CHATML) -> dict:
    """A tokenizer.json: one id per byte, then the control tokens; `<think>` is not 'special'."""
    vocab = {char: i for i, char in enumerate(byte_alphabet().values())}
    added = [added_token(256 + i, name, "think" not in name) for i, name in enumerate(control)]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "post_processor": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }


def write_spec(folder, spec) -> str:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


def whole_tokenizer(path):
    """text -> ids by the library itself, control tokens included: what renderings are held to."""
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


class ReferenceBPE:
    """Qwen's byte-level BPE from its definition, in plain Python, control tokens left out.

    `re` has no \\p{L} and \\p{N}; the classes below agree with them except on numerals that are no
    decimal digits, which the tests avoid.
    """

    _SPLIT = re.compile(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:[^\r\n\w]|_)?[^\W\d_]+|\d| ?(?:[^\s\w]|_)+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def __init__(self, path):
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        merges = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        self._ranks = {tuple(pair): i for i, pair in enumerate(merges)}
        self._vocab = model["vocab"]
        self._alphabet = byte_alphabet()
        self._word = functools.cache(self._word)

    def _word(self, word: str) -> list[int]:
        pieces = [self._alphabet[b] for b in word.encode()]
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, float("inf")))
            if best not in self._ranks:
                break
            i = pairs.index(best)
            pieces[i : i + 2] = ["".join(best)]
        return [self._vocab[piece] for piece in pieces]

    def encode(self, text: str) -> list[int]:
        text = unicodedata.normalize("NFC", text)
        return [id_ for word in self._SPLIT.findall(text) for id_ in self._word(word)]


FINQA = {
    "id": "ABC/2009/page_1.pdf-1",
    "pre_text": ["sales rose in 2009 .", "the table is in millions . ."],
    "post_text": ["."],
    "table": [
        ["", "2009", "2008"],
        ["net sales", "$ 120", "$ 100"],
        ["cost ( gross , of tax )", "-30 ( 30 )", "-20 ( 20 )"],
    ],
    "qa": {
        "question": "what was the  growth of net sales?",
        "answer": "20.0%\\n",
        "program": "subtract(120, 100), divide(#0, 100)",
        "exe_ans": 0.2,
        "gold_inds": {"table_1": "the net sales of 2009 is $ 120 ;"},
    },
}
HOTPOTQA = {
    "_id": "5a7a06935542990198eaf050",
    "question": "Who wrote the book behind the film Dune?",
    "answer": "Frank Herbert",
    "type": "bridge",
    "level": "easy",
    "supporting_facts": [["Dune (film)", 1], ["Dune (novel)", 0], ["Dune (novel)", 9]],
    "context": [
        ["Dune (film)", ["Dune is a film.", " It follows the novel Dune."]],
        ["Dune (novel)", ["Dune is by Frank Herbert."]],
    ],
}
MUSIQUE = {
    "id": "2hop__1_2",
    "question": "Where was the writer of Dune born?",
    "question_decomposition": [
        {
            "id": 1,
            "question": "Dune >> author",
            "answer": "Frank Herbert",
            "paragraph_support_idx": 1,
        },
        {
            "id": 2,
            "question": "Where was #1 born ?",
            "answer": "Tacoma",
            "paragraph_support_idx": 0,
        },
    ],
    "paragraphs": [
        {
            "idx": 0,
            "title": "Frank Herbert",
            "paragraph_text": "He was born in Tacoma.",
            "is_supporting": True,
        },
        {
            "idx": 1,
            "title": "Dune",
            "paragraph_text": "A novel by Frank Herbert.",
            "is_supporting": True,
        },
    ],
    "answer": "Tacoma",
    "answer_aliases": ["Tacoma, Washington", "Tacoma"],
    "answerable": True,
}
RECORDS = {"finqa": FINQA, "hotpotqa": HOTPOTQA, "musique": MUSIQUE}
