"""SimMIM's model (Xie et al. 2022): a tower that sees a mask token for hidden patches, and one linear map to pixels."""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from vlm_jax.mesh import constrain
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.models.initializers import torch_linear
from vlm_jax.models.linear import Linear
from vlm_jax.models.swin import SWIN, SwinConfig
from vlm_jax.models.vit import ViTConfig


@dataclasses.dataclass(frozen=True)
class MaskedImageModelConfig:
    """The tower, and what of the image is hidden; the defaults are those of Swin-B at 192 pixels."""

    image: ImageTowerConfig = dataclasses.field(  # the tower
        default_factory=lambda: dataclasses.replace(SWIN["Swin-B"], image_size=192, window=6, mask_token=True)
    )
    cell: int = 32  # side in pixels of the squares that are hidden as a whole
    mask_ratio: float = 0.6  # share of them that is hidden, rounded up

    def problems(self) -> Iterator[tuple[str, str]]:
        """Towers without a mask token, and cells that don't fit."""
        if not isinstance(self.image, ViTConfig | SwinConfig):
            yield "image", f"= {self.image.kind()!r} has no mask token; use 'vit' or 'swin'"
            return
        if not self.image.mask_token:
            yield "image.mask_token", "= false leaves nothing to put in the place of hidden patches; set it to true"
        sides = self.image.image_shape
        if self.cell < 1 or self.cell % self.image.patch_size or any(side % self.cell for side in sides):
            yield (
                "cell",
                f"= {self.cell} must be a multiple of the patch, {self.image.patch_size}, and divide the image, "
                f"{sides[0]}x{sides[1]}",
            )
        elif any(side % self.stride for side in sides):
            yield "image.image_size", f"= {sides[0]}x{sides[1]} must be a multiple of the tower's stride {self.stride}"
        if not 0 < self.mask_ratio <= 1:
            yield "mask_ratio", f"= {self.mask_ratio} is a share of the cells; it must lie in (0, 1]"

    @property
    def cells(self) -> tuple[int, int]:
        """(rows, columns) of cells."""
        height, width = self.image.image_shape
        return height // self.cell, width // self.cell

    @property
    def hidden_cells(self) -> int:
        """How many cells of an image are hidden."""
        return math.ceil(self.cells[0] * self.cells[1] * self.mask_ratio)

    @property
    def stride(self) -> int:
        """Side in pixels of what one token of the tower stands for."""
        return self.image.stride if isinstance(self.image, SwinConfig) else self.tower.patch_size

    @property
    def tower(self) -> ViTConfig | SwinConfig:
        """The tower, one of those with a mask token."""
        assert isinstance(self.image, ViTConfig | SwinConfig), "see `problems`"
        return self.image

    def forward_flops(self) -> int:
        """Model FLOPs of one image's forward pass."""
        height, width = self.image.image_shape
        return self.image.forward_flops(0) + 2 * self.image.token_width * 3 * height * width


class MaskedImageModel(nn.Module):
    """Parameters: `image/...` and `decoder/...`.

    Attributes:
        config: the tower.
        dtype: compute dtype; parameters are fp32.
    """

    config: MaskedImageModelConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares tower and decoder."""
        config = self.config
        self.image = config.image.build(None, self.dtype)
        start = torch_linear(config.image.token_width)
        # Channels are stored as published: colour, then row and column inside of what a token stands for.
        self.decoder = Linear((3 * config.stride**2,), ("embed", None), start, start, dtype=self.dtype)

    def __call__(
        self,
        images_BxHxWxC: jax.Array,
        hidden_BxM: jax.Array,
        keys: jax.Array | None = None,
        *,
        intermediates: bool = False,
    ) -> dict[str, jax.Array]:
        """Predicts the pixels of the whole image.

        Args:
            images_BxHxWxC: normalised float, of the tower's image size.
            hidden_BxM: bool, the cells that are hidden, in raster order.
            keys: [B] typed keys, one a row, or None: no drop path and no dropout.
            intermediates: whether to return what stands between the tower's layers.

        Returns:
            "prediction" [B, H, W, C], and the tower's outputs as "image/tokens", ...
        """
        config, batch = self.config, images_BxHxWxC.shape[0]
        patches = config.cell // config.tower.patch_size
        masked = hidden_BxM.reshape(batch, *config.cells).repeat(patches, axis=1).repeat(patches, axis=2)
        image = self.image(images_BxHxWxC, keys, masked_BxN=masked.reshape(batch, -1), intermediates=intermediates)
        tokens = image["tokens"][:, config.image.prefix_tokens :]
        (height, width), stride = config.image.image_shape, config.stride
        pixels = constrain(self.decoder(tokens), "batch", "length", None)
        pixels = pixels.reshape(batch, height // stride, width // stride, 3, stride, stride)
        pixels = pixels.transpose(0, 1, 4, 2, 5, 3).reshape(batch, height, width, 3)
        named = {f"image/{name}": value for name, value in image.items()}
        return named | {"prediction": constrain(pixels, "batch", None, None, None)}


__all__ = ["MaskedImageModel", "MaskedImageModelConfig"]
