"""DINOv2's encoder: its own code base's files, and Hugging Face's two classes, without and with registers.

The heads that it was trained with were not released; they belong to no format.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from vlm_jax.interop.formats import ImageTowerFormat, check_expressible, check_supported, square_side
from vlm_jax.interop.tables import (
    ConversionError,
    Row,
    Tensors,
    affine,
    count_layers,
    from_heads,
    fused_attention,
    norm,
    shape_of,
    to_heads,
    within,
    without_wrappers,
)
from vlm_jax.models.presets import dinov2
from vlm_jax.models.vit import ViTConfig

# transformers 5 in memory -> in its files
_LIVE = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.down_proj": "mlp.weights_out",
}
_RATIO = 4  # hidden width of a plain MLP over the width, in every published size


class Dinov2Format(ImageTowerFormat):
    """A DINOv2 under the names of one library.

    Attributes:
        names: what the library calls the leaves outside of the blocks.
        block: prefix of a block's names, with `{layer}`.
        gate: the name in a block of the gate and the value of a gated MLP, stored as one.
        out: the name in a block of the last map of a gated MLP.
    """

    names: Mapping[str, str]
    block: str
    gate: str
    out: str
    preprocess = "imagenet"

    def block_rows(self) -> list[Row]:
        """Attention, norms and layer scales of a block."""
        raise TypeError(f"{type(self).__name__} defines no block_rows")

    def mlp_rows(self, gated: bool) -> list[Row]:
        """The MLP of a block."""
        if not gated:
            return affine("mlp/fc1", "mlp.fc1") + affine("mlp/fc2", "mlp.fc2")
        rows = []
        for i, name in enumerate(("gate", "fc1")):
            rows += [
                Row(f"mlp/{name}/kernel", f"{self.gate}.weight#{i}/2", "linear"),
                Row(f"mlp/{name}/bias", f"{self.gate}.bias#{i}/2", "same"),
            ]
        return rows + affine("mlp/fc2", self.out)

    def rows(self, config: ViTConfig) -> list[Row]:
        """See the base; the tower's parameters lie under `image/`."""
        names = self.names
        rows = [
            Row("class_token", names["class_token"], "one_token"),
            Row("mask_token", names["mask_token"], "batch_of_one"),
            Row("pos_embed", names["pos_embed"], "batch_of_one"),
            *affine("patch_embed", names["patch_embed"], "conv"),
            *norm("ln_post", names["ln_post"]),
            *within([*self.block_rows(), *self.mlp_rows(config.gated)], "blocks/", self.block),
        ]
        if config.registers:
            rows.append(Row("registers", names["registers"], "batch_of_one"))
        return within(rows, "image/", "")

    def claims(self, config: Any) -> bool:
        """A ViT with layer scale, learned positions, a class token and a mask token."""
        if not isinstance(config, ViTConfig) or config.layer_scale_init is None:
            return False
        return config.pos_embed == "learned" and config.mask_token and config.class_token

    def read_sizes(self, tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What the shapes tell, as keys of a `ViTConfig`."""
        kernel = shape_of(tensors, f"{self.names['patch_embed']}.weight", self.title)
        positions = shape_of(tensors, self.names["pos_embed"], self.title)[1]
        first, gated = self.block.format(layer=0), f"{self.block.format(layer=0)}{self.gate}.weight" in tensors
        hidden = shape_of(tensors, f"{first}{self.gate}.weight" if gated else f"{first}mlp.fc1.weight", self.title)[0]
        registers = self.names["registers"]
        return {
            "width": kernel[0],
            "depth": count_layers(tensors, f"{self.block}norm1.weight"),
            "mlp_dim": hidden // 2 if gated else hidden,
            "gated": gated,
            "activation": "silu" if gated else "gelu",
            "registers": tensors[registers].shape[1] if registers in tensors else 0,
            **square_side(positions - 1, kernel[-1], settings, self.title),
        }

    def check(self, config: ViTConfig, **further: tuple[Any, tuple[Any, ...]]) -> None:
        """Raises `ConversionError` for a tower whose numbers this model could not give; see `check_expressible`."""
        hidden = dinov2(config.width, 1, swiglu=config.gated).mlp_dim
        check_expressible(
            self.title,
            {
                "pool": (config.pool, ("cls",)),
                "norm": (config.norm, ("layer",)),
                "patch_norm": (config.patch_norm, (False,)),
                "activation": (config.activation, ("silu" if config.gated else "gelu",)),
                "mlp_dim": (config.mlp_dim, (hidden,)),
                "image_size": (config.image_shape, ((max(config.image_shape),) * 2,)),
                **further,
            },
        )


def _config(sizes: Mapping[str, Any], **further: Any) -> ViTConfig:
    """A DINOv2 by what tells two of them apart."""
    like = dinov2(64, 1, registers=sizes["registers"])
    fixed = ("norm_eps", "layer_scale_init", "pos_resize", "mask_token", "pre_norm", "patch_bias", "init")
    return ViTConfig(**{key: getattr(like, key) for key in fixed} | dict(sizes) | further)


class OfficialDinov2(Dinov2Format):
    """The `dinov2_vit*14*_pretrain.pth` files, and the teacher's backbone in a checkpoint of that code base."""

    library, title = "official", "an official DINOv2"
    block, gate, out = "blocks.{layer}.", "mlp.w12", "mlp.w3"
    names = MappingProxyType(
        {
            "class_token": "cls_token",
            "mask_token": "mask_token",
            "pos_embed": "pos_embed",
            "registers": "register_tokens",
            "patch_embed": "patch_embed.proj",
            "ln_post": "norm",
        }
    )

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base; of a whole teacher the backbone, and blocks out of the chunks that they may be stored in."""
        tensors = without_wrappers(tensors)
        prefixes = [prefix for prefix in ("teacher.backbone.", "backbone.") if f"{prefix}cls_token" in tensors]
        if prefixes:
            tensors = {name.removeprefix(prefixes[0]): x for name, x in tensors.items() if name.startswith(prefixes[0])}
        return {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name): value for name, value in tensors.items()}

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return "mask_token" in tensors and "blocks.0.ls1.gamma" in tensors

    def block_rows(self) -> list[Row]:
        """See the base."""
        return [
            *fused_attention("attn", "attn.qkv.weight", "attn.qkv.bias", "attn.proj"),
            *norm("ln_1", "norm1"),
            *norm("ln_2", "norm2"),
            Row("layer_scale_1", "ls1.gamma", "same"),
            Row("layer_scale_2", "ls2.gamma", "same"),
        ]

    def read_config(self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None) -> ViTConfig:
        """See the base; heads are 64 wide unless the settings say `num_heads`."""
        sizes, settings = self.read_sizes(tensors, settings or {}), settings or {}
        if "num_heads" not in settings and sizes["width"] % 64:
            raise ConversionError(f"heads of {self.title} are 64 wide, and {sizes['width']} is no multiple of that")
        return _config(sizes, heads=settings.get("num_heads", sizes["width"] // 64))

    def write_config(self, config: ViTConfig) -> dict[str, Any]:
        """See the base. There is no file, so everything must be as these models have it."""
        heads, eps = (config.heads, (config.width // 64,)), (config.norm_eps, (1e-6,))
        self.check(config, heads=heads, norm_eps=eps)
        return {}


class HfDinov2(Dinov2Format):
    """Dinov2Model and Dinov2WithRegistersModel of transformers, under the names of their files.

    In memory, from version 5 on, some tensors have other names; both are read.
    """

    library, title = "hf", "a Hugging Face DINOv2"
    block, gate, out = "encoder.layer.{layer}.", "mlp.weights_in", "mlp.weights_out"
    names = MappingProxyType(
        {
            "class_token": "embeddings.cls_token",
            "mask_token": "embeddings.mask_token",
            "pos_embed": "embeddings.position_embeddings",
            "registers": "embeddings.register_tokens",
            "patch_embed": "embeddings.patch_embeddings.projection",
            "ln_post": "layernorm",
        }
    )

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base."""
        plain = {name.removeprefix("dinov2."): value for name, value in without_wrappers(tensors).items()}
        renamed = {}
        for name, value in plain.items():
            filed = name
            for live, in_file in _LIVE.items():
                filed = filed.replace(live, in_file)
            if "mlp.gate_proj" in name:
                both = [value, plain[name.replace("gate_proj", "up_proj")]]
                renamed[name.replace("gate_proj", "weights_in")] = np.concatenate(both)
            elif "mlp.up_proj" not in name:
                renamed[filed] = value
        return renamed

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return "embeddings.mask_token" in tensors and "encoder.layer.0.layer_scale1.lambda1" in tensors

    def block_rows(self) -> list[Row]:
        """See the base."""
        rows = []
        for name in ("query", "key", "value"):
            rows += to_heads(f"attn/{name}", f"attention.attention.{name}")
        return [
            *rows,
            *from_heads("attn/out", "attention.output.dense"),
            *norm("ln_1", "norm1"),
            *norm("ln_2", "norm2"),
            Row("layer_scale_1", "layer_scale1.lambda1", "same"),
            Row("layer_scale_2", "layer_scale2.lambda1", "same"),
        ]

    def read_config(self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None) -> ViTConfig:
        """See the base; positions of the model without registers are resized as the library does it."""
        if settings is None:
            raise ConversionError(f"{self.title} needs its config.json beside the weights: it tells the heads")
        check_supported("config", settings, {"qkv_bias": True, "hidden_act": "gelu", "num_channels": 3})
        sizes = self.read_sizes(tensors, {"image_size": 224} | dict(settings))
        further = {} if sizes["registers"] else {"pos_resize": "bicubic"}
        heads, eps = settings.get("num_attention_heads", 12), settings.get("layer_norm_eps", 1e-6)
        return _config(sizes, heads=heads, norm_eps=eps, **further)

    def write_config(self, config: ViTConfig) -> dict[str, Any]:
        """See the base."""
        self.check(config)
        registers = {"num_register_tokens": config.registers} if config.registers else {}
        return {
            "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
            "model_type": "dinov2_with_registers" if registers else "dinov2",
            "hidden_size": config.width,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.heads,
            "mlp_ratio": _RATIO,
            "hidden_act": "gelu",
            "layer_norm_eps": config.norm_eps,
            "image_size": config.image_shape[0],
            "patch_size": config.patch_size,
            "num_channels": 3,
            "qkv_bias": True,
            "layerscale_value": config.layer_scale_init,
            "use_swiglu_ffn": config.gated,
            **registers,
        }


__all__ = ["HfDinov2", "OfficialDinov2"]
