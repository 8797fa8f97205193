"""Files of weights, written byte by byte or by their own libraries, and the settings beside them."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.interop.files import WeightsError, read_weights, write_weights
from vlm_jax.interop.preprocess import export_preprocess, import_preprocess
from vlm_jax.interop.tables import ConversionError


def test_bfloat16_is_read_from_its_bits(tmp_path):
    header = {"x": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    bits = struct.pack("<4H", 0x3F80, 0xC000, 0x3E80, 0x0000)  # 1, -2, 0.25, 0
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bits)
    tensor = read_weights(tmp_path).tensors["x"]
    assert tensor.dtype == jnp.bfloat16
    np.testing.assert_array_equal(tensor.astype(np.float32), [[1.0, -2.0], [0.25, 0.0]])


def test_shards_are_put_together_and_a_missing_one_is_named(tmp_path):
    first, second = {"a": np.arange(6.0).reshape(2, 3)}, {"b": np.array(2, np.float32)}
    save_file(first, tmp_path / "model-1.safetensors")
    save_file(second, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = read_weights(tmp_path).tensors
    for name, value in (first | second).items():
        np.testing.assert_array_equal(tensors[name], value, strict=True)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-2.safetensors does not exist, though the index"):
        read_weights(tmp_path)


def test_written_scalars_stay_scalars_and_float16_round_trips(tmp_path):
    values = {"scale": np.array(2.5, np.float32), "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    write_weights(tmp_path / "model.safetensors", values, "float16")
    tensors = read_weights(tmp_path / "model.safetensors").tensors
    for name, value in values.items():
        np.testing.assert_array_equal(tensors[name], value.astype(np.float16), strict=True)


@pytest.mark.parametrize("family", ["hf", "open_clip"])
@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
def test_preprocessing_survives_the_way_there_and_back(family, resize):
    config = PreprocessConfig(resize=resize, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    if (family, resize) == ("hf", "longest"):
        with pytest.raises(ConversionError, match="'longest'"):
            export_preprocess(config, (32, 32), family)
        return
    settings = json.loads(json.dumps(export_preprocess(config, (32, 32), family)))
    assert import_preprocess(settings, family, (32, 32)) == config


OPENAI = {
    "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip


def test_the_files_of_openai_on_hugging_face_are_clips_preprocessing():
    assert import_preprocess(OPENAI, "hf", (224, 224)) == PreprocessConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"shortest_edge": 256}}, "resizes to .*256.*, but the model takes"),
        ({"do_normalize": False}, "do_normalize = False of the config file is not supported"),
        ({"do_center_crop": False}, "not square"),
        ({"resample": 1}, "'shortest', 1"),
    ],
)
def test_preprocessing_that_we_lack_is_refused(changes, message):
    with pytest.raises(ConversionError, match=message):
        import_preprocess(OPENAI | changes, "hf", (224, 224))
