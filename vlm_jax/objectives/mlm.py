"""Masked language modelling: BERT on texts alone (Devlin et al. 2019, section 3.1, without next sentences).

So that the text half of a model can be trained here before it meets images.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from vlm_jax.data.examples import MakeExample, TextExamples
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.text import Tokenizer
from vlm_jax.flops import TRAIN_OVER_FORWARD
from vlm_jax.losses.masked_words import WordMaskConfig, hidden_words_of
from vlm_jax.losses.tokens import correct_tokens, token_cross_entropy
from vlm_jax.models.bert import MaskedWordHead, MaskedWordHeadConfig, TextEncoder, TextEncoderConfig
from vlm_jax.models.projection import unit_length
from vlm_jax.models.stochastic import row_keys
from vlm_jax.objectives.base import ModelObjective, ObjectiveConfig
from vlm_jax.schema import ConfigError
from vlm_jax.step import Aux, Batch, Ratio


@dataclasses.dataclass(frozen=True)
class MlmModelConfig:
    """An encoder and what predicts words; the defaults are BERT-base."""

    text: TextEncoderConfig = TextEncoderConfig()  # the encoder
    words: MaskedWordHeadConfig = MaskedWordHeadConfig()  # the head

    def forward_flops(self, tokens: int) -> int:
        """Model FLOPs of one text's forward pass."""
        return self.text.stack_flops(tokens) + self.words.head_flops(self.text, self.text.width, tokens)


@dataclasses.dataclass(frozen=True)
class MlmConfig(ObjectiveConfig):
    """Hidden words told from the words around them."""

    model: MlmModelConfig = MlmModelConfig()  # encoder and head
    text_length: int = 128  # tokens of a text
    hidden_words: WordMaskConfig = WordMaskConfig()  # which words are hidden

    @property
    def image_size(self) -> int:
        """Of images that nothing reads; evaluations with images do not go with this method."""
        return 1

    def problems(self) -> Iterator[tuple[str, str]]:
        """Texts that the encoder has no positions for, and layers that would look at an image."""
        if self.text_length > self.model.text.positions:
            yield "text_length", f"= {self.text_length} exceeds model.text.positions = {self.model.text.positions}"
        if self.model.text.cross_every:
            yield "model.text.cross_every", "must be 0: there is no image to attend to"

    def make_example(self, tokenizer: Tokenizer | None, data: DataConfig) -> MakeExample:
        """One of the texts of a record."""
        assert tokenizer is not None, "a method that reads text has a tokenizer"
        return TextExamples(tokenizer)

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`text` int32 [B, T]."""
        return {"text": jax.ShapeDtypeStruct((batch_size, self.text_length), jnp.int32)}

    def data_problems(self, data: DataConfig) -> Iterator[tuple[str, str]]:
        """The length of a text stands in two places and must agree."""
        if data.tokenizer.length != self.text_length:
            yield (
                "data.tokenizer.length",
                f"= {data.tokenizer.length} must equal config.objective.text_length = {self.text_length}; set both",
            )

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """See `check_word_tokenizer`."""
        check_word_tokenizer(self.model.text, self.hidden_words, tokenizer)

    def train_flops(self) -> float:
        """Three times the forward pass."""
        return float(TRAIN_OVER_FORWARD * self.model.forward_flops(self.text_length))

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "Mlm":
        """See the base."""
        return Mlm(self, preprocess, dtype)


def check_word_tokenizer(text: TextEncoderConfig, words: WordMaskConfig, tokenizer: Tokenizer) -> None:
    """Raises `ConfigError` when an encoder at `objective.model.text` would read or hide other tokens than it says."""
    if tokenizer.vocab_size > text.vocab_size:
        raise ConfigError(
            f"config.objective.model.text.vocab_size = {text.vocab_size} is smaller than the tokenizer's "
            f"{tokenizer.vocab_size} ids; set it to {tokenizer.vocab_size} or more"
        )
    if tokenizer.pad_id != text.pad_id:
        raise ConfigError(
            f"config.objective.model.text.pad_id = {text.pad_id} must be the tokenizer's padding {tokenizer.pad_id}"
        )
    if not tokenizer.config.bos:
        raise ConfigError("config.data.tokenizer.bos must be true: the class token is the first of a text")
    key = "config.objective.hidden_words"
    mask_id = tokenizer.mask_id
    if mask_id < 0:
        raise ConfigError(
            "config.data.tokenizer has no mask token; use config.data.tokenizer=wordpiece, or one with it"
        )
    if words.mask_id != mask_id:
        raise ConfigError(f"{key}.mask_id = {words.mask_id} must be the tokenizer's {mask_id}")
    for name, value in (("padding", tokenizer.pad_id), ("class token", tokenizer.bos_id)):
        if value not in words.spared_ids:
            raise ConfigError(f"{key}.spared_ids = {words.spared_ids} lacks the tokenizer's {name} {value}; add it")


class MlmModule(nn.Module):
    """Parameters: `text/...`, `words/...`.

    Attributes:
        config: encoder and head.
        dtype: compute dtype; parameters are fp32.
    """

    config: MlmModelConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares encoder and head."""
        self.text = TextEncoder(self.config.text, self.dtype)
        self.words = MaskedWordHead(self.config.words, self.config.text, self.dtype)

    def __call__(
        self, texts: jax.Array, keys: jax.Array | None = None, *, intermediates: bool = False
    ) -> dict[str, jax.Array]:
        """int32 [B, T] -> "word_logits" [B, T, V], and the encoder's outputs as "text/tokens", ..."""
        text = self.text(texts, keys, intermediates=intermediates)
        logits = self.words(text["tokens"], text.pop("table"))
        return {"word_logits": logits} | {f"text/{name}": value for name, value in text.items()}


class Mlm(ModelObjective):
    """See `MlmConfig`. A batch may hold "masked_text" and "chosen", else `hide_words` draws them."""

    joint_space = False

    def __init__(self, config: MlmConfig, preprocess: PreprocessConfig, dtype: Dtype):
        self.config, self.preprocess, self.module = config, preprocess, MlmModule(config.model, dtype)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Parameters of the module; nothing else is kept."""
        return self.module.init(key, jnp.zeros((1, self.config.text_length), jnp.int32))["params"], {}

    def loss(self, params: Any, extra: Any, batch: Batch, keys: jax.Array, step: jax.Array) -> tuple[Ratio, Aux]:
        """Cross-entropy of the hidden words, its mean over those of the batch."""
        config, texts = self.config, batch["text"]
        vocab_size = config.model.text.vocab_size
        masked, chosen = hidden_words_of(config.hidden_words, vocab_size, batch, row_keys(keys, 0))
        logits = self.module.apply({"params": params}, masked, row_keys(keys, 1))["word_logits"]  # pyright: ignore
        sums, counts = token_cross_entropy(logits, texts, chosen)
        count = counts.sum()
        return (sums.sum(), count), Aux({"mlm_accuracy": (correct_tokens(logits, texts, chosen).sum(), count)})

    def outputs(self, params: Any, batch: Mapping[str, jax.Array], intermediates: bool = True) -> dict[str, jax.Array]:
        """`word_logits`, and every intermediate as `text/...`."""
        return self.module.apply({"params": params}, batch["text"], intermediates=intermediates)  # pyright: ignore

    def text_features(self, params: Any, texts: jax.Array) -> jax.Array:
        """The class token, of unit length."""
        tokens = self.outputs(params, {"text": texts}, intermediates=False)["text/tokens"]
        return unit_length(tokens[:, 0].astype(jnp.float32))


__all__ = ["Mlm", "MlmConfig", "MlmModelConfig", "check_word_tokenizer"]
