"""SimMIM with a Swin against the published code's numbers: every block, the reconstruction, loss and all gradients."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.interop.simmim import SwinSimMim
from vlm_jax.interop.tables import from_params, to_params, without_constants
from vlm_jax.models.masked_image_model import MaskedImageModelConfig
from vlm_jax.objectives.simmim import SimMim, SimMimConfig

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "simmim.safetensors")
FORMAT = SwinSimMim()
WEIGHTS = {name.removeprefix("weights/"): x for name, x in GOLDEN.items() if name.startswith("weights/")}
# The golden model hides cells of 8 pixels, which no file tells.
MODEL = MaskedImageModelConfig(FORMAT.read_config(WEIGHTS, None, None).image, cell=8)
IMAGES = GOLDEN["inputs/image"].transpose(0, 2, 3, 1)
HIDDEN = GOLDEN["inputs/mask"][:, ::2, ::2].reshape(2, -1).astype(bool)


def golden(name: str) -> np.ndarray:
    return GOLDEN[f"outputs/{name}"]


@pytest.fixture(scope="module")
def params() -> Any:
    weights = without_constants(WEIGHTS, FORMAT.constants(MODEL), FORMAT.title)
    return to_params(weights, FORMAT.rows(MODEL), FORMAT.shapes(MODEL), FORMAT.title)


@pytest.fixture(scope="module")
def simmim() -> SimMim:
    return SimMimConfig(model=MODEL).build(PreprocessConfig(), np.float32)


def test_indices_and_masks_of_the_windows_are_the_published_ones() -> None:
    constants = FORMAT.constants(MODEL)
    assert constants.keys() == {name for name in WEIGHTS if "index" in name or "attn_mask" in name}
    for name, value in constants.items():
        np.testing.assert_array_equal(value, WEIGHTS[name], strict=True, err_msg=name)


@pytest.fixture(scope="module")
def computed(simmim: SimMim, params: Any) -> Any:
    def loss(params: Any) -> Any:
        (total, count), outputs = simmim.loss_and_outputs(params, IMAGES, HIDDEN, intermediates=True)
        return total / count, outputs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def test_every_block_and_the_reconstruction(computed: Any) -> None:
    (_, outputs), _ = computed
    expected = {
        "image/stage1": np.stack([golden(f"layer0.block{i}") for i in range(2)]),
        "image/merge1": golden("layer0.downsample"),
        "image/stage2": np.stack([golden(f"layer1.block{i}") for i in range(2)]),
        "image/tokens": golden("encoder_out").reshape(2, 32, 16).swapaxes(1, 2),
        "prediction": golden("reconstruction").transpose(0, 2, 3, 1),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name], value, atol=2e-5, err_msg=name)


def test_loss_and_every_gradient(computed: Any) -> None:
    (value, _), gradients = computed
    np.testing.assert_allclose(value, golden("loss"), rtol=1e-5)
    theirs = from_params(gradients, FORMAT.rows(MODEL), FORMAT.title)
    assert theirs.keys() == {name.removeprefix("outputs/grad.") for name in GOLDEN if name.startswith("outputs/grad.")}
    for name, gradient in theirs.items():
        expected = golden(f"grad.{name}")
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(gradient / scale, expected / scale, atol=1e-4, err_msg=name)
