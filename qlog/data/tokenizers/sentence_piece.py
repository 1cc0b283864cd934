"""Tokenizers of SentencePiece: a `*.model` file (Gemma, T5)."""

import pathlib
from collections.abc import Sequence
from typing import Any

import sentencepiece

from qlog.data import fields
from qlog.data.tokenizers.companions import NO_FILES, TokenizerFiles
from qlog.data.tokenizers.interface import EOS_NAMES, Tokenizer, is_markup
from qlog.errors import ConfigError


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `*.model` (Gemma, T5), read without its control tokens."""

    def __init__(
        self,
        path: pathlib.Path,
        *,
        think_start: str,
        think_end: str,
        eos: Sequence[str] = (),
        files: TokenizerFiles = NO_FILES,
    ):
        from sentencepiece import sentencepiece_model_pb2  # needs protobuf

        schema: Any = sentencepiece_model_pb2  # its classes are made at run time
        model = schema.ModelProto()
        try:
            model.ParseFromString(path.read_bytes())
        except Exception as error:
            raise _no_model(path, error) from error
        kinds = schema.ModelProto.SentencePiece
        control = {}
        for id_, piece in enumerate(model.pieces):
            if piece.type == kinds.CONTROL:
                control[piece.piece] = id_
            elif piece.type == kinds.USER_DEFINED and is_markup(piece.piece):
                # SentencePiece finds user-defined pieces in any text. As an unused piece it has its
                # id still, and no text becomes it.
                control[piece.piece.strip("▁")] = id_
                piece.type = kinds.UNUSED
        try:
            plain = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        except RuntimeError as error:  # a piece that is there twice, say
            raise _no_model(path, error) from error
        self._plain = plain
        # The file names the end of a text; the end of a turn is known by its name.
        end = model.pieces[self._plain.eos_id()].piece if self._plain.eos_id() >= 0 else None
        ends = [n for n in EOS_NAMES if n in control and (n == end or n == "<end_of_turn>")]
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


def _no_model(path: pathlib.Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{fields.TOKENIZER} = {path} is not a SentencePiece model "
        f"({type(error).__name__}): take the file from the model's own folder."
    )
