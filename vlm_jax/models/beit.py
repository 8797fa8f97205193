"""BEiT's model (Bao et al. 2022): a ViT that sees a mask token for hidden patches and names their visual codes.

The codes come from the encoder of a discrete autoencoder, which stays as it is.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from vlm_jax.data.block_masks import BlockMasks
from vlm_jax.mesh import constrain
from vlm_jax.models.dvae import STRIDE, Dvae, DvaeModelConfig, map_pixels
from vlm_jax.models.initializers import INITIALIZERS
from vlm_jax.models.linear import Linear
from vlm_jax.models.vit import ViTConfig


def beit_encoder(
    width: int, depth: int, heads: int, patch_size: int, image_size: int = 224, layer_scale_init: float = 0.1
) -> ViTConfig:
    """A ViT as BEiT trains it: relative positions that all blocks share, no bias on keys, layer scale, drop path."""
    return ViTConfig(
        width=width,
        depth=depth,
        heads=heads,
        mlp_dim=4 * width,
        patch_size=patch_size,
        image_size=image_size,
        activation="gelu",
        norm_eps=1e-6,
        key_bias=False,
        layer_scale_init=layer_scale_init,
        drop_path=0.1,
        pool="none",
        pos_embed="none",
        relative_position="shared",
        mask_token=True,
        pre_norm=False,
        patch_bias=True,
        init="beit",
    )


@dataclasses.dataclass(frozen=True)
class BeitModelConfig:
    """The tower, its tokenizer, and what is hidden from the tower."""

    image: ViTConfig = dataclasses.field(default_factory=lambda: beit_encoder(768, 12, 12, 16))  # the tower
    vocab_size: int = 8192  # number of codes
    # where the codes come from, None for a model that was imported without one and is not trained; its decoder, if it
    # has one, shows what the tower predicts
    tokenizer: DvaeModelConfig | None = DvaeModelConfig(image_size=112, decoder=False)
    masks: BlockMasks = BlockMasks()  # which patches are hidden

    def problems(self) -> Iterator[tuple[str, str]]:
        """A tower without a mask token, and grids that don't agree."""
        if not self.image.mask_token:
            yield "image.mask_token", "= false leaves nothing to put in the place of hidden patches; set it to true"
        if self.image.patch_dropout:
            yield (
                "image.patch_dropout",
                f"= {self.image.patch_dropout} drops patches whose codes are asked; set it to 0",
            )
        if self.tokenizer is not None and self.image.grid != self.tokenizer.grid:
            (rows, columns), (code_rows, _) = self.image.grid, self.tokenizer.grid
            yield (
                "tokenizer.image_size",
                f"= {self.tokenizer.image_size} gives {code_rows}x{code_rows} codes for {rows}x{columns} patches; use "
                f"{STRIDE * rows}",
            )
        if self.tokenizer is not None and self.vocab_size != self.tokenizer.vocab_size:
            yield "vocab_size", f"= {self.vocab_size} must be the tokenizer's {self.tokenizer.vocab_size}"
        if self.masks.count > self.image.patches:
            yield "masks.count", f"= {self.masks.count} is more than the {self.image.patches} patches of an image"

    def forward_flops(self) -> int:
        """Model FLOPs of one image's forward pass through tower and head, without the tokenizer."""
        return self.image.forward_flops(0) + 2 * self.masks.count * self.image.width * self.vocab_size


# Bao et al. 2022, section 2.5 and appendix; the published code starts the scales of the large model lower
BEIT: dict[str, BeitModelConfig] = {
    "BEiT-B/16": BeitModelConfig(beit_encoder(768, 12, 12, 16)),
    "BEiT-L/16": BeitModelConfig(beit_encoder(1024, 24, 16, 16, layer_scale_init=1e-5)),
}


class Beit(nn.Module):
    """Parameters: `image/...`, `head/...` and the tokenizer's, `tokenizer/...`.

    Attributes:
        config: tower and tokenizer.
        dtype: compute dtype; parameters are fp32.
    """

    config: BeitModelConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares tower, head and tokenizer."""
        config = self.config
        init = INITIALIZERS[config.image.init](config.image.width, config.image.depth, config.image.mlp_dim)
        self.image = config.image.build(None, self.dtype)
        self.head = Linear((config.vocab_size,), ("embed", "vocab"), init.projection, dtype=self.dtype)
        if config.tokenizer is not None:
            self.tokenizer = Dvae(config.tokenizer, self.dtype)

    def __call__(
        self,
        images_BxHxWxC: jax.Array,
        masked_BxN: jax.Array,
        keys: jax.Array | None = None,
        *,
        places_BxM: jax.Array | None = None,
        intermediates: bool = False,
    ) -> dict[str, jax.Array]:
        """Logits of the codes of patches.

        Args:
            images_BxHxWxC: normalised float, of the tower's image size.
            masked_BxN: bool, the patches that are hidden.
            keys: [B] typed keys, one a row, or None: no drop path and no dropout.
            places_BxM: int32, the patches whose codes are asked; None: all.
            intermediates: whether to return every block's output.

        Returns:
            "logits" [B, M or N, V], and the tower's outputs as "image/tokens", ...
        """
        image = self.image(images_BxHxWxC, keys, masked_BxN=masked_BxN, intermediates=intermediates)
        patches = image["tokens"][:, self.config.image.prefix_tokens :]
        if places_BxM is not None:
            patches = jnp.take_along_axis(patches, places_BxM[:, :, None], axis=1)
        logits = constrain(self.head(constrain(patches, "batch", "length", "embed")), "batch", "length", "vocab")
        return {"logits": logits} | {f"image/{name}": value for name, value in image.items()}

    def initialise(self) -> None:
        """Calls everything that has parameters, the tokenizer's decoder included."""
        image, tokenizer = self.config.image, self.config.tokenizer
        self(jnp.zeros((1, *image.image_shape, 3)), jnp.zeros((1, image.patches), bool))
        if tokenizer is not None:
            self.tokenizer(jnp.zeros((1, tokenizer.image_size, tokenizer.image_size, 3)))

    def codes(self, code_images_BxHxWx3: jax.Array) -> jax.Array:
        """uint8 of the tokenizer's image size -> int32 [B, N], the likeliest code of each patch in raster order."""
        logits = jax.lax.stop_gradient(self.tokenizer.encode(map_pixels(code_images_BxHxWx3)))
        return jnp.argmax(logits, axis=-1).reshape(logits.shape[0], -1).astype(jnp.int32)

    def decode(self, codes_BxN: jax.Array) -> jax.Array:
        """int32 codes in raster order -> fp32 [B, H, W, 6] of the tokenizer's image size, by its decoder."""
        one_hot = jax.nn.one_hot(codes_BxN, self.config.vocab_size)
        return self.tokenizer.decode(one_hot.reshape(codes_BxN.shape[0], *self.config.image.grid, -1))


__all__ = ["BEIT", "Beit", "BeitModelConfig", "beit_encoder"]
