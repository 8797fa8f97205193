"""How every weight of a tower starts, by recipe. Not for loading weights: `vlm_jax.interop` does that.

A recipe is a function of the tower's sizes that returns `Initializers`; `INITIALIZERS` finds it by name. The spreads
are computed here from the sizes, not from the shape of a leaf: kernels are stored split by head and stacked by layer,
so the fan of the matrix product can't be read from their shape.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, truncated_normal, zeros

Initializer = Callable[..., jax.Array]
InitName = Literal[
    "clip_image", "clip_text", "siglip", "mae", "aim", "vit", "swin", "beit", "dinov2", "llama", "smollm"
]


class Initializers(NamedTuple):
    """The initialiser of each leaf of a tower. Layer norms always start at scale 1, bias 0."""

    qkv_kernel: Initializer
    out_kernel: Initializer
    fc1_kernel: Initializer
    fc1_bias: Initializer
    fc2_kernel: Initializer
    fc2_bias: Initializer
    patch_kernel: Callable[[int], Initializer]  # from the number of inputs of one patch
    patch_bias: Callable[[int], Initializer]
    class_token: Initializer
    mask_token: Initializer
    position: Initializer
    token: Initializer
    projection: Initializer
    probe: Initializer
    # from the number of a block, counted from 0, the factor on what writes to the residual stream there
    residual_factor: Callable[[jax.Array], jax.Array] | None = None

    def at_layer(self, layer: jax.Array) -> "Initializers":
        """Those of one block; `layer`, its number, is traced when blocks are initialised in a loop."""
        if self.residual_factor is None:
            return self
        factor = self.residual_factor(layer)
        return self._replace(out_kernel=scaled(self.out_kernel, factor), fc2_kernel=scaled(self.fc2_kernel, factor))


def scaled(inner: Initializer, factor: jax.Array) -> Initializer:
    """Another initialiser's values times a scalar."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return inner(key, shape, dtype) * factor

    return init


def symmetric_uniform(bound: float) -> Initializer:
    """Uniform on [-bound, bound]."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def xavier_uniform(fan_in: int, fan_out: int) -> Initializer:
    """Glorot and Bengio 2010, eq. 16: uniform with bound sqrt(6 / (fan_in + fan_out))."""
    return symmetric_uniform(math.sqrt(6 / (fan_in + fan_out)))


def torch_linear(fan_in: int) -> Initializer:
    """What PyTorch gives linear and convolution weights and biases alike (kaiming_uniform, a = sqrt 5)."""
    return symmetric_uniform(1 / math.sqrt(fan_in))


def clip_image(width: int, depth: int, mlp_dim: int) -> Initializers:
    """CLIP's image tower: PyTorch's defaults in the blocks, width^-1/2 normal for tokens, positions, projection."""
    scaled = normal(width**-0.5)
    return Initializers(
        # The published code fuses query, key and value in one (3 width, width) matrix, so its fans add up to 4 width.
        qkv_kernel=xavier_uniform(width, 3 * width),
        out_kernel=torch_linear(width),
        fc1_kernel=torch_linear(width),
        fc1_bias=torch_linear(width),
        fc2_kernel=torch_linear(mlp_dim),
        fc2_bias=torch_linear(mlp_dim),
        patch_kernel=torch_linear,
        patch_bias=torch_linear,
        class_token=scaled,
        mask_token=scaled,
        position=scaled,
        token=normal(0.02),
        projection=scaled,
        probe=xavier_uniform(1, width),
    )


def clip_text(width: int, depth: int, mlp_dim: int) -> Initializers:
    """CLIP's text tower: residual writers shrink with depth (Radford et al. 2021, following GPT-2).

    Only weights are given a spread there; the MLP's biases keep PyTorch's default.
    """
    residual = width**-0.5 * (2 * max(depth, 1)) ** -0.5
    return clip_image(width, depth, mlp_dim)._replace(
        qkv_kernel=normal(width**-0.5),
        out_kernel=normal(residual),
        fc1_kernel=normal((2 * width) ** -0.5),
        fc2_kernel=normal(residual),
        class_token=normal(0.01),
        mask_token=normal(0.01),
        position=normal(0.01),
    )


def siglip(width: int, depth: int, mlp_dim: int) -> Initializers:
    """big_vision's ViT and text tower: Xavier kernels, positions and tokens of spread width^-1/2."""
    mlp = xavier_uniform(width, mlp_dim)
    return Initializers(
        qkv_kernel=xavier_uniform(width, width),
        out_kernel=xavier_uniform(width, width),
        fc1_kernel=mlp,
        fc1_bias=normal(1e-6),
        fc2_kernel=mlp,
        fc2_bias=normal(1e-6),
        patch_kernel=lambda fan_in: normal(fan_in**-0.5),
        patch_bias=lambda fan_in: zeros,
        class_token=zeros,
        mask_token=zeros,
        position=normal(width**-0.5),
        token=normal(width**-0.5),
        projection=normal(width**-0.5),
        probe=xavier_uniform(1, width),
    )


def mae(width: int, depth: int, mlp_dim: int) -> Initializers:
    """He et al. 2022, appendix A.1: Xavier everywhere, the patch projection as a matrix, tokens of spread 0.02.

    The published code leaves one bias as PyTorch makes it, that of the patch projection.
    """
    return siglip(width, depth, mlp_dim)._replace(
        qkv_kernel=xavier_uniform(width, 3 * width),  # fused there as well
        fc1_bias=zeros,
        fc2_bias=zeros,
        patch_kernel=lambda fan_in: xavier_uniform(fan_in, width),
        patch_bias=torch_linear,
        class_token=normal(0.02),
        mask_token=normal(0.02),
        position=normal(0.02),
        token=normal(0.02),
        projection=xavier_uniform(width, width),
    )


def aim(width: int, depth: int, mlp_dim: int) -> Initializers:
    """ml-l3m's AIM and AIMv2: Xavier on every matrix, query, key and value apart, and torch's bias of the patches."""
    return siglip(width, depth, mlp_dim)._replace(
        fc1_bias=zeros,
        fc2_bias=zeros,
        patch_kernel=lambda fan_in: xavier_uniform(fan_in, width),
        patch_bias=torch_linear,
        class_token=normal(0.02),
        mask_token=normal(0.02),
        position=normal(0.02),
        token=normal(0.02),
        projection=xavier_uniform(width, width),
    )


def vit(width: int, depth: int, mlp_dim: int) -> Initializers:
    """Normal of spread 0.02 with zero biases: timm, DeiT, BEiT, DINO (their truncation is at 100 sigma or none)."""
    spread = normal(0.02)
    return Initializers(
        qkv_kernel=spread,
        out_kernel=spread,
        fc1_kernel=spread,
        fc1_bias=zeros,
        fc2_kernel=spread,
        fc2_bias=zeros,
        patch_kernel=lambda fan_in: spread,
        patch_bias=lambda fan_in: zeros,
        class_token=spread,
        mask_token=spread,
        position=spread,
        token=spread,
        projection=spread,
        probe=spread,
    )


def swin(width: int, depth: int, mlp_dim: int) -> Initializers:
    """As `vit`; the convolution that embeds patches keeps PyTorch's start (Liu et al. 2021, published code)."""
    return vit(width, depth, mlp_dim)._replace(patch_kernel=torch_linear, patch_bias=torch_linear)


def beit(width: int, depth: int, mlp_dim: int) -> Initializers:
    """Bao et al. 2022, section 2.5 and published code: normal of spread 0.02 cut at one spread, biases zero.

    What is left has the spread 0.0108. The writers of block l, counted from 1, are divided by sqrt(2 l).
    """
    cut = truncated_normal(0.02, lower=-1.0, upper=1.0)
    return vit(width, depth, mlp_dim)._replace(
        qkv_kernel=cut,
        out_kernel=cut,
        fc1_kernel=cut,
        fc2_kernel=cut,
        patch_kernel=lambda fan_in: cut,
        class_token=cut,
        mask_token=cut,
        position=cut,
        token=cut,
        projection=cut,
        probe=cut,
        residual_factor=lambda layer: (2.0 * (layer + 1)) ** -0.5,
    )


def dinov2(width: int, depth: int, mlp_dim: int) -> Initializers:
    """Oquab et al. 2024, as released: `vit`, with PyTorch's default for the patches and tokens that start near zero."""
    return vit(width, depth, mlp_dim)._replace(
        patch_kernel=torch_linear,
        patch_bias=torch_linear,
        class_token=normal(1e-6),
        mask_token=zeros,
    )


def llama(width: int, depth: int, mlp_dim: int) -> Initializers:
    """Normal of spread 0.02 with zero biases: what transformers gives Llama, Qwen2 and Gemma (`initializer_range`)."""
    return vit(width, depth, mlp_dim)


def smollm(width: int, depth: int, mlp_dim: int) -> Initializers:
    """SmolLM (published configs): spread width^-1/2, and for residual writers over sqrt(2 depth), as nanotron does."""
    spread, writers = normal(width**-0.5), normal(width**-0.5 * (2 * max(depth, 1)) ** -0.5)
    return vit(width, depth, mlp_dim)._replace(
        qkv_kernel=spread, fc1_kernel=spread, token=spread, out_kernel=writers, fc2_kernel=writers
    )


INITIALIZERS: dict[str, Callable[[int, int, int], Initializers]] = {
    "clip_image": clip_image,
    "clip_text": clip_text,
    "siglip": siglip,
    "mae": mae,
    "aim": aim,
    "vit": vit,
    "swin": swin,
    "beit": beit,
    "dinov2": dinov2,
    "llama": llama,
    "smollm": smollm,
}
