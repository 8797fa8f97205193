"""Shares of a source: distinct records, nested shares, and the short form of a path."""

import pickle

import numpy as np
import pytest

from vlm_jax import schema
from vlm_jax.data.sources import DigitsConfig, MixtureConfig, MixturePart, SubsetConfig
from vlm_jax.schema import ConfigError


def keys(config: SubsetConfig) -> list[str]:
    source = config.build("")
    return [source[index]["key"] for index in range(len(source))]


def test_shares_are_nested_seeded_and_of_distinct_records() -> None:
    whole = {record["key"] for record in map(DigitsConfig().build("").__getitem__, range(1442))}
    shares = {share: keys(SubsetConfig(DigitsConfig(), share=share)) for share in (0.001, 0.125, 0.5, 1.0)}
    assert [len(found) for found in shares.values()] == [1, 180, 721, 1442]
    for small, large in zip(list(shares.values())[:-1], list(shares.values())[1:], strict=True):
        assert len(set(small)) == len(small) and set(small) <= set(large)
    assert set(shares[1.0]) == whole
    other = keys(SubsetConfig(DigitsConfig(), share=0.125, seed=1))
    assert 5 < len(set(other) & set(shares[0.125])) < 50  # an eighth of an eighth is 22
    # no digit is missing: the file's order has no say
    source = SubsetConfig(DigitsConfig(), share=0.125).build("")
    labels = np.bincount([source[index]["label"] for index in range(len(source))])
    assert len(labels) == 10 and labels.min() > 5 and source.class_names == DigitsConfig().build("").class_names
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3]["key"] == source[3]["key"] and copy.texts(3) == source[3]["texts"]
    with pytest.raises(IndexError, match="holds 180 records"):
        source[180]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SubsetConfig(share=0.0), "share = 0.0 must lie in"),
        (SubsetConfig(share=1.5), "share = 1.5 must lie in"),
        (SubsetConfig(MixtureConfig((MixturePart("a", DigitsConfig()),))), "would lose its weights"),
    ],
)
def test_impossible_subsets_name_the_key(config: SubsetConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        schema.validate(config)


def test_the_path_of_a_subset_is_a_short_form(tmp_path) -> None:
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "".join(f"{i}.png,number {i}\n" for i in range(8)))
    source = SubsetConfig(path=str(tmp_path / "pairs.csv"), share=0.5).build("")
    assert len(source) == 4
    with pytest.raises(ConfigError, match=r"source\.path = .*none\.csv' is not a file"):
        SubsetConfig(path=str(tmp_path / "none.csv")).build("")
