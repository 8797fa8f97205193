"""What every loss over pairs promises in every form: padding, memory, precision, meshes, errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from pair_cases import BATCH, FORMS, SHARDED, features, mesh_of, relative_error, value_and_gradients

from vlm_jax.losses.contrastive import info_nce
from vlm_jax.losses.sigmoid import sigmoid_loss

SCALARS = {info_nce: (14.3,), sigmoid_loss: (14.3, -9.0)}
LOSSES = pytest.mark.parametrize("loss", SCALARS, ids=lambda loss: loss.__name__)


def scalars_of(loss) -> list[jax.Array]:
    return [jnp.float32(x) for x in SCALARS[loss]]


@LOSSES
@pytest.mark.parametrize("impl", FORMS)
def test_padded_rows_may_hold_nan_and_get_no_gradient(loss, impl):
    image, text = features("random")
    valid = np.arange(BATCH) < BATCH - 9
    masks = (np.arange(BATCH), valid)
    (clean, _), _ = value_and_gradients(loss, impl, "4", image, text, SCALARS[loss], masks)
    image[~valid], text[~valid] = np.nan, np.inf
    (total, _), (d_image, d_text, *d_scalars) = value_and_gradients(loss, impl, "4", image, text, SCALARS[loss], masks)
    assert float(total) == float(clean)
    assert not np.asarray(d_image)[~valid].any()
    assert not np.asarray(d_text)[~valid].any()
    assert np.all(np.isfinite(d_scalars))


@LOSSES
@pytest.mark.parametrize("impl", SHARDED)
def test_bf16_features_accumulate_in_fp32(loss, impl):
    image, text = (jnp.asarray(x, jnp.bfloat16) for x in features("aligned"))
    exact = (image.astype(jnp.float32), text.astype(jnp.float32))
    (expected, _), expected_gradients = value_and_gradients(loss, "global", "1", *exact, SCALARS[loss])
    (total, _), gradients = value_and_gradients(loss, impl, "8", image, text, SCALARS[loss])
    assert relative_error(total, expected) < 1e-5
    for actual, reference in zip(gradients, expected_gradients, strict=True):
        # The gradient is rounded to the features' 8 bits, by the gather form once per device and in its sum.
        assert relative_error(actual, reference) < 2**-7
    assert [g.dtype for g in gradients[:2]] == [jnp.bfloat16, jnp.bfloat16]
    assert {g.dtype for g in gradients[2:]} == {np.dtype("float32")}


def compile_gradient(loss, impl: str, mesh_name: str, batch: int):
    def total_loss(image, text, *scalars):
        return loss(image, text, *scalars, impl=impl)[0]

    mesh = mesh_of(mesh_name)
    rows = jax.ShapeDtypeStruct((batch, 8), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(total_loss, argnums=(0, 1)))
        return gradient.lower(rows, rows, *scalars_of(loss)).compile()


@LOSSES
def test_memory_of_the_ring_does_not_grow_with_the_number_of_devices(loss):
    rows = 64
    temporary = {}
    for devices in (2, 4, 8):
        batch = rows * devices
        compiled = compile_gradient(loss, "ring", str(devices), batch)
        analysis = compiled.memory_analysis()
        assert analysis is not None
        temporary[devices] = analysis.temp_size_in_bytes
        shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[(\d+,\d+)\]", compiled.as_text())}
        assert (rows, rows) in shapes  # the blocks are found, so larger ones would be
        assert not {shape for shape in shapes if batch in shape}
    assert temporary[8] <= temporary[2] * 1.02
    assert temporary[8] / (4 * rows * rows) < 12


@LOSSES
def test_the_gather_form_holds_one_block_of_rows(loss):
    batch = 512
    analysis = compile_gradient(loss, "gather", "8", batch).memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes / (4 * (batch // 8) * batch) < 6


@LOSSES
def test_works_without_ids_eagerly_and_under_an_explicit_mesh(loss):
    image, text = features("random")
    scalars = scalars_of(loss)
    (expected, _), _ = value_and_gradients(loss, "global", "1", image, text, SCALARS[loss])
    arguments = (jnp.asarray(image), jnp.asarray(text), *scalars)
    mesh = mesh_of("4")
    for impl in FORMS:
        total, count = jax.jit(functools.partial(loss, impl=impl, mesh=mesh))(*arguments)
        assert relative_error(total, expected) < 1e-5
        assert float(count) == BATCH
    with jax.set_mesh(mesh):
        assert relative_error(loss(*arguments)[0], expected) < 1e-5


@LOSSES
def test_errors_name_what_is_wrong(loss):
    image, text = (jnp.asarray(x) for x in features("random", batch=6))
    scalars = scalars_of(loss)
    with pytest.raises(ValueError, match="'local' is no form"):
        loss(image, text, *scalars, impl="local")
    with pytest.raises(ValueError, match="one text per image"):
        loss(image, text[:3], *scalars)
    with pytest.raises(ValueError, match="multiple of 4"):
        loss(image, text, *scalars, mesh=mesh_of("4"))
