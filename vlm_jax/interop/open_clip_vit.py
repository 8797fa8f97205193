"""The vision transformer of OpenAI and open_clip, and the CLIP around it."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.interop.formats import check_expressible, check_supported, heads_of_64, is_two_tower, square_side
from vlm_jax.interop.open_clip import LAYERS, OpenClipFormat, block_rows, read_tower, tower_sizes, write_tower
from vlm_jax.interop.tables import ConversionError, Row, Tensors, norm, shape_of, within
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.models.vit import ViTConfig

_POOLS = {"cls": "tok", "mean": "avg"}
# Settings that names and shapes do not show, with the one value that our towers compute.
_COMPUTED = {"final_ln_after_pool": False, "pos_embed_type": "learnable"}


class OpenClipViT(OpenClipFormat):
    """CLIP with `visual.conv1` and `visual.transformer`."""

    title = "open_clip's CLIP"

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        own = {"visual.class_embedding", "visual.proj", "token_embedding.weight"} <= tensors.keys()
        return own and "text_decoder.ln_final.weight" not in tensors

    def image_rows(self, config: TwoTowerConfig) -> list[Row]:
        """See the base."""
        return [
            *vit_rows("image", _vit(config)),
            *norm("image/ln_post", "visual.ln_post"),
            Row("image/projection/kernel", "visual.proj", "same"),
        ]

    def read_image(self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None) -> ViTConfig:
        """See the base."""
        pool = (settings or {}).get("vision_cfg", {}).get("pool_type", "tok")
        pools: dict[str, Any] = {theirs: ours for ours, theirs in _POOLS.items()}
        if pool not in pools:
            raise ConversionError(
                f"vision_cfg.pool_type = {pool!r} of the config file is not supported, only {list(pools)}"
            )
        check_supported("vision_cfg", (settings or {}).get("vision_cfg", {}), {"attentional_pool": False})
        return ViTConfig(**read_vit(tensors, settings, activation, self.title), pool=pools[pool])

    def claims(self, config: Any) -> bool:
        """Everything with a vision transformer that no other format of the library claims."""
        return is_two_tower(config)

    def write_image(self, config: TwoTowerConfig) -> dict[str, Any]:
        """See the base."""
        image = _vit(config)
        check_expressible(self.title, {"image.pool": (image.pool, tuple(_POOLS))})
        pool = {} if image.pool == "cls" else {"pool_type": _POOLS[image.pool]}
        return write_vit(image, config.text.activation, self.title) | pool


def vit_rows(ours: str, image: ViTConfig) -> list[Row]:
    """The tower from the patches to the last block."""
    rows = [
        Row("patch_embed/kernel", "conv1.weight", "conv"),
        Row("class_token", "class_embedding", "same"),
        Row("pos_embed", "positional_embedding", "same"),
        *(norm("ln_pre", "ln_pre") if image.pre_norm else []),
        *block_rows("blocks", LAYERS),
    ]
    return within(rows, f"{ours}/", "visual.")


def read_vit(tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None, what: str) -> dict[str, Any]:
    """What a `ViTConfig` says of the tower up to the last block; `settings` are those of the whole model."""
    image = tower_sizes(tensors, "visual.", what)
    section: Mapping[str, Any] = {}
    if settings is None:
        image |= {"heads": heads_of_64(image["width"])[0], "activation": activation}
    else:
        section = {"image_size": 224, "head_width": 64} | settings["vision_cfg"]
        check_supported("vision_cfg", section, _COMPUTED)
        image |= read_tower(settings, "vision_cfg", activation)
        image |= {"heads": image["width"] // section["head_width"], "pre_norm": not section.get("no_ln_pre", False)}
    patch_size = shape_of(tensors, "visual.conv1.weight", what)[-1]
    positions = shape_of(tensors, "visual.positional_embedding", what)[0] - 1
    return image | square_side(positions, patch_size, section, what)


def write_vit(image: ViTConfig, text_activation: str, title: str) -> dict[str, Any]:
    """The inverse of `read_vit`; one flag of the file, by which the GELU is exact or not, speaks of both towers."""
    known = {"quick_gelu"} if text_activation == "quick_gelu" else {"gelu", "gelu_tanh"}
    check_expressible(
        title,
        {
            "image.registers": (image.registers, (0,)),
            "image.activation": (image.activation, tuple(sorted(known))),
        },
    )
    return {
        **write_tower(image),
        "head_width": image.width // image.heads,
        "patch_size": image.patch_size,
        "image_size": image.image_size,
        **({} if image.pre_norm else {"no_ln_pre": True}),
    }


def _vit(config: TwoTowerConfig) -> ViTConfig:
    if not isinstance(config.image, ViTConfig):
        raise ConversionError(f"open_clip has no image tower of the kind {config.image.kind()!r} in a two-tower model")
    return config.image


__all__ = ["OpenClipViT", "read_vit", "vit_rows", "write_vit"]
