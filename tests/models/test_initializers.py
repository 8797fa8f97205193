"""Every leaf's spread against the fans that the recipes speak of, and its range where it is uniform."""

import math

import jax
import numpy as np
import pytest
from flax.core import meta
from flax.traverse_util import flatten_dict

from vlm_jax.models.text import TextConfig
from vlm_jax.models.two_tower import TwoTower, TwoTowerConfig
from vlm_jax.models.vit import ViTConfig

W, L, MLP, PATCH = 64, 3, 256, 8  # of both towers


@pytest.fixture(scope="module")
def leaves():
    config = TwoTowerConfig(
        ViTConfig(width=W, depth=L, heads=4, mlp_dim=MLP, patch_size=PATCH, image_size=64),
        TextConfig(width=W, depth=L, heads=4, mlp_dim=MLP, vocab_size=200, length=40, eos_id=199),
        embed_dim=48,
    )
    images, ids = np.zeros((1, 64, 64, 3), np.float32), np.zeros((1, 40), np.int32)
    variables = jax.jit(TwoTower(config).init)(jax.random.key(7), images, ids)
    return {path: np.asarray(x) for path, x in flatten_dict(meta.unbox(variables)["params"], sep="/").items()}


def test_clip_recipe(leaves):
    def uniform(bound):
        return ("uniform", bound)

    def normal(std):
        return ("normal", std)

    block = {"ln_1/scale": 1.0, "ln_1/bias": 0.0, "ln_2/scale": 1.0, "ln_2/bias": 0.0, "attn/out/bias": 0.0}
    block |= {f"attn/{name}/bias": 0.0 for name in ("query", "key", "value")}
    # PyTorch draws linear biases too, from 1 / sqrt(fan in); the text tower's recipe leaves them so.
    block |= {"mlp/fc1/bias": uniform(W**-0.5), "mlp/fc2/bias": uniform(MLP**-0.5)}
    xavier = uniform(math.sqrt(6 / (W + 3 * W)))
    image = {f"attn/{name}/kernel": xavier for name in ("query", "key", "value")}
    image |= {"attn/out/kernel": uniform(W**-0.5)}
    image |= {"mlp/fc1/kernel": uniform(W**-0.5), "mlp/fc2/kernel": uniform(MLP**-0.5)}
    residual = W**-0.5 * (2 * L) ** -0.5
    text = {f"attn/{name}/kernel": normal(W**-0.5) for name in ("query", "key", "value")}
    text |= {"attn/out/kernel": normal(residual), "mlp/fc2/kernel": normal(residual)}
    text |= {"mlp/fc1/kernel": normal((2 * W) ** -0.5)}
    expected = {
        "logit_scale": math.log(1 / 0.07),
        "image/patch_embed/kernel": uniform((3 * PATCH * PATCH) ** -0.5),
        "image/class_token": normal(W**-0.5),
        "image/pos_embed": normal(W**-0.5),
        "image/projection/kernel": normal(W**-0.5),
        "text/token_embed": normal(0.02),
        "text/pos_embed": normal(0.01),
        "text/projection/kernel": normal(W**-0.5),
        **{f"{norm}/scale": 1.0 for norm in ("image/ln_pre", "image/ln_post", "text/ln_final")},
        **{f"{norm}/bias": 0.0 for norm in ("image/ln_pre", "image/ln_post", "text/ln_final")},
        **{f"image/blocks/{name}": rule for name, rule in (block | image).items()},
        **{f"text/blocks/{name}": rule for name, rule in (block | text).items()},
    }
    assert leaves.keys() == expected.keys()
    for path, rule in expected.items():
        check(path, leaves[path], rule)


def check(path, leaf, rule):
    if isinstance(rule, float):
        np.testing.assert_allclose(leaf, np.full(leaf.shape, rule), rtol=1e-6, err_msg=path)
        return
    kind, size = rule
    std = size / math.sqrt(3) if kind == "uniform" else size
    # Five standard errors of a sample's deviation.
    assert abs(leaf.std() / std - 1) < 5 / math.sqrt(2 * leaf.size), path
    assert abs(leaf.mean()) < 5 * std / math.sqrt(leaf.size), path
    if kind == "uniform":
        assert np.abs(leaf).max() <= size, path
    elif leaf.size > 500:
        assert np.abs(leaf).max() > 2.2 * std, f"{path} is cut like a uniform"


def test_layers_differ(leaves):
    kernel = leaves["image/blocks/mlp/fc1/kernel"]
    assert np.abs(np.corrcoef(kernel.reshape(L, -1)) - np.eye(L)).max() < 0.05
