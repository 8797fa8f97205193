"""Language pre-training: a decoder predicts the next token of text (Radford et al. 2018, GPT).

With `prefix` the first part of every document is seen as a whole and not predicted (Raffel et al. 2020, section 3.2.1;
the mask of PaliGemma).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import Source
from vlm_jax.data.text import Tokenizer
from vlm_jax.data.text_rows import TextRows, pack_texts
from vlm_jax.flops import TRAIN_OVER_FORWARD
from vlm_jax.losses.vocabulary import vocabulary_cross_entropy
from vlm_jax.models.decoder import Decoder, DecoderConfig
from vlm_jax.models.generation import Generated, GenerationConfig, Writing, begin, extend, generate
from vlm_jax.models.language_model import LanguageModel, LanguageModelConfig
from vlm_jax.objectives.base import ModelObjective, ObjectiveConfig
from vlm_jax.schema import ConfigError
from vlm_jax.step import Aux, Batch, Ratio


@dataclasses.dataclass(frozen=True)
class LmConfig(ObjectiveConfig):
    """Prediction of the next token."""

    model: LanguageModelConfig = LanguageModelConfig()  # the decoder
    length: int = 2048  # tokens of a row
    isolate: bool = True  # whether the documents of a row don't see each other, and each counts its own positions
    prefix: bool = False  # whether a first part of each document, of random length, is seen as a whole, not predicted

    @property
    def image_size(self) -> int:
        """0: no images are read."""
        return 0

    def problems(self) -> Iterator[tuple[str, str]]:
        """Rows without anything to predict, and masks that contradict each other."""
        if self.length < 2:
            yield "length", f"= {self.length} leaves nothing to predict; use 2 or more"
        if self.prefix and not self.isolate:
            yield "prefix", "= true needs isolate = true: a prefix belongs to one document"

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "Lm":
        """See the base."""
        return Lm(self, preprocess, dtype)

    def arrange(self, source: Source, tokenizer: Tokenizer | None, data: DataConfig, cache_dir: str) -> Source:
        """The documents packed into rows."""
        assert tokenizer is not None, "a method that reads text has a tokenizer"
        return pack_texts(source, tokenizer, self.length, cache_dir, data.bad_record_budget)

    def make_example(self, tokenizer: Tokenizer | None, data: DataConfig) -> TextRows:
        """A row of packed documents."""
        assert tokenizer is not None, "a method that reads text has a tokenizer"
        return TextRows(self.length, tokenizer.pad_id, self.isolate, self.prefix)

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`tokens`, `segments`, `positions` int32 [B, L], and with a prefix `prefix` bool [B, L]."""
        shape = (batch_size, self.length)
        shapes = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "segments", "positions")}
        return shapes | ({"prefix": jax.ShapeDtypeStruct(shape, jnp.bool_)} if self.prefix else {})

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """The vocabulary must fit the tables."""
        check_vocabulary(self.model.decoder, tokenizer)

    def train_flops(self) -> float:
        """Three times the forward pass of a row."""
        return float(TRAIN_OVER_FORWARD * self.model.forward_flops(self.length))


def check_vocabulary(decoder: DecoderConfig, tokenizer: Tokenizer) -> None:
    """Raises `ConfigError` when a decoder's tables have fewer rows than the tokenizer has ids."""
    where = "config.objective.model.decoder"
    if tokenizer.vocab_size > decoder.table_size:
        raise ConfigError(
            f"{where}.vocab_size = {decoder.vocab_size} with extra_tokens = {decoder.extra_tokens} is smaller than "
            f"the tokenizer's {tokenizer.vocab_size} ids; set vocab_size to {tokenizer.vocab_size} or more, or for "
            "a model that is already trained extra_tokens to the difference"
        )


class Lm(ModelObjective):
    """See `LmConfig`."""

    joint_space = False

    def __init__(self, config: LmConfig, preprocess: PreprocessConfig, dtype: Dtype):
        self.config, self.preprocess = config, preprocess
        self.module: LanguageModel = LanguageModel(config.model, dtype)
        self._decoder = Decoder(config.model.decoder, dtype)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Parameters of the module; nothing else is kept."""
        return self.module.init(key, jnp.zeros((1, 2), jnp.int32))["params"], {}

    def loss(self, params: Any, extra: Any, batch: Batch, keys: jax.Array, step: jax.Array) -> tuple[Ratio, Aux]:
        """Cross-entropy of the next token, its mean over the tokens of the batch that are predicted."""
        outputs = self._apply(params, batch, keys)
        targets, valid = next_tokens(batch["tokens"], batch["segments"], batch.get("prefix"))
        loss = vocabulary_cross_entropy(outputs["hidden"], outputs["head"], targets, valid)
        places = jnp.asarray(valid.size, jnp.float32)
        metrics = {"token_accuracy": (loss.correct, loss.count), "predicted": (loss.count, places)}
        return (loss.total, loss.count), Aux(metrics)

    def _apply(self, params: Any, batch: Mapping[str, Any], keys: jax.Array | None) -> Any:
        return self.module.apply(
            {"params": params},
            batch["tokens"],
            keys,
            segments_BxT=batch["segments"],
            positions_BxT=batch["positions"],
            prefix_BxT=batch.get("prefix"),
        )

    def outputs(self, params: Any, batch: Mapping[str, jax.Array], intermediates: bool = True) -> dict[str, jax.Array]:
        """`hidden` [B, L, D] and `logits` fp32 [B, L, V] of the token after each; for few rows."""
        hidden = self._apply(params, batch, None)["hidden"]
        logits: Any = self.module.apply({"params": params}, hidden, method="logits")
        return {"hidden": hidden, "logits": logits}

    def continue_texts(
        self,
        params: Any,
        ids_BxT: jax.Array,
        valid_BxT: jax.Array,
        config: GenerationConfig,
        keys: jax.Array | None = None,
    ) -> Generated:
        """See the base; where prefixes were trained a whole prompt is one."""
        prefix_BxT = valid_BxT if self.config.prefix else None
        return generate(self._decoder, params["decoder"], ids_BxT, valid_BxT, config, prefix_BxT=prefix_BxT, keys=keys)

    def begin_writing(self, params: Any, batch: Mapping[str, jax.Array], config: GenerationConfig) -> Writing:
        """See the base."""
        valid_BxT = batch["segments"] > 0
        prefix_BxT = valid_BxT if self.config.prefix else None
        return begin(self._decoder, params["decoder"], batch["text"], valid_BxT, config, prefix_BxT)

    def write_on(
        self, params: Any, writing: Writing, config: GenerationConfig, keys: jax.Array | None = None
    ) -> Writing:
        """See the base."""
        return extend(self._decoder, params["decoder"], writing, config, keys)


def next_tokens(
    ids_BxT: jax.Array, segments_BxT: jax.Array, prefix_BxT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """What follows each token, and where that is predicted.

    Args:
        ids_BxT: int32.
        segments_BxT: int32 number of the document; 0 fills up.
        prefix_BxT: bool, tokens that are given and not predicted.

    Returns:
        (int32, bool) [B, T]; the last token of a document is followed by nothing.
    """
    targets, following = (jnp.roll(x, -1, axis=1) for x in (ids_BxT, segments_BxT))
    last = jnp.arange(ids_BxT.shape[1])[None, :] == ids_BxT.shape[1] - 1
    valid = (segments_BxT == following) & (segments_BxT > 0) & ~jnp.broadcast_to(last, ids_BxT.shape)
    return targets, valid if prefix_BxT is None else valid & ~jnp.roll(prefix_BxT, -1, axis=1)


__all__ = ["Lm", "LmConfig", "check_vocabulary", "next_tokens"]
