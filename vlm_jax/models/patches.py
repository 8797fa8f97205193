"""Images to patches and to patch embeddings. Masking and dropping of patches happen elsewhere."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from vlm_jax.models.initializers import Initializers
from vlm_jax.models.weights import weight


def patchify(images_BxHxWxC: jax.Array, patch_size: int) -> jax.Array:
    """[B, H, W, C] -> [B, (H/p)(W/p), p p C]: patches in raster order; inside one (row, column, channel).

    Raises:
        ValueError: the patch does not divide the image.
    """
    batch, height, width, channels = images_BxHxWxC.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"an image of {height}x{width} can't be cut into {patch_size}x{patch_size} patches; resize it to a multiple"
        )
    rows, columns = height // patch_size, width // patch_size
    split = images_BxHxWxC.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


def unpatchify(patches_BxNxP: jax.Array, grid: tuple[int, int], patch_size: int) -> jax.Array:
    """The inverse of `patchify`: [B, N, p p C] -> [B, rows p, columns p, C] for a grid of (rows, columns)."""
    batch, (rows, columns) = patches_BxNxP.shape[0], grid
    split = patches_BxNxP.reshape(batch, rows, columns, patch_size, patch_size, -1)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * patch_size, columns * patch_size, -1)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its size, as one matrix product over the patches.

    Attributes:
        patch_size: side of a patch in pixels.
        width: output channels.
        use_bias: whether there is a bias (CLIP: no; SigLIP, MAE: yes).
        initializers: those of the tower.
        dtype: compute dtype.
    """

    patch_size: int
    width: int
    use_bias: bool
    initializers: Initializers
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, T, D]; the kernel is stored [p, p, C, D], as a convolution's."""
        shape = (self.patch_size, self.patch_size, images_BxHxWxC.shape[-1], self.width)
        fan_in = shape[0] * shape[1] * shape[2]
        kernel = weight(self, "kernel", self.initializers.patch_kernel(fan_in), (None, None, None, "embed"), shape)
        patches = patchify(images_BxHxWxC.astype(self.dtype), self.patch_size)
        x = patches @ kernel.reshape(fan_in, self.width).astype(self.dtype)
        if self.use_bias:
            bias = weight(self, "bias", self.initializers.patch_bias(fan_in), ("embed",), (self.width,))
            x = x + jnp.broadcast_to(bias.astype(self.dtype), x.shape)
        return x
