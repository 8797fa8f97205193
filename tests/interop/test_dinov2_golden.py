"""DINOv2's encoder against golden vectors of the official one: native, masked, and at another size."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from vlm_jax.interop.dinov2 import OfficialDinov2
from vlm_jax.interop.tables import from_params, to_params
from vlm_jax.models.position import resize_grid

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["dinov2_reg_mlp", "dinov2_noreg_swiglu"]


class Golden:
    def __init__(self, name: str) -> None:
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")
        self.inputs, self.outputs = self.group("inputs"), self.group("outputs")
        self.weights = {k: v for k, v in self.group("weights").items() if not k.startswith("dino_head")}
        self.format = OfficialDinov2()
        self.config = self.format.read_config(self.weights, {"num_heads": 4}, None)
        self.rows, shapes = self.format.rows(self.config), self.format.shapes(self.config)
        self.params = to_params(self.weights, self.rows, shapes, self.format.title)["image"]

    def group(self, name: str) -> dict[str, np.ndarray]:
        prefix = f"{name}/"
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def encode(self, image: np.ndarray, **options: Any) -> dict[str, jax.Array]:
        module: Any = self.config.build(None, np.float32)

        @jax.jit
        def encode(params: Any, images: jax.Array, options: Any) -> dict[str, jax.Array]:
            return module.apply({"params": params}, images, intermediates=True, **options)

        return encode(self.params, image.transpose(0, 2, 3, 1), options)

    def compare(self, case: str, named: dict[str, jax.Array]) -> float:
        """The largest difference to all that is stored of a case."""
        registers = self.config.registers
        ours = {
            "x_norm_clstoken": named["pooled"],
            "x_norm_regtokens": named["tokens"][:, 1 : 1 + registers],
            "x_norm_patchtokens": named["tokens"][:, 1 + registers :],
            "block0": named["blocks"][0],
            "block1": named["blocks"][1],
            "x_prenorm": named["blocks"][-1],
        }
        stored = {name: self.outputs[f"{case}.{name}"] for name in ours if f"{case}.{name}" in self.outputs}
        assert len(stored) >= 5
        return max(float(np.abs(np.asarray(ours[name]) - value).max()) for name, value in stored.items())


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def test_native(golden: Golden) -> None:
    assert golden.compare("native", golden.encode(golden.inputs["image"])) < 2e-5


def test_masked(golden: Golden) -> None:
    named = golden.encode(golden.inputs["image"], masked_BxN=golden.inputs["masks"])
    assert golden.compare("masked", named) < 2e-5


def test_another_size(golden: Golden) -> None:
    """48 x 40 pixels: 6 x 5 patches of a table of 4 x 4."""
    assert golden.config.pos_resize == ("antialias" if golden.config.registers else "bicubic_offset")
    assert golden.compare("interp48x40", golden.encode(golden.inputs["image_48x40"])) < 2e-5
    table = resize_grid(golden.weights["pos_embed"][0], (4, 4), (6, 5), 1, golden.config.pos_resize)
    np.testing.assert_allclose(table, golden.outputs["interp48x40.pos_embed"][0], atol=1e-6)


def test_the_form_of_the_resize_is_seen(golden: Golden) -> None:
    other = Golden.__new__(Golden)
    vars(other).update(vars(golden), config=dataclasses.replace(golden.config, pos_resize="bicubic"))
    named = other.encode(golden.inputs["image_48x40"])
    assert golden.compare("interp48x40", named) > 1e-3


def test_round_trip(golden: Golden) -> None:
    back = from_params({"image": golden.params}, golden.rows, golden.format.title)
    assert back.keys() == golden.weights.keys()
    for name, value in back.items():
        np.testing.assert_array_equal(value, golden.weights[name], err_msg=name)
