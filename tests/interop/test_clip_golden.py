"""The parity of `test_clip_parity` from stored numbers, for where torch is not installed."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open

from vlm_jax.interop.clip import canonical_names, detect_family, from_params, to_params
from vlm_jax.interop.clip_config import import_config
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
        self.weights = canonical_names(self.groups["weights"])
        self.family: Any = detect_family(self.weights)
        self.config = import_config(self.weights, self.family, settings, None)
        self.params = to_params(self.weights, self.config, self.family)

    def loss(self, params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        inputs = self.groups["inputs"]
        outputs = TwoTower(self.config).apply({"params": params}, inputs["images"], inputs["ids"])
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
    ours = from_params(gradients, golden.config, golden.family)
    assert ours.keys() == golden.groups["gradient_norms"].keys()
    for name, expected in golden.groups["gradient_norms"].items():
        if "k_proj.bias" not in name:  # zero but for rounding
            np.testing.assert_allclose(np.linalg.norm(ours[name]), expected, rtol=1e-4, err_msg=name)


def test_every_weight_has_its_place(golden: Golden):
    exported = from_params(golden.params, golden.config, golden.family)
    assert exported.keys() == golden.weights.keys()
    for name, value in golden.weights.items():
        np.testing.assert_array_equal(exported[name], value, strict=True)
    assert len(flatten_dict(golden.params)) == 46  # 16 a stack of blocks, 8 and 5 around them, the scale
