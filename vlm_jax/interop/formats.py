"""What a format is: one library's files of one architecture. The formats are modules of their own, see `registry`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.data.chat_config import ChatConfig
from vlm_jax.data.text import ClipBpeConfig, Tokenizer, TokenizerConfig
from vlm_jax.interop.layouts import Shape
from vlm_jax.interop.tables import (
    ConversionError,
    Row,
    Tensors,
    count_layers,
    module_shapes,
    parameter_shapes,
    shape_of,
    without_wrappers,
)
from vlm_jax.interop.tokenizer_import import import_tokenizer
from vlm_jax.models.coca import CoCaModelConfig
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.models.mlp import ACTIVATIONS
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.objectives.base import ObjectiveConfig
from vlm_jax.objectives.clip import ClipConfig
from vlm_jax.objectives.coca import CoCaConfig
from vlm_jax.objectives.encoder import EncoderConfig, EncoderModelConfig, EncoderModule
from vlm_jax.objectives.siglip import SiglipConfig

# "official" are the authors' own files of a method whose code base is no library; ml-l3m trains several of them;
# "hf_live" are the names of transformers' modules in memory where those of its files are others
Library = Literal["hf", "hf_live", "open_clip", "big_vision", "official", "ml_l3m"]
LIBRARIES: tuple[Library, ...] = ("hf", "hf_live", "open_clip", "big_vision", "official", "ml_l3m")


class Format:
    """Names, layouts and config file of one architecture in one library. Subclass it.

    Attributes:
        library: whose format it is.
        title: in messages, "open_clip's ResNet CLIP".
        preprocess: name in `preprocess.KNOWN` of what all models of the format share; "" where files must tell it.
        reads_images: false for models of text alone.
        has_config: whether config.json lies beside the weights though the library is no code base with one for all.
    """

    library: Library
    title: str
    preprocess: str = ""
    reads_images: bool = True
    has_config: bool = False

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """The tensors under the names of `rows`: prefixes of wrappers removed, constants dropped."""
        return without_wrappers(tensors)

    def recognises(self, tensors: Tensors) -> bool:
        """Whether these (canonical) names are this format's."""
        raise TypeError(f"{type(self).__name__} defines no recognises")

    def read_config(self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None) -> Any:
        """The config of the model that the weights belong to.

        Sizes come from the shapes of the tensors; what shapes can't tell (heads, activation, eps, pooling) from the
        config file beside them. Where there is none, the activation must be named: a wrong one loads without
        complaint and costs accuracy.

        Args:
            tensors: under canonical names.
            settings: content of the library's config file of the model, None without one.
            activation: overrides the activation of both towers.

        Raises:
            ConversionError: something can't be known, or a setting is one that our towers lack.
        """
        raise TypeError(f"{type(self).__name__} defines no read_config")

    def objective(self, model: Any) -> ObjectiveConfig:
        """The method whose parameters are just what the weights hold, around the config of `read_config`."""
        raise TypeError(f"{type(self).__name__} defines no objective")

    def chat(self) -> ChatConfig | None:
        """How a model that reads conversations was trained to read them; None for others."""
        return None

    def remark(self, objective: ObjectiveConfig, model: Any) -> str:
        """What is said of an imported model in brackets: for one with a text tower its activation."""
        return model.text.activation if objective.reads_text else objective.kind()

    def tokenizer(self, folder: Path, flag: str, model: Any) -> tuple[Tokenizer | None, str, TokenizerConfig]:
        """The tokenizer of a model that reads text, a remark for the user, and the settings that a run of it has.

        Args:
            folder: where the weights lie.
            flag: see `tokenizer_import.import_tokenizer`.
            model: the config of `read_config`.
        """
        built, note = import_tokenizer(folder, flag, model.text)
        return built, note, built.config if built else ClipBpeConfig(length=model.text.length)

    def claims(self, config: Any) -> bool:
        """Whether a model of ours with this config would be exported in this format."""
        raise TypeError(f"{type(self).__name__} defines no claims")

    def write_config(self, config: Any) -> dict[str, Any]:
        """The inverse of `read_config`: content of the library's config file; raises `ConversionError`."""
        raise TypeError(f"{type(self).__name__} defines no write_config")

    def published(self, tensors: Tensors) -> Tensors:
        """Tensors under the names of `rows` as the library expects them in a file."""
        return tensors

    def parameters(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """What of a model's parameters the format holds; a part that has a format of its own is left out."""
        return params

    def constants(self, config: Any) -> dict[str, np.ndarray]:
        """What a file holds that is no parameter of ours (fixed positions, indices), under canonical names."""
        return {}

    def own(self, tensors: Tensors, config: Any) -> Mapping[str, np.ndarray]:
        """Of the canonical tensors those that are parameters of a model with this config, or nobody's."""
        return tensors

    def read_extra(self, tensors: Tensors, config: Any) -> dict[str, Any]:
        """What the method keeps beside its parameters (`Objective.init`), of the canonical tensors; {} for most."""
        return {}

    def write_extra(self, extra: Mapping[str, Any], config: Any) -> dict[str, np.ndarray]:
        """The inverse of `read_extra`: further tensors of the file."""
        return {}

    def rows(self, config: Any) -> Sequence[Row]:
        """A row for each leaf of a model with this config."""
        raise TypeError(f"{type(self).__name__} defines no rows")

    def shapes(self, config: Any) -> dict[str, Shape]:
        """Path -> shape of each leaf of a model with this config."""
        raise TypeError(f"{type(self).__name__} defines no shapes")


class ImageTowerFormat(Format):
    """A format of an image tower alone: its config is the tower's, and the parameters lie under `image/`."""

    def objective(self, model: ImageTowerConfig) -> ObjectiveConfig:
        """See the base."""
        return EncoderConfig(model=EncoderModelConfig(model))

    def shapes(self, config: ImageTowerConfig) -> dict[str, Shape]:
        """See the base."""
        return module_shapes(EncoderModule(config), (1, *config.image_shape, 3))


class TwoTowerFormat(Format):
    """A format of dual encoders."""

    def objective(self, model: TwoTowerConfig) -> ObjectiveConfig:
        """See the base."""
        if isinstance(model, CoCaModelConfig):
            return CoCaConfig(model=model)
        return ClipConfig(model=model) if model.logit_bias_init is None else SiglipConfig(model=model)

    def shapes(self, config: TwoTowerConfig) -> dict[str, Shape]:
        """See the base."""
        images = jax.ShapeDtypeStruct((1, *config.image.image_shape, 3), jnp.float32)
        texts = jax.ShapeDtypeStruct((1, config.text.length), jnp.int32)
        return parameter_shapes(config.build(jnp.float32), images, texts)


def is_two_tower(config: Any) -> bool:
    """Whether a model has two towers and nothing else, unlike CoCa, whose config is one with a decoder."""
    return type(config) is TwoTowerConfig


def block_sizes(tensors: Tensors, block: str, norm: str, hidden: str, what: str) -> dict[str, int]:
    """Width, depth and MLP of a stack of blocks from the shapes of its tensors.

    Args:
        tensors: under canonical names.
        block: prefix of a block's names, with `{layer}`.
        norm: the rest of the name of its first norm's scale.
        hidden: the rest of the name of the bias inside its MLP.
        what: title of the format.
    """
    first = block.format(layer=0)
    return {
        "width": shape_of(tensors, first + norm, what)[0],
        "depth": count_layers(tensors, block + norm),
        "mlp_dim": shape_of(tensors, first + hidden, what)[0],
    }


def square_side(positions: int, patch_size: int, settings: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Image size of a ViT from the number of its patches' positions, and from its settings where those tell it."""
    side = int(positions**0.5) * patch_size
    image_size = settings.get("image_size", side)
    if not isinstance(image_size, int):
        image_size = tuple(image_size)
        height, width = image_size
    else:
        height = width = image_size
    if (height // patch_size) * (width // patch_size) != positions:
        raise ConversionError(
            f"the position embedding of {what} is for {positions} patches of {patch_size}x{patch_size} pixels, which "
            f"an image of {height}x{width} does not have; add the config file with the image size"
        )
    remainder = bool(height % patch_size or width % patch_size)
    return {"patch_size": patch_size, "image_size": image_size, "cut_remainder": remainder}


def known_activation(settings: Mapping[str, Any] | None, activation: str | None) -> None:
    """Raises `ConversionError` when nothing tells the activation, or it is none of ours."""
    if settings is None and activation is None:
        raise ConversionError(
            "no config file says which activation these weights were trained with; pass --activation=quick_gelu "
            "(OpenAI's weights, open_clip models named *-quickgelu) or --activation=gelu"
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise ConversionError(f"the activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")


def heads_of_64(*widths: int) -> list[int]:
    """OpenAI's rule, which holds where there is no config file: 64 channels a head; raises `ConversionError`."""
    if any(width % 64 or width > 1024 for width in widths):
        raise ConversionError(
            f"no config file says how many heads towers of width {' and '.join(map(str, widths))} have, and only "
            "OpenAI's widths imply 64 channels a head; put config.json or open_clip_config.json beside the weights"
        )
    return [width // 64 for width in widths]


def check_expressible(title: str, wanted: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> None:
    """Raises `ConversionError` for the settings, key -> (value, allowed values), that a format can't express."""
    wrong = [f"{key} = {value!r} (only {allowed})" for key, (value, allowed) in wanted.items() if value not in allowed]
    if wrong:
        raise ConversionError(f"this model can't be expressed as {title}: {'; '.join(wrong)}")


def check_supported(where: str, settings: Mapping[str, Any], computed: Mapping[str, Any]) -> None:
    """Raises `ConversionError` for a setting of a config file whose value is not the one that our towers compute."""
    for key, value in computed.items():
        if settings.get(key, value) != value:
            raise ConversionError(
                f"{where}.{key} = {settings[key]!r} of the config file is not supported, only {value!r}"
            )


__all__ = [
    "LIBRARIES",
    "Format",
    "ImageTowerFormat",
    "Library",
    "TwoTowerFormat",
    "block_sizes",
    "check_expressible",
    "check_supported",
    "heads_of_64",
    "is_two_tower",
    "known_activation",
    "square_side",
]
