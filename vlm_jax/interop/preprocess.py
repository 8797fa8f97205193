"""Evaluation preprocessing in other libraries' JSON files, both ways."""

from collections.abc import Mapping
from typing import Any

from vlm_jax import schema
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.interop.clip import ConversionError, Family

PILLOW_FILTERS = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers, which Hugging Face stores


def import_preprocess(settings: Mapping[str, Any] | None, family: Family) -> PreprocessConfig:
    """The preprocessing beside a family's weights; CLIP's where there is no file.

    Args:
        settings: content of Hugging Face's `preprocessor_config.json` or of open_clip's `preprocess_cfg`.
        family: which of the two.

    Raises:
        ConversionError: a resize or an interpolation that we don't have.
    """
    if not settings:
        return PreprocessConfig()
    interpolations: dict[Any, str] = {name: name for name in PILLOW_FILTERS}
    if family == "hf":
        interpolations = {number: name for name, number in PILLOW_FILTERS.items()}
        interpolation = settings.get("resample", PILLOW_FILTERS["bicubic"])
        size = settings.get("size", 224)
        resize = "squash" if isinstance(size, Mapping) and "height" in size else "shortest"
        mean, std = settings.get("image_mean"), settings.get("image_std")
    else:
        interpolation = settings.get("interpolation", "bicubic")
        resize = settings.get("resize_mode", "shortest")
        mean, std = settings.get("mean"), settings.get("std")
    if interpolation not in interpolations or resize not in ("shortest", "squash", "longest"):
        raise ConversionError(f"the preprocessing of the files (resize {resize!r}, {interpolation!r}) is not supported")
    found = {"resize": resize, "interpolation": interpolations[interpolation], "mean": mean, "std": std}
    known = {key: value for key, value in found.items() if value is not None}
    return schema.from_dict(PreprocessConfig, known, "preprocess")


def export_preprocess(config: PreprocessConfig, image_shape: tuple[int, int], family: Family) -> dict[str, Any]:
    """The inverse of `import_preprocess`; raises `ConversionError` for what the family's file can't say."""
    if config.interpolation not in PILLOW_FILTERS:
        raise ConversionError(f"the {family} files can't express interpolation {config.interpolation!r}")
    if family == "open_clip":
        return {
            "size": list(image_shape),
            "mean": list(config.mean),
            "std": list(config.std),
            "interpolation": config.interpolation,
            "resize_mode": config.resize,
        }
    if config.resize == "longest":
        raise ConversionError("Hugging Face's CLIP files can't express resize 'longest'; use 'shortest' or 'squash'")
    sides = dict(zip(("height", "width"), image_shape, strict=True))
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": min(image_shape)} if config.resize == "shortest" else sides,
        "resample": PILLOW_FILTERS[config.interpolation],
        "do_center_crop": config.resize == "shortest",
        "crop_size": sides,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


__all__ = ["export_preprocess", "import_preprocess"]
