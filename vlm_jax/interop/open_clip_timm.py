"""open_clip's SigLIP: its own text tower beside an image tower of timm."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.interop.formats import block_sizes, check_expressible, square_side
from vlm_jax.interop.hf_siglip import check_siglip, claims_siglip
from vlm_jax.interop.open_clip import OpenClipFormat
from vlm_jax.interop.tables import (
    ConversionError,
    Row,
    Tensors,
    affine,
    from_heads,
    fused_attention,
    norm,
    shape_of,
    split_to_heads,
    to_heads,
    within,
)
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.models.vit import ViTConfig

_TRUNK = "visual.trunk."
_BLOCK = _TRUNK + "blocks.{layer}."
# width, depth, heads, MLP by the size in a model's name
_SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
# size, patch -> image sizes of timm's models with the exact GELU, and with its tanh form. The name alone decides it:
# open_clip's settings have no key for the activation of a timm model.
_EXACT = {("base", 16): (224, 256, 384, 512), ("large", 16): (256, 384), ("so400m", 14): (224, 378, 384)}
_TANH = {
    ("base", 32): (256,),
    ("large", 16): (512,),
    ("so400m", 16): (256, 384, 512),
    ("giantopt", 16): (256, 384),
}
# name -> size, patch, image size, activation
MODELS = {
    f"vit_{size}_patch{patch}_siglip_{side}": (size, patch, side, activation)
    for activation, table in (("gelu", _EXACT), ("gelu_tanh", _TANH))
    for (size, patch), sides in table.items()
    for side in sides
}
_COMPUTED = {"timm_pool": "map", "timm_proj": "none"}


class OpenClipTimmSiglip(OpenClipFormat):
    """CustomTextCLIP with `visual.trunk`, a vision transformer that pools by attention."""

    title = "open_clip's SigLIP"

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return f"{_TRUNK}attn_pool.latent" in tensors

    def published(self, tensors: Tensors) -> Tensors:
        """See the base."""
        own = ("visual.", "logit_")
        return {name if name.startswith(own) else f"text.{name}": value for name, value in tensors.items()}

    def image_rows(self, config: TwoTowerConfig) -> list[Row]:
        """See the base."""
        block = fused_attention("attn", "attn.qkv.weight", "attn.qkv.bias", "attn.proj")
        block += affine("mlp/fc1", "mlp.fc1") + affine("mlp/fc2", "mlp.fc2")
        block += norm("ln_1", "norm1") + norm("ln_2", "norm2")
        head = [Row("probe", "latent", "batch_of_one"), *to_heads("attn/query", "q")]
        for i, name in enumerate(("key", "value")):
            head += split_to_heads(f"attn/{name}", f"kv.weight#{i}/2", f"kv.bias#{i}/2")
        head += from_heads("attn/out", "proj") + norm("ln", "norm")
        head += affine("mlp/fc1", "mlp.fc1") + affine("mlp/fc2", "mlp.fc2")
        return [
            *affine("image/patch_embed", f"{_TRUNK}patch_embed.proj", "conv"),
            Row("image/pos_embed", f"{_TRUNK}pos_embed", "batch_of_one"),
            *within(block, "image/blocks/", _BLOCK),
            *norm("image/ln_post", f"{_TRUNK}norm"),
            *within(head, "image/map_head/", f"{_TRUNK}attn_pool."),
        ]

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> TwoTowerConfig:
        """See the base."""
        if settings is None:
            raise ConversionError(
                f"{self.title} needs its open_clip_config.json beside the weights: it tells heads and activation"
            )
        return super().read_config(tensors, settings, activation)

    def joint(self, tensors: Tensors) -> dict[str, Any]:
        """See the base."""
        return {"projection": "text"}

    def read_image(self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None) -> ViTConfig:
        """See the base."""
        section: Mapping[str, Any] = (settings or {})["vision_cfg"]
        name = section.get("timm_model_name")
        if name not in MODELS:
            raise ConversionError(
                f"vision_cfg.timm_model_name = {name!r} of the config file is none of {', '.join(MODELS)}"
            )
        for key, value in _COMPUTED.items():
            if section.get(key) != value:
                raise ConversionError(f"vision_cfg.{key} = {section.get(key)!r} of the config file must be {value!r}")
        size, *_, found = MODELS[name]
        image = block_sizes(tensors, _BLOCK, "norm1.weight", "mlp.fc1.bias", self.title)
        patch_size = shape_of(tensors, f"{_TRUNK}patch_embed.proj.weight", self.title)[-1]
        positions = shape_of(tensors, f"{_TRUNK}pos_embed", self.title)[1]
        return ViTConfig(
            **image,
            **square_side(positions, patch_size, section, self.title),
            heads=_SIZES[size][2],
            activation=activation or found,  # pyright: ignore[reportArgumentType] - checked by the caller
            norm_eps=1e-6,
            pool="map",
            class_token=False,
            pre_norm=False,
            patch_bias=True,
            init="siglip",
        )

    def claims(self, config: Any) -> bool:
        """A tower that pools by attention, and a bias on the logits."""
        return claims_siglip(config)

    def write_config(self, config: TwoTowerConfig) -> dict[str, Any]:
        """See the base."""
        return super().write_config(config) | {"custom_text": True}

    def write_image(self, config: TwoTowerConfig) -> dict[str, Any]:
        """See the base."""
        image = check_siglip(self.title, config)
        sizes = (image.width, image.depth, image.heads, image.mlp_dim)
        wanted = (image.patch_size, image.image_size, image.activation)
        names = [name for name, (size, *rest) in MODELS.items() if _SIZES[size] == sizes and tuple(rest) == wanted]
        if not names:
            raise ConversionError(
                f"{self.title} takes its image tower from timm, which has none with width, depth, heads, MLP = {sizes} "
                f"and patch, image size, activation = {wanted}; export with --family=hf"
            )
        check_expressible(self.title, {"image.norm_eps": (image.norm_eps, (1e-6,))})
        return {
            "image_size": image.image_size,
            "timm_model_name": names[0],
            "timm_model_pretrained": False,
            **_COMPUTED,
        }


__all__ = ["MODELS", "OpenClipTimmSiglip"]
