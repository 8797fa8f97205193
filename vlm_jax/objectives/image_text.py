"""What every method that learns from captioned images has in common: the rows of its batches and what must agree.

No loss is here, and no model: a method names its image tower and its text sizes, the rest follows.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from vlm_jax.data.examples import ClipExamples
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.text import Tokenizer
from vlm_jax.flops import TRAIN_OVER_FORWARD
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.objectives.base import ObjectiveConfig
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class ImageTextConfig(ObjectiveConfig):
    """Family of the methods on pairs of `image` and `text`."""

    @property
    def image_tower(self) -> ImageTowerConfig:
        """The image tower."""
        raise TypeError(f"{type(self).__name__} defines no image_tower")

    @property
    def text_sizes(self) -> tuple[int, int]:
        """(vocabulary, length) of what reads or writes the captions."""
        raise TypeError(f"{type(self).__name__} defines no text_sizes")

    @property
    def text_key(self) -> str:
        """Where those sizes stand, relative to the objective's config: `model.text`."""
        return "model.text"

    def forward_flops(self) -> int:
        """Model FLOPs of one pair's forward pass in training."""
        raise TypeError(f"{type(self).__name__} defines no forward_flops")

    def problems(self) -> Iterator[tuple[str, str]]:
        """Images that the preprocessing can't make."""
        height, width = self.image_tower.image_shape
        if height != width:
            yield "model.image.image_size", f"= {height}x{width} must be square here: the preprocessing makes squares"

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return self.image_tower.image_shape[0]

    def make_example(self, tokenizer: Tokenizer, data: DataConfig) -> ClipExamples:
        """Image and one of its captions."""
        return ClipExamples(tokenizer, self.image_size, data.preprocess, data.augment)

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` uint8 [B, H, W, 3], `text` int32 [B, L]."""
        return {
            "image": jax.ShapeDtypeStruct((batch_size, self.image_size, self.image_size, 3), jnp.uint8),
            "text": jax.ShapeDtypeStruct((batch_size, self.text_sizes[1]), jnp.int32),
        }

    def data_problems(self, data: DataConfig) -> Iterator[tuple[str, str]]:
        """The context length stands in two places and must agree."""
        length, tokens = self.text_sizes[1], data.tokenizer.length
        if length != tokens:
            yield (
                "data.tokenizer.length",
                f"= {tokens} must equal config.objective.{self.text_key}.length = {length}; set both",
            )

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """The vocabulary must fit the table."""
        vocabulary, where = self.text_sizes[0], f"config.objective.{self.text_key}"
        if tokenizer.vocab_size > vocabulary:
            raise ConfigError(
                f"{where}.vocab_size = {vocabulary} is smaller than the tokenizer's {tokenizer.vocab_size} ids; "
                f"set it to {tokenizer.vocab_size} or more"
            )

    def train_flops(self) -> float:
        """Three times the forward pass."""
        return float(TRAIN_OVER_FORWARD * self.forward_flops())


__all__ = ["ImageTextConfig"]
