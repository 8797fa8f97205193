"""AIMv2's encoders: the authors' files (ml-aim; the Hub's too), and Hugging Face's Aimv2VisionModel."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax.interop.aim import HEAD_WIDTH, heads_of_128, is_aim_trunk
from vlm_jax.interop.formats import ImageTowerFormat, block_sizes, check_expressible, check_supported, square_side
from vlm_jax.interop.tables import ConversionError, Row, Tensors, affine, shape_of, within
from vlm_jax.models.aimv2 import aimv2_encoder
from vlm_jax.models.vit import ViTConfig

_BLOCK, _HF_BLOCK = "trunk.blocks.{layer}.", "encoder.layers.{layer}."
_POSITIONS, _HF_POSITIONS = "preprocessor.pos_embed", "embeddings.position_embedding.weight"
# What all published encoders have in common.
_FORM = ("pool", "class_token", "registers", "patch_norm", "mask_token", "pre_norm", "post_norm", "patch_bias")
_FORM += ("gated", "norm", "qkv_bias", "out_bias", "mlp_bias", "layer_scale_init", "activation")
# The library writes only what differs from its defaults.
_DEFAULTS = {"image_size": 224, "num_attention_heads": 8, "rms_norm_eps": 1e-5, "is_native": False, "use_head": True}
_COMPUTED = {"hidden_act": "silu", "qkv_bias": False, "mlp_bias": False, "num_channels": 3}


class Aimv2Format(ImageTowerFormat):
    """What both formats share."""

    def claims(self, config: Any) -> bool:
        """A trunk with RMS norms, one of them on its patches, and without a class token."""
        return is_aim_trunk(config, "rms")

    def check(self, config: ViTConfig, more: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> None:
        """Raises `ConversionError` for an encoder that is not of the published form."""
        published = aimv2_encoder(config.width, config.depth, config.heads, config.mlp_dim)
        wanted: dict[str, tuple[Any, tuple[Any, ...]]]
        wanted = {f"image.{key}": (getattr(config, key), (getattr(published, key),)) for key in _FORM}
        wanted["image.pos_embed"] = (config.pos_embed, ("learned", "sincos"))
        check_expressible(self.title, {**wanted, **more})


class Aimv2(Aimv2Format):
    """The encoder as its authors store it, without a config file that we need."""

    library, title = "official", "the authors' AIMv2"

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return {"preprocessor.patchifier.norm.weight", "trunk.blocks.0.mlp.fc3.weight"} <= tensors.keys()

    def rows(self, config: ViTConfig) -> list[Row]:
        """See the base."""
        fused = [f"attn.qkv.weight#{i}/3" for i in range(3)]
        block = [
            *fused,
            "attn.proj.weight",
            *(f"mlp.{name}.weight" for name in ("fc1", "fc3", "fc2")),
            "norm_1",
            "norm_2",
        ]
        ends = ("preprocessor.patchifier.proj", "preprocessor.patchifier.norm", "trunk.post_trunk_norm")
        positions = [Row("image/pos_embed", _POSITIONS, "batch_of_one")]
        return encoder_rows(ends, _BLOCK, block) + (positions if config.pos_embed == "learned" else [])

    def read_config(self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None) -> ViTConfig:
        """See the base. Without a table of positions it is a model of native resolution, of any grid."""
        sizes: dict[str, Any] = block_sizes(tensors, _BLOCK, "norm_1.weight", "mlp.fc1.weight", self.title)
        encoder = aimv2_encoder(**sizes, heads=heads_of_128(sizes["width"]))
        patch_size = shape_of(tensors, "preprocessor.patchifier.proj.weight", self.title)[-1]
        if _POSITIONS not in tensors:
            return dataclasses.replace(encoder, patch_size=patch_size, pos_embed="sincos")
        return dataclasses.replace(encoder, **square_side(tensors[_POSITIONS].shape[1], patch_size, {}, self.title))

    def write_config(self, config: ViTConfig) -> dict[str, Any]:
        """There is no file, so everything must be as these models have it."""
        heads = (config.heads, (config.width // HEAD_WIDTH,))
        self.check(config, {"image.norm_eps": (config.norm_eps, (1e-5,)), "image.heads": heads})
        return {}


class HfAimv2(Aimv2Format):
    """Aimv2VisionModel of transformers, without a pooling head."""

    library, title = "hf", "a Hugging Face AIMv2 encoder"

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return {"embeddings.rms_norm.weight", "encoder.layers.0.ffn.gate_proj.weight"} <= tensors.keys()

    def rows(self, config: ViTConfig) -> list[Row]:
        """See the base."""
        attention = [f"attention.{name}_proj.weight" for name in ("q", "k", "v", "out")]
        block = [*attention, *(f"ffn.{name}_proj.weight" for name in ("gate", "up", "down")), "rms_norm1", "rms_norm2"]
        ends = ("embeddings.patch_embed", "embeddings.rms_norm", "rms_norm")
        positions = [Row("image/pos_embed", _HF_POSITIONS, "same")]
        return encoder_rows(ends, _HF_BLOCK, block) + (positions if config.pos_embed == "learned" else [])

    def read_config(self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None) -> ViTConfig:
        """See the base."""
        if settings is None:
            raise ConversionError(f"{self.title} needs its config.json beside the weights: it tells the heads")
        check_supported("config.json: ", settings, _COMPUTED)
        known = {**_DEFAULTS, **settings}
        if known["use_head"]:
            raise ConversionError(
                "config.json: use_head = true, as in the models tuned with a text tower, is not supported: the tower "
                "here has no pooling head; only encoders with use_head = false can be imported"
            )
        sizes: dict[str, Any] = block_sizes(tensors, _HF_BLOCK, "rms_norm1.weight", "ffn.gate_proj.weight", self.title)
        encoder = aimv2_encoder(**sizes, heads=known["num_attention_heads"])
        patch_size = shape_of(tensors, "embeddings.patch_embed.weight", self.title)[-1]
        count = (known["image_size"] // patch_size) ** 2 if known["is_native"] else tensors[_HF_POSITIONS].shape[0]
        return dataclasses.replace(
            encoder,
            norm_eps=known["rms_norm_eps"],
            pos_embed="sincos" if known["is_native"] else "learned",
            **square_side(count, patch_size, known, self.title),
        )

    def write_config(self, config: ViTConfig) -> dict[str, Any]:
        """See the base."""
        height, width = config.image_shape
        self.check(config, {"image.image_size": ((height, width), ((height, height),))})
        return {
            "architectures": ["Aimv2VisionModel"],
            "model_type": "aimv2_vision_model",
            "hidden_size": config.width,
            "intermediate_size": config.mlp_dim,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.heads,
            "rms_norm_eps": config.norm_eps,
            "image_size": height,
            "patch_size": config.patch_size,
            "is_native": config.pos_embed == "sincos",
            "use_head": False,
            **_COMPUTED,
        }


_LEAVES = tuple((f"attn/{name}/kernel", "to_heads") for name in ("query", "key", "value"))
_LEAVES += (("attn/out/kernel", "from_heads"), *((f"mlp/{name}/kernel", "linear") for name in ("gate", "fc1", "fc2")))


def encoder_rows(ends: tuple[str, str, str], block: str, names: Sequence[str]) -> list[Row]:
    """The encoder but for its positions, at `image/`.

    Args:
        ends: their names of the convolution of patches, and of the norms after it and after the last block.
        block: prefix of a block's names, with `{layer}`.
        names: in a block, of query, key, value, output, gate, the other first matrix of the MLP, its last, both norms.
    """
    rows = [Row(ours, theirs, layout) for (ours, layout), theirs in zip(_LEAVES, names[:-2], strict=True)]
    rows += [Row(f"ln_{i}/scale", f"{theirs}.weight", "same") for i, theirs in enumerate(names[-2:], 1)]
    patches, patch_norm, last_norm = ends
    return [
        *affine("image/patch_embed", patches, "conv"),
        Row("image/patch_norm/scale", f"{patch_norm}.weight", "same"),
        *within(rows, "image/blocks/", block),
        Row("image/ln_post/scale", f"{last_norm}.weight", "same"),
    ]


__all__ = ["Aimv2", "HfAimv2"]
