"""Documents from files, tokenised once and packed: every token once, the same rows again, and what is refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from vlm_jax.data.bad_records import BadRecordBudgetExceeded
from vlm_jax.data.rows import TrainRows, order_of
from vlm_jax.data.sources import ShapesConfig, TextFilesConfig
from vlm_jax.data.sources.base import BadRecord
from vlm_jax.data.sources.mixture import MixtureSource
from vlm_jax.data.text import SentencePieceConfig, Tokenizer, build_tokenizer
from vlm_jax.data.text_rows import PackedTexts, TextRows, document_ids, pack_texts
from vlm_jax.schema import ConfigError

TEXTS = [" ".join(f"word{(7 * i + k) % 23}" for k in range(1 + (5 * i) % 40)) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(SentencePieceConfig(length=32, vocab_size=300, sticky_eos=False), TEXTS)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The texts over files of all kinds, in their order by name."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS[:20])]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    (folder / "b.txt").write_text("\r\n".join(TEXTS[20:35]))
    table = pa.table({"id": list(range(25)), "text": TEXTS[35:]})
    parquet.write_table(table, folder / "c.parquet", row_group_size=7)
    (folder / "notes.md").write_text("no text of the corpus")
    return folder


def test_documents_of_every_kind_of_file(corpus: Path) -> None:
    source = TextFilesConfig(path=str(corpus)).build("")
    assert [source[i]["texts"][0].strip() for i in range(len(source))] == TEXTS
    assert source.texts(40) == (TEXTS[40],)
    assert source[36]["key"] == "number 2"
    whole = TextFilesConfig(path=str(corpus / "b.txt"), documents="files").build("")
    assert whole[0]["texts"][0].split() == " ".join(TEXTS[20:35]).split()
    assert pickle.loads(pickle.dumps(source))[59] == source[59]


def test_every_token_of_the_corpus_once(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """And a document's pieces are its tokens in order; rows are fuller than 90 %."""
    source = TextFilesConfig(path=str(corpus)).build("")
    packed = PackedTexts(source, tokenizer, 32, str(tmp_path / "cache"), 0.0)
    wanted = [document_ids(tokenizer, source.texts(i)[0]) for i in range(len(source))]
    assert all(ids[-1] == tokenizer.eos_id for ids in wanted)
    assert max(map(len, wanted)) > 64, "some documents are cut"
    pieces = [tuple(piece) for i in range(len(packed)) for piece in packed[i]["pieces"]]
    cut = [tuple(ids[start : start + 32]) for ids in wanted for start in range(0, len(ids), 32)]
    assert sorted(pieces) == sorted(cut)
    assert packed.fill > 0.9


def test_the_same_rows_from_the_cache_from_memory_and_in_a_worker(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = TextFilesConfig(path=str(corpus)).build("")
    cache = str(tmp_path / "cache")
    first = PackedTexts(source, tokenizer, 32, cache, 0.0)
    in_memory = PackedTexts(source, tokenizer, 32, "", 0.0)
    monkeypatch.setattr("vlm_jax.data.text_rows.document_ids", None)  # would fail: nothing is tokenised again
    again = PackedTexts(source, tokenizer, 32, cache, 0.0)
    elsewhere = pickle.loads(pickle.dumps(again))
    assert len(pickle.dumps(again)) < 20_000, "the tokens stay in their file"
    make = TextRows(32, tokenizer.pad_id, True, True)
    walks = [TrainRows(packed, make, seed=3) for packed in (first, in_memory, again, elsewhere)]
    for position in (0, 5, len(first) + 2, 1000):
        rows = [walk(position)[0] for walk in walks]
        for row in rows[1:]:
            for name, value in rows[0].items():
                np.testing.assert_array_equal(row[name], value)
    longer = TextFilesConfig(path=str(corpus)).build("")
    (corpus / "d.txt").write_text("one more document")
    assert TextFilesConfig(path=str(corpus)).build("").stamp != longer.stamp


def test_the_parts_of_a_mixture_keep_their_shares_of_the_rows(tokenizer: Tokenizer) -> None:
    """One row in three of a part of few documents, and no row of two parts."""
    few, many = ShapesConfig(count=5).build(""), ShapesConfig(split="test", count=60).build("")
    mixture = MixtureSource(["few", "many"], [few, many], [1, 2])
    packed = pack_texts(mixture, tokenizer, 64, "", 0.0)
    assert isinstance(packed, MixtureSource)
    assert len(packed.sources[0]) < len(packed.sources[1]) / 4
    order = order_of(packed, seed=0)
    drawn = [packed[order.index(position)]["where"] for position in range(30)]
    assert sum(where.startswith("few: ") for where in drawn) == 10


def row(isolated: bool, prefix: bool, rng: Any = None) -> dict[str, np.ndarray]:
    record = {"pieces": [np.arange(3, 8), np.arange(20, 24), np.asarray([9])]}
    return TextRows(12, 0, isolated, prefix)(record, rng)


def test_a_row_by_hand() -> None:
    made = row(True, True)
    np.testing.assert_array_equal(made["tokens"], [3, 4, 5, 6, 7, 20, 21, 22, 23, 9, 0, 0])
    np.testing.assert_array_equal(made["segments"], [1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 0, 0])
    np.testing.assert_array_equal(made["positions"][:10], [0, 1, 2, 3, 4, 0, 1, 2, 3, 0])
    np.testing.assert_array_equal(made["prefix"], [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0])
    assert {value.dtype.name for name, value in made.items() if name != "prefix"} == {"int32"}
    joined = row(False, False)
    np.testing.assert_array_equal(joined["segments"], [1] * 10 + [0] * 2)
    np.testing.assert_array_equal(joined["positions"], np.arange(12))
    assert "prefix" not in joined


def test_prefixes_are_random_and_leave_a_token() -> None:
    made = [row(True, True, np.random.default_rng(seed))["prefix"] for seed in range(50)]
    assert {int(prefix[:5].sum()) for prefix in made} == {0, 1, 2, 3, 4}
    assert not any(prefix[9] for prefix in made)


def test_documents_that_can_not_be_read_are_left_out_up_to_the_budget(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "word1 word2"}\n{"title": "word3"}\nno json\n{"text": 7}\n{"text": "word4"}\n')
    source = TextFilesConfig(path=str(file)).build("")
    with pytest.raises(BadRecord, match=r"number 2 of .*it is no object with 'text' .*it has: title"):
        source[1]
    with pytest.raises(BadRecord, match=r"number 4 .*a int, not a text"):
        source[3]
    assert len(PackedTexts(source, tokenizer, 32, "", 3)) == 1
    with pytest.raises(BadRecordBudgetExceeded, match=r"3 of 5 records can't be used, 2 are allowed"):
        PackedTexts(source, tokenizer, 32, "", 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n\n", r"holds no document"),
        ("a.csv", "text", r"holds no files of text \(\*\.jsonl, \*\.txt, \*\.parquet\)"),
        ("a.parquet", "not parquet", r"can't be read as parquet"),
    ],
)
def test_what_is_no_corpus_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        TextFilesConfig(path=str(tmp_path)).build("")


def test_a_column_that_is_missing_is_named(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"no column 'content' \(config\.data\.source\.text_key\); it has: id, text"):
        TextFilesConfig(path=str(corpus / "c.parquet"), text_key="content").build("")
