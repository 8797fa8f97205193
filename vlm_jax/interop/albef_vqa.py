"""ALBEF for questions as its authors store it: encoders, decoder and their averaged copies, without a config file."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from vlm_jax.interop.albef import OfficialAlbef
from vlm_jax.interop.hf_bert import BLOCK, block_rows, cross_rows, embedding_rows, head_rows, published_form
from vlm_jax.interop.tables import Row, Tensors, count_layers, within
from vlm_jax.models.albef_vqa import AlbefVqaModelConfig, AlbefVqaModule
from vlm_jax.objectives.albef_vqa import AlbefVqaConfig

_DECODER = "text_decoder."
# The text encoder stands there without the name of its library's class, unlike before the fine-tuning.
_UNNAMED = re.compile(r"^(text_encoder(?:_m)?)\.(?!bert\.)")
_NAMED = re.compile(r"^(text_encoder(?:_m)?)\.bert\.")


class OfficialAlbefVqa(OfficialAlbef):
    """The published model for VQAv2 and training checkpoints of it."""

    title = "an official ALBEF for questions"
    head = _DECODER

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base."""
        return {_UNNAMED.sub(r"\1.bert.", name): x for name, x in super().canonical(tensors).items()}

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return {"visual_encoder.pos_embed", f"{_DECODER}cls.predictions.bias"} <= tensors.keys()

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> AlbefVqaModelConfig:
        """See the base."""
        encoders = self.read_encoders(tensors, settings)
        depth = count_layers(tensors, f"{_DECODER}{BLOCK}output.LayerNorm.weight")
        decoder = dataclasses.replace(encoders["text"], depth=depth, cross_every=1)
        return AlbefVqaModelConfig(**encoders, decoder=decoder)

    def objective(self, model: AlbefVqaModelConfig) -> AlbefVqaConfig:
        """See the base."""
        length, most = AlbefVqaConfig().text_length, model.text.positions
        return AlbefVqaConfig(
            model=model,
            text_length=min(length, most),
            answer_length=min(AlbefVqaConfig().answer_length, model.decoder.positions),
        )

    def claims(self, config: Any) -> bool:
        """See the base."""
        return isinstance(config, AlbefVqaModelConfig)

    def wanted(self, config: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """See the base, and the decoder as the text encoder."""
        wanted, text, decoder = super().wanted(config), config.text, config.decoder
        for key in (
            *published_form(text),
            "width",
            "heads",
            "mlp_dim",
            "activation",
            "norm_eps",
            "positions",
            "segments",
        ):
            wanted[f"decoder.{key}"] = (getattr(decoder, key), (getattr(text, key),))
        return wanted | {"decoder.cross_every": (decoder.cross_every, (1,))}

    def rows(self, config: AlbefVqaModelConfig) -> list[Row]:
        """See the base."""
        embeddings = [dataclasses.replace(row, ours=row.ours.replace("text/", "decoder/")) for row in embedding_rows()]
        decoder = [
            *embeddings,
            *within((*block_rows(), *cross_rows()), "decoder/blocks/", BLOCK),
            *head_rows(config.words.tied),
        ]
        return [*self.encoder_rows(config), *within(decoder, "", _DECODER)]

    def module(self, config: AlbefVqaModelConfig) -> nn.Module:
        """See the base."""
        return AlbefVqaModule(config)

    def published(self, tensors: Tensors) -> Tensors:
        """See the base."""
        return {_NAMED.sub(r"\1.", name): x for name, x in super().published(tensors).items()}


__all__ = ["OfficialAlbefVqa"]
