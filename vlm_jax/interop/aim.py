"""AIM v1 in its authors' names: the released backbones (ml-aim), and trunk with pixel head as pre-trained (ml-l3m).

The attentive head is a file of its own beside each released backbone; it is no part of a model here, and is converted
by `read_attentive_head` and `write_attentive_head`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm_jax.interop.formats import Format, ImageTowerFormat, block_sizes, check_expressible, square_side
from vlm_jax.interop.layouts import LAYOUTS, Shape
from vlm_jax.interop.tables import (
    ConversionError,
    Row,
    Tensors,
    affine,
    module_shapes,
    norm,
    shape_of,
    within,
)
from vlm_jax.models.aim import AimModelConfig, aim_trunk
from vlm_jax.models.pixel_head import PixelHeadConfig
from vlm_jax.models.position import sincos_2d
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.aim import AimConfig

HEAD_WIDTH = 128  # channels of a head in every published model
_BLOCK, _HEAD_BLOCK = "trunk.blocks.{layer}.", "head.decoder_blocks.{layer}."
_L3M, _AIM = "preprocessor.blocks.0", "preprocessor"
_POSITIONS, _HEAD_POSITIONS = f"{_L3M}.pos_embed", "head.decoder_pos_embed"
_PARTS = ("query", "key", "value")
# What all published trunks and heads have in common, and no file tells.
_FORM = ("pool", "class_token", "registers", "pos_embed", "patch_norm", "mask_token", "pre_norm", "post_norm")
_FORM += ("patch_bias", "gated", "norm", "qkv_bias", "out_bias", "mlp_bias", "layer_scale_init", "activation", "heads")
_HEAD_FORM = ("gated", "norm", "qkv_bias", "out_bias", "mlp_bias", "layer_scale_init", "activation")


def is_aim_trunk(config: Any, norm: str) -> bool:
    """Whether a tower is of the kind of AIM's ("layer") or AIMv2's ("rms"), or near enough to be meant so."""
    return isinstance(config, ViTConfig) and config.patch_norm and not config.class_token and config.norm == norm


def heads_of_128(width: int) -> int:
    """The published rule, since no file tells the heads; raises `ConversionError`."""
    if width % HEAD_WIDTH:
        raise ConversionError(
            f"no file says how many heads a trunk of width {width} has; the published ones are multiples of "
            f"{HEAD_WIDTH} wide, with {HEAD_WIDTH} channels a head"
        )
    return width // HEAD_WIDTH


class AimBackbone(ImageTowerFormat):
    """The trunk, as released; query, key and value are one tensor."""

    library, title, preprocess = "official", "the authors' AIM backbone", "imagenet"

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return {f"{_AIM}.patchifier.norm.bias", "trunk.blocks.0.attn.qkv.weight"} <= tensors.keys()

    def rows(self, config: ViTConfig) -> list[Row]:
        """See the base."""
        return trunk_rows(_AIM, fused=True)

    def read_config(self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None) -> ViTConfig:
        """See the base. Positions are computed for any grid; 224 pixels is what the models were trained on."""
        return read_trunk(tensors, _AIM, 1e-6, self.title)

    def claims(self, config: Any) -> bool:
        """A trunk with layer norms, one of them on its patches, and without a class token."""
        return is_aim_trunk(config, "layer")

    def write_config(self, config: ViTConfig) -> dict[str, Any]:
        """There is no file, so everything must be as these models have it."""
        check_expressible(self.title, published_form(config))
        return {}


class L3mAim(Format):
    """Trunk and pixel head with their tables of positions, as the authors' training code stores them."""

    library, title, preprocess = "ml_l3m", "ml-l3m's AIM", "imagenet"

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return {f"{_L3M}.patchifier.norm.bias", "head.decoder_pred.weight"} <= tensors.keys()

    def objective(self, model: AimModelConfig) -> AimConfig:
        """See the base."""
        return AimConfig(model=model)

    def rows(self, config: AimModelConfig) -> list[Row]:
        """See the base."""
        whole = config.head.form == "transformer"
        block = block_rows(fused=False) if whole else [row for row in block_rows(False) if "attn" not in row.ours]
        return [
            *trunk_rows(_L3M, fused=False),
            *affine("head/projection", "head.decoder_projection"),
            *within(block, "head/blocks/", _HEAD_BLOCK),
            *norm("head/norm", "head.decoder_norm"),
            *affine("head/pixels", "head.decoder_pred"),
        ]

    def shapes(self, config: AimModelConfig) -> dict[str, Shape]:
        """See the base."""
        return module_shapes(config.build(jnp.float32), (1, *config.image.image_shape, 3))

    def constants(self, config: AimModelConfig) -> dict[str, np.ndarray]:
        """Both tables of positions."""
        grid = config.image.grid
        return {
            _POSITIONS: sincos_2d(grid, config.image.width)[None],
            _HEAD_POSITIONS: sincos_2d(grid, config.head.width)[None],
        }

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> AimModelConfig:
        """See the base."""
        image = read_trunk(tensors, _L3M, 1e-5, self.title)
        if _POSITIONS in tensors:
            count = tensors[_POSITIONS].shape[1]
            image = dataclasses.replace(image, **square_side(count, image.patch_size, {}, self.title))
        sizes: dict[str, Any] = block_sizes(tensors, _HEAD_BLOCK, "norm_1.weight", "mlp.fc1.weight", self.title)
        whole = f"{_HEAD_BLOCK}attn.proj.weight".format(layer=0) in tensors
        heads = heads_of_128(sizes["width"]) if whole else 1
        return AimModelConfig(image, PixelHeadConfig(**sizes, heads=heads, form="transformer" if whole else "mlp"))

    def claims(self, config: Any) -> bool:
        """Every trunk with a pixel head."""
        return isinstance(config, AimModelConfig)

    def write_config(self, config: AimModelConfig) -> dict[str, Any]:
        """There is no file, so everything must be as these models have it."""
        head, published = config.head, PixelHeadConfig()
        wanted: dict[str, tuple[Any, tuple[Any, ...]]]
        wanted = {f"head.{key}": (getattr(head, key), (getattr(published, key),)) for key in _HEAD_FORM}
        wanted["head.form"] = (head.form, ("mlp", "transformer"))
        wanted["head.identity_residual"] = (head.identity_residual or head.form == "transformer", (True,))
        if head.form == "transformer":
            wanted["head.heads"] = (head.heads, (head.width // HEAD_WIDTH,))
        check_expressible(self.title, wanted | published_form(config.image))
        return {}


def published_form(image: ViTConfig) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """What must be as in the authors' models: see `check_expressible`. Their two code bases differ in the eps."""
    published = aim_trunk(image.width, image.depth, image.width // HEAD_WIDTH)
    wanted = {f"image.{key}": (getattr(image, key), (getattr(published, key),)) for key in _FORM}
    return wanted | {"image.norm_eps": (image.norm_eps, (1e-5, 1e-6))}


def block_rows(fused: bool) -> list[Row]:
    """A block; query, key and value as one tensor or as three."""
    weights = [f"attn.qkv.weight#{i}/3" if fused else f"attn.{name[0]}_proj.weight" for i, name in enumerate(_PARTS)]
    return [
        *(Row(f"attn/{name}/kernel", w, "to_heads") for name, w in zip(_PARTS, weights, strict=True)),
        Row("attn/out/kernel", "attn.proj.weight", "from_heads"),
        Row("mlp/fc1/kernel", "mlp.fc1.weight", "linear"),
        Row("mlp/fc2/kernel", "mlp.fc2.weight", "linear"),
        *norm("ln_1", "norm_1"),
        *norm("ln_2", "norm_2"),
    ]


def trunk_rows(preprocessor: str, fused: bool) -> list[Row]:
    """The trunk, at `image/`; `preprocessor` is the prefix of what embeds the patches."""
    rows = [
        *affine("patch_embed", f"{preprocessor}.patchifier.proj", "conv"),
        *norm("patch_norm", f"{preprocessor}.patchifier.norm"),
        *within(block_rows(fused), "blocks/", _BLOCK),
        *norm("ln_post", "trunk.post_trunk_norm"),
    ]
    return within(rows, "image/", "")


def read_trunk(tensors: Tensors, preprocessor: str, norm_eps: float, what: str) -> ViTConfig:
    """The trunk that these tensors belong to, for images of 224 pixels."""
    sizes = block_sizes(tensors, _BLOCK, "norm_1.weight", "mlp.fc1.weight", what)
    trunk = aim_trunk(sizes["width"], sizes["depth"], heads_of_128(sizes["width"]), norm_eps=norm_eps)
    patch_size = shape_of(tensors, f"{preprocessor}.patchifier.proj.weight", what)[-1]
    return dataclasses.replace(trunk, mlp_dim=sizes["mlp_dim"], patch_size=patch_size)


# Our names of an attentive probe's parameters, as `vlm_jax.evals` trains them, and of the statistics of its norm.
_ATTENTIVE_HEAD = (
    Row("query", "head.cls_token", "one_token"),
    Row("key", "head.k.weight", "linear"),
    Row("value", "head.v.weight", "linear"),
    Row("classifier", "head.linear.weight", "linear"),
    Row("mean", "head.bn.running_mean", "same"),
    Row("variance", "head.bn.running_var", "same"),
)


def read_attentive_head(tensors: Tensors) -> dict[str, np.ndarray]:
    """The attentive head of a released model.

    Returns:
        fp32 "query" [D], "key" and "value" [D, D], "classifier" [D, C], and "mean" and "variance" [D] of the batch
        norm before them.

    Raises:
        ConversionError: a name is missing.
    """
    found = {row.ours: tensors.get(row.theirs) for row in _ATTENTIVE_HEAD}
    missing = [row.theirs for row in _ATTENTIVE_HEAD if found[row.ours] is None]
    if missing:
        raise ConversionError(f"these weights are no attentive head of AIM; missing names: {', '.join(missing)}")
    width = shape_of(tensors, "head.k.weight", "an attentive head of AIM")[:1]
    return {
        row.ours: LAYOUTS[row.layout].to_ours(np.asarray(found[row.ours], np.float32), width) for row in _ATTENTIVE_HEAD
    }


def write_attentive_head(head: Tensors, batches: int = 0) -> dict[str, np.ndarray]:
    """The inverse of `read_attentive_head`; `batches` is how many were seen, which the file holds too."""
    tensors = {row.theirs: np.asarray(LAYOUTS[row.layout].from_ours(head[row.ours])) for row in _ATTENTIVE_HEAD}
    return tensors | {"head.bn.num_batches_tracked": np.asarray(batches, np.int64)}


__all__ = [
    "HEAD_WIDTH",
    "AimBackbone",
    "L3mAim",
    "heads_of_128",
    "is_aim_trunk",
    "read_attentive_head",
    "trunk_rows",
    "write_attentive_head",
]
