"""Hugging Face's SiglipModel: SigLIP, and the SigLIP 2 models of one fixed resolution. NaFlex is another model."""

import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.interop.formats import TwoTowerFormat, check_expressible, is_two_tower, square_side
from vlm_jax.interop.hf import read_tower, text_embedding_rows, tower_rows, tower_sizes, write_tower
from vlm_jax.interop.tables import (
    ConversionError,
    Row,
    Tensors,
    affine,
    fused_attention,
    norm,
    shape_of,
    within,
    without_wrappers,
)
from vlm_jax.models.text import TextConfig
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.models.vit import ViTConfig

_IMAGE, _TEXT = "vision_model.embeddings", "text_model.embeddings"
_BUFFERS = {f"{_IMAGE}.position_ids", f"{_TEXT}.position_ids"}
# The library writes only what differs from its defaults.
_DEFAULTS = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_attention_heads": 12}


class HfSiglip(TwoTowerFormat):
    """SiglipModel of transformers."""

    library, title = "hf", "a Hugging Face SigLIP"

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base."""
        return {name: value for name, value in without_wrappers(tensors).items() if name not in _BUFFERS}

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return "vision_model.head.probe" in tensors and "text_model.head.weight" in tensors

    def rows(self, config: TwoTowerConfig) -> list[Row]:
        """See the base."""
        head = [
            Row("probe", "probe", "batch_of_one"),
            *fused_attention("attn", "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj"),
            *norm("ln", "layernorm"),
            *affine("mlp/fc1", "mlp.fc1"),
            *affine("mlp/fc2", "mlp.fc2"),
        ]
        return [
            Row("logit_scale", "logit_scale", "batch_of_one"),
            Row("logit_bias", "logit_bias", "batch_of_one"),
            *affine("image/patch_embed", f"{_IMAGE}.patch_embedding", "conv"),
            Row("image/pos_embed", f"{_IMAGE}.position_embedding.weight", "same"),
            *tower_rows("image", "vision_model"),
            *norm("image/ln_post", "vision_model.post_layernorm"),
            *within(head, "image/map_head/", "vision_model.head."),
            *text_embedding_rows(),
            *tower_rows("text", "text_model"),
            *norm("text/ln_final", "text_model.final_layer_norm"),
            *affine("text/projection", "text_model.head"),
        ]

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> TwoTowerConfig:
        """See the base."""
        if settings is None:
            raise ConversionError(f"{self.title} needs its config.json beside the weights: it tells the heads")
        kernel = shape_of(tensors, f"{_IMAGE}.patch_embedding.weight", self.title)
        if len(kernel) != 4:
            raise ConversionError(
                "these are weights of a SigLIP 2 NaFlex, whose images have many shapes; only the variants of one "
                "fixed resolution can be imported"
            )
        image_settings = {"image_size": 224} | _DEFAULTS | settings.get("vision_config", {})
        text_settings = {"pad_token_id": 1} | _DEFAULTS | settings.get("text_config", {})
        image = tower_sizes(tensors, "vision_model", self.title)
        image |= read_tower("vision_config", image_settings, activation)
        positions = shape_of(tensors, f"{_IMAGE}.position_embedding.weight", self.title)[0]
        image |= square_side(positions, kernel[-1], image_settings, self.title)
        text = tower_sizes(tensors, "text_model", self.title)
        text |= read_tower("text_config", text_settings, activation)
        text["vocab_size"] = shape_of(tensors, f"{_TEXT}.token_embedding.weight", self.title)[0]
        text["length"] = shape_of(tensors, f"{_TEXT}.position_embedding.weight", self.title)[0]
        return siglip_config(image, text | {"pad_id": text_settings["pad_token_id"] or 0})

    def claims(self, config: Any) -> bool:
        """A tower that pools by attention, and a bias on the logits."""
        return claims_siglip(config)

    def write_config(self, config: TwoTowerConfig) -> dict[str, Any]:
        """See the base."""
        image, text = check_siglip(self.title, config), config.text
        check_expressible(self.title, {"image.image_size": (image.image_shape, ((max(image.image_shape),) * 2,))})
        return {
            "architectures": ["SiglipModel"],
            "model_type": "siglip",
            "vision_config": {
                "model_type": "siglip_vision_model",
                **write_tower(image),
                "image_size": image.image_shape[0],
                "patch_size": image.patch_size,
                "num_channels": 3,
            },
            "text_config": {
                "model_type": "siglip_text_model",
                **write_tower(text),
                "projection_size": config.embed_dim,
                "vocab_size": text.vocab_size,
                "max_position_embeddings": text.length,
                "pad_token_id": text.pad_id,
                "eos_token_id": text.eos_id,
                "bos_token_id": None,
            },
        }


def siglip_config(image: dict[str, Any], text: dict[str, Any]) -> TwoTowerConfig:
    """The config of a SigLIP from what tells two of them apart."""
    pooling: dict[str, Any] = {"pool": "map", "class_token": False, "pre_norm": False, "patch_bias": True}
    reading: dict[str, Any] = {"causal": False, "pool": "last", "eos_id": 1}
    return TwoTowerConfig(
        ViTConfig(**pooling, init="siglip", **image),
        TextConfig(**reading, init="siglip", **text),
        embed_dim=image["width"],
        projection="text",
        text_projection_bias=True,
        logit_scale_init=math.log(10),
        logit_bias_init=-10.0,
    )


def claims_siglip(config: Any) -> bool:
    """Whether a config is that of a SigLIP, or near enough that it is meant to be one."""
    if not is_two_tower(config) or not isinstance(config.image, ViTConfig):
        return False
    return config.image.pool == "map" and config.logit_bias_init is not None


def check_siglip(title: str, config: TwoTowerConfig) -> ViTConfig:
    """The image tower's config; raises `ConversionError` unless config says a SigLIP."""
    image, text = config.image, config.text
    if not isinstance(image, ViTConfig):
        raise ConversionError(f"{title} has a vision transformer, not a {image.kind()}")
    check_expressible(
        title,
        {
            "image.registers": (image.registers, (0,)),
            "image.pool": (image.pool, ("map",)),
            "text.mask_padding": (text.mask_padding, (False,)),
            "text.causal": (text.causal, (False,)),
            "text.pool": (text.pool, ("last",)),
        },
    )
    return image


__all__ = ["HfSiglip", "check_siglip", "claims_siglip", "siglip_config"]
