"""Captions exchanged by a seed: how many, whose, and that nothing else changes."""

import numpy as np
import pytest

from vlm_jax.data.sources import MismatchedConfig, MixtureConfig, MixturePart, ShapesConfig
from vlm_jax.schema import ConfigError

SCENES = ShapesConfig(image_size=16, count=600)


def test_a_share_of_the_records_has_the_captions_of_others() -> None:
    true, wrong = SCENES.build(""), MismatchedConfig(SCENES, share=0.3, seed=4).build("")
    assert len(wrong) == 600
    exchanged = [index for index in range(600) if wrong.texts(index) != true.texts(index)]
    assert 0.25 < len(exchanged) / 600 < 0.35
    every = [true.texts(index) for index in range(600)]
    assert all(wrong.texts(index) in every for index in exchanged)
    for index in (exchanged[0], next(index for index in range(600) if index not in exchanged)):
        record, own = wrong[index], true[index]
        assert record["texts"] == wrong.texts(index)
        np.testing.assert_array_equal(record["image"], own["image"])
        assert {**record, "texts": 0, "image": 0} == {**own, "texts": 0, "image": 0}


def test_the_seed_decides_which_and_the_ends_of_the_share_are_none_and_all() -> None:
    first, again, other = (MismatchedConfig(SCENES, seed=seed).build("") for seed in (0, 0, 1))
    tellers = [[source.teller(index) for index in range(600)] for source in (first, again, other)]
    assert tellers[0] == tellers[1] != tellers[2]
    none, every = (MismatchedConfig(SCENES, share=share).build("") for share in (0.0, 1.0))
    assert [none.teller(index) for index in range(600)] == list(range(600))
    assert all(every.teller(index) != index for index in range(600))


def test_impossible_ones_name_the_key() -> None:
    mixture = MixtureConfig((MixturePart("a", SCENES),))
    assert next(iter(MismatchedConfig(share=1.5).problems())) == ("share", "= 1.5 must lie in [0, 1]")
    assert next(iter(MismatchedConfig(mixture).problems()))[0] == "source"
    with pytest.raises(ConfigError, match="holds 1 records; captions can be exchanged among 2 or more"):
        MismatchedConfig(ShapesConfig(count=1)).build("")
