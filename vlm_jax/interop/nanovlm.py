"""nanoVLM's own files: a folder of config.json and model.safetensors."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.data.chat_config import NANOVLM
from vlm_jax.interop.formats import block_sizes, check_expressible, check_supported
from vlm_jax.interop.tables import (
    ConversionError,
    Row,
    Tensors,
    affine,
    count_layers,
    fused_attention,
    norm,
    shape_of,
    within,
    without_wrappers,
)
from vlm_jax.interop.vision_language import DECODER, VisionLanguageFormat, joined_tables
from vlm_jax.models.decoder import DecoderConfig
from vlm_jax.models.language_model import LanguageModelConfig
from vlm_jax.models.projector import PixelShuffleConfig
from vlm_jax.models.rotary import PlainRope
from vlm_jax.models.vision_language import VisionLanguageConfig
from vlm_jax.models.vit import ViTConfig

_BLOCK, _DECODER_BLOCK = "vision_encoder.blocks.{layer}.", "decoder.blocks.{layer}."
_EMBED, _HEAD, _POSITIONS = (
    "decoder.token_embedding.weight",
    "decoder.head.weight",
    "vision_encoder.patch_embedding.position_embedding",
)
# The decoder's names in transformers -> here.
_SPELLINGS = (
    (r"^model\.layers\.", "decoder.blocks."),
    (r"self_attn\.o_proj", "attn.out_proj"),
    (r"self_attn\.", "attn."),
    (r"input_layernorm", "norm1"),
    (r"post_attention_layernorm", "norm2"),
    (r"^model\.embed_tokens", "decoder.token_embedding"),
    (r"^model\.norm", "decoder.norm"),
    (r"^lm_head", "decoder.head"),
)


class NanoVlm(VisionLanguageFormat):
    """A SigLIP, a pixel shuffle with a matrix, and a decoder of Llama's form whose head is tied."""

    library, title, preprocess = "official", "nanoVLM's own files", "unit"
    conversations = NANOVLM

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base; of the two names of the tied table one is stored."""
        named = {name: x for name, x in without_wrappers(tensors).items() if not name.endswith("inv_freq")}
        if _HEAD in named and (_EMBED not in named or np.array_equal(named[_HEAD], named[_EMBED])):
            named[_EMBED] = named.pop(_HEAD)
        return named

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return {"MP.proj.weight", _POSITIONS, _EMBED} <= tensors.keys()

    def rows(self, config: VisionLanguageConfig) -> list[Row]:
        """See the base."""
        block = fused_attention("attn", "attn.qkv_proj.weight", "attn.qkv_proj.bias", "attn.out_proj")
        block += affine("mlp/fc1", "mlp.fc1") + affine("mlp/fc2", "mlp.fc2") + norm("ln_1", "ln1") + norm("ln_2", "ln2")
        rows = within(block, "image/blocks/", _BLOCK)
        rows += affine("image/patch_embed", "vision_encoder.patch_embedding.conv", "conv")
        rows.append(Row("image/pos_embed", _POSITIONS, "batch_of_one"))
        rows += norm("image/ln_post", "vision_encoder.layer_norm")
        rows.append(Row("projector/fc1/kernel", "MP.proj.weight", "linear"))
        for row in DECODER.rows(LanguageModelConfig(config.decoder)):
            # What transformers calls added rows is joined by its own rule.
            added = row.theirs.endswith(".added")
            rows.append(row if added else Row(row.ours, _respelt(row.theirs), row.layout))
        return rows

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> VisionLanguageConfig:
        """See the base."""
        if settings is None:
            raise ConversionError(f"{self.title} need their config.json beside the weights: it tells the heads")
        check_supported("config.json: ", settings, {"vit_cls_flag": False, "lm_tie_weights": True})
        sizes = block_sizes(tensors, _BLOCK, "ln1.weight", "mlp.fc1.bias", self.title)
        image = ViTConfig(
            **sizes,
            heads=settings.get("vit_n_heads", 12),
            patch_size=shape_of(tensors, "vision_encoder.patch_embedding.conv.weight", self.title)[-1],
            image_size=settings["vit_img_size"],
            norm_eps=settings.get("vit_ln_eps", 1e-6),
            **_TOWER,
        )
        rows, width = shape_of(tensors, _EMBED, self.title)
        decoder = DecoderConfig(
            width=width,
            depth=count_layers(tensors, f"{_DECODER_BLOCK}norm1.weight"),
            heads=settings["lm_n_heads"],
            kv_heads=settings["lm_n_kv_heads"],
            mlp_dim=shape_of(tensors, f"{_DECODER_BLOCK.format(layer=0)}mlp.up_proj.weight", self.title)[0],
            norm_eps=settings.get("lm_rms_eps", 1e-5),
            vocab_size=rows,
            rope=PlainRope(theta=float(settings.get("lm_re_base", 100_000))),
            max_length=settings.get("lm_max_position_embeddings", 8192),
            init="smollm",
        )
        return VisionLanguageConfig(
            image=image, projector=PixelShuffleConfig(factor=settings["mp_pixel_shuffle_factor"]), decoder=decoder
        )

    def claims(self, config: Any) -> bool:
        """A pixel shuffle."""
        return super().claims(config) and isinstance(config.projector, PixelShuffleConfig)

    def published(self, tensors: Tensors) -> Tensors:
        """See the base."""
        named = dict(tensors)
        named["model.embed_tokens.weight"] = named.pop(_EMBED)
        named = joined_tables(named, "")
        named[_EMBED] = named.pop("model.embed_tokens.weight")
        return named

    def write_config(self, config: VisionLanguageConfig) -> dict[str, Any]:
        """See the base."""
        image, decoder, projector = config.image, config.decoder, config.projector
        assert isinstance(projector, PixelShuffleConfig), "claimed"
        wanted = {f"image.{key}": (getattr(image, key), (value,)) for key, value in _TOWER.items() if key != "init"}
        form = {"activation": "silu", "norm": "rms", "qkv_bias": False, "out_bias": False, "mlp_bias": False}
        form |= {"gated": True, "tied": True, "scaled_embeddings": False, "layer_scale_init": None}
        wanted |= {f"decoder.{key}": (getattr(decoder, key), (value,)) for key, value in form.items()}
        wanted |= {"layer": (config.layer, (None,)), "newline": (config.newline, (False,))}
        wanted["decoder.rope"] = (decoder.rope.kind(), (PlainRope.kind(),))
        wanted["decoder.head_dim"] = (decoder.head_width, (decoder.width // decoder.heads,))
        wanted["image.image_size"] = (image.image_shape[0], (image.image_shape[1],))
        check_expressible(self.title, wanted)
        return {
            "vit_hidden_dim": image.width,
            "vit_inter_dim": image.mlp_dim,
            "vit_patch_size": image.patch_size,
            "vit_img_size": image.image_shape[0],
            "vit_n_heads": image.heads,
            "vit_n_blocks": image.depth,
            "vit_ln_eps": image.norm_eps,
            "vit_cls_flag": False,
            "lm_hidden_dim": decoder.width,
            "lm_inter_dim": decoder.mlp_dim,
            "lm_rms_eps": decoder.norm_eps,
            "lm_re_base": decoder.rope.theta,
            "lm_max_position_embeddings": decoder.max_length,
            "lm_base_vocab_size": decoder.vocab_size,
            "extra_token_amount": decoder.extra_tokens,
            "lm_vocab_size": decoder.table_size,
            "lm_n_heads": decoder.heads,
            "lm_n_kv_heads": decoder.kv_heads or decoder.heads,
            "lm_n_blocks": decoder.depth,
            "lm_tie_weights": True,
            "mp_pixel_shuffle_factor": projector.factor,
            "mp_image_token_length": config.tile_tokens,
        }


_TOWER: dict[str, Any] = {
    "activation": "gelu_tanh",
    "pool": "none",
    "class_token": False,
    "registers": 0,
    "pre_norm": False,
    "post_norm": True,
    "patch_bias": True,
    "init": "siglip",
}


def _respelt(name: str) -> str:
    for pattern, replacement in _SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


__all__ = ["NanoVlm"]
