import io
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vlm_jax.data.images import decode
from vlm_jax.data.sources import BadRecord, TfdsConfig
from vlm_jax.schema import ConfigError


class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["even", "odd"]),
            "caption": tfds.features.Text(),
            "captions": tfds.features.Sequence(tfds.features.Text()),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(5):
            buffer = io.BytesIO()
            Image.fromarray(np.full((4, 6, 3), 20 * number, np.uint8)).save(buffer, "PNG")
            buffer.seek(0)
            captions = {"caption": f"number {number}" if number else "", "captions": [f"no {number}", "a number"]}
            yield number, {"image": buffer, "label": number % 2, **captions}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    builder = Tiny(data_dir=str(tmp_path_factory.mktemp("tfds")), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_path)


def test_records_match_what_was_written(path):
    source = TfdsConfig(path=path, text_key="captions").build("")
    assert source.class_names == ("even", "odd")
    assert len(source) == 5
    copy = pickle.loads(pickle.dumps(source))
    numbers = set()
    for index in range(5):
        record = source[index]
        number = int(record["texts"][0].split()[1])
        numbers.add(number)
        assert record["texts"] == source.texts(index) == copy[index]["texts"] == (f"no {number}", "a number")
        assert record["label"] == number % 2
        assert isinstance(record["image"], bytes)
        assert (decode(record["image"]) == 20 * number).all()
    assert numbers == set(range(5))


def test_empty_captions_and_labels_alone(path):
    source = TfdsConfig(path=path, text_key="caption", label_key="").build("")
    bad = []
    for index in range(5):
        try:
            assert "label" not in source[index]
        except BadRecord as error:
            bad.append(str(error))
    assert len(bad) == 1
    assert "caption is empty" in bad[0]
    labelled = TfdsConfig(path=path, split="train[:2]").build("")
    assert len(labelled) == 2
    assert labelled[0]["texts"] == ()
    with pytest.raises(BadRecord, match="text_key"):
        labelled.texts(0)


def test_wrong_folder_and_feature_are_named(path, tmp_path):
    with pytest.raises(ConfigError, match="holds no prepared dataset"):
        TfdsConfig(path=str(tmp_path)).build("")
    with pytest.raises(ConfigError, match=r"no feature 'text'; it has: .*captions"):
        TfdsConfig(path=path, text_key="text").build("")
