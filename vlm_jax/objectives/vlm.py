"""Vision-language training: a decoder that sees images learns what the assistant says (Liu et al. 2023, LLaVA).

Which parts learn is said by `config.parts`: the projector alone, projector and decoder, or everything. LLaVA, nanoVLM
and PaliGemma are values of this config.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.chat_examples import ChatExamples, row_shapes
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.text import Tokenizer
from vlm_jax.data.tiles import AnyresTiling
from vlm_jax.losses.vocabulary import vocabulary_cross_entropy
from vlm_jax.models.decoder import Decoder
from vlm_jax.models.generation import Generated, GenerationConfig, Writing, begin, extend, generate
from vlm_jax.models.vision_language import VisionLanguageConfig, VisionLanguageModel
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.base import normalise_images
from vlm_jax.objectives.image_text import ImageTextConfig
from vlm_jax.objectives.images import ImageObjective
from vlm_jax.objectives.lm import check_vocabulary, next_tokens
from vlm_jax.schema import ConfigError, override
from vlm_jax.step import Aux, Batch, Ratio


@dataclasses.dataclass(frozen=True)
class VlmConfig(ImageTextConfig):
    """Prediction of the assistant's tokens from images and text."""

    model: VisionLanguageConfig = VisionLanguageConfig()  # tower, projector and decoder
    length: int = 2048  # tokens of a row, those of images included
    tiles: int = 1  # image tiles of a row
    # whether what is not learned, images and prompt, is seen as a whole (PaliGemma); else each token sees earlier ones
    prefix: bool = False
    # 0: the mean over all learned tokens of the batch. Else the mean over groups of this many rows of the mean over a
    # group's tokens, as when each device takes the mean of its own rows (LLaVA). Rows r, r + G, r + 2 G, ... make one
    # of G groups, so that microbatches change nothing
    mean_rows: int = 0

    @property
    def image_tower(self) -> ViTConfig:
        """See the base."""
        return self.model.image

    @property
    def text_sizes(self) -> tuple[int, int]:
        """See the base."""
        return self.model.decoder.table_size, self.length

    def forward_flops(self) -> int:
        """See the base."""
        return self.model.forward_flops(self.length, self.tiles)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Rows that hold nothing to learn."""
        yield from super().problems()
        for key, value, least in (
            ("length", self.length, 2),
            ("tiles", self.tiles, 0),
            ("mean_rows", self.mean_rows, 0),
        ):
            if value < least:
                yield key, f"= {value} must be at least {least}"

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "Vlm":
        """See the base."""
        return Vlm(self, preprocess, dtype)

    def make_example(self, tokenizer: Tokenizer | None, data: DataConfig) -> ChatExamples:  # pyright: ignore
        """A row of conversations; raises `ConfigError` where the tokenizer lacks a token that they need."""
        assert tokenizer is not None, "a method that reads text has a tokenizer"
        if data.chat is None:
            raise ConfigError("config.data.chat = None says nothing of how conversations become rows; set it")
        return ChatExamples(tokenizer, data.chat, self.image_size, self.model.tile_tokens)

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of `vlm_jax.data.chat_examples`."""
        shapes = row_shapes(self.length, self.tiles, self.image_size)
        return {name: jax.ShapeDtypeStruct((batch_size, *shape), dtype) for name, (shape, dtype) in shapes.items()}

    def data_problems(self, data: DataConfig) -> Iterator[tuple[str, str]]:
        """The sizes of a row stand in two places."""
        chat = data.chat
        if chat is None:  # an imported model, which is told by its first run
            return
        for key, theirs, ours in (("row_length", chat.row_length, "length"), ("max_tiles", chat.max_tiles, "tiles")):
            value = getattr(self, ours)
            if theirs != value:
                yield f"data.chat.{key}", f"= {theirs} must equal config.objective.{ours} = {value}; set both"
        if data.augment is not None:
            yield "data.augment", "has no effect on the tiles of conversations; set it to None"
        if isinstance(chat.tiling, AnyresTiling) and not self.model.newline:
            yield "data.chat.tiling", "= 'anyres' ends rows with a learned vector; set objective.model.newline = true"
        if self.mean_rows and data.batch_size % self.mean_rows:
            yield (
                "objective.mean_rows",
                f"= {self.mean_rows} does not divide config.data.batch_size = {data.batch_size}",
            )

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """The vocabulary must fit the tables."""
        check_vocabulary(self.model.decoder, tokenizer)

    def without_dropping(self) -> "VlmConfig":
        """See the base; the mean over all tokens, which any rows have."""
        return override(super().without_dropping(), {"mean_rows": 0})  # pyright: ignore[reportReturnType]


class Vlm(ImageObjective):
    """See `VlmConfig`."""

    joint_space = False

    def __init__(self, config: VlmConfig, preprocess: PreprocessConfig, dtype: Dtype):
        super().__init__(config, VisionLanguageModel(config.model, dtype), preprocess, dtype)
        self.config, self.decoder = config, Decoder(config.model.decoder, dtype)
        if config.model.layer is not None and config.model.image.post_norm:
            self.without_gradient = ("image/ln_post/.*",)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Parameters of the module; nothing else is kept."""
        ids = jnp.zeros((1, 2), jnp.int32)
        tiles = jnp.zeros((1, 1, *self.image_tower.image_shape, 3))
        return self.module.init(key, ids, ids, tiles)["params"], {}

    def loss(self, params: Any, extra: Any, batch: Batch, keys: jax.Array, step: jax.Array) -> tuple[Ratio, Aux]:
        """Cross-entropy of the learned tokens; a batch without any has sum and count 0."""
        outputs = self._apply(params, batch, keys)
        targets, valid = next_tokens(batch["text"], batch["segments"], ~batch["supervised"])
        counts_B = valid.sum(axis=1, dtype=jnp.float32)
        weights, count = None, counts_B.sum()
        if self.config.mean_rows:
            tokens_B, count = group_counts(counts_B, self.config.mean_rows)
            weights = jnp.broadcast_to((1 / jnp.maximum(tokens_B, 1.0))[:, None], valid.shape)
        loss = vocabulary_cross_entropy(outputs["hidden"], outputs["head"], targets, valid, weights_BxT=weights)
        rows = jnp.asarray(counts_B.size, jnp.float32)
        metrics = {
            "token_accuracy": (loss.correct, loss.count),
            "supervised": (loss.count, jnp.asarray(valid.size, jnp.float32)),
            "unsupervised_rows": ((counts_B == 0).sum(dtype=jnp.float32), rows),
        }
        return (loss.total, count), Aux(metrics)

    def _apply(self, params: Any, batch: Mapping[str, Any], keys: jax.Array | None) -> Any:
        return self.module.apply(
            {"params": params},
            batch["text"],
            batch["tile_slots"],
            self._tiles(batch),
            keys,
            segments_BxL=batch["segments"],
            positions_BxL=batch["positions"],
            prefix_BxL=self._prefix(batch),
        )

    def _tiles(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        tiles = batch["tiles"]
        return normalise_images(tiles.reshape(-1, *tiles.shape[2:]), self.preprocess).reshape(tiles.shape)

    def _prefix(self, batch: Mapping[str, jax.Array]) -> jax.Array | None:
        return (batch["segments"] > 0) & ~batch["supervised"] if self.config.prefix else None

    def outputs(self, params: Any, batch: Mapping[str, jax.Array], intermediates: bool = True) -> dict[str, jax.Array]:
        """`hidden` [B, L, D] and `logits` fp32 [B, L, V] of the token after each; for few rows."""
        hidden = self._apply(params, batch, None)["hidden"]
        logits: Any = self.module.apply({"params": params}, hidden, method="logits")
        return {"hidden": hidden, "logits": logits}

    def answer(
        self,
        params: Any,
        batch: Mapping[str, jax.Array],
        config: GenerationConfig,
        keys: jax.Array | None = None,
    ) -> Generated:
        """What the assistant says to rows of prompts; see the base."""
        return generate(self.decoder, config=config, keys=keys, **self._prompts(params, batch))

    def begin_writing(self, params: Any, batch: Mapping[str, jax.Array], config: GenerationConfig) -> Writing:
        """See the base."""
        return begin(self.decoder, config=config, **self._prompts(params, batch))

    def write_on(
        self, params: Any, writing: Writing, config: GenerationConfig, keys: jax.Array | None = None
    ) -> Writing:
        """See the base."""
        return extend(self.decoder, self._writer(params), writing, config, keys)

    def _prompts(self, params: Any, batch: Mapping[str, jax.Array]) -> dict[str, Any]:
        """What `generate` takes of rows of prompts."""
        inputs: Any = self.module.apply(
            {"params": params}, batch["text"], batch["tile_slots"], self._tiles(batch), method="inputs"
        )
        valid = batch["segments"] > 0
        prefix = valid if self.config.prefix else None
        return {"params": self._writer(params), "tokens": inputs, "valid_BxT": valid, "prefix_BxT": prefix}

    def _writer(self, params: Any) -> Any:
        """The decoder's parameters, with what small matrices learned."""
        return self.config.model.merged(params)[1]["decoder"]


def group_counts(counts_B: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """(tokens of the group that a row belongs to [B], groups with a token ()) for groups of `rows` rows.

    Raises:
        ValueError: the rows don't divide a batch that is larger than they are.
    """
    rows = min(rows, counts_B.size)
    if counts_B.size % rows:
        raise ValueError(f"groups of mean_rows = {rows} rows don't divide a microbatch of {counts_B.size}")
    tokens_G = counts_B.reshape(rows, -1).sum(axis=0)
    return jnp.tile(tokens_G, rows), (tokens_G > 0).sum(dtype=jnp.float32)


__all__ = ["Vlm", "VlmConfig", "group_counts"]
