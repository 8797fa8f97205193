"""SigLIP: a sigmoid on every pair of an image tower and a text tower (Zhai et al. 2023).

With a frozen image tower (`config.parts`) it is SigLiT. What is new in SigLIP 2 beside this loss (decoder,
self-distillation) is not here.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.losses.sigmoid import sigmoid_loss
from vlm_jax.objectives.dual_encoder import DualEncoder, DualEncoderConfig, clipped_scale, scale_problems
from vlm_jax.step import Ratio


@dataclasses.dataclass(frozen=True)
class SiglipConfig(DualEncoderConfig):
    """Pre-training of two towers with the pairwise sigmoid loss."""

    # form of the loss, all equal in value: `gather` one tower, two bulk collectives; `ring` the paper's chunks, for few
    # chips or very large batches; `global` plain logits. XLA's temporary memory per device (CPU devices, batch 32768,
    # width 768, fp32) for loss and gradients by gather / ring: 1632 / 152 MiB on 8, 288 / 5.5 on 64, 144 / 1.2 on 256.
    # But the ring makes as many hops, one after the other, as there are devices: on a pod, where each holds few rows,
    # gather is faster and what it takes is little.
    loss: Literal["gather", "ring", "global"] = "gather"
    # upper limit of the learned scale on the cosines, with 1 as the lower one; None leaves it free, as published
    max_scale: float | None = None

    def problems(self) -> Iterator[tuple[str, str]]:
        """A missing bias, and a scale that starts beyond its limits."""
        yield from super().problems()
        if self.model.logit_bias_init is None:
            yield (
                "model.logit_bias_init",
                "= None: the sigmoid loss needs a bias, or the many negatives of a batch dominate its first steps; set "
                "it to -10, as published",
            )
        if self.max_scale is not None:
            yield from scale_problems(self.model.logit_scale_init, self.max_scale)

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "Siglip":
        """See the base."""
        return Siglip(self, preprocess, dtype)


class Siglip(DualEncoder):
    """See `SiglipConfig`."""

    def __init__(self, config: SiglipConfig, preprocess: PreprocessConfig, dtype: Dtype):
        super().__init__(config, preprocess, dtype)
        self.config = config

    def feature_loss(self, params: Any, image_BxE: jax.Array, text_BxE: jax.Array) -> Ratio:
        """The sigmoid loss over the global batch."""
        scale, bias = jnp.exp(params["logit_scale"]), params["logit_bias"]
        return sigmoid_loss(image_BxE, text_BxE, scale, bias, impl=self.config.loss)

    def constrain(self, params: Any, updates: Any) -> Any:
        """The scale back into [1, max_scale], after the update, where there is a limit."""
        params = super().constrain(params, updates)
        return params if self.config.max_scale is None else clipped_scale(params, self.config.max_scale)


__all__ = ["Siglip", "SiglipConfig"]
