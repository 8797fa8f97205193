"""Contrastive losses against float64 loops in numpy, and against each other on every mesh.

The loops know only the definition: a row's cross-entropy over its own pair and its negatives.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.losses.contrastive import Form, info_nce

BATCH, WIDTH = 32, 24
MESHES = {
    "1": ((1,), ("data",)),
    "2": ((2,), ("data",)),
    "4": ((4,), ("data",)),
    "8": ((8,), ("data",)),
    "fsdp": ((2, 4), ("data", "fsdp")),
    "2x2x2": ((2, 2, 2), ("data", "fsdp", "tensor")),
}
SHARDED: tuple[Form, ...] = ("gather", "ring")


def mesh_of(name: str) -> jax.sharding.Mesh:
    sizes, axes = MESHES[name]
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes), devices=devices)


def features(kind: str, batch: int = BATCH, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random towers; aligned towers (trained: own pairs near cosine 1); identical towers (cosine exactly 1)."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(batch, WIDTH))
    noise = {"random": rng.normal(size=image.shape) * 1e3, "aligned": rng.normal(size=image.shape) * 0.3, "same": 0.0}
    text = image + noise[kind]
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text))  # type: ignore


def brute_force(image, text, scale, groups, valid):
    """(sum, gradients) in float64, by loops over the pairs: d loss_i / d logit is softmax minus one-hot."""
    image, text, scale = image.astype(np.float64), text.astype(np.float64), float(scale)
    total, d_image, d_text, d_scale = 0.0, np.zeros_like(image), np.zeros_like(text), 0.0
    rows = [i for i in range(len(image)) if valid[i]]
    for i in rows:
        negatives = [j for j in rows if groups[j] != groups[i]]
        for by_column in (False, True):
            pairs = [(j, i) if by_column else (i, j) for j in negatives]
            ratios = np.exp([scale * (image[a] @ text[b] - image[i] @ text[i]) for a, b in pairs])
            total += 0.5 * np.log1p(ratios.sum())  # log1p: a trained batch's loss is below float64's epsilon
            d_logits = 0.5 * ratios / (1.0 + ratios.sum())
            for (a, b), d_logit in [*zip(pairs, d_logits, strict=True), ((i, i), -d_logits.sum())]:
                d_image[a] += d_logit * scale * text[b]
                d_text[b] += d_logit * scale * image[a]
                d_scale += d_logit * (image[a] @ text[b])
    return total, (d_image, d_text, d_scale)


@functools.cache
def compiled(impl: Form, mesh_name: str):
    """One compilation per form and mesh serves every data set and mask."""

    def total_loss(image, text, scale, groups, valid):
        return info_nce(image, text, scale, impl=impl, positives=groups, valid=valid)

    return jax.jit(jax.value_and_grad(total_loss, argnums=(0, 1, 2), has_aux=True))


def value_and_gradients(impl: Form, mesh_name: str, image, text, scale, masks=None):
    groups, valid = MASKS["plain"] if masks is None else masks
    mesh = mesh_of(mesh_name)
    batch = NamedSharding(mesh, P(tuple(a for a in mesh.axis_names if a != "tensor")))
    image, text, groups, valid = jax.device_put((image, text, groups, valid), batch)
    with jax.set_mesh(mesh):
        return compiled(impl, mesh_name)(image, text, jnp.float32(scale), groups, valid)


def relative_error(actual, expected) -> float:
    expected = np.asarray(expected, np.float64)
    return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())


MASKS = {
    "plain": (np.arange(BATCH), np.ones(BATCH, bool)),
    "groups": (np.arange(BATCH) // 3, np.ones(BATCH, bool)),
    "padded": (np.arange(BATCH), np.arange(BATCH) < BATCH - 5),
    "both": (np.arange(BATCH) % 7, np.arange(BATCH) % 4 != 1),
}


CASES = [(scale, kind) for scale in (14.3, 100.0) for kind in ("random", "aligned")]


@functools.cache
def expected_of(scale: float, kind: str, masks: str):
    return brute_force(*features(kind), scale, *MASKS[masks])


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("impl", ["global", *SHARDED])
def test_value_and_gradients_equal_a_float64_loop(impl, mesh):
    for scale, kind in CASES:
        for masks in MASKS:
            expected, expected_gradients = expected_of(scale, kind, masks)
            (total, count), gradients = value_and_gradients(impl, mesh, *features(kind), scale, MASKS[masks])
            assert float(count) == MASKS[masks][1].sum()
            # fp32 logits near 100 are known to 4e-6; a loss far below 1 inherits that as its relative error.
            assert relative_error(total, expected) < 2e-5
            for actual, reference in zip(gradients, expected_gradients, strict=True):
                assert relative_error(actual, reference) < 2e-5


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("impl", SHARDED)
def test_sharded_forms_equal_the_global_one_on_every_mesh(impl, mesh):
    for scale, kind in CASES:
        for masks in ("plain", "both"):
            arguments = (*features(kind, seed=1), scale, MASKS[masks])
            (expected, _), expected_gradients = value_and_gradients("global", "1", *arguments)
            (total, _), gradients = value_and_gradients(impl, mesh, *arguments)
            assert relative_error(total, expected) < 1e-5
            for actual, reference in zip(gradients, expected_gradients, strict=True):
                assert relative_error(actual, reference) < 1e-5


@pytest.mark.parametrize("impl", ["global", *SHARDED])
def test_ids_and_validity_may_be_left_out(impl):
    image, text = features("random")
    with jax.set_mesh(mesh_of("4")):
        total, count = jax.jit(lambda i, t: info_nce(i, t, jnp.float32(14.3), impl=impl))(image, text)
    assert relative_error(total, expected_of(14.3, "random", "plain")[0]) < 1e-5
    assert float(count) == BATCH


@pytest.mark.parametrize("impl", ["global", *SHARDED])
def test_nothing_overflows_where_towers_coincide_at_scale_100(impl):
    image, text = features("same")
    (total, _), gradients = value_and_gradients(impl, "8", image, text, 100.0)
    assert 0.0 <= float(total) < 1e-3
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)
    # All images and texts alike: every row is a guess among the batch. Logits of 100 are known to 1e-5.
    alike = np.repeat(image[:1], BATCH, axis=0)
    (total, count), _ = value_and_gradients(impl, "8", alike, alike, 100.0)
    np.testing.assert_allclose(total / count, np.log(BATCH), rtol=1e-5)


@pytest.mark.parametrize("impl", ["global", *SHARDED])
def test_padded_rows_may_hold_nan_and_get_no_gradient(impl):
    image, text = features("random")
    valid = np.arange(BATCH) < BATCH - 9
    masks = (np.arange(BATCH), valid)
    (clean, _), _ = value_and_gradients(impl, "4", image, text, 14.3, masks)
    image[~valid], text[~valid] = np.nan, np.inf
    (total, _), (d_image, d_text, d_scale) = value_and_gradients(impl, "4", image, text, 14.3, masks)
    assert float(total) == float(clean)
    assert not np.asarray(d_image)[~valid].any()
    assert not np.asarray(d_text)[~valid].any()
    assert np.isfinite(d_scale)


@pytest.mark.parametrize("impl", ["global", *SHARDED])
def test_a_batch_of_one_group_or_of_padding_has_no_loss(impl):
    image, text = features("random")
    for masks in ((np.zeros(BATCH, int), np.ones(BATCH, bool)), (np.arange(BATCH), np.zeros(BATCH, bool))):
        (total, count), gradients = value_and_gradients(impl, "4", image, text, 100.0, masks)
        assert float(total) == 0.0
        assert float(count) == masks[1].sum()
        assert all(not np.asarray(g).any() for g in gradients)


@pytest.mark.parametrize("impl", SHARDED)
def test_bf16_features_accumulate_in_fp32(impl):
    image, text = (jnp.asarray(x, jnp.bfloat16) for x in features("aligned"))
    expected = value_and_gradients("global", "1", image.astype(jnp.float32), text.astype(jnp.float32), 100.0)
    (total, _), gradients = value_and_gradients(impl, "8", image, text, 100.0)
    assert relative_error(total, expected[0][0]) < 1e-5
    for actual, reference in zip(gradients, expected[1], strict=True):
        # The gradient is rounded to the features' 8 bits, by the gather form once per device and in its sum.
        assert relative_error(actual, reference) < 2**-7
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("impl", SHARDED)
def test_the_logits_never_exist_whole_on_a_device(impl):
    batch = 512
    mesh = mesh_of("8")
    arguments = (jax.ShapeDtypeStruct((batch, 8), jnp.float32),) * 2

    def loss(image, text):
        return info_nce(image, text, jnp.float32(10.0), impl=impl)[0]

    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("data"))
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1)), in_shardings=(sharding,) * 2).lower(*arguments).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    rows, columns = batch // 8, batch if impl == "gather" else batch // 8
    blocks = analysis.temp_size_in_bytes / (4 * rows * columns)
    assert blocks < (6 if impl == "gather" else 12)


def test_works_eagerly_and_under_an_explicit_mesh_argument():
    image, text = features("random")
    mesh = mesh_of("2")
    expected, _ = brute_force(image, text, 14.3, *MASKS["plain"])
    arguments = (jnp.asarray(image), jnp.asarray(text), jnp.float32(14.3))
    for impl in SHARDED:
        total, _ = jax.jit(functools.partial(info_nce, impl=impl, mesh=mesh))(*arguments)
        assert relative_error(total, expected) < 1e-5
    with jax.set_mesh(mesh):
        assert relative_error(info_nce(*arguments)[0], expected) < 1e-5


def test_errors_name_what_is_wrong():
    image, text = features("random", batch=6)
    scale = jnp.float32(1.0)
    with pytest.raises(ValueError, match="'local' is no form"):
        info_nce(jnp.asarray(image), jnp.asarray(text), scale, impl="local")  # type: ignore
    with pytest.raises(ValueError, match="one text per image"):
        info_nce(jnp.asarray(image), jnp.asarray(text)[:3], scale)
    with pytest.raises(ValueError, match="multiple of 4"):
        info_nce(jnp.asarray(image), jnp.asarray(text), scale, mesh=mesh_of("4"))
