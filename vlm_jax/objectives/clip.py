"""CLIP: symmetric InfoNCE between an image tower and a text tower (Radford et al. 2021)."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.examples import ClipExamples
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.text import Tokenizer
from vlm_jax.flops import TRAIN_OVER_FORWARD, text_flops, vit_flops
from vlm_jax.losses.contrastive import info_nce
from vlm_jax.models.two_tower import TwoTower, TwoTowerConfig
from vlm_jax.objectives.base import ModelObjective, ObjectiveConfig, normalise_images
from vlm_jax.schema import ConfigError
from vlm_jax.step import Aux, Batch, Ratio


@dataclasses.dataclass(frozen=True)
class ClipConfig(ObjectiveConfig):
    """Contrastive pre-training of two towers."""

    model: TwoTowerConfig = TwoTowerConfig()
    # form of the loss, all equal in value: `gather` one tower; `ring` for few chips or very large batches; `global`
    # plain logits
    loss: Literal["gather", "ring", "global"] = "gather"
    # upper limit of the learned scale on the cosines (paper, section 2.5); the lower one is 1
    max_scale: float = 100.0

    def problems(self) -> Iterator[tuple[str, str]]:
        """Limits that the scale starts beyond."""
        if not 0 <= self.model.logit_scale_init <= math.log(max(self.max_scale, 1.0)):
            yield (
                "model.logit_scale_init",
                f"= {self.model.logit_scale_init:.4g} lies outside of [0, ln max_scale]; ln {self.max_scale:.6g} = "
                f"{math.log(max(self.max_scale, 1.0)):.4g}",
            )
        height, width = self.model.image.image_shape
        if height != width:
            yield "model.image.image_size", f"= {height}x{width} must be square here: the preprocessing makes squares"

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return self.model.image.image_shape[0]

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "Clip":
        """See the base."""
        return Clip(self, preprocess, dtype)

    def make_example(self, tokenizer: Tokenizer, data: DataConfig) -> ClipExamples:
        """Image and one of its captions."""
        return ClipExamples(tokenizer, self.image_size, data.preprocess, data.augment)

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` uint8 [B, H, W, 3], `text` int32 [B, L]."""
        return {
            "image": jax.ShapeDtypeStruct((batch_size, self.image_size, self.image_size, 3), jnp.uint8),
            "text": jax.ShapeDtypeStruct((batch_size, self.model.text.length), jnp.int32),
        }

    def data_problems(self, data: DataConfig) -> Iterator[tuple[str, str]]:
        """The context length stands in two places and must agree."""
        length, tokens = self.model.text.length, data.tokenizer.length
        if length != tokens:
            yield (
                "data.tokenizer.length",
                f"= {tokens} must equal config.objective.model.text.length = {length}; set both",
            )

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """The vocabulary must fit the table, and the pooled token must be the one that ends the text."""
        text, where = self.model.text, "config.objective.model.text"
        if tokenizer.vocab_size > text.vocab_size:
            raise ConfigError(
                f"{where}.vocab_size = {text.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} ids; "
                f"set it to {tokenizer.vocab_size} or more"
            )
        if text.pool == "first_eos" and text.eos_id != tokenizer.eos_id:
            raise ConfigError(f"{where}.eos_id = {text.eos_id} must be the tokenizer's end token {tokenizer.eos_id}")
        if text.pool == "eot_argmax" and tokenizer.eos_id != tokenizer.vocab_size - 1:
            raise ConfigError(
                f"{where}.pool = 'eot_argmax' takes the largest id for the end of the text, but this tokenizer's end "
                f"token is {tokenizer.eos_id} of {tokenizer.vocab_size}; use pool = 'first_eos' with that eos_id"
            )
        if text.mask_padding and text.pad_id != tokenizer.pad_id:
            raise ConfigError(f"{where}.pad_id = {text.pad_id} must be the tokenizer's padding {tokenizer.pad_id}")

    def train_flops(self) -> float:
        """Both towers, three times the forward pass."""
        image, text = self.model.image, self.model.text
        forward = vit_flops(
            width=image.width,
            depth=image.depth,
            mlp_dim=image.mlp_dim,
            image_size=self.image_size,
            patch_size=image.patch_size,
            embed_dim=self.model.embed_dim,
            extra_tokens=image.prefix_tokens,
        ) + text_flops(
            width=text.width, depth=text.depth, mlp_dim=text.mlp_dim, tokens=text.length, embed_dim=self.model.embed_dim
        )
        return float(TRAIN_OVER_FORWARD * forward)


class Clip(ModelObjective):
    """See `ClipConfig`."""

    coupled = True
    module: TwoTower

    def __init__(self, config: ClipConfig, preprocess: PreprocessConfig, dtype: Dtype):
        self.config, self.preprocess = config, preprocess
        self.module = TwoTower(config.model, dtype)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Parameters of both towers and the scale; nothing else is kept."""
        shapes = self.config.batch_shapes(1)
        images, texts = (jnp.zeros(shapes[name].shape, shapes[name].dtype) for name in ("image", "text"))
        return self.module.init(key, normalise_images(images, self.preprocess), texts)["params"], {}

    def embed(self, params: Any, extra: Any, batch: Batch, keys: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        """Features of both towers, [B, E] fp32."""
        images = normalise_images(batch["image"], self.preprocess)
        outputs = self.module.apply({"params": params}, images, batch["text"], keys)
        assert isinstance(outputs, dict)
        return {name: outputs[name] for name in ("image_features", "text_features")}

    def pair_loss(self, params: Any, extra: Any, embeddings: Any, step: jax.Array) -> tuple[Ratio, Aux]:
        """The contrastive loss over the global batch."""
        scale = jnp.exp(params["logit_scale"])
        image, text = embeddings["image_features"], embeddings["text_features"]
        total, count = info_nce(image, text, scale, impl=self.config.loss)
        cosine = jnp.sum(jax.lax.stop_gradient(image * text)), jnp.asarray(image.shape[0], jnp.float32)
        return (total, count), Aux({"logit_scale": (scale, jnp.ones(())), "positive_cosine": cosine})

    def constrain(self, params: Any) -> Any:
        """The scale back into [1, max_scale], after the update: clipped in the loss its gradient would die there."""
        limit = math.log(self.config.max_scale)
        return params | {"logit_scale": jnp.clip(params["logit_scale"], 0.0, limit)}

    def outputs(self, params: Any, batch: Mapping[str, jax.Array], intermediates: bool = True) -> dict[str, jax.Array]:
        """`image_features`, `text_features`, `logit_scale`, and every intermediate as `image/...`, `text/...`."""
        images = normalise_images(batch["image"], self.preprocess)
        outputs = self.module.apply({"params": params}, images, batch["text"], intermediates=intermediates)
        assert isinstance(outputs, dict)
        return outputs

    def image_features(self, params: Any, images: jax.Array) -> jax.Array:
        """See the base."""
        images = normalise_images(images, self.preprocess)
        return self.module.apply({"params": params}, images, method=TwoTower.encode_image)  # pyright: ignore

    def text_features(self, params: Any, texts: jax.Array) -> jax.Array:
        """See the base."""
        return self.module.apply({"params": params}, texts, method=TwoTower.encode_text)  # pyright: ignore
