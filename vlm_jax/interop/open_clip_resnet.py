"""The CLIP of OpenAI and open_clip whose image tower is a modified ResNet."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.interop.formats import is_two_tower
from vlm_jax.interop.open_clip import OpenClipFormat
from vlm_jax.interop.tables import ConversionError, Row, Tensors, affine, count_layers, norm, shape_of, to_heads, within
from vlm_jax.models.resnet import STRIDE, ResNetConfig
from vlm_jax.models.two_tower import TwoTowerConfig


def _convolution(i: str, convolution: str, batch_norm: str) -> list[Row]:
    """A convolution and the norm after it."""
    return [
        Row(f"conv{i}", f"{convolution}.weight", "conv"),
        *norm(f"bn{i}", batch_norm),
        Row(f"bn{i}/running_mean", f"{batch_norm}.running_mean", "same"),
        Row(f"bn{i}/running_variance", f"{batch_norm}.running_var", "same"),
    ]


class OpenClipResNet(OpenClipFormat):
    """CLIP with `visual.layer1` to `visual.layer4` and `visual.attnpool`."""

    title = "open_clip's ResNet CLIP"

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return "visual.attnpool.positional_embedding" in tensors

    def image_rows(self, config: TwoTowerConfig) -> list[Row]:
        """See the base."""
        image = _resnet(config)
        plain = [row for i in "123" for row in _convolution(i, f"conv{i}", f"bn{i}")]
        rows = within(plain, "image/stem/", "visual.")
        for stage, depth in enumerate(image.layers, start=1):
            for block in range(depth):
                shortcut = _convolution("_shortcut", "downsample.0", "downsample.1") if block == 0 else []
                rows += within(
                    [*plain, *shortcut], f"image/stage{stage}_block{block}/", f"visual.layer{stage}.{block}."
                )
        pool = [Row("pos_embed", "positional_embedding", "same")]
        for name in ("query", "key", "value"):
            pool += to_heads(name, f"{name[0]}_proj")
        rows += within(pool, "image/attn_pool/", "visual.attnpool.")
        return rows + affine("image/projection", "visual.attnpool.c_proj")

    def read_image(self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None) -> ResNetConfig:
        """See the base."""
        positions, channels = shape_of(tensors, "visual.attnpool.positional_embedding", self.title)
        side = round(np.sqrt(positions - 1)) * STRIDE
        if settings is None:
            heads = channels // 64
        else:
            section = settings["vision_cfg"]
            heads, wanted = channels // section.get("head_width", 64), section.get("image_size", 224)
            if wanted != side:
                raise ConversionError(
                    f"the attention pool is for images of {side}x{side}, not vision_cfg.image_size = {wanted} of the "
                    "config file"
                )
        one, two, three, four = (count_layers(tensors, f"visual.layer{i}.{{layer}}.conv1.weight") for i in range(1, 5))
        layers = (one, two, three, four)
        return ResNetConfig(image_size=side, layers=layers, width=channels // STRIDE, heads=heads)

    def claims(self, config: Any) -> bool:
        """A ResNet beside a text tower."""
        return is_two_tower(config) and isinstance(config.image, ResNetConfig)

    def write_image(self, config: TwoTowerConfig) -> dict[str, Any]:
        """See the base."""
        image = _resnet(config)
        return {
            "layers": list(image.layers),
            "width": image.width,
            "head_width": image.pooled_width // image.heads,
            "image_size": image.image_size,
        }


def _resnet(config: TwoTowerConfig) -> ResNetConfig:
    assert isinstance(config.image, ResNetConfig)
    return config.image


__all__ = ["OpenClipResNet"]
