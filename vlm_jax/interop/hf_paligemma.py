"""Hugging Face's PaliGemmaForConditionalGeneration (the first PaliGemma, around Gemma)."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.data.chat_config import PALIGEMMA
from vlm_jax.interop.formats import check_expressible, check_supported
from vlm_jax.interop.hf_vit_mae import renamed
from vlm_jax.interop.llava import TO_HUB
from vlm_jax.interop.tables import ConversionError, Row, Tensors, affine, without_wrappers
from vlm_jax.interop.vision_language import (
    VisionLanguageFormat,
    decoder_rows,
    joined_tables,
    read_decoder,
    read_vision,
    vision_rows,
    write_decoder,
    write_vision,
)
from vlm_jax.models.projector import LinearProjectorConfig
from vlm_jax.models.vision_language import VisionLanguageConfig

_VISION, _PROJECTOR, _LANGUAGE = "vision_tower.vision_model", "multi_modal_projector.linear", "language_model."
_HEAD, _EMBED = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
# Of transformers' classes, where config.json does not say.
_VISION_DEFAULTS = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_attention_heads": 16}
_TEXT_DEFAULTS = {"model_type": "gemma", "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256}


class HfPaliGemma(VisionLanguageFormat):
    """A SigLIP, a matrix with bias, and a Gemma that sees images and prompt as a whole."""

    library, title = "hf", "a Hugging Face PaliGemma"
    conversations, prefix = PALIGEMMA, True

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base; in memory the head is the table of embeddings."""
        named = renamed(without_wrappers(tensors), TO_HUB)
        return {name: x for name, x in named.items() if name != _HEAD and not name.endswith("position_ids")}

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return f"{_PROJECTOR}.weight" in tensors and _EMBED in tensors

    def rows(self, config: VisionLanguageConfig) -> list[Row]:
        """See the base."""
        rows = vision_rows(config.image, _VISION) + decoder_rows(config.decoder, _LANGUAGE)
        return rows + affine("projector/fc1", _PROJECTOR)

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> VisionLanguageConfig:
        """See the base."""
        if settings is None:
            raise ConversionError(f"{self.title} needs its config.json beside the weights: it tells the heads")
        check_supported("config.json: ", settings, {"model_type": "paligemma"})
        vision, text = settings.get("vision_config", {}), settings.get("text_config", {})
        return VisionLanguageConfig(
            image=read_vision(tensors, _VISION, _VISION_DEFAULTS | {"image_size": 224} | dict(vision), self.title),
            projector=LinearProjectorConfig(init="zeros"),
            image_token=settings.get("image_token_index", settings.get("image_token_id", 256_000)),
            decoder=read_decoder(tensors, _LANGUAGE, _TEXT_DEFAULTS | dict(text)),
        )

    def claims(self, config: Any) -> bool:
        """A tower without a class token and a Gemma."""
        return super().claims(config) and config.decoder.scaled_embeddings and not config.image.class_token

    def published(self, tensors: Tensors) -> Tensors:
        """See the base."""
        return joined_tables(tensors, _LANGUAGE)

    def write_config(self, config: VisionLanguageConfig) -> dict[str, Any]:
        """See the base."""
        check_expressible(
            self.title,
            {
                "projector": (config.projector.kind(), ("linear",)),
                "layer": (config.layer, (None,)),
                "newline": (config.newline, (False,)),
                "image_token": (config.image_token >= 0, (True,)),
            },
        )
        width, text = config.decoder.width, write_decoder(config.decoder)
        return {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "model_type": "paligemma",
            "image_token_index": config.image_token,
            "projection_dim": width,
            "hidden_size": width,
            "vision_config": write_vision(config.image, self.title) | {"projection_dim": width},
            "text_config": text | {"num_image_tokens": config.tile_tokens},
            "vocab_size": text["vocab_size"],
            "tie_word_embeddings": True,
        }


__all__ = ["HfPaliGemma"]
