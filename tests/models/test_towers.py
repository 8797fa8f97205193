"""Image tower, text tower and the pair of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax import schema
from vlm_jax.models.stochastic import drop_patches
from vlm_jax.models.text import TextConfig, TextTower
from vlm_jax.models.two_tower import TwoTower, TwoTowerConfig
from vlm_jax.models.vit import ViT, ViTConfig

IMAGE = ViTConfig(image_size=(16, 24), patch_size=8, width=16, depth=2, heads=2, mlp_dim=24)
TEXT = TextConfig(vocab_size=30, length=7, width=16, depth=2, heads=2, mlp_dim=24, eos_id=29)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(4, 16, 24, 3)).astype(np.float32)
IDS = np.array(
    [[5, 29, 0, 0, 0, 0, 0], [1, 2, 3, 29, 0, 0, 0], [7, 7, 7, 7, 7, 7, 29], [9, 8, 29, 29, 29, 29, 29]], np.int32
)
KEYS = jax.random.split(jax.random.key(4), 4)


def start(module, *inputs):
    return nn.unbox(jax.jit(module.init)(jax.random.key(0), *inputs))


def test_patches_are_a_strided_convolution():
    """And pixels that fill no patch are cut off."""
    plain = {"patch_bias": True, "pre_norm": False, "class_token": False, "pool": "mean"}
    config = schema.override(IMAGE, plain | {"image_size": "16,29", "cut_remainder": True})
    schema.validate(config)
    images = np.random.default_rng(2).normal(size=(4, 16, 29, 3)).astype(np.float32)
    variables = start(ViT(config), images)
    embed = ViT(config).apply(variables, images, intermediates=True)["embed"]
    patch = variables["params"]["patch_embed"]
    convolved = jax.lax.conv_general_dilated(
        images, patch["kernel"], (8, 8), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(4, 6, 16)
    expected = convolved + patch["bias"][None, None] + variables["params"]["pos_embed"][None]
    np.testing.assert_allclose(embed, expected, atol=1e-5)


def test_tokens_are_class_registers_patches():
    config = schema.override(IMAGE, {"registers": 3, "pre_norm": False})
    variables = start(ViT(config), IMAGES)
    outputs = ViT(config).apply(variables, IMAGES, intermediates=True)
    params = variables["params"]
    assert outputs["tokens"].shape == (4, 1 + 3 + 6, 16)
    assert outputs["blocks"].shape == (2, 4, 10, 16)
    np.testing.assert_allclose(outputs["embed"][2, 0], params["class_token"] + params["pos_embed"][0], atol=1e-6)
    np.testing.assert_allclose(outputs["embed"][2, 1:4], params["registers"], atol=1e-6)
    assert params["pos_embed"].shape == (7, 16)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_image_pools(pool):
    config = schema.override(IMAGE, {"pool": pool, "registers": 1})
    outputs = ViT(config).apply(start(ViT(config), IMAGES), IMAGES)
    tokens = np.asarray(outputs["tokens"])
    expected = (
        tokens[:, 0] if pool == "cls" else np.stack([np.mean([row[i] for i in range(2, 8)], axis=0) for row in tokens])
    )
    np.testing.assert_allclose(outputs["pooled"], expected, atol=1e-5)


def test_map_head_is_attention_of_one_query_over_the_valid_tokens():
    config = schema.override(IMAGE, {"pool": "map", "class_token": False, "activation": "gelu"})
    outputs_of = ViT(config)
    variables = start(outputs_of, IMAGES)
    outputs = outputs_of.apply(variables, IMAGES)
    p = jax.tree.map(np.asarray, variables["params"]["map_head"])
    tokens, erf = np.asarray(outputs["tokens"]), np.vectorize(math.erf)
    attn, mlp = p["attn"], p["mlp"]
    q = np.einsum("td,dhe->the", p["probe"], attn["query"]["kernel"]) + attn["query"]["bias"]
    k, v = (np.einsum("bsd,dhe->bshe", tokens, attn[n]["kernel"]) + attn[n]["bias"] for n in ("key", "value"))
    weights = np.exp(np.einsum("the,bshe->bhts", q, k) / np.sqrt(8))
    context = np.einsum("bhts,bshe->bthe", weights / weights.sum(-1, keepdims=True), v)
    x = np.einsum("bthe,hed->btd", context, attn["out"]["kernel"]) + attn["out"]["bias"]
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    hidden = normed @ mlp["fc1"]["kernel"] + mlp["fc1"]["bias"]
    x = x + 0.5 * hidden * (1 + erf(hidden / np.sqrt(2))) @ mlp["fc2"]["kernel"] + mlp["fc2"]["bias"]
    np.testing.assert_allclose(outputs["pooled"], x[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("pool", "expected"),
    [("eot_argmax", [1, 3, 6, 2]), ("first_eos", [1, 3, 6, 2]), ("last", [6, 6, 6, 6]), ("first", [0, 0, 0, 0])],
)
def test_text_pools_take_one_token(pool, expected):
    config = schema.override(TEXT, {"pool": pool, "causal": pool != "first"})
    outputs = TextTower(config).apply(start(TextTower(config), IDS), IDS)
    np.testing.assert_allclose(outputs["pooled"], np.asarray(outputs["tokens"])[np.arange(4), expected], atol=1e-5)


def test_mean_pool_and_attention_leave_padding_out():
    config = schema.override(TEXT, {"pool": "mean", "causal": False, "mask_padding": True})
    variables = start(TextTower(config), IDS)
    outputs = TextTower(config).apply(variables, IDS)
    tokens = np.asarray(outputs["tokens"])
    expected = np.stack([row[ids != 0].mean(axis=0) for row, ids in zip(tokens, IDS, strict=True)])
    np.testing.assert_allclose(outputs["pooled"], expected, atol=1e-5)
    short = TextTower(config).apply(variables, IDS[:1, :2])["pooled"]
    np.testing.assert_allclose(outputs["pooled"][:1], short, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_only_a_bidirectional_text_tower_sees_ahead(causal):
    config = schema.override(TEXT, {"causal": causal})
    variables = start(TextTower(config), IDS)
    changed = IDS.copy()
    changed[:, -1] = 11
    before, after = (TextTower(config).apply(variables, ids)["tokens"][:, 0] for ids in (IDS, changed))
    assert (np.abs(before - after).max() < 1e-6) == causal


def test_padding_with_zeros_or_end_tokens_gives_clip_the_same_embedding():
    variables = start(TextTower(TEXT), IDS)
    padded = IDS.copy()
    padded[0, 2:], padded[1, 4:] = 29, 29
    np.testing.assert_allclose(
        TextTower(TEXT).apply(variables, IDS)["pooled"], TextTower(TEXT).apply(variables, padded)["pooled"], atol=1e-6
    )


def test_patch_dropout_keeps_its_count_in_order_and_depends_on_the_rows_key_only():
    x = jnp.broadcast_to(jnp.arange(10.0)[None, :, None], (4, 10, 2))
    kept = np.asarray(drop_patches(x, 0.5, KEYS))[:, :, 0]
    assert kept.shape == (4, 5)
    assert (np.diff(kept, axis=1) > 0).all()
    assert len({tuple(row) for row in kept}) > 1
    alone = np.asarray(drop_patches(x[:1], 0.5, KEYS[2:3]))[:, :, 0]
    np.testing.assert_array_equal(alone[0], kept[2])
    assert drop_patches(x, 0.5, None) is x


def test_patch_dropout_drops_every_patch_equally_often():
    keys = jax.random.split(jax.random.key(8), 2000)
    kept = drop_patches(jnp.broadcast_to(jnp.arange(8)[None, :, None], (2000, 8, 1)), 0.75, keys)
    counts = np.bincount(np.asarray(kept).ravel(), minlength=8) / 2000
    np.testing.assert_allclose(counts, np.full(8, 0.25), atol=0.05)


def test_patch_dropout_keeps_the_class_token_and_the_positions():
    config = schema.override(IMAGE, {"patch_dropout": 0.5, "pre_norm": False})
    variables = start(ViT(config), IMAGES)
    whole = np.asarray(ViT(config).apply(variables, IMAGES, intermediates=True)["embed"])
    dropped = np.asarray(ViT(config).apply(variables, IMAGES, KEYS, intermediates=True)["embed"])
    assert dropped.shape == (4, 1 + 3, 16)
    np.testing.assert_array_equal(dropped[:, 0], whole[:, 0])
    for row, full in zip(dropped[:, 1:], whole[:, 1:], strict=True):
        assert all(any(np.array_equal(token, candidate) for candidate in full) for token in row)


def two_tower(**changes):
    config = schema.override(TwoTowerConfig(IMAGE, TEXT, embed_dim=12), changes)
    schema.validate(config)
    return TwoTower(config)


@pytest.fixture(scope="module")
def variables():
    return start(two_tower(), IMAGES, IDS)


def test_outputs_of_two_towers(variables):
    outputs = two_tower().apply(variables, IMAGES, IDS, intermediates=True)
    for name in ("image_features", "text_features"):
        np.testing.assert_allclose(np.linalg.norm(outputs[name], axis=1), np.ones(4), rtol=1e-6)
    np.testing.assert_allclose(outputs["logit_scale"], 1 / 0.07, rtol=1e-6)
    assert {"image/blocks", "text/blocks", "image/embed", "text/tokens", "image/pooled"} <= outputs.keys()
    encoded = two_tower().apply(variables, IMAGES, method="encode_image")
    np.testing.assert_allclose(outputs["image_features"], encoded, atol=1e-6)
    encoded = two_tower().apply(variables, IDS, method="encode_text")
    np.testing.assert_allclose(outputs["text_features"], encoded, atol=1e-6)
    raw = two_tower().apply(variables, IDS, method="encode_text", normalize=False)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), encoded, atol=1e-6)


def test_encoding_draws_what_the_pair_draws():
    model = two_tower(**{"image.patch_dropout": 0.5, "text.dropout": 0.3})
    variables = start(model, IMAGES, IDS)
    outputs = model.apply(variables, IMAGES, IDS, KEYS)
    for name, method, inputs in (("image_features", "encode_image", IMAGES), ("text_features", "encode_text", IDS)):
        np.testing.assert_allclose(outputs[name], model.apply(variables, inputs, KEYS, method=method), atol=1e-6)
        assert np.abs(outputs[name] - model.apply(variables, inputs, method=method)).max() > 1e-3


def test_heads_and_scalars_of_the_siglip_kind():
    model = two_tower(projection="mlp", text_projection_bias=True, logit_bias_init=-10.0, logit_scale_init=math.log(10))
    variables = start(model, IMAGES, IDS)
    params = variables["params"]
    assert params["image"]["projection"]["out"].keys() == {"kernel"}
    assert params["text"]["projection"]["out"].keys() == {"kernel", "bias"}
    outputs = model.apply(variables, IMAGES, IDS)
    assert float(outputs["logit_bias"]) == -10.0
    none = start(two_tower(projection="none", embed_dim=16), IMAGES, IDS)["params"]
    assert "projection" not in none["image"]
    text = two_tower(projection="text", text_projection_bias=True, embed_dim=16)
    params = start(text, IMAGES, IDS)["params"]
    assert "projection" not in params["image"] and params["text"]["projection"].keys() == {"kernel", "bias"}


def test_the_zero_vector_has_a_finite_gradient(variables):
    zeroed = jax.tree.map(jnp.zeros_like, variables)
    gradient = jax.jit(jax.grad(lambda v: two_tower().apply(v, IMAGES, method="encode_image").sum()))(zeroed)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_results_do_not_depend_on_the_mesh(variables):
    from vlm_jax.mesh import MeshConfig, make_mesh, shardings

    model = two_tower()
    expected = model.apply(variables, IMAGES, IDS, KEYS)
    boxed = jax.eval_shape(model.init, jax.random.key(0), IMAGES, IDS)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(variables, shardings(boxed, mesh))
        outputs = jax.jit(model.apply)(placed, IMAGES, IDS, KEYS)
    for name in ("image_features", "text_features"):
        np.testing.assert_allclose(outputs[name], expected[name], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image.patch_size": 7}, r"config.image.patch_size = 7 does not divide image_size 16x24; use one of"),
        ({"image.heads": 3}, r"config.image.heads = 3 does not divide width 16"),
        ({"image.class_token": False}, r"config.image.pool = 'cls' needs class_token"),
        ({"text.eos_id": 30}, r"config.text.eos_id = 30 is no id of a vocabulary of 30"),
        ({"projection": "none"}, r"config.projection = 'none' needs image.width 16"),
        ({"projection": "text"}, r"config.projection = 'text' needs image.width 16"),
        ({"image.drop_path": 1.5}, r"config.image.drop_path = 1.5"),
    ],
)
def test_impossible_configs_name_the_key(changes, message):
    with pytest.raises(schema.ConfigError, match=message):
        two_tower(**changes)


def test_wrong_inputs_are_named(variables):
    with pytest.raises(ValueError, match="takes images of 16x24"):
        two_tower().apply(variables, IMAGES[:, :, :16], method="encode_image")
    with pytest.raises(ValueError, match="at most 7 tokens, not 9"):
        two_tower().apply(variables, np.zeros((1, 9), np.int32), method="encode_text")
