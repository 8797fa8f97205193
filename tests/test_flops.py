"""FLOP counts against published profiles and against the jaxpr of an independent implementation."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from vlm_jax import flops


@dataclasses.dataclass
class FakeDevice:
    device_kind: str


# Name -> vision (width, depth, image, patch), text (width, depth), embed, and the GFLOP per pair (image, text or sum)
# of open_clip's model_profile.csv.
PROFILE = {
    "B/32": ((768, 12, 224, 32), (512, 12), 512, {"image": 8.82, "text": 5.96, "sum": 14.78}),
    "B/16": ((768, 12, 224, 16), (512, 12), 512, {"sum": 41.09}),
    "L/14": ((1024, 24, 224, 14), (768, 12), 768, {"image": 162.03, "text": 13.3, "sum": 175.33}),
    "L/14-336": ((1024, 24, 336, 14), (768, 12), 768, {"sum": 395.22}),
}


@pytest.mark.parametrize("name", PROFILE)
def test_towers_match_the_published_profile(name):
    (width, depth, size, patch), (text_width, text_depth), embed, expected = PROFILE[name]
    image = flops.vit_flops(
        width=width, depth=depth, mlp_dim=4 * width, patches=(size // patch) ** 2, patch_size=patch, embed_dim=embed
    )
    text = flops.text_flops(width=text_width, depth=text_depth, mlp_dim=4 * text_width, tokens=77, embed_dim=embed)
    counted = {"image": image, "text": text, "sum": image + text}
    for key, gigaflops in expected.items():
        assert counted[key] / 1e9 == pytest.approx(gigaflops, rel=5e-3), key


def _block(x_TxD, weights, heads):
    qkv_3xDxD, out_DxD, up_DxM, down_MxD = weights
    tokens, width = x_TxD.shape
    q, k, v = ((x_TxD @ w).reshape(tokens, heads, width // heads) for w in (qkv_3xDxD[0], qkv_3xDxD[1], qkv_3xDxD[2]))
    attention = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k))
    x_TxD = x_TxD + jnp.einsum("hqk,khd->qhd", attention, v).reshape(tokens, width) @ out_DxD
    return x_TxD + jax.nn.gelu(x_TxD @ up_DxM) @ down_MxD


def test_vit_formula_equals_the_jaxpr_of_a_hand_written_tower():
    width, depth, mlp_dim, size, patch, embed = 16, 3, 40, 12, 4, 8

    def tower(image_1xHxWx3, kernel, stacked, projection):
        patches = jax.lax.conv_general_dilated(
            image_1xHxWx3, kernel, (patch, patch), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x_TxD = jnp.concatenate([jnp.zeros((1, width)), patches.reshape(-1, width)])
        x_TxD, _ = jax.lax.scan(jax.checkpoint(lambda x, w: (_block(x, w, heads=2), None)), x_TxD, stacked)
        return x_TxD[0] @ projection

    stacked = (
        jnp.zeros((depth, 3, width, width)),
        jnp.zeros((depth, width, width)),
        jnp.zeros((depth, width, mlp_dim)),
        jnp.zeros((depth, mlp_dim, width)),
    )
    arguments = (
        jnp.zeros((1, size, size, 3)),
        jnp.zeros((patch, patch, 3, width)),
        stacked,
        jnp.zeros((width, embed)),
    )
    expected = flops.vit_flops(
        width=width, depth=depth, mlp_dim=mlp_dim, patches=(size // patch) ** 2, patch_size=patch, embed_dim=embed
    )
    assert flops.count_dot_flops(jax.jit(tower), *arguments) == expected


def test_a_backward_pass_costs_twice_its_forward_pass():
    def loss(w1, w2, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ w1) @ w2))

    w1, w2, x = jnp.zeros((6, 7)), jnp.zeros((7, 8)), jnp.zeros((5, 6))
    forward = flops.count_dot_flops(loss, w1, w2, x)
    assert forward == 2 * 5 * 6 * 7 + 2 * 5 * 7 * 8
    trained = flops.count_dot_flops(jax.grad(loss, argnums=(0, 1, 2)), w1, w2, x)
    assert trained == flops.TRAIN_OVER_FORWARD * forward


def test_counting_of_shard_map_cond_and_while():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    assert flops.count_dot_flops(sharded, jnp.zeros((8, 3))) == 4 * (2 * 2 * 3 * 2)

    branching = lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y, lambda y: y @ y @ y, x)  # noqa: E731
    assert flops.count_dot_flops(branching, jnp.zeros((3, 3))) == 2 * (2 * 3 * 3 * 3)

    looping = lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 1, lambda y: y @ y, x)  # noqa: E731
    with pytest.raises(ValueError, match="while"):
        flops.count_dot_flops(looping, jnp.zeros((3, 3)))


@pytest.mark.parametrize(("stride", "pad", "spread", "groups"), [(1, 1, 1, 1), (2, 1, 1, 2), (2, 3, 2, 1)])
def test_a_convolution_and_its_gradients_multiply_the_same_data(stride: int, pad: int, spread: int, groups: int):
    """Without padding the three products of training are equal, and equal to a loop over what meets."""

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, 1),
            ((pad, pad), (0, 0)),
            rhs_dilation=(spread, 1),
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    inputs = jnp.zeros((5, 9, 4, 6)), jnp.zeros((3, 2, 6 // groups, 4))
    rows = convolve(*inputs).shape[1]
    meetings = sum(0 <= row * stride - pad + element * spread < 9 for row in range(rows) for element in range(3))
    once = 2 * 5 * (meetings * 3 * 2) * (6 // groups) * 4
    assert flops.count_dot_flops(convolve, *inputs, padding=False) == once
    assert flops.count_dot_flops(convolve, *inputs) == 2 * 5 * (rows * 3 * 3 * 2) * (6 // groups) * 4

    def loss(x, kernel):
        return (convolve(x, kernel) ** 2).sum()  # the square's gradient needs the forward product

    assert flops.count_dot_flops(jax.grad(loss, argnums=(0, 1)), *inputs, padding=False) == 3 * once


def test_grouped_convolution_counts_its_own_channels_only():
    def depthwise(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", feature_group_count=6, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    counted = flops.count_dot_flops(depthwise, jnp.zeros((1, 5, 5, 6)), jnp.zeros((3, 3, 1, 6)))
    assert counted == 2 * (3 * 3 * 6) * (3 * 3)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
    ],
)
def test_peak_of_known_chips(kind, teraflops):
    assert flops.peak_flops(FakeDevice(kind)) == teraflops * 1e12


def test_two_devices_of_a_tpu7x_make_one_chip():
    peak = flops.peak_flops(FakeDevice("TPU7x"))
    assert peak is not None
    assert 2 * peak == 2307e12


def test_peak_is_unknown_for_a_cpu_and_then_so_is_mfu():
    assert flops.peak_flops(jax.devices("cpu")[0]) is None
    assert flops.mfu(1e12, 1.0, 8, None) is None


def test_mfu_of_a_step_that_takes_twice_the_ideal_time():
    # 256 chips at 197 TFLOP/s need 0.341 s for 3 * 175.33 GFLOP * 32768.
    flops_per_step = flops.TRAIN_OVER_FORWARD * 175.33e9 * 32768
    ideal = flops_per_step / (256 * 197e12)
    assert ideal == pytest.approx(0.3418, rel=1e-3)
    assert flops.mfu(flops_per_step, 2 * ideal, 256, 197e12) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="positive time"):
        flops.mfu(flops_per_step, 0.0, 256, 197e12)
