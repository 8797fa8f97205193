import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hf_models import CAPTIONS, MODELS, NASTY, TEXTS

from vlm_jax import schema
from vlm_jax.data.text import SIGLIP2_TOKENIZER, HfTokenizerConfig, Tokenizer, TokenizerConfig, build_tokenizer
from vlm_jax.schema import ConfigError

SPECIAL = {  # kind -> (bos, eos, pad) and all special ids, by how the models are made
    "byte_bpe": ((1, 2, 0), {0, 1, 2}),
    "word_piece": ((2, 3, 0), {0, 2, 3, 4}),
    "unigram": ((3, 1, 0), {0, 1, 3}),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """(kind, path of the file, the library's tokenizer without its template)."""
    path, tokenizer = tmp_path_factory.mktemp(request.param) / "tokenizer.json", MODELS[request.param]()
    tokenizer.save(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return request.param, path, tokenizer


def test_ids_are_the_librarys_between_the_roles_tokens(model):
    kind, path, reference = model
    tokenizer = build_tokenizer(HfTokenizerConfig(path=str(path), length=24), None)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == SPECIAL[kind][0]
    assert tokenizer.vocab_size == reference.get_vocab_size()
    for text in [*TEXTS, *CAPTIONS]:
        if "</s>" in text:
            continue
        ids = reference.encode(text, add_special_tokens=False).ids
        expected = [tokenizer.bos_id, *ids[:22], tokenizer.eos_id]
        row = tokenizer([text])[0]
        assert row.tolist() == expected + [tokenizer.pad_id] * (24 - len(expected))
    folder = build_tokenizer(HfTokenizerConfig(path=str(path.parent), length=24), None)
    assert folder.state()["model"] == tokenizer.state()["model"]


def test_no_text_yields_a_special_token(model):
    kind, path, reference = model
    tokenizer = build_tokenizer(HfTokenizerConfig(path=str(path), length=64), None)
    hidden = tokenizer.encoder._writer.get_vocab()
    for text in [*NASTY, *(piece for piece in hidden if ord(piece[0]) > 0xFFFF), *(f"a {piece}" for piece in hidden)]:
        ids = tokenizer.encode(text)[1:-1]
        assert not SPECIAL[kind][1] & set(ids), text
        assert ids
    assert SPECIAL[kind][1] & set(reference.encode("</s> a [SEP]", add_special_tokens=False).ids)  # it would
    if kind == "byte_bpe":
        mask, line = reference.token_to_id("<mask>"), reference.token_to_id("<br>")
        assert mask not in tokenizer.encode("a <mask>")
        assert line in tokenizer.encode("a <br>")  # a token that is not special belongs to the language
        assert tokenizer.decode(tokenizer.encode("a </s><s> b")) == "a </s><s> b"


def test_state_pickle_and_threads(model):
    _, path, _ = model
    tokenizer = build_tokenizer(HfTokenizerConfig(path=str(path), length=16), None)
    texts = [*TEXTS, *NASTY, *CAPTIONS]
    state = json.loads(json.dumps(tokenizer.state()))
    path.rename(path.with_suffix(".moved"))
    try:
        for other in (Tokenizer.from_state(state), pickle.loads(pickle.dumps(tokenizer))):
            np.testing.assert_array_equal(other(texts), tokenizer(texts))
            assert other.state() == tokenizer.state()
            assert (other.vocab_size, other.pad_id, other.eos_id) == (
                tokenizer.vocab_size,
                tokenizer.pad_id,
                tokenizer.eos_id,
            )
    finally:
        path.with_suffix(".moved").rename(path)
    with ThreadPoolExecutor(8) as pool:
        for rows in pool.map(tokenizer, [texts] * 8):
            np.testing.assert_array_equal(rows, tokenizer(texts))


def test_decoding_gives_the_text(model):
    kind, path, _ = model
    tokenizer = build_tokenizer(HfTokenizerConfig(path=str(path), length=40), None)
    texts = ["a photo of a tiny teal cat"] + (["Naïve 東京 🐕"] if kind == "byte_bpe" else [])
    for text in texts:
        assert tokenizer.decode(tokenizer([text])[0]) == text


def test_roles_by_name_and_what_is_wrong(model, tmp_path):
    kind, path, reference = model
    names = {"byte_bpe": "<mask>", "word_piece": "[MASK]", "unigram": "<bos>"}
    token, expected = names[kind], reference.token_to_id(names[kind])
    config = HfTokenizerConfig(path=str(path), eos_token=token, pad="eos", length=8, bos=False)
    tokenizer = build_tokenizer(config, None)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (expected, expected)
    assert tokenizer([""])[0].tolist() == [expected] * 8
    assert schema.from_dict(TokenizerConfig, schema.to_dict(config)) == config
    with pytest.raises(ConfigError, match=r"pad_token = '<none>' is not in the vocabulary; its special .*: .*[>\]]"):
        build_tokenizer(HfTokenizerConfig(path=str(path), pad_token="<none>"), None)
    with pytest.raises(ConfigError, match=r"no file and no folder with a tokenizer\.json"):
        build_tokenizer(HfTokenizerConfig(path=str(tmp_path)), None)
    for content in (b"", b"{}", b"\xff", b"[1]"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"can't be read as a tokenizer\.json"):
            build_tokenizer(HfTokenizerConfig(path=str(tmp_path / "bad.json")), None)


def test_a_vocabulary_without_a_role_is_refused_where_the_role_is_asked_for(tmp_path):
    stored = json.loads(MODELS["byte_bpe"]().to_str())
    text = json.dumps(stored).replace('"<s>"', '"<other>"')
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match="bos asks for a token"):
        build_tokenizer(HfTokenizerConfig(path=str(tmp_path)), None)
    assert build_tokenizer(HfTokenizerConfig(path=str(tmp_path), bos=False), None).bos_id == -1


def test_siglip2_conventions(tmp_path):
    """Lower-cased, no start token, an end token also where the text is cut, padding with 0, 64 ids."""
    reference = MODELS["unigram"]()
    reference.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer(schema.override(SIGLIP2_TOKENIZER, {"path": str(tmp_path)}), None)
    ids = reference.encode("a photo, of a cat!").ids
    assert tokenizer(["A Photo, of a CAT!"])[0].tolist() == ids + [1] + [0] * (63 - len(ids))
    long = tokenizer(["cat dog " * 60])[0]
    assert long.shape == (64,)
    assert long[-1] == 1
    assert 1 not in long[:-1]
