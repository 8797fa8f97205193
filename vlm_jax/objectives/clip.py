"""CLIP: symmetric InfoNCE between an image tower and a text tower (Radford et al. 2021).

With a frozen image tower (`config.parts`) it is LiT, with dropped patches FLIP.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.losses.contrastive import info_nce
from vlm_jax.objectives.dual_encoder import DualEncoder, DualEncoderConfig, clipped_scale, scale_problems
from vlm_jax.step import Ratio


@dataclasses.dataclass(frozen=True)
class ClipConfig(DualEncoderConfig):
    """Contrastive pre-training of two towers."""

    # form of the loss, all equal in value: `gather` one tower; `ring` for few chips or very large batches; `global`
    # plain logits
    loss: Literal["gather", "ring", "global"] = "gather"
    # upper limit of the learned scale on the cosines (paper, section 2.5); the lower one is 1
    max_scale: float = 100.0

    def problems(self) -> Iterator[tuple[str, str]]:
        """Limits that the scale starts beyond, and a bias that the softmax would cancel."""
        yield from super().problems()
        yield from scale_problems(self.model.logit_scale_init, self.max_scale)
        if self.model.logit_bias_init is not None:
            yield (
                "model.logit_bias_init",
                f"= {self.model.logit_bias_init:.4g} has no effect here: a softmax cancels a bias on all logits; set "
                "it to None, or use the sigmoid loss (config.objective=siglip)",
            )

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "Clip":
        """See the base."""
        return Clip(self, preprocess, dtype)


class Clip(DualEncoder):
    """See `ClipConfig`."""

    def __init__(self, config: ClipConfig, preprocess: PreprocessConfig, dtype: Dtype):
        super().__init__(config, preprocess, dtype)
        self.config = config

    def feature_loss(self, params: Any, image_BxE: jax.Array, text_BxE: jax.Array) -> Ratio:
        """The contrastive loss over the global batch."""
        return info_nce(image_BxE, text_BxE, jnp.exp(params["logit_scale"]), impl=self.config.loss)

    def constrain(self, params: Any, updates: Any) -> Any:
        """The scale back into [1, max_scale], after the update."""
        return clipped_scale(super().constrain(params, updates), self.config.max_scale)


__all__ = ["Clip", "ClipConfig"]
