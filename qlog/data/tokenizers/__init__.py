"""Text to token ids and back: `load` a tokenizer.json or a SentencePiece model, or `word_level`.

In reading order: interface.py (what every tokenizer offers), json_file.py and sentence_piece.py
(the two kinds of files), companions.py (the small files next to them), loading.py.
"""

from qlog.data.tokenizers.interface import Span, Tokenizer
from qlog.data.tokenizers.json_file import JsonTokenizer, word_level
from qlog.data.tokenizers.loading import load
from qlog.data.tokenizers.sentence_piece import SentencePieceTokenizer

__all__ = [
    "JsonTokenizer",
    "SentencePieceTokenizer",
    "Span",
    "Tokenizer",
    "load",
    "word_level",
]
