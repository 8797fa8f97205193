"""SentencePiece models as encoders: a `*.model` file, or one trained in this process from captions.

Text that spells a piece with a meaning of its own (`</s>`, `<image>`) is encoded as ordinary characters.
"""

import io
import os
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from vlm_jax.schema import ConfigError

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2


class SentencePieces:
    """Encoder of a SentencePiece model, without context length or padding."""

    def __init__(self, model: bytes):
        self.model = model
        self._prepare()

    def _prepare(self) -> None:
        self._reader = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        self._writer = sentencepiece.SentencePieceProcessor(model_proto=_without_user_symbols(self.model))
        self.vocab_size = self._reader.vocab_size()
        self.eos_id, self.bos_id = self._reader.eos_id(), self._reader.bos_id()  # -1: the model has none
        self.pad_id = max(0, self._reader.pad_id())

    def __getstate__(self) -> dict[str, bytes]:
        return {"model": self.model}

    def __setstate__(self, state: dict[str, bytes]) -> None:
        self.model = state["model"]
        self._prepare()

    def clean(self, text: str) -> str:
        """The text itself: the model holds its own normalisation."""
        return text

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens excluded."""
        return self._writer.encode(text)

    def special_id(self, token: str) -> int:
        """The id of a control token or a user-defined symbol, -1 where the model has none of this name."""
        found = self._reader.piece_to_id(token)
        known = self._reader.id_to_piece(found) == token
        return found if known and self._writer.is_control(found) else -1

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens vanish, and so do ids beyond the vocabulary, for which a model has rows."""
        return self._reader.decode([int(i) for i in ids if i < self.vocab_size])

    def model_bytes(self) -> bytes:
        """The `*.model` file."""
        return self.model


def _without_user_symbols(model: bytes) -> bytes:
    """The model with user-defined symbols turned into control symbols: same ids, never matched in a text."""
    message: Any = sentencepiece_model_pb2  # its classes are made when it is imported, so type checkers see none
    proto = message.ModelProto.FromString(model)
    kinds = message.ModelProto.SentencePiece
    for piece in proto.pieces:
        if piece.type == kinds.USER_DEFINED:
            piece.type = kinds.CONTROL
    return proto.SerializeToString()


def train(
    captions: Iterable[str],
    vocab_size: int,
    normalization: str = "nmt_nfkc_cf",
    user_symbols: Sequence[str] = (),
) -> bytes:
    """Trains a BPE model with byte fallback: every text has ids, none of them unknown. Same captions, same bytes.

    Args:
        captions: the texts; no line of more than 4192 bytes is used.
        vocab_size: ids wanted, 0 pad, 1 end, 2 unknown, 256 bytes and the symbols included. Captions too few for
            that many give fewer.
        normalization: a rule of SentencePiece; `nmt_nfkc_cf` folds case and width, `identity` keeps the text.
        user_symbols: tokens with an id of their own that no text can produce.

    Raises:
        ConfigError: there is no caption, or `vocab_size` has no room for the bytes.
    """
    texts = [line for caption in captions for line in caption.split("\n") if line.strip()]
    if not texts:
        raise ConfigError("there is no caption to train a tokenizer from; check the source, or set tokenizer.path")
    fixed = 3 + 256 + len(user_symbols)
    characters = len(set("".join(texts))) + 1
    if vocab_size < fixed + 1:
        raise ConfigError(f"config.data.tokenizer.vocab_size = {vocab_size} has no room for {fixed} fixed pieces")
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=writer,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0 if fixed + characters < vocab_size else 0.9995,
        byte_fallback=True,
        pad_id=PAD_ID,
        eos_id=EOS_ID,
        unk_id=UNK_ID,
        bos_id=-1,
        user_defined_symbols=list(user_symbols),
        normalization_rule_name=normalization,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return writer.getvalue()


def load_sentencepieces(path: str) -> SentencePieces:
    """The encoder of a `*.model` file.

    Raises:
        ConfigError: the file is missing or no SentencePiece model.
    """
    if not os.path.isfile(path):
        raise ConfigError(
            f"config.data.tokenizer.path = {path!r} is not a file; give a SentencePiece *.model "
            "(python -m vlm_jax.data.train_tokenizer makes one), or leave it empty to train from the captions"
        )
    with open(path, "rb") as file:
        data = file.read()
    try:
        if not data:  # the library takes it for a model without a word
            raise ValueError("the file is empty")
        return SentencePieces(data)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"config.data.tokenizer.path = {path!r} is not a SentencePiece model ({error}); give a *.model file"
        ) from None
