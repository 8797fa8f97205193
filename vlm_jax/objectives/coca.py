"""CoCa: the contrastive loss of two towers and a caption at the same time (Yu et al. 2022)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.text import Tokenizer
from vlm_jax.losses.tokens import token_cross_entropy
from vlm_jax.models.captions import LIKELIEST, Sampling, generate
from vlm_jax.models.coca import CoCaModelConfig
from vlm_jax.objectives.caption import check_caption_tokenizer
from vlm_jax.objectives.clip import Clip, ClipConfig
from vlm_jax.step import Aux, Batch, Ratio


@dataclasses.dataclass(frozen=True)
class CoCaConfig(ClipConfig):
    """Contrastive captioning."""

    model: CoCaModelConfig = CoCaModelConfig()  # towers and decoder
    contrastive_weight: float = 1.0  # of the contrastive loss (paper, eq. 4); 0 leaves it out
    caption_weight: float = 2.0  # of the captioning loss; 0 leaves it, and the decoder's work, out

    def problems(self) -> Iterator[tuple[str, str]]:
        """Weights that leave nothing."""
        yield from super().problems()
        for key, value in (("contrastive_weight", self.contrastive_weight), ("caption_weight", self.caption_weight)):
            if value < 0:
                yield key, f"= {value} must not be negative"
        if self.contrastive_weight == self.caption_weight == 0:
            yield "caption_weight", "= 0 and contrastive_weight = 0 leave no loss; set one of them"

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "CoCa":
        """See the base."""
        return CoCa(self, preprocess, dtype)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """The ids that begin, end and fill a caption must be the tokenizer's."""
        super().check_tokenizer(tokenizer)
        check_caption_tokenizer(
            self.model.captions, tokenizer, f"config.objective.{self.text_key}", "config.objective.model.start"
        )


class CoCa(Clip):
    """See `CoCaConfig`.

    The contrastive loss couples the rows of a batch, the captions' does not: a row's own sum and count of tokens are
    part of its embedding, so that one `pair_loss` of the whole batch adds up both exactly.
    """

    def __init__(self, config: CoCaConfig, preprocess: PreprocessConfig, dtype: Dtype):
        super().__init__(config, preprocess, dtype)
        self.weights, self.captions = (config.contrastive_weight, config.caption_weight), config.model.captions

    def embed(self, params: Any, extra: Any, batch: Batch, keys: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        """As the base, and "caption/sum" and "caption/count" [B]: nats and tokens of a row's caption."""
        contrastive_weight, caption_weight = self.weights
        outputs = self._apply(params, batch, keys)
        # What is not handed on costs nothing: the compiler removes what only it needed.
        kept = ["image/statistics"] + ["image_features", "text_features"] * (contrastive_weight > 0)
        embeddings = {name: outputs[name] for name in kept if name in outputs}
        if caption_weight > 0:
            sums, counts = token_cross_entropy(outputs["caption_logits"], *self.captions.targets(batch["text"]))
            embeddings |= {"caption/sum": sums, "caption/count": counts}
        return embeddings

    def pair_loss(self, params: Any, extra: Any, embeddings: Any, step: jax.Array) -> tuple[Ratio, Aux]:
        """Weighted sum of the mean over rows and the mean over tokens; counted as rows."""
        contrastive_weight, caption_weight = self.weights
        rows = jnp.asarray(embeddings["caption/sum" if caption_weight > 0 else "image_features"].shape[0], jnp.float32)
        total = jnp.zeros(())
        aux = Aux({}, {"statistics": embeddings.get("image/statistics")})
        if contrastive_weight > 0:
            (contrastive, count), aux = super().pair_loss(params, extra, embeddings, step)
            aux.metrics["contrastive_loss"] = (contrastive, count)
            total += contrastive_weight * contrastive / count
        if caption_weight > 0:
            nats, tokens = embeddings["caption/sum"].sum(), embeddings["caption/count"].sum()
            aux.metrics["caption_loss"] = (nats, tokens)
            total += caption_weight * nats / jnp.maximum(tokens, 1.0)
        return (total * rows, rows), aux

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


__all__ = ["CoCa", "CoCaConfig"]
