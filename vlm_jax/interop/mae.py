"""MAE as its authors store it: encoder and decoder (`*_full.pth`, training checkpoints), without a config file."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.interop.formats import Format, block_sizes, check_expressible, square_side
from vlm_jax.interop.layouts import Shape
from vlm_jax.interop.tables import (
    Row,
    Tensors,
    affine,
    fused_attention,
    module_shapes,
    norm,
    shape_of,
    within,
)
from vlm_jax.models.masked_autoencoder import (
    MaskedAutoencoder,
    MaskedAutoencoderConfig,
    PixelDecoderConfig,
    mae_encoder,
)
from vlm_jax.models.position import sincos_2d
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.mae import MaeConfig

_POSITIONS, _DECODER_POSITIONS = "pos_embed", "decoder_pos_embed"
_DECODER_HEAD = 32  # channels of a head in every published decoder


class MaeFormat(Format):
    """What the formats of a whole masked autoencoder share."""

    preprocess = "imagenet"

    def objective(self, model: MaskedAutoencoderConfig) -> MaeConfig:
        """See the base."""
        return MaeConfig(model=model)

    def claims(self, config: Any) -> bool:
        """Every masked autoencoder."""
        return isinstance(config, MaskedAutoencoderConfig)

    def shapes(self, config: MaskedAutoencoderConfig) -> dict[str, Shape]:
        """See the base."""
        image = config.image
        return module_shapes(MaskedAutoencoder(config), (1, *image.image_shape, 3), (1, image.patches))

    def check(self, config: MaskedAutoencoderConfig) -> None:
        """Raises `ConversionError` for a model that is no MAE of the published form."""
        image, decoder = config.image, config.decoder
        published = mae_encoder(image.width, image.depth, image.heads, image.patch_size)
        keys = ("pool", "class_token", "registers", "pos_embed", "patch_norm", "mask_token", "pre_norm", "post_norm")
        keys += ("patch_bias", "gated", "norm", "qkv_bias", "key_bias", "out_bias", "mlp_bias", "layer_scale_init")
        wanted = {f"image.{key}": (getattr(image, key), (getattr(published, key),)) for key in keys}
        for key in ("activation", "norm", "norm_eps", "gated", "layer_scale_init"):
            wanted[f"decoder.{key}"] = (getattr(decoder, key), (getattr(image, key),))
        check_expressible(self.title, wanted)


class Mae(MaeFormat):
    """`MaskedAutoencoderViT` of the published code."""

    library, title = "original", "the authors' MAE"

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return {"decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight", "decoder_pred.weight"} <= tensors.keys()

    def rows(self, config: MaskedAutoencoderConfig) -> list[Row]:
        """See the base."""
        return [
            *within(encoder_rows(), "image/", ""),
            *affine("decoder/embed", "decoder_embed"),
            Row("decoder/mask_token", "mask_token", "token"),
            *block_rows("decoder/blocks/", "decoder_blocks.{layer}."),
            *norm("decoder/ln_post", "decoder_norm"),
            *affine("decoder/head", "decoder_pred"),
        ]

    def constants(self, config: MaskedAutoencoderConfig) -> dict[str, np.ndarray]:
        """Both tables of positions."""
        image, decoder = config.image, config.decoder
        return {
            _POSITIONS: sincos_2d(image.grid, image.width, 1)[None],
            _DECODER_POSITIONS: sincos_2d(image.grid, decoder.width, 1)[None],
        }

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> MaskedAutoencoderConfig:
        """See the base. Heads are those of the published sizes, which have a rule."""
        image = read_encoder(tensors, self.title)
        sizes = block_sizes(tensors, "decoder_blocks.{layer}.", "norm1.weight", "mlp.fc1.bias", self.title)
        decoder = PixelDecoderConfig(**sizes, heads=max(1, sizes["width"] // _DECODER_HEAD))
        return MaskedAutoencoderConfig(image, decoder)

    def write_config(self, config: MaskedAutoencoderConfig) -> dict[str, Any]:
        """There is no file, so everything must be as these models have it."""
        self.check(config)
        image, decoder = config.image, config.decoder
        heads = {
            "image.heads": (image.heads, (encoder_heads(image.width),)),
            "image.activation": (image.activation, ("gelu",)),
            "image.norm_eps": (image.norm_eps, (1e-6,)),
            "decoder.heads": (decoder.heads, (decoder.width // _DECODER_HEAD,)),
        }
        check_expressible(self.title, heads)
        return {}


def encoder_rows() -> list[Row]:
    """The encoder in timm's names, without its positions."""
    return [
        *affine("patch_embed", "patch_embed.proj", "conv"),
        Row("class_token", "cls_token", "token"),
        *block_rows("blocks/", "blocks.{layer}."),
        *norm("ln_post", "norm"),
    ]


def block_rows(ours: str, theirs: str) -> list[Row]:
    """A stack of timm's blocks."""
    rows = fused_attention("attn", "attn.qkv.weight", "attn.qkv.bias", "attn.proj")
    rows += affine("mlp/fc1", "mlp.fc1") + affine("mlp/fc2", "mlp.fc2")
    return within([*rows, *norm("ln_1", "norm1"), *norm("ln_2", "norm2")], ours, theirs)


def read_encoder(tensors: Tensors, what: str) -> ViTConfig:
    """The encoder that tensors in timm's names belong to."""
    sizes: dict[str, Any] = block_sizes(tensors, "blocks.{layer}.", "norm1.weight", "mlp.fc1.bias", what)
    patch_size = shape_of(tensors, "patch_embed.proj.weight", what)[-1]
    side = square_side(shape_of(tensors, _POSITIONS, what)[1] - 1, patch_size, {}, what)
    encoder = mae_encoder(sizes["width"], sizes["depth"], encoder_heads(sizes["width"]), patch_size)
    return dataclasses.replace(encoder, mlp_dim=sizes["mlp_dim"], **side)


def encoder_heads(width: int) -> int:
    """64 channels a head, but 80 in ViT-H (Dosovitskiy et al. 2021, table 1)."""
    return 16 if width == 1280 else max(1, width // 64)


__all__ = ["Mae", "MaeFormat", "block_rows", "encoder_heads", "encoder_rows", "read_encoder"]
