"""MAE and SimMIM as methods: what is hidden, pictures, FLOPs, and independence of mesh and microbatches."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.flops import TRAIN_OVER_FORWARD, count_dot_flops
from vlm_jax.losses.pixels import patch_targets, predicted_images
from vlm_jax.models.masked_autoencoder import MAE, MaskedAutoencoderConfig, PixelDecoderConfig, mae_encoder
from vlm_jax.models.masked_image_model import MaskedImageModelConfig
from vlm_jax.models.swin import SwinConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.images import GREY
from vlm_jax.objectives.mae import MaeConfig
from vlm_jax.objectives.simmim import SimMimConfig
from vlm_jax.schema import ConfigError, override, validate

SIMMIM_MASKS = load_file(Path(__file__).parents[1] / "golden" / "simmim.safetensors")
DECODER = PixelDecoderConfig(width=16, depth=2, heads=2, mlp_dim=24, drop_path=0.3)
SWIN = SwinConfig(
    image_size=8, patch_size=1, width=8, depths=(2, 2), heads=(2, 4), window=3, mask_token=True, drop_path=0.3
)
VIT = ViTConfig(
    image_size=8, patch_size=1, width=8, depth=2, heads=2, mlp_dim=16, mask_token=True, relative_position="shared"
)
METHODS: dict[str, Any] = {
    "mae": MaeConfig(model=MaskedAutoencoderConfig(mae_encoder(16, 2, 2, 2, image_size=8), DECODER)),
    "simmim": SimMimConfig(model=MaskedImageModelConfig(SWIN, cell=2)),
    "simmim_vit": SimMimConfig(model=MaskedImageModelConfig(VIT, cell=2)),
}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Any:
    return METHODS[request.param]


def keys(rows: int) -> jax.Array:
    return jax.random.split(jax.random.key(3), rows)


@functools.cache
def two_steps(name: str, data: int, fsdp: int, tensor: int, accum_steps: int) -> Any:
    settings = {"objective": METHODS[name], "evals": (), "train__accum_steps": accum_steps}
    state, history = tiny.run_steps(tiny.program(tiny.mesh(data, fsdp, tensor), **settings), 2)
    return tiny.host(state.params), history


@pytest.mark.parametrize(
    ("name", "mesh", "accum_steps"),
    [
        ("mae", (8, 1, 1), 1),
        ("mae", (4, 2, 1), 4),
        ("mae", (2, 2, 2), 2),
        ("simmim", (2, 2, 2), 4),
    ],
)
def test_mesh_and_microbatches_change_nothing(name: str, mesh: tuple[int, int, int], accum_steps: int) -> None:
    """What is hidden, and which branches are dropped, comes from each row's own key."""
    params, history = two_steps(name, *mesh, accum_steps)
    expected_params, expected = two_steps(name, 1, 1, 1, 1)
    for step, expected_step in zip(history, expected, strict=True):
        for metric in ("loss", "gradient_norm"):
            assert step[metric] == pytest.approx(expected_step[metric], rel=1e-5), metric
    tiny.assert_trees_close(learnt(params), learnt(expected_params), rtol=2e-5)


def learnt(params: Any) -> Any:
    """All but the biases of keys: their gradient is zero but for rounding, which Adam makes as large as any."""
    return {path: leaf for path, leaf in flatten_dict(params, sep="/").items() if not path.endswith("key/bias")}


def test_train_flops_are_those_of_the_jaxpr(method: Any) -> None:
    objective = method.build(PreprocessConfig(), jnp.float32)
    params = jax.eval_shape(lambda: objective.init(jax.random.key(0))[0])
    batch = method.batch_shapes(2)
    forward = count_dot_flops(
        lambda p, b, k: objective.loss(p, {}, b, k, 0)[0], params, batch, jax.eval_shape(lambda: keys(2))
    )
    assert method.train_flops() * 2 == TRAIN_OVER_FORWARD * forward


def test_as_many_patches_are_hidden_as_published() -> None:
    assert [MAE[name].kept for name in ("MAE-B/16", "MAE-L/16", "MAE-H/14")] == [49, 49, 64]
    simmim = SimMimConfig()
    hidden = simmim.build(PreprocessConfig(), jnp.float32).hidden(keys(16))
    assert (simmim.model.cells, simmim.model.hidden_cells) == ((6, 6), 22)
    np.testing.assert_array_equal(hidden.sum(axis=1), np.full(16, 22))
    assert len(np.unique(np.asarray(hidden), axis=0)) == 16
    published = SIMMIM_MASKS["inputs/default_mask_192_np_random_seed0"]
    np.testing.assert_array_equal(published.sum(axis=(1, 2)), np.full(4, 22 * 8 * 8))
    cells = published[:, ::8, ::8]
    np.testing.assert_array_equal(cells.repeat(8, axis=1).repeat(8, axis=2), published)


def test_the_hidden_patches_are_uniform(method: Any) -> None:
    """Over many rows each place is hidden as often as any other, to five standard deviations."""
    objective, rows = method.build(PreprocessConfig(), jnp.float32), 4000
    if isinstance(method, MaeConfig):
        hidden = jnp.argsort(jnp.argsort(objective.noise(keys(rows)), axis=1), axis=1) >= method.model.kept
    else:
        hidden = objective.hidden(keys(rows))
    share = float(hidden.mean())
    spread = (share * (1 - share) / rows) ** 0.5
    np.testing.assert_allclose(hidden.mean(axis=0), np.full(hidden.shape[1], share), atol=5 * spread)


def test_pictures_show_what_was_hidden_and_what_was_made_of_it(method: Any) -> None:
    objective = method.build(PreprocessConfig(), jnp.float32)
    params = jax.jit(lambda: objective.init(jax.random.key(0))[0])()
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    images[images == GREY] += 1
    found = jax.jit(objective.reconstruct)(params, images, keys(3))
    assert found.keys() == {"masked", "prediction"}
    assert all((picture.shape, picture.dtype) == (images.shape, np.uint8) for picture in found.values())
    hidden = (np.asarray(found["masked"]) == GREY).all(axis=-1)
    share = 12 / 16 if isinstance(method, MaeConfig) else 10 / 16
    np.testing.assert_array_equal(hidden.mean(axis=(1, 2)), np.full(3, share))
    np.testing.assert_array_equal(hidden, hidden[:, ::2, ::2].repeat(2, axis=1).repeat(2, axis=2))
    for picture in found.values():
        np.testing.assert_array_equal(np.asarray(picture)[~hidden], images[~hidden])
    assert (np.asarray(found["prediction"])[hidden] != images[hidden]).mean() > 0.9


@pytest.mark.parametrize("normalise", [True, False])
def test_a_perfect_prediction_is_the_image(normalise: bool) -> None:
    images = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    again = predicted_images(patch_targets(images, 4, normalise), images, 4, normalise)
    np.testing.assert_allclose(again, images, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mae", {"model.mask_ratio": 0.0}, r"mask_ratio = 0\.0 must lie in \(0, 1\) and remove at least one"),
        ("mae", {"model.mask_ratio": 1.0}, r"mask_ratio = 1\.0 must lie in \(0, 1\)"),
        ("mae", {"model.image.patch_dropout": 0.5}, r"image\.patch_dropout = 0\.5 drops patches a second time"),
        ("mae", {"model.decoder.width": 18}, r"decoder\.width = 18 must be a multiple of 4"),
        ("simmim", {"model.image.mask_token": False}, r"image\.mask_token = false leaves nothing"),
        ("simmim", {"model.cell": 3}, r"cell = 3 must be a multiple of the patch, 1, and divide the image, 8x8"),
        ("simmim", {"model.image": "resnet"}, r"image = 'resnet' has no mask token; use 'vit' or 'swin'"),
        ("simmim", {"model.image.depths": (2, 3)}, r"depths = \(2, 3\) must be even"),
        ("simmim", {"model.image.heads": (3, 4)}, r"heads = \(3, 4\) does not divide the widths of the stages"),
    ],
)
def test_what_can_not_be_built_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(override(METHODS[name], changes))
