import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.models.attention import attend


def qkv(batch=2, queries=5, keys=7, heads=2, depth=8, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((batch, queries, heads, depth), (batch, keys, heads, depth), (batch, keys, heads, depth))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def brute_force(q, k, v, bias=None, mask=None, causal=False):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    batch, queries, heads, depth = q.shape
    keys = k.shape[1]
    bias = np.zeros((1, 1, 1, 1)) if bias is None else np.asarray(bias)
    mask = np.ones((1, 1, 1, 1), bool) if mask is None else np.asarray(mask)
    bias, mask = (np.broadcast_to(x, (batch, heads, queries, keys)) for x in (bias, mask))
    for b, h, t in np.ndindex(batch, heads, queries):
        seen = [s for s in range(keys) if mask[b, h, t, s] and not (causal and s > t)]
        weights = np.exp([q[b, t, h] @ k[b, s, h] / np.sqrt(depth) + bias[b, h, t, s] for s in seen])
        out[b, t, h] = sum(w * v[b, s, h] for w, s in zip(weights / weights.sum(), seen, strict=True))
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_xla_is_the_definition(causal, with_bias, with_mask):
    q, k, v = qkv()
    rng = np.random.default_rng(1)
    bias = rng.normal(size=(1, 2, 5, 7)).astype(np.float32) if with_bias else None
    mask = rng.random((2, 1, 5, 7)) < 0.6 if with_mask else None
    if mask is not None:
        mask[..., 0] = True
    out = attend(q, k, v, bias=bias, mask=mask, causal=causal, impl="xla")
    np.testing.assert_allclose(out, brute_force(q, k, v, bias, mask, causal), atol=1e-5)


def test_xla_is_jax_nn():
    q, k, v = qkv(keys=5)
    mask = np.random.default_rng(2).random((2, 1, 5, 5)) < 0.7
    mask[..., 0] = True
    ours = attend(q, k, v, mask=mask, causal=True, impl="xla")
    np.testing.assert_allclose(ours, jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True), atol=1e-5)


def test_softmax_runs_in_float32():
    q, k, v = (x.astype(jnp.bfloat16) * 4 for x in qkv(keys=64))
    out = attend(q, k, v, impl="xla")
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        out.astype(jnp.float32), brute_force(*(x.astype(jnp.float32) for x in (q, k, v))), atol=0.06
    )


def test_a_row_that_sees_nothing_is_finite_with_finite_gradient():
    q, k, v = qkv()
    mask = jnp.zeros((2, 1, 1, 7), bool)
    value, gradient = jax.value_and_grad(lambda q: attend(q, k, v, mask=mask, impl="xla").sum())(q)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def with_gradients(impl, causal, mask):
    """The output beside a loss and its gradients: the loss is a sum that cancels, too coarse to compare."""

    def loss(q, k, v):
        out = attend(q, k, v, causal=causal, mask=mask, impl=impl)
        return jnp.sin(out).sum(), out

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)


@pytest.mark.parametrize(("length", "causal", "masked"), [(129, True, False), (50, False, True)])
def test_the_pallas_kernel_equals_xla(length, causal, masked):
    arguments = qkv(queries=length, keys=length, heads=2, depth=16)
    mask = jnp.asarray(np.arange(length) < np.array([[length - 9], [length // 2]]))[:, None, None] if masked else None
    both = [jax.jit(with_gradients(impl, causal, mask))(*arguments) for impl in ("flash", "xla")]
    np.testing.assert_allclose(both[0][0][1], both[1][0][1], atol=1e-5)
    for ours, theirs in zip(both[0][1], both[1][1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_the_pallas_kernel_on_a_mesh_equals_xla():
    arguments = qkv(batch=4, queries=9, keys=9, heads=2, depth=8)
    types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=types, devices=jax.devices()[:4])
    (_, expected), expected_gradients = with_gradients("xla", True, None)(*arguments)
    with jax.set_mesh(mesh):
        placed = jax.device_put(arguments, NamedSharding(mesh, P("data", None, "tensor")))
        (_, out), gradients = jax.jit(with_gradients("flash", True, None))(*placed)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_the_pallas_kernel_refuses_what_it_can_not_compute():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="'flash' takes masks over keys"):
        attend(q, k, v, bias=jnp.zeros((1, 2, 5, 7)), impl="flash")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias_shape", [None, (1, 2, 5, 7), (2, 1, 1, 7), (2, 2, 5, 7)])
@pytest.mark.parametrize("mask_shape", [None, (2, 1, 1, 7), (2, 1, 5, 7)])
def test_its_own_gradient_is_that_of_the_definition(causal, bias_shape, mask_shape):
    """Against jax's gradient of the formula, in which a row that may see nothing gets no gradient either."""
    q, k, v = qkv()
    rng = np.random.default_rng(1)
    bias = None if bias_shape is None else jnp.asarray(rng.normal(size=bias_shape), jnp.float32)
    mask = None
    if mask_shape is not None:
        mask = jnp.asarray(rng.random(mask_shape) < 0.6).at[0, 0, 0, :].set(False)
    cotangent = jnp.asarray(rng.normal(size=q.shape), jnp.float32)

    def formula(q, k, v, bias):
        logits = jnp.einsum("BTHD,BSHD->BHTS", q, k) / np.sqrt(q.shape[-1])
        logits = logits if bias is None else logits + jnp.broadcast_to(bias, logits.shape)
        seen = jnp.ones(logits.shape, bool) if mask is None else jnp.broadcast_to(mask, logits.shape)
        seen = seen & jnp.tril(jnp.ones((5, 7), bool))[None, None] if causal else seen
        weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
        return jnp.sum(jnp.einsum("BHTS,BSHD->BTHD", weights, v) * cotangent)

    def ours(q, k, v, bias):
        return jnp.sum(attend(q, k, v, bias=bias, mask=mask, causal=causal, impl="xla") * cotangent)

    arguments = (0, 1, 2) if bias is None else (0, 1, 2, 3)
    expected, found = (jax.grad(f, argnums=arguments)(q, k, v, bias) for f in (formula, ours))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, atol=2e-6)
