"""MAE against the published code's numbers: every block, the prediction, both losses and all gradients."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.interop.mae import Mae as MaeFormat
from vlm_jax.interop.tables import from_params, to_params, without_constants
from vlm_jax.models.masked_autoencoder import MaskedAutoencoderConfig, PixelDecoderConfig, choose_patches, mae_encoder
from vlm_jax.objectives.mae import Mae, MaeConfig

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "mae.safetensors")
MODEL = MaskedAutoencoderConfig(
    mae_encoder(32, 3, 4, 8, image_size=32), PixelDecoderConfig(width=24, depth=2, heads=3, mlp_dim=96)
)
FORMAT = MaeFormat()
IMAGES, NOISE = GOLDEN["inputs/image"].transpose(0, 2, 3, 1), GOLDEN["inputs/noise"]


def golden(name: str) -> np.ndarray:
    return GOLDEN[f"outputs/{name}"]


@pytest.fixture(scope="module")
def params() -> Any:
    weights = {name.removeprefix("weights/"): x for name, x in GOLDEN.items() if name.startswith("weights/")}
    weights = without_constants(weights, FORMAT.constants(MODEL), FORMAT.title)
    return to_params(weights, FORMAT.rows(MODEL), FORMAT.shapes(MODEL), FORMAT.title)


def build(normalise_pixels: bool = True) -> Mae:
    model = dataclasses.replace(MODEL, normalise_pixels=normalise_pixels)
    return MaeConfig(model=model).build(PreprocessConfig(), np.float32)


@pytest.fixture(scope="module")
def computed(params: Any) -> Any:
    def loss(params: Any) -> Any:
        (total, count), outputs = build().loss_and_outputs(params, IMAGES, NOISE, intermediates=True)
        return total / count, outputs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def test_every_block_and_the_prediction(computed: Any) -> None:
    (_, outputs), _ = computed
    expected = {"image/tokens": golden("latent"), "prediction": golden("pred")}
    expected |= {"removed": golden("mask").astype(bool)}
    expected["image/blocks"] = np.stack([golden(f"encoder.block{i}") for i in range(3)])
    expected["decoder/blocks"] = np.stack([golden(f"decoder.block{i}") for i in range(2)])
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name], value, atol=2e-5, err_msg=name)


def test_both_losses_and_every_gradient(params: Any, computed: Any) -> None:
    (value, _), gradients = computed
    np.testing.assert_allclose(value, golden("loss_norm_pix"), rtol=1e-5)
    assert abs(value - golden("loss_norm_pix_biased_var_variant")) > 1e-3  # which the unbiased variance is not
    (total, count), _ = jax.jit(build(False).loss_and_outputs)(params, IMAGES, NOISE)
    np.testing.assert_allclose(total / count, golden("loss_raw_pix"), rtol=1e-5)
    theirs = from_params(gradients, FORMAT.rows(MODEL), FORMAT.title)
    assert theirs.keys() == {name.removeprefix("outputs/grad.") for name in GOLDEN if name.startswith("outputs/grad.")}
    for name, gradient in theirs.items():
        expected = golden(f"grad.{name}")
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(gradient / scale, expected / scale, atol=1e-4, err_msg=name)


def test_the_way_back_is_the_published_one() -> None:
    kept, places = choose_patches(NOISE, 4)
    np.testing.assert_array_equal(places, golden("ids_restore"))
    np.testing.assert_array_equal(kept, np.argsort(NOISE, axis=1)[:, :4])
