"""Classes of texts that are read beside images: visual entailment (SNLI-VE) and pairs of images (NLVR2).

ALBEF's fine-tuning (Li et al. 2021, section 5): cross-entropy of a classifier on the fused class token with targets of
which an averaged model says a share. How many images stand beside a text is `model.fusion.contexts`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.examples import LabelledPairs, MakeExample
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import Source
from vlm_jax.data.text import Tokenizer
from vlm_jax.flops import TRAIN_OVER_FORWARD
from vlm_jax.models.pair_classifier import PairClassifier, PairClassifierConfig
from vlm_jax.models.stochastic import row_keys
from vlm_jax.objectives.base import normalise_images
from vlm_jax.objectives.classify import check_classes
from vlm_jax.objectives.pairs import PairConfig, PairObjective
from vlm_jax.step import Aux, Batch, Ratio

_PARTS = ("image", "text", "fusion", "classifier")


@dataclasses.dataclass(frozen=True)
class PairClassifyConfig(PairConfig):
    """Cross-entropy with the label of a text and its images, distilled."""

    model: PairClassifierConfig = PairClassifierConfig()  # encoders and classifier

    def check_source(self, source: Source) -> None:
        """The source must name as many classes as the head has."""
        check_classes(self.model.classes, source, "config.data.source")

    def make_example(self, tokenizer: Tokenizer | None, data: DataConfig) -> MakeExample:
        """Image or images, text and label."""
        assert tokenizer is not None, "a method that reads text has a tokenizer"
        return LabelledPairs(tokenizer, self.image_size, self.model.images, data.preprocess, data.augment)

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` uint8 [B, H, W, 3], or of several [B, J, H, W, 3]; `text` int32 [B, L]; `label` int32 [B]."""
        shapes, count = super().batch_shapes(batch_size), self.model.images
        if count > 1:
            batch, *image = shapes["image"].shape
            shapes["image"] = jax.ShapeDtypeStruct((batch, count, *image), jnp.uint8)
        return shapes | {"label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

    def train_flops(self) -> float:
        """Three times the model's forward pass, and once the averaged model's."""
        forward = self.model.forward_flops(self.text_length)
        return float((TRAIN_OVER_FORWARD + (self.distillation > 0)) * forward)

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "PairClassify":
        """See the base."""
        return PairClassify(self, preprocess, dtype)


class PairClassify(PairObjective):
    """See `PairClassifyConfig`."""

    config: PairClassifyConfig

    def __init__(self, config: PairClassifyConfig, preprocess: PreprocessConfig, dtype: Dtype):
        parts = _PARTS if config.distillation else ()
        super().__init__(config, PairClassifier(config.model, dtype), preprocess, parts)
        self.class_count = config.model.classes

    def loss(self, params: Any, extra: Any, batch: Batch, keys: jax.Array, step: jax.Array) -> tuple[Ratio, Aux]:
        """Cross-entropy with the label and, by its share, with what the averaged model says; `top1` counts hits."""
        images, texts, labels = normalise_images(batch["image"], self.preprocess), batch["text"], batch["label"]
        logits_BxC = self._logits(params, images, texts, row_keys(keys, 0))
        log_p_BxC = jax.nn.log_softmax(logits_BxC)
        targets_BxC, share = jax.nn.one_hot(labels, self.class_count), self._share(step)
        if "averaged" in extra:
            # It is in training too: its dropout is on, as published.
            taught_BxC = jax.nn.softmax(self._logits(extra["averaged"], images, texts, row_keys(keys, 1)))
            targets_BxC = (1 - share) * targets_BxC + share * jax.lax.stop_gradient(taught_BxC)
        losses_B = -(targets_BxC * log_p_BxC).sum(axis=-1)
        count = jnp.asarray(len(losses_B), jnp.float32)
        hits = (logits_BxC.argmax(axis=-1) == labels).sum(dtype=jnp.float32)
        metrics = {"top1": (hits, count), "distillation": (share * count, count)}
        return (losses_B.sum(), count), Aux(metrics, {"statistics": None})

    def _logits(self, params: Any, images: jax.Array, texts: jax.Array, keys: jax.Array | None) -> jax.Array:
        logits: Any = self.module.apply({"params": params}, images, texts, keys)
        return logits

    def outputs(self, params: Any, batch: Mapping[str, jax.Array], intermediates: bool = True) -> dict[str, jax.Array]:
        """ "logits" fp32 [B, C]."""
        return {"logits": self.pair_class_scores(params, batch)}

    def pair_class_scores(self, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """See the base."""
        return self._logits(params, normalise_images(batch["image"], self.preprocess), batch["text"], None)


__all__ = ["PairClassify", "PairClassifyConfig"]
