import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vlm_jax.data.examples import draw_caption
from vlm_jax.data.images import decode
from vlm_jax.data.sources import BadRecord, TfdsConfig, source_for_path
from vlm_jax.schema import ConfigError


class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["even", "odd"]),
            "caption": tfds.features.Text(),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "said": tfds.features.Sequence({"text": tfds.features.Text(), "id": tfds.features.Scalar(np.int64)}),
            "count": tfds.features.Scalar(np.int64),
            "mask": tfds.features.Image(shape=(None, None, 3)),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(5):
            buffer = io.BytesIO()
            Image.fromarray(np.full((4, 6, 3), 20 * number, np.uint8)).save(buffer, "PNG")
            buffer.seek(0)
            captions = {
                "caption": f"number {number}" if number else "",
                "captions": [f"no {number}", "a number"],
                "said": [{"text": f"said {number}.{turn}", "id": turn} for turn in range(number)],
            }
            label = number % 2 if number < 4 else -1
            yield number, {"image": buffer, "mask": b"junk", "label": label, "count": number, **captions}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    builder = Tiny(data_dir=str(tmp_path_factory.mktemp("tfds")), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_path)


def test_records_match_what_was_written(path):
    source = TfdsConfig(path=path, text_key=("captions",)).build("")
    assert source.class_names == ("even", "odd")
    assert len(source) == 5
    copy = pickle.loads(pickle.dumps(source))
    numbers = set()
    for index in range(5):
        record = source[index]
        number = int(record["texts"][0].split()[1])
        numbers.add(number)
        assert record["texts"] == source.texts(index) == copy[index]["texts"] == (f"no {number}", "a number")
        assert record.get("label") == (number % 2 if number < 4 else None)  # TFDS writes -1 for an unknown class
        assert isinstance(record["image"], bytes)
        assert (decode(record["image"]) == 20 * number).all()
    assert numbers == set(range(5))


def test_empty_captions_and_labels_alone(path):
    source = TfdsConfig(path=path, text_key=("caption",), label_key="").build("")
    bad = []
    for index in range(5):
        assert "label" not in source[index]
        try:
            draw_caption(source[index], None)
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
    with pytest.raises(ConfigError, match=r"no feature 'text' \(config.*text_key\); it has: .*captions.*said/text"):
        TfdsConfig(path=path, text_key=("text",)).build("")
    with pytest.raises(ConfigError, match=r"split = 'dev' can't be read .*Unknown split 'dev'.*\['train'\]"):
        TfdsConfig(path=path, split="dev").build("")


def test_nested_captions_with_probabilities_and_plain_numbers_as_labels(path):
    config = TfdsConfig(path=path, text_key=("caption", "said/text"), text_probabilities=(1, 3), label_key="count")
    source = config.build("")
    assert source.class_names == ()
    records = {record["label"]: record for record in (source[i] for i in range(5) if source.data[i]["count"])}
    assert sorted(records) == [1, 2, 3, 4]
    assert records[2]["texts"] == ("number 2", "said 2.0", "said 2.1")
    assert records[2]["text_weights"] == (0.25, 0.375, 0.375)
    assert records[1]["text_weights"] == (0.25, 0.75)


def test_any_split_and_the_folder_above_the_only_version(path):
    folder = str(Path(path).parent)
    assert len(TfdsConfig(path=folder, split="train[40%:]").build("")) == 3
    assert len(TfdsConfig(path=folder, split="train[:2]+train[3:]").build("")) == 4
    assert source_for_path(path) == TfdsConfig(path=path)
    shutil.copytree(path, Path(path).parent / "2.0.0")
    with pytest.raises(ConfigError, match=r"several prepared datasets; give one of: .*1\.0\.0, .*2\.0\.0"):
        TfdsConfig(path=folder).build("")


def test_formats_without_random_access_and_damaged_records(path, tmp_path):
    shutil.copytree(path, tmp_path / "rows")
    info = tmp_path / "rows" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ConfigError, match=r"allows no random access; prepare it with file_format='array_record'"):
        TfdsConfig(path=str(tmp_path / "rows")).build("")
    shutil.copytree(path, tmp_path / "damaged")
    (file,) = (tmp_path / "damaged").glob("*array_record*")
    data = bytearray(file.read_bytes())
    data[300] ^= 1  # compressed bytes of the first records
    file.write_bytes(data)
    source = TfdsConfig(path=str(tmp_path / "damaged")).build("")
    failed = []
    for index in range(5):
        try:
            source[index]
        except BadRecord as error:
            failed.append(str(error))
    assert len(failed) == 1
    assert "damaged can't be used: it can't be read" in failed[0]
