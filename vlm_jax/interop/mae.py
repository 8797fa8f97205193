"""MAE as its authors store it: encoder and decoder (`*_full.pth`, training checkpoints), without a config file."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.interop.formats import Format, ImageTowerFormat, block_sizes, check_expressible, square_side
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

_POSITIONS = "pos_embed"
_DECODER_HEAD = 32  # channels of a head in every published decoder
# What all published encoders have in common.
_FORM = ("pool", "class_token", "registers", "pos_embed", "patch_norm", "mask_token", "pre_norm", "post_norm")
_FORM += ("patch_bias", "gated", "norm", "qkv_bias", "key_bias", "out_bias", "mlp_bias", "layer_scale_init")


class MaeFormat(Format):
    """What the formats of a whole masked autoencoder share.

    Attributes:
        positions: what the library calls the tables of positions, the encoder's and the decoder's.
    """

    preprocess = "imagenet"
    positions: tuple[str, str]

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

    def constants(self, config: MaskedAutoencoderConfig) -> dict[str, np.ndarray]:
        """Both tables of positions."""
        widths = (config.image.width, config.decoder.width)
        tables = (sincos_2d(config.image.grid, width, 1)[None] for width in widths)
        return dict(zip(self.positions, tables, strict=True))

    def check(self, config: MaskedAutoencoderConfig) -> None:
        """Raises `ConversionError` for a model that is no MAE of the published form."""
        image, decoder = config.image, config.decoder
        published = mae_encoder(image.width, image.depth, image.heads, image.patch_size)
        wanted = {f"image.{key}": (getattr(image, key), (getattr(published, key),)) for key in _FORM}
        for key in ("activation", "norm", "norm_eps", "gated", "layer_scale_init"):
            wanted[f"decoder.{key}"] = (getattr(decoder, key), (getattr(image, key),))
        check_expressible(self.title, wanted)


class Mae(MaeFormat):
    """`MaskedAutoencoderViT` of the published code."""

    library, title = "official", "the authors' MAE"
    positions = ("pos_embed", "decoder_pos_embed")

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return {"decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight", "decoder_pred.weight"} <= tensors.keys()

    def rows(self, config: MaskedAutoencoderConfig) -> list[Row]:
        """See the base."""
        return [
            *within(encoder_rows(), "image/", ""),
            *affine("decoder/embed", "decoder_embed"),
            Row("decoder/mask_token", "mask_token", "one_token"),
            *block_rows("decoder/blocks/", "decoder_blocks.{layer}."),
            *norm("decoder/ln_post", "decoder_norm"),
            *affine("decoder/head", "decoder_pred"),
        ]

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> MaskedAutoencoderConfig:
        """See the base. Heads are those of the published sizes, which have a rule."""
        image = read_encoder(tensors, self.title)
        sizes: dict[str, Any] = block_sizes(
            tensors, "decoder_blocks.{layer}.", "norm1.weight", "mlp.fc1.bias", self.title
        )
        decoder = PixelDecoderConfig(**sizes, heads=max(1, sizes["width"] // _DECODER_HEAD))
        return MaskedAutoencoderConfig(image, decoder)

    def write_config(self, config: MaskedAutoencoderConfig) -> dict[str, Any]:
        """There is no file, so everything must be as these models have it."""
        self.check(config)
        heads = (config.decoder.heads, (max(1, config.decoder.width // _DECODER_HEAD),))
        check_expressible(self.title, published_form(config.image) | {"decoder.heads": heads})
        return {}


class MaeEncoder(ImageTowerFormat):
    """The encoder alone, as the authors released most of their models (`mae_pretrain_vit_*.pth`)."""

    library, title, preprocess = "official", "the authors' MAE encoder", "imagenet"

    def recognises(self, tensors: Tensors) -> bool:
        """See the base. DINO's and timm's encoders have the same names, but learned positions."""
        if not {_POSITIONS, "cls_token", "blocks.0.attn.qkv.weight", "norm.weight"} <= tensors.keys():
            return False
        _, count, width = tensors[_POSITIONS].shape
        side = math.isqrt(count - 1)
        if side * side != count - 1 or width % 4 or any(name.startswith("decoder") for name in tensors):
            return False
        return bool(np.allclose(tensors[_POSITIONS][0], sincos_2d((side, side), width, 1), atol=1e-5))

    def rows(self, config: ViTConfig) -> list[Row]:
        """See the base."""
        return within(encoder_rows(), "image/", "")

    def constants(self, config: ViTConfig) -> dict[str, np.ndarray]:
        """The table of positions."""
        return {_POSITIONS: sincos_2d(config.grid, config.width, 1)[None]}

    def read_config(self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None) -> ViTConfig:
        """See the base."""
        return read_encoder(tensors, self.title)

    def claims(self, config: Any) -> bool:
        """A ViT with a class token and fixed positions."""
        return isinstance(config, ViTConfig) and config.class_token and config.pos_embed == "sincos"

    def write_config(self, config: ViTConfig) -> dict[str, Any]:
        """See the base."""
        check_expressible(self.title, published_form(config))
        return {}


def published_form(image: ViTConfig) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """What must be as in the authors' files, which tell nothing but shapes: see `check_expressible`."""
    published = mae_encoder(image.width, image.depth, encoder_heads(image.width), image.patch_size)
    keys = (*_FORM, "heads", "activation", "norm_eps")
    return {f"image.{key}": (getattr(image, key), (getattr(published, key),)) for key in keys}


def encoder_rows() -> list[Row]:
    """The encoder in timm's names, without its positions."""
    return [
        *affine("patch_embed", "patch_embed.proj", "conv"),
        Row("class_token", "cls_token", "one_token"),
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


__all__ = ["Mae", "MaeEncoder", "MaeFormat", "block_rows", "encoder_heads", "encoder_rows", "read_encoder"]
