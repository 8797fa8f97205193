"""SimMIM: squares of an image are hidden from any tower, and a linear head predicts their pixels (Xie et al. 2022)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.flops import TRAIN_OVER_FORWARD
from vlm_jax.losses.pixels import masked_absolute_error, patch_targets
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.models.masked_image_model import MaskedImageModel, MaskedImageModelConfig
from vlm_jax.models.stochastic import fold_in
from vlm_jax.objectives.base import normalise_images
from vlm_jax.objectives.images import ImageObjective, ImagesConfig, pictures
from vlm_jax.step import Aux, Batch, Ratio


@dataclasses.dataclass(frozen=True)
class SimMimConfig(ImagesConfig):
    """Prediction of hidden pixels by a tower and a linear head."""

    model: MaskedImageModelConfig = MaskedImageModelConfig()  # the tower, and what is hidden from it

    @property
    def image_tower(self) -> ImageTowerConfig:
        """See the base."""
        return self.model.image

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "SimMim":
        """See the base."""
        return SimMim(self, preprocess, dtype)

    def train_flops(self) -> float:
        """See the base."""
        return float(TRAIN_OVER_FORWARD * self.model.forward_flops())


class SimMim(ImageObjective):
    """See `SimMimConfig`."""

    def __init__(self, config: SimMimConfig, preprocess: PreprocessConfig, dtype: Dtype):
        super().__init__(config, MaskedImageModel(config.model, dtype), preprocess, dtype)
        self.model = config.model

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """See the base."""
        rows, columns = self.model.cells
        images = jnp.zeros((1, *self.model.image.image_shape, 3), jnp.float32)
        return self.module.init(key, images, jnp.zeros((1, rows * columns), bool))["params"], {}

    def hidden(self, keys: jax.Array) -> jax.Array:
        """[B] keys -> bool [B, M]: the cells that are hidden, the same number in every row."""
        count = self.model.cells[0] * self.model.cells[1]
        noise = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (count,)))(keys)
        return jnp.argsort(jnp.argsort(noise, axis=1), axis=1) < self.model.hidden_cells

    def loss(self, params: Any, extra: Any, batch: Batch, keys: jax.Array, step: jax.Array) -> tuple[Ratio, Aux]:
        """The mean absolute error over the channels of the hidden pixels (section 3.4)."""
        images = normalise_images(batch["image"], self.preprocess)
        return self.loss_and_outputs(params, images, self.hidden(keys), fold_in(keys, 1))[0], Aux({})

    def loss_and_outputs(
        self, params: Any, images: jax.Array, hidden: jax.Array, keys: jax.Array | None = None, **options: Any
    ) -> tuple[Ratio, dict[str, jax.Array]]:
        """The loss on normalised images with given hidden cells, its count that of cells; and the module's outputs."""
        outputs: Any = self.module.apply({"params": params}, images, hidden, keys, **options)
        # Cells, not patches, are the unit here: both sides are cut in the same way.
        prediction, targets = (patch_targets(x, self.model.cell, False) for x in (outputs["prediction"], images))
        sums, counts = masked_absolute_error(prediction, targets, hidden)
        return (sums.sum(), counts.sum()), outputs

    def reconstruct(self, params: Any, images: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
        """See the base."""
        images, hidden = normalise_images(images, self.preprocess), self.hidden(keys)
        outputs: Any = self.module.apply({"params": params}, images, hidden)
        return pictures(images, outputs["prediction"], hidden, self.model.cells, self.preprocess)


__all__ = ["SimMim", "SimMimConfig"]
