"""Bag of words: the image tower's vector predicts which words the caption has, in any order.

The CLIP paper's second method (Radford et al. 2021, section 2.3 and figure 2), after Joulin et al. 2016. Its third, the
contrastive loss with a bag of words for a text, is `clip` with a text tower of depth 0 that pools by the mean.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.text import Tokenizer
from vlm_jax.losses.tokens import word_set_cross_entropy, word_set_sigmoid, word_sets
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.models.word_predictor import WordPredictor, WordPredictorConfig
from vlm_jax.objectives.image_text import ImageTextConfig, ImageTextObjective
from vlm_jax.schema import ConfigError
from vlm_jax.step import Aux, Batch, Ratio


@dataclasses.dataclass(frozen=True)
class BagOfWordsConfig(ImageTextConfig):
    """Prediction of the caption's set of words."""

    model: WordPredictorConfig = WordPredictorConfig()  # image tower and words
    # "softmax" against the uniform distribution over the words (Joulin et al. found it better), or a "sigmoid" for each
    loss: Literal["softmax", "sigmoid"] = "softmax"
    # ids that are no words: padding, start, end
    special_ids: tuple[int, ...] = (0, 49406, 49407)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Ids out of range."""
        yield from super().problems()
        for value in self.special_ids:
            if not 0 <= value < self.model.vocab_size:
                yield "special_ids", f"holds {value}, which is no id of a vocabulary of {self.model.vocab_size}"

    @property
    def image_tower(self) -> ImageTowerConfig:
        """See the base."""
        return self.model.image

    @property
    def text_sizes(self) -> tuple[int, int]:
        """See the base."""
        return self.model.vocab_size, self.model.length

    @property
    def text_key(self) -> str:
        """See the base."""
        return "model"

    def forward_flops(self) -> int:
        """See the base."""
        return self.model.forward_flops()

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "BagOfWords":
        """See the base."""
        return BagOfWords(self, preprocess, dtype)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """The ids that are no words must be the tokenizer's."""
        super().check_tokenizer(tokenizer)
        used = {tokenizer.pad_id}
        used |= {tokenizer.bos_id} if tokenizer.config.bos else set()
        used |= {tokenizer.eos_id} if tokenizer.config.eos else set()
        if used - set(self.special_ids):
            raise ConfigError(
                f"config.objective.special_ids = {self.special_ids} must hold what this tokenizer puts into every row: "
                f"{', '.join(map(str, sorted(used)))}"
            )


class BagOfWords(ImageTextObjective):
    """See `BagOfWordsConfig`."""

    joint_space = False

    def __init__(self, config: BagOfWordsConfig, preprocess: PreprocessConfig, dtype: Dtype):
        super().__init__(config, WordPredictor(config.model, dtype), preprocess)
        self.config = config

    def loss(self, params: Any, extra: Any, batch: Batch, keys: jax.Array, step: jax.Array) -> tuple[Ratio, Aux]:
        """The mean over the rows of the loss of a row's words."""
        outputs = self._apply(params, batch, keys)
        words = self._words(batch["text"])
        form = {"softmax": word_set_cross_entropy, "sigmoid": word_set_sigmoid}[self.config.loss]
        losses = form(outputs["word_logits"], words)
        rows = jnp.asarray(losses.shape[0], jnp.float32)
        found = jnp.take_along_axis(words, jnp.argmax(outputs["word_logits"], axis=1)[:, None], axis=1)
        metrics = {"best_word_accuracy": (found.sum(), rows)}
        return (losses.sum(), rows), Aux(metrics, {"statistics": outputs.get("image/statistics")})

    def _words(self, ids_BxL: jax.Array) -> jax.Array:
        return word_sets(ids_BxL, self.config.model.vocab_size, self.config.special_ids)

    def outputs(self, params: Any, batch: Mapping[str, jax.Array], intermediates: bool = True) -> dict[str, jax.Array]:
        """`word_logits` [B, V] and every intermediate as `image/...`."""
        return self._apply(params, batch, None, intermediates=intermediates)

    def image_vectors(self, params: Any, images: jax.Array, which: str) -> jax.Array:
        """See the base; there is nothing beyond "pooled"."""
        return self._apply_images(params, images, "image_vectors", which)

    def prompt_scores(self, params: Any, images: jax.Array, texts: jax.Array) -> jax.Array:
        """The sum of log p(word) over a prompt's set of words, in nats, fp32 [B, P]."""
        logits = self._apply_images(params, images, "word_logits")
        forms = {"softmax": jax.nn.log_softmax, "sigmoid": jax.nn.log_sigmoid}
        log_p_BxV = forms[self.config.loss](logits)
        return jnp.einsum("BV,PV->BP", log_p_BxV, self._words(texts), precision=jax.lax.Precision.HIGHEST)


__all__ = ["BagOfWords", "BagOfWordsConfig"]
