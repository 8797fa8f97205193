"""open_clip's CoCa: its towers, one attentional pooler, and a decoder beside the text tower."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.interop.formats import check_expressible, check_supported, known_activation
from vlm_jax.interop.open_clip import (
    TEXT,
    OpenClipFormat,
    block_rows,
    read_joint,
    read_text,
    text_rows,
    write_joint,
    write_text,
)
from vlm_jax.interop.open_clip_vit import read_vit, vit_rows, write_vit
from vlm_jax.interop.tables import (
    ConversionError,
    Row,
    Tensors,
    count_layers,
    from_heads,
    fused_attention,
    norm,
    shape_of,
    split_to_heads,
    within,
)
from vlm_jax.models.attentional_pool import AttentionalPoolConfig
from vlm_jax.models.captions import CaptionStart
from vlm_jax.models.coca import CoCaModelConfig
from vlm_jax.models.text import TextConfig
from vlm_jax.models.transformer import CrossDecoderConfig
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.models.vit import ViTConfig

_DECODER, _CROSS = "text_decoder.resblocks.{layer}", "text_decoder.cross_attn.{layer}"
_MLP_RATIO = 4  # of the decoder: open_clip's settings have a key for it that the library does not read


class OpenClipCoCa(OpenClipFormat):
    """CoCa with `visual.attn_pool` and `text_decoder`."""

    title = "open_clip's CoCa"

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return "text_decoder.ln_final.weight" in tensors

    def published(self, tensors: Tensors) -> Tensors:
        """See the base."""
        own = ("visual.", "logit_", "text_decoder.")
        return {name if name.startswith(own) else f"text.{name}": value for name, value in tensors.items()}

    def image_rows(self, config: TwoTowerConfig) -> list[Row]:
        """See the base."""
        image, tower = _pooled(config)
        pooler = [
            Row("query", "query", "same"),
            *norm("ln_query", "ln_q"),
            *norm("ln_context", "ln_k"),
            *_pooler_attention(tower.width == image.width),
        ]
        return [
            *vit_rows("image/tower", tower),
            *within(pooler, "image/pooler/", "visual.attn_pool."),
            *norm("image/ln_post", "visual.ln_post"),
            Row("image/projection/kernel", "visual.proj", "same"),
        ]

    def rows(self, config: CoCaModelConfig) -> list[Row]:
        """See the base."""
        return [
            Row("logit_scale", "logit_scale", "same"),
            *self.image_rows(config),
            *text_rows(config),
            Row("text/class_token", "cls_emb", "same"),
            *block_rows("decoder/blocks/self", _DECODER),
            *block_rows("decoder/blocks/cross", _CROSS),
            *norm("decoder/blocks/cross/ln_context", f"{_CROSS}.ln_1_kv"),
            *norm("decoder/ln_final", "text_decoder.ln_final"),
            Row("decoder/head/kernel", "text_decoder.text_projection", "same"),
        ]

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> CoCaModelConfig:
        """See the base."""
        known_activation(settings, activation)
        if settings is None:
            raise ConversionError(
                f"{self.title} needs its open_clip_config.json beside the weights: it tells the heads"
            )
        vision, decoder = settings["vision_cfg"], settings["multimodal_cfg"]
        check_supported("vision_cfg", vision | {"attentional_pool": vision.get("attentional_pool", False)}, _POOLED)
        queries, width = shape_of(tensors, "visual.attn_pool.query", self.title)
        tower = read_vit(tensors, settings, activation, self.title)
        image = AttentionalPoolConfig(
            ViTConfig(**tower, pool="none", post_norm=False),
            "open_clip",
            queries,
            width,
            vision.get("attn_pooler_heads", 8),
            tower["norm_eps"],
        )
        text = read_text(tensors, settings, activation, self.title, TEXT | {"embed_cls": True})
        # Padding is hidden one position late there, and the weights were trained so.
        text |= {"pool": "cls", "mask_padding": True, "mask_shift": 1, "length": text["length"] - 1}
        stack = CrossDecoderConfig(
            width=shape_of(tensors, "text_decoder.ln_final.weight", self.title)[0],
            depth=count_layers(tensors, f"{_CROSS}.ln_1.weight"),
            heads=decoder.get("heads", 8),
            mlp_dim=shape_of(tensors, f"{_CROSS.format(layer=0)}.mlp.c_fc.bias", self.title)[0],
            self_mlp_dim=shape_of(tensors, f"{_DECODER.format(layer=0)}.mlp.c_fc.bias", self.title)[0],
            activation="quick_gelu" if settings.get("quick_gelu", False) else "gelu",
        )
        joint = read_joint(tensors, settings, self.title)
        start = CaptionStart(id=text["eos_id"] - 1)
        return CoCaModelConfig(image=image, text=TextConfig(**text), decoder=stack, start=start, **joint)

    def claims(self, config: Any) -> bool:
        """Every CoCa."""
        return isinstance(config, CoCaModelConfig)

    def write_config(self, config: CoCaModelConfig) -> dict[str, Any]:
        """See the base."""
        (image, tower), text, decoder = _pooled(config), config.text, config.decoder
        shared = ("quick_gelu",) if text.activation == "quick_gelu" else ("gelu",)
        check_expressible(
            self.title,
            {
                "image.form": (image.form, ("open_clip",)),
                "image.width": (image.width, (config.embed_dim,)),
                "image.norm_eps": (image.norm_eps, (tower.norm_eps,)),
                "text.mask_padding": (text.mask_padding, (True,)),
                "text.mask_shift": (text.mask_shift, (1,)),
                "text.causal": (text.causal, (True,)),
                "start.by": (config.start.by, ("tokenizer",)),
                "decoder.activation": (decoder.activation, shared),
                "decoder.norm_eps": (decoder.norm_eps, (1e-5,)),
                "decoder.mlp_dim": (decoder.mlp_dim, (_MLP_RATIO * decoder.width,)),
                "decoder.self_mlp_dim": (decoder.self_mlp_dim, (_MLP_RATIO * decoder.width,)),
            },
        )
        vision = write_vit(tower, text.activation, self.title)
        pooler = {"attentional_pool": True, "attn_pooler_queries": image.queries, "attn_pooler_heads": image.heads}
        sizes = {"width": decoder.width, "heads": decoder.heads, "layers": decoder.depth}
        return {
            **write_joint(config),
            "vision_cfg": {**vision, **pooler, "output_tokens": True},
            "text_cfg": {**write_text(config, self.title), "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {**sizes, "context_length": text.length, "vocab_size": text.vocab_size},
            "pad_id": text.pad_id,
            "custom_text": True,
        }


_POOLED = {"attentional_pool": True}  # of the other forms the library says that they are untested


def _pooler_attention(fused: bool) -> list[Row]:
    """torch's attention stores the kernels apart where the tower is not as wide as the queries, the biases never."""
    if fused:
        return fused_attention("attn", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj")
    rows = []
    for i, name in enumerate(("query", "key", "value")):
        rows += split_to_heads(f"attn/{name}", f"attn.{name[0]}_proj_weight", f"attn.in_proj_bias#{i}/3")
    return rows + from_heads("attn/out", "attn.out_proj")


def _pooled(config: TwoTowerConfig) -> tuple[AttentionalPoolConfig, ViTConfig]:
    image = config.image
    if not isinstance(image, AttentionalPoolConfig) or not isinstance(image.tower, ViTConfig):
        raise ConversionError("open_clip's CoCa pools the tokens of a vision transformer; this model has another tower")
    return image, image.tower


__all__ = ["OpenClipCoCa"]
