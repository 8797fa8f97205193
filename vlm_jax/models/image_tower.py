"""The family of image towers, and what the rest of the program asks of one. The towers are modules of their own."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.typing import Dtype

from vlm_jax.models.projection import ProjectionConfig
from vlm_jax.schema import Choice


@dataclasses.dataclass(frozen=True)
class ImageTowerConfig(Choice):
    """Which image tower; pick a kind.

    The module of every kind is called with normalised images [B, H, W, 3], [B] typed keys (None: evaluation) and
    `intermediates`, and returns "tokens" [B, T, D], "pooled" [B, F] unless it pools nothing, "embedding" [B, E] with a
    projection, and "statistics" in training if it normalises by batches.
    """

    @classmethod
    def kinds(cls) -> Mapping[str, type[Any]]:
        """The towers by name."""
        # Here and not on top: the members' modules import this one.
        from vlm_jax.models.attentional_pool import AttentionalPoolConfig
        from vlm_jax.models.resnet import ResNetConfig
        from vlm_jax.models.swin import SwinConfig
        from vlm_jax.models.vit import ViTConfig

        return {
            "vit": ViTConfig,
            "resnet": ResNetConfig,
            "swin": SwinConfig,
            "attentional_pool": AttentionalPoolConfig,
        }

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        raise TypeError(f"{type(self).__name__} defines no image_shape")

    @property
    def pools(self) -> bool:
        """Whether the tower makes one vector of an image."""
        return True

    @property
    def pooled_width(self) -> int:
        """Channels of "pooled"."""
        raise TypeError(f"{type(self).__name__} defines no pooled_width")

    @property
    def token_width(self) -> int:
        """Channels of "tokens"."""
        raise TypeError(f"{type(self).__name__} defines no token_width")

    @property
    def token_count(self) -> int:
        """How many "tokens" an image has in training, where some patches may be dropped."""
        raise TypeError(f"{type(self).__name__} defines no token_count")

    @property
    def prefix_tokens(self) -> int:
        """How many of "tokens" stand before those of patches: class token and registers."""
        return 0

    @property
    def has_class_token(self) -> bool:
        """Whether the first of "tokens" stands for the whole image."""
        return False

    @property
    def block_count(self) -> int:
        """How many blocks "blocks" [L, B, T, D] holds the outputs of; 0 for a tower whose layers differ in shape."""
        return 0

    def normed(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Outputs of blocks, [..., T, D], after the tower's last norm; `params` are its own."""
        return tokens

    def build(self, projection: ProjectionConfig | None, dtype: Dtype) -> nn.Module:
        """The module, with a projection on its pooled vector if there is one; `dtype` is the compute dtype."""
        raise TypeError(f"{type(self).__name__} defines no build")

    def forward_flops(self, embed_dim: int) -> int:
        """Model FLOPs of one image's forward pass in training, with a projection to `embed_dim` (0: none)."""
        raise TypeError(f"{type(self).__name__} defines no forward_flops")

    def without_dropped_patches(self) -> "ImageTowerConfig":
        """The same tower seeing every patch in training (FLIP's last phase); itself if it drops none."""
        return self

    def updated(self, params: Any, statistics: Any) -> Any:
        """The tower's parameters with running statistics moved by those of a step; unchanged for most towers.

        Args:
            params: the tower's own subtree, after the optimiser's update.
            statistics: what "statistics" held, arrays with a leading batch axis; None if there was none.
        """
        return params


__all__ = ["ImageTowerConfig"]
