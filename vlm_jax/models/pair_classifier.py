"""ALBEF's encoders with classifiers of texts that are read beside one image or several (Li et al. 2021, section 5)."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlm_jax.mesh import constrain
from vlm_jax.models.albef import PairEncoder, PairEncoderConfig, feature_projection
from vlm_jax.models.bert import TextStackConfig
from vlm_jax.models.initializers import torch_linear
from vlm_jax.models.linear import Linear
from vlm_jax.models.projection import unit_length
from vlm_jax.models.stochastic import row_keys


@dataclasses.dataclass(frozen=True)
class PairClassifierConfig(PairEncoderConfig):
    """The encoders and the number of classes; images of a text are as many as `fusion.contexts`."""

    classes: int = 3  # of the source; it must name as many

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        yield from super().problems()
        if self.classes < 2:
            yield "classes", f"= {self.classes} must be at least 2"

    @property
    def images(self) -> int:
        """Images beside a text."""
        return self.fusion.contexts

    def forward_flops(self, tokens: int) -> int:
        """Model FLOPs of one row's forward pass."""
        head = 2 * self.fusion.width * (self.fusion.width + self.classes)
        return self.images * self.image.forward_flops(0) + self.text_flops(tokens) + self.fusion_flops(tokens) + head


class PairClassifier(PairEncoder):
    """Parameters: those of `PairEncoder`, and `classifier/{hidden,out}`."""

    config: PairClassifierConfig

    def setup(self) -> None:
        """Declares encoders and head."""
        super().setup()
        self.classifier = TokenClassifier(self.config.classes, True)

    def __call__(self, images: jax.Array, texts: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Scores of the classes, by the fused class token.

        Args:
            images: normalised float [B, H, W, 3], or [B, J, H, W, 3] of several images beside a text.
            texts: int32 [B, T] token ids.
            keys: [B] typed keys, one a row, or None at evaluation.

        Returns:
            Logits [B, classes], fp32.
        """
        image_keys, text_keys, fusion_keys = (None if keys is None else row_keys(keys, place) for place in range(3))
        several = images.ndim == 5
        tokens = self.several_images(images, image_keys) if several else self.image_states(images, image_keys)["tokens"]
        fused = self.fuse(self.text_tokens(texts, text_keys), self.valid(texts), tokens, fusion_keys)
        return self.classifier(fused[:, 0])


@dataclasses.dataclass(frozen=True)
class TextAssignerConfig(PairEncoderConfig):
    """The encoders, whose fusion looks at two images, and what compares images."""

    fusion: TextStackConfig = TextStackConfig(depth=12, cross_every=1, contexts=2)  # the encoder of texts and images
    embed_dim: int = 256  # dimension of the space in which images are compared

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        yield from super().problems()
        if self.fusion.contexts != 2:
            yield "fusion.contexts", f"= {self.fusion.contexts}, but a text is assigned to one of two images; use 2"
        if self.embed_dim < 1:
            yield "embed_dim", f"= {self.embed_dim} must be at least 1"
        if not self.image.pools:
            yield "image.pool", "= 'none' leaves no vector to compare images by; use 'cls', 'mean' or 'map'"


class TextAssigner(PairEncoder):
    """Parameters: those of `PairEncoder`, `image_projection`, and `assignment/out`."""

    config: TextAssignerConfig

    def setup(self) -> None:
        """Declares encoders and heads."""
        super().setup()
        self.image_projection = feature_projection(self.config.embed_dim, self.config.image.pooled_width, self.dtype)
        self.assignment = TokenClassifier(3, False)

    def __call__(self, images: jax.Array, texts: jax.Array) -> jax.Array:
        """As `assign`, of texts beside twice their own image; it is what initialises the parameters."""
        image = self.image_states(images)
        self.image_features(image["pooled"])
        pairs = jnp.stack([image["tokens"]] * 2, axis=1)
        return self.assign(self.fuse(self.text_tokens(texts), self.valid(texts), pairs))

    def image_features(self, pooled_BxD: jax.Array) -> jax.Array:
        """ "pooled" of `image_states` -> features [B, E] fp32 of unit length."""
        return unit_length(self.image_projection(pooled_BxD).astype(jnp.float32))

    def assign(self, fused_BxTxD: jax.Array) -> jax.Array:
        """States of texts and two images -> fp32 [B, 3]: the first image, the second, neither."""
        return self.assignment(fused_BxTxD[:, 0])


class TokenClassifier(nn.Module):
    """Linear, or with `hidden` Linear, ReLU and Linear, with PyTorch's start, as published; fp32.

    Attributes:
        classes: how many.
        hidden: whether there is a hidden layer, as wide as what comes in.
    """

    classes: int
    hidden: bool

    @nn.compact
    def __call__(self, states_BxD: jax.Array) -> jax.Array:
        """[B, D] -> logits fp32 [B, classes]."""
        width = states_BxD.shape[-1]
        init = torch_linear(width)
        if self.hidden:
            x = Linear((width,), ("embed", "mlp"), init, init, dtype=jnp.float32, name="hidden")(states_BxD)
            states_BxD = nn.relu(constrain(x, "batch", "mlp"))
        names = ("mlp" if self.hidden else "embed", None)
        return Linear((self.classes,), names, init, init, dtype=jnp.float32, name="out")(states_BxD)


__all__ = ["PairClassifier", "PairClassifierConfig", "TextAssigner", "TextAssignerConfig"]
