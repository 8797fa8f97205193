"""AIM against vectors of its authors' code, brute force, and the numbers of the paper."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_vectors import GoldenVectors

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.interop.aim import AimBackbone, L3mAim
from vlm_jax.interop.tables import from_params, to_params, without_constants
from vlm_jax.losses.pixels import patch_square_error, patch_targets
from vlm_jax.mesh import unbox
from vlm_jax.models.aim import AIM, AimModelConfig, aim_trunk
from vlm_jax.models.pixel_head import PixelHeadConfig
from vlm_jax.objectives.aim import Aim, AimConfig
from vlm_jax.objectives.patch_prediction import Autoregression, Plan
from vlm_jax.schema import override, validate

GRID = (3, 4)
BACKBONE, PRETRAIN = GoldenVectors("aim_v1_backbone"), GoldenVectors("aim_v1_pretrain")
TRUNK = override(aim_trunk(32, 3, 4, image_size=(18, 24)), {"patch_size": 6})
GOLDEN_MODEL = AimModelConfig(TRUNK, PixelHeadConfig(width=20, depth=3, heads=4, mlp_dim=80))


def objective(**changes: Any) -> Aim:
    config = override(AimConfig(model=GOLDEN_MODEL), {key.replace("__", "."): v for key, v in changes.items()})
    return config.build(PreprocessConfig(), jnp.float32)  # not square, so without validation


@pytest.fixture(scope="module")
def params() -> Any:
    form = L3mAim()
    weights = without_constants(PRETRAIN.weights, form.constants(GOLDEN_MODEL), form.title)
    assert len(PRETRAIN.weights) - len(weights) == 2  # the tables of positions, which are those that we compute
    return to_params(weights, form.rows(GOLDEN_MODEL), form.shapes(GOLDEN_MODEL), form.title)


def golden_plan() -> Plan:
    return Autoregression().plan_of(jnp.asarray(PRETRAIN.inputs["prefix_len"], jnp.int32), GRID)


def test_every_block_and_the_prediction_are_the_authors(params: Any) -> None:
    plan = golden_plan()
    np.testing.assert_array_equal(np.asarray(plan.attention_mask)[:, 0], PRETRAIN.outputs["attn_mask_allowed"])
    outputs = objective().predict(params, PRETRAIN.images(), plan, intermediates=True)
    expected = PRETRAIN.outputs
    for index in range(3):
        np.testing.assert_allclose(outputs["image/blocks"][index], expected[f"block{index}"], atol=2e-5)
        np.testing.assert_allclose(outputs["head/blocks"][index], expected[f"head.block{index}"], atol=2e-5)
    np.testing.assert_allclose(outputs["image/tokens"], expected["post_trunk_norm"], atol=2e-5)
    np.testing.assert_allclose(outputs["head/projection"], expected["head.projection"], atol=2e-5)
    np.testing.assert_allclose(outputs["pixels"], expected["pred"], atol=2e-5)


def test_loss_of_each_patch_and_its_mean_over_the_batch(params: Any) -> None:
    plan, expected = golden_plan(), PRETRAIN.outputs
    pixels = objective().predict(params, PRETRAIN.images(), plan)["pixels"]
    errors = patch_square_error(pixels, patch_targets(PRETRAIN.images(), 6, True)[:, plan.goals])
    np.testing.assert_allclose(errors[:, :-1], expected["per_patch_loss_shifted"], rtol=1e-5)
    np.testing.assert_array_equal(plan.predicted[:, :-1], PRETRAIN.inputs["mask"][:, 1:])
    assert not np.any(plan.predicted[:, -1])
    total, count = objective().loss_of(params, PRETRAIN.images(), plan)
    assert count == PRETRAIN.inputs["mask"][:, 1:].sum()
    assert float(total / count) == pytest.approx(float(expected["loss_f64"]), rel=1e-5)
    for wrong in ("per_sample_mean", "biased_var"):
        assert float(total / count) != pytest.approx(float(expected[f"loss_{wrong}_variant"]), rel=1e-3)


def test_all_gradients(params: Any) -> None:
    def mean(params: Any) -> jax.Array:
        total, count = objective().loss_of(params, PRETRAIN.images(), golden_plan())
        return total / count

    gradients = from_params(jax.jit(jax.grad(mean))(params), L3mAim().rows(GOLDEN_MODEL), "ml-l3m")
    expected = {name.removeprefix("grad."): x for name, x in PRETRAIN.outputs.items() if name.startswith("grad.")}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradient / scale, expected[name] / scale, atol=1e-4, err_msg=name)


def test_the_head_without_the_identity_residual(params: Any) -> None:
    """As the paper's text reads; the first norms of the blocks are then not there at all."""
    model = override(GOLDEN_MODEL, {"head.identity_residual": False})
    mlps = Aim(AimConfig(model=model), PreprocessConfig(), jnp.float32)
    assert "ln_1" not in jax.eval_shape(mlps.init, jax.random.key(0))[0]["head"]["blocks"]
    blocks = {name: leaf for name, leaf in params["head"]["blocks"].items() if name != "ln_1"}
    without = params | {"head": params["head"] | {"blocks": blocks}}
    pixels = mlps.predict(without, PRETRAIN.images(), golden_plan())["pixels"]
    np.testing.assert_allclose(pixels, PRETRAIN.outputs["pred_mlp_only_variant"], atol=2e-5)
    total, count = mlps.loss_of(without, PRETRAIN.images(), golden_plan())
    assert float(total / count) == pytest.approx(float(PRETRAIN.outputs["loss_mlp_only_variant"]), rel=1e-5)


def test_the_released_backbone_with_and_without_the_mask() -> None:
    """Downstream every patch sees every patch, and probes are given outputs of blocks, not of the last norm."""
    model = override(GOLDEN_MODEL, {"image.norm_eps": 1e-6, "head.form": "none"})
    weights = {name: x for name, x in BACKBONE.weights.items() if not name.startswith("head.")}
    form = AimBackbone()
    params = to_params(weights, form.rows(model.image), form.shapes(model.image), form.title)
    aim = Aim(AimConfig(model=model), PreprocessConfig(), jnp.float32)
    images, expected = BACKBONE.images(), BACKBONE.outputs
    lengths = (~BACKBONE.inputs["mask"]).sum(axis=1)
    mask = Autoregression().plan_of(jnp.asarray(lengths, jnp.int32), GRID).attention_mask
    seen = {"bidir": aim.encode(params, images, intermediates=True)}
    seen["prefix"] = aim.tower.apply({"params": params["image"]}, images, attention_mask=mask, intermediates=True)
    for kind, outputs in seen.items():
        np.testing.assert_allclose(outputs["embed"], expected["preprocessed"], atol=2e-5)
        for index in range(3):
            np.testing.assert_allclose(outputs["blocks"][index], expected[f"{kind}.block{index}"], atol=2e-5)
        np.testing.assert_allclose(outputs["tokens"], expected[f"{kind}.post_trunk_norm"], atol=2e-5)
    averaged = aim.image_tokens(params, images, (0, 2))
    np.testing.assert_allclose(averaged, expected["bidir.average_layers_0_2"], atol=2e-5)


# Trunk and patch embedding in the released code; the head's 407 M parameters are the paper's arithmetic.
PUBLISHED = {"AIM-0.6B": 680_535_552, "AIM-1B": 1_209_370_624, "AIM-3B": 2_720_025_600, "AIM-7B": 6_445_404_160}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str) -> None:
    validate(AIM[name])
    aim = AimConfig(model=AIM[name]).build(PreprocessConfig(), jnp.float32)
    shapes = jax.eval_shape(aim.init, jax.random.key(0))[0]
    trunk, head = (sum(leaf.size for leaf in jax.tree.leaves(shapes[part])) for part in ("image", "head"))
    assert trunk == PUBLISHED[name]
    assert head == pytest.approx({"AIM-0.6B": 407e6, "AIM-7B": 412e6}.get(name, head), rel=2e-3)


def test_initial_weights_are_xaviers() -> None:
    """Query, key and value each with their own fans; spreads of uniforms within five standard errors."""
    model = override(GOLDEN_MODEL, {"image.mask_token": True})
    params = jax.jit(AimConfig(model=model).build(PreprocessConfig(), jnp.float32).init)(jax.random.key(1))[0]
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(unbox(params), sep="/").items()}
    square, mlp, head_mlp = (np.sqrt(6 / sum(fans)) for fans in ((32, 32), (32, 128), (20, 80)))
    bounds = {f"image/blocks/attn/{name}/kernel": square for name in ("query", "key", "value", "out")}
    bounds |= {f"image/blocks/mlp/{name}/kernel": mlp for name in ("fc1", "fc2")}
    bounds |= {f"head/blocks/mlp/{name}/kernel": head_mlp for name in ("fc1", "fc2")}
    bounds |= {"image/patch_embed/kernel": np.sqrt(6 / (108 + 32)), "image/patch_embed/bias": 108**-0.5}
    bounds |= {"head/projection/kernel": np.sqrt(6 / (32 + 20)), "head/pixels/kernel": np.sqrt(6 / (20 + 108))}
    for path, bound in bounds.items():
        leaf = leaves.pop(path)
        assert np.abs(leaf).max() <= bound, path
        assert abs(leaf.std() / (bound / np.sqrt(3)) - 1) < 5 / np.sqrt(2 * leaf.size), path
    assert leaves.pop("image/mask_token").std() == pytest.approx(0.02, rel=0.6)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, float(path.endswith("scale")), err_msg=path)
