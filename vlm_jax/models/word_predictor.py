"""An image tower and a linear map to the vocabulary: which words does the caption have? No text enters the model."""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.nn.initializers import constant, normal

from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.models.linear import Linear
from vlm_jax.models.vit import ViTConfig


@dataclasses.dataclass(frozen=True)
class WordPredictorConfig:
    """An image tower and the words."""

    image: ImageTowerConfig = dataclasses.field(default_factory=ViTConfig)  # the image tower
    vocab_size: int = 49408  # number of token ids
    length: int = 77  # tokens per caption
    bias_init: float = 0.0  # start of every word's bias; with a sigmoid the log odds of a word, such as -ln vocab_size

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        for key, value in (("vocab_size", self.vocab_size), ("length", self.length)):
            if value < 1:
                yield key, f"= {value} must be at least 1"
        if not self.image.pools:
            yield "image.pool", "= 'none' leaves no vector to predict words from; use 'cls', 'mean' or 'map'"
        if not math.isfinite(self.bias_init):
            yield "bias_init", f"= {self.bias_init} must be finite"

    def forward_flops(self) -> int:
        """Model FLOPs of one image's forward pass."""
        return self.image.forward_flops(0) + 2 * self.image.pooled_width * self.vocab_size


class WordPredictor(nn.Module):
    """Parameters: `image/...` and `words/...`.

    Attributes:
        config: tower and words.
        dtype: compute dtype; parameters are fp32.
    """

    config: WordPredictorConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares tower and map."""
        self.image = self.config.image.build(None, self.dtype)
        self.words = Linear(
            (self.config.vocab_size,),
            ("embed", "vocab"),
            normal(self.config.image.pooled_width**-0.5),
            constant(self.config.bias_init),
            dtype=self.dtype,
        )

    def __call__(
        self, images: jax.Array, texts: jax.Array, keys: jax.Array | None = None, *, intermediates: bool = False
    ) -> dict[str, jax.Array]:
        """Normalised float [B, H, W, 3] -> "word_logits" fp32 [B, V] and the tower's outputs as "image/pooled", ..."""
        del texts  # Every method on pairs is called alike.
        image = self.image(images, keys, intermediates=intermediates)
        logits = self.words(image["pooled"]).astype(jnp.float32)
        return {"word_logits": logits} | {f"image/{name}": value for name, value in image.items()}

    def word_logits(self, images: jax.Array) -> jax.Array:
        """Normalised float [B, H, W, 3] -> fp32 [B, V]."""
        return self.words(self.image(images)["pooled"]).astype(jnp.float32)

    def image_vectors(self, images: jax.Array, which: str) -> jax.Array:
        """Normalised float [B, H, W, 3] -> fp32 [B, D]: the tower's "pooled"."""
        del which  # There is no space that the vector could be embedded in.
        return self.image(images)["pooled"].astype(jnp.float32)


__all__ = ["WordPredictor", "WordPredictorConfig"]
