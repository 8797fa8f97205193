"""Hugging Face's CLIPModel."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.interop.formats import (
    TwoTowerFormat,
    check_expressible,
    heads_of_64,
    is_two_tower,
    known_activation,
    square_side,
)
from vlm_jax.interop.hf import read_tower, text_embedding_rows, tower_rows, tower_sizes, write_tower
from vlm_jax.interop.tables import ConversionError, Row, Tensors, norm, shape_of, without_wrappers
from vlm_jax.models.text import TextConfig
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.models.vit import ViTConfig

_IMAGE, _TEXT = "vision_model.embeddings", "text_model.embeddings"
_BUFFERS = {f"{_IMAGE}.position_ids", f"{_TEXT}.position_ids"}
# CLIPTextConfig's end id before 2023; it stands for "the largest id" there.
_LEGACY_EOS = 2
# The library writes only what differs from its defaults.
_DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


class HfClip(TwoTowerFormat):
    """CLIPModel of transformers."""

    library, title = "hf", "a Hugging Face CLIP"

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base."""
        return {name: value for name, value in without_wrappers(tensors).items() if name not in _BUFFERS}

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return f"{_IMAGE}.class_embedding" in tensors and f"{_TEXT}.token_embedding.weight" in tensors

    def rows(self, config: TwoTowerConfig) -> list[Row]:
        """See the base."""
        return [
            Row("logit_scale", "logit_scale", "same"),
            Row("image/patch_embed/kernel", f"{_IMAGE}.patch_embedding.weight", "conv"),
            Row("image/class_token", f"{_IMAGE}.class_embedding", "same"),
            Row("image/pos_embed", f"{_IMAGE}.position_embedding.weight", "same"),
            *norm("image/ln_pre", "vision_model.pre_layrnorm"),  # their own spelling
            *tower_rows("image", "vision_model"),
            *norm("image/ln_post", "vision_model.post_layernorm"),
            Row("image/projection/kernel", "visual_projection.weight", "linear"),
            *text_embedding_rows(),
            *tower_rows("text", "text_model"),
            *norm("text/ln_final", "text_model.final_layer_norm"),
            Row("text/projection/kernel", "text_projection.weight", "linear"),
        ]

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> TwoTowerConfig:
        """See the base."""
        known_activation(settings, activation)
        image = tower_sizes(tensors, "vision_model", self.title)
        text = tower_sizes(tensors, "text_model", self.title)
        image_settings: dict[str, Any] = {}
        if settings is None:
            image["heads"], text["heads"] = heads_of_64(image["width"], text["width"])
            image |= {"activation": activation}
            text |= {"activation": activation}
        else:
            image_settings = {"num_attention_heads": 12, "image_size": 224, **_DEFAULTS} | settings["vision_config"]
            text_settings = {"num_attention_heads": 8, "eos_token_id": 49407, **_DEFAULTS} | settings["text_config"]
            image |= read_tower("vision_config", image_settings, activation)
            text |= read_tower("text_config", text_settings, activation)
            eos = text_settings["eos_token_id"]
            text |= {"pool": "eot_argmax"} if eos == _LEGACY_EOS else {"pool": "first_eos", "eos_id": eos}
        patch_size = shape_of(tensors, f"{_IMAGE}.patch_embedding.weight", self.title)[-1]
        positions = shape_of(tensors, f"{_IMAGE}.position_embedding.weight", self.title)[0]
        image |= square_side(positions - 1, patch_size, image_settings, self.title)
        text["vocab_size"] = shape_of(tensors, f"{_TEXT}.token_embedding.weight", self.title)[0]
        text["length"] = shape_of(tensors, f"{_TEXT}.position_embedding.weight", self.title)[0]
        text.setdefault("eos_id", text["vocab_size"] - 1)
        embed_dim = shape_of(tensors, "text_projection.weight", self.title)[0]
        return TwoTowerConfig(ViTConfig(**image), TextConfig(**text), embed_dim=embed_dim)

    def claims(self, config: Any) -> bool:
        """Everything with one vector a tower that SigLIP does not claim."""
        return is_two_tower(config)

    def write_config(self, config: TwoTowerConfig) -> dict[str, Any]:
        """See the base."""
        image, text = config.image, config.text
        if not isinstance(image, ViTConfig):
            raise ConversionError(f"{self.title} has a vision transformer, not a {image.kind()}; use open_clip")
        check_expressible(
            self.title,
            {
                "image.pool": (image.pool, ("cls",)),
                "image.registers": (image.registers, (0,)),
                "image.image_size": (image.image_shape, ((max(image.image_shape),) * 2,)),
                "text.mask_padding": (text.mask_padding, (False,)),
                "text.causal": (text.causal, (True,)),
                "text.pool": (text.pool, ("eot_argmax", "first_eos")),
            },
        )
        if text.pool == "first_eos" and text.eos_id == _LEGACY_EOS:
            raise ConversionError(f"{self.title} takes eos_id {_LEGACY_EOS} for 'the largest id'; use open_clip")
        special = {
            # The largest id is what our argmax pool looks for, and what this id means to that library.
            "eos_token_id": _LEGACY_EOS if text.pool == "eot_argmax" else text.eos_id,
            "pad_token_id": text.pad_id,
            "bos_token_id": None,
        }
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": config.embed_dim,
            "logit_scale_init_value": config.logit_scale_init,
            "vision_config": {
                "model_type": "clip_vision_model",
                **write_tower(image),
                "projection_dim": config.embed_dim,
                "image_size": image.image_shape[0],
                "patch_size": image.patch_size,
                "num_channels": 3,
            },
            "text_config": {
                "model_type": "clip_text_model",
                **write_tower(text),
                "projection_dim": config.embed_dim,
                "vocab_size": text.vocab_size,
                "max_position_embeddings": text.length,
                **special,
            },
        }


__all__ = ["HfClip"]
