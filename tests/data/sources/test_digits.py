import numpy as np
import pytest
from sklearn.datasets import load_digits

from vlm_jax import schema
from vlm_jax.data.sources import DigitsConfig, SourceConfig
from vlm_jax.schema import ConfigError


def test_splits_are_disjoint_complete_and_stratified():
    train, test, whole = (DigitsConfig(split=split).build("") for split in ("train", "test", "all"))
    keys = [{source[i]["key"] for i in range(len(source))} for source in (train, test, whole)]
    assert keys[0] | keys[1] == keys[2]
    assert not keys[0] & keys[1]
    assert len(whole) == 1797
    labels = np.asarray([test[i]["label"] for i in range(len(test))])
    counts = np.bincount(load_digits().target)
    np.testing.assert_array_equal(np.bincount(labels), counts // 5)


def test_records_are_the_scans_of_scikit_learn():
    source, data = DigitsConfig(split="all").build(""), load_digits()
    for index in (0, 7, 1796):
        record = source[index]
        assert record["image"].shape == (8, 8, 3)
        assert record["image"].dtype == np.uint8
        np.testing.assert_allclose(record["image"][..., 1] / 255 * 16, data.images[index], atol=0.04)
        assert record["label"] == data.target[index]
    assert source[7]["texts"][0] == "a photo of the digit seven."
    assert source.class_names[data.target[7]] == "seven"
    assert len({text for text in source[7]["texts"] if "seven" in text}) == 5


def test_templates_are_checked():
    with pytest.raises(ConfigError, match="templates holds 'a digit'"):
        schema.validate(DigitsConfig(templates=("a digit",)))
    with pytest.raises(ConfigError, match="templates is empty"):
        schema.validate(DigitsConfig(templates=()))
    assert schema.from_dict(SourceConfig, {"kind": "digits", "split": "test"}) == DigitsConfig(split="test")
