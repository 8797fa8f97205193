"""BEiT: blocks of patches are hidden, and their visual codes predicted (Bao et al. 2022).

The codes are those of a frozen tokenizer: nothing comes back to it from the loss.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.block_masks import TRIES, BlockMasks
from vlm_jax.data.examples import MakeExample, MaskedImages
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.text import Tokenizer
from vlm_jax.flops import TRAIN_OVER_FORWARD
from vlm_jax.losses.tokens import correct_tokens, token_cross_entropy
from vlm_jax.models.beit import Beit as BeitModule
from vlm_jax.models.beit import BeitModelConfig
from vlm_jax.models.dvae import DvaeModelConfig, decoded_images
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.base import denormalise_images, normalise_images
from vlm_jax.objectives.images import ImageObjective, ImagesConfig, pictures
from vlm_jax.schema import ConfigError
from vlm_jax.step import Aux, Batch, Ratio


@dataclasses.dataclass(frozen=True)
class BeitConfig(ImagesConfig):
    """Prediction of the visual codes of hidden patches."""

    model: BeitModelConfig = BeitModelConfig()  # tower, tokenizer, and what is hidden

    @property
    def image_tower(self) -> ViTConfig:
        """See the base."""
        return self.model.image

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "Beit":
        """See the base."""
        return Beit(self, preprocess, dtype)

    def make_example(self, tokenizer: Tokenizer | None, data: DataConfig) -> MakeExample:
        """The image, the same crop for the tokenizer, and a mask."""
        image, masks, code_size = self.model.image, self.model.masks, self._tokenizer.image_size
        return MaskedImages(self.image_size, code_size, image.grid, masks, data.preprocess, data.augment)

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` and `code_image` uint8 [B, side, side, 3], `masked` bool [B, N]."""
        side, patches = self._tokenizer.image_size, self.model.image.patches
        return super().batch_shapes(batch_size) | {
            "code_image": jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.uint8),
            "masked": jax.ShapeDtypeStruct((batch_size, patches), jnp.bool_),
        }

    def data_problems(self, data: DataConfig) -> Iterator[tuple[str, str]]:
        """What hides parts of one view alone."""
        yield from super().data_problems(data)
        if data.augment is not None and data.augment.erasing.probability:
            yield (
                "data.augment.erasing.probability",
                f"= {data.augment.erasing.probability} would erase what the tokenizer names; set it to 0",
            )

    def train_flops(self) -> float:
        """Tower and head forward and backward, the tokenizer forward alone."""
        return float(TRAIN_OVER_FORWARD * self.model.forward_flops() + self._tokenizer.encoder_flops())

    @property
    def _tokenizer(self) -> DvaeModelConfig:
        if self.model.tokenizer is None:
            raise ConfigError(
                "config.objective.model.tokenizer = None leaves nothing to learn from; name a tokenizer's sizes, and "
                "load it and the tower by --config.init_from"
            )
        return self.model.tokenizer


class Beit(ImageObjective):
    """See `BeitConfig`."""

    without_gradient = ("tokenizer/.*",)

    def __init__(self, config: BeitConfig, preprocess: PreprocessConfig, dtype: Dtype):
        super().__init__(config, BeitModule(config.model, dtype), preprocess, dtype)
        self.model = config.model

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """See the base."""
        return self.module.init(key, method="initialise")["params"], {}

    def loss(self, params: Any, extra: Any, batch: Batch, keys: jax.Array, step: jax.Array) -> tuple[Ratio, Aux]:
        """The mean cross-entropy of the hidden patches of the batch (equation 2)."""
        codes: Any = self.module.apply({"params": params}, batch["code_image"], method="codes")
        return self.loss_of(params, normalise_images(batch["image"], self.preprocess), batch["masked"], codes, keys)

    def loss_of(
        self, params: Any, images: jax.Array, masked_BxN: jax.Array, codes_BxN: jax.Array, keys: jax.Array | None = None
    ) -> tuple[Ratio, Aux]:
        """The loss on normalised images with given masks and codes."""
        # Rows hide different numbers of patches: the hidden ones first, as many as a row can have.
        places_BxM = jnp.argsort(~masked_BxN, axis=1, stable=True)[:, : self.model.masks.count]
        valid_BxM, targets_BxM = (jnp.take_along_axis(x, places_BxM, axis=1) for x in (masked_BxN, codes_BxN))
        outputs: Any = self.module.apply({"params": params}, images, masked_BxN, keys, places_BxM=places_BxM)
        sums, counts = token_cross_entropy(outputs["logits"], targets_BxM, valid_BxM)
        hits, count = correct_tokens(outputs["logits"], targets_BxM, valid_BxM).sum(), counts.sum()
        rows = jnp.asarray(masked_BxN.shape[0], jnp.float32)
        return (sums.sum(), count), Aux({"code_accuracy": (hits, count), "masked_patches": (count, rows)})

    def reconstruct(self, params: Any, images: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
        """See the base; "prediction" only where the tokenizer has a decoder."""
        grid = self.model.image.grid
        images, masked = normalise_images(images, self.preprocess), draw_masks(self.model.masks, grid, keys)
        truth = denormalise_images(images, self.preprocess)
        if self.model.tokenizer is None or not self.model.tokenizer.decoder:
            return {"masked": pictures(truth, truth, masked, grid, self.preprocess)["masked"]}
        outputs: Any = self.module.apply({"params": params}, images, masked)
        decoded: Any = self.module.apply({"params": params}, jnp.argmax(outputs["logits"], axis=-1), method="decode")
        shape = (images.shape[0], *self.model.image.image_shape, 3)
        prediction = jax.image.resize(decoded_images(decoded).astype(jnp.float32), shape, "cubic")
        prediction = jnp.clip(jnp.round(prediction), 0, 255).astype(jnp.uint8)
        return pictures(truth, prediction, masked, grid, self.preprocess)


def draw_masks(masks: BlockMasks, grid: tuple[int, int], keys: jax.Array) -> jax.Array:
    """[B] typed keys -> bool [B, N]: what `BlockMasks.draw` draws on the host, by the same rules on the chip."""
    (rows, columns), widest = grid, math.log(1 / masks.aspect)

    def attempt(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        mask, left, failures, key = state
        key, own = jax.random.split(key)
        area, ratio, down, right = jax.random.uniform(own, (4,))
        area, ratio = masks.least + (left - masks.least) * area, jnp.exp(-widest + 2 * widest * ratio)
        height, width = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
        top, start = jnp.floor(down * (rows - height + 1)), jnp.floor(right * (columns - width + 1))
        row, column = jnp.arange(rows) - top, jnp.arange(columns) - start
        block = ((row >= 0) & (row < height))[:, None] & ((column >= 0) & (column < width))[None, :]
        new = (block & ~mask).sum()
        fits = (height < rows) & (width < columns) & (new > 0) & (new <= left)
        return mask | (block & fits), left - jnp.where(fits, new, 0), jnp.where(fits, 0, failures + 1), key

    def one(key: jax.Array) -> jax.Array:
        start = (jnp.zeros(grid, bool), jnp.int32(masks.count), jnp.int32(0), key)
        mask, *_ = jax.lax.while_loop(lambda state: (state[1] > 0) & (state[2] < TRIES), attempt, start)
        return mask.reshape(-1)

    return jax.vmap(one)(keys)


__all__ = ["Beit", "BeitConfig", "draw_masks"]
