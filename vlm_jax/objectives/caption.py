"""Captioning: a decoder that sees the image predicts the caption, word after word.

The baseline that the CLIP paper starts from (Radford et al. 2021, section 2.3 and figure 2). Images and texts share no
space; a prompt is scored by its likelihood.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.text import Tokenizer
from vlm_jax.losses.tokens import correct_tokens, token_cross_entropy
from vlm_jax.models.captioner import Captioner, CaptionerModelConfig
from vlm_jax.models.captions import LIKELIEST, CaptionForm, Sampling, generate
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.objectives.image_text import ImageTextConfig, ImageTextObjective
from vlm_jax.schema import ConfigError
from vlm_jax.step import Aux, Batch, Ratio


@dataclasses.dataclass(frozen=True)
class CaptionConfig(ImageTextConfig):
    """Prediction of the caption by a transformer."""

    model: CaptionerModelConfig = CaptionerModelConfig()  # image tower and decoder

    @property
    def image_tower(self) -> ImageTowerConfig:
        """See the base."""
        return self.model.image

    @property
    def text_sizes(self) -> tuple[int, int]:
        """See the base."""
        return self.model.decoder.vocab_size, self.model.decoder.length

    @property
    def text_key(self) -> str:
        """See the base."""
        return "model.decoder"

    def forward_flops(self) -> int:
        """See the base."""
        return self.model.forward_flops()

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "Caption":
        """See the base."""
        return Caption(self, preprocess, dtype)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """The ids that begin, end and fill a caption must be the tokenizer's."""
        super().check_tokenizer(tokenizer)
        where = f"config.objective.{self.text_key}"
        check_caption_tokenizer(self.model.decoder.captions, tokenizer, where, f"{where}.start")


def check_caption_tokenizer(form: CaptionForm, tokenizer: Tokenizer, text_key: str, start_key: str) -> None:
    """Raises `ConfigError` when captions of this tokenizer would begin or end with other ids than the decoder takes."""
    start, config = form.start, tokenizer.config
    if start.by == "tokenizer" and not config.bos:
        raise ConfigError(
            f"{start_key}.by = 'tokenizer', but config.data.tokenizer.bos is false: nothing would stand before the "
            f"first word; set {start_key}.by to 'model' and {start_key}.id to the end token {tokenizer.eos_id}"
        )
    if start.by == "tokenizer" and start.id != tokenizer.bos_id:
        raise ConfigError(f"{start_key}.id = {start.id} must be the tokenizer's start token {tokenizer.bos_id}")
    if start.by == "model" and config.bos:
        raise ConfigError(
            f"{start_key}.by = 'model', but config.data.tokenizer.bos is true: texts would start twice; set one of them"
        )
    if not config.eos or config.pad == "eos":
        raise ConfigError(
            "config.data.tokenizer needs eos = true and pad = 'zero' here: the decoder must see the end of a caption, "
            "and what is padding is not predicted"
        )
    for name, value, wanted in (("eos_id", form.eos_id, tokenizer.eos_id), ("pad_id", form.pad_id, tokenizer.pad_id)):
        if value != wanted:
            raise ConfigError(f"{text_key}.{name} = {value} must be the tokenizer's {wanted}")


class Caption(ImageTextObjective):
    """See `CaptionConfig`."""

    joint_space = False

    def __init__(self, config: CaptionConfig, preprocess: PreprocessConfig, dtype: Dtype):
        super().__init__(config, Captioner(config.model, dtype), preprocess)
        self.captions = config.model.decoder.captions

    def loss(self, params: Any, extra: Any, batch: Batch, keys: jax.Array, step: jax.Array) -> tuple[Ratio, Aux]:
        """Cross-entropy of the next token, its mean over the tokens of the batch."""
        outputs = self._apply(params, batch, keys)
        logits, targets, valid = outputs["caption_logits"], *self.captions.targets(batch["text"])
        sums, counts = token_cross_entropy(logits, targets, valid)
        count = counts.sum()
        metrics = {"token_accuracy": (correct_tokens(logits, targets, valid).sum(), count)}
        return (sums.sum(), count), Aux(metrics, {"statistics": outputs.get("image/statistics")})

    def outputs(self, params: Any, batch: Mapping[str, jax.Array], intermediates: bool = True) -> dict[str, jax.Array]:
        """`caption_logits`, `caption_loss` [B] (the sum over a caption), and every intermediate as `image/...`."""
        outputs = self._apply(params, batch, None, intermediates=intermediates)
        sums, _ = token_cross_entropy(outputs["caption_logits"], *self.captions.targets(batch["text"]))
        return outputs | {"caption_loss": sums}

    def image_vectors(self, params: Any, images: jax.Array, which: str) -> jax.Array:
        """See the base; there is nothing beyond "pooled"."""
        return self._apply_images(params, images, "image_vectors", which)

    def prompt_scores(self, params: Any, images: jax.Array, texts: jax.Array) -> jax.Array:
        """log p(text | image) in nats, fp32 [B, P]: the sum over the text's tokens, its end included.

        One prompt after the other: the decoder's memory is that of B rows, whatever P.
        """
        tokens_BxSxD = self._apply_images(params, images, "image_tokens")
        rows = tokens_BxSxD.shape[0]

        def score(text_L: jax.Array) -> jax.Array:
            texts_BxL = jnp.broadcast_to(text_L, (rows, *text_L.shape))
            logits: Any = self.module.apply({"params": params}, tokens_BxSxD, texts_BxL, method="caption_logits")
            return -token_cross_entropy(logits, *self.captions.targets(texts_BxL))[0]

        return jax.lax.map(score, texts).T

    def generate(
        self, params: Any, images: jax.Array, sampling: Sampling = LIKELIEST, keys: jax.Array | None = None
    ) -> jax.Array:
        """uint8 or normalised float [B, H, W, 3] -> captions, int32 [B, L] as the tokenizer makes them.

        Args:
            params: of the model.
            images: the images.
            sampling: how tokens are chosen.
            keys: [B] typed keys, one a row; None takes the likeliest token each time.
        """
        tokens = self._apply_images(params, images, "image_tokens")
        return generate(self.module, params, tokens, self.captions, sampling, keys)


__all__ = ["Caption", "CaptionConfig", "check_caption_tokenizer"]
