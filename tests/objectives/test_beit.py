"""BEiT against the published code's numbers: blocks, bias, logits, loss, all gradients, and its masks."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from vlm_jax.data.block_masks import BlockMasks
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.interop.beit import Beit as BeitFormat
from vlm_jax.interop.tables import from_params, to_params, without_constants
from vlm_jax.losses.tokens import token_cross_entropy
from vlm_jax.models.relative_position import RelativeGrid
from vlm_jax.objectives.beit import Beit, BeitConfig

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "beit.safetensors")
FORMAT = BeitFormat()
WEIGHTS = {name.removeprefix("weights/"): x for name, x in GOLDEN.items() if name.startswith("weights/")}
# Every row hides 7 of 16 patches: two places are padding.
MODEL = dataclasses.replace(FORMAT.read_config(WEIGHTS, None, None), masks=BlockMasks(count=9, least=1))
IMAGES, MASKED = GOLDEN["inputs/image"].transpose(0, 2, 3, 1), GOLDEN["inputs/bool_masked_pos"]
CODES = GOLDEN["inputs/visual_token_ids"].astype(np.int32)


def golden(name: str) -> np.ndarray:
    return GOLDEN[f"outputs/{name}"]


@pytest.fixture(scope="module")
def params() -> Any:
    weights = without_constants(WEIGHTS, FORMAT.constants(MODEL), FORMAT.title)
    return to_params(weights, FORMAT.rows(MODEL), FORMAT.shapes(MODEL), FORMAT.title)


def build() -> Beit:
    model = BeitConfig(model=MODEL)
    return model.build(PreprocessConfig(), np.float32)


def test_sizes_are_read_from_the_weights() -> None:
    image = MODEL.image
    assert (image.width, image.depth, image.heads, image.mlp_dim, image.patch_size) == (32, 3, 4, 128, 8)
    assert (image.image_shape, MODEL.vocab_size) == ((32, 32), 24)


def test_every_block_the_bias_and_the_logits(params: Any) -> None:
    apply = jax.jit(lambda p: build().module.apply({"params": p}, IMAGES, MASKED, intermediates=True))
    outputs: Any = apply(params)
    blocks = np.stack([golden(f"block{i}") for i in range(3)])
    np.testing.assert_allclose(outputs["image/blocks"], blocks, atol=2e-5)
    np.testing.assert_allclose(outputs["logits"], golden("logits_all"), atol=2e-5)
    table = params["image"]["relative_position"]["table"]
    bias = table[RelativeGrid((4, 4), True).index()].transpose(2, 0, 1)
    np.testing.assert_array_equal(bias, golden("rel_pos_bias"))
    # every patch as a row of its own
    logits, codes = outputs["logits"].reshape(48, 1, -1), CODES.reshape(48, 1)
    losses, _ = token_cross_entropy(logits, codes, np.ones((48, 1), bool))
    np.testing.assert_allclose(losses.reshape(3, 16), golden("per_token_nll"), atol=2e-5)


def test_loss_and_every_gradient(params: Any) -> None:
    def loss(params: Any) -> Any:
        (total, count), aux = build().loss_of(params, IMAGES, MASKED, CODES)
        return total / count, (count, aux)

    (value, (count, aux)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(value, golden("loss"), rtol=1e-5)
    hits, hidden = aux.metrics["code_accuracy"]
    assert count == hidden == MASKED.sum() == 21
    np.testing.assert_allclose(hits / hidden, golden("mlm_acc"), rtol=1e-6)
    theirs = from_params(gradients, FORMAT.rows(MODEL), FORMAT.title)
    names = {name.removeprefix("outputs/grad.") for name in GOLDEN if name.startswith("outputs/grad.")}
    assert theirs.keys() == names
    for name, gradient in theirs.items():
        expected = golden(f"grad.{name}")
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(gradient / scale, expected / scale, atol=1e-4, err_msg=name)


class PythonRandom:
    """Python's generator with the names of numpy's: it made the published masks."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def random(self) -> float:
        return self._random.random()

    def integers(self, low: int, high: int) -> int:
        return self._random.randint(low, high - 1)


def test_masks_are_the_published_ones() -> None:
    expected = GOLDEN["inputs/masks_14x14_py_random_seed_0_to_15"].astype(bool)
    for seed in range(16):
        np.testing.assert_array_equal(BlockMasks().draw((14, 14), PythonRandom(seed)), expected[seed])
