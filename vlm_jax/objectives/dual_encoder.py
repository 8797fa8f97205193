"""What the methods on two towers share: their features, what the towers ask of a tokenizer, the learned scale.

The losses on the features differ by method: `clip` and `siglip` are files of their own.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.text import Tokenizer
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.models.text import TextConfig
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.objectives.image_text import ImageTextConfig, ImageTextObjective
from vlm_jax.schema import ConfigError
from vlm_jax.step import Aux, Batch, Ratio


@dataclasses.dataclass(frozen=True)
class DualEncoderConfig(ImageTextConfig):
    """Family of the methods that compare an image tower's features with a text tower's."""

    model: TwoTowerConfig = TwoTowerConfig()  # the towers
    # last steps of the run in which the image tower sees every patch, after training with model.image.patch_dropout
    # (FLIP, Li et al. 2023, section 3: unmasked tuning)
    unmasked_steps: int = 0

    def problems(self) -> Iterator[tuple[str, str]]:
        """A phase that changes nothing."""
        yield from super().problems()
        if self.unmasked_steps < 0:
            yield "unmasked_steps", f"= {self.unmasked_steps} must not be negative"
        if self.unmasked_steps and self.image_tower.without_dropped_patches() == self.image_tower:
            yield (
                "unmasked_steps",
                f"= {self.unmasked_steps} changes nothing: the image tower drops no patches; set "
                "model.image.patch_dropout, or unmasked_steps = 0",
            )

    @property
    def image_tower(self) -> ImageTowerConfig:
        """See the base."""
        return self.model.image

    @property
    def text_sizes(self) -> tuple[int, int]:
        """See the base."""
        return self.model.text.vocab_size, self.model.text.length

    def forward_flops(self) -> int:
        """Both towers."""
        return self.model.forward_flops()

    def phases(self, total_steps: int) -> "tuple[tuple[int, DualEncoderConfig], ...]":
        """With patches dropped, then without."""
        if not self.unmasked_steps:
            return ((0, self),)
        model = dataclasses.replace(self.model, image=self.model.image.without_dropped_patches())
        tuning = dataclasses.replace(self, model=model, unmasked_steps=0)
        start = total_steps - self.unmasked_steps
        return ((0, self), (start, tuning)) if start > 0 else ((0, tuning),)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """The vocabulary must fit the table, and the pooled token must be the one that ends the text."""
        super().check_tokenizer(tokenizer)
        check_text_tower(self.model.text, tokenizer, f"config.objective.{self.text_key}")


def check_text_tower(text: TextConfig, tokenizer: Tokenizer, where: str) -> None:
    """Raises `ConfigError` when the tower at the key `where` would pool or mask the wrong tokens."""
    if text.pool == "first_eos" and text.eos_id != tokenizer.eos_id:
        raise ConfigError(f"{where}.eos_id = {text.eos_id} must be the tokenizer's end token {tokenizer.eos_id}")
    if text.pool == "eot_argmax" and tokenizer.eos_id != tokenizer.vocab_size - 1:
        raise ConfigError(
            f"{where}.pool = 'eot_argmax' takes the largest id for the end of the text, but this tokenizer's end "
            f"token is {tokenizer.eos_id} of {tokenizer.vocab_size}; use pool = 'first_eos' with that eos_id"
        )
    if text.mask_padding and text.pad_id != tokenizer.pad_id:
        raise ConfigError(f"{where}.pad_id = {text.pad_id} must be the tokenizer's padding {tokenizer.pad_id}")


class DualEncoder(ImageTextObjective):
    """Features of two towers; a subclass adds the loss on them."""

    coupled = True

    def __init__(self, config: DualEncoderConfig, preprocess: PreprocessConfig, dtype: Dtype):
        super().__init__(config, config.model.build(dtype), preprocess)
        self.model = config.model

    def embed(self, params: Any, extra: Any, batch: Batch, keys: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        """Features of both towers, [B, E] fp32, and the image tower's statistics if it has any."""
        outputs = self._apply(params, batch, keys)
        kept = ("image_features", "text_features", "image/statistics")
        return {name: outputs[name] for name in kept if name in outputs}

    def pair_loss(self, params: Any, extra: Any, embeddings: Any, step: jax.Array) -> tuple[Ratio, Aux]:
        """The subclass's loss over the global batch."""
        image, text = embeddings["image_features"], embeddings["text_features"]
        total, count = self.feature_loss(params, image, text)
        one, rows = jnp.ones(()), jnp.asarray(image.shape[0], jnp.float32)
        metrics = {
            "positive_cosine": (jnp.sum(jax.lax.stop_gradient(image * text)), rows),
            "logit_scale": (jnp.exp(params["logit_scale"]), one),
        }
        if "logit_bias" in params:
            metrics["logit_bias"] = (params["logit_bias"], one)
        return (total, count), Aux(metrics, {"statistics": embeddings.get("image/statistics")})

    def feature_loss(self, params: Any, image_BxE: jax.Array, text_BxE: jax.Array) -> Ratio:
        """(sum, count) of the loss on L2-normalised fp32 features of the global batch."""
        raise TypeError(f"{type(self).__name__} defines no feature_loss")

    def outputs(self, params: Any, batch: Mapping[str, jax.Array], intermediates: bool = True) -> dict[str, jax.Array]:
        """`image_features`, `text_features`, `logit_scale`, and every intermediate as `image/...`, `text/...`."""
        return self._apply(params, batch, None, intermediates=intermediates)

    def image_features(self, params: Any, images: jax.Array) -> jax.Array:
        """See the base."""
        return self._apply_images(params, images, "encode_image")

    def text_features(self, params: Any, texts: jax.Array) -> jax.Array:
        """See the base."""
        return self.module.apply({"params": params}, texts, method="encode_text")  # pyright: ignore

    def image_vectors(self, params: Any, images: jax.Array, which: str) -> jax.Array:
        """See the base."""
        return self._apply_images(params, images, "image_vectors", which)


def scale_problems(log_scale: float, max_scale: float) -> Iterator[tuple[str, str]]:
    """A learned scale that starts beyond the limits into which `clipped_scale` brings it back."""
    most = math.log(max(max_scale, 1.0))
    if not 0 <= log_scale <= most:
        yield (
            "model.logit_scale_init",
            f"= {log_scale:.4g} lies outside of [0, ln max_scale]; ln {max_scale:.6g} = {most:.4g}",
        )


def clipped_scale(params: Any, max_scale: float) -> Any:
    """The parameters with the scale back in [1, max_scale]: clipped inside the loss its gradient would die there."""
    return params | {"logit_scale": jnp.clip(params["logit_scale"], 0.0, math.log(max_scale))}


__all__ = ["DualEncoder", "DualEncoderConfig", "check_text_tower", "clipped_scale", "scale_problems"]
