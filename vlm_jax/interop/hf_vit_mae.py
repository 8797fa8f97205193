"""Hugging Face's ViTMAEForPreTraining: MAE, encoder and decoder."""

import re
from collections.abc import Mapping
from typing import Any

from vlm_jax.interop.formats import block_sizes, check_expressible, check_supported, square_side
from vlm_jax.interop.hf import read_tower, write_tower
from vlm_jax.interop.mae import MaeFormat
from vlm_jax.interop.tables import (
    ConversionError,
    Row,
    Tensors,
    affine,
    from_heads,
    norm,
    shape_of,
    to_heads,
    within,
    without_wrappers,
)
from vlm_jax.models.masked_autoencoder import MaskedAutoencoderConfig, PixelDecoderConfig
from vlm_jax.models.vit import ViTConfig

_EMBEDDINGS, _BLOCK, _DECODER_BLOCK = "vit.embeddings.", "vit.encoder.layer.{layer}.", "decoder.decoder_layers.{layer}."
_POSITIONS = f"{_EMBEDDINGS}position_embeddings"
# The names of the Hub. transformers 5 calls the live parameters otherwise, and saves the decoder's under a third name.
BLOCK_SPELLINGS = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_SPELLINGS = (
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    *BLOCK_SPELLINGS,
)
# Older files hold only what differs from these.
_DEFAULTS = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "num_attention_heads": 12,
    "decoder_num_attention_heads": 16,
    "image_size": 224,
    "mask_ratio": 0.75,
    "norm_pix_loss": False,
}
# The one value that our model computes.
_COMPUTED = {"qkv_bias": True, "num_channels": 3, "model_type": "vit_mae"}


class HfViTMae(MaeFormat):
    """ViTMAEForPreTraining of transformers."""

    library, title = "hf", "a Hugging Face ViTMAE"
    positions = (_POSITIONS, "decoder.decoder_pos_embed")

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base."""
        return renamed(without_wrappers(tensors), _SPELLINGS)

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return {_POSITIONS, "decoder.decoder_embed.weight"} <= tensors.keys()

    def rows(self, config: MaskedAutoencoderConfig) -> list[Row]:
        """See the base."""
        return [
            *affine("image/patch_embed", f"{_EMBEDDINGS}patch_embeddings.projection", "conv"),
            Row("image/class_token", f"{_EMBEDDINGS}cls_token", "one_token"),
            *within(vit_block_rows(), "image/blocks/", _BLOCK),
            *norm("image/ln_post", "vit.layernorm"),
            *affine("decoder/embed", "decoder.decoder_embed"),
            Row("decoder/mask_token", "decoder.mask_token", "one_token"),
            *within(vit_block_rows(), "decoder/blocks/", _DECODER_BLOCK),
            *norm("decoder/ln_post", "decoder.decoder_norm"),
            *affine("decoder/head", "decoder.decoder_pred"),
        ]

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> MaskedAutoencoderConfig:
        """See the base."""
        if settings is None:
            raise ConversionError(f"{self.title} needs its config.json beside the weights: it tells the heads")
        check_supported("config.json: ", settings, _COMPUTED)
        known: dict[str, Any] = {**_DEFAULTS, **settings}
        details = read_tower("config.json", known, activation)
        sizes: dict[str, Any] = block_sizes(
            tensors, _BLOCK, "layernorm_before.weight", "intermediate.dense.bias", self.title
        )
        patch_size = shape_of(tensors, f"{_EMBEDDINGS}patch_embeddings.projection.weight", self.title)[-1]
        positions = shape_of(tensors, _POSITIONS, self.title)[1] - 1
        sizes |= square_side(positions, patch_size, known, self.title)
        fixed = {"pos_embed": "sincos", "pre_norm": False, "patch_bias": True, "init": "mae"}
        decoder: dict[str, Any] = block_sizes(
            tensors, _DECODER_BLOCK, "layernorm_before.weight", "intermediate.dense.bias", self.title
        )
        decoder |= details | {"heads": known["decoder_num_attention_heads"]}
        return MaskedAutoencoderConfig(
            ViTConfig(**details, **sizes, **fixed),
            PixelDecoderConfig(**decoder),
            mask_ratio=known["mask_ratio"],
            normalise_pixels=known["norm_pix_loss"],
        )

    def write_config(self, config: MaskedAutoencoderConfig) -> dict[str, Any]:
        """See the base."""
        self.check(config)
        image, decoder = config.image, config.decoder
        check_expressible(self.title, {"image.image_size": (image.image_shape, ((max(image.image_shape),) * 2,))})
        return {
            "architectures": ["ViTMAEForPreTraining"],
            "model_type": "vit_mae",
            **write_tower(image),
            "image_size": image.image_shape[0],
            "patch_size": image.patch_size,
            "num_channels": 3,
            "qkv_bias": True,
            "decoder_hidden_size": decoder.width,
            "decoder_intermediate_size": decoder.mlp_dim,
            "decoder_num_hidden_layers": decoder.depth,
            "decoder_num_attention_heads": decoder.heads,
            "mask_ratio": config.mask_ratio,
            "norm_pix_loss": config.normalise_pixels,
        }


def vit_block_rows() -> list[Row]:
    """A block of the library's ViT, under the names of its saved files."""
    rows = []
    for name in ("query", "key", "value"):
        rows += to_heads(f"attn/{name}", f"attention.attention.{name}")
    rows += from_heads("attn/out", "attention.output.dense")
    rows += affine("mlp/fc1", "intermediate.dense") + affine("mlp/fc2", "output.dense")
    return [*rows, *norm("ln_1", "layernorm_before"), *norm("ln_2", "layernorm_after")]


def renamed(tensors: Tensors, spellings: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """The tensors with (regular expression, replacement) applied to each name, one after the other."""
    names = {}
    for name, value in tensors.items():
        for pattern, replacement in spellings:
            name = re.sub(pattern, replacement, name)
        names[name] = value
    return names


__all__ = ["BLOCK_SPELLINGS", "HfViTMae", "renamed", "vit_block_rows"]
