"""The discrete autoencoder of DALL-E (Ramesh et al. 2021, section 2.1 and appendix A): images to codes and back.

BEiT takes the encoder for its visual tokenizer. How it is trained is `vlm_jax.objectives.dvae`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.nn.initializers import normal, zeros

from vlm_jax.mesh import constrain
from vlm_jax.models.weights import weight

GROUPS = 4  # of blocks; between two of them the sides are halved, or doubled in the decoder
STRIDE = 2 ** (GROUPS - 1)
LAPLACE_EPS = 0.1  # pixels are brought into [eps, 1 - eps], where the logit is defined


@dataclasses.dataclass(frozen=True)
class DvaeModelConfig:
    """Encoder and decoder; the defaults are the published ones."""

    image_size: int = 256  # side of the square images in pixels; a multiple of 8
    vocab_size: int = 8192  # number of codes
    width: int = 256  # channels of the first group; every further one has twice as many
    blocks: int = 2  # in each group
    decoder: bool = True  # whether there is one; a tokenizer needs none
    decoder_width: int = 128  # channels between the codes and the decoder's first group
    remat: Literal["none", "full"] = "none"  # "full" keeps only the input of each block for the backward pass

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        if self.image_size < STRIDE or self.image_size % STRIDE:
            yield "image_size", f"= {self.image_size} must be a multiple of {STRIDE}, by which the encoder shrinks it"
        if self.width < 4 or self.width % 4:
            yield "width", f"= {self.width} must be a multiple of 4: blocks have a quarter of it inside"
        for key in ("vocab_size", "blocks", "decoder_width"):
            if getattr(self, key) < 1:
                yield key, f"= {getattr(self, key)} must be at least 1"

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of codes."""
        return self.image_size // STRIDE, self.image_size // STRIDE

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the encoder's groups; the decoder has them in reverse."""
        return tuple(self.width * 2**group for group in range(GROUPS))

    def encoder_flops(self) -> int:
        """Model FLOPs of the encoder's forward pass on one image."""
        total, places, channels = self.image_size**2 * 49 * 3 * self.width, self.image_size**2, self.width
        for group, width in enumerate(self.widths):
            places = self.image_size**2 // 4**group
            inner = width // 4
            for _ in range(self.blocks):
                shortcut = channels * width if channels != width else 0
                total += places * (9 * channels * inner + 2 * 9 * inner**2 + inner * width + shortcut)
                channels = width
        return 2 * (total + places * channels * self.vocab_size)

    def decoder_flops(self) -> int:
        """Model FLOPs of the decoder's forward pass on one grid of distributions over codes; 0 without a decoder."""
        if not self.decoder:
            return 0
        places, channels = self.grid[0] * self.grid[1], self.decoder_width
        total = places * self.vocab_size * channels
        for group, width in enumerate(reversed(self.widths)):
            places = self.grid[0] * self.grid[1] * 4**group
            inner = width // 4
            for _ in range(self.blocks):
                shortcut = channels * width if channels != width else 0
                total += places * (channels * inner + 2 * 9 * inner**2 + 9 * inner * width + shortcut)
                channels = width
        return 2 * (total + places * channels * 6)


class Dvae(nn.Module):
    """Parameters: `encoder/...` and, with a decoder, `decoder/...`.

    Attributes:
        config: sizes.
        dtype: compute dtype of all but the convolutions from and to codes, which are fp32 as published.
    """

    config: DvaeModelConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares encoder and decoder."""
        self.encoder = Encoder(self.config, self.dtype)
        if self.config.decoder:
            self.decoder = Decoder(self.config, self.dtype)

    def __call__(self, pixels_BxHxWx3: jax.Array) -> jax.Array:
        """Logits of the codes, and through the decoder where there is one; for initialising."""
        logits = self.encode(pixels_BxHxWx3)
        return self.decode(jax.nn.softmax(logits)) if self.config.decoder else logits

    def encode(self, pixels_BxHxWx3: jax.Array) -> jax.Array:
        """Pixels as `map_pixels` gives them -> logits of the codes, fp32 [B, H / 8, W / 8, V]."""
        return self.encoder(pixels_BxHxWx3)

    def decode(self, codes_BxRxCxV: jax.Array) -> jax.Array:
        """Distributions over codes (or codes one-hot) -> fp32 [B, 8 R, 8 C, 6], see `log_laplace`."""
        return self.decoder(codes_BxRxCxV)


class Encoder(nn.Module):
    """A convolution of 7 x 7, four groups of blocks with a maximum over 2 x 2 between, and one to the codes."""

    config: DvaeModelConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> fp32 [B, H / 8, W / 8, V]."""
        config = self.config
        x = Convolution(config.width, 7, dtype=self.dtype, name="input")(x)
        for group, width in enumerate(config.widths):
            if group:
                x = _maximum_pool(x)
            x = _group(config, group, width, (3, 3, 3, 1), self.dtype, x)
        head = Convolution(config.vocab_size, 1, ("embed", "vocab"), name="output")
        return head(jax.nn.relu(x))


class Decoder(nn.Module):
    """The way back: groups in reverse, every pixel doubled between them, and six numbers for each pixel."""

    config: DvaeModelConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, R, C, V] -> fp32 [B, 8 R, 8 C, 6]."""
        config = self.config
        x = Convolution(config.decoder_width, 1, ("vocab", "embed"), name="input")(x)
        for group, width in enumerate(reversed(config.widths)):
            if group:
                x = constrain(x.repeat(2, axis=1).repeat(2, axis=2), "batch", None, None, "embed")
            x = _group(config, group, width, (1, 3, 3, 3), self.dtype, x)
        return Convolution(6, 1, ("embed", None), dtype=self.dtype, name="output")(jax.nn.relu(x)).astype(jnp.float32)


def _group(
    config: DvaeModelConfig, group: int, width: int, sizes: tuple[int, ...], dtype: Dtype, x: jax.Array
) -> jax.Array:
    """Blocks of one width, as submodules `group{1..}_block{0..}` of the compact module that calls this."""
    block_type = nn.remat(ResidualBlock) if config.remat == "full" else ResidualBlock
    gain = (GROUPS * config.blocks) ** -2
    for block in range(config.blocks):
        x = block_type(width, sizes, gain, dtype, name=f"group{group + 1}_block{block}")(x)
    return x


class ResidualBlock(nn.Module):
    """x + gain f(x), where f is four convolutions, each after a ReLU, of a quarter of the width inside.

    Attributes:
        width: output channels; where the input has others, a convolution of one pixel makes them.
        sizes: sides of the four kernels.
        gain: the published 1 / layers^2, by which deep stacks start near the identity.
        dtype: compute dtype.
    """

    width: int
    sizes: tuple[int, ...]
    gain: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, width]."""
        branch, last = x, len(self.sizes)
        for i, size in enumerate(self.sizes, start=1):
            features, names = (self.width, ("mlp", "embed")) if i == last else (self.width // 4, (None, "mlp"))
            names = ("embed", "mlp") if i == 1 else names
            branch = Convolution(features, size, names, dtype=self.dtype, name=f"conv{i}")(jax.nn.relu(branch))
        if x.shape[-1] != self.width:
            x = Convolution(self.width, 1, (None, "embed"), dtype=self.dtype, name="shortcut")(x)
        return constrain(x + self.gain * branch, "batch", None, None, "embed")


class Convolution(nn.Module):
    """A convolution of stride 1 that keeps the sides, started from a normal of spread fan_in^-1/2 (published code).

    Attributes:
        features: output channels.
        size: side of the kernel; odd.
        names: logical names of its input and output channels.
        dtype: compute dtype.
    """

    features: int
    size: int
    names: tuple[str | None, str | None] = (None, "embed")
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, features] in `dtype`."""
        shape, fan_in = (self.size, self.size, x.shape[-1], self.features), self.size**2 * x.shape[-1]
        kernel = weight(self, "kernel", normal(fan_in**-0.5), (None, None, *self.names), shape)
        bias = weight(self, "bias", zeros, (self.names[1],), (self.features,))
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (1, 1),
            [(self.size // 2, self.size // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return constrain(y + jnp.broadcast_to(bias.astype(self.dtype), y.shape), "batch", None, None, self.names[1])


def _maximum_pool(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H / 2, W / 2, C]."""
    batch, height, width, channels = x.shape
    pooled = x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
    return constrain(pooled, "batch", None, None, "embed")


def map_pixels(images_BxHxWx3: jax.Array) -> jax.Array:
    """uint8 -> fp32 in [0.1, 0.9], what encoder and likelihood are defined on."""
    return (1 - 2 * LAPLACE_EPS) / 255.0 * images_BxHxWx3.astype(jnp.float32) + LAPLACE_EPS


def unmap_pixels(pixels_BxHxWx3: jax.Array) -> jax.Array:
    """The inverse of `map_pixels`, rounded and cut to 0..255, uint8."""
    images = (pixels_BxHxWx3 - LAPLACE_EPS) * (255.0 / (1 - 2 * LAPLACE_EPS))
    return jnp.clip(jnp.round(images), 0, 255).astype(jnp.uint8)


def decoded_images(decoded_BxHxWx6: jax.Array) -> jax.Array:
    """The likeliest images of what the decoder gives: its locations, uint8 [B, H, W, 3]."""
    return unmap_pixels(jax.nn.sigmoid(decoded_BxHxWx6[..., :3]))


__all__ = [
    "LAPLACE_EPS",
    "STRIDE",
    "Dvae",
    "DvaeModelConfig",
    "decoded_images",
    "map_pixels",
    "unmap_pixels",
]
