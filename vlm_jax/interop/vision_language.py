"""What the formats of vision-language models have in common: their three parts under one roof, and their objective."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.data.chat_config import ChatConfig
from vlm_jax.data.text import HfTokenizerConfig, Tokenizer, TokenizerConfig
from vlm_jax.interop.formats import Format, check_expressible, square_side
from vlm_jax.interop.hf import read_tower, tower_rows, tower_sizes, write_tower
from vlm_jax.interop.hf_decoder import HfDecoder
from vlm_jax.interop.layouts import Shape
from vlm_jax.interop.tables import Row, Tensors, affine, norm, parameter_shapes, shape_of, within
from vlm_jax.interop.tokenizer_import import import_document_tokenizer
from vlm_jax.models.decoder import DecoderConfig
from vlm_jax.models.language_model import LanguageModelConfig
from vlm_jax.models.vision_language import VisionLanguageConfig, VisionLanguageModel
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.base import ObjectiveConfig
from vlm_jax.objectives.vlm import VlmConfig

DECODER = HfDecoder()


class VisionLanguageFormat(Format):
    """A format of a tower, a projector and a decoder.

    Attributes:
        conversations: how the model reads conversations: its row is that of the imported objective.
        prefix: whether it sees what comes before an answer as a whole.
    """

    has_config = True
    conversations: ChatConfig
    prefix: bool = False

    def objective(self, model: VisionLanguageConfig) -> ObjectiveConfig:
        """See the base."""
        chat = self.chat()
        return VlmConfig(model=model, length=chat.row_length, tiles=chat.max_tiles, prefix=self.prefix)

    def chat(self) -> ChatConfig:
        """See the base."""
        return self.conversations

    def remark(self, objective: ObjectiveConfig, model: VisionLanguageConfig) -> str:
        """See the base."""
        return f"{model.tile_tokens} tokens an image"

    def tokenizer(
        self, folder: Path, flag: str, model: VisionLanguageConfig
    ) -> tuple[Tokenizer | None, str, TokenizerConfig]:
        """See the base."""
        length = self.chat().row_length
        built, note = import_document_tokenizer(folder, flag, length)
        return built, note, built.config if built else HfTokenizerConfig(length=length)

    def shapes(self, config: VisionLanguageConfig) -> dict[str, Shape]:
        """See the base."""
        ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        tiles = jax.ShapeDtypeStruct((1, 1, *config.image.image_shape, 3), jnp.float32)
        return parameter_shapes(VisionLanguageModel(config), ids, ids, tiles)

    def claims(self, config: Any) -> bool:
        """See the base."""
        return isinstance(config, VisionLanguageConfig)


def vision_rows(image: ViTConfig, theirs: str) -> list[Row]:
    """A tower of CLIP or SigLIP in the names of transformers, without what pools."""
    embeddings, rows = f"{theirs}.embeddings", []
    if image.patch_bias:
        rows += affine("image/patch_embed", f"{embeddings}.patch_embedding", "conv")
    else:
        rows.append(Row("image/patch_embed/kernel", f"{embeddings}.patch_embedding.weight", "conv"))
    rows += [Row("image/class_token", f"{embeddings}.class_embedding", "same")] * image.class_token
    rows.append(Row("image/pos_embed", f"{embeddings}.position_embedding.weight", "same"))
    rows += norm("image/ln_pre", f"{theirs}.pre_layrnorm") if image.pre_norm else []  # their own spelling
    rows += norm("image/ln_post", f"{theirs}.post_layernorm") if image.post_norm else []
    return rows + tower_rows("image", theirs)


def read_vision(tensors: Tensors, theirs: str, settings: Mapping[str, Any], what: str) -> ViTConfig:
    """The config of such a tower; `settings` are its section of config.json, with the defaults filled in."""
    embeddings = f"{theirs}.embeddings"
    clip = f"{embeddings}.class_embedding" in tensors
    sizes = tower_sizes(tensors, theirs, what) | read_tower("vision_config", settings, None)
    patch_size = shape_of(tensors, f"{embeddings}.patch_embedding.weight", what)[-1]
    positions = shape_of(tensors, f"{embeddings}.position_embedding.weight", what)[0]
    sizes |= square_side(positions - clip, patch_size, settings, what)
    form: dict[str, Any] = {"class_token": clip, "pre_norm": clip, "patch_bias": not clip}
    return ViTConfig(pool="none", init="clip_image" if clip else "siglip", **form, **sizes)


def write_vision(image: ViTConfig, title: str) -> dict[str, Any]:
    """The inverse of `read_vision`, of a CLIP or a SigLIP; raises `ConversionError` for another tower."""
    clip = image.class_token
    check_expressible(
        title,
        {
            "image.registers": (image.registers, (0,)),
            "image.pre_norm": (image.pre_norm, (clip,)),
            "image.patch_bias": (image.patch_bias, (not clip,)),
            "image.post_norm": (image.post_norm, (True,)),
            "image.image_size": (image.image_shape, ((max(image.image_shape),) * 2,)),
        },
    )
    return {
        "model_type": "clip_vision_model" if clip else "siglip_vision_model",
        **write_tower(image),
        "image_size": image.image_shape[0],
        "patch_size": image.patch_size,
        "num_channels": 3,
    } | ({} if clip else {"vision_use_head": False})


def decoder_rows(decoder: DecoderConfig, theirs: str) -> list[Row]:
    """A decoder of transformers behind a prefix."""
    return within(DECODER.rows(LanguageModelConfig(decoder)), "", theirs)


def read_decoder(tensors: Tensors, theirs: str, settings: Mapping[str, Any]) -> DecoderConfig:
    """The config of the decoder behind a prefix; `settings` are its section of config.json, with defaults."""
    own = {name.removeprefix(theirs): value for name, value in tensors.items() if name.startswith(theirs)}
    return DECODER.read_config(DECODER.canonical(own), settings, None).decoder


def write_decoder(decoder: DecoderConfig) -> dict[str, Any]:
    """The inverse of `read_decoder`."""
    return DECODER.write_config(LanguageModelConfig(decoder))


def joined_tables(tensors: Tensors, theirs: str) -> dict[str, np.ndarray]:
    """The tensors with the decoder's added rows, behind a prefix, in one table with the others."""
    own = {name: value for name, value in tensors.items() if not name.startswith(theirs)}
    decoder = {name.removeprefix(theirs): value for name, value in tensors.items() if name.startswith(theirs)}
    return own | {f"{theirs}{name}": value for name, value in DECODER.published(decoder).items()}


__all__ = [
    "DECODER",
    "VisionLanguageFormat",
    "decoder_rows",
    "joined_tables",
    "read_decoder",
    "read_vision",
    "vision_rows",
    "write_decoder",
    "write_vision",
]
