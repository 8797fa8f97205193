"""BEiT as its authors store it: tower and head (training checkpoints, `*_pt22k.pth`), without a config file."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.data.block_masks import BlockMasks
from vlm_jax.interop.formats import Format, block_sizes, check_expressible
from vlm_jax.interop.layouts import Shape
from vlm_jax.interop.tables import (
    ConversionError,
    Row,
    Tensors,
    affine,
    from_heads,
    module_shapes,
    norm,
    shape_of,
    within,
)
from vlm_jax.models.beit import Beit as BeitModule
from vlm_jax.models.beit import BeitModelConfig, beit_encoder
from vlm_jax.models.relative_position import CLASS_ROWS, RelativeGrid
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.beit import BeitConfig

_QKV = ("query", "key", "value")
_TABLE, _INDEX = "rel_pos_bias.relative_position_bias_table", "rel_pos_bias.relative_position_index"
# What all published models have in common.
_FORM = ("pool", "class_token", "registers", "pos_embed", "relative_position", "patch_norm", "mask_token", "pre_norm")
_FORM += ("post_norm", "patch_bias", "gated", "norm", "qkv_bias", "key_bias", "out_bias", "mlp_bias", "activation")


class BeitFormat(Format):
    """What the formats of a tower and its head share. A tokenizer has a format of its own."""

    def objective(self, model: BeitModelConfig) -> BeitConfig:
        """See the base."""
        return BeitConfig(model=model)

    def claims(self, config: Any) -> bool:
        """Every tower with a head for visual codes."""
        return isinstance(config, BeitModelConfig)

    def parameters(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """See the base."""
        return {name: value for name, value in params.items() if name != "tokenizer"}

    def shapes(self, config: BeitModelConfig) -> dict[str, Shape]:
        """See the base."""
        image = config.image
        module = BeitModule(dataclasses.replace(config, tokenizer=None))
        return module_shapes(module, (1, *image.image_shape, 3), (1, image.patches))

    def check(self, config: BeitModelConfig) -> None:
        """Raises `ConversionError` for a model that is no BEiT of the published form."""
        image = config.image
        published = beit_encoder(image.width, image.depth, image.heads, image.patch_size)
        wanted = {f"image.{key}": (getattr(image, key), (getattr(published, key),)) for key in _FORM}
        check_expressible(self.title, wanted)
        if image.layer_scale_init is None:
            raise ConversionError(f"this model can't be expressed as {self.title}: it has no layer scale")


class Beit(BeitFormat):
    """`VisionTransformerForMaskedImageModeling` of the published code."""

    library, title = "official", "the authors' BEiT"

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return {_TABLE, "mask_token", "blocks.0.gamma_1", "blocks.0.attn.q_bias", "lm_head.weight"} <= tensors.keys()

    def rows(self, config: BeitModelConfig) -> list[Row]:
        """See the base."""
        block = [Row(f"attn/{name}/kernel", f"attn.qkv.weight#{i}/3", "to_heads") for i, name in enumerate(_QKV)]
        block += [Row(f"attn/{name}/bias", f"attn.{name[0]}_bias", "heads_bias") for name in ("query", "value")]
        block += from_heads("attn/out", "attn.proj") + affine("mlp/fc1", "mlp.fc1") + affine("mlp/fc2", "mlp.fc2")
        block += [*norm("ln_1", "norm1"), *norm("ln_2", "norm2")]
        block += [Row(f"layer_scale_{i}", f"gamma_{i}", "same") for i in (1, 2)]
        return [
            *affine("image/patch_embed", "patch_embed.proj", "conv"),
            Row("image/class_token", "cls_token", "one_token"),
            Row("image/mask_token", "mask_token", "one_token"),
            Row("image/relative_position/table", _TABLE, "same"),
            *within(block, "image/blocks/", "blocks.{layer}."),
            *norm("image/ln_post", "norm"),
            *affine("head", "lm_head"),
        ]

    def constants(self, config: BeitModelConfig) -> dict[str, np.ndarray]:
        """The rows of the table for all pairs of tokens."""
        return {_INDEX: RelativeGrid(config.image.grid, True).index()}

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> BeitModelConfig:
        """See the base."""
        sizes = block_sizes(tensors, "blocks.{layer}.", "norm1.weight", "mlp.fc1.bias", self.title)
        rows, heads = shape_of(tensors, _TABLE, self.title)
        patch_size = shape_of(tensors, "patch_embed.proj.weight", self.title)[-1]
        side = (math.isqrt(rows - CLASS_ROWS) + 1) // 2 * patch_size
        encoder = beit_encoder(sizes["width"], sizes["depth"], heads, patch_size, side)
        vocab_size = shape_of(tensors, "lm_head.weight", self.title)[0]
        return masked_model(dataclasses.replace(encoder, mlp_dim=sizes["mlp_dim"]), vocab_size)

    def write_config(self, config: BeitModelConfig) -> dict[str, Any]:
        """There is no file, so everything must be as these models have it."""
        self.check(config)
        rows, columns = config.image.grid
        published = {"image.norm_eps": (config.image.norm_eps, (1e-6,)), "image.image_size": (rows, (columns,))}
        check_expressible(self.title, published)
        return {}


def masked_model(image: ViTConfig, vocab_size: int) -> BeitModelConfig:
    """A model without a tokenizer; the published masks, or smaller ones where the grid has not so many patches."""
    masks = BlockMasks()
    if masks.count > image.patches:
        masks = BlockMasks(count=max(1, image.patches * 2 // 5), least=1)
    return BeitModelConfig(image, vocab_size, None, masks)


__all__ = ["Beit", "BeitFormat", "masked_model"]
