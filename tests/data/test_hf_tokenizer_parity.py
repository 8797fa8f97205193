"""Against transformers' own tokenizer classes, on models trained here."""

import json
import string

import numpy as np
import pytest
from hf_models import CAPTIONS, MODELS, TEXTS
from transformers import PreTrainedTokenizerFast, Siglip2Tokenizer, SiglipTokenizer

from vlm_jax import schema
from vlm_jax.data.text import (
    SIGLIP2_TOKENIZER,
    SIGLIP_TOKENIZER,
    HfTokenizerConfig,
    build_tokenizer,
    canonicalize,
)

ROLES = {
    "byte_bpe": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    "word_piece": {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]"},
    "unigram": {"bos_token": "<bos>", "eos_token": "</s>", "pad_token": "<pad>"},
}
CLEAN = [text for text in (*TEXTS, *CAPTIONS) if "</s>" not in text]


@pytest.mark.parametrize("kind", MODELS)
def test_rows_and_decoding_equal_transformers(kind, tmp_path):
    path = str(tmp_path / "tokenizer.json")
    MODELS[kind]().save(path)
    reference = PreTrainedTokenizerFast(tokenizer_file=path, **ROLES[kind])
    reference.backend_tokenizer.post_processor = None
    ours = build_tokenizer(HfTokenizerConfig(path=path, length=20, bos=False, eos=False, sticky_eos=False), None)
    theirs = reference(CLEAN, padding="max_length", max_length=20, truncation=True, padding_side="right")["input_ids"]
    np.testing.assert_array_equal(ours(CLEAN), theirs)
    assert ours.vocab_size == len(reference)
    for row in theirs:
        assert ours.decode(row) == reference.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_siglip_rows_equal_transformers(tmp_path):
    """SiglipTokenizer on a SentencePiece model with our conventions: pad with the end token, canonical text."""
    ours = build_tokenizer(schema.override(SIGLIP_TOKENIZER, {"vocab_size": 400, "length": 24}), CAPTIONS)
    (tmp_path / "spiece.model").write_bytes(ours.encoder.model_bytes())
    theirs = SiglipTokenizer(str(tmp_path / "spiece.model"), pad_token="</s>", model_max_length=24)
    texts = ["A photo of a TINY cat.", "Hello,  World! {}", "the dog's (red) sign", "", "cat " * 40, *CLEAN]
    rows = theirs(texts, padding="max_length", truncation=True, max_length=24)["input_ids"]
    np.testing.assert_array_equal(ours(texts), rows)
    for text in [string.printable, "a-b c", "Ünï, çödé!  "]:
        assert canonicalize(text.lower().replace("_", "")) == theirs.canonicalize_text(text.replace("_", ""))


def test_siglip2_rows_equal_transformers(tmp_path):
    """Siglip2Tokenizer lower-cases before Gemma's byte-fallback BPE; its template ends texts with <eos>."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = special + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *string.ascii_lowercase, "ca", "cat", "▁cat"]
    theirs = Siglip2Tokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=[("c", "a"), ("ca", "t"), ("▁", "cat")]
    )
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = build_tokenizer(schema.override(SIGLIP2_TOKENIZER, {"path": str(tmp_path), "length": 12}), None)
    for text in ["A Cat", "the cat", "Ünï cats 東", "", "a long text of many letters"]:
        ids = theirs.encode(text, add_special_tokens=False)
        row = [*ids[:11], 1]
        assert ours([text])[0].tolist() == row + [0] * (12 - len(row))
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"
