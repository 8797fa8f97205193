"""SimMIM with a Swin tower as its authors store it, without a config file."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.interop.formats import Format, check_expressible
from vlm_jax.interop.layouts import Shape
from vlm_jax.interop.tables import (
    Row,
    Tensors,
    affine,
    count_layers,
    fused_attention,
    module_shapes,
    norm,
    shape_of,
    within,
)
from vlm_jax.models.masked_image_model import MaskedImageModel, MaskedImageModelConfig
from vlm_jax.models.swin import SwinConfig
from vlm_jax.models.windows import relative_index
from vlm_jax.objectives.simmim import SimMimConfig

_TABLE = "attn.relative_position_bias_table"
_HEAD_DIM = 32  # of every published Swin


class SwinSimMimFormat(Format):
    """What the formats of SimMIM around a Swin share."""

    preprocess = "imagenet"

    def objective(self, model: MaskedImageModelConfig) -> SimMimConfig:
        """See the base."""
        return SimMimConfig(model=model)

    def tower(self, config: MaskedImageModelConfig) -> SwinConfig:
        """The tower of a model that this claims."""
        assert isinstance(config.image, SwinConfig), "see `claims`"
        return config.image

    def claims(self, config: Any) -> bool:
        """SimMIM with a Swin tower."""
        return isinstance(config, MaskedImageModelConfig) and isinstance(config.image, SwinConfig)

    def shapes(self, config: MaskedImageModelConfig) -> dict[str, Shape]:
        """See the base."""
        module = MaskedImageModel(config)
        return module_shapes(module, (1, *config.image.image_shape, 3), (1, math.prod(config.cells)))


class SwinSimMim(SwinSimMimFormat):
    """`SimMIM` around `SwinTransformerForSimMIM` of the published code."""

    library, title = "official", "the authors' SimMIM of a Swin"

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return {"encoder.mask_token", f"encoder.layers.0.blocks.0.{_TABLE}", "decoder.0.weight"} <= tensors.keys()

    def rows(self, config: MaskedImageModelConfig) -> list[Row]:
        """See the base."""
        block = fused_attention("attn", "attn.qkv.weight", "attn.qkv.bias", "attn.proj")
        block += affine("mlp/fc1", "mlp.fc1") + affine("mlp/fc2", "mlp.fc2")
        block += norm("ln_1", "norm1") + norm("ln_2", "norm2") + [Row("position_bias/table", _TABLE, "same")]
        rows = [
            *affine("patch_embed", "patch_embed.proj", "conv"),
            *norm("patch_norm", "patch_embed.norm"),
            Row("mask_token", "mask_token", "one_token"),
            *swin_rows(self.tower(config), block, "layers"),
            *norm("ln_post", "norm"),
        ]
        return [*within(rows, "image/", "encoder."), *affine("decoder", "decoder.0", "pointwise")]

    def constants(self, config: MaskedImageModelConfig) -> dict[str, np.ndarray]:
        """The index into each table of offsets, and the mask of each block whose windows are shifted."""
        found: dict[str, np.ndarray] = {}
        for stage, (windows, depth) in enumerate(
            zip(self.tower(config).windows, self.tower(config).depths, strict=True)
        ):
            for block in range(depth):
                prefix = f"encoder.layers.{stage}.blocks.{block}."
                found[f"{prefix}attn.relative_position_index"] = relative_index(windows.side).astype(np.int64)
                if block % 2 and windows.shift:
                    found[f"{prefix}attn_mask"] = np.where(windows.mask(), 0.0, -100.0).astype(np.float32)
        return found

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> MaskedImageModelConfig:
        """See the base. The image's side is told by the masks of shifted windows, of which there is one each."""
        sizes = swin_sizes(tensors, "encoder.layers.{stage}.blocks.{layer}.", _TABLE, "mlp.fc1", self.title)
        patch_size = shape_of(tensors, "encoder.patch_embed.proj.weight", self.title)[-1]
        masks = shape_of(tensors, "encoder.layers.0.blocks.1.attn_mask", self.title)[0]
        side = math.isqrt(masks) * sizes["window"] * patch_size
        image = SwinConfig(**sizes, patch_size=patch_size, image_size=side, mask_token=True)
        return MaskedImageModelConfig(image, cell=min(32, side))

    def write_config(self, config: MaskedImageModelConfig) -> dict[str, Any]:
        """There is no file, so everything must be as these models have it."""
        image = self.tower(config)
        heads = tuple(max(1, width // _HEAD_DIM) for width in image.widths)
        wanted = {"image.heads": (image.heads, (heads,)), "image.mask_token": (image.mask_token, (True,))}
        wanted |= {"image.activation": (image.activation, ("gelu",)), "image.norm_eps": (image.norm_eps, (1e-5,))}
        side, window = image.grid[0], image.windows[0]
        wanted["image.image_size"] = (image.image_size, (side // window.side * window.side * image.patch_size,))
        check_expressible(self.title, wanted)
        return {}


def swin_rows(image: SwinConfig, block: list[Row], stages: str) -> list[Row]:
    """The stages of a Swin.

    Args:
        image: the tower.
        block: the rows of a block.
        stages: what the library calls the list of stages.
    """
    rows = []
    for stage in range(len(image.depths)):
        for name, number in (("regular", "{even}"), ("shifted", "{odd}")):
            rows += within(block, f"stage{stage + 1}/blocks/{name}/", f"{stages}.{stage}.blocks.{number}.")
        if stage + 1 < len(image.depths):
            merge = [*norm("ln", "norm"), Row("reduction/kernel", "reduction.weight", "linear")]
            rows += within(merge, f"merge{stage + 1}/", f"{stages}.{stage}.downsample.")
    return rows


def swin_sizes(tensors: Tensors, block: str, table: str, hidden: str, what: str) -> dict[str, Any]:
    """Width, depths, heads, window and MLP of a Swin from the shapes of its tensors.

    Args:
        tensors: under canonical names.
        block: prefix of a block's names, with `{stage}` and `{layer}`.
        table: the rest of the name of a table of offsets.
        hidden: the rest of the name of the first map of an MLP.
        what: title of the format.
    """
    depths = []
    while count := count_layers(tensors, block.replace("{stage}", str(len(depths))) + table):
        depths.append(count)
    firsts = [block.format(stage=stage, layer=0) for stage in range(len(depths))]
    tables = [shape_of(tensors, first + table, what) for first in firsts]
    mlp_dim, width = shape_of(tensors, f"{firsts[0]}{hidden}.weight", what)
    return {
        "width": width,
        "depths": tuple(depths),
        "heads": tuple(shape[1] for shape in tables),
        # The first stage is never smaller than a window, the last ones may be.
        "window": (math.isqrt(tables[0][0]) + 1) // 2,
        "mlp_ratio": mlp_dim / width,
    }


__all__ = ["SwinSimMim", "SwinSimMimFormat", "swin_rows", "swin_sizes"]
