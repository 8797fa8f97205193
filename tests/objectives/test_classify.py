"""Classification: its loss against PyTorch's, its mixtures against loops, and what no split of the batch may change."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from jax.sharding import Mesh

from vlm_jax import schema
from vlm_jax.assemble import Program
from vlm_jax.config import load_config
from vlm_jax.data.sources import DigitsConfig
from vlm_jax.evals.accuracy import AccuracyConfig
from vlm_jax.flops import TRAIN_OVER_FORWARD, count_dot_flops
from vlm_jax.mesh import batch_sharding
from vlm_jax.models.classifier import ClassifierConfig
from vlm_jax.models.position import sincos_2d
from vlm_jax.models.resnet import ResNetConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.classify import ClassifyConfig
from vlm_jax.objectives.mixing import MixingConfig, own_share, partners
from vlm_jax.parts import Part
from vlm_jax.schema import ConfigError
from vlm_jax.train import train

TOWER = ViTConfig(
    image_size=8, patch_size=4, width=32, depth=3, heads=4, mlp_dim=64, pool="mean", pre_norm=False, post_norm=False
)
MODEL = ClassifierConfig(image=TOWER, classes=10, norm=True)
BOTH = MixingConfig(mixup=0.8, cutmix=1.0)
SMOOTH = {"optimizer__eps": 0.01, "optimizer__learning_rate": 0.1}


def classify(**changes: Any) -> ClassifyConfig:
    return schema.override(ClassifyConfig(model=MODEL), {k.replace("__", "."): v for k, v in changes.items()})


def program(mesh: Mesh | None = None, objective: ClassifyConfig | None = None, **settings: Any) -> Program:
    return tiny.program(mesh, objective=objective or classify(), evals=(), **settings)


def batch(mesh: Mesh, rows: int = 16, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    host = {
        "image": rng.integers(0, 256, (rows, 8, 8, 3)).astype(np.uint8),
        "label": rng.integers(0, 10, rows).astype(np.int32),
    }
    return {key: jax.device_put(value, batch_sharding(mesh)) for key, value in host.items()}


def run_steps(program_: Program, count: int = 2) -> tuple[Any, list[dict[str, float]]]:
    history = []
    with jax.set_mesh(program_.mesh):
        state = program_.setup.init()
        for index in range(count):
            state, metrics = program_.step(state, batch(program_.mesh, seed=index))
            history.append({name: float(total) / float(n) for name, (total, n) in metrics.items()})
    return state, history


def loss(objective: Any, params: Any, rows: Any, step: int = 0) -> tuple[float, float]:
    """(mean loss, top-1) without anything random but the mixture."""
    (total, count), aux = objective.loss(params, {}, rows, jax.random.split(jax.random.key(0), 16), jnp.int32(step))
    return float(total / count), float(aux.metrics["top1"][0] / count)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_pytorchs_on_the_pooled_patches(smoothing: float) -> None:
    torch = pytest.importorskip("torch")
    one = program(objective=classify(label_smoothing=smoothing, model__head_init=0.5))
    params, rows = one.setup.init().params, batch(one.mesh)
    named = one.objective.encode(params, rows["image"], intermediates=True)  # pyright: ignore
    tokens = torch.tensor(np.array(named["blocks"][-1]))[:, 1:]  # without the class token, and without a norm
    head = jax.tree.map(lambda x: torch.tensor(np.array(x)), params["head"])
    normed = torch.nn.functional.layer_norm(tokens.mean(1), (32,), head["norm"]["scale"], head["norm"]["bias"], 1e-6)
    logits = normed @ head["classifier"]["kernel"] + head["classifier"]["bias"]
    labels = torch.tensor(np.array(rows["label"])).long()
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    value, top1 = loss(one.objective, params, rows)
    assert value == pytest.approx(float(expected), rel=1e-5)
    assert top1 == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    np.testing.assert_allclose(one.objective.class_scores(params, rows["image"]), logits, atol=2e-5)


@pytest.mark.parametrize("mixing", [MixingConfig(mixup=0.8), MixingConfig(cutmix=1.0), BOTH])
def test_mixtures_against_a_loop_over_pixels(mixing: MixingConfig) -> None:
    objective: Any = program(objective=classify(mixing=mixing, label_smoothing=0.1)).objective
    rows = tiny.host(batch(tiny.mesh()))
    kinds = set()
    for step in range(6):
        share = np.asarray(own_share(mixing, jnp.int32(step), 8, 8), np.float64)
        images, targets = objective._mixed(rows, jnp.int32(step))
        plain, smooth = objective._mixed.__self__, np.full((16, 10), 0.01)
        smooth[np.arange(16), rows["label"]] += 0.9
        normal = (rows["image"] / 255.0 - np.asarray(plain.preprocess.mean)) / np.asarray(plain.preprocess.std)
        expected_images, expected_targets = np.zeros_like(normal), np.zeros_like(smooth)
        for row in range(16):
            other = (row + 8) % 16
            for y in range(8):
                for x in range(8):
                    expected_images[row, y, x] = share[y, x] * normal[row, y, x]
                    expected_images[row, y, x] += (1 - share[y, x]) * normal[other, y, x]
            expected_targets[row] = share.mean() * smooth[row] + (1 - share.mean()) * smooth[other]
        np.testing.assert_allclose(images, expected_images, atol=1e-5)
        np.testing.assert_allclose(targets, expected_targets, atol=1e-6)
        np.testing.assert_allclose(np.asarray(targets).sum(axis=1), 1, atol=1e-5)
        kinds.add("box" if set(np.unique(share)) <= {0.0, 1.0} else "mixup")
        if kinds == {"box"}:
            inside = np.argwhere(share == 0)
            if len(inside):  # the zeros are one full rectangle
                height, width = inside.max(axis=0) - inside.min(axis=0) + 1
                assert height * width == len(inside)
    assert kinds == ({"box", "mixup"} if mixing == BOTH else {"box"} if mixing.cutmix else {"mixup"})


def test_coefficients_have_their_distribution() -> None:
    """Beta(0.8, 0.8) has mean 1/2 and variance 1 / (4 (2 * 0.8 + 1)); a box may be cut at the edge, never grow."""
    steps = jnp.arange(4000)
    share = jax.vmap(lambda step: own_share(MixingConfig(mixup=0.8), step, 1, 1)[0, 0])(steps)
    assert float(share.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(share.var()) == pytest.approx(1 / (4 * 2.6), abs=0.005)
    half = jax.vmap(lambda step: own_share(MixingConfig(mixup=0.8, probability=0.25), step, 1, 1)[0, 0] < 1)(steps)
    assert float(half.mean()) == pytest.approx(0.25, abs=0.02)
    boxed = jax.vmap(lambda step: own_share(BOTH, step, 32, 32))(steps[:1000])
    is_box = jnp.all((boxed == 0) | (boxed == 1), axis=(1, 2))
    assert float(is_box.mean()) == pytest.approx(0.5, abs=0.04)
    assert 0.5 < float(boxed[is_box].mean()) < 0.75


def test_partners_are_mutual_and_stay_in_their_microbatch() -> None:
    rows = jnp.arange(16)
    pair = np.asarray(partners(rows))
    np.testing.assert_array_equal(pair[pair], rows)
    for parts in (2, 4, 8):
        for place in range(parts):  # as the step splits a batch: rows j, j + parts, ...
            micro = rows[place::parts]
            np.testing.assert_array_equal(partners(micro), pair[np.asarray(micro)])
    with pytest.raises(
        ConfigError, match=r"mixes pairs of rows, and a microbatch has 3; choose config\.data\.batch_size"
    ):
        partners(jnp.arange(3))


def test_neither_mesh_nor_microbatches_change_anything() -> None:
    """With mixtures and drop path, whose random numbers belong to the step and to the row."""
    objective = classify(mixing=BOTH, label_smoothing=0.1, model__image__drop_path=0.3)
    plain, want = run_steps(program(objective=objective, **SMOOTH))
    for shape, accum in (((2, 2, 2), 2), ((1, 1, 1), 4), ((8, 1, 1), 1)):
        state, got = run_steps(program(tiny.mesh(*shape), objective, train__accum_steps=accum, **SMOOTH))
        for a, b in zip(got, want, strict=True):
            assert (a["loss"], a["top1"]) == (pytest.approx(b["loss"], rel=1e-5), b["top1"])
            assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)
        tiny.assert_trees_close(state.params, plain.params, rtol=5e-4)
    _, unmixed = run_steps(program(objective=classify(label_smoothing=0.1, model__image__drop_path=0.3), **SMOOTH))
    assert unmixed[0]["loss"] != pytest.approx(want[0]["loss"], rel=1e-3)


def test_layers_learn_at_the_rates_of_mae() -> None:
    """decay ** (depth + 1 - id): id 0 for embeddings, j + 1 for block j, depth + 1 for the rest (its util/lr_decay)."""
    parts = (Part("all", ".*", layer_decay=0.65),)
    one = program(parts=parts, objective=classify(model__image__pos_embed="sincos_learned"))
    factors = one.setup.parts.learning_rate_factors(one.setup.abstract.params)
    by_id = [0.65 ** (3 + 1 - layer) for layer in range(5)]
    image, head = factors["image"], factors["head"]
    assert image["pos_embed"] == image["class_token"] == image["patch_embed"]["kernel"] == pytest.approx(by_id[0])
    for leaf in jax.tree.leaves(image["blocks"]):
        np.testing.assert_allclose(np.ravel(leaf), by_id[1:4], rtol=1e-6)
    assert {float(x) for x in jax.tree.leaves(head)} == {1.0}
    assert by_id[4] == 1.0


def test_positions_that_start_at_the_fixed_ones_are_learned() -> None:
    fixed = program(objective=classify(model__image__pos_embed="sincos"))
    free = program(objective=classify(model__image__pos_embed="sincos_learned"), optimizer__learning_rate=0.1)
    start = tiny.host(free.setup.init().params)
    assert "pos_embed" not in fixed.setup.abstract.params["image"]
    np.testing.assert_array_equal(start["image"]["pos_embed"], sincos_2d((2, 2), 32, 1))
    state, _ = run_steps(free, 1)
    assert not np.allclose(state.params["image"]["pos_embed"], start["image"]["pos_embed"])
    # The same vectors, whichever way the table came in.
    images = batch(tiny.mesh())["image"]
    rest = {key: value for key, value in start["image"].items() if key != "pos_embed"}
    a, b = (
        one.objective.image_features({"image": tower}, images) for one, tower in ((free, start["image"]), (fixed, rest))
    )
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_head_starts_small_and_its_flops_are_counted() -> None:
    one = program(objective=classify(model__head_init=2e-5))
    kernel = np.asarray(one.setup.init().params["head"]["classifier"]["kernel"])
    assert kernel.std() == pytest.approx(2e-5, rel=0.15)
    image = np.zeros((1, 8, 8, 3), np.uint8)
    counted = count_dot_flops(one.objective.class_scores, one.setup.abstract.params, image)
    assert one.config.objective.train_flops() == TRAIN_OVER_FORWARD * counted


@pytest.mark.slow
def test_batch_statistics_of_a_convolutional_tower_move() -> None:
    """And with them those of the loss, which are the tower's own in training."""
    tower = ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, heads=4)
    objective: Any = program(objective=ClassifyConfig(model=ClassifierConfig(image=tower, classes=10))).objective
    params = nn.unbox(objective.init(jax.random.key(0))[0])
    rows = batch(tiny.mesh()) | {"image": np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3)).astype(np.uint8)}
    _, aux = jax.jit(objective.loss)(params, {}, rows, jax.random.split(jax.random.key(0), 16), jnp.int32(0))
    moved = objective.constrain(params, aux.updates)["image"]
    assert any(
        "running_mean" in jax.tree_util.keystr(path) and not np.array_equal(a, b)
        for (path, a), b in zip(
            jax.tree_util.tree_flatten_with_path(params["image"])[0], jax.tree.leaves(moved), strict=True
        )
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.classes": 1}, r"model\.classes = 1 must be at least 2"),
        ({"model.image.pool": "none"}, r"model\.image\.pool = 'none' leaves no vector to classify"),
        ({"label_smoothing": 1.0}, r"label_smoothing = 1\.0 must lie in \[0, 1\)"),
        ({"mixing.cutmix": -1.0}, r"mixing\.cutmix = -1\.0 must not be negative"),
    ],
)
def test_what_can_not_train_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schema.validate(schema.override(classify(), changes))


def test_classes_and_data_must_agree(tmp_path: Any) -> None:
    config = load_config("configs/vit_s16_supervised.py:smoke", {"objective.model.classes": 12})
    with pytest.raises(ConfigError, match=r"config\.data\.source names 10 classes, but .*\.classes = 12"):
        train(config, str(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"config\.data\.batch_size = 31 must be even"):
        load_config("configs/vit_s16_supervised.py:smoke", {"data.batch_size": 31})
    with pytest.raises(ConfigError, match=r"Evaluation 'own' \(accuracy\) needs a model with a classifier"):
        train(tiny.config(evals=(AccuracyConfig("own", DigitsConfig()),)), str(tmp_path / "b"))


def test_random_labels_are_learned_by_heart() -> None:
    """The loss of a batch that is seen again and again goes from ln 10 to nothing."""
    one = program(optimizer__learning_rate=1e-2, train__steps=60)
    with jax.set_mesh(one.mesh):
        state, rows, losses = one.setup.init(), batch(one.mesh), []
        for _ in range(60):
            state, metrics = one.step(state, rows)
            losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[0] == pytest.approx(math.log(10), rel=0.1)
    assert losses[-1] < 0.05
