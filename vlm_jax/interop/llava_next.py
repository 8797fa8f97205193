"""LLaVA-NeXT (LLaVA-1.6): LLaVA's files with a learned vector that ends each row of features of a grid of tiles."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.data.chat_config import LLAVA_NEXT
from vlm_jax.data.tiles import AnyresTiling
from vlm_jax.interop.formats import check_supported
from vlm_jax.interop.hf_vit_mae import renamed
from vlm_jax.interop.llava import TO_LIVE, HfLlava, LlavaFormat, OriginalLlava
from vlm_jax.interop.tables import Row, Tensors
from vlm_jax.models.vision_language import VisionLanguageConfig

_NEWLINE = "image_newline"
# The grids of the authors, (columns, rows), in the order in which transformers tries them: it reads their pairs of
# sides the other way round, so that of two grids that suit an image equally well it takes the other.
_HF_GRIDS = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))


class _WithNewline(LlavaFormat):
    """What both families have more than LLaVA-1.5."""

    newline = True

    def claims(self, config: Any) -> bool:
        """A newline."""
        return super().claims(config) and config.newline


class HfLlavaNext(_WithNewline, HfLlava):
    """LlavaNextForConditionalGeneration of transformers, in the names of the Hub."""

    title = "a Hugging Face LLaVA-NeXT"
    model_type, architecture = "llava_next", "LlavaNextForConditionalGeneration"
    conversations = dataclasses.replace(LLAVA_NEXT, tiling=AnyresTiling(grids=_HF_GRIDS))

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return super().recognises(tensors) and _NEWLINE in tensors

    def rows(self, config: VisionLanguageConfig) -> list[Row]:
        """See the base."""
        return [*super().rows(config), Row("newline", _NEWLINE, "same")]

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> VisionLanguageConfig:
        """See the base."""
        model = super().read_config(tensors, settings, activation)
        check_supported("config.json: ", settings or {}, {"image_grid_pinpoints": _pinpoints(model)})
        return model

    def write_config(self, config: VisionLanguageConfig) -> dict[str, Any]:
        """See the base."""
        return super().write_config(config) | {"image_grid_pinpoints": _pinpoints(config)}


class HfLiveLlavaNext(HfLlavaNext):
    """The same under the names that transformers' modules have in memory (`model.state_dict()`)."""

    library, title = "hf_live", "a Hugging Face LLaVA-NeXT in the names of its modules"

    def recognises(self, tensors: Tensors) -> bool:
        """They are read as the other spelling."""
        return False

    def published(self, tensors: Tensors) -> Tensors:
        """See the base."""
        return renamed(super().published(tensors), TO_LIVE)


class OriginalLlavaNext(_WithNewline, OriginalLlava):
    """The authors' files, as `OriginalLlava`; the vision tower, which learns in LLaVA-NeXT, is always among them."""

    title = "LLaVA-NeXT's own files"
    conversations = LLAVA_NEXT

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return super().recognises(tensors) and f"model.{_NEWLINE}" in tensors

    def rows(self, config: VisionLanguageConfig) -> list[Row]:
        """See the base."""
        return [*super().rows(config), Row("newline", f"model.{_NEWLINE}", "same")]

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> VisionLanguageConfig:
        """See the base."""
        model = super().read_config(tensors, settings, activation)
        check_supported("config.json: ", settings or {}, _tiling(model))
        return model

    def write_config(self, config: VisionLanguageConfig) -> dict[str, Any]:
        """See the base."""
        return super().write_config(config) | _tiling(config)


def _pinpoints(config: VisionLanguageConfig) -> list[list[int]]:
    """The sides of the grids in pixels, as both families write them."""
    side = config.image.image_shape[0]
    return [[side * columns, side * rows] for columns, rows in AnyresTiling().grids]


def _tiling(config: VisionLanguageConfig) -> dict[str, Any]:
    return {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": _pinpoints(config),
    }


__all__ = ["HfLiveLlavaNext", "HfLlavaNext", "OriginalLlavaNext"]
