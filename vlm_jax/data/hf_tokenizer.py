"""Tokenizers in the format of HF's `tokenizer.json` (BPE, WordPiece, Unigram) as encoders, by the package tokenizers.

Text that spells a special token (`</s>`, `[SEP]`) is encoded as ordinary characters. The library's own switch for that
(`encode_special_tokens`) is not enough: where the vocabulary holds the token as a piece, a Unigram or whole-word model
finds it in plain text. So texts are encoded by a copy of the tokenizer in which special tokens have another spelling.
"""

import gzip
import json
import os
from collections.abc import Sequence
from typing import Any

import tokenizers

from vlm_jax.schema import ConfigError

FILE_NAME = "tokenizer.json"
_MARK = "\U0010fffe"  # a code point that is no character and never will be; it is removed from texts
_USUAL = {
    "bos": ("<s>", "<bos>", "[CLS]", "<|startoftext|>", "<|begin_of_text|>", "<start_of_text>"),
    "eos": ("</s>", "<eos>", "[SEP]", "<|endoftext|>", "<|end_of_text|>", "<end_of_text>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
}
_MASKS = ("[MASK]", "<mask>")


class HfTokenizer:
    """Encoder of a `tokenizer.json`, without context length, padding or the file's own template of special tokens.

    Args:
        model: the file's bytes.
        names: the tokens of the roles "bos", "eos" and "pad"; "" finds a usual one. Roles without a token get the id
            -1, padding 0. `mask_id` is that of the usual mask token, or -1.

    Raises:
        ConfigError: the bytes are no such tokenizer, or a token that is named is not in it.
    """

    def __init__(self, model: bytes, names: dict[str, str]):
        self.model, self.names = model, names
        self._prepare()

    def _prepare(self) -> None:
        try:
            self._reader = tokenizers.Tokenizer.from_buffer(self.model)
            vocabulary = self._reader.get_vocab(with_added_tokens=True)
        except ValueError as error:
            raise ConfigError(f"the tokenizer can't be read as a {FILE_NAME} ({error}); fetch it again") from None
        found = {role: self._find(role, name, vocabulary) for role, name in self.names.items()}
        ids = {role: vocabulary[token] if token else -1 for role, token in found.items()}
        self._special = {t.content: i for i, t in self._reader.get_added_tokens_decoder().items() if t.special}
        self._special |= {token: vocabulary[token] for token in found.values() if token}
        self.vocab_size = max(vocabulary.values()) + 1
        self.bos_id, self.eos_id, self.pad_id = ids["bos"], ids["eos"], max(0, ids["pad"])
        self.mask_id = next((vocabulary[token] for token in _MASKS if token in vocabulary), -1)
        disguised = _disguise(json.loads(self.model), {token for token in found.values() if token})
        self._writer = tokenizers.Tokenizer.from_str(json.dumps(disguised))

    def _find(self, role: str, name: str, vocabulary: dict[str, int]) -> str:
        special = [token.content for token in self._reader.get_added_tokens_decoder().values() if token.special]
        if name and name not in vocabulary:
            raise ConfigError(
                f"config.data.tokenizer.{role}_token = {name!r} is not in the vocabulary; "
                f"its special tokens are: {', '.join(special) or '(none)'}"
            )
        return name or next((token for token in _USUAL[role] if token in special), "")

    def __getstate__(self) -> dict[str, object]:
        return {"model": self.model, "names": self.names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.model, self.names = state["model"], state["names"]
        self._prepare()

    def clean(self, text: str) -> str:
        """The text itself: the file holds its own normalisation."""
        return text

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens excluded."""
        return self._writer.encode(text.replace(_MARK, ""), add_special_tokens=False).ids

    def special_id(self, token: str) -> int:
        """The id of a special token, -1 where the vocabulary has none of this name."""
        return self._special.get(token, -1)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens vanish."""
        return self._reader.decode([int(i) for i in ids], skip_special_tokens=True)

    def model_bytes(self) -> bytes:
        """The file, compressed: those of large vocabularies have tens of megabytes."""
        return gzip.compress(self.model, mtime=0)


def _disguise(stored: dict[str, Any], special: set[str]) -> dict[str, Any]:
    """The tokenizer with its special tokens respelt: same ids, but no text can spell them."""
    special = special | {token["content"] for token in stored["added_tokens"] if token["special"]}
    for token in stored["added_tokens"]:
        if token["content"] in special:
            token["content"] = _MARK + token["content"]
    model = stored["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {_MARK + piece if piece in special else piece: i for piece, i in model["vocab"].items()}
    else:
        model["vocab"] = [[_MARK + piece if piece in special else piece, score] for piece, score in model["vocab"]]
    if model.get("unk_token") in special:
        model["unk_token"] = _MARK + model["unk_token"]
    return stored | {"post_processor": None, "truncation": None, "padding": None}


def load_hf_tokenizer(path: str, names: dict[str, str]) -> HfTokenizer:
    """The encoder of a `tokenizer.json`, or of a folder that holds one.

    Raises:
        ConfigError: there is none, or it can't be read.
    """
    file_path = os.path.join(path, FILE_NAME) if os.path.isdir(path) else path
    if not os.path.isfile(file_path):
        raise ConfigError(
            f"config.data.tokenizer.path = {path!r} is no file and no folder with a {FILE_NAME}; give the "
            f"{FILE_NAME} of a Hugging Face tokenizer"
        )
    with open(file_path, "rb") as file:
        return HfTokenizer(file.read(), names)
