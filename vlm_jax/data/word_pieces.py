"""WordPiece vocabularies (BERT's `vocab.txt`, one token a line) and ALBEF's cleaning of captions.

A vocabulary is turned into the `tokenizer.json` that says the same, so that `hf_tokenizer` runs it.
"""

import collections
import os
import re
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from vlm_jax.data.hf_tokenizer import HfTokenizer
from vlm_jax.schema import ConfigError

PAD, UNKNOWN, CLASS, SEPARATOR, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# The roles that a tokenizer's conventions speak of.
ROLES = {"bos": CLASS, "eos": SEPARATOR, "pad": PAD}
_FILE = "vocab.txt"
_DROPPED = re.compile(r"[,.'!?\"()*#:;~]")


def clean_caption(text: str, max_words: int) -> str:
    """A caption as ALBEF reads it (published code): lower case, without punctuation, at most `max_words` words."""
    text = _DROPPED.sub("", text.lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(text.split()[:max_words])


def load_word_pieces(path: str, lower: bool) -> HfTokenizer:
    """The encoder of a `vocab.txt`, or of a folder that holds one.

    Raises:
        ConfigError: there is none, or it lacks a special token or names a token twice.
    """
    file_path = os.path.join(path, _FILE) if os.path.isdir(path) else path
    try:
        with open(file_path, encoding="utf-8") as file:
            tokens = [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"config.data.tokenizer.path = {path!r} can't be read ({error}); give a BERT's {_FILE}, one token a line"
        ) from None
    while tokens and not tokens[-1]:
        tokens.pop()
    twice = [token for token, count in collections.Counter(tokens).items() if count > 1]
    if twice:
        raise ConfigError(f"config.data.tokenizer.path = {path!r} names {twice[0]!r} twice; ids are its lines")
    return encoder_of(tokens, lower, f"config.data.tokenizer.path = {path!r}")


def word_pieces_of(captions: Iterable[str], vocab_size: int, lower: bool) -> HfTokenizer:
    """An encoder whose vocabulary is the captions': special tokens, characters, and the most frequent words.

    A pure function of the captions. Every character also stands for itself inside of a word, so that no word of the
    captions is unknown.

    Raises:
        ConfigError: `vocab_size` has no room for the characters, or there is no caption.
    """
    normalizer, splitter = _normalizer(lower), pre_tokenizers.BertPreTokenizer()
    split = (splitter.pre_tokenize_str(normalizer.normalize_str(caption)) for caption in captions)
    counts = collections.Counter(word for words in split for word, _ in words)
    if not counts:
        raise ConfigError("config.data.tokenizer.path is empty and there are no captions to make a vocabulary of")
    characters = sorted({character for word in counts for character in word})
    pieces = [*SPECIAL, *characters, *(f"##{character}" for character in characters)]
    if len(pieces) > vocab_size:
        raise ConfigError(
            f"config.data.tokenizer.vocab_size = {vocab_size} has no room for the {len(characters)} characters of the "
            f"captions; use {len(pieces)} or more"
        )
    by_count = sorted(counts, key=lambda word: (-counts[word], word))
    words = [word for word in by_count if len(word) > 1][: vocab_size - len(pieces)]
    return encoder_of([*pieces, *words], lower, "")


def encoder_of(tokens: list[str], lower: bool, what: str) -> HfTokenizer:
    """The encoder whose ids are the places in a list; raises `ConfigError` when a special token is missing."""
    missing = [token for token in SPECIAL if token not in tokens]
    if missing:
        raise ConfigError(f"{what} lacks {', '.join(missing)}, which a BERT's vocabulary has; check the file")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    stored = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=100))
    stored.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    stored.normalizer = _normalizer(lower)
    stored.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    stored.decoder = decoders.WordPiece(prefix="##")
    return HfTokenizer(stored.to_str(pretty=False).encode(), ROLES)


def _normalizer(lower: bool) -> normalizers.Normalizer:
    """BERT's: accents go where case goes."""
    return normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lower)


__all__ = ["ROLES", "SPECIAL", "clean_caption", "encoder_of", "load_word_pieces", "word_pieces_of"]
