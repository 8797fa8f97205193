"""CLIP's modified ResNet with attention pooling. The plain ResNet of supervised training is another network."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.nn.initializers import normal, ones, zeros

from vlm_jax.mesh import constrain
from vlm_jax.models.attention import AttentionImpl
from vlm_jax.models.batch_norm import BatchNorm, moved
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.models.initializers import Initializer, Initializers, clip_image, torch_linear
from vlm_jax.models.pooling import MeanQueryPool
from vlm_jax.models.projection import ProjectionConfig, project
from vlm_jax.models.weights import weight

EXPANSION = 4  # output channels of a bottleneck over its inner ones
STRIDE = 32  # of the whole network


@dataclasses.dataclass(frozen=True)
class ResNetConfig(ImageTowerConfig):
    """An image tower; the defaults are CLIP's RN50.

    "pooled" is the vector that attention pools, before the projection; the published attention pool ends in that
    projection, so its output is our "embedding".
    """

    image_size: int = 224  # side of the square images in pixels; a multiple of 32
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)  # bottlenecks of each stage
    width: int = 64  # channels of the stem; the last stage has 32 times as many
    heads: int = 32  # of the attention pool; divides 32 widths
    # always normalise by the running statistics and never move them: for a tower that is frozen (LiT)
    frozen_statistics: bool = False
    remat: Literal["none", "full"] = "none"  # "full" keeps only the input of each bottleneck for the backward pass
    attention_impl: AttentionImpl = "auto"  # kernel of the attention pool

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        if self.image_size < STRIDE or self.image_size % STRIDE:
            yield "image_size", f"= {self.image_size} must be a multiple of {STRIDE}, by which the tower shrinks images"
        if min(self.layers) < 1:
            yield "layers", f"= {self.layers} must be at least 1 in every stage"
        if self.width < 2 or self.width % 2:
            yield "width", f"= {self.width} must be even: the stem starts with half of it"
        if self.heads < 1 or self.token_width % self.heads:
            yield "heads", f"= {self.heads} does not divide the {self.token_width} channels of the last stage"

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image_size, self.image_size

    @property
    def pooled_width(self) -> int:
        """Channels of "pooled"."""
        return STRIDE * self.width

    @property
    def token_width(self) -> int:
        """Channels of "tokens"."""
        return STRIDE * self.width

    @property
    def token_count(self) -> int:
        """Places of the last feature map."""
        return (self.image_size // STRIDE) ** 2

    @property
    def planes(self) -> tuple[int, ...]:
        """Inner channels of the bottlenecks of each stage."""
        return tuple(self.width * 2**stage for stage in range(len(self.layers)))

    def build(self, projection: ProjectionConfig | None, dtype: Dtype) -> "ModifiedResNet":
        """The module."""
        return ModifiedResNet(self, projection, dtype)

    def forward_flops(self, embed_dim: int) -> int:
        """See the base."""
        half = self.width // 2
        total = (self.image_size // 2) ** 2 * 9 * (3 * half + half * half + half * self.width)
        side, channels = self.image_size // 4, self.width
        for stage, (planes, depth) in enumerate(zip(self.planes, self.layers, strict=True)):
            out = EXPANSION * planes
            for block in range(depth):
                inner = side**2 * (channels * planes + 9 * planes**2)
                side = side // _stride(stage, block)
                shortcut = channels * out if block == 0 else 0
                total, channels = total + inner + side**2 * (planes * out + shortcut), out
        tokens = self.token_count + 1
        pooling = (2 * tokens + 1) * channels**2 + 2 * tokens * channels
        return 2 * (total + pooling + channels * embed_dim)

    def updated(self, params: Any, statistics: Any) -> Any:
        """See the base."""
        return params if statistics is None or self.frozen_statistics else moved(params, statistics)


def _stride(stage: int, block: int) -> int:
    """The first block of every stage but the first halves the sides."""
    return 2 if stage > 0 and block == 0 else 1


class ModifiedResNet(nn.Module):
    """Radford et al. 2021, section 2.4: a stem of three convolutions, antialiased strides, attention pooling.

    Attributes:
        config: the tower.
        projection: the head on the pooled vector, or None. A linear one has a bias, as published.
        dtype: compute dtype; parameters and statistics are fp32.
    """

    config: ResNetConfig
    projection: ProjectionConfig | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images_BxHxWxC: jax.Array, keys: jax.Array | None = None, *, intermediates: bool = False
    ) -> dict[str, Any]:
        """Encodes normalised images.

        Args:
            images_BxHxWxC: float, of the config's image size.
            keys: [B] typed keys in training, where the batch's statistics normalise; None at evaluation.
            intermediates: whether to return what stands between the stages.

        Returns:
            "tokens" [B, T, D], the last feature map; "pooled" [B, D]; "embedding" [B, E] if there is a projection;
            in training without frozen statistics "statistics", a tree for `ResNetConfig.updated`; with intermediates
            "stem" and "stage1" to "stage4", feature maps [B, H, W, C].

        Raises:
            ValueError: the images have another size than the config.
        """
        config = self.config
        if images_BxHxWxC.shape[1:3] != config.image_shape:
            raise ValueError(
                f"this tower takes images of {config.image_size}x{config.image_size} (height x width), not "
                f"{images_BxHxWxC.shape[1]}x{images_BxHxWxC.shape[2]}; resize them, or set image_size"
            )
        moving = keys is not None and not config.frozen_statistics
        x, stem = Stem(config.width, moving, self.dtype, name="stem")(images_BxHxWxC.astype(self.dtype))
        maps, statistics = {"stem": x}, {"stem": stem}
        block_type = nn.remat(Bottleneck) if config.remat == "full" else Bottleneck
        for stage, (planes, depth) in enumerate(zip(config.planes, config.layers, strict=True)):
            for block in range(depth):
                name = f"stage{stage + 1}_block{block}"
                bottleneck = block_type(planes, _stride(stage, block), block == 0, moving, self.dtype, name=name)
                x, statistics[name] = bottleneck(x)
            maps[f"stage{stage + 1}"] = x
        outputs: dict[str, Any] = self._pool(x)
        if moving:
            outputs["statistics"] = statistics
        return outputs | maps if intermediates else outputs

    def _pool(self, x_BxHxWxC: jax.Array) -> dict[str, jax.Array]:
        config, width = self.config, x_BxHxWxC.shape[-1]
        init = _pool_initializers(width)
        tokens = x_BxHxWxC.reshape(x_BxHxWxC.shape[0], -1, width)
        pool = MeanQueryPool(config.heads, init, config.attention_impl, dtype=self.dtype, name="attn_pool")
        outputs = {"tokens": tokens, "pooled": pool(tokens)}
        if self.projection is not None:
            head = dataclasses.replace(self.projection, bias=True)
            outputs["embedding"] = project(head, init.projection, outputs["pooled"], self.dtype, torch_linear(width))
        return outputs


def _pool_initializers(width: int) -> Initializers:
    """As published: everything of spread width^-1/2, biases PyTorch's."""
    return clip_image(width, 1, width)._replace(qkv_kernel=normal(width**-0.5))


class Stem(nn.Module):
    """Three 3x3 convolutions, the first of stride 2, and an average pool: a quarter of the sides.

    Attributes:
        width: output channels.
        moving: whether batch norms use the batch's statistics.
        dtype: compute dtype.
    """

    width: int
    moving: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """[B, H, W, 3] -> [B, H / 4, W / 4, width], and the statistics by layer."""
        statistics = {}
        for i, (features, stride) in enumerate(((self.width // 2, 2), (self.width // 2, 1), (self.width, 1)), start=1):
            x = convolve(self, f"conv{i}", x, features, size=3, stride=stride)
            x, statistics[f"bn{i}"] = BatchNorm(name=f"bn{i}")(x, batch_statistics=self.moving)
            x = jax.nn.relu(x)
        return average_pool(x, 2), statistics


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut; strides are average pools before the next 1x1 convolution.

    Attributes:
        planes: inner channels.
        stride: of the block.
        downsample: whether the shortcut is a convolution; otherwise it is the input.
        moving: whether batch norms use the batch's statistics.
        dtype: compute dtype.
    """

    planes: int
    stride: int
    downsample: bool
    moving: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """[B, H, W, C] -> [B, H / stride, W / stride, 4 planes], and the statistics by layer."""
        statistics: dict[str, Any] = {}

        def normed_convolution(i: str, y: jax.Array, features: int, size: int, scale_init: Initializer) -> jax.Array:
            y = convolve(self, f"conv{i}", y, features, size=size)
            y, statistics[f"bn{i}"] = BatchNorm(scale_init, name=f"bn{i}")(y, batch_statistics=self.moving)
            return y

        branch = jax.nn.relu(normed_convolution("1", x, self.planes, 1, ones))
        branch = jax.nn.relu(normed_convolution("2", branch, self.planes, 3, ones))
        # A residual branch that starts at zero, as published.
        branch = normed_convolution("3", average_pool(branch, self.stride), EXPANSION * self.planes, 1, zeros)
        if self.downsample:
            x = normed_convolution("_shortcut", average_pool(x, self.stride), EXPANSION * self.planes, 1, ones)
        return constrain(jax.nn.relu(x + branch), "batch", None, None, "embed"), statistics


def convolve(module: nn.Module, name: str, x: jax.Array, features: int, *, size: int, stride: int = 1) -> jax.Array:
    """A convolution without bias whose kernel [size, size, C, features] is the parameter `name` of the module.

    Args:
        module: inside its compact method.
        name: of the kernel.
        x: [B, H, W, C] in the compute dtype.
        features: output channels.
        size: side of the kernel; odd. The input is padded by size // 2 zeros.
        stride: of the convolution.
    """
    shape = (size, size, x.shape[-1], features)
    kernel = weight(module, name, torch_linear(size * size * x.shape[-1]), (None, None, "embed", "mlp"), shape)
    padding = [(size // 2, size // 2)] * 2
    return jax.lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def average_pool(x: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] -> [B, H / size, W / size, C]; the sides are multiples of the size."""
    if size == 1:
        return x
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // size, size, width // size, size, channels).mean(axis=(2, 4))


__all__ = ["ModifiedResNet", "ResNetConfig"]
