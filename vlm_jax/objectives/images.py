"""What every method that learns from images alone has in common: the rows of its batches, and how it is judged.

No loss is here. A method keeps its image tower's parameters under `image/`, so that what it learnt starts another run
(`init_from`) and is evaluated without the rest of the method.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from vlm_jax.data.examples import ImageExamples, MakeExample
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.text import Tokenizer
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.models.projection import unit_length
from vlm_jax.objectives.base import ModelObjective, ObjectiveConfig, denormalise_images, normalise_images
from vlm_jax.objectives.image_text import ImageTextConfig
from vlm_jax.schema import ConfigError

GREY = 128  # of what is hidden, in pictures


@dataclasses.dataclass(frozen=True)
class ImagesConfig(ObjectiveConfig):
    """Family of the methods on images without captions."""

    @property
    def image_tower(self) -> ImageTowerConfig:
        """The image tower that is trained."""
        raise TypeError(f"{type(self).__name__} defines no image_tower")

    @property
    def reads_text(self) -> bool:
        """No."""
        return False

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return self.image_tower.image_shape[0]

    def problems(self) -> Iterator[tuple[str, str]]:
        """Images that the preprocessing can't make."""
        height, width = self.image_tower.image_shape
        if height != width:
            yield "model.image.image_size", f"= {height}x{width} must be square here: the preprocessing makes squares"

    def make_example(self, tokenizer: Tokenizer | None, data: DataConfig) -> MakeExample:
        """The image."""
        return ImageExamples(self.image_size, data.preprocess, data.augment)

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` uint8 [B, H, W, 3]."""
        return {"image": jax.ShapeDtypeStruct((batch_size, self.image_size, self.image_size, 3), jnp.uint8)}


class ImageObjective(ModelObjective):
    """An objective whose image tower has its parameters at `image`.

    Args:
        config: names the tower.
        module: the whole model of the method.
        preprocess: its normalisation.
        dtype: compute dtype.

    Attributes:
        tower: the image tower's module, `tower.apply({"params": params["image"]}, ...)`.
    """

    def __init__(
        self, config: ImagesConfig | ImageTextConfig, module: nn.Module, preprocess: PreprocessConfig, dtype: Dtype
    ):
        self.module, self.preprocess = module, preprocess
        self.image_tower, self.tower = config.image_tower, config.image_tower.build(None, dtype)
        self.block_count = self.image_tower.block_count if self.image_tower.has_class_token else 0

    def encode(self, params: Any, images: jax.Array, *, intermediates: bool = False) -> dict[str, jax.Array]:
        """What the tower makes of whole images, uint8 or normalised float [B, H, W, 3]; nothing random or masked."""
        images = normalise_images(images, self.preprocess)
        return self.tower.apply({"params": params["image"]}, images, intermediates=intermediates)  # pyright: ignore

    def outputs(self, params: Any, batch: Mapping[str, jax.Array], intermediates: bool = True) -> dict[str, jax.Array]:
        """The tower's outputs as `image/...`, and `image_features`."""
        named = self.encode(params, batch["image"], intermediates=intermediates)
        vectors = self._vector(named)
        return {"image_features": unit_length(vectors)} | {f"image/{name}": value for name, value in named.items()}

    def image_features(self, params: Any, images: jax.Array) -> jax.Array:
        """See the base."""
        return unit_length(self._vector(self.encode(params, images)))

    def image_vectors(self, params: Any, images: jax.Array, which: str) -> jax.Array:
        """See the base; there is no joint space, so "pooled" and "embedding" are both the tower's pooled vector."""
        if which == "blocks":
            return self._block_means(params, images)
        named = self.encode(params, images)
        if which not in ("cls", "mean"):
            return self._vector(named)
        if which == "cls":
            self._check_class_token("features = 'cls'")
            return named["tokens"][:, 0].astype(jnp.float32)
        return self._patches(named["tokens"]).mean(axis=1)

    def _block_means(self, params: Any, images: jax.Array) -> jax.Array:
        """[B, blocks x D]: the mean of the patches after each block."""
        if not self.image_tower.block_count:
            raise ConfigError("features = 'blocks': this image tower has no blocks of equal outputs; use 'mean'")
        blocks_LxBxTxD = self.encode(params, images, intermediates=True)["blocks"]
        means = jnp.stack([self._patches(block).mean(axis=1) for block in blocks_LxBxTxD], axis=1)
        return means.reshape(means.shape[0], -1)

    def image_tokens(self, params: Any, images: jax.Array, layers: tuple[int, ...]) -> jax.Array:
        """See the base; raises `ConfigError` for a block that the tower doesn't have."""
        named = self.encode(params, images, intermediates=bool(layers))
        if not layers:
            return self._patches(named["tokens"])
        count = self.image_tower.block_count
        if not all(-count <= layer < count for layer in layers):
            raise ConfigError(
                f"layers = {layers} must be blocks of the image tower, 0 to {count - 1} or -{count} to -1"
                if count
                else f"layers = {layers}: this image tower has no blocks of equal outputs; leave layers empty"
            )
        return self._patches(named["blocks"][jnp.asarray(layers)].astype(jnp.float32).mean(axis=0))

    def layer_vectors(self, params: Any, images: jax.Array, normed: bool) -> jax.Array:
        """See the base."""
        self._check_class_token("layer_vectors")
        blocks_LxBxTxD = self.encode(params, images, intermediates=True)["blocks"]
        if normed:
            blocks_LxBxTxD = self.image_tower.normed(params["image"], blocks_LxBxTxD)
        blocks = blocks_LxBxTxD.swapaxes(0, 1).astype(jnp.float32)
        return jnp.stack([blocks[:, :, 0], blocks[:, :, self.image_tower.prefix_tokens :].mean(axis=2)], axis=2)

    def _check_class_token(self, what: str) -> None:
        if not self.image_tower.has_class_token:
            raise ConfigError(f"{what} needs a class token, and this image tower has none; use features = 'mean'")

    def _patches(self, tokens_BxTxD: jax.Array) -> jax.Array:
        """fp32, without the tokens before the patches."""
        return tokens_BxTxD[:, self.image_tower.prefix_tokens :].astype(jnp.float32)

    def _vector(self, named: Mapping[str, jax.Array]) -> jax.Array:
        """[B, D] fp32: what the tower pools, or the mean of its patches where it pools nothing."""
        if "pooled" in named:
            return named["pooled"].astype(jnp.float32)
        return self._patches(named["tokens"]).mean(axis=1)


def pictures(
    images_BxHxWxC: jax.Array,
    prediction_BxHxWxC: jax.Array,
    hidden_BxN: jax.Array,
    grid: tuple[int, int],
    preprocess: PreprocessConfig,
) -> dict[str, jax.Array]:
    """What `ModelObjective.reconstruct` returns.

    Args:
        images_BxHxWxC: normalised images.
        prediction_BxHxWxC: the prediction in the same values; what it holds in places that are not hidden is ignored.
        hidden_BxN: bool, the cells that are hidden, in raster order.
        grid: (rows, columns) of the cells.
        preprocess: the normalisation.
    """
    batch, height, width, _ = images_BxHxWxC.shape
    hidden = hidden_BxN.reshape(batch, *grid).repeat(height // grid[0], axis=1).repeat(width // grid[1], axis=2)
    truth, prediction = (denormalise_images(x, preprocess) for x in (images_BxHxWxC, prediction_BxHxWxC))
    hidden = jnp.broadcast_to(hidden[:, :, :, None], truth.shape)
    return {
        "masked": jnp.where(hidden, jnp.uint8(GREY), truth),
        "prediction": jnp.where(hidden, prediction, truth),
    }


__all__ = ["GREY", "ImageObjective", "ImagesConfig", "pictures"]
