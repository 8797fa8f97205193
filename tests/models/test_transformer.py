import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax import schema
from vlm_jax.models.mlp import ACTIVATIONS
from vlm_jax.models.norms import LayerNorm
from vlm_jax.models.remat import POLICIES
from vlm_jax.models.stochastic import drop_path, dropout
from vlm_jax.models.transformer import TransformerConfig, run_blocks, stack_layers, unstack_layers

CONFIG = TransformerConfig(width=16, depth=3, heads=2, mlp_dim=24, layer_scale_init=0.5, drop_path=0.4, dropout=0.1)
X = np.random.default_rng(0).normal(size=(4, 6, 16)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(1), 4)


class Stack(nn.Module):
    config: TransformerConfig
    causal: bool = False

    @nn.compact
    def __call__(self, x, keys=None, mask=None, intermediates=False):
        return run_blocks(self.config, x, keys, mask=mask, causal=self.causal, intermediates=intermediates)


def with_changes(**changes):
    return Stack(schema.override(CONFIG, changes))


@pytest.fixture(scope="module")
def params():
    return nn.unbox(jax.jit(Stack(CONFIG).init)(jax.random.key(0), X))["params"]


def value_and_gradients(stack, params):
    def loss(params, x):
        return jnp.sin(stack.apply({"params": params}, x, KEYS)[0]).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, X)


def test_unrolled_and_every_remat_policy_equal_the_plain_scan(params):
    expected, gradients = value_and_gradients(with_changes(), params)
    variants = [with_changes(remat=name) for name in POLICIES if name not in ("auto", "none")]
    variants += [with_changes(scan=False), with_changes(scan=False, remat="full")]
    for stack in variants:
        value, others = value_and_gradients(stack, params)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), others, gradients)


def residuals(stack, params):
    """Number of values that the backward pass is handed; parameters are the same in all."""
    _, backward = jax.vjp(lambda params: stack.apply({"params": params}, X)[0].sum(), params)
    return sum(leaf.size for leaf in jax.tree.leaves(backward))


def test_policies_keep_less_and_less(params):
    kept = {name: residuals(with_changes(remat=name, dropout=0.0, drop_path=0.0), params) for name in POLICIES}
    assert kept["none"] > kept["dots"] > kept["full"]
    # query, key, value and context of 3 layers more than "full"; with those, the three biases are needed no more
    assert kept["save_qkv_ctx"] - kept["full"] == 4 * 3 * X.size - 3 * 3 * 16
    # for the same bytes the tokens after attention in place of its context
    assert kept["save_qkv_mid"] - kept["full"] == 4 * 3 * X.size - 3 * 3 * 16
    assert kept["auto"] == kept["none"]


def test_the_scan_is_a_loop_and_the_unrolled_stack_is_not(params):
    def lowered(stack):
        return jax.jit(stack.apply).lower({"params": params}, X).as_text()

    assert "stablehlo.while" in lowered(with_changes())
    assert "stablehlo.while" not in lowered(with_changes(scan=False))


def test_scanned_and_unrolled_start_alike():
    start = [nn.unbox(with_changes(scan=scan).init(jax.random.key(3), X)) for scan in (True, False)]
    jax.tree.map(np.testing.assert_array_equal, *start)


def test_layers_in_a_plain_loop_give_the_stack(params):
    """Each layer's own parameters, one block at a time."""
    expected, blocks = jax.jit(Stack(CONFIG).apply, static_argnames="intermediates")(
        {"params": params}, X, intermediates=True
    )
    x, one = X, with_changes(depth=1)
    for i, layer in enumerate(unstack_layers(params["blocks"])):
        x, _ = one.apply({"params": {"blocks": stack_layers([layer])}}, x)
        np.testing.assert_allclose(blocks[i], x, atol=1e-5)
    np.testing.assert_allclose(expected, x, atol=1e-5)


def test_stacking_back_is_the_identity(params):
    jax.tree.map(np.testing.assert_array_equal, stack_layers(unstack_layers(params["blocks"])), params["blocks"])


def test_a_block_is_its_formula(params):
    """The pre-norm residual equations in numpy, with layer scale."""
    config = schema.override(CONFIG, {"depth": 1, "activation": "gelu"})
    layer = jax.tree.map(np.asarray, unstack_layers(params["blocks"])[0])
    gelu = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))

    def norm(x, p):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    x, attn, mlp = X.astype(np.float64), layer["attn"], layer["mlp"]
    y = norm(x, layer["ln_1"])
    q, k, v = (np.einsum("btd,dhe->bthe", y, attn[n]["kernel"]) + attn[n]["bias"] for n in ("query", "key", "value"))
    weights = np.exp(np.einsum("bthe,bshe->bhts", q, k) / np.sqrt(8))
    context = np.einsum("bhts,bshe->bthe", weights / weights.sum(-1, keepdims=True), v)
    x = x + layer["layer_scale_1"] * (np.einsum("bthe,hed->btd", context, attn["out"]["kernel"]) + attn["out"]["bias"])
    hidden = gelu(norm(x, layer["ln_2"]) @ mlp["fc1"]["kernel"] + mlp["fc1"]["bias"])
    x = x + layer["layer_scale_2"] * (hidden @ mlp["fc2"]["kernel"] + mlp["fc2"]["bias"])
    ours, _ = Stack(config).apply({"params": {"blocks": stack_layers([layer])}}, X)
    np.testing.assert_allclose(ours, x, atol=1e-5)


def test_causal_attention_sees_no_future(params):
    stack = Stack(CONFIG, causal=True)
    jacobian = jax.jit(jax.jacobian(lambda x: stack.apply({"params": params}, x)[0][0].sum(-1)))(X[:1])[:, 0].any(-1)
    np.testing.assert_array_equal(jacobian, np.tri(6, dtype=bool))


def test_masked_keys_have_no_influence(params):
    mask = np.arange(6)[None, None, None] < 4
    apply = jax.jit(lambda x: Stack(CONFIG).apply({"params": params}, x, mask=mask)[0])
    changed = X.copy()
    changed[:, 4:] += 1
    np.testing.assert_array_equal(apply(X)[:, :4], apply(changed)[:, :4])


def test_randomness_is_each_rows_own(params):
    """A row's result depends on its key alone: neither on the other rows nor on where in the batch it stands."""
    apply = jax.jit(lambda x, keys: Stack(CONFIG).apply({"params": params}, x, keys)[0])
    whole = apply(X, KEYS)
    order = np.array([2, 0])
    np.testing.assert_allclose(apply(X[order], KEYS[order]), whole[order], atol=1e-6)
    assert np.abs(np.asarray(apply(X, KEYS[::-1]) - whole)).max() > 1e-3


def test_drop_path_drops_whole_rows_at_its_rate_and_keeps_the_mean():
    keys = jax.random.split(jax.random.key(5), 4000)
    out = np.asarray(drop_path(jnp.ones((4000, 3, 2)), 0.3, keys))
    assert set(np.round(np.unique(out), 5)) == {0.0, np.float32(round(1 / 0.7, 5))}
    assert ((out == 0).all(axis=(1, 2)) | (out != 0).all(axis=(1, 2))).all()
    assert abs((out[:, 0, 0] == 0).mean() - 0.3) < 0.04


def test_drop_path_rises_linearly_with_depth():
    """With zero branches but for the biases, layer i adds its own power of two, so drops can be counted per layer."""
    depth, rate, batch = 3, 0.6, 3000
    config = TransformerConfig(width=4, depth=depth, heads=1, mlp_dim=4, drop_path=rate)
    params = jax.tree.map(
        jnp.zeros_like, nn.unbox(Stack(config).init(jax.random.key(0), np.zeros((1, 1, 4), np.float32)))
    )
    bias = params["params"]["blocks"]["attn"]["out"]["bias"]
    params["params"]["blocks"]["attn"]["out"]["bias"] = bias.at[:].set(np.eye(depth, 4))
    keys = jax.random.split(jax.random.key(2), batch)
    out, _ = jax.jit(Stack(config).apply)(params, jnp.zeros((batch, 1, 4)), keys)
    dropped = np.asarray(out)[:, 0, :depth] == 0
    np.testing.assert_allclose(dropped.mean(axis=0), np.linspace(0, rate, depth), atol=0.04)
    # Independent draws: with one draw for all layers, the last would be dropped wherever the middle one is.
    np.testing.assert_allclose((dropped[:, 1] & dropped[:, 2]).mean(), rate / 2 * rate, atol=0.04)


def test_dropout_keeps_the_mean_and_is_off_without_keys():
    x = jnp.ones((64, 40))
    keys = jax.random.split(jax.random.key(9), 64)
    out = np.asarray(dropout(x, 0.25, keys))
    assert abs((out == 0).mean() - 0.25) < 0.03
    assert abs(out.mean() - 1) < 0.03
    np.testing.assert_array_equal(dropout(x, 0.25, None), x)


def test_layer_norm_survives_a_large_mean():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 256)) + 3000, jnp.float32)
    out = LayerNorm(1e-6).apply({"params": {"scale": jnp.ones(256), "bias": jnp.zeros(256)}}, x)
    x64 = np.asarray(x, np.float64)
    expected = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out, expected, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "at_one"),
    [("gelu", 0.8413447), ("quick_gelu", 0.8457958), ("gelu_tanh", 0.8411920), ("relu", 1.0), ("silu", 0.7310586)],
)
def test_activations_at_one(name, at_one):
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.float32(1.0)), at_one, atol=1e-6)


def test_impossible_values_are_named():
    with pytest.raises(schema.ConfigError, match=r"config.heads = 5 does not divide config width 16|heads = 5"):
        schema.validate(schema.override(CONFIG, {"heads": 5}))
