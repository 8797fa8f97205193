"""An image tower and a text tower that meet in one space. The losses on them live in `vlm_jax.losses`."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.nn.initializers import constant

from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.models.projection import ProjectionConfig, unit_length
from vlm_jax.models.stochastic import fold_in
from vlm_jax.models.text import TextConfig, TextTower
from vlm_jax.models.vit import ViTConfig


@dataclasses.dataclass(frozen=True)
class TwoTowerConfig:
    """A dual encoder; the defaults are CLIP's ViT-B/32."""

    image: ImageTowerConfig = dataclasses.field(default_factory=ViTConfig)  # the image tower
    text: TextConfig = dataclasses.field(default_factory=TextConfig)  # the text tower
    embed_dim: int = 512  # dimension of the joint space
    # heads: "linear" and "mlp" on both towers; "text": a matrix on the text tower alone (SigLIP); "none": on neither. A
    # tower without a head must pool embed_dim channels
    projection: Literal["linear", "mlp", "text", "none"] = "linear"
    text_projection_bias: bool = False  # bias on the text head (SigLIP)
    logit_scale_init: float = math.log(1 / 0.07)  # start of the learned log temperature (SigLIP: ln 10)
    logit_bias_init: float | None = None  # start of the learned logit bias (SigLIP: -10); None for none

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        if self.embed_dim < 1:
            yield "embed_dim", f"= {self.embed_dim} must be at least 1"
        if not self.image.pools:
            yield "image.pool", "= 'none' leaves no vector to compare with the text; use 'cls', 'mean' or 'map'"
        towers = (("image", self.image_head, self.image.pooled_width), ("text", self.text_head, self.text.width))
        for tower, head, width in towers:
            if head is None and width != self.embed_dim:
                yield (
                    "projection",
                    f"= {self.projection!r} needs {tower}.width {width} to be embed_dim {self.embed_dim}",
                )

    @property
    def text_tower(self) -> TextConfig:
        """The text tower as it is built."""
        return self.text

    def build(self, dtype: Dtype) -> "TwoTower":
        """The module; `dtype` is the compute dtype."""
        return TwoTower(self, dtype)

    def forward_flops(self) -> int:
        """Model FLOPs of one pair's forward pass."""
        image = self.image.forward_flops(0 if self.image_head is None else self.embed_dim)
        return image + self.text_tower.forward_flops(0 if self.text_head is None else self.embed_dim)

    @property
    def image_head(self) -> ProjectionConfig | None:
        """The image tower's head."""
        if self.projection in ("text", "none"):
            return None
        return ProjectionConfig(self.projection, self.embed_dim)

    @property
    def text_head(self) -> ProjectionConfig | None:
        """The text tower's head."""
        if self.projection == "none":
            return None
        kind = "linear" if self.projection == "text" else self.projection
        return ProjectionConfig(kind, self.embed_dim, self.text_projection_bias)


class TwoTower(nn.Module):
    """CLIP (Radford et al. 2021), and with other sub-configs SigLIP, LiT, FLIP.

    Parameters: `image/...` and `text/...` (each with its `projection`), `logit_scale` () = log of the scale, and
    `logit_bias` () if the config has one.

    Attributes:
        config: both towers and the joint space.
        dtype: compute dtype; parameters, features and scale are fp32.
    """

    config: TwoTowerConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares towers and scalars."""
        config = self.config
        self.image = config.image.build(config.image_head, self.dtype)
        self.text = TextTower(config.text_tower, config.text_head, self.dtype)
        self.logit_scale = self.param("logit_scale", constant(config.logit_scale_init), (), jnp.float32)
        if config.logit_bias_init is not None:
            self.logit_bias = self.param("logit_bias", constant(config.logit_bias_init), (), jnp.float32)

    def __call__(
        self,
        images: jax.Array,
        texts: jax.Array,
        keys: jax.Array | None = None,
        *,
        normalize: bool = True,
        intermediates: bool = False,
    ) -> dict[str, jax.Array]:
        """Encodes a batch of pairs.

        Args:
            images: normalised float [B, H, W, 3].
            texts: int32 [B, L] token ids.
            keys: [B] typed keys, one a pair, or None at evaluation.
            normalize: whether features have unit length.
            intermediates: whether to return every block's output.

        Returns:
            "image_features" and "text_features" [B, E] fp32; "logit_scale" (), the factor on cosines, exp of the
            parameter; "logit_bias" () if there is one; and each tower's outputs as "image/tokens", "text/pooled", ...
        """
        image = self.image(images, fold_in(keys, 0), intermediates=intermediates)
        text = self.text(texts, fold_in(keys, 1), intermediates=intermediates)
        outputs = {
            "image_features": _features(image, normalize),
            "text_features": _features(text, normalize),
            "logit_scale": jnp.exp(self.logit_scale),
        }
        if self.config.logit_bias_init is not None:
            outputs["logit_bias"] = self.logit_bias
        for tower, named in (("image", image), ("text", text)):
            outputs |= {f"{tower}/{name}": value for name, value in named.items()}
        return outputs

    def encode_image(self, images: jax.Array, keys: jax.Array | None = None, *, normalize: bool = True) -> jax.Array:
        """Normalised float [B, H, W, 3] -> features [B, E] fp32; the same numbers as `__call__`."""
        return _features(self.image(images, fold_in(keys, 0)), normalize)

    def image_vectors(self, images: jax.Array, which: str) -> jax.Array:
        """Normalised float [B, H, W, 3] -> fp32 vectors, not normalised: "pooled" [B, D] or "embedding" [B, E]."""
        outputs = self.image(images)
        return (outputs["pooled"] if which == "pooled" else _embedding(outputs)).astype(jnp.float32)

    def encode_text(self, texts: jax.Array, keys: jax.Array | None = None, *, normalize: bool = True) -> jax.Array:
        """int32 [B, L] -> features [B, E] fp32; the same numbers as `__call__`."""
        return _features(self.text(texts, fold_in(keys, 1)), normalize)


def _embedding(outputs: dict[str, jax.Array]) -> jax.Array:
    """The vector in the joint space, which a tower without a projection pools directly."""
    return outputs.get("embedding", outputs["pooled"])


def _features(outputs: dict[str, jax.Array], normalize: bool) -> jax.Array:
    features = _embedding(outputs).astype(jnp.float32)
    return unit_length(features) if normalize else features


__all__ = ["TwoTower", "TwoTowerConfig"]
