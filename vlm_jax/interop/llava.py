"""LLaVA-1.5 in its three spellings: the authors' own files, those of the Hub, and transformers' live modules.

The authors' files are of one class around Llama's (`model.mm_projector.0`), those of the Hub have the parts side by
side (`multi_modal_projector.linear_1`), and transformers' modules since version 4.52 put them under `model`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.data.chat_config import LLAVA_STAGE_2
from vlm_jax.interop.formats import check_expressible, check_supported
from vlm_jax.interop.hf_vit_mae import renamed
from vlm_jax.interop.tables import ConversionError, Row, Tensors, affine, without_wrappers
from vlm_jax.interop.vision_language import (
    VisionLanguageFormat,
    decoder_rows,
    joined_tables,
    read_decoder,
    read_vision,
    vision_rows,
    write_decoder,
    write_vision,
)
from vlm_jax.models.projector import LinearProjectorConfig, MlpProjectorConfig
from vlm_jax.models.vision_language import VisionLanguageConfig

_VISION, _PROJECTOR, _LANGUAGE = "vision_tower.vision_model", "multi_modal_projector", "language_model."
_BUFFERS = ("position_ids", "rotary_emb.inv_freq")
_FEATURES = {"default": "patch", "full": "cls_patch"}  # vision_feature_select_strategy
# Names that transformers has had for the same tensors, as those of the Hub.
TO_HUB = (
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^model\.image_newline$", "image_newline"),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
TO_LIVE = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^image_newline$", "model.image_newline"),
)
_TO_ORIGINAL = (
    (r"^language_model\.", ""),
    (r"^vision_tower\.", "model.vision_tower.vision_tower."),
)
# Of transformers' classes, where config.json does not say: the towers of LLaVA-1.5.
_VISION_DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 16, "image_size": 336}
_TEXT_DEFAULTS = {"model_type": "llama", "num_attention_heads": 32}
_CLIP_336 = "openai/clip-vit-large-patch14-336"


class LlavaFormat(VisionLanguageFormat):
    """Names and settings that all spellings share, in those of the Hub.

    Attributes:
        newline: whether a learned vector ends each row of features.
    """

    conversations = LLAVA_STAGE_2
    newline: bool = False

    def rows(self, config: VisionLanguageConfig) -> list[Row]:
        """See the base."""
        rows = vision_rows(config.image, _VISION) + decoder_rows(config.decoder, _LANGUAGE)
        return rows + self.projector_rows(config)

    def projector_rows(self, config: VisionLanguageConfig) -> list[Row]:
        """Those under `projector/` alone."""
        return [row for layer in (1, 2) for row in _linear(config, layer, f"{_PROJECTOR}.linear_{layer}")]

    def constants(self, config: VisionLanguageConfig) -> dict[str, np.ndarray]:
        """A row of zeros for the token that stands for an image, where the vocabulary has none."""
        if config.image_token >= 0:
            return {}
        names = [f"{_LANGUAGE}model.embed_tokens.image"] + [f"{_LANGUAGE}lm_head.image"] * (not config.decoder.tied)
        return {name: np.zeros((1, config.decoder.width), np.float32) for name in names}

    def published(self, tensors: Tensors) -> Tensors:
        """See the base; one table for all tokens."""
        named = joined_tables(tensors, _LANGUAGE)
        for table in (f"{_LANGUAGE}model.embed_tokens", f"{_LANGUAGE}lm_head"):
            if f"{table}.image" in named:
                named[f"{table}.weight"] = np.concatenate([named[f"{table}.weight"], named.pop(f"{table}.image")])
        return named


class HfLlava(LlavaFormat):
    """LlavaForConditionalGeneration of transformers; written with the names of the Hub, which all versions read.

    Attributes:
        model_type: as config.json names it.
        architecture: the class.
    """

    library, title = "hf", "a Hugging Face LLaVA"
    model_type, architecture = "llava", "LlavaForConditionalGeneration"

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base."""
        named = renamed(without_wrappers(tensors), TO_HUB)
        return {name: value for name, value in named.items() if not name.endswith(_BUFFERS)}

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return f"{_PROJECTOR}.linear_1.weight" in tensors and f"{_VISION}.embeddings.class_embedding" in tensors

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> VisionLanguageConfig:
        """See the base."""
        if settings is None:
            raise ConversionError(f"{self.title} needs its config.json beside the weights: it tells the heads")
        check_supported("config.json: ", settings, {"model_type": self.model_type, "projector_hidden_act": "gelu"})
        layer, strategy = settings.get("vision_feature_layer", -2), settings.get("vision_feature_select_strategy")
        if not isinstance(layer, int):
            raise ConversionError(f"config.json: vision_feature_layer = {layer} names several blocks; not supported")
        vision, text = settings.get("vision_config", {}), settings.get("text_config", {})
        image = read_vision(tensors, _VISION, _VISION_DEFAULTS | dict(vision), self.title)
        return VisionLanguageConfig(
            image=image,
            layer=layer if layer < 0 else layer - image.depth - 1,
            features=_FEATURES[strategy or "default"],  # pyright: ignore[reportArgumentType]
            projector=MlpProjectorConfig(bias=settings.get("multimodal_projector_bias", True)),
            newline=self.newline,
            decoder=read_decoder(tensors, _LANGUAGE, _TEXT_DEFAULTS | dict(text)),
            image_token=settings.get("image_token_index", settings.get("image_token_id", 32_000)),
        )

    def claims(self, config: Any) -> bool:
        """A tower with a class token."""
        return super().claims(config) and config.image.class_token

    def write_config(self, config: VisionLanguageConfig) -> dict[str, Any]:
        """See the base."""
        check_expressible(
            self.title,
            {
                "projector": (type(config.projector), (MlpProjectorConfig,)),
                "projector.depth": (_depth(config), (2,)),
                "layer": (config.layer is None, (False,)),
                "newline": (config.newline, (self.newline,)),
            },
        )
        text = write_decoder(config.decoder)
        added = int(config.image_token < 0)
        text["vocab_size"] += added
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "image_token_index": config.decoder.table_size if added else config.image_token,
            "image_seq_length": config.tile_tokens,
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": _bias(config),
            "vision_feature_layer": config.layer,
            "vision_feature_select_strategy": {ours: theirs for theirs, ours in _FEATURES.items()}[config.features],
            "vision_config": write_vision(config.image, self.title),
            "text_config": text,
            "tie_word_embeddings": config.decoder.tied,
        }


class HfLiveLlava(HfLlava):
    """The same under the names that transformers' modules have in memory (`model.state_dict()`)."""

    library, title = "hf_live", "a Hugging Face LLaVA in the names of its modules"

    def recognises(self, tensors: Tensors) -> bool:
        """They are read as the other spelling."""
        return False

    def published(self, tensors: Tensors) -> Tensors:
        """See the base."""
        return renamed(super().published(tensors), TO_LIVE)


class OriginalLlava(LlavaFormat):
    """LlavaLlamaForCausalLM of the authors, with its vision tower in the file.

    Their config.json names the vision tower without its sizes; those of CLIP ViT-L/14 at 336 pixels are taken where no
    section `vision_config`, which our exports write, tells others.
    """

    library, title, preprocess = "official", "LLaVA's own files", "clip"

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base."""
        return {name: x for name, x in without_wrappers(tensors).items() if not name.endswith(_BUFFERS)}

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return "model.mm_projector.0.weight" in tensors or "model.mm_projector.weight" in tensors

    def rows(self, config: VisionLanguageConfig) -> list[Row]:
        """See the base."""
        rows = super().rows(config)
        return [dataclasses.replace(row, theirs=_original(row.theirs)) for row in rows]

    def projector_rows(self, config: VisionLanguageConfig) -> list[Row]:
        """See the base."""
        rows: list[Row] = []
        for layer in range(1, _depth(config) + 1):
            single = config.projector.kind() == "linear"
            rows += _linear(config, layer, "model.mm_projector" + ("" if single else f".{2 * layer - 2}"))
        return rows

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> VisionLanguageConfig:
        """See the base."""
        if settings is None:
            raise ConversionError(f"{self.title} need their config.json beside the weights: it tells the heads")
        check_supported("config.json: ", settings, {"mm_use_im_start_end": False, "mm_use_im_patch_token": False})
        hub = {name: x for theirs, x in tensors.items() if (name := _from_original(theirs))}
        if f"{_VISION}.embeddings.class_embedding" not in hub:
            raise ConversionError(
                f"these files of {self.title} lack the vision tower; join the tensors of {_CLIP_336} to them as "
                "model.vision_tower.vision_tower.vision_model.*"
            )
        kind = str(settings.get("mm_projector_type", "linear"))
        match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
        if not match and kind != "linear":
            raise ConversionError(f"config.json: mm_projector_type = {kind!r} is not supported")
        vision = _VISION_DEFAULTS | dict(settings.get("vision_config", {}))
        text = _TEXT_DEFAULTS | {key: value for key, value in settings.items() if key != "vision_config"}
        text["model_type"] = "llama"
        return VisionLanguageConfig(
            image=read_vision(hub, _VISION, vision, self.title),
            layer=int(settings.get("mm_vision_select_layer", -2)),
            features=settings.get("mm_vision_select_feature", "patch"),
            projector=MlpProjectorConfig(depth=int(match[1])) if match else LinearProjectorConfig(),
            newline=self.newline,
            decoder=read_decoder(hub, _LANGUAGE, text),
        )

    def constants(self, config: VisionLanguageConfig) -> dict[str, np.ndarray]:
        """No token stands for an image here."""
        return {}

    def published(self, tensors: Tensors) -> Tensors:
        """See the base."""
        return joined_tables(tensors, "")

    def write_config(self, config: VisionLanguageConfig) -> dict[str, Any]:
        """See the base."""
        check_expressible(
            self.title,
            {
                "projector": (isinstance(config.projector, LinearProjectorConfig), (True,)),
                "layer": (config.layer is None, (False,)),
                "newline": (config.newline, (self.newline,)),
                "projector.bias": (_bias(config), (True,)),
            },
        )
        single = config.projector.kind() == "linear"
        return write_decoder(config.decoder) | {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava_llama",
            "mm_projector_type": "linear" if single else f"mlp{_depth(config)}x_gelu",
            "mm_vision_tower": _CLIP_336,
            "mm_vision_select_layer": config.layer,
            "mm_vision_select_feature": config.features,
            "mm_hidden_size": config.image.width,
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "use_mm_proj": True,
            "vision_config": write_vision(config.image, self.title),
        }


def _linear(config: VisionLanguageConfig, layer: int, theirs: str) -> list[Row]:
    rows = affine(f"projector/fc{layer}", theirs)
    return rows if _bias(config) else rows[:1]


def _bias(config: VisionLanguageConfig) -> bool:
    return isinstance(config.projector, LinearProjectorConfig) and config.projector.bias


def _depth(config: VisionLanguageConfig) -> int:
    return config.projector.layers if isinstance(config.projector, LinearProjectorConfig) else 0


def _original(name: str) -> str:
    """A name of the Hub in the authors' files."""
    for pattern, replacement in _TO_ORIGINAL:
        name = re.sub(pattern, replacement, name)
    return name


def _from_original(name: str) -> str:
    """The inverse of `_original`; empty for the projector."""
    if ".mm_projector" in name:
        return ""
    tower = "model.vision_tower."
    return name.removeprefix(tower) if name.startswith(tower) else f"{_LANGUAGE}{name}"


__all__ = ["TO_HUB", "TO_LIVE", "HfLiveLlava", "HfLlava", "OriginalLlava"]
