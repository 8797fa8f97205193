"""AIM: pixels of the next patch, regressed by a vision transformer (El-Nouby et al. 2024).

Its ablations are in the config: order, attention, head, targets, and masked modelling in the place of autoregression.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.flops import TRAIN_OVER_FORWARD
from vlm_jax.losses.pixels import masked_square_error, patch_targets
from vlm_jax.models.aim import AimModelConfig
from vlm_jax.models.stochastic import fold_in
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.base import normalise_images
from vlm_jax.objectives.images import ImageObjective, ImagesConfig
from vlm_jax.objectives.patch_prediction import Autoregression, PatchPrediction, Plan, plan_pictures
from vlm_jax.step import Aux, Batch, Ratio


@dataclasses.dataclass(frozen=True)
class AimConfig(ImagesConfig):
    """Autoregressive pre-training on pixels."""

    model: AimModelConfig = AimModelConfig()  # trunk and pixel head
    # which patches are hidden and predicted; "masked" is the paper's comparison with masked modelling
    masking: PatchPrediction = dataclasses.field(default_factory=Autoregression)
    # pixels of a patch brought to mean 0 and variance 1, or as they are
    target: Literal["normalised", "raw"] = "normalised"

    @property
    def image_tower(self) -> ViTConfig:
        """See the base."""
        return self.model.image

    def problems(self) -> Iterator[tuple[str, str]]:
        """A mask token that nothing trains, or none where it is needed."""
        yield from super().problems()
        if self.model.image.mask_token != self.masking.mask_token:
            needed = str(self.masking.mask_token).lower()
            yield "model.image.mask_token", f"must be {needed} with masking = {self.masking.kind()!r}"

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "Aim":
        """See the base."""
        return Aim(self, preprocess, dtype)

    def train_flops(self) -> float:
        """Three times the forward pass."""
        return float(TRAIN_OVER_FORWARD * self.model.forward_flops())


class Aim(ImageObjective):
    """See `AimConfig`."""

    def __init__(self, config: AimConfig, preprocess: PreprocessConfig, dtype: Dtype):
        super().__init__(config, config.model.build(dtype), preprocess, dtype)
        self.config = config

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Parameters of the module; nothing else is kept."""
        images = jnp.zeros((1, *self.config.image_tower.image_shape, 3))
        return self.module.init(key, images)["params"], {}

    def loss(self, params: Any, extra: Any, batch: Batch, keys: jax.Array | None, step: jax.Array) -> tuple[Ratio, Aux]:
        """Squared error of the predicted patches, its mean over those of the batch (paper, eq. 2).

        Without `keys` (evaluation) the same patches are hidden in every row: the loss of held-out images is a number
        that can be compared.
        """
        images = normalise_images(batch["image"], self.preprocess)
        plan = self.config.masking.plan(fold_in(keys, 0), images.shape[0], self.config.image_tower.grid)
        return self.loss_of(params, images, plan, fold_in(keys, 1)), Aux({})

    def loss_of(self, params: Any, images: jax.Array, plan: Plan, keys: jax.Array | None = None) -> Ratio:
        """The loss on normalised images [B, H, W, 3] with what the plan hides."""
        pixels_BxNxP = self.predict(params, images, plan, keys)["pixels"]
        normalised = self.config.target == "normalised"
        targets_BxNxP = patch_targets(images, self.config.image_tower.patch_size, normalised)[:, plan.goals]
        sums, counts = masked_square_error(pixels_BxNxP, targets_BxNxP, plan.predicted)
        return sums.sum(), counts.sum()

    def predict(
        self, params: Any, images: jax.Array, plan: Plan, keys: jax.Array | None = None, *, intermediates: bool = False
    ) -> dict[str, jax.Array]:
        """The model's outputs on normalised images [B, H, W, 3], of which it sees what the plan leaves."""
        return self.module.apply(  # pyright: ignore[reportReturnType]
            {"params": params},
            images,
            keys,
            masked_BxN=plan.masked,
            attention_mask=plan.attention_mask,
            causal=plan.causal,
            intermediates=intermediates,
        )

    def reconstruct(self, params: Any, images: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
        """See the base."""
        images, tower = normalise_images(images, self.preprocess), self.config.image_tower
        plan = self.config.masking.plan(fold_in(keys, 0), images.shape[0], tower.grid)
        pixels_BxNxP = self.predict(params, images, plan)["pixels"]
        normalised = self.config.target == "normalised"
        return plan_pictures(plan, images, pixels_BxNxP, tower, normalised, self.preprocess)


__all__ = ["Aim", "AimConfig"]
