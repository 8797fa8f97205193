"""big_vision's SigLIP against the same model written in Flax's own layers, whose automatic names its files carry."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from vlm_jax import schema
from vlm_jax.interop.files import read_weights, write_weights
from vlm_jax.interop.registry import for_export, recognise
from vlm_jax.interop.tables import ConversionError, from_params, to_params
from vlm_jax.models.two_tower import TwoTower

WIDTH, HEADS, DEPTH, SIDE, PATCH, LENGTH = 16, 4, 2, 12, 4, 6
IMAGES = np.random.default_rng(0).normal(size=(3, SIDE, SIDE, 3)).astype(np.float32)
IDS = np.random.default_rng(1).integers(0, 40, (3, LENGTH)).astype(np.int32)


class MlpBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(24)(x)
        return nn.Dense(WIDTH)(nn.gelu(x))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS)(y, y)
        y = nn.LayerNorm()(x)
        return x + MlpBlock()(y)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for i in range(DEPTH):
            x = Block(name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class MAPHead(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        probe = self.param("probe", nn.initializers.normal(1.0), (1, 1, WIDTH))
        x = nn.MultiHeadDotProductAttention(HEADS)(jnp.tile(probe, (len(x), 1, 1)), x)
        y = nn.LayerNorm()(x)
        return (x + MlpBlock()(y))[:, 0]


class Image(nn.Module):
    @nn.compact
    def __call__(self, images: Any) -> Any:
        x = nn.Conv(WIDTH, (PATCH, PATCH), strides=(PATCH, PATCH), padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, WIDTH)
        x = x + jnp.tile(
            self.param("pos_embedding", nn.initializers.normal(1.0), (1, x.shape[1], WIDTH)), (len(x), 1, 1)
        )
        return MAPHead(name="MAPHead_0")(Encoder(name="Transformer")(x))


class Text(nn.Module):
    @nn.compact
    def __call__(self, ids: Any) -> Any:
        x = nn.Embed(40, WIDTH)(ids)
        x = x + jnp.tile(self.param("pos_embedding", nn.initializers.normal(1.0), (1, LENGTH, WIDTH)), (len(x), 1, 1))
        return nn.Dense(WIDTH, name="head")(Encoder(name="Encoder_0")(x)[:, -1])


def normalised(x: Any) -> Any:
    return np.asarray(x / jnp.linalg.norm(x, axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def released() -> Any:
    """(tensors as their file holds them, image features, text features)."""
    tensors: dict[str, np.ndarray] = {"t": np.array([2.2], np.float32), "b": np.array([-9.0], np.float32)}
    features = []
    for name, module, inputs in (("img", Image(), IMAGES), ("txt", Text(), IDS)):
        rng = np.random.default_rng(5)
        params = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
        params = jax.tree.map(lambda x, rng=rng: rng.normal(0, 0.3, x.shape).astype(np.float32), params)
        with jax.numpy_rank_promotion("allow"):
            features.append(normalised(jax.jit(module.apply)({"params": params}, inputs)))
        tensors |= {f"{name}/{path}": value for path, value in flatten_dict(params, sep="/").items()}
    return tensors, *features


def stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As a training checkpoint of a scanned model: layers in one tensor, parameters beside the optimiser."""
    result = {"opt/0/count": np.array(3)}
    for name, value in tensors.items():
        if "encoderblock_0/" in name:
            layers = [tensors[name.replace("encoderblock_0/", f"encoderblock_{i}/")] for i in range(DEPTH)]
            result["params/" + name.replace("encoderblock_0/", "encoderblock/")] = np.stack(layers)
        elif "encoderblock_" not in name:
            result[f"params/{name}"] = value
    return result


def test_features_and_the_way_there_and_back(tmp_path, released: Any):
    tensors, image, text = released
    write_weights(tmp_path / "model.npz", stacked(tensors), "float32")
    found, read = recognise(read_weights(tmp_path).tensors)
    assert found.title == "a big_vision SigLIP"
    config = found.read_config(read, None, None)
    schema.validate(config)
    assert (config.image.heads, config.image.activation) == (HEADS, "gelu_tanh")
    params = to_params(read, found.rows(config), found.shapes(config), found.title)
    out: Any = jax.jit(TwoTower(config).apply)({"params": params}, IMAGES, IDS)
    np.testing.assert_allclose(out["image_features"], image, atol=1e-5)
    np.testing.assert_allclose(out["text_features"], text, atol=1e-5)
    assert (float(params["logit_scale"]), float(params["logit_bias"])) == (np.float32(2.2), -9.0)

    assert for_export(config, "big_vision") is found
    assert found.write_config(config) == {}
    exported = from_params(params, found.rows(config), found.title)
    assert exported.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name, strict=True)
    with pytest.raises(ConversionError, match=r"text.activation = 'gelu' \(only \('gelu_tanh',\)\)"):
        found.write_config(schema.override(config, {"text.activation": "gelu"}))


def test_bfloat16_is_read_from_its_bytes(tmp_path):
    halves = np.array([1.0, -2.5], jnp.bfloat16)
    np.savez(tmp_path / "model.npz", x=halves)
    read = read_weights(tmp_path / "model.npz").tensors["x"]
    assert read.dtype == jnp.bfloat16
    np.testing.assert_array_equal(read, halves)
