"""ALBEF's model: an image tower, a text encoder, and a fusion encoder in which words look at patches (Li et al. 2021).

How deep text and fusion encoder are, how wide, and where their initial weights come from are free of each other. The
losses on it are `vlm_jax.objectives.albef`.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.nn.initializers import constant

from vlm_jax.mesh import constrain
from vlm_jax.models.bert import (
    MaskedWordHead,
    MaskedWordHeadConfig,
    TextEncoder,
    TextEncoderConfig,
    TextStack,
    TextStackConfig,
    valid_tokens,
)
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.models.initializers import torch_linear
from vlm_jax.models.linear import Linear
from vlm_jax.models.projection import unit_length
from vlm_jax.models.stochastic import fold_in, row_keys
from vlm_jax.models.vit import ViTConfig

MATCHED = 1  # the place of "they belong together" among the two scores of a pair


def deit_b16(image_size: int = 256) -> ViTConfig:
    """ViT-B/16 as in DeiT (Touvron et al. 2021), whose weights ALBEF starts from."""
    return ViTConfig(
        image_size=image_size,
        patch_size=16,
        activation="gelu",
        norm_eps=1e-6,
        pre_norm=False,
        patch_bias=True,
        pos_resize="bicubic",
        init="vit",
    )


@dataclasses.dataclass(frozen=True)
class PairEncoderConfig:
    """The three encoders; the defaults are the published ones, a ViT-B/16 and the two halves of a BERT-base."""

    image: ImageTowerConfig = dataclasses.field(default_factory=deit_b16)  # the image tower
    text: TextEncoderConfig = TextEncoderConfig(depth=6)  # the text encoder
    fusion: TextStackConfig = TextStackConfig(depth=6, cross_every=1)  # the encoder of pairs

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        if not self.fusion.cross_every or not self.fusion.depth:
            yield "fusion.cross_every", "= 0, or no layer at all, would fuse nothing; use 1, and depth 1 or more"

    def text_flops(self, tokens: int) -> int:
        """Model FLOPs of one text's states."""
        return self.text.stack_flops(tokens)

    def fusion_flops(self, tokens: int) -> int:
        """Model FLOPs of the fused states of one text with its images."""
        text, fusion = self.text, self.fusion
        project = 2 * tokens * text.width * fusion.width if text.width != fusion.width else 0
        return project + fusion.stack_flops(tokens, self.image.token_count, self.image.token_width)


@dataclasses.dataclass(frozen=True)
class AlbefModelConfig(PairEncoderConfig):
    """The encoders, and what compares images with texts, matches pairs and predicts words."""

    words: MaskedWordHeadConfig = MaskedWordHeadConfig()  # what predicts hidden words
    embed_dim: int = 256  # dimension of the space in which images and texts are compared
    # layer of the text encoder, counted from 1, whose class token is compared with images; 0: the last one
    feature_layer: int = 0
    temperature_init: float = 0.07  # start of the learned temperature, which divides cosines

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        yield from super().problems()
        if self.fusion.contexts > 1:
            yield "fusion.contexts", f"= {self.fusion.contexts}, but a pair here has one image; use 1"
        if self.embed_dim < 1:
            yield "embed_dim", f"= {self.embed_dim} must be at least 1"
        if not self.image.pools:
            yield "image.pool", "= 'none' leaves no vector to compare with the text; use 'cls', 'mean' or 'map'"
        if not 0 <= self.feature_layer <= self.text.depth:
            yield "feature_layer", f"= {self.feature_layer} is no layer of a text encoder of {self.text.depth}"


class PairEncoder(nn.Module):
    """Parameters: `image/...`, `text/...`, `fusion/...`; subclasses add heads.

    Attributes:
        config: the encoders.
        dtype: compute dtype; parameters, features and scores of pairs are fp32.
    """

    config: PairEncoderConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares the encoders."""
        self.image = self.config.image.build(None, self.dtype)
        self.text = TextEncoder(self.config.text, self.dtype)
        self.fusion = TextStack(self.config.fusion, self.dtype)

    def image_states(
        self, images: jax.Array, keys: jax.Array | None = None, *, intermediates: bool = False
    ) -> dict[str, jax.Array]:
        """Normalised float [B, H, W, 3] -> the tower's outputs."""
        return self.image(images, keys, intermediates=intermediates)

    def valid(self, texts: jax.Array) -> jax.Array:
        """int32 [B, T] -> bool [B, T], the tokens that are no padding."""
        return valid_tokens(self.config.text, texts)

    def fuse(
        self, text_BxTxD: jax.Array, valid_BxT: jax.Array, image_BxSxC: jax.Array, keys: jax.Array | None = None
    ) -> jax.Array:
        """States of texts and tokens of images -> states of pairs [B, T, D]; `valid` are the tokens of the texts."""
        return self.fusion(text_BxTxD, valid_BxT, image_BxSxC, keys)["tokens"]

    def text_tokens(self, texts: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """int32 [B, T] -> states [B, T, D] of the text encoder."""
        return self.text(texts, keys)["tokens"]

    def several_images(self, images_BxJxHxWx3: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Normalised images [B, J, H, W, 3] of each text -> their tokens [B, J, S, C]."""
        batch, count = images_BxJxHxWx3.shape[:2]
        # The images of a row beside each other, so that they stay on the row's device.
        flat_keys = None if keys is None else jnp.stack([row_keys(keys, place) for place in range(count)], axis=1)
        flat = images_BxJxHxWx3.reshape(batch * count, *images_BxJxHxWx3.shape[2:])
        tokens = self.image(flat, None if flat_keys is None else flat_keys.reshape(-1))["tokens"]
        return constrain(tokens.reshape(batch, count, *tokens.shape[1:]), "batch", None, "length", "embed")


class Albef(PairEncoder):
    """Parameters: `image/...`, `image_projection`, `text/...`, `text_projection`, `fusion/...`, `words/...`,
    `matching_head`, and `temperature` ().

    Attributes:
        config: the encoders.
        dtype: compute dtype; parameters, features and scores of pairs are fp32.
    """

    config: AlbefModelConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares encoders and heads."""
        super().setup()
        config = self.config
        self.words = MaskedWordHead(config.words, config.text, self.dtype)
        self.image_projection = feature_projection(config.embed_dim, config.image.pooled_width, self.dtype)
        self.text_projection = feature_projection(config.embed_dim, config.text.width, self.dtype)
        self.matching_head = _head(2, config.fusion.width, ("embed", None), jnp.float32)
        self.temperature = self.param("temperature", constant(config.temperature_init), (), jnp.float32)

    def __call__(
        self, images: jax.Array, texts: jax.Array, keys: jax.Array | None = None, *, intermediates: bool = False
    ) -> dict[str, jax.Array]:
        """All that the model says of pairs.

        Args:
            images: normalised float [B, H, W, 3].
            texts: int32 [B, T] token ids.
            keys: [B] typed keys, one a pair, or None at evaluation.
            intermediates: whether to return what stands between the layers.

        Returns:
            "image_features" and "text_features" [B, E] fp32 of unit length; "logit_scale" (), the factor on cosines;
            "matching_logits" [B, 2] fp32; "word_logits" [B, T, V]; and the encoders' outputs as "image/tokens",
            "text/tokens", "fusion/tokens", ...
        """
        image = self.encode_image(images, fold_in(keys, 0), intermediates=intermediates)
        text = self.encode_text(texts, fold_in(keys, 1), intermediates=intermediates)
        fused = self.fusion(
            text["tokens"], self.valid(texts), image["tokens"], fold_in(keys, 2), intermediates=intermediates
        )
        outputs = {
            "image_features": image.pop("features"),
            "text_features": text.pop("features"),
            "logit_scale": 1.0 / self.temperature,
            "matching_logits": self.match(fused["tokens"]),
            "word_logits": self.words(fused["tokens"], text.pop("table")),
        }
        named = {"image": image, "text": text, "fusion": fused}
        return outputs | {f"{part}/{name}": x for part, found in named.items() for name, x in found.items()}

    def encode_image(
        self, images: jax.Array, keys: jax.Array | None = None, *, intermediates: bool = False
    ) -> dict[str, jax.Array]:
        """Normalised float [B, H, W, 3] -> the tower's outputs, and "features" [B, E] fp32 of unit length."""
        outputs = self.image_states(images, keys, intermediates=intermediates)
        return outputs | {"features": self.image_features(outputs["pooled"])}

    def image_features(self, pooled_BxD: jax.Array) -> jax.Array:
        """ "pooled" of `image_states` -> features [B, E] fp32 of unit length."""
        return _features(self.image_projection(pooled_BxD))

    def encode_text(
        self, texts: jax.Array, keys: jax.Array | None = None, *, intermediates: bool = False
    ) -> dict[str, jax.Array]:
        """int32 [B, T] -> the encoder's outputs, and "features" [B, E] fp32 of unit length."""
        outputs = self.text_states(texts, keys, intermediates=intermediates)
        return outputs | {"features": self.text_features(outputs.pop("summary"))}

    def text_states(
        self, texts: jax.Array, keys: jax.Array | None = None, *, intermediates: bool = False
    ) -> dict[str, jax.Array]:
        """int32 [B, T] -> the encoder's outputs, and "summary" [B, D], the class token that is compared with images."""
        layer, depth = self.config.feature_layer, self.config.text.depth
        inner = 0 < layer < depth
        outputs = self.text(texts, keys, intermediates=intermediates or inner)
        states = outputs["blocks"][layer - 1] if inner else outputs["tokens"]
        if not intermediates:
            outputs = {name: outputs[name] for name in ("tokens", "table")}
        return outputs | {"summary": states[:, 0]}

    def text_features(self, summary_BxD: jax.Array) -> jax.Array:
        """ "summary" of `text_states` -> features [B, E] fp32 of unit length."""
        return _features(self.text_projection(summary_BxD))

    def match(self, fused_BxTxD: jax.Array) -> jax.Array:
        """States of pairs -> fp32 [B, 2]: the scores of "they don't belong together" and, at `MATCHED`, "they do"."""
        return self.matching_head(fused_BxTxD[:, 0])

    def word_logits(self, fused_BxTxD: jax.Array, table_VxE: jax.Array) -> jax.Array:
        """States of pairs, and "table" of the text encoder's outputs -> logits of the words [B, T, V]."""
        return self.words(fused_BxTxD, table_VxE)

    def image_vectors(self, images: jax.Array, which: str) -> jax.Array:
        """Normalised float [B, H, W, 3] -> fp32 [B, D]: "pooled", before the projection, or "embedding", after it."""
        pooled = self.image(images)["pooled"]
        return (self.image_projection(pooled) if which == "embedding" else pooled).astype(jnp.float32)


def _features(vectors_BxE: jax.Array) -> jax.Array:
    return unit_length(vectors_BxE.astype(jnp.float32))


def feature_projection(embed_dim: int, width: int, dtype: Dtype) -> Linear:
    """What brings vectors of `width` channels into the space in which they are compared."""
    return _head(embed_dim, width, ("embed", "joint"), dtype)


def _head(features: int, width: int, names: tuple[str | None, ...], dtype: Dtype) -> Linear:
    """A linear map with PyTorch's start of kernel and bias, as published."""
    return Linear((features,), names, torch_linear(width), torch_linear(width), dtype=dtype)


__all__ = ["MATCHED", "Albef", "AlbefModelConfig", "PairEncoder", "PairEncoderConfig", "deit_b16", "feature_projection"]
