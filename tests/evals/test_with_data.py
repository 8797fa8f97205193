"""The evaluations on the data pipeline's own batches: real scans, drawn scenes and a mesh of several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_encoder import FakeEncoder

from vlm_jax.data.examples import LabelledImages
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import eval_batches
from vlm_jax.data.sources import DigitsConfig
from vlm_jax.data.sources.digits import WORDS
from vlm_jax.evals.retrieval import RetrievalConfig
from vlm_jax.evals.zero_shot import ZeroShotConfig


class DigitMeans(FakeEncoder):
    """Images are compared with the mean scan of each digit, and a text stands for the digit whose word it ends with."""

    def __init__(self, means_10xP, batch_size):
        self.mesh = jax.make_mesh(
            (4, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4]
        )
        self.batch_size = batch_size
        self.means_10xP = jnp.asarray(means_10xP)

    def image_features(self, params, images):
        flat = images[..., 0].reshape(len(images), -1).astype(jnp.float32)
        return jax.nn.softmax(-0.01 * jnp.linalg.norm(flat[:, None] - self.means_10xP[None], axis=-1) ** 2 / 64)

    def text_features(self, params, tokens):
        return jax.nn.one_hot(tokens[:, 0], 10)

    def tokenize(self, texts):
        words = [text.strip('."').split()[-1].strip('"') for text in texts]
        return np.asarray([[WORDS.index(word)] for word in words], np.int32)

    def labelled_batches(self, source, class_count=0):
        return eval_batches(source, LabelledImages(8, PreprocessConfig()), self.batch_size, self.mesh, threads=1)

    image_batches = labelled_batches


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    train = DigitsConfig(split="train").build(str(tmp_path_factory.mktemp("cache")))
    records = [train[i] for i in range(len(train))]
    labels = np.asarray([record["label"] for record in records])
    scans = np.stack([record["image"][..., 0].ravel() for record in records]).astype(np.float32)
    return DigitMeans(np.stack([scans[labels == digit].mean(axis=0) for digit in range(10)]), batch_size=64)


def test_nearest_mean_classifies_the_held_out_scans(encoder, tmp_path):
    config = ZeroShotConfig(name="digits", source=DigitsConfig(split="test"), templates=("a photo of the digit {}.",))
    metrics = config.build(encoder, str(tmp_path)).run({}, step=0).metrics
    source = DigitsConfig(split="test").build(str(tmp_path))
    scans = np.stack([source[i]["image"][..., 0].ravel() for i in range(len(source))]).astype(np.float32)
    nearest = np.linalg.norm(scans[:, None] - np.asarray(encoder.means_10xP), axis=-1).argmin(axis=1)
    expected = np.mean(nearest == [source[i]["label"] for i in range(len(source))])
    assert expected > 0.85
    assert metrics["zero_shot/digits/top1"] == pytest.approx(expected)
    assert metrics["zero_shot/digits/examples"] == len(source)


def test_captions_find_scans_and_the_picture_shows_them(encoder, tmp_path):
    config = RetrievalConfig(name="digits", source=DigitsConfig(split="test"), limit=50, captions_per_image=1)
    result = config.build(encoder, str(tmp_path)).run({}, step=800)
    assert result.metrics["retrieval/digits/images"] == result.metrics["retrieval/digits/texts"] == 50
    # Fifty scans share ten captions, which tie: an own caption stands behind those of the other scans of its digit.
    assert result.metrics["retrieval/digits/image_to_text_r1"] < 0.1
    assert result.metrics["retrieval/digits/image_to_text_r10"] > 0.85
    picture = result.images["retrieval/digits/best_and_worst"]
    assert picture.dtype == np.uint8
    assert len(np.unique(picture)) > 17, "scans with their grey levels, not an empty page"
