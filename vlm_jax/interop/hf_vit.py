"""The ViT of Dosovitskiy et al. and DeiT: Hugging Face's ViTModel and DeiTModel, and the authors' files of DeiT.

The image tower alone: a classifier on it belongs to the task that it was trained for, and is left out.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from vlm_jax.interop.formats import ImageTowerFormat, block_sizes, check_expressible, check_supported, square_side
from vlm_jax.interop.hf import read_tower, write_tower
from vlm_jax.interop.hf_vit_mae import BLOCK_SPELLINGS, renamed, vit_block_rows
from vlm_jax.interop.mae import encoder_heads, encoder_rows
from vlm_jax.interop.tables import (
    ConversionError,
    Row,
    Tensors,
    affine,
    norm,
    shape_of,
    within,
    without_wrappers,
)
from vlm_jax.models.albef import deit_b16
from vlm_jax.models.vit import ViTConfig

_BLOCK, _PATCHES = "encoder.layer.{layer}.", "embeddings.patch_embeddings.projection"
_POSITIONS = "embeddings.position_embeddings"
# The names of the Hub; transformers 5 calls the live parameters otherwise.
_SPELLINGS = ((r"^(vit|deit)\.", ""), (r"^layers\.", "encoder.layer."), *BLOCK_SPELLINGS)
_UNUSED = re.compile(r"(pooler|classifier|cls_classifier|head)\..*")
_DEFAULTS = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "num_attention_heads": 12}
_COMPUTED = {"qkv_bias": True, "num_channels": 3}
_FORM = ("pool", "class_token", "registers", "pos_embed", "patch_norm", "mask_token", "pre_norm", "post_norm")
_FORM += ("patch_bias", "gated", "norm", "qkv_bias", "key_bias", "out_bias", "mlp_bias", "layer_scale_init")
_FORM += ("relative_position",)


class ViTFormat(ImageTowerFormat):
    """What both files have in common."""

    preprocess = "imagenet"

    def claims(self, config: Any) -> bool:
        """A ViT with learned positions and none of the later additions."""
        if not isinstance(config, ViTConfig):
            return False
        return config.pos_embed == "learned" and all(getattr(config, key) == getattr(_LIKE, key) for key in _FORM)

    def check(self, config: ViTConfig, **further: tuple[Any, tuple[Any, ...]]) -> None:
        """Raises `ConversionError` for images that are not square, or whatever the file can't say."""
        square = (config.image_shape, ((max(config.image_shape),) * 2,))
        check_expressible(self.title, {"image_size": square, **further})


_LIKE = deit_b16()


class HfViT(ViTFormat):
    """ViTModel, ViTForImageClassification and the DeiT models without a distillation token of transformers."""

    library, title = "hf", "a Hugging Face ViT"

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base; a classifier and a pooler on top are left out."""
        named = renamed(without_wrappers(tensors), _SPELLINGS)
        return {name: x for name, x in named.items() if not _UNUSED.fullmatch(name)}

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        foreign = ("embeddings.mask_token", "embeddings.distillation_token", "encoder.layer.0.layer_scale1.lambda1")
        own = {_POSITIONS, "embeddings.cls_token", "layernorm.weight", f"{_BLOCK.format(layer=0)}output.dense.weight"}
        return own <= tensors.keys() and not any(name in tensors for name in foreign)

    def rows(self, config: ViTConfig) -> list[Row]:
        """See the base."""
        return [
            *affine("image/patch_embed", _PATCHES, "conv"),
            Row("image/class_token", "embeddings.cls_token", "one_token"),
            Row("image/pos_embed", _POSITIONS, "batch_of_one"),
            *within(vit_block_rows(), "image/blocks/", _BLOCK),
            *norm("image/ln_post", "layernorm"),
        ]

    def read_config(self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None) -> ViTConfig:
        """See the base."""
        if settings is None:
            raise ConversionError(f"{self.title} needs its config.json beside the weights: it tells the heads")
        check_supported("config.json: ", settings, _COMPUTED)
        known = {**_DEFAULTS, **settings}
        sizes: dict[str, Any] = block_sizes(
            tensors, _BLOCK, "layernorm_before.weight", "intermediate.dense.bias", self.title
        )
        patch_size = shape_of(tensors, f"{_PATCHES}.weight", self.title)[-1]
        sizes |= square_side(shape_of(tensors, _POSITIONS, self.title)[1] - 1, patch_size, known, self.title)
        return dataclasses.replace(_LIKE, **sizes, **read_tower("config.json", known, activation))

    def write_config(self, config: ViTConfig) -> dict[str, Any]:
        """See the base."""
        self.check(config)
        return {
            "architectures": ["ViTModel"],
            "model_type": "vit",
            **write_tower(config),
            "image_size": config.image_shape[0],
            "patch_size": config.patch_size,
            "num_channels": 3,
            "qkv_bias": True,
        }


class OfficialDeiT(ViTFormat):
    """The `deit_*_patch16_*.pth` files without a distillation token, and timm's ViTs under the same names."""

    library, title = "official", "an official DeiT"

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base; the classifier is left out."""
        return {name: x for name, x in without_wrappers(tensors).items() if not _UNUSED.fullmatch(name)}

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        own = {"cls_token", "pos_embed", "norm.weight", "blocks.0.attn.qkv.weight", "patch_embed.proj.bias"}
        foreign = ("mask_token", "dist_token", "decoder_embed.weight", "blocks.0.ls1.gamma", "blocks.0.gamma_1")
        return own <= tensors.keys() and not any(name in tensors for name in foreign)

    def rows(self, config: ViTConfig) -> list[Row]:
        """See the base."""
        return within([*encoder_rows(), Row("pos_embed", "pos_embed", "batch_of_one")], "image/", "")

    def read_config(self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None) -> ViTConfig:
        """See the base; heads are 64 wide, as in all published sizes."""
        sizes: dict[str, Any] = block_sizes(tensors, "blocks.{layer}.", "norm1.weight", "mlp.fc1.bias", self.title)
        patch_size = shape_of(tensors, "patch_embed.proj.weight", self.title)[-1]
        sizes |= square_side(shape_of(tensors, "pos_embed", self.title)[1] - 1, patch_size, {}, self.title)
        return dataclasses.replace(_LIKE, heads=encoder_heads(sizes["width"]), **sizes)

    def write_config(self, config: ViTConfig) -> dict[str, Any]:
        """See the base. There is no file, so everything must be as these models have it."""
        wanted = {
            key: (getattr(config, key), (value,))
            for key, value in (("heads", encoder_heads(config.width)), ("norm_eps", 1e-6), ("activation", "gelu"))
        }
        self.check(config, **wanted)
        return {}


__all__ = ["HfViT", "OfficialDeiT"]
