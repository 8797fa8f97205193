import io
import pickle

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from vlm_jax.data.images import decode
from vlm_jax.data.sources import BadRecord, ParquetConfig, source_for_path
from vlm_jax.data.sources.parquet import RATED
from vlm_jax.schema import ConfigError


def png(value, height=6, width=9):
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def row(number, images=1, rounds=1, **ratings):
    pictures = [{"bytes": png(number + k), "path": None} for k in range(images)]
    texts = [{"user": f"q{number}.{r}", "assistant": f"a{number}.{r}", "source": "s"} for r in range(rounds)]
    return {"images": pictures, "texts": texts, **ratings}


def write(path, rows, group=4):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return str(path)


def test_rows_of_several_files_and_groups_in_any_order(tmp_path):
    write(tmp_path / "a.parquet", [row(n, images=n % 3, rounds=1 + n % 2) for n in range(10)])
    write(tmp_path / "b.parquet", [row(n) for n in range(10, 13)])
    source = pickle.loads(pickle.dumps(source_for_path(str(tmp_path)).build("")))
    assert len(source) == 13
    for n in (12, 0, 9, 4, 11, 3):
        record = source[n]
        rounds = 1 + n % 2 if n < 10 else 1
        assert [turn.text for turn in record["turns"]] == [f"{s}{n}.{r}" for r in range(rounds) for s in "qa"]
        assert [decode(image.load())[0, 0, 0] for image in record["images"]] == [
            n + k for k in range(n % 3 if n < 10 else 1)
        ]
        assert all(image.size() == (6, 9) for image in record["images"])
        assert source.texts(n) == ("\n".join(turn.text for turn in record["turns"]),)
    assert source[11]["key"] == "row 1 of group 0" and source[11]["where"].endswith("b.parquet")


def test_rounds_rated_too_low_are_left_out(tmp_path):
    rows = [
        row(0, rounds=2, relevance_ratings=[5, 1], formatting_ratings=[None, None]),
        row(1, rounds=2, relevance_ratings=[1, 1], formatting_ratings=[5, 5]),
        row(2, rounds=2, relevance_ratings=None, formatting_ratings=None),
    ]
    path = write(tmp_path / "a.parquet", rows)
    source = ParquetConfig(path=path, min_relevance=2).build("")
    assert [turn.text for turn in source[0]["turns"]] == ["q0.0", "a0.0"] and source[0]["notes"] == (RATED,)
    with pytest.raises(BadRecord, match=r"row 1 of group 0 of .* all its rounds are rated too low"):
        source[1]
    assert len(source[2]["turns"]) == 4 and "notes" not in source[2]
    assert len(ParquetConfig(path=path).build("")[1]["turns"]) == 4


def test_rows_that_cannot_be_used_are_named(tmp_path):
    rows = [
        {"images": [{"bytes": b"", "path": None}], "texts": [{"user": "a", "assistant": "b"}]},
        {"images": [], "texts": []},
        {"images": None, "texts": [{"user": "a", "assistant": None}]},
        {"images": [{"bytes": b"no image", "path": None}], "texts": [{"user": "a", "assistant": "b"}]},
    ]
    source = ParquetConfig(path=write(tmp_path / "a.parquet", rows)).build("")
    for index, why in enumerate(("neither bytes nor a path", "holds no round", "assistant of round 1 is missing")):
        with pytest.raises(BadRecord) as error:
            source[index]
        assert f"record row {index} of group 0 of {tmp_path}/a.parquet" in str(error.value) and why in str(error.value)
    with pytest.raises(ValueError, match="an image's size can't be read"):
        source[3]["images"][0].size()


def test_files_that_cannot_be_used_are_refused(tmp_path):
    path = write(tmp_path / "a.parquet", [row(0)])
    with pytest.raises(ConfigError, match=r"no column 'text' \(config.data.source.texts_key\); it has: images, texts"):
        ParquetConfig(path=path, texts_key="text").build("")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(ConfigError, match="can't be read as parquet"):
        ParquetConfig(path=path).build("")
