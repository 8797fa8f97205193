"""Evaluation preprocessing in other libraries' JSON files, both ways."""

from collections.abc import Mapping
from typing import Any

from vlm_jax import schema
from vlm_jax.data.images import IMAGENET_MEAN, IMAGENET_STD, PreprocessConfig
from vlm_jax.interop.formats import Library, check_supported
from vlm_jax.interop.tables import ConversionError

PILLOW_FILTERS = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers, which Hugging Face stores
_HALF = (0.5, 0.5, 0.5)
# What models are known to want whose files don't tell it.
KNOWN: dict[str, PreprocessConfig] = {
    "clip": PreprocessConfig(),
    "siglip": PreprocessConfig(resize="squash", mean=_HALF, std=_HALF),
    "imagenet": PreprocessConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD),
    # BEiT on ImageNet-22k, and what else comes from Inception
    "inception": PreprocessConfig(mean=_HALF, std=_HALF),
    # ALBEF: CLIP's numbers, both sides squeezed
    "albef": PreprocessConfig(resize="squash"),
    # pixels in [0, 1]
    "unit": PreprocessConfig(resize="squash", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    "dalle": PreprocessConfig(interpolation="lanczos", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
}
_HF_COMPUTED = {"do_resize": True, "do_rescale": True, "do_normalize": True}


def import_preprocess(settings: Mapping[str, Any], library: Library, image_shape: tuple[int, int]) -> PreprocessConfig:
    """The preprocessing that lies beside a library's weights.

    Args:
        settings: content of Hugging Face's `preprocessor_config.json` or of open_clip's `preprocess_cfg`.
        library: which of the two.
        image_shape: (height, width) that the model takes.

    Raises:
        ConversionError: a resize, a crop or an interpolation that we don't have.
    """
    interpolations: dict[Any, str] = {name: name for name in PILLOW_FILTERS}
    if library == "hf":
        check_supported("preprocessor_config.json: ", settings, _HF_COMPUTED)
        interpolations = {number: name for name, number in PILLOW_FILTERS.items()}
        interpolation = settings.get("resample", PILLOW_FILTERS["bicubic"])
        resize = _hf_resize(settings, image_shape)
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


def _hf_resize(settings: Mapping[str, Any], image_shape: tuple[int, int]) -> str:
    size = settings.get("size", min(image_shape))
    processor = settings.get("image_processor_type", settings.get("feature_extractor_type", ""))
    if isinstance(size, int) and processor.startswith("ViT"):
        size = {"height": size, "width": size}  # in files of before sizes had names, this one meant both sides
    if isinstance(size, Mapping) and "height" in size:
        sides, resize = (size["height"], size["width"]), "squash"
    else:
        shortest = size["shortest_edge"] if isinstance(size, Mapping) else size
        sides, resize = (shortest, shortest), "shortest"
        if not settings.get("do_center_crop", True):
            raise ConversionError("the preprocessing of the files makes images that are not square; not supported")
    # A larger resize before the crop shows less of the image.
    if sides != image_shape:
        raise ConversionError(f"the preprocessing of the files resizes to {size}, but the model takes {image_shape}")
    return resize


def export_preprocess(config: PreprocessConfig, image_shape: tuple[int, int], library: Library) -> dict[str, Any]:
    """The inverse of `import_preprocess`; raises `ConversionError` for what the library's file can't say."""
    if config.interpolation not in PILLOW_FILTERS:
        raise ConversionError(f"the {library} files can't express interpolation {config.interpolation!r}")
    if config.crop != 1.0 and library == "open_clip":
        raise ConversionError(f"the open_clip files can't express crop = {config.crop}; set data.preprocess.crop = 1.0")
    if library == "open_clip":
        return {
            "size": list(image_shape),
            "mean": list(config.mean),
            "std": list(config.std),
            "interpolation": config.interpolation,
            "resize_mode": config.resize,
        }
    if config.resize == "longest":
        raise ConversionError("Hugging Face's files can't express resize 'longest'; use 'shortest' or 'squash'")
    sides = dict(zip(("height", "width"), image_shape, strict=True))
    squash = config.resize == "squash"
    resizing = {"image_processor_type": "SiglipImageProcessor", "size": sides}
    if not squash:
        resizing = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": int(min(image_shape) / config.crop)},
        }
        resizing |= {"do_center_crop": True, "crop_size": sides}
    return {
        **resizing,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": PILLOW_FILTERS[config.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


__all__ = ["KNOWN", "export_preprocess", "import_preprocess"]
