"""Against the public implementation and its merges file; needs the extra `parity` and open_clip_torch."""

import importlib.util
import os

import numpy as np
import pytest
import regex

from vlm_jax.data import bpe
from vlm_jax.data.text import ClipBpeConfig, build_tokenizer

ALPHABET = [
    chr(code)
    for code in (
        *range(32, 127),
        *range(0xA1, 0x250),
        *range(0x400, 0x460),
        *range(0x4E00, 0x4E20),
        *range(0x660, 0x66A),
    )
]
ALPHABET += list("'''''stremlvd      eeeeaaaaooootttthhhnnn")


def random_texts(count, length):
    rng = np.random.default_rng(0)
    return ["".join(ALPHABET[i] for i in rng.integers(len(ALPHABET), size=length)) for _ in range(count)]


def open_clip_tokenizer():
    """open_clip's class, loaded from its file: importing the package would need torchvision."""
    path = os.path.join(os.path.dirname(bpe.find_merges_file()), "tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def test_merges_file_is_the_public_one():
    tokenizer = build_tokenizer(ClipBpeConfig(), None)
    assert tokenizer.vocab_size == 49408
    assert tokenizer(["a photo of a cat."])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 269, 49407]


@pytest.mark.parametrize("length", [20, 200])
def test_rows_equal_open_clips(length):
    texts = ["", "Hello, World's 123 café &amp; ☕  naïve", "日本語", "&amp;lt; x", *random_texts(300, length)]
    expected = open_clip_tokenizer()(texts).numpy()
    np.testing.assert_array_equal(build_tokenizer(ClipBpeConfig(fix_text=True), None)(texts), expected)


def test_pieces_equal_the_regex_package_on_random_texts():
    pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
    for text in random_texts(3000, 30):
        assert bpe.split_pieces(text) == pattern.findall(text)
