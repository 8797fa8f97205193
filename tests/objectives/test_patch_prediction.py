"""Orders, prefixes and masks against brute force; no output sees what it predicts; nothing depends on a mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.flops import count_dot_flops
from vlm_jax.losses.pixels import patch_targets
from vlm_jax.mesh import batch_sharding, unbox
from vlm_jax.models.aim import AimModelConfig, aim_trunk
from vlm_jax.models.patches import patchify
from vlm_jax.models.pixel_head import PixelHeadConfig
from vlm_jax.objectives.aim import Aim, AimConfig
from vlm_jax.objectives.base import normalise_images
from vlm_jax.objectives.patch_prediction import (
    Autoregression,
    MaskedModelling,
    PatchPrediction,
    patch_order,
    plan_pictures,
    prefix_lengths,
)
from vlm_jax.schema import ConfigError, override, validate

ORDERS = ("raster", "spiral", "checkerboard", "random")
MODEL = AimModelConfig(
    override(aim_trunk(32, 2, 4, image_size=8), {"patch_size": 2}),
    PixelHeadConfig(width=16, depth=2, heads=4, mlp_dim=32),
)
MASKED = override(MODEL, {"image.mask_token": True})
SMOOTH = {"optimizer__eps": 0.01, "optimizer__learning_rate": 0.1}


def config(masking: PatchPrediction, **changes: Any) -> AimConfig:
    base = AimConfig(model=MASKED if masking.mask_token else MODEL, masking=masking)
    return override(base, {key.replace("__", "."): value for key, value in changes.items()})


def keys(rows: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), rows)


@functools.cache
def initial(aim_config: AimConfig) -> tuple[Aim, Any]:
    """The objective and fresh parameters."""
    aim = Aim(aim_config, PreprocessConfig(), jnp.float32)
    return aim, unbox(jax.jit(aim.init)(jax.random.key(0))[0])


def walk_inwards(rows: int, columns: int) -> list[int]:
    """A walker that starts at the upper left, downwards, and turns left at every wall and at its own trail."""
    row, column, down, right, trail = 0, 0, 1, 0, []
    for _ in range(rows * columns):
        trail.append((row, column))
        ahead = (row + down, column + right)
        if not (0 <= ahead[0] < rows and 0 <= ahead[1] < columns) or ahead in trail:
            down, right = -right, down
        row, column = row + down, column + right
    return [r * columns + c for r, c in trail]


@pytest.mark.parametrize("grid", [(4, 4), (3, 4), (5, 3), (1, 6), (7, 1)])
def test_orders(grid: tuple[int, int]) -> None:
    rows, columns = grid
    cells = [(r, c) for r in range(rows) for c in range(columns)]
    assert patch_order("raster", grid, 0).tolist() == list(range(rows * columns))
    assert patch_order("spiral", grid, 0).tolist() == walk_inwards(rows, columns)[::-1]
    coloured = [r * columns + c for colour in (0, 1) for r, c in cells if (r + c) % 2 == colour]
    assert patch_order("checkerboard", grid, 0).tolist() == coloured
    one, same, other = (patch_order("random", grid, seed).tolist() for seed in (3, 3, 4))
    assert one == same != other
    assert sorted(one) == list(range(rows * columns))


@pytest.mark.parametrize("order", ORDERS)
def test_the_mask_is_its_definition(order: Any) -> None:
    grid, lengths = (3, 4), np.asarray([1, 5, 11])
    sequence = patch_order(order, grid, 1).tolist()
    plan = Autoregression(order=order, order_seed=1).plan_of(jnp.asarray(lengths), grid)
    mask, predicted = np.asarray(plan.attention_mask), np.asarray(plan.predicted)
    for row, length in enumerate(lengths):
        prefix = sequence[:length]
        for place, query in enumerate(sequence):
            seen = {key for key in range(12) if mask[row, 0, query, key]}
            assert seen == set(prefix) | set(sequence[: place + 1])
            following = sequence[place + 1] if place + 1 < 12 else None
            assert predicted[row, query] == (following is not None and following not in prefix)
            assert following in (None, plan.goals[query])


def test_prefixes_are_uniform_from_one_to_all_but_one() -> None:
    lengths = np.asarray(prefix_lengths(keys(6000), 6000, 7))
    counts = np.bincount(lengths, minlength=8)
    assert counts[0] == counts[7] == 0
    assert (np.abs(counts[1:7] - 1000) < 5 * np.sqrt(1000 * 5 / 6)).all()
    np.testing.assert_array_equal(prefix_lengths(keys(6000)[17:19], 2, 7), lengths[17:19])  # a row's own key alone


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_masked_modelling_masks_that_share_of_each_row(ratio: float) -> None:
    plan = MaskedModelling(ratio).plan(keys(64), 64, (4, 4))
    masked = np.asarray(plan.masked)
    assert (masked.sum(axis=1) == 16 * ratio).all()
    assert 0.3 * 64 * ratio < masked.sum(axis=0).min() <= masked.sum(axis=0).max() < 1.7 * 64 * ratio
    np.testing.assert_array_equal(plan.predicted, masked)
    np.testing.assert_array_equal(plan.goals, np.arange(16))
    assert plan.attention_mask is None
    assert not plan.causal


CASES = [
    *((Autoregression("prefix", order), "transformer") for order in ORDERS),
    *((Autoregression("causal", order), "transformer") for order in ("raster", "checkerboard")),
    *((Autoregression(), head) for head in ("none", "mlp")),
    (MaskedModelling(0.5), "transformer"),
]


@pytest.mark.parametrize(("task", "head"), CASES, ids=str)
def test_no_output_sees_what_it_predicts(task: Any, head: str) -> None:
    """By derivatives: what each counted output depends on, and that it does depend on everything that it may see."""
    base = MaskedModelling() if task.mask_token else Autoregression()  # what is masked is no part of the model
    aim, params = initial(config(base, model__head__form=head))
    plan = task.plan(keys(1, 5), 1, (4, 4))
    images = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)

    def outputs(images: jax.Array) -> jax.Array:
        return aim.predict(params, images, plan)["pixels"][0].sum(axis=-1)

    jacobian_NxHxWx3 = jax.jit(jax.jacrev(outputs))(images)[:, 0]
    depends_NxN = np.abs(patchify(jacobian_NxHxWx3, 2)).sum(axis=-1) > 1e-7
    if isinstance(task, MaskedModelling):
        allowed_NxN = np.broadcast_to(~np.asarray(plan.masked), (16, 16))
    else:
        rank = np.argsort(patch_order(task.order, (4, 4), task.order_seed))
        length = 16 - np.asarray(plan.predicted).sum()
        allowed_NxN = (rank[:, None] >= rank[None, :]) | (rank[None, :] < (length if task.attention == "prefix" else 1))
    for patch in np.flatnonzero(plan.predicted[0]):
        np.testing.assert_array_equal(depends_NxN[patch], allowed_NxN[patch])
        assert not depends_NxN[patch, plan.goals[patch]]


def batch(mesh: Any, rows: int = 16, seed: int = 0) -> dict[str, jax.Array]:
    images = np.random.default_rng(seed).integers(0, 256, (rows, 8, 8, 3)).astype(np.uint8)
    return {"image": jax.device_put(images, batch_sharding(mesh))}


@pytest.mark.parametrize(
    ("task", "meshes"),
    [(Autoregression(order="spiral"), [((2, 2, 2), 4)]), (MaskedModelling(0.75), [((8, 1, 1), 1)])],
    ids=["autoregressive", "masked"],
)
def test_mesh_and_microbatches_change_nothing(task: Any, meshes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "batch", batch)
    settings = {"objective": config(task, model__head__remat="full"), "evals": (), **SMOOTH}
    want, history = tiny.run_steps(tiny.program(**settings), 2)
    for shape, accum in meshes:
        state, others = tiny.run_steps(tiny.program(tiny.mesh(*shape), train__accum_steps=accum, **settings), 2)
        for got, expected in zip(others, history, strict=True):
            assert got == pytest.approx(expected, rel=1e-4)
        tiny.assert_trees_close(state.params, want.params, rtol=5e-4)


@pytest.mark.parametrize("task", [Autoregression(), Autoregression("causal"), MaskedModelling()], ids=str)
def test_the_held_out_loss_is_a_number_with_and_without_keys(task: Any) -> None:
    aim, params = initial(config(task))
    images, step = batch(tiny.mesh(), 6)["image"], jnp.zeros((), jnp.int32)
    loss = jax.jit(lambda images, keys: aim.loss(params, {}, {"image": images}, keys, step)[0])
    for row_keys in (None, keys(6)):
        total, count = loss(images, row_keys)
        assert np.isfinite(total) and count > 0
        parts = [loss(images[a:b], None if row_keys is None else row_keys[a:b]) for a, b in ((0, 3), (3, 6))]
        np.testing.assert_allclose(np.sum(parts, axis=0), (total, count), rtol=1e-5)


def test_targets_and_what_they_are_compared_with() -> None:
    """Raw pixels, by hand: each output against the patch that follows."""
    aim, _ = initial(config(Autoregression(), target="raw"))
    params = initial(config(Autoregression()))[1]
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    plan = Autoregression().plan_of(jnp.asarray([3, 9]), (4, 4))
    pixels = np.asarray(aim.predict(params, images, plan)["pixels"])
    patches = [images[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(2, 12) for r in range(4) for c in range(4)]
    errors = [
        np.mean((pixels[row, k] - patches[k + 1][row]) ** 2) for row, s in ((0, 3), (1, 9)) for k in range(s - 1, 15)
    ]
    total, count = aim.loss_of(params, images, plan)
    assert count == len(errors) == 13 + 7
    assert float(total) == pytest.approx(np.sum(errors), rel=1e-5)


@pytest.mark.parametrize("task", [Autoregression(order="checkerboard"), MaskedModelling()], ids=str)
def test_pictures_show_each_prediction_at_the_patch_that_it_is_of(task: Any) -> None:
    """A model that predicts the truth shows the image; what is grey is what is predicted."""
    preprocess = PreprocessConfig()
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    normalised = normalise_images(jnp.asarray(images), preprocess)
    plan = task.plan(keys(3), 3, (4, 4))
    truth = patch_targets(normalised, 2, True)[:, plan.goals]
    shown = plan_pictures(plan, normalised, truth, MODEL.image, True, preprocess)
    assert np.abs(shown["prediction"].astype(int) - images.astype(int)).max() <= 1
    grey = (np.asarray(patchify(shown["masked"], 2)) == 128).all(axis=-1)
    expected = np.zeros((3, 16), bool)
    for row in range(3):
        expected[row, plan.goals[np.asarray(plan.predicted)[row]]] = True
    np.testing.assert_array_equal(grey, expected)
    aim, params = initial(config(task))
    own = jax.jit(aim.reconstruct)(params, images, keys(3))
    seen = (np.asarray(patchify(own["masked"], 2)) != 128).any(axis=-1)
    np.testing.assert_array_equal(patchify(own["prediction"], 2)[seen], patchify(images, 2)[seen])


@pytest.mark.parametrize("head", ["none", "mlp", "transformer"])
def test_flops_are_those_of_the_jaxpr(head: str) -> None:
    aim_config = config(Autoregression(), model__head__form=head)
    aim = aim_config.build(PreprocessConfig(), jnp.float32)
    params = unbox(jax.eval_shape(aim.init, jax.random.key(0))[0])
    plan = Autoregression().plan(None, 1, (4, 4))
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    assert (
        3 * count_dot_flops(lambda p, x: aim.predict(p, x, plan)["pixels"], params, images) == aim_config.train_flops()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masking": MaskedModelling()}, r"model\.image\.mask_token must be true with masking = 'masked'"),
        ({"model.image.mask_token": True}, r"model\.image\.mask_token must be false with masking = 'autoregressive'"),
        ({"masking": MaskedModelling(1.0)}, r"masking\.ratio = 1\.0 is a share"),
        ({"model.image.registers": 2}, r"model\.image\.class_token and image\.registers are no patches"),
        ({"model.image.pool": "mean"}, r"model\.image\.pool = 'mean' makes a vector"),
        ({"model.image.patch_size": 8}, r"model\.image\.patch_size = 8 makes one patch"),
        ({"model.head.width": 18, "model.head.heads": 2}, r"model\.head\.width = 18 must be divisible by 4"),
    ],
)
def test_what_can_not_train_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(override(config(Autoregression()), changes))
