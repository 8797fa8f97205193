"""Hugging Face's BeitForMaskedImageModeling: BEiT before fine-tuning."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.interop.beit import BeitFormat, masked_model
from vlm_jax.interop.formats import block_sizes, check_expressible, check_supported
from vlm_jax.interop.hf import read_tower, write_tower
from vlm_jax.interop.hf_vit_mae import renamed, vit_block_rows
from vlm_jax.interop.tables import ConversionError, Row, Tensors, affine, norm, shape_of, within, without_wrappers
from vlm_jax.models.beit import BeitModelConfig, beit_encoder

_EMBEDDINGS, _BLOCK = "beit.embeddings.", "beit.encoder.layer.{layer}."
_TABLE = "beit.encoder.relative_position_bias.relative_position_bias_table"
# The names of the Hub; transformers 5 calls the live parameters otherwise.
_SPELLINGS = (
    (r"^beit\.layers\.", "beit.encoder.layer."),
    (r"^beit\.shared_position_bias\.", "beit.encoder.relative_position_bias."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
# What the library writes only where it differs.
_DEFAULTS: dict[str, Any] = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "num_attention_heads": 12,
    "image_size": 224,
    "layer_scale_init_value": 0.1,
    "drop_path_rate": 0.1,
}
# The library's own defaults are of a model with other positions and without a mask token.
_FORM = {
    "use_mask_token": True,
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": True,
    "use_mean_pooling": True,  # else there are two norms after the last block
    "num_channels": 3,
    "model_type": "beit",
}


class HfBeit(BeitFormat):
    """BeitForMaskedImageModeling of transformers."""

    library, title = "hf", "a Hugging Face BEiT"

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base. Older files also hold which row of the table stands for which pair of tokens."""
        named = renamed(without_wrappers(tensors), _SPELLINGS)
        return {name: value for name, value in named.items() if not name.endswith("relative_position_index")}

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return {f"{_EMBEDDINGS}mask_token", _TABLE, "lm_head.weight"} <= tensors.keys()

    def rows(self, config: BeitModelConfig) -> list[Row]:
        """See the base."""
        block = [row for row in vit_block_rows() if row.ours != "attn/key/bias"]
        block += [Row(f"layer_scale_{i}", f"lambda_{i}", "same") for i in (1, 2)]
        return [
            *affine("image/patch_embed", f"{_EMBEDDINGS}patch_embeddings.projection", "conv"),
            Row("image/class_token", f"{_EMBEDDINGS}cls_token", "one_token"),
            Row("image/mask_token", f"{_EMBEDDINGS}mask_token", "one_token"),
            Row("image/relative_position/table", _TABLE, "same"),
            *within(block, "image/blocks/", _BLOCK),
            *norm("image/ln_post", "layernorm"),
            *affine("head", "lm_head"),
        ]

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> BeitModelConfig:
        """See the base."""
        if settings is None:
            raise ConversionError(f"{self.title} needs its config.json beside the weights: it tells the eps of norms")
        check_supported("config.json: ", settings, _FORM)
        settings = {**_DEFAULTS, **settings}
        sizes: dict[str, Any] = block_sizes(
            tensors, _BLOCK, "layernorm_before.weight", "intermediate.dense.bias", self.title
        )
        patch_size = shape_of(tensors, f"{_EMBEDDINGS}patch_embeddings.projection.weight", self.title)[-1]
        size = settings["image_size"]
        more: dict[str, Any] = {"image_size": size if isinstance(size, int) else tuple(size)}
        more |= {"layer_scale_init": settings["layer_scale_init_value"], "drop_path": settings["drop_path_rate"]}
        encoder = beit_encoder(sizes["width"], sizes["depth"], 1, patch_size)
        image = dataclasses.replace(encoder, **sizes, **read_tower("config.json", settings, activation), **more)
        return masked_model(image, shape_of(tensors, "lm_head.weight", self.title)[0])

    def write_config(self, config: BeitModelConfig) -> dict[str, Any]:
        """See the base."""
        self.check(config)
        image = config.image
        check_expressible(self.title, {"image.image_size": (image.image_shape, ((max(image.image_shape),) * 2,))})
        return {
            "architectures": ["BeitForMaskedImageModeling"],
            **_FORM,
            **write_tower(image),
            "image_size": image.image_shape[0],
            "patch_size": image.patch_size,
            "vocab_size": config.vocab_size,
            "layer_scale_init_value": image.layer_scale_init,
            "drop_path_rate": image.drop_path,
        }


__all__ = ["HfBeit"]
