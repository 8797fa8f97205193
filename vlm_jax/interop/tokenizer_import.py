"""The tokenizer of imported weights: from a flag, from the files beside them, or for CLIP's vocabulary CLIP's.

Writing tokenizers for other libraries is `tokenizer_export`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from vlm_jax import schema
from vlm_jax.data import bpe
from vlm_jax.data.hf_tokenizer import FILE_NAME
from vlm_jax.data.text import (
    SIGLIP2_TOKENIZER,
    SIGLIP_TOKENIZER,
    ClipBpeConfig,
    HfTokenizerConfig,
    SentencePieceConfig,
    Tokenizer,
    WordPieceConfig,
    build_tokenizer,
)
from vlm_jax.interop import files
from vlm_jax.interop.tokenizer_export import CONVENTIONS
from vlm_jax.models.text import TextConfig
from vlm_jax.schema import ConfigError

NO_TOKENIZER = "none"  # value of the flag
_CLIP_VOCABULARY = TextConfig().vocab_size
# In a folder, the first of these that is there is read: a tokenizer.json beside another file was made from it.
_FILES = ("merges.txt", "spiece.model", "tokenizer.model", FILE_NAME)


def import_tokenizer(folder: Path, flag: str, text: TextConfig) -> tuple[Tokenizer | None, str]:
    """The tokenizer to store with a model, and a remark for the user. It is not checked against the model here.

    Args:
        folder: where the weights lie.
        flag: a file of a tokenizer; "none" for no tokenizer; "" for the folder's, else CLIP's for CLIP's vocabulary.
        text: the text tower, whose length and conventions the tokenizer gets.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    if flag == NO_TOKENIZER:
        return None, "no tokenizer is stored, as --tokenizer=none asks"
    found = [Path(flag)] if flag else [folder / name for name in _FILES if (folder / name).is_file()]
    if found:
        tokenizer = _read(found[0], text)
        return tokenizer, f"tokenizer: {tokenizer.config.kind()} of {tokenizer.vocab_size} ids from {found[0]}"
    if text.vocab_size != _CLIP_VOCABULARY:
        return None, "no tokenizer is stored: no file of one lies beside the weights, pass --tokenizer=FILE"
    try:
        tokenizer = build_tokenizer(ClipBpeConfig(length=text.length), None)
    except ConfigError as error:
        return None, f"no tokenizer is stored: {error}"
    return tokenizer, f"tokenizer: CLIP's, assumed from the {text.vocab_size} ids of the model"


def import_document_tokenizer(folder: Path, flag: str, length: int) -> tuple[Tokenizer | None, str]:
    """As `import_tokenizer`, for a language model: documents end with the end token.

    Whether they begin with a start token, and which tokens these are, tokenizer_config.json says.

    Args:
        folder: where the weights lie.
        flag: see `import_tokenizer`.
        length: tokens of a row.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    if flag == NO_TOKENIZER:
        return None, "no tokenizer is stored, as --tokenizer=none asks"
    names = ("tokenizer.model", FILE_NAME)
    found = [Path(flag)] if flag else [folder / name for name in names if (folder / name).is_file()]
    if not found:
        return None, "no tokenizer is stored: no file of one lies beside the weights, pass --tokenizer=FILE"
    file = found[0]
    settings_file = file.parent / "tokenizer_config.json"
    settings = files.read_json(settings_file) if settings_file.is_file() else {}
    if CONVENTIONS in settings and file.suffix == ".json":
        config = schema.from_dict(HfTokenizerConfig, {"kind": "hf", **settings[CONVENTIONS]}, str(settings_file))
        config = dataclasses.replace(config, length=length, path=str(file))
        return build_tokenizer(config, None), f"tokenizer: {file}"
    # Llama's and Gemma's classes put the start token first and say so only if they don't.
    usual = settings.get("tokenizer_class", "").startswith(("Llama", "Gemma")) or file.suffix == ".model"
    common: dict[str, Any] = {"length": length, "sticky_eos": False, "lower": False, "path": str(file)}
    common["bos"] = bool(settings.get("add_bos_token", usual))
    if file.suffix == ".model":
        config = SentencePieceConfig(**common)
    else:
        names = {f"{role}_token": _content(settings.get(f"{role}_token")) for role in ("bos", "eos", "pad")}
        config = dataclasses.replace(HfTokenizerConfig(**common), **names)
    tokenizer = build_tokenizer(config, None)
    return tokenizer, f"tokenizer: {tokenizer.config.kind()} of {tokenizer.vocab_size} ids from {file}"


def _content(token: Any) -> str:
    """A token of tokenizer_config.json, which is a text or an object that holds one."""
    return (token["content"] if isinstance(token, dict) else token) or ""


def import_word_pieces(
    folder: Path, flag: str, conventions: WordPieceConfig, length: int
) -> tuple[Tokenizer | None, str, WordPieceConfig]:
    """As `import_tokenizer`, of an encoder of BERT's family: from a `vocab.txt`; and the settings of a run.

    Args:
        folder: where the weights lie.
        flag: the vocabulary; "none" for no tokenizer; "" for the folder's.
        conventions: how texts are cleaned, begun and ended.
        length: tokens of a text.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    settings = dataclasses.replace(conventions, length=length)
    if flag == NO_TOKENIZER:
        return None, "no tokenizer is stored, as --tokenizer=none asks", settings
    file = Path(flag) if flag else folder / "vocab.txt"
    if not flag and not file.is_file():
        return None, "no tokenizer is stored: no vocab.txt lies beside the weights, pass --tokenizer=FILE", settings
    settings = dataclasses.replace(settings, path=str(file))
    tokenizer = build_tokenizer(settings, None)
    return tokenizer, f"tokenizer: wordpiece of {tokenizer.vocab_size} ids from {file}", settings


def _read(file: Path, text: TextConfig) -> Tokenizer:
    if file.suffix == ".model":
        return _sentencepieces(file, text)
    if file.suffix != ".json":
        return build_tokenizer(ClipBpeConfig(length=text.length, path=str(file)), None)
    try:
        model = json.loads(file.read_text())["model"]
        kind, end_of_word = model["type"], model.get("end_of_word_suffix")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not a readable {FILE_NAME} ({error!r}); fetch it again") from None
    if end_of_word == "</w>" and kind == "BPE":
        return _clip_merges(model["merges"], text)
    config = _conventions(file.parent / "tokenizer_config.json", kind, text)
    return build_tokenizer(dataclasses.replace(config, length=text.length, path=str(file)), None)


def _conventions(settings_file: Path, kind: str, text: TextConfig) -> HfTokenizerConfig:
    """What a tokenizer.json does not say of itself: how texts are cleaned, begun, ended and padded."""
    settings = files.read_json(settings_file) if settings_file.is_file() else {}
    if CONVENTIONS in settings:
        return schema.from_dict(HfTokenizerConfig, {"kind": "hf", **settings[CONVENTIONS]}, str(settings_file))
    if not reads_canonical_text(text):
        return HfTokenizerConfig(bos=False)
    # SigLIP's pieces are a unigram model and padded with the end token, SigLIP 2's (Gemma's) pairs of bytes.
    return (
        SIGLIP2_TOKENIZER if kind == "BPE" else HfTokenizerConfig(bos=False, pad="eos", lower=True, canonicalize=True)
    )


def _clip_merges(merges: list[Any], text: TextConfig) -> Tokenizer:
    pairs = []
    for pair in merges:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        pairs.append((left, right))
    return Tokenizer(ClipBpeConfig(length=text.length), bpe.ClipBpe(pairs))


def _sentencepieces(file: Path, text: TextConfig) -> Tokenizer:
    config = SentencePieceConfig()
    if reads_canonical_text(text):
        config = SIGLIP_TOKENIZER
    tokenizer = build_tokenizer(dataclasses.replace(config, length=text.length, path=str(file)), None)
    if reads_canonical_text(text) and tokenizer.bos_id >= 0:
        # Gemma's model has a start token, C4's has none.
        gemma = dataclasses.replace(tokenizer.config, canonicalize=False, pad="zero")
        return Tokenizer(gemma, tokenizer.encoder)
    return tokenizer


def reads_canonical_text(text: TextConfig) -> bool:
    """Whether a text tower is SigLIP's: it sees the whole text and stands for it by its last position."""
    return text.pool == "last" and not text.causal


__all__ = [
    "NO_TOKENIZER",
    "import_document_tokenizer",
    "import_tokenizer",
    "import_word_pieces",
    "reads_canonical_text",
]
