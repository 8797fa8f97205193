"""Text assignment: which of two images a text belongs to, or that it is neither (Li et al. 2021, section 5, NLVR2).

The step between ALBEF's pre-training and its fine-tuning on pairs of images: it needs captioned images alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.flops import TRAIN_OVER_FORWARD
from vlm_jax.losses.momentum_contrast import hard_negatives, take_rows
from vlm_jax.losses.tokens import correct_tokens, token_cross_entropy
from vlm_jax.mesh import constrain
from vlm_jax.models.pair_classifier import TextAssigner, TextAssignerConfig
from vlm_jax.models.stochastic import row_keys
from vlm_jax.objectives.base import normalise_images
from vlm_jax.objectives.pairs import PairConfig, PairObjective
from vlm_jax.step import Aux, Batch, Ratio

FIRST, SECOND, NEITHER = range(3)  # classes


@dataclasses.dataclass(frozen=True)
class TextAssignmentConfig(PairConfig):
    """Three classes, each as likely as every other; nothing is distilled."""

    model: TextAssignerConfig = TextAssignerConfig()  # encoders and classifier
    distillation: float = 0.0
    # of the cosines of images by which wrong images are drawn; published: fixed
    temperature: float = 0.07

    def problems(self) -> Any:
        """Numbers out of range."""
        yield from super().problems()
        if self.distillation:
            yield "distillation", f"= {self.distillation}, but this method has no averaged model; use 0"
        if self.temperature <= 0:
            yield "temperature", f"= {self.temperature} must be positive"

    def train_flops(self) -> float:
        """Three times the forward pass; the projection and its cosines are constants to the gradient."""
        model = self.model
        trained = model.image.forward_flops(0) + model.text_flops(self.text_length)
        trained += model.fusion_flops(self.text_length) + 2 * model.fusion.width * 3
        return float(TRAIN_OVER_FORWARD * trained + 2 * model.image.pooled_width * model.embed_dim)

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "TextAssignment":
        """See the base."""
        return TextAssignment(self, preprocess, dtype)


class TextAssignment(PairObjective):
    """See `TextAssignmentConfig`. A batch may hold "assigned" int32 [B], the classes that are drawn else.

    Wrong images are drawn from the whole batch, by how near their features are; a row that finds none does not count.
    """

    coupled = True
    without_gradient = ("image_projection/.*",)

    config: TextAssignmentConfig

    def __init__(self, config: TextAssignmentConfig, preprocess: PreprocessConfig, dtype: Dtype):
        super().__init__(config, TextAssigner(config.model, dtype), preprocess, ())

    def embed(self, params: Any, extra: Any, batch: Batch, keys: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        """Tokens and features of images, states of texts, and keys, each [B, ...]."""
        images, texts = normalise_images(batch["image"], self.preprocess), batch["text"]
        image = self._call(params, "image_states", images, row_keys(keys, 0))
        label_B = jax.vmap(lambda key: jax.random.randint(key, (), 0, 3))(row_keys(keys, 2))
        return {
            "image_tokens": image["tokens"],
            "features": jax.lax.stop_gradient(self._call(params, "image_features", image["pooled"])),
            "text_tokens": self._call(params, "text_tokens", texts, row_keys(keys, 1)),
            "valid": self._call(params, "valid", texts),
            "assigned": batch.get("assigned", label_B),
            "keys": row_keys(keys, 3),
        }

    def pair_loss(self, params: Any, extra: Any, embeddings: Any, step: jax.Array) -> tuple[Ratio, Aux]:
        """Cross-entropy over the rows that have wrong images."""
        label_B, tokens, keys = embeddings["assigned"], embeddings["image_tokens"], embeddings["keys"]
        index_Bx2, found_B = assigned_images(embeddings["features"], label_B, keys, self.config.temperature)
        pairs = jnp.stack([take_rows(tokens, index_Bx2[:, place], 1) for place in range(2)], axis=1)
        pairs = constrain(pairs, "batch", None, "length", "embed")
        fused = self._call(params, "fuse", embeddings["text_tokens"], embeddings["valid"], pairs, row_keys(keys, 2))
        logits_Bx1x3 = self._call(params, "assign", fused)[:, None]
        sums_B, counts_B = token_cross_entropy(logits_Bx1x3, label_B[:, None], found_B[:, None])
        hits = correct_tokens(logits_Bx1x3, label_B[:, None], found_B[:, None]).sum()
        total, count = sums_B.sum(), counts_B.sum()
        return (total, count), Aux({"top1": (hits, count)}, {"statistics": None})


def assigned_images(
    features_BxE: jax.Array, label_B: jax.Array, keys: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Which rows' images stand before each text.

    Args:
        features_BxE: of unit length.
        label_B: int32, where a text's own image stands: `FIRST`, `SECOND` or `NEITHER`.
        keys: [B] typed keys.
        temperature: divides the cosines by which wrong images are drawn, without putting one back.

    Returns:
        (int32 [B, 2], rows of the first and the second image; bool [B], whether there are as many others as needed).
    """
    rows = len(features_BxE)
    logits_BxB = jnp.einsum("BE,NE->BN", features_BxE, features_BxE) / temperature
    others_BxB = ~jnp.eye(rows, dtype=bool)
    one_B, found_one_B = hard_negatives(logits_BxB, others_BxB, row_keys(keys, 0))
    left_BxB = others_BxB & (jnp.arange(rows)[None] != one_B[:, None])
    two_B, found_two_B = hard_negatives(logits_BxB, left_BxB, row_keys(keys, 1))
    own_B = jnp.arange(rows, dtype=jnp.int32)
    first_B = jnp.where(label_B == FIRST, own_B, one_B)
    second_B = jnp.where(label_B == FIRST, one_B, jnp.where(label_B == SECOND, own_B, two_B))
    return jnp.stack([first_B, second_B], axis=1), jnp.where(label_B == NEITHER, found_two_B, found_one_B)


__all__ = ["FIRST", "NEITHER", "SECOND", "TextAssignment", "TextAssignmentConfig", "assigned_images"]
