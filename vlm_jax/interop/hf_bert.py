"""Hugging Face's BertForMaskedLM, which BertForPreTraining's files hold too: an encoder and its head of words."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.data.text import Tokenizer, TokenizerConfig, WordPieceConfig
from vlm_jax.interop.formats import Format, block_sizes, check_expressible, check_supported
from vlm_jax.interop.hf import read_tower, write_tower
from vlm_jax.interop.layouts import Shape
from vlm_jax.interop.tables import (
    ConversionError,
    Row,
    Tensors,
    affine,
    from_heads,
    norm,
    parameter_shapes,
    shape_of,
    to_heads,
    within,
    without_wrappers,
)
from vlm_jax.interop.tokenizer_import import import_word_pieces
from vlm_jax.models.bert import MaskedWordHeadConfig, TextEncoderConfig
from vlm_jax.objectives.mlm import MlmConfig, MlmModelConfig, MlmModule

EMBEDDINGS, BLOCK = "bert.embeddings.", "bert.encoder.layer.{layer}."
_WORDS, _DECODER = f"{EMBEDDINGS}word_embeddings.weight", "cls.predictions.decoder."
# What belongs to next sentences, and a buffer: of no use here.
_UNUSED = re.compile(r"bert\.pooler\..*|cls\.seq_relationship\..*|bert\.embeddings\.position_ids")
# Older files hold only what differs from these.
_DEFAULTS: dict[str, Any] = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "num_attention_heads": 12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
_COMPUTED = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}


class HfBert(Format):
    """BertForMaskedLM of transformers. Its sizes but heads are read from the shapes."""

    library, title, reads_images = "hf", "a Hugging Face BertForMaskedLM", False

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base; the oldest files call the parts of a norm gamma and beta."""
        named = without_wrappers(tensors)
        named = {re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", name)): x for name, x in named.items()}
        return {name: x for name, x in named.items() if not _UNUSED.fullmatch(name)}

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return {_WORDS, "cls.predictions.transform.dense.weight"} <= tensors.keys()

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> MlmModelConfig:
        """See the base."""
        if settings is None:
            raise ConversionError(f"{self.title} needs its config.json beside the weights: it tells the heads")
        check_supported("config.json: ", settings, _COMPUTED)
        known = {**_DEFAULTS, **settings}
        text = read_encoder(tensors, "", self.title, known | {"activation": activation})
        return MlmModelConfig(text, MaskedWordHeadConfig(tied=known["tie_word_embeddings"]))

    def objective(self, model: MlmModelConfig) -> MlmConfig:
        """See the base."""
        return MlmConfig(model=model, text_length=min(MlmConfig().text_length, model.text.positions))

    def tokenizer(
        self, folder: Path, flag: str, model: MlmModelConfig
    ) -> tuple[Tokenizer | None, str, TokenizerConfig]:
        """See the base; from BERT's vocabulary."""
        return import_word_pieces(folder, flag, WordPieceConfig(), self.objective(model).text_length)

    def claims(self, config: Any) -> bool:
        """An encoder with a head of words and nothing else."""
        return isinstance(config, MlmModelConfig)

    def own(self, tensors: Tensors, config: MlmModelConfig) -> dict[str, np.ndarray]:
        """See the base; a tied head's copies of the table and of its bias."""
        return without_ties(tensors, "", config.words.tied, self.title)

    def published(self, tensors: Tensors) -> Tensors:
        """With the head's copies, as the library's files of before ties were resolved have them."""
        return with_ties(tensors, "")

    def write_config(self, config: MlmModelConfig) -> dict[str, Any]:
        """See the base."""
        text = config.text
        check_expressible(self.title, {f"text.{key}": value for key, value in published_form(text).items()})
        return {
            "architectures": ["BertForMaskedLM"],
            "model_type": "bert",
            **write_tower(text),
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.positions,
            "type_vocab_size": text.segments,
            "pad_token_id": text.pad_id,
            "hidden_dropout_prob": text.dropout,
            "attention_probs_dropout_prob": text.attention_dropout,
            "tie_word_embeddings": config.words.tied,
        }

    def rows(self, config: MlmModelConfig) -> list[Row]:
        """See the base."""
        return [
            *embedding_rows(),
            *within(block_rows(), "text/blocks/", BLOCK),
            *head_rows(config.words.tied),
        ]

    def shapes(self, config: MlmModelConfig) -> dict[str, Shape]:
        """See the base."""
        return parameter_shapes(MlmModule(config), jax.ShapeDtypeStruct((1, 2), jnp.int32))


def published_form(text: TextEncoderConfig) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """What must be as in BERT: see `check_expressible`."""
    like = TextEncoderConfig()
    keys = ("norm", "gated", "qkv_bias", "key_bias", "out_bias", "mlp_bias", "layer_scale_init")
    return {key: (getattr(text, key), (getattr(like, key),)) for key in keys}


def read_encoder(tensors: Tensors, prefix: str, what: str, known: Mapping[str, Any]) -> TextEncoderConfig:
    """The encoder whose names begin with a prefix; `known` are the settings of a config file, all filled in."""
    sizes: dict[str, Any] = block_sizes(
        tensors, f"{prefix}{BLOCK}", "output.LayerNorm.weight", "intermediate.dense.bias", what
    )
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    rows = [shape_of(tensors, f"{prefix}{EMBEDDINGS}{name}.weight", what)[0] for name in tables]
    sizes |= dict(zip(("vocab_size", "positions", "segments"), rows, strict=True))
    return TextEncoderConfig(
        **sizes,
        **read_tower("config.json", known, known["activation"]),
        dropout=known["hidden_dropout_prob"],
        attention_dropout=known["attention_probs_dropout_prob"],
        pad_id=known["pad_token_id"],
    )


def embedding_rows() -> list[Row]:
    """Tables and their norm."""
    return [
        Row("text/token_embed", _WORDS, "same"),
        Row("text/position_embed", f"{EMBEDDINGS}position_embeddings.weight", "same"),
        Row("text/segment_embed", f"{EMBEDDINGS}token_type_embeddings.weight", "same"),
        *norm("text/embed_norm", f"{EMBEDDINGS}LayerNorm"),
    ]


def block_rows() -> list[Row]:
    """A layer."""
    return [
        *_attention_rows("attn", "ln_1", "attention"),
        *affine("mlp/fc1", "intermediate.dense"),
        *affine("mlp/fc2", "output.dense"),
        *norm("ln_2", "output.LayerNorm"),
    ]


def cross_rows() -> list[Row]:
    """What a layer that attends to a context has besides."""
    return _attention_rows("cross", "ln_cross", "crossattention")


def _attention_rows(ours: str, ours_norm: str, theirs: str) -> list[Row]:
    rows = []
    for name in ("query", "key", "value"):
        rows += to_heads(f"{ours}/{name}", f"{theirs}.self.{name}")
    return [
        *rows,
        *from_heads(f"{ours}/out", f"{theirs}.output.dense"),
        *norm(ours_norm, f"{theirs}.output.LayerNorm"),
    ]


def head_rows(tied: bool) -> list[Row]:
    """The head of words."""
    rows = [
        *affine("words/transform", "cls.predictions.transform.dense"),
        *norm("words/norm", "cls.predictions.transform.LayerNorm"),
        Row("words/bias", "cls.predictions.bias", "same"),
    ]
    return rows if tied else [*rows, Row("words/table", f"{_DECODER}weight", "same")]


def without_ties(tensors: Tensors, prefix: str, tied: bool, what: str) -> dict[str, np.ndarray]:
    """The tensors without the head's copies of other ones.

    Raises:
        ConversionError: a copy differs from what it is a copy of.
    """
    copies = {f"{prefix}{_DECODER}bias": f"{prefix}cls.predictions.bias"}
    if tied:
        copies[f"{prefix}{_DECODER}weight"] = prefix + _WORDS
    for copy, original in copies.items():
        if copy in tensors and original in tensors and not np.array_equal(tensors[copy], tensors[original]):
            raise ConversionError(f"{copy} of these weights differs from {original}, which {what} has in its place")
    return {name: x for name, x in tensors.items() if name not in copies}


def with_ties(tensors: Tensors, prefix: str) -> dict[str, np.ndarray]:
    """The inverse of `without_ties`."""
    copies = {f"{prefix}{_DECODER}bias": tensors[f"{prefix}cls.predictions.bias"]}
    copies[f"{prefix}{_DECODER}weight"] = tensors.get(f"{prefix}{_DECODER}weight", tensors[prefix + _WORDS])
    return {**tensors, **copies}


__all__ = [
    "BLOCK",
    "HfBert",
    "block_rows",
    "cross_rows",
    "embedding_rows",
    "head_rows",
    "published_form",
    "read_encoder",
    "with_ties",
    "without_ties",
]
