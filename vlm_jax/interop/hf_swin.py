"""Hugging Face's SwinForMaskedImageModeling: SimMIM with a Swin tower."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.interop.formats import check_expressible, check_supported
from vlm_jax.interop.hf_vit_mae import renamed
from vlm_jax.interop.simmim import SwinSimMimFormat, swin_rows, swin_sizes
from vlm_jax.interop.tables import (
    ConversionError,
    Row,
    Tensors,
    affine,
    from_heads,
    norm,
    shape_of,
    to_heads,
    within,
    without_wrappers,
)
from vlm_jax.models.masked_image_model import MaskedImageModelConfig
from vlm_jax.models.mlp import ACTIVATIONS
from vlm_jax.models.swin import SwinConfig

_EMBEDDINGS, _STAGES = "swin.embeddings.", "swin.encoder.layers"
_TABLE = "attention.self.relative_position_bias_table"
# The names of files. transformers 5 calls the live parameters otherwise.
_SPELLINGS = (
    (r"\.attention\.q_proj\.", ".attention.self.query."),
    (r"\.attention\.k_proj\.", ".attention.self.key."),
    (r"\.attention\.v_proj\.", ".attention.self.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.attention\.relative_position_bias\.relative_position_bias_table$", f".{_TABLE}"),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_BUFFER = "relative_position_index"  # in older files
_COMPUTED = {"qkv_bias": True, "num_channels": 3, "use_absolute_embeddings": False, "model_type": "swin"}


class HfSwinSimMim(SwinSimMimFormat):
    """SwinForMaskedImageModeling of transformers."""

    library, title = "hf", "a Hugging Face SwinForMaskedImageModeling"

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base."""
        plain = {name: x for name, x in without_wrappers(tensors).items() if not name.endswith(_BUFFER)}
        return renamed(plain, _SPELLINGS)

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return {f"{_EMBEDDINGS}mask_token", "decoder.0.weight"} <= tensors.keys()

    def rows(self, config: MaskedImageModelConfig) -> list[Row]:
        """See the base."""
        block = []
        for name in ("query", "key", "value"):
            block += to_heads(f"attn/{name}", f"attention.self.{name}")
        block += from_heads("attn/out", "attention.output.dense")
        block += affine("mlp/fc1", "intermediate.dense") + affine("mlp/fc2", "output.dense")
        block += norm("ln_1", "layernorm_before") + norm("ln_2", "layernorm_after")
        block += [Row("position_bias/table", _TABLE, "same")]
        rows = [
            *affine("patch_embed", f"{_EMBEDDINGS}patch_embeddings.projection", "conv"),
            *norm("patch_norm", f"{_EMBEDDINGS}norm"),
            Row("mask_token", f"{_EMBEDDINGS}mask_token", "one_token"),
            *swin_rows(self.tower(config), block, _STAGES),
            *norm("ln_post", "swin.layernorm"),
        ]
        return [*within(rows, "image/", ""), *affine("decoder", "decoder.0", "pointwise")]

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> MaskedImageModelConfig:
        """See the base. What is masked stands in no file; the published cells of 32 pixels are taken where they fit."""
        if settings is None:
            raise ConversionError(f"{self.title} needs its config.json beside the weights: it tells the image's size")
        check_supported("config.json: ", settings, _COMPUTED)
        sizes = swin_sizes(tensors, f"{_STAGES}.{{stage}}.blocks.{{layer}}.", _TABLE, "intermediate.dense", self.title)
        found = activation or settings.get("hidden_act", "gelu")
        if found not in ACTIVATIONS:
            raise ConversionError(f"hidden_act {found!r} of the config file is not supported")
        image = SwinConfig(
            **sizes,
            patch_size=shape_of(tensors, f"{_EMBEDDINGS}patch_embeddings.projection.weight", self.title)[-1],
            image_size=settings.get("image_size", 224),
            activation=found,  # pyright: ignore[reportArgumentType] - checked above
            norm_eps=settings.get("layer_norm_eps", 1e-5),
            drop_path=settings.get("drop_path_rate", 0.1),
            mask_token=True,
        )
        return MaskedImageModelConfig(image, cell=32 if image.image_size % 32 == 0 else image.stride)

    def write_config(self, config: MaskedImageModelConfig) -> dict[str, Any]:
        """See the base."""
        image = self.tower(config)
        check_expressible(
            self.title,
            {
                "image.mask_token": (image.mask_token, (True,)),
                # The library's tables of offsets are those of whole windows in all stages.
                **{f"window of stage {i + 1}": (x.side, (image.window,)) for i, x in enumerate(image.windows)},
            },
        )
        return {
            "architectures": ["SwinForMaskedImageModeling"],
            "model_type": "swin",
            "image_size": image.image_size,
            "patch_size": image.patch_size,
            "num_channels": 3,
            "embed_dim": image.width,
            "depths": list(image.depths),
            "num_heads": list(image.heads),
            "window_size": image.window,
            "mlp_ratio": image.mlp_ratio,
            "qkv_bias": True,
            "hidden_act": image.activation,
            "layer_norm_eps": image.norm_eps,
            "drop_path_rate": image.drop_path,
            "encoder_stride": config.stride,
            "use_absolute_embeddings": False,
        }


__all__ = ["HfSwinSimMim"]
