"""big_vision's SigLIP, as its authors released it: one *.npz of Flax parameters, without any config file."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.interop.formats import TwoTowerFormat, block_sizes, check_expressible, square_side
from vlm_jax.interop.hf_siglip import check_siglip, claims_siglip, siglip_config
from vlm_jax.interop.tables import ConversionError, Row, Tensors, shape_of, within
from vlm_jax.models.two_tower import TwoTowerConfig

_STACK = "encoderblock/"  # a stack of layers in one tensor, as their scanned models are stored
_IMAGE_BLOCK, _TEXT_BLOCK = "img/Transformer/encoderblock_{layer}/", "txt/Encoder_0/encoderblock_{layer}/"
_ATTENTION, _MLP = "MultiHeadDotProductAttention_0", "MlpBlock_0"


def _pair(ours: str, theirs: str, kernel: str = "kernel") -> list[Row]:
    """Both leaves of a Flax module, which are laid out as ours."""
    return [Row(f"{ours}/{leaf}", f"{theirs}/{leaf}", "same") for leaf in (kernel, "bias")]


def _attention_and_mlp() -> list[Row]:
    rows = [row for name in ("query", "key", "value", "out") for row in _pair(f"attn/{name}", f"{_ATTENTION}/{name}")]
    return rows + _pair("mlp/fc1", f"{_MLP}/Dense_0") + _pair("mlp/fc2", f"{_MLP}/Dense_1")


def _norm(ours: str, theirs: str) -> list[Row]:
    return _pair(ours, theirs, "scale")


class BigVisionSiglip(TwoTowerFormat):
    """Both towers of big_vision's `two_towers` with the head of SigLIP."""

    library, title, preprocess = "big_vision", "a big_vision SigLIP", "siglip"

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base; what stands beside the parameters in a training checkpoint is dropped."""
        inside = any(name.startswith("params/") for name in tensors)
        prefix = "params/" if inside else ""
        plain = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        renamed = {}
        for name, value in plain.items():
            if _STACK in name:
                renamed |= {name.replace(_STACK, f"encoderblock_{i}/"): layer for i, layer in enumerate(value)}
            else:
                renamed[name] = value
        return renamed

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return {"img/embedding/kernel", "txt/Embed_0/embedding"} <= tensors.keys()

    def rows(self, config: TwoTowerConfig) -> list[Row]:
        """See the base."""
        block = [*_attention_and_mlp(), *_norm("ln_1", "LayerNorm_0"), *_norm("ln_2", "LayerNorm_1")]
        head = [Row("probe", "probe", "batch_of_one"), *_attention_and_mlp(), *_norm("ln", "LayerNorm_0")]
        return [
            Row("logit_scale", "t", "batch_of_one"),
            Row("logit_bias", "b", "batch_of_one"),
            *_pair("image/patch_embed", "img/embedding"),
            Row("image/pos_embed", "img/pos_embedding", "batch_of_one"),
            *within(block, "image/blocks/", _IMAGE_BLOCK),
            *_norm("image/ln_post", "img/Transformer/encoder_norm"),
            *within(head, "image/map_head/", "img/MAPHead_0/"),
            Row("text/token_embed", "txt/Embed_0/embedding", "same"),
            Row("text/pos_embed", "txt/pos_embedding", "batch_of_one"),
            *within(block, "text/blocks/", _TEXT_BLOCK),
            *_norm("text/ln_final", "txt/Encoder_0/encoder_norm"),
            *_pair("text/projection", "txt/head"),
        ]

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> TwoTowerConfig:
        """See the base. Everything but the shapes is the same in all of these models."""
        if "img/cls" in tensors or "img/MAPHead_0/probe" not in tensors:
            raise ConversionError(f"{self.title} pools its image tower by attention; these weights do it otherwise")
        image, text = (self._tower(tensors, block, activation) for block in (_IMAGE_BLOCK, _TEXT_BLOCK))
        patch_size = shape_of(tensors, "img/embedding/kernel", self.title)[0]
        positions = shape_of(tensors, "img/pos_embedding", self.title)[1]
        image |= square_side(positions, patch_size, {}, self.title)
        text["vocab_size"] = shape_of(tensors, "txt/Embed_0/embedding", self.title)[0]
        text["length"] = shape_of(tensors, "txt/pos_embedding", self.title)[1]
        return siglip_config(image, text)

    def _tower(self, tensors: Tensors, block: str, activation: str | None) -> dict[str, Any]:
        sizes: dict[str, Any] = block_sizes(tensors, block, "LayerNorm_0/scale", f"{_MLP}/Dense_0/bias", self.title)
        heads = shape_of(tensors, block.format(layer=0) + f"{_ATTENTION}/query/kernel", self.title)[1]
        # Flax's gelu is the tanh form unless told otherwise.
        return sizes | {"heads": heads, "activation": activation or "gelu_tanh", "norm_eps": 1e-6}

    def claims(self, config: Any) -> bool:
        """A tower that pools by attention, and a bias on the logits."""
        return claims_siglip(config)

    def write_config(self, config: TwoTowerConfig) -> dict[str, Any]:
        """There is no file, so everything must be as these models have it."""
        image = check_siglip(self.title, config)
        wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {"image.cut_remainder": (image.cut_remainder, (False,))}
        for name, tower in (("image", image), ("text", config.text)):
            wanted[f"{name}.activation"] = (tower.activation, ("gelu_tanh",))
            wanted[f"{name}.norm_eps"] = (tower.norm_eps, (1e-6,))
        check_expressible(self.title, wanted)
        return {}


__all__ = ["BigVisionSiglip"]
