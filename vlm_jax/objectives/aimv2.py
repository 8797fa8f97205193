"""AIMv2: the next patch's pixels and the caption's words, by one decoder over both (Fini et al. 2024)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.text import Tokenizer
from vlm_jax.losses.pixels import masked_square_error, patch_targets
from vlm_jax.losses.tokens import correct_tokens, token_cross_entropy
from vlm_jax.models.aimv2 import Aimv2ModelConfig
from vlm_jax.models.stochastic import fold_in
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.base import normalise_images
from vlm_jax.objectives.image_text import ImageTextConfig
from vlm_jax.objectives.images import ImageObjective
from vlm_jax.objectives.patch_prediction import Autoregression, Plan, plan_pictures
from vlm_jax.schema import ConfigError
from vlm_jax.step import Aux, Batch, Ratio


@dataclasses.dataclass(frozen=True)
class Aimv2Config(ImageTextConfig):
    """Multimodal autoregressive pre-training."""

    model: Aimv2ModelConfig = Aimv2ModelConfig()  # encoder and decoder
    text_weight: float = 1.0  # of the mean cross-entropy of a word
    pixel_weight: float = 0.4  # of the mean squared error of a patch (paper, section 3.1)

    @property
    def image_tower(self) -> ViTConfig:
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

    def problems(self) -> Iterator[tuple[str, str]]:
        """Weights that leave nothing."""
        yield from super().problems()
        for key, value in (("text_weight", self.text_weight), ("pixel_weight", self.pixel_weight)):
            if value < 0:
                yield key, f"= {value} must not be negative"
        if self.text_weight == self.pixel_weight == 0:
            yield "pixel_weight", "= 0 and text_weight = 0 leave no loss; set one of them"

    def forward_flops(self) -> int:
        """See the base."""
        return self.model.forward_flops()

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "Aimv2":
        """See the base."""
        return Aimv2(self, preprocess, dtype)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """The decoder has a start of its own, and what is padding must be the tokenizer's."""
        super().check_tokenizer(tokenizer)
        if tokenizer.config.bos:
            raise ConfigError(
                "config.data.tokenizer.bos must be false: the decoder begins texts with a token of its own"
            )
        pad_id = self.model.decoder.pad_id
        if pad_id != tokenizer.pad_id:
            raise ConfigError(
                f"config.objective.{self.text_key}.pad_id = {pad_id} must be the tokenizer's {tokenizer.pad_id}"
            )


class Aimv2(ImageObjective):
    """See `Aimv2Config`.

    Its two means have different counts, of patches and of words: a row's own sums and counts are its embedding, so
    that one `pair_loss` of the whole batch adds up both exactly.
    """

    coupled = additive = True
    joint_space = False

    def __init__(self, config: Aimv2Config, preprocess: PreprocessConfig, dtype: Dtype):
        super().__init__(config, config.model.build(dtype), preprocess, dtype)
        self.config = config

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Parameters of the module; nothing else is kept."""
        images = jnp.zeros((1, *self.config.image_tower.image_shape, 3))
        texts = jnp.zeros((1, self.config.text_sizes[1]), jnp.int32)
        return self.module.init(key, images, texts)["params"], {}

    def embed(
        self, params: Any, extra: Any, batch: Batch, keys: jax.Array | None, step: jax.Array
    ) -> dict[str, jax.Array]:
        """ "pixels/sum", "pixels/count", "words/sum", "words/count", "words/correct" [B] of each pair.

        Without `keys` (evaluation) the prefix is half of the patches in every row.
        """
        images = normalise_images(batch["image"], self.preprocess)
        plan = Autoregression().plan(fold_in(keys, 0), images.shape[0], self.config.image_tower.grid)
        return self.sums(params, images, batch["text"], plan, fold_in(keys, 1))

    def sums(
        self, params: Any, images: jax.Array, texts: jax.Array, plan: Plan, keys: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """What `embed` returns, of normalised images and with what the plan hides."""
        outputs: Any = self.module.apply({"params": params}, images, texts, keys, attention_mask=plan.attention_mask)
        targets_BxNxP = patch_targets(images, self.config.image_tower.patch_size, True)[:, plan.goals]
        pixels, patches = masked_square_error(outputs["pixels"], targets_BxNxP, plan.predicted)
        valid_BxL = self._is_word(texts)
        nats, words = token_cross_entropy(outputs["logits"], texts, valid_BxL)
        correct = correct_tokens(outputs["logits"], texts, valid_BxL)
        named = {"pixels/sum": pixels, "pixels/count": patches, "words/sum": nats, "words/count": words}
        return named | {"words/correct": correct}

    def pair_loss(self, params: Any, extra: Any, embeddings: Any, step: jax.Array) -> tuple[Ratio, Aux]:
        """Weighted sum of the mean over words and the mean over predicted patches; counted as rows."""
        rows = jnp.asarray(embeddings["words/sum"].shape[0], jnp.float32)
        totals = {name: value.sum() for name, value in embeddings.items()}
        words, patches = totals["words/count"], totals["pixels/count"]
        metrics = {
            "text_loss": (totals["words/sum"], words),
            "pixel_loss": (totals["pixels/sum"], patches),
            "token_accuracy": (totals["words/correct"], words),
        }
        loss = self.config.text_weight * totals["words/sum"] / jnp.maximum(words, 1.0)
        loss += self.config.pixel_weight * totals["pixels/sum"] / jnp.maximum(patches, 1.0)
        return (loss * rows, rows), Aux(metrics)

    def prompt_scores(self, params: Any, images: jax.Array, texts: jax.Array) -> jax.Array:
        """log p(text | image) in nats, fp32 [B, P]: the sum over the text's words.

        One prompt after the other: the decoder's memory is that of B rows, whatever P.
        """
        tokens_BxNxD = self.encode(params, images)["tokens"]
        rows = tokens_BxNxD.shape[0]

        def score(text_L: jax.Array) -> jax.Array:
            texts_BxL = jnp.broadcast_to(text_L, (rows, *text_L.shape))
            logits: Any = self.module.apply({"params": params}, tokens_BxNxD, texts_BxL, method="logits")
            return -token_cross_entropy(logits, texts_BxL, self._is_word(texts_BxL))[0]

        return jax.lax.map(score, texts).T

    def outputs(self, params: Any, batch: Mapping[str, jax.Array], intermediates: bool = True) -> dict[str, jax.Array]:
        """As the base, and `caption_logits` [B, L, V] of the words themselves, with the whole image in view."""
        named = super().outputs(params, batch, intermediates)
        logits: Any = self.module.apply({"params": params}, named["image/tokens"], batch["text"], method="logits")
        return named | {"caption_logits": logits}

    def reconstruct(self, params: Any, images: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
        """See the base; patches don't see the caption, so none is needed."""
        images, tower = normalise_images(images, self.preprocess), self.config.image_tower
        plan = Autoregression().plan(fold_in(keys, 0), images.shape[0], tower.grid)
        texts = jnp.full((images.shape[0], self.config.text_sizes[1]), self.config.model.decoder.pad_id, jnp.int32)
        outputs: Any = self.module.apply({"params": params}, images, texts, attention_mask=plan.attention_mask)
        return plan_pictures(plan, images, outputs["pixels"], tower, True, self.preprocess)

    def _is_word(self, texts: jax.Array) -> jax.Array:
        return texts != self.config.model.decoder.pad_id


__all__ = ["Aimv2", "Aimv2Config"]
