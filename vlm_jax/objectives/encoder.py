"""An image tower alone, as it is imported: it gives features and starts other runs, but has no loss to train by."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from vlm_jax.data.examples import MakeExample
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.text import Tokenizer
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.images import ImageObjective, ImagesConfig
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class EncoderModelConfig:
    """The tower."""

    image: ImageTowerConfig = dataclasses.field(default_factory=ViTConfig)  # the image tower


@dataclasses.dataclass(frozen=True)
class EncoderConfig(ImagesConfig):
    """An image tower without a method."""

    model: EncoderModelConfig = EncoderModelConfig()  # holds the tower

    @property
    def image_tower(self) -> ImageTowerConfig:
        """See the base."""
        return self.model.image

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "Encoder":
        """See the base."""
        return Encoder(self, preprocess, dtype)

    def make_example(self, tokenizer: Tokenizer | None, data: DataConfig) -> MakeExample:
        """Raises `ConfigError`: nothing is trained here."""
        raise ConfigError(
            "config.objective = 'encoder' has no loss to train by; give a method and start it from this checkpoint by "
            "--config.init_from.path"
        )

    def train_flops(self) -> float:
        """Of a forward pass, as there is no other."""
        return float(self.model.image.forward_flops(0))


class EncoderModule(nn.Module):
    """Parameters: `image/...`.

    Attributes:
        image_tower: the tower.
        dtype: compute dtype; parameters are fp32.
    """

    image_tower: ImageTowerConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares the tower."""
        self.image = self.image_tower.build(None, self.dtype)

    def __call__(self, images: jax.Array, *, intermediates: bool = False) -> dict[str, jax.Array]:
        """Normalised float [B, H, W, 3] -> the tower's outputs."""
        return self.image(images, intermediates=intermediates)


class Encoder(ImageObjective):
    """See `EncoderConfig`."""

    def __init__(self, config: EncoderConfig, preprocess: PreprocessConfig, dtype: Dtype):
        super().__init__(config, EncoderModule(config.image_tower, dtype), preprocess, dtype)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """See the base."""
        return self.module.init(key, jnp.zeros((1, *self.image_tower.image_shape, 3)))["params"], {}


__all__ = ["Encoder", "EncoderConfig", "EncoderModelConfig", "EncoderModule"]
