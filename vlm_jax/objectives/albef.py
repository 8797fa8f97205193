"""ALBEF: align images and texts by contrast with a queue, then fuse them (Li et al. 2021).

Three losses in the order of the published step: contrast of features with soft targets of an averaged model (ITC),
matching of pairs against hard negatives (ITM), and hidden words told from their image with distillation (MLM).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.examples import MakeExample, PairExamples
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.text import Tokenizer
from vlm_jax.flops import TRAIN_OVER_FORWARD
from vlm_jax.losses.masked_words import WordMaskConfig, distillation_loss, hidden_words_of
from vlm_jax.losses.momentum_contrast import (
    Scope,
    enqueue,
    group_count,
    queue_contrast,
    same_group,
    same_identity,
)
from vlm_jax.losses.tokens import correct_tokens, token_cross_entropy
from vlm_jax.models.albef import Albef, AlbefModelConfig
from vlm_jax.models.projection import unit_length
from vlm_jax.models.stochastic import row_keys
from vlm_jax.objectives.base import normalise_images
from vlm_jax.objectives.matching import matching_loss
from vlm_jax.objectives.mlm import check_word_tokenizer
from vlm_jax.objectives.pair_scores import MatchingObjective
from vlm_jax.objectives.pairs import PairConfig
from vlm_jax.step import Aux, Batch, Ratio

# What the averaged model has of its own, by tower.
_IMAGE_PARTS, _TEXT_PARTS = ("image", "image_projection"), ("text", "text_projection", "fusion", "words")


@dataclasses.dataclass(frozen=True)
class AlbefConfig(PairConfig):
    """Align before fuse."""

    model: AlbefModelConfig = AlbefModelConfig()  # the encoders
    hidden_words: WordMaskConfig = WordMaskConfig(spared_ids=(0, 101))  # which words are to be told from the image
    itc_weight: float = 1.0  # of the contrastive loss; 0 leaves it out, and negatives are then drawn evenly
    itm_weight: float = 1.0  # of the loss on matching; 0 leaves it, and its fusion encoder's work, out
    mlm_weight: float = 1.0  # of the loss on hidden words; 0 leaves it, and its encoders' work, out
    momentum_image: bool = True  # whether the image tower has an averaged copy; else features are the tower's own
    momentum_text: bool = True  # the same for text and fusion encoder; without one MLM has no distillation
    queue: int = 65536  # averaged features of earlier rows that are negatives too; 0: those of the batch alone
    temperature_limits: tuple[float, float] = (0.001, 0.5)  # of the learned temperature
    # whose rows are negatives of each other: those of the global batch, of groups, or of a device (as published, where
    # a device held 64)
    negatives_scope: Scope = "global"
    negatives_group: int = 0  # neighbouring rows of a group
    # which pairs are no negatives: a row's own; of the same image as well; of the same image or the same caption
    positives: Literal["row", "image", "image_or_caption"] = "row"
    matching_chunks: int = 1  # parts of the batch whose pairs go through the fusion encoder one after the other

    def problems(self) -> Iterator[tuple[str, str]]:
        """Numbers out of range, and what nothing would read."""
        yield from super().problems()
        weights = (self.itc_weight, self.itm_weight, self.mlm_weight)
        for key in ("itc_weight", "itm_weight", "mlm_weight"):
            if getattr(self, key) < 0:
                yield key, f"= {getattr(self, key)} must not be negative; 0 leaves the loss out"
        if not any(weights):
            yield "itc_weight", "= 0, itm_weight = 0 and mlm_weight = 0 leave no loss; set one of them"
        if self.queue < 0:
            yield "queue", f"= {self.queue} must not be negative"
        if self.matching_chunks < 1:
            yield "matching_chunks", f"= {self.matching_chunks} must be at least 1"
        low, high = self.temperature_limits
        if not 0 < low <= self.model.temperature_init <= high:
            yield "temperature_limits", f"= {(low, high)} must hold model.temperature_init and be positive"
        if (self.negatives_scope == "group") != (self.negatives_group > 0):
            yield "negatives_group", f"= {self.negatives_group}: give it if and only if negatives_scope = 'group'"

    def data_problems(self, data: DataConfig) -> Iterator[tuple[str, str]]:
        """Lengths and groups that must agree with the batches."""
        yield from super().data_problems(data)
        for key in ("negatives_group", "matching_chunks"):
            value = getattr(self, key)
            if value and data.batch_size % value:
                yield f"objective.{key}", f"= {value} does not divide data.batch_size = {data.batch_size}"

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """The ids of padding, class and mask token must be the tokenizer's."""
        super().check_tokenizer(tokenizer)
        check_word_tokenizer(self.model.text, self.hidden_words, tokenizer)

    def make_example(self, tokenizer: Tokenizer | None, data: DataConfig) -> MakeExample:
        """Image and one of its captions, with their ids where something asks for them."""
        if self.positives == "row":
            return super().make_example(tokenizer, data)
        assert tokenizer is not None, "a method that reads text has a tokenizer"
        return PairExamples(tokenizer, self.image_size, data.preprocess, data.augment)

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """As the base, and `identity` int32 [B, 2] of image and caption where something asks for it."""
        shapes = super().batch_shapes(batch_size)
        if self.positives != "row":
            shapes["identity"] = jax.ShapeDtypeStruct((batch_size, 2), jnp.int32)
        return shapes

    def forward_flops(self) -> tuple[int, int]:
        """Model FLOPs of one pair's forward pass through (the model, the averaged model), without the queue."""
        model, tokens = self.model, self.text_length
        image, text, fusion = model.image.forward_flops(0), model.text.stack_flops(tokens), model.fusion_flops(tokens)
        image_feature, text_feature = (2 * model.embed_dim * x for x in (model.image.pooled_width, model.text.width))
        words = text + fusion + model.words.head_flops(model.text, model.fusion.width, tokens)
        online, averaged = image, 0
        if self.itc_weight or self.itm_weight:
            online += text
        if self.itc_weight:
            online += image_feature + text_feature
            averaged += image_feature + text_feature + text * self.momentum_text
        if self.itm_weight:
            online += 3 * (fusion + 2 * model.fusion.width * 2)
        if self.mlm_weight:
            online += words
        averaged += words * self.distils_words
        averaged += image * (self.momentum_image and (self.itc_weight > 0 or self.distils_words))
        return online, averaged

    def queue_flops(self) -> int:
        """Model FLOPs of one pair's features against one tower's queue."""
        return 2 * self.queue * self.model.embed_dim if self.itc_weight else 0

    @property
    def distils_words(self) -> bool:
        """Whether the averaged model says which words are hidden."""
        return bool(self.mlm_weight and self.momentum_text and self.distillation)

    def train_flops(self) -> float:
        """Three times the model's forward pass, once the averaged model's; the queues are constants to the gradient."""
        online, averaged = self.forward_flops()
        products = 2 * 2 + 2 * (self.distillation > 0)
        return float(TRAIN_OVER_FORWARD * online + averaged + products * self.queue_flops())

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "AlbefObjective":
        """See the base."""
        return AlbefObjective(self, preprocess, dtype)


class AlbefObjective(MatchingObjective):
    """See `AlbefConfig`.

    `extra` holds "averaged", the averaged model's parameters, and "queue": "image" and "text" [Q, E], "identity"
    [Q, 2] (-1: of no row) and "pointer" (). Only what is a function of each row alone is in `embed`: the losses that
    couple rows, and the fusion of a row with the negatives of others, see the global batch whatever its microbatches.
    A batch may hold what is random else: "masked_text" and "chosen" (of `hide_words`), and int32 [B] "negative_image"
    of each text and "negative_text" of each image, rows of the batch.
    """

    coupled = True

    config: AlbefConfig

    def __init__(self, config: AlbefConfig, preprocess: PreprocessConfig, dtype: Dtype):
        needed = config.itc_weight > 0 or config.distils_words
        parts = _IMAGE_PARTS * (config.momentum_image and needed) + _TEXT_PARTS * (config.momentum_text and needed)
        super().__init__(config, Albef(config.model, dtype), preprocess, parts)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Parameters; an averaged model that starts as they do, and queues of random directions, as published."""
        params, extra = super().init(key)
        if self.config.queue and self.config.itc_weight:
            shape = (self.config.queue, self.config.model.embed_dim)
            image, text = (unit_length(jax.random.normal(jax.random.fold_in(key, i), shape)) for i in range(2))
            identity = jnp.full((self.config.queue, 2), -1, jnp.int32)
            extra["queue"] = {"image": image, "text": text, "identity": identity, "pointer": jnp.zeros((), jnp.int32)}
        return params, extra

    def embed(self, params: Any, extra: Any, batch: Batch, keys: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        """What each pair is by itself.

        Returns:
            For ITC the features of both towers and of the averaged model, [B, E]; for ITM the states of texts, the
            tokens of images, `valid` and `keys`; for MLM sums [B] over a row's hidden words. "rows" [B] of ones.
        """
        config, texts = self.config, batch["text"]
        images = normalise_images(batch["image"], self.preprocess)
        averaged, _ = self._averaged(params, extra)
        masked, chosen = hidden_words_of(config.hidden_words, config.model.text.vocab_size, batch, row_keys(keys, 5))
        image = self._call(params, "image_states", images, row_keys(keys, 0))
        slow_image = jax.lax.stop_gradient(image)
        if config.momentum_image and "averaged" in extra:
            slow_image = self._call(averaged, "image_states", images, row_keys(keys, 1))
        plain = {"plain": texts} if config.itc_weight or config.itm_weight else {}
        hidden = {"hidden": masked} if config.mlm_weight else {}
        states = self._states(params, plain | hidden, row_keys(keys, 2))
        slow_states = jax.lax.stop_gradient(states)
        if config.momentum_text and "averaged" in extra:
            slow = (plain if config.itc_weight else {}) | (hidden if config.distils_words else {})
            slow_states = self._states(averaged, slow, row_keys(keys, 3))
        found = {"rows": jnp.ones(texts.shape[0]), "image/statistics": image.get("statistics")}
        given = ("identity", "negative_image", "negative_text")
        found |= {name: batch[name] for name in given if name in batch}
        if config.itc_weight:
            found |= self._features(params, image, states["plain"], "")
            slow = self._features(averaged, slow_image, slow_states["plain"], "slow_")
            found |= {name: jax.lax.stop_gradient(x) for name, x in slow.items()}
        if config.itm_weight:
            found |= {"image_tokens": image["tokens"], "text_tokens": states["plain"]["tokens"]}
            found |= {"valid": self._call(params, "valid", texts), "keys": row_keys(keys, 4)}
        if config.mlm_weight:
            valid = self._call(params, "valid", masked)
            logits = self._word_logits(params, states["hidden"], valid, image["tokens"], row_keys(keys, 6))
            sums, counts = token_cross_entropy(logits, texts, chosen)
            if config.distils_words:
                hidden, tokens = slow_states["hidden"], slow_image["tokens"]
                taught = self._word_logits(averaged, hidden, valid, tokens, row_keys(keys, 7))
                share = self._share(step)
                sums = (1 - share) * sums + share * distillation_loss(logits, taught, chosen)
            hits = correct_tokens(logits, texts, chosen)
            found |= {"word_sums": sums, "word_counts": counts, "word_hits": hits}
        return {name: value for name, value in found.items() if value is not None}

    def _states(self, params: Any, texts: dict[str, jax.Array], keys: jax.Array) -> dict[str, dict[str, jax.Array]]:
        """What the text encoder makes of several texts of each row, in one pass."""
        if not texts:
            return {}
        count = len(texts)
        # The texts of a row beside each other, so that they stay on the row's device.
        flat = jnp.stack(list(texts.values()), axis=1).reshape(keys.shape[0] * count, -1)
        flat_keys = jnp.stack([row_keys(keys, place) for place in range(count)], axis=1).reshape(-1)
        states = self._call(params, "text_states", flat, flat_keys)
        split = {name: states[name].reshape(-1, count, *states[name].shape[1:]) for name in ("tokens", "summary")}
        return {
            name: {"table": states["table"]} | {key: x[:, place] for key, x in split.items()}
            for place, name in enumerate(texts)
        }

    def _features(self, params: Any, image: Any, text: Any, which: str) -> dict[str, jax.Array]:
        """What is compared, [B, E] each."""
        return {
            f"{which}image_features": self._call(params, "image_features", image["pooled"]),
            f"{which}text_features": self._call(params, "text_features", text["summary"]),
        }

    def _word_logits(
        self, params: Any, states: dict[str, jax.Array], valid: jax.Array, tokens: jax.Array, keys: jax.Array
    ) -> jax.Array:
        fused = self._call(params, "fuse", states["tokens"], valid, tokens, keys)
        return self._call(params, "word_logits", fused, states["table"])

    def pair_loss(self, params: Any, extra: Any, embeddings: Any, step: jax.Array) -> tuple[Ratio, Aux]:
        """The weighted sum of the three means, counted as rows."""
        config, one, rows = self.config, jnp.ones(()), embeddings["rows"].shape[0]
        averaged = self._averaged(params, extra)[1]
        groups = group_count(config.negatives_scope, config.negatives_group, rows)
        allowed, positive = same_group(rows, groups), jnp.eye(rows, dtype=bool)
        if config.positives != "row":
            positive |= allowed & self._same(embeddings["identity"], embeddings["identity"])
        total, logits, ratios = jnp.zeros(()), (jnp.zeros((rows, rows)), jnp.zeros((rows, rows))), {}
        if config.itc_weight:
            image, text = (
                (embeddings[f"{name}_features"], embeddings[f"slow_{name}_features"]) for name in ("image", "text")
            )
            queue = self._queue_block(extra, embeddings)
            share = self._share(step) if config.distillation else None
            loss, logits = queue_contrast(image, text, queue, 1.0 / params["temperature"], allowed, positive, share)
            ratios["itc_loss"] = (loss, jnp.asarray(rows, jnp.float32))
            total += config.itc_weight * loss / rows
        if config.itm_weight:

            def match(*pairs: jax.Array) -> jax.Array:
                return self._call(params, "match", self._call(params, "fuse", *pairs))

            candidates, chunks = allowed & ~positive, config.matching_chunks
            ratios |= matching_loss(match, embeddings, logits, candidates, groups=groups, chunks=chunks)
            total += config.itm_weight * ratios["itm_loss"][0] / ratios["itm_loss"][1]
        if config.mlm_weight:
            nats, hits, words = (embeddings[f"word_{name}"].sum() for name in ("sums", "hits", "counts"))
            ratios |= {"mlm_loss": (nats, words), "mlm_accuracy": (hits, words)}
            total += config.mlm_weight * nats / jnp.maximum(words, 1.0)
        ratios |= {"temperature": (params["temperature"], one), "distillation": (self._share(step), one)}
        updates = {name: embeddings.get(name) for name in ("slow_image_features", "slow_text_features", "identity")}
        updates |= {"averaged": averaged, "statistics": embeddings.get("image/statistics")}
        count = jnp.asarray(rows, jnp.float32)
        return (total * count, count), Aux(ratios, updates)

    def _same(self, ids_BxI: jax.Array, other_NxI: jax.Array) -> jax.Array:
        kinds = 1 if self.config.positives == "image" else 2
        return same_identity(ids_BxI[:, :kinds], other_NxI[:, :kinds])

    def _queue_block(self, extra: Any, embeddings: Any) -> tuple[jax.Array, jax.Array, jax.Array] | None:
        """The queues of images and texts, and which of their places are no negatives of which rows."""
        if "queue" not in extra:
            return None
        queue, rows = extra["queue"], embeddings["rows"].shape[0]
        same = jnp.zeros((rows, self.config.queue), bool)
        if self.config.positives != "row":
            same = self._same(embeddings["identity"], queue["identity"])
        return queue["image"], queue["text"], same

    def constrain(self, params: Any, updates: Any) -> Any:
        """The temperature back within its limits; the published step does it before the next one's features."""
        low, high = self.config.temperature_limits
        return super().constrain(params, updates) | {"temperature": jnp.clip(params["temperature"], low, high)}

    def after(self, extra: Any, params: Any, updates: Any, step: jax.Array) -> Any:
        """The averaged model that this step used, and its features in the queues."""
        new = extra | ({"averaged": updates["averaged"]} if "averaged" in extra else {})
        if "queue" in extra:
            queue, pointer = extra["queue"], extra["queue"]["pointer"]
            image, text = updates["slow_image_features"], updates["slow_text_features"]
            unknown = jnp.full((image.shape[0], 2), -1, jnp.int32)
            rows = {"image": image, "text": text, "identity": updates["identity"]}
            rows["identity"] = unknown if rows["identity"] is None else rows["identity"]
            new["queue"] = {name: enqueue(queue[name], jax.lax.stop_gradient(x), pointer) for name, x in rows.items()}
            new["queue"]["pointer"] = (pointer + image.shape[0]) % self.config.queue
        return new


__all__ = ["AlbefConfig", "AlbefObjective"]
