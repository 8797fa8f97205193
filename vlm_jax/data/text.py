"""Texts to rows of token ids: the runtime tokenizer, its conventions and its configs.

`bpe`, `sentencepieces`, `word_pieces` and `hf_tokenizer` turn one text into ids; here are context length, start and end
tokens, padding and truncation, and what a checkpoint stores. Conversations are `chat`'s business.
"""

import base64
import dataclasses
import gzip
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from vlm_jax import schema
from vlm_jax.data import bpe, hf_tokenizer, sentencepieces, word_pieces
from vlm_jax.schema import Choice, ConfigError


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(Choice):
    """How captions become ids; pick a kind."""

    # ids in a row: the context length of the text tower
    length: int = 77
    # start every text with the start token
    bos: bool = True
    # end every text with the end token
    eos: bool = True
    # a text that is cut keeps its end token
    sticky_eos: bool = True
    # what follows the text: the pad id (0 in CLIP's and our own vocabularies), or the end token
    pad: Literal["zero", "eos"] = "zero"
    # lower-case the text first
    lower: bool = True
    # drop punctuation, turn underscores into spaces and collapse white space first (SigLIP)
    canonicalize: bool = False

    @classmethod
    def kinds(cls) -> Mapping[str, type[Any]]:
        """The table kind -> config."""
        return {
            "clip_bpe": ClipBpeConfig,
            "sentencepiece": SentencePieceConfig,
            "hf": HfTokenizerConfig,
            "wordpiece": WordPieceConfig,
        }

    def problems(self) -> Iterator[tuple[str, str]]:
        """Lengths and conventions that exclude each other."""
        if self.length < 1 + self.bos + self.eos:
            yield "length", f"= {self.length} has no room for a token beside the start and end tokens"
        if self.sticky_eos and not self.eos:
            yield "sticky_eos", "is true although eos is false: no text has an end token; set sticky_eos to false"


@dataclasses.dataclass(frozen=True)
class ClipBpeConfig(TokenizerConfig):
    """CLIP's tokenizer with its 49408 ids."""

    # merges file (plain or .gz); empty: the copy inside an installed open_clip_torch
    path: str = ""
    # repair mojibake with ftfy, as CLIP does; the identity on clean text, and needs the package ftfy
    fix_text: bool = False


@dataclasses.dataclass(frozen=True)
class SentencePieceConfig(TokenizerConfig):
    """A SentencePiece model, given or trained from the training captions."""

    # start every text with the start token; models trained here have none
    bos: bool = False
    # the normalisation of the model lower-cases already
    lower: bool = False
    # *.model file; empty: trained when the run starts and kept in its checkpoint
    path: str = ""
    # number of ids when trained here; fewer when the captions don't give as many
    vocab_size: int = 8192
    # normalisation when trained here: nmt_nfkc_cf folds case and width, identity keeps every character
    normalization: Literal["nmt_nfkc_cf", "nmt_nfkc", "nfkc", "nfkc_cf", "identity"] = "nmt_nfkc_cf"
    # tokens with an id of their own, after the three special ones, that no text can produce
    user_symbols: tuple[str, ...] = ()

    def problems(self) -> Iterator[tuple[str, str]]:
        """Sizes that can't be trained."""
        yield from super().problems()
        if not self.path and self.vocab_size < 264:
            yield "vocab_size", f"= {self.vocab_size} has no room for the 256 bytes and some words; use 300 or more"
        if not self.path and self.bos:
            yield "bos", "is true, but a model trained here has no start token; set it to false or give a path"


@dataclasses.dataclass(frozen=True)
class HfTokenizerConfig(TokenizerConfig):
    """A Hugging Face `tokenizer.json`; the keys here, and not its template, say which special tokens a text gets."""

    # the normaliser of the file lower-cases if its authors wanted it
    lower: bool = False
    # tokenizer.json, or a folder that holds one
    path: str = ""
    # start token; empty: a usual one, such as <s> or [CLS]
    bos_token: str = ""
    # end token; empty: a usual one, such as </s> or [SEP]
    eos_token: str = ""
    # padding token; empty: a usual one, such as <pad>, else the id 0
    pad_token: str = ""

    def special_tokens(self) -> dict[str, str]:
        """Role -> token, as the encoder takes them."""
        return {"bos": self.bos_token, "eos": self.eos_token, "pad": self.pad_token}


@dataclasses.dataclass(frozen=True)
class WordPieceConfig(TokenizerConfig):
    """BERT's WordPiece on a `vocab.txt`: [CLS] text [SEP], padded with [PAD]; ALBEF's has no [SEP] (eos = false)."""

    # vocab.txt, or a folder that holds one; empty: made of the captions when the run starts and kept in its checkpoint
    path: str = ""
    # most ids when made here: characters and the most frequent words
    vocab_size: int = 8192
    # clean captions as ALBEF does: no punctuation, at most this many words; 0 leaves them as they are
    clean_words: int = 0

    def problems(self) -> Iterator[tuple[str, str]]:
        """Numbers out of range."""
        yield from super().problems()
        if self.clean_words < 0:
            yield "clean_words", f"= {self.clean_words} must not be negative; 0 leaves captions as they are"
        if self.vocab_size < len(word_pieces.SPECIAL) + 1:
            yield "vocab_size", f"= {self.vocab_size} has no room beside the special tokens; use 100 or more"


class Encoder(Protocol):
    """One text to ids without special tokens; `eos_id` and `bos_id` are -1 where the vocabulary has none."""

    vocab_size: int
    pad_id: int
    eos_id: int
    bos_id: int

    def clean(self, text: str) -> str:
        """The text as the encoder's authors clean it."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ...

    def special_id(self, token: str) -> int:
        """The id of a special token by its name, -1 where there is none."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        ...

    def model_bytes(self) -> bytes:
        """What rebuilds the encoder."""
        ...


class Tokenizer:
    """Texts to int32 [n, length]. Picklable, safe in threads, and rebuilt bit for bit by `from_state`.

    Attributes:
        config: the conventions.
        length: ids in a row.
        vocab_size: number of ids, special ones included.
        pad_id: what fills a row after its text.
        eos_id: the end token; bos_id: the start token (-1 where the vocabulary has none).
    """

    def __init__(self, config: TokenizerConfig, encoder: Encoder):
        self.config, self.encoder, self.length = config, encoder, config.length
        self.vocab_size, self.eos_id, self.bos_id = encoder.vocab_size, encoder.eos_id, encoder.bos_id
        for name, wanted, token in (
            ("eos", config.eos or config.pad == "eos", self.eos_id),
            ("bos", config.bos, self.bos_id),
        ):
            if wanted and token < 0:
                raise ConfigError(f"config.data.tokenizer.{name} asks for a token that this vocabulary lacks")
        self.pad_id = self.eos_id if config.pad == "eos" else encoder.pad_id

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Rows of ids, int32 [len(texts), length]. An empty text is its start and end tokens."""
        if isinstance(texts, str):
            raise TypeError("the tokenizer takes a list of texts, not one text: write tokenizer([text])")
        rows = np.full((len(texts), self.length), self.pad_id, np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = self.encode(text)
            row[: len(ids)] = ids
        return rows

    def encode(self, text: str) -> list[int]:
        """At most `length` ids of one text, start and end tokens included, without padding."""
        config = self.config
        ids = [self.bos_id] * config.bos + self.encoder.encode(self.clean(text)) + [self.eos_id] * config.eos
        if len(ids) > self.length:
            ids = ids[: self.length]
            if config.sticky_eos:
                ids[-1] = self.eos_id
        return ids

    @property
    def mask_id(self) -> int:
        """The token that stands for a hidden word; -1 where the vocabulary has none."""
        return getattr(self.encoder, "mask_id", -1)

    def clean(self, text: str) -> str:
        """The text as it is encoded."""
        text = self.encoder.clean(text)
        if isinstance(self.config, WordPieceConfig) and self.config.clean_words:
            text = word_pieces.clean_caption(text, self.config.clean_words)
        text = text.lower() if self.config.lower else text
        return canonicalize(text) if self.config.canonicalize else text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a row: from its start token, if any, to its first end token."""
        kept = [int(i) for i in ids]
        kept = kept[1:] if self.config.bos and kept[:1] == [self.bos_id] else kept
        if self.eos_id in kept:
            kept = kept[: kept.index(self.eos_id)]
        while not self.config.eos and kept and kept[-1] == self.pad_id:
            kept.pop()
        return self.encoder.decode(kept)

    def state(self) -> dict[str, Any]:
        """All that rebuilds this tokenizer, ready for JSON."""
        model = base64.b64encode(self.encoder.model_bytes()).decode("ascii")
        return {"config": schema.to_dict(self.config), "model": model}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Tokenizer":
        """The tokenizer whose `state()` this is; needs no file."""
        config = schema.from_dict(TokenizerConfig, state["config"], "tokenizer")
        model = base64.b64decode(state["model"])
        if isinstance(config, ClipBpeConfig):
            return cls(config, bpe.ClipBpe(bpe.read_merges(model, "of the checkpoint"), config.fix_text))
        if isinstance(config, HfTokenizerConfig):
            return cls(config, hf_tokenizer.HfTokenizer(gzip.decompress(model), config.special_tokens()))
        if isinstance(config, WordPieceConfig):
            return cls(config, hf_tokenizer.HfTokenizer(gzip.decompress(model), word_pieces.ROLES))
        return cls(config, sentencepieces.SentencePieces(model))


SIGLIP_TOKENIZER = SentencePieceConfig(length=64, pad="eos", lower=True, canonicalize=True)
"""SigLIP (Zhai et al. 2023; big_vision): canonical text, an end token even where the text is cut, padding with it.

With its 32000 pieces of C4 as `path`; without a path a model of the same conventions is trained here. The text tower
takes the last position, which is the end token always."""

ALBEF_TOKENIZER = WordPieceConfig(length=25, eos=False, sticky_eos=False, clean_words=30)
"""ALBEF (Li et al. 2021, published code): BERT's uncased vocabulary, [CLS] and no [SEP], captions cleaned.

With bert-base-uncased's `vocab.txt` as `path`; without a path a vocabulary is made of the captions."""

SIGLIP2_TOKENIZER = HfTokenizerConfig(length=64, bos=False, lower=True)
"""SigLIP 2 (Tschannen et al. 2025, section 2): Gemma's tokenizer, lower-cased text, padding with id 0, end token 1.

With the model's `tokenizer.json` as `path`. The text tower takes the last position, which is padding mostly. Copies of
these models in open_clip drop punctuation too: for those, set `canonicalize`."""

_PUNCTUATION = str.maketrans({"_": " ", **dict.fromkeys(string.punctuation.replace("_", ""))})


def canonicalize(text: str) -> str:
    """Without ASCII punctuation, underscores as spaces, white space collapsed (Zhai et al. 2023, SigLIP)."""
    return " ".join(text.translate(_PUNCTUATION).split())


def build_tokenizer(config: TokenizerConfig, captions: Iterable[str] | None) -> Tokenizer:
    """The tokenizer of a config.

    Args:
        config: one of the kinds.
        captions: texts to train from, read only when the config asks for a tokenizer trained here.

    Raises:
        ConfigError: a file is missing (says what to install or pass), or there are no captions to train from.
    """
    if isinstance(config, ClipBpeConfig):
        return Tokenizer(config, bpe.load_clip_bpe(config.path, config.fix_text))
    if isinstance(config, HfTokenizerConfig):
        return Tokenizer(config, hf_tokenizer.load_hf_tokenizer(config.path, config.special_tokens()))
    if isinstance(config, WordPieceConfig) and config.path:
        return Tokenizer(config, word_pieces.load_word_pieces(config.path, config.lower))
    if not isinstance(config, SentencePieceConfig | WordPieceConfig):
        raise ConfigError(f"config.data.tokenizer must be one of {', '.join(TokenizerConfig.kinds())}")
    if config.path:
        return Tokenizer(config, sentencepieces.load_sentencepieces(config.path))
    if captions is None:
        raise ConfigError("config.data.tokenizer.path is empty and there are no captions to train from; set the path")
    if isinstance(config, WordPieceConfig):
        cleaned = (word_pieces.clean_caption(x, config.clean_words) if config.clean_words else x for x in captions)
        return Tokenizer(config, word_pieces.word_pieces_of(cleaned, config.vocab_size, config.lower))
    model = sentencepieces.train(captions, config.vocab_size, config.normalization, config.user_symbols)
    return Tokenizer(config, sentencepieces.SentencePieces(model))
