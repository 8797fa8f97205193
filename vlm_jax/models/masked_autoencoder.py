"""The masked autoencoder (He et al. 2022): an encoder that sees the kept patches alone, a small decoder that sees all.

Which patches are kept is decided by noise that the caller gives. The loss on the predicted pixels is elsewhere.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from vlm_jax.flops import transformer_flops
from vlm_jax.mesh import constrain
from vlm_jax.models.initializers import INITIALIZERS, InitName, xavier_uniform
from vlm_jax.models.linear import Linear
from vlm_jax.models.mlp import ActivationName
from vlm_jax.models.norms import NORMS
from vlm_jax.models.position import sincos_2d
from vlm_jax.models.stochastic import fold_in, kept_patches
from vlm_jax.models.transformer import TransformerConfig, run_blocks
from vlm_jax.models.vit import ViTConfig
from vlm_jax.models.weights import weight


@dataclasses.dataclass(frozen=True)
class PixelDecoderConfig(TransformerConfig):
    """The decoder of every published size (appendix A.1): eight blocks of width 512."""

    width: int = 512  # of the residual stream
    depth: int = 8  # number of blocks
    heads: int = 16  # attention heads; divides width
    mlp_dim: int = 2048  # hidden width of the MLP
    activation: ActivationName = "gelu"  # of the MLP; "gelu" is the exact one
    norm_eps: float = 1e-6  # added to the variance in every norm
    init: InitName = "mae"  # recipe of the initial weights

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        yield from super().problems()
        if self.width % 4:
            yield "width", f"= {self.width} must be a multiple of 4: positions are sines and cosines of two axes"


@dataclasses.dataclass(frozen=True)
class MaskedAutoencoderConfig:
    """Encoder and decoder."""

    image: ViTConfig = dataclasses.field(default_factory=lambda: mae_encoder(768, 12, 12, 16))  # the encoder
    decoder: PixelDecoderConfig = PixelDecoderConfig()  # from the encoder's tokens to pixels
    mask_ratio: float = 0.75  # share of the patches that the encoder does not see
    # whether what is predicted are the pixels of patches brought to mean 0 and variance 1, as in the released recipe
    normalise_pixels: bool = True

    def problems(self) -> Iterator[tuple[str, str]]:
        """Shares that keep nothing or hide nothing, and a tower that drops patches itself."""
        if not 0 < self.mask_ratio < 1 or self.kept == self.image.patches:
            yield (
                "mask_ratio",
                f"= {self.mask_ratio} must lie in (0, 1) and remove at least one of the {self.image.patches} patches",
            )
        if self.image.patch_dropout:
            yield "image.patch_dropout", f"= {self.image.patch_dropout} drops patches a second time; set it to 0"

    @property
    def kept(self) -> int:
        """How many patches the encoder sees."""
        return kept_patches(self.image.patches, self.mask_ratio)

    def forward_flops(self) -> int:
        """Model FLOPs of one image's forward pass in training."""
        image, decoder = self.image, self.decoder
        encoder = dataclasses.replace(image, patch_dropout=self.mask_ratio).forward_flops(0)
        embed = 2 * (self.kept + image.prefix_tokens) * image.width * decoder.width
        tokens = image.prefix_tokens + image.patches
        blocks = transformer_flops(decoder.width, decoder.depth, decoder.mlp_dim, tokens, decoder.gated)
        return encoder + embed + blocks + 2 * image.patches * decoder.width * 3 * image.patch_size**2


def mae_encoder(width: int, depth: int, heads: int, patch_size: int, image_size: int = 224) -> ViTConfig:
    """A ViT as MAE trains it: fixed sine-cosine positions, a class token, exact GELU, eps 1e-6."""
    return ViTConfig(
        width=width,
        depth=depth,
        heads=heads,
        mlp_dim=4 * width,
        patch_size=patch_size,
        image_size=image_size,
        activation="gelu",
        norm_eps=1e-6,
        pos_embed="sincos",
        pre_norm=False,
        patch_bias=True,
        init="mae",
    )


# He et al. 2022, appendix A.1; Dosovitskiy et al. 2021, table 1
MAE: dict[str, MaskedAutoencoderConfig] = {
    "MAE-B/16": MaskedAutoencoderConfig(mae_encoder(768, 12, 12, 16)),
    "MAE-L/16": MaskedAutoencoderConfig(mae_encoder(1024, 24, 16, 16)),
    "MAE-H/14": MaskedAutoencoderConfig(mae_encoder(1280, 32, 16, 14)),
}


def choose_patches(noise_BxN: jax.Array, kept: int) -> tuple[jax.Array, jax.Array]:
    """The patches of least noise, in the order of their noise as published, and the way back.

    Args:
        noise_BxN: float; ties keep their order.
        kept: how many.

    Returns:
        Indices of the kept patches, int32 [B, kept], and for each place of the grid its position among the kept ones
        followed by the removed ones, int32 [B, N]: a patch is removed where that is `kept` or more.
    """
    order_BxN = jnp.argsort(noise_BxN, axis=1)
    return order_BxN[:, :kept], jnp.argsort(order_BxN, axis=1)


class MaskedAutoencoder(nn.Module):
    """Parameters: `image/...` and `decoder/...`.

    Attributes:
        config: encoder and decoder.
        dtype: compute dtype; parameters are fp32.
    """

    config: MaskedAutoencoderConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares encoder and decoder."""
        self.image = self.config.image.build(None, self.dtype)
        self.decoder = PixelDecoder(self.config.decoder, self.config.image, self.dtype)

    def __call__(
        self,
        images_BxHxWxC: jax.Array,
        noise_BxN: jax.Array,
        keys: jax.Array | None = None,
        *,
        intermediates: bool = False,
    ) -> dict[str, jax.Array]:
        """Predicts the pixels of all patches from the kept ones.

        Args:
            images_BxHxWxC: normalised float, of the encoder's image size.
            noise_BxN: uniform, one number a patch: those of least noise are kept.
            keys: [B] typed keys, one a row, or None: no drop path and no dropout.
            intermediates: whether to return every block's output.

        Returns:
            "prediction" [B, N, p p C] in raster order, "removed" bool [B, N], the encoder's outputs as
            "image/tokens", ... (prefix tokens, then the kept patches in the order of their noise), and with
            intermediates "decoder/blocks" [L, B, T, D].
        """
        kept_BxK, places_BxN = choose_patches(noise_BxN, self.config.kept)
        image = self.image(images_BxHxWxC, fold_in(keys, 0), kept_BxK=kept_BxK, intermediates=intermediates)
        decoded = self.decoder(image["tokens"], places_BxN, fold_in(keys, 1), intermediates=intermediates)
        removed_BxN = places_BxN >= self.config.kept
        named = {f"image/{name}": value for name, value in image.items()}
        return named | decoded | {"removed": removed_BxN}


class PixelDecoder(nn.Module):
    """The encoder's tokens and mask tokens, each at its place, through a few blocks to pixels (section 3).

    Attributes:
        config: sizes of the blocks.
        image: the encoder, whose grid and patches these are.
        dtype: compute dtype; parameters are fp32.
    """

    config: PixelDecoderConfig
    image: ViTConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x_BxSxC: jax.Array, places_BxN: jax.Array, keys: jax.Array | None = None, *, intermediates: bool = False
    ) -> dict[str, jax.Array]:
        """[B, prefix + kept, C] -> "prediction" [B, N, p p 3], and with intermediates "decoder/blocks".

        `places_BxN` says which of the kept tokens, followed by mask tokens, stands at each place of the grid.
        """
        config, prefix, init = self.config, self.image.prefix_tokens, xavier_uniform
        start = init(x_BxSxC.shape[-1], config.width)
        embed = Linear((config.width,), ("embed", "joint"), start, dtype=self.dtype, name="embed")
        x = constrain(embed(x_BxSxC), "batch", "length", "embed")
        mask_token = INITIALIZERS[config.init](config.width, config.depth, config.mlp_dim).mask_token
        token = weight(self, "mask_token", mask_token, ("embed",), (config.width,)).astype(self.dtype)
        kept = x.shape[1] - prefix
        # A gather from the kept tokens alone: rows of mask tokens would only be written to be read again.
        found = jnp.take_along_axis(x[:, prefix:], jnp.minimum(places_BxN, kept - 1)[:, :, None], axis=1)
        patches = jnp.where((places_BxN < kept)[:, :, None], found, jnp.broadcast_to(token, found.shape))
        x = constrain(jnp.concatenate([x[:, :prefix], patches], axis=1), "batch", "length", "embed")
        positions = jnp.asarray(sincos_2d(self.image.grid, config.width, prefix), self.dtype)
        x, blocks = run_blocks(config, x + positions[None], keys, intermediates=intermediates, dtype=self.dtype)
        x = NORMS[config.norm](config.norm_eps, name="ln_post")(x[:, prefix:])
        pixels = 3 * self.image.patch_size**2
        head = Linear((pixels,), ("embed", None), init(config.width, pixels), dtype=self.dtype, name="head")
        outputs = {"prediction": constrain(head(x), "batch", "length", None)}
        return outputs if blocks is None else outputs | {"decoder/blocks": blocks}


__all__ = [
    "MAE",
    "MaskedAutoencoder",
    "MaskedAutoencoderConfig",
    "PixelDecoder",
    "PixelDecoderConfig",
    "choose_patches",
    "mae_encoder",
]
