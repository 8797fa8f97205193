"""An image tower with a linear classifier on its pooled vector. Probes of frozen features are in `vlm_jax.evals`."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.nn.initializers import normal

from vlm_jax.mesh import constrain
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.models.linear import Linear
from vlm_jax.models.norms import LayerNorm
from vlm_jax.models.vit import ViTConfig


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Sizes of the classifier; the default tower is ViT-S/16 with the mean of its patches."""

    image: ImageTowerConfig = ViTConfig(
        patch_size=16,
        width=384,
        heads=6,
        mlp_dim=1536,
        activation="gelu",
        norm_eps=1e-6,
        class_token=False,
        pool="mean",
        pre_norm=False,
        patch_bias=True,
        init="vit",
    )
    classes: int = 1000  # of the source; it must name as many
    # a layer norm on the pooled vector (`fc_norm` of MAE and BEiT, whose towers then have no norm after the last block)
    norm: bool = False
    norm_eps: float = 1e-6  # of that norm
    head_init: float = 0.02  # standard deviation of the classifier's first weights; its bias starts at 0

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        if self.classes < 2:
            yield "classes", f"= {self.classes} must be at least 2"
        if not self.image.pools:
            yield "image.pool", "= 'none' leaves no vector to classify; pool by 'mean', 'cls' or 'map'"
        if self.head_init < 0:
            yield "head_init", f"= {self.head_init} must not be negative"

    def forward_flops(self) -> int:
        """Model FLOPs of one image's forward pass."""
        return self.image.forward_flops(0) + 2 * self.image.pooled_width * self.classes

    def build(self, dtype: Dtype) -> "ImageClassifier":
        """The module."""
        return ImageClassifier(self, dtype)


class ImageClassifier(nn.Module):
    """`image`, the tower, and `head`.

    Attributes:
        config: sizes.
        dtype: compute dtype.
    """

    config: ClassifierConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """The submodules."""
        self.image = self.config.image.build(None, self.dtype)
        self.head = ClassifierHead(self.config, self.dtype)

    def __call__(self, images_BxHxWx3: jax.Array, keys: jax.Array | None = None) -> dict[str, jax.Array]:
        """Normalised images and [B] keys (None: evaluation) -> the tower's outputs and "logits" [B, C]."""
        outputs = self.image(images_BxHxWx3, keys)
        return outputs | {"logits": self.head(outputs["pooled"])}


class ClassifierHead(nn.Module):
    """Norm, if there is one, and the classifier: [B, D] -> [B, C]."""

    config: ClassifierConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, pooled_BxD: jax.Array) -> jax.Array:
        """The logits, in the compute dtype."""
        config = self.config
        if config.norm:
            pooled_BxD = LayerNorm(config.norm_eps, name="norm")(pooled_BxD)
        # timm's truncation, at two units and not two deviations, never cuts such a small spread.
        init = normal(config.head_init)
        linear = Linear((config.classes,), ("embed", "vocab"), init, dtype=self.dtype, name="classifier")
        return constrain(linear(pooled_BxD), "batch", "vocab")


__all__ = ["ClassifierConfig", "ImageClassifier"]
