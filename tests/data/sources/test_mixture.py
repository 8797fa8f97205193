import dataclasses
import pickle

import numpy as np
import pytest

from vlm_jax import schema
from vlm_jax.data.captions import captions
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.rows import EvalRows, Schedule, TrainRows, host_batches, order_of
from vlm_jax.data.sources import BadRecord, CsvConfig, DigitsConfig, MixtureConfig, MixturePart, ShapesConfig
from vlm_jax.data.sources.mixture import MixtureSource
from vlm_jax.schema import ConfigError

CONFIG = MixtureConfig(
    (
        MixturePart("digits", DigitsConfig(split="test"), weight=2),
        MixturePart("shapes", ShapesConfig(count=60, image_size=16), weight=1),
    )
)


class Lettered:
    """Records that say their letter and number; the bad ones can't be read."""

    class_names = ()

    def __init__(self, letter, length, bad=()):
        self.letter, self.length, self.bad = letter, length, frozenset(bad)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.bad:
            raise BadRecord(f"{self.letter}.tar", str(index), "it is bad")
        return {"image": None, "texts": self.texts(index), "key": str(index), "where": f"{self.letter}.tar"}

    def texts(self, index):
        return (f"{self.letter}{index}",)


def spell(record, rng):
    letter, number = record["texts"][0][0], int(record["texts"][0][1:])
    return {"letter": np.asarray(ord(letter)), "number": np.asarray(number)}


def test_records_are_those_of_the_parts_end_to_end():
    source, digits = CONFIG.build(""), DigitsConfig(split="test").build("")
    assert len(source) == len(digits) + 60
    copy = pickle.loads(pickle.dumps(source))
    for index in (0, len(digits) - 1):
        assert source[index]["texts"] == digits[index]["texts"] == copy.texts(index)
        assert source[index]["where"] == "digits: digits"
    assert source[len(digits)]["where"] == "shapes: shapes"
    assert source.texts(len(digits) + 59) == ShapesConfig(count=60, image_size=16).build("").texts(59)
    with pytest.raises(IndexError):
        source[len(source)]
    texts = list(captions(source, 1000))
    assert sum("digit" in text for text in texts) == 2 * len(digits)
    assert any("small" in text for text in texts)


def test_labels_stay_where_the_classes_are_the_same():
    both = MixtureConfig(tuple(MixturePart(s, DigitsConfig(split=s)) for s in ("train", "test"))).build("")
    assert both.class_names == DigitsConfig().build("").class_names
    assert both[1500]["label"] == DigitsConfig(split="test").build("")[1500 - 1442]["label"]
    mixed = CONFIG.build("")
    assert mixed.class_names == ()
    assert "label" not in mixed[0]


def test_training_draws_in_proportion_whatever_hosts_and_threads():
    source = MixtureSource("abc", [Lettered("a", 4), Lettered("b", 50), Lettered("c", 9)], (2, 1, 1))
    rows = TrainRows(source, spell, seed=5)
    expected = [rows(position)[0] for position in range(96)]
    letters = "".join(chr(int(row["letter"])) for row in expected)
    assert [letters.count(letter) for letter in "abc"] == [48, 24, 24]
    for start in range(0, 96, 4):
        assert sorted(letters[start : start + 4]) == list("aabc")
    small = [int(row["number"]) for row, letter in zip(expected, letters, strict=True) if letter == "a"]
    for epoch in range(12):
        assert sorted(small[4 * epoch : 4 * epoch + 4]) == [0, 1, 2, 3]
    for hosts, threads in ((1, 3), (2, 1), (4, 2)):
        for host_rows in np.split(np.arange(16), hosts):
            batches = iter(
                host_batches(rows, Schedule(16, 16, host_rows, threads, workers=0, batches=None), prefetch=1)
            )
            for number in range(1, 4):
                batch, _ = next(batches)
                for place, row in enumerate(host_rows):
                    assert {key: int(value[place]) for key, value in batch.items()} == expected[16 * number + row]
            batches.close()
    assert [order_of(source, 6).index(p) for p in range(40)] != [order_of(source, 5).index(p) for p in range(40)]


def test_a_bad_record_is_replaced_from_its_own_part_and_named():
    source = MixtureSource("ab", [Lettered("a", 6, bad={1, 2}), Lettered("b", 6)], (1, 1))
    clean = TrainRows(MixtureSource("ab", [Lettered("a", 6), Lettered("b", 6)], (1, 1)), spell, seed=0)
    rows = TrainRows(source, spell, seed=0)
    replaced = 0
    for position in range(48):
        example, failures = rows(position)
        assert example["letter"] == clean(position)[0]["letter"]
        replaced += bool(failures)
        assert all(str(failure).endswith("of a: a.tar can't be used: it is bad") for failure in failures)
        assert all(failure.index in (1, 2) for failure in failures)
    assert replaced == 8
    evaluation = EvalRows(source, spell)
    found = [evaluation(p)[0] for p in range(13)]
    assert [bool(row["mask"]) for row in found] == [True, False, False] + [True] * 9 + [False]
    assert "".join(chr(int(row["letter"])) for row in found if row["mask"]) == "aaaabbbbbb"


def test_mixtures_nest():
    inner = MixtureSource("ab", [Lettered("a", 3), Lettered("b", 3)], (1, 2))
    rows = TrainRows(MixtureSource(("in", "c"), [inner, Lettered("c", 5)], (1, 1)), spell, seed=0)
    letters = "".join(chr(int(rows(p)[0]["letter"])) for p in range(60))
    assert [letters.count(letter) for letter in "abc"] == [10, 20, 30]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MixtureConfig(), r"source.sources is empty"),
        (MixtureConfig((MixturePart("a", DigitsConfig(), weight=0),)), r"sources.a.weight = 0 must be positive"),
        (MixtureConfig((MixturePart("a", DigitsConfig(), weight=-1.5),)), r"sources.a.weight = -1.5 must be positive"),
        (MixtureConfig((MixturePart("a", DigitsConfig()),) * 2), "two parts named 'a'"),
        (MixtureConfig((MixturePart("a.b", DigitsConfig()),)), "use letters"),
        (
            MixtureConfig((MixturePart("a", DigitsConfig(), 1e-9), MixturePart("b", DigitsConfig()))),
            "less than 1/65536 of all weights",
        ),
        (MixtureConfig((MixturePart("a", DigitsConfig(templates=())),)), r"sources.a.source.templates is empty"),
    ],
)
def test_impossible_mixtures_name_the_key(config, message):
    with pytest.raises(ConfigError, match=f"config.data.*{message}"):
        schema.validate(dataclasses.replace(DataConfig(), source=config), "config.data")


def test_parts_are_overridden_and_reported_by_name(tmp_path):
    config = schema.override(
        dataclasses.replace(DataConfig(), source=CONFIG),
        {"source.sources.shapes.weight": "2.5", "source.sources.digits.source.split": "train"},
    )
    assert [part.weight for part in config.source.sources] == [2, 2.5]
    assert config.source.sources[0].source.split == "train"
    assert schema.from_dict(DataConfig, schema.to_dict(config)) == config
    written = (
        "({'name': 'own', 'source': {'kind': 'csv', 'path': 'x.csv'}}, {'name': 'd', 'source': 'digits', 'weight': 3})"
    )
    made = schema.override(DataConfig(), {"source": "mixture", "source.sources": written})
    assert made.source == MixtureConfig(
        (MixturePart("own", CsvConfig(path="x.csv")), MixturePart("d", DigitsConfig(), weight=3))
    )
    with pytest.raises(ConfigError, match=r"config\.data\.source\.sources\.own\.source\.path = 'x.csv' is not a file"):
        made.build_source("")
