"""What every method that learns from captioned images has in common: the rows of its batches and what must agree.

No loss is here, and no model: a method names its image tower and its text sizes, the rest follows.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlm_jax.data.examples import ClipExamples
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.text import Tokenizer
from vlm_jax.flops import TRAIN_OVER_FORWARD
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.objectives.base import ModelObjective, ObjectiveConfig, normalise_images
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

    def make_example(self, tokenizer: Tokenizer | None, data: DataConfig) -> ClipExamples:
        """Image and one of its captions."""
        assert tokenizer is not None, "a method that reads text has a tokenizer"
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


class ImageTextObjective(ModelObjective):
    """An objective around a module that is called with (images, texts, keys) and has its image tower at `image`."""

    def __init__(self, config: ImageTextConfig, module: nn.Module, preprocess: PreprocessConfig):
        self.module, self.preprocess = module, preprocess
        self._image_tower, self._shapes = config.image_tower, config.batch_shapes(1)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Parameters of the module; nothing else is kept."""
        images, texts = (jnp.zeros(self._shapes[name].shape, self._shapes[name].dtype) for name in ("image", "text"))
        return self.module.init(key, normalise_images(images, self.preprocess), texts)["params"], {}

    def constrain(self, params: Any, updates: Any) -> Any:
        """Running statistics of the image tower, where it has some, moved by those of the step."""
        return params | {"image": self._image_tower.updated(params["image"], updates["statistics"])}

    def _apply(self, params: Any, batch: Mapping[str, Any], keys: jax.Array | None, **options: Any) -> Any:
        """The module's outputs on a batch."""
        images = normalise_images(batch["image"], self.preprocess)
        return self.module.apply({"params": params}, images, batch["text"], keys, **options)

    def _apply_images(self, params: Any, images: jax.Array, method: Callable[..., Any] | str, *arguments: Any) -> Any:
        """What a method of the module makes of images alone."""
        images = normalise_images(images, self.preprocess)
        return self.module.apply({"params": params}, images, *arguments, method=method)


__all__ = ["ImageTextConfig", "ImageTextObjective"]
