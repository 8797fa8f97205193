import base64
import gzip
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from vlm_jax import schema
from vlm_jax.data import bpe, sentencepieces
from vlm_jax.data.text import (
    ClipBpeConfig,
    SentencePieceConfig,
    Tokenizer,
    TokenizerConfig,
    build_tokenizer,
    canonicalize,
)
from vlm_jax.schema import ConfigError

CAPTIONS = [
    f"a photo of a {size} {color} {thing}"
    for size in ("big", "tiny")
    for color in ("red", "teal")
    for thing in ("cat", "dog")
]
NASTY = [
    "<|endoftext|>", "<|startoftext|>", "<start_of_text>", "<end_of_text>", "</s>", "<s>", "<unk>", "<pad>", "<image>",
    "a<|endoftext|>b", "<0x00>", "<0x41>", "&lt;|endoftext|&gt;", "<|ENDOFTEXT|>", "x<image><image>y </s>",
]  # fmt: skip


@pytest.fixture(scope="module")
def clip():
    """CLIP's tokenizer as far as the golden texts go: their merges at their ranks, the others replaced by fillers."""
    merges = [(f"filler{rank}", "x") for rank in range(bpe.MAX_MERGES)]
    for line in (Path(__file__).parent / "clip_merges_subset.txt").read_text("utf-8").splitlines():
        if not line.startswith("#"):
            rank, left, right = line.split()
            merges[int(rank)] = (left, right)
    return Tokenizer(ClipBpeConfig(), bpe.ClipBpe(merges))


@pytest.fixture(scope="module")
def pieces():
    config = SentencePieceConfig(length=24, vocab_size=400, user_symbols=("<image>", "<sep>"))
    return build_tokenizer(config, CAPTIONS)


@pytest.fixture(scope="module")
def merges_file(tmp_path_factory):
    """A file in the public format with five merges."""
    path = tmp_path_factory.mktemp("bpe") / "merges.txt"
    path.write_text('"own"#version: 0.2\nc a\nca t</w>\nt h\nth e</w>\nd o\n')
    return str(path)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat.", [320, 1125, 539, 320, 2368, 269]),
        (
            "Hello, World's 123 café &amp; ☕  naïve",
            [3306, 267, 1002, 568, 272, 273, 274, 15304, 261, 26561, 1097, 35689, 563],
        ),
        ("", []),
        ("  \n\t ", []),
        ("日本語", [39121, 44353, 34002, 508]),
    ],
)
def test_clip_golden_ids(clip, text, ids):
    row = clip([text])[0]
    assert row.dtype == np.int32
    assert row.tolist() == [49406, *ids, 49407] + [0] * (75 - len(ids))
    assert (clip.vocab_size, clip.bos_id, clip.eos_id, clip.pad_id) == (49408, 49406, 49407, 0)


def test_clip_cuts_long_texts_and_keeps_the_end(clip):
    row = clip(["cat " * 100])[0]
    assert row.tolist() == [49406] + [2368] * 75 + [49407]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("don't", ["don", "'t"]),
        (
            "We'LL they've I'm he'd it's we're",
            ["We", "'LL", "they", "'ve", "I", "'m", "he", "'d", "it", "'s", "we", "'re"],
        ),
        ("!'s", ["!'", "s"]),
        ("'tis", ["'t", "is"]),
        ("a1²b Ⅷ", ["a", "1", "²", "b", "Ⅷ"]),
        ("x_y--z", ["x", "_", "y", "--", "z"]),
        ("a\u00a0b\u2003c", ["a", "b", "c"]),
        ("é e\u0301", ["é", "e", "\u0301"]),
        ("'ſ", ["'ſ"]),
        ("🐕🐈 ok", ["🐕🐈", "ok"]),
    ],
)
def test_pieces_are_those_of_clips_pattern(text, expected):
    assert bpe.split_pieces(text) == expected


def test_own_merges_apply_in_rank_order(merges_file):
    tokenizer = build_tokenizer(ClipBpeConfig(path=merges_file, length=8), None)
    assert tokenizer.vocab_size == 512 + 5 + 2
    symbols = list(bpe.byte_symbols().values())
    cat, the, do = 512 + 1, 512 + 3, 512 + 4
    assert tokenizer.encode("cat") == [517, cat, 518]
    assert tokenizer.encode("the dog") == [517, the, do, 256 + symbols.index("g"), 518]
    assert tokenizer.encode("th") == [517, symbols.index("t"), 256 + symbols.index("h"), 518]  # "t h" ends no word


def test_merges_files_gzip_plain_and_broken(tmp_path, merges_file):
    plain = Path(merges_file).read_bytes()
    packed = tmp_path / "merges.txt.gz"
    packed.write_bytes(gzip.compress(plain))
    assert bpe.load_clip_bpe(str(packed), False).merges == bpe.load_clip_bpe(merges_file, False).merges
    for content, message in (
        (b"#version\na b\na b c\n", "line 3"),
        (b"", "no merges"),
        (gzip.compress(plain)[:30], "can't be read"),
    ):
        packed.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            bpe.load_clip_bpe(str(packed), False)
    with pytest.raises(ConfigError, match="is not a file"):
        bpe.load_clip_bpe(str(tmp_path / "absent"), False)


def test_missing_open_clip_says_what_to_install(monkeypatch):
    monkeypatch.setattr(bpe.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install open_clip_torch"):
        build_tokenizer(ClipBpeConfig(), None)


@pytest.mark.parametrize("text", NASTY)
def test_no_text_yields_a_special_token(clip, pieces, merges_file, text):
    own = build_tokenizer(ClipBpeConfig(path=merges_file), None)
    for tokenizer in (clip, own):
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode(text)[1:-1])
    ids = pieces.encode(text)[:-1]
    image, separator = pieces.encoder._reader.piece_to_id(["<image>", "<sep>"])
    assert [image, separator] == [3, 4]
    assert not {sentencepieces.PAD_ID, sentencepieces.EOS_ID, sentencepieces.UNK_ID, image, separator} & set(ids)
    assert pieces.decode(ids).replace(" ", "") == text.lower().replace(" ", "")


def test_sentencepiece_would_match_user_symbols_without_the_guard(pieces):
    """Shows that the test above tests something."""
    assert 3 in pieces.encoder._reader.encode("<image>")


@pytest.mark.parametrize("text", ["a photo of a tiny teal cat", "東京 🐕", "naïve café", "x  y", "zebra £5"])
def test_sentencepiece_round_trip_without_unknowns(pieces, text):
    ids = pieces([text])[0]
    assert sentencepieces.UNK_ID not in ids
    assert pieces.decode(ids) == " ".join(text.split())
    assert pieces.encoder.decode([*ids, pieces.vocab_size, pieces.vocab_size + 40]) == pieces.encoder.decode(ids)
    assert ids.shape == (24,)


def test_identity_normalisation_keeps_case(pieces):
    config = SentencePieceConfig(length=24, vocab_size=400, normalization="identity")
    tokenizer = build_tokenizer(config, CAPTIONS)
    assert tokenizer.decode(tokenizer(["Red CAT"])[0]) == "Red CAT"
    assert pieces.decode(pieces(["Red CAT"])[0]) == "red cat"


def test_training_is_deterministic_and_survives_few_captions():
    assert sentencepieces.train(CAPTIONS, 400) == sentencepieces.train(iter(CAPTIONS), 400)
    small = build_tokenizer(SentencePieceConfig(length=8), ["one caption"])
    assert 259 < small.vocab_size < 8192
    assert small.decode(small(["one caption"])[0]) == "one caption"
    with pytest.raises(ConfigError, match="no caption"):
        build_tokenizer(SentencePieceConfig(), ["", "  "])
    with pytest.raises(ConfigError, match="no captions"):
        build_tokenizer(SentencePieceConfig(), None)


def test_conventions(merges_file):
    def row(text="cat dog", length=6, **options):
        return build_tokenizer(ClipBpeConfig(path=merges_file, length=length, **options), None)([text])[0].tolist()

    cat, do, g = 513, 516, 256 + list(bpe.byte_symbols().values()).index("g")
    assert row() == [517, cat, do, g, 518, 0]
    assert row(pad="eos") == [517, cat, do, g, 518, 518]
    assert row(bos=False) == [cat, do, g, 518, 0, 0]
    assert row(eos=False, sticky_eos=False) == [517, cat, do, g, 0, 0]
    assert row(length=3) == [517, cat, 518]
    assert row(length=3, sticky_eos=False) == [517, cat, do]
    assert row("CAT") == [517, cat, 518, 0, 0, 0]
    assert row("CAT", lower=False) != row("CAT")
    assert row("c_a,t", canonicalize=True) == row("c at")


def test_canonicalize_is_siglips():
    """Examples of big_vision's canonicalize_text, which lower-cases too."""
    assert canonicalize("Hello,  World_of  {things}!") == "Hello World of things"


@pytest.mark.parametrize("name", ["clip", "pieces"])
def test_state_and_pickle_rebuild_the_same_tokenizer(name, request):
    tokenizer = request.getfixturevalue(name)
    texts = ["a photo of a cat", "東京 🐕", "", *NASTY]
    state = json.loads(json.dumps(tokenizer.state()))
    for other in (Tokenizer.from_state(state), pickle.loads(pickle.dumps(tokenizer))):
        np.testing.assert_array_equal(other(texts), tokenizer(texts))
        assert other.config == tokenizer.config
        assert other.state() == tokenizer.state()
        assert (other.vocab_size, other.pad_id) == (tokenizer.vocab_size, tokenizer.pad_id)


def test_threads_agree(clip, pieces):
    texts = CAPTIONS * 20
    for tokenizer in (clip, pieces):
        expected = tokenizer(texts)
        with ThreadPoolExecutor(8) as pool:
            for rows in pool.map(tokenizer, [texts] * 8):
                np.testing.assert_array_equal(rows, expected)


def test_given_model_file(tmp_path, pieces):
    path = tmp_path / "own.model"
    path.write_bytes(base64.b64decode(pieces.state()["model"]))
    tokenizer = build_tokenizer(SentencePieceConfig(path=str(path), length=24), None)
    np.testing.assert_array_equal(tokenizer(CAPTIONS), pieces(CAPTIONS))
    with pytest.raises(ConfigError, match="bos asks for a token"):
        build_tokenizer(SentencePieceConfig(path=str(path), bos=True), None)
    path.write_bytes(b"no model")
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        build_tokenizer(SentencePieceConfig(path=str(path)), None)
    with pytest.raises(ConfigError, match="train_tokenizer"):
        build_tokenizer(SentencePieceConfig(path=str(tmp_path / "absent")), None)


def test_one_text_is_not_a_list_of_letters(clip):
    with pytest.raises(TypeError, match="list of texts"):
        clip("cat")


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (ClipBpeConfig(length=2), "length"),
        (ClipBpeConfig(eos=False), "sticky_eos"),
        (SentencePieceConfig(vocab_size=100), "vocab_size"),
        (SentencePieceConfig(bos=True), "bos"),
    ],
)
def test_impossible_configs_name_the_key(config, key):
    with pytest.raises(ConfigError, match=f"tokenizer.{key} "):
        schema.validate(config, "config.data.tokenizer")
    assert schema.from_dict(TokenizerConfig, schema.to_dict(config)) == config
