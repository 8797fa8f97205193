"""MAE: three quarters of an image are removed, and their pixels predicted from the rest (He et al. 2022)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.flops import TRAIN_OVER_FORWARD
from vlm_jax.losses.pixels import masked_square_error, patch_targets, predicted_images
from vlm_jax.models.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderConfig
from vlm_jax.models.stochastic import fold_in
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.base import normalise_images
from vlm_jax.objectives.images import ImageObjective, ImagesConfig, pictures
from vlm_jax.step import Aux, Batch, Ratio


@dataclasses.dataclass(frozen=True)
class MaeConfig(ImagesConfig):
    """Prediction of removed patches by a masked autoencoder."""

    model: MaskedAutoencoderConfig = MaskedAutoencoderConfig()  # encoder and decoder

    @property
    def image_tower(self) -> ViTConfig:
        """See the base."""
        return self.model.image

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "Mae":
        """See the base."""
        return Mae(self, preprocess, dtype)

    def train_flops(self) -> float:
        """See the base."""
        return float(TRAIN_OVER_FORWARD * self.model.forward_flops())


class Mae(ImageObjective):
    """See `MaeConfig`."""

    def __init__(self, config: MaeConfig, preprocess: PreprocessConfig, dtype: Dtype):
        super().__init__(config, MaskedAutoencoder(config.model, dtype), preprocess, dtype)
        self.config = config

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """See the base."""
        model = self.config.model.image
        images = jnp.zeros((1, *model.image_shape, 3), jnp.float32)
        return self.module.init(key, images, jnp.zeros((1, model.patches)))["params"], {}

    def loss(self, params: Any, extra: Any, batch: Batch, keys: jax.Array, step: jax.Array) -> tuple[Ratio, Aux]:
        """The mean over removed patches of the mean squared error in a patch (section 3)."""
        images = normalise_images(batch["image"], self.preprocess)
        return self.loss_and_outputs(params, images, self.noise(keys), fold_in(keys, 1))[0], Aux({})

    def noise(self, keys: jax.Array) -> jax.Array:
        """[B] keys -> uniform [B, N]; the patches of least noise are kept."""
        count = self.config.model.image.patches
        return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (count,)))(keys)

    def loss_and_outputs(
        self, params: Any, images: jax.Array, noise: jax.Array, keys: jax.Array | None = None, **options: Any
    ) -> tuple[Ratio, dict[str, jax.Array]]:
        """The loss on normalised images with a given noise, and the module's outputs."""
        outputs: Any = self.module.apply({"params": params}, images, noise, keys, **options)
        targets = patch_targets(images, self.config.model.image.patch_size, self.config.model.normalise_pixels)
        sums, counts = masked_square_error(outputs["prediction"], targets, outputs["removed"])
        return (sums.sum(), counts.sum()), outputs

    def reconstruct(self, params: Any, images: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
        """See the base."""
        tower, images = self.config.model.image, normalise_images(images, self.preprocess)
        outputs: Any = self.module.apply({"params": params}, images, self.noise(keys))
        normalised = self.config.model.normalise_pixels
        prediction = predicted_images(outputs["prediction"], images, tower.patch_size, normalised)
        return pictures(images, prediction, outputs["removed"], tower.grid, self.preprocess)


__all__ = ["Mae", "MaeConfig"]
