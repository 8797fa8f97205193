"""The encoder of a real model: what evaluations ask of it, on a mesh that splits batch and weights."""

import jax
import numpy as np
import pytest
import tiny
from fake_encoder import ListSource, random_records
from flax import linen as nn

from vlm_jax.data.sources import DigitsConfig
from vlm_jax.evals.base import EvalError
from vlm_jax.evals.encoder import MeshEncoder
from vlm_jax.evals.frozen import Sources
from vlm_jax.evals.linear_probe import LinearProbeConfig, LinearProbeEvaluator
from vlm_jax.schema import ConfigError


@pytest.fixture(scope="module")
def model():
    """(encoder without a tokenizer on 2 x 2 x 2 devices, its parameters, the module's own outputs on 16 images)."""
    program = tiny.program(tiny.mesh(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(program.mesh):
        params = nn.unbox(program.setup.init().params)
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    outputs = program.objective.outputs(
        tiny.host(params), {"image": images, "text": np.ones((16, 16), np.int32)}, intermediates=False
    )
    return MeshEncoder(program.objective, None, 8, program.mesh, 14), params, images, outputs


def test_batches_are_rounded_up_to_the_devices_that_share_them(model):
    encoder = model[0]
    assert (encoder.shards, encoder.batch_size) == (4, 16)


def test_vectors_are_those_before_and_after_the_projection(model):
    encoder, params, images, outputs = model
    pooled, embedding = (
        np.asarray(encoder.image_vectors(params, encoder.shard(images), which)) for which in ("pooled", "embedding")
    )
    np.testing.assert_allclose(pooled, outputs["image/pooled"], atol=1e-5)
    features = embedding / np.linalg.norm(embedding, axis=-1, keepdims=True)
    np.testing.assert_allclose(features, outputs["image_features"], atol=1e-5)
    assert not np.allclose(np.linalg.norm(embedding, axis=-1), 1, atol=1e-3), "of their own length"


def test_a_model_without_a_tokenizer(model):
    encoder = model[0]
    assert not encoder.reads_text
    with pytest.raises(ConfigError, match="no tokenizer"):
        encoder.tokenize(["a"])


def test_records_with_several_labels(model):
    encoder = model[0]
    records = [
        {**r, "key": str(i), "where": "toy", "label": label}
        for i, (r, label) in enumerate(zip(random_records(4), ((0, 2), 1, (), None), strict=True))
    ]
    (batch,) = encoder.labelled_batches(ListSource(records), class_count=3)
    assert np.asarray(batch["mask"])[:5].tolist() == [True, True, True, False, False]
    assert np.asarray(batch["label"])[:3].astype(int).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    with pytest.raises(EvalError, match=r"Record 0 of toy has label 2, but the 2 class names"):
        list(encoder.labelled_batches(ListSource(records), class_count=2))


def test_a_probe_of_it_learns_its_training_images(model):
    encoder, params, _, _ = model
    records = [{**record, "key": str(i), "where": "toy"} for i, record in enumerate(random_records(30, classes=3))]
    source = ListSource(records, ("a", "b", "c"))
    config = LinearProbeConfig("toy", DigitsConfig(), train_source=DigitsConfig(), lambdas=(1e-4,))
    evaluator = LinearProbeEvaluator(config, encoder, Sources(source, source, source.class_names))
    assert evaluator.run(params, 0).metrics["linear_probe/toy/top1"] == 1.0
