"""WordPiece vocabularies against transformers' BertTokenizer, and those that are made of captions."""

import pickle

import numpy as np
import pytest

from vlm_jax.data.text import ALBEF_TOKENIZER, Tokenizer, WordPieceConfig, build_tokenizer
from vlm_jax.data.word_pieces import SPECIAL
from vlm_jax.schema import ConfigError, override

WORDS = [
    "a",
    "man",
    "##s",
    "dog",
    "run",
    "##ning",
    "the",
    "cafe",
    "3",
    ".",
    ",",
    "!",
    "'",
    "-",
    "##g",
    "red",
    "un",
    "##known",
]
TEXTS = [
    "A man's dog (brown), running!",
    "The Café; un-known\tdog\u0000 3.5",
    "",
    "dogs running running running running running",
    "狗 dog",
    "x" * 101,
]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join([*SPECIAL, *WORDS]) + "\n", encoding="utf-8")
    return str(file)


def test_ids_equal_berts(path):
    transformers = pytest.importorskip("transformers")
    for lower in (True, False):
        reference = transformers.BertTokenizer.from_pretrained(
            path.rsplit("/", 1)[0], do_lower_case=lower, strip_accents=None
        )
        ours = build_tokenizer(WordPieceConfig(path=path, length=12, lower=lower), None)
        rows = reference(TEXTS, padding="max_length", truncation=True, max_length=12)["input_ids"]
        np.testing.assert_array_equal(ours(TEXTS), rows)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.mask_id) == (2, 3, 0, 4)


def test_albefs_captions_have_no_separator(path):
    """[CLS] and the cleaned words, cut after 25 tokens; the reference's own tokenizer appends no [SEP] either."""
    ours = build_tokenizer(override(ALBEF_TOKENIZER, {"path": path, "length": 6}), None)
    index = {token: place for place, token in enumerate([*SPECIAL, *WORDS])}
    expected = [index[token] for token in ("[CLS]", "a", "man", "##s", "dog")]
    assert ours.encode("A man's, (dog)!") == expected
    assert ours.encode("a dog " * 20)[-1] != index["[SEP]"]
    assert len(ours.encode("a dog " * 20)) == 6
    assert ours.decode(ours.encode("a man's dog")) == "a mans dog"


def test_a_text_that_spells_a_special_token_is_no_such_token(path):
    ours = build_tokenizer(WordPieceConfig(path=path, length=12), None)
    assert 4 not in ours.encode("[MASK] dog")


def test_it_comes_back_from_a_checkpoint_and_a_pickle(path):
    ours = build_tokenizer(override(ALBEF_TOKENIZER, {"path": path}), None)
    for again in (Tokenizer.from_state(ours.state()), pickle.loads(pickle.dumps(ours))):
        np.testing.assert_array_equal(again(TEXTS), ours(TEXTS))
        assert again.mask_id == 4


def test_a_vocabulary_of_captions():
    """Characters and frequent words; no word of the captions is unknown, and the order of the captions is no matter."""
    captions = ["a red star", "a red circle", "a Blue circle"]
    config = override(ALBEF_TOKENIZER, {"vocab_size": 64})
    ours = build_tokenizer(config, captions)
    again = build_tokenizer(config, reversed(captions))
    assert ours.encoder.model_bytes() == again.encoder.model_bytes()
    assert ours.vocab_size <= 64
    assert len(ours.encode("a red circle")) == 4
    assert 1 not in ours.encode("a star clad in red"[:13])
    assert 1 not in ours.encode("sad bears")
    with pytest.raises(ConfigError, match=r"vocab_size = 8 has no room for the \d+ characters"):
        build_tokenizer(override(config, {"vocab_size": 8}), captions)


@pytest.mark.parametrize(
    ("lines", "message"),
    [(["[PAD]", "a"], "lacks \\[UNK\\], \\[CLS\\], \\[SEP\\], \\[MASK\\]"), ([*SPECIAL, "a", "a"], "names 'a' twice")],
)
def test_a_wrong_vocabulary_is_a_sentence(lines, message, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(WordPieceConfig(path=str(tmp_path)), None)
    with pytest.raises(ConfigError, match="can't be read"):
        build_tokenizer(WordPieceConfig(path=str(tmp_path / "other.txt")), None)
