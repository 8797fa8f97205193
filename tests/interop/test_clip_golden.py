"""The parity of `test_clip_parity` from stored numbers, for where the other libraries are not installed."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open

from vlm_jax.interop.registry import recognise
from vlm_jax.interop.tables import from_params, to_params
from vlm_jax.losses.contrastive import info_nce
from vlm_jax.models.two_tower import TwoTower

GOLDEN = Path(__file__).parents[1] / "golden"


class Golden:
    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"{name}.safetensors", "numpy") as file:
            settings = json.loads(file.metadata()["settings"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.groups: dict[str, dict[str, np.ndarray]] = {}
        for key, value in tensors.items():
            group, _, name = key.partition("/")
            self.groups.setdefault(group, {})[name] = value
        self.format, self.weights = recognise(self.groups["weights"])
        self.config = self.format.read_config(self.weights, settings, None)
        self.rows = self.format.rows(self.config)
        self.params = to_params(self.weights, self.rows, self.format.shapes(self.config), self.format.title)

    def outputs(self, params: Any) -> dict[str, jax.Array]:
        inputs = self.groups["inputs"]
        return TwoTower(self.config).apply({"params": params}, inputs["images"], inputs["ids"])  # pyright: ignore

    def loss(self, params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        outputs = self.outputs(params)
        total, count = info_nce(outputs["image_features"], outputs["text_features"], outputs["logit_scale"])
        return total / count, outputs

    @functools.cached_property
    def computed(self) -> tuple[Any, Any]:
        return jax.jit(jax.value_and_grad(self.loss, has_aux=True))(self.params)


@pytest.fixture(scope="module", params=["clip_hf_gelu", "clip_open_clip_quick_gelu"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def test_features_and_loss(golden: Golden):
    (loss, outputs), _ = golden.computed
    expected = golden.groups["outputs"]
    for name in ("image_features", "text_features"):
        np.testing.assert_allclose(outputs[name], expected[name], atol=1e-5)
    np.testing.assert_allclose(loss, expected["loss"], atol=1e-6)


def test_gradient_norms(golden: Golden):
    _, gradients = golden.computed
    ours = from_params(gradients, golden.rows, golden.format.title)
    assert ours.keys() == golden.groups["gradient_norms"].keys()
    for name, expected in golden.groups["gradient_norms"].items():
        if "k_proj.bias" not in name:  # zero but for rounding
            np.testing.assert_allclose(np.linalg.norm(ours[name]), expected, rtol=1e-4, err_msg=name)


def test_every_weight_has_its_place(golden: Golden):
    assert_round_trip(golden)
    assert len(flatten_dict(golden.params)) == 46  # 16 a stack of blocks, 8 and 5 around them, the scale


def assert_round_trip(golden: Golden) -> None:
    exported = from_params(golden.params, golden.rows, golden.format.title)
    assert exported.keys() == golden.weights.keys()
    for name, value in golden.weights.items():
        np.testing.assert_array_equal(exported[name], value, strict=True)


def test_siglip_with_an_image_tower_of_timm():
    """timm's activations differ from the text tower's here, as in the released models of that size."""
    golden = Golden("siglip_open_clip_timm")
    assert golden.format.title == "open_clip's SigLIP"
    assert (golden.config.image.activation, golden.config.text.activation) == ("gelu", "gelu_tanh")
    outputs = jax.jit(golden.outputs)(golden.params)
    for name, expected in golden.groups["outputs"].items():
        np.testing.assert_allclose(outputs[name], expected, atol=1e-5)
    assert float(outputs["logit_bias"]) == -3.0
    assert_round_trip(golden)
    assert golden.format.published(golden.weights).keys() == golden.groups["weights"].keys()
