"""CLIP's ResNet and its batch norm, without another library; parity with open_clip's is in tests/interop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from flax.traverse_util import flatten_dict

from vlm_jax import schema
from vlm_jax.flops import count_dot_flops
from vlm_jax.mesh import batch_sharding, shardings
from vlm_jax.models.batch_norm import MOMENTUM, BatchNorm, moved
from vlm_jax.models.presets import CLIP
from vlm_jax.models.projection import ProjectionConfig
from vlm_jax.models.resnet import ResNetConfig

CONFIG = ResNetConfig(image_size=64, layers=(1, 2, 1, 1), width=4, heads=4)
HEAD = ProjectionConfig("linear", 6)
ROWS = 8
IMAGES = np.random.default_rng(0).normal(size=(ROWS, 64, 64, 3)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(1), ROWS)
BOXED = jax.eval_shape(CONFIG.build(HEAD, jnp.float32).init, jax.random.key(2), IMAGES[:1])


@pytest.fixture(scope="module")
def initial() -> Any:
    return nn.unbox(jax.jit(CONFIG.build(HEAD, jnp.float32).init)(jax.random.key(2), IMAGES[:1]))


@pytest.fixture(scope="module")
def variables(initial: Any) -> Any:
    """The initial weights, but with the residual branches open and the running statistics away from their start."""
    rng = np.random.default_rng(3)
    norms = ("bn", "running")
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x + rng.random(x.shape, np.float32) if any(n in str(path) for n in norms) else x, initial
    )


@pytest.fixture(scope="module")
def trained(variables: Any) -> Any:
    return jax.jit(CONFIG.build(HEAD, jnp.float32).apply)(variables, IMAGES, KEYS)


def test_batch_norm_is_numpys():
    """Rows of very different mean, far from zero: what makes a variance by E[x^2] - E[x]^2 wrong."""
    rng = np.random.default_rng(4)
    x = (rng.normal(size=(4, 3, 5, 2)) + 1000 * np.arange(4).reshape(4, 1, 1, 1)).astype(np.float32)
    variables = nn.unbox(BatchNorm().init(jax.random.key(0), x, batch_statistics=True))
    y, statistics = BatchNorm().apply(variables, x, batch_statistics=True)  # pyright: ignore
    mean, variance = x.astype(np.float64).mean((0, 1, 2)), x.astype(np.float64).var((0, 1, 2))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + 1e-5), atol=1e-5)
    new = moved(variables, {"params": statistics})["params"]
    np.testing.assert_allclose(new["running_mean"], MOMENTUM * mean, rtol=1e-5)
    unbiased = variance * 60 / 59
    np.testing.assert_allclose(new["running_variance"], (1 - MOMENTUM) + MOMENTUM * unbiased, rtol=1e-5)
    assert new["scale"] is variables["params"]["scale"]


def test_outputs_and_shapes(variables: Any, trained: Any):
    evaluated: Any = jax.jit(CONFIG.build(HEAD, jnp.float32).apply)(variables, IMAGES)
    for outputs in (trained, evaluated):
        assert outputs["tokens"].shape == (ROWS, CONFIG.token_count, CONFIG.token_width) == (ROWS, 4, 128)
        assert outputs["pooled"].shape == (ROWS, CONFIG.pooled_width)
        assert outputs["embedding"].shape == (ROWS, 6)
    assert "statistics" not in evaluated
    assert all(leaf.shape[0] == ROWS for leaf in jax.tree.leaves(trained["statistics"]))
    head = variables["params"]["projection"]
    np.testing.assert_allclose(trained["pooled"] @ head["kernel"] + head["bias"][None], trained["embedding"], atol=1e-5)
    assert np.abs(trained["embedding"] - evaluated["embedding"]).max() > 1e-2


def test_frozen_statistics_make_training_and_evaluation_one(variables: Any, trained: Any):
    config = schema.override(CONFIG, {"frozen_statistics": True})
    module = config.build(HEAD, jnp.float32)
    once: Any = jax.jit(module.apply)(variables, IMAGES, KEYS)
    np.testing.assert_array_equal(once["embedding"], jax.jit(module.apply)(variables, IMAGES)["embedding"])  # pyright: ignore
    assert "statistics" not in once
    assert config.updated(variables["params"], trained["statistics"]) is variables["params"]
    assert CONFIG.updated(variables["params"], None) is variables["params"]


def test_nothing_depends_on_the_mesh(variables: Any, trained: Any):
    module, mesh = CONFIG.build(HEAD, jnp.float32), tiny.mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(variables, shardings(BOXED, mesh))
        images, keys = jax.device_put((IMAGES, KEYS), batch_sharding(mesh))
        outputs: Any = jax.jit(module.apply)(placed, images, keys)
        new = jax.jit(CONFIG.updated)(placed["params"], outputs["statistics"])
    tiny.assert_trees_close(outputs, trained, 1e-5)
    tiny.assert_trees_close(new, CONFIG.updated(variables["params"], trained["statistics"]), 1e-5)


def test_rematerialisation_keeps_what_enters_each_bottleneck(variables: Any):
    def checkpoints(config: ResNetConfig) -> int:
        module = config.build(HEAD, jnp.float32)
        jaxpr = jax.make_jaxpr(lambda v: module.apply(v, IMAGES, KEYS)["embedding"])(variables)  # pyright: ignore
        return sum(equation.primitive.name.startswith(("remat", "checkpoint")) for equation in jaxpr.eqns)

    assert checkpoints(CONFIG) == 0
    assert checkpoints(schema.override(CONFIG, {"remat": "full"})) == sum(CONFIG.layers)


def test_the_recipe_of_the_initial_weights(initial: Any):
    flat = {path: np.asarray(x) for path, x in flatten_dict(initial["params"], sep="/").items()}
    for path, leaf in flat.items():
        if path.endswith("bn3/scale") and "stem" not in path:
            assert not leaf.any(), path
        elif path.endswith(("scale", "running_variance")):
            assert (leaf == 1).all(), path
        elif "/conv" in path:
            bound = np.prod(leaf.shape[:3]) ** -0.5
            assert np.abs(leaf).max() <= bound and leaf.std() == pytest.approx(bound / 3**0.5, rel=0.2), path
    assert flat["attn_pool/query/kernel"].std() == pytest.approx(128**-0.5, rel=0.05)
    assert flat["projection/kernel"].std() == pytest.approx(128**-0.5, rel=0.1)


def test_an_objective_moves_the_running_statistics_after_a_step():
    changes = {"image_size": 32, "layers": (1, 1, 1, 1), "width": 2, "heads": 2}
    tower = {f"objective__model__image__{key}": value for key, value in changes.items()}
    config = tiny.config(objective__model__image="resnet", **tower)
    objective = config.objective.build(config.data.preprocess, jnp.float32)
    images = np.random.default_rng(6).integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    batch = tiny.batch(tiny.mesh(), rows=8) | {"image": jnp.asarray(images)}
    shapes = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0))[0])
    rng = np.random.default_rng(7)
    before = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.1, x.shape), jnp.float32), shapes)
    _, aux = jax.jit(objective.loss)(before, {}, batch, KEYS, jnp.zeros((), jnp.int32))
    after = objective.constrain(before, aux.updates)["image"]["stem"]["bn1"]
    x = ((images / 255 - np.asarray(config.data.preprocess.mean)) / np.asarray(config.data.preprocess.std)).astype("f4")
    kernel = before["image"]["stem"]["conv1"]
    numbers = ("NHWC", "HWIO", "NHWC")
    y = np.asarray(jax.lax.conv_general_dilated(x, kernel, (2, 2), [(1, 1)] * 2, dimension_numbers=numbers))
    start = before["image"]["stem"]["bn1"]
    for name, value in (("running_mean", y.mean((0, 1, 2))), ("running_variance", y.var((0, 1, 2), ddof=1))):
        expected = (1 - MOMENTUM) * start[name] + MOMENTUM * value
        np.testing.assert_allclose(after[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["RN50", "RN50x64"])
def test_the_closed_form_counts_every_product(name: str):
    config, embed_dim = CLIP[name].image, CLIP[name].embed_dim
    module = config.build(ProjectionConfig("linear", embed_dim), jnp.float32)
    images = jax.ShapeDtypeStruct((1, *config.image_shape, 3), jnp.float32)
    abstract = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), images))
    assert count_dot_flops(module.apply, abstract, images) == config.forward_flops(embed_dim)
    assert count_dot_flops(lambda v, x: module.apply(v, x), abstract, images) > config.forward_flops(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 100}, "image_size = 100 must be a multiple of 32"),
        ({"heads": 3}, "heads = 3 does not divide the 128 channels"),
        ({"layers": (1, 0, 1, 1)}, "must be at least 1 in every stage"),
        ({"width": 3}, "width = 3 must be even"),
    ],
)
def test_impossible_configs_name_the_key(changes: Any, message: str):
    with pytest.raises(schema.ConfigError, match=message):
        schema.validate(schema.override(CONFIG, changes))
    with pytest.raises(ValueError, match="takes images of 64x64"):
        CONFIG.build(None, jnp.float32).init(jax.random.key(0), IMAGES[:, :32])
