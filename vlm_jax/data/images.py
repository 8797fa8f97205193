"""Encoded files to uint8 RGB, the evaluation preprocessing of CLIP, and the training view. Host side, numpy only.

Nothing here scales to floats on the way to the chip: batches travel as uint8 and the objective normalises them. What
changes colours or hides parts of a training view is in `augment`.
"""

import dataclasses
import io
import math
import struct
import zlib
from collections.abc import Iterator
from typing import Literal

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from vlm_jax.data import augment
from vlm_jax.data.augment import Blur, ColorJitter, Erasing, RandAugment

MAX_PIXELS = 89_478_485
"""Images with more pixels are refused: 256 MiB of RGB, the limit at which Pillow speaks of a decompression bomb."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Interpolation = Literal["bicubic", "bilinear", "lanczos", "area"]
_PILLOW_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}

# What Pillow's decoders raise on damaged files, beside OSError.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PreprocessConfig:
    """How a decoded image becomes the square that the model sees in evaluation; the size comes from the model."""

    # shortest: shorter side to size, then centre crop (CLIP). squash: both sides to size (SigLIP). longest: whole
    # image inside the square, the rest filled
    resize: Literal["shortest", "squash", "longest"] = "shortest"
    # with `shortest`: share of the resized shorter side that the centre crop keeps; 0.875 takes 224 pixels out of 256
    crop: float = 1.0
    # bicubic, bilinear and lanczos are Pillow's, with antialiasing; area is OpenCV's, twice as fast, for large photos
    interpolation: Interpolation = "bicubic"
    # per-channel mean of pixels in [0, 1]
    mean: tuple[float, float, float] = CLIP_MEAN
    # per-channel standard deviation of pixels in [0, 1]
    std: tuple[float, float, float] = CLIP_STD
    # colour (0..255) of the ground that `longest` fills
    fill: tuple[int, int, int] = (0, 0, 0)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values outside of their range."""
        if not 0 < self.crop <= 1:
            yield "crop", f"= {self.crop} must lie in (0, 1]"
        elif self.crop < 1 and self.resize != "shortest":
            yield "crop", f"= {self.crop} has no effect with resize = {self.resize!r}; set resize = 'shortest'"
        if min(self.std) <= 0:
            yield "std", f"= {self.std} must be positive in every channel"
        if not all(0 <= value <= 255 for value in self.fill):
            yield "fill", f"= {self.fill} must lie in 0..255"


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """The random view of training: crop, flip, colours, grey, RandAugment, blur, solarisation, erasing, in this order.

    CLIP used a random square crop alone (paper, section 2.5).
    """

    # share of the image's area that the crop covers: least and most
    scale: tuple[float, float] = (0.9, 1.0)
    # width over height of the crop: least and most
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    # probability of a horizontal flip; captions that say "left" forbid it
    flip: float = 0.0
    # filter of the resize after the crop, as in the preprocessing
    interpolation: Interpolation = "bicubic"
    # changes of brightness, contrast, saturation and hue; captions that name colours forbid the hue
    color_jitter: ColorJitter = ColorJitter()
    # probability of a grey image
    grey: float = 0.0
    # random operations of the fine-tuning recipes
    rand_augment: RandAugment = RandAugment()
    # Gaussian blur
    blur: Blur = Blur()
    # probability that values from 128 on are inverted
    solarize: float = 0.0
    # a rectangle of noise
    erasing: Erasing = Erasing()

    def problems(self) -> Iterator[tuple[str, str]]:
        """Ranges that no crop satisfies."""
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            yield "scale", f"= {self.scale} must satisfy 0 < least <= most <= 1"
        if not 0 < self.ratio[0] <= self.ratio[1]:
            yield "ratio", f"= {self.ratio} must satisfy 0 < least <= most"
        if not 0 <= self.flip <= 1:
            yield "flip", f"= {self.flip} must be a probability in 0..1"
        if not 0 <= self.grey <= 1:
            yield "grey", f"= {self.grey} must be a probability in 0..1"
        if not 0 <= self.solarize <= 1:
            yield "solarize", f"= {self.solarize} must be a probability in 0..1"


def decode(image: bytes | np.ndarray) -> np.ndarray:
    """An encoded file, or an array that is an image already, as uint8 [H, W, 3] RGB, upright.

    Colour follows Pillow's `convert("RGB")`, as CLIP's preprocessing does: alpha is dropped (not composited), palettes
    are looked up, CMYK is inverted naively without its profile. 16-bit grey keeps its high byte. Of an animation the
    first frame is taken. The EXIF orientation is applied.

    Raises:
        ValueError: the file is damaged, cut short, of no known format, too large (`MAX_PIXELS`), or holds pixels
            without a fixed range (floating point).
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image array must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
        return image
    if not image:
        raise ValueError("the image file is empty")
    try:
        return _decode_file(image)
    except UnidentifiedImageError as error:
        raise ValueError("the image can't be decoded (damaged, or of a format that Pillow doesn't know)") from error
    except _DECODER_ERRORS as error:
        raise ValueError(f"the image can't be decoded ({error or type(error).__name__})") from error


def _decode_file(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as header:  # reads no pixels yet
        if header.width * header.height > MAX_PIXELS:
            raise ValueError(f"{header.width}x{header.height} pixels are more than the {MAX_PIXELS} allowed")
        orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
        if header.format == "JPEG" and header.mode in ("RGB", "L"):
            # Twice as fast as Pillow, the same pixels (both are libjpeg-turbo), and an error on damage, where OpenCV
            # returns a damaged picture without a word.
            pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        else:
            pixels = np.asarray(_to_rgb(header))
    return _upright(pixels, orientation)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating point, of unknown range; store it as 8 or 16 bit")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # convert("RGB") would clip at 255 and turn nearly all of a 16-bit image white.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; straight to RGB, Pillow warns about the alpha it drops
    return image.convert("RGB")


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes the EXIF orientation (1..8: where row 0 and column 0 of the stored array lie in the scene)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def resize(image: np.ndarray, width: int, height: int, interpolation: Interpolation) -> np.ndarray:
    """uint8 [H, W, 3] to uint8 [height, width, 3]."""
    if image.shape[:2] == (height, width):
        return image
    if interpolation == "area":
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(Image.fromarray(image).resize((width, height), _PILLOW_FILTERS[interpolation]))


def preprocess(image: np.ndarray, config: PreprocessConfig, size: int) -> np.ndarray:
    """The evaluation view, uint8 [H, W, 3] to uint8 [size, size, 3].

    With the defaults it is CLIP's (openai/CLIP `_transform`): Pillow bicubic of the shorter side to `size`, with the
    longer side and the crop's corner rounded as torchvision rounds them, and a centre crop.
    """
    height, width = image.shape[:2]
    if config.resize == "squash":
        return resize(image, size, size, config.interpolation)
    if config.resize == "longest":
        longest = max(height, width)
        new_height, new_width = max(1, round(height * size / longest)), max(1, round(width * size / longest))
        top, left = (size - new_height) // 2, (size - new_width) // 2
        padded = np.broadcast_to(np.asarray(config.fill, np.uint8), (size, size, 3)).copy()
        small = resize(image, new_width, new_height, config.interpolation)
        padded[top : top + new_height, left : left + new_width] = small
        return padded
    shorter = max(size, int(size / config.crop))
    # torchvision truncates the longer side and rounds the corner half to even
    new_height = shorter if height <= width else int(shorter * height / width)
    new_width = shorter if width <= height else int(shorter * width / height)
    resized = resize(image, new_width, new_height, config.interpolation)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return resized[top : top + size, left : left + size]


def training_view(
    image: np.ndarray, rng: np.random.Generator, config: AugmentConfig, preprocess: PreprocessConfig, size: int
) -> np.ndarray:
    """uint8 [H, W, 3] to uint8 [size, size, 3]; `preprocess` gives mean and deviation to what erasing fills in.

    What is switched off draws no random number.
    """
    view = _recoloured(random_resized_crop(image, rng, config, size), rng, config)
    if config.blur.probability:
        view = augment.blur(view, rng, config.blur)
    if config.solarize and rng.random() < config.solarize:
        view = augment.solarize(view)
    if config.erasing.probability:
        view = augment.erase(view, rng, config.erasing, preprocess.mean, preprocess.std)
    return view


def two_views(
    image: np.ndarray, rng: np.random.Generator, config: AugmentConfig, size: int, other_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same crop twice, for a model and for the tokenizer that names its patches (BEiT, Bao et al. 2022).

    As published, colours are changed and the image is flipped before it is cropped.

    Args:
        image: uint8 [H, W, 3].
        rng: the example's generator.
        config: crop, flip and colours; nothing is erased.
        size: of the first view, resized by `config.interpolation`.
        other_size: of the second, resized by Lanczos' filter.

    Returns:
        uint8 [size, size, 3] and [other_size, other_size, 3].
    """
    image = _recoloured(image, rng, config)
    if config.flip and rng.random() < config.flip:
        image = image[:, ::-1]
    top, left, height, width = crop_box(image.shape[0], image.shape[1], rng, config)
    crop = np.ascontiguousarray(image[top : top + height, left : left + width])
    return resize(crop, size, size, config.interpolation), resize(crop, other_size, other_size, "lanczos")


def _recoloured(image: np.ndarray, rng: np.random.Generator, config: AugmentConfig) -> np.ndarray:
    """Colours, grey and RandAugment; what is switched off draws no random number."""
    if not (config.color_jitter.on or config.grey or config.rand_augment.layers):
        return image
    picture = Image.fromarray(np.ascontiguousarray(image))
    if config.color_jitter.on:
        picture = augment.color_jitter(picture, rng, config.color_jitter)
    if config.grey and rng.random() < config.grey:
        picture = augment.grey(picture)
    if config.rand_augment.layers:
        picture = augment.rand_augment(picture, rng, config.rand_augment)
    return np.asarray(picture)


def random_resized_crop(image: np.ndarray, rng: np.random.Generator, config: AugmentConfig, size: int) -> np.ndarray:
    """A random crop, flipped at random, uint8 [H, W, 3] to uint8 [size, size, 3].

    Area and aspect ratio are drawn as in torchvision's `RandomResizedCrop` (Szegedy et al. 2015, section 6): uniform
    area, log-uniform ratio, ten tries, else the largest centre crop within the ratios.
    """
    top, left, height, width = crop_box(image.shape[0], image.shape[1], rng, config)
    crop = np.ascontiguousarray(image[top : top + height, left : left + width])
    view = resize(crop, size, size, config.interpolation)
    return view[:, ::-1] if config.flip and rng.random() < config.flip else view


def crop_box(height: int, width: int, rng: np.random.Generator, config: AugmentConfig) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop."""
    least, most = math.log(config.ratio[0]), math.log(config.ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(*config.scale)
        ratio = math.exp(rng.uniform(least, most))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(0, height - crop_height + 1))
            left = int(rng.integers(0, width - crop_width + 1))
            return top, left, crop_height, crop_width
    ratio = width / height
    crop_width = min(width, max(1, round(height * config.ratio[1]))) if ratio > config.ratio[1] else width
    crop_height = min(height, max(1, round(width / config.ratio[0]))) if ratio < config.ratio[0] else height
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def normalise(image: np.ndarray, config: PreprocessConfig) -> np.ndarray:
    """uint8 [..., 3] to float32 [..., 3]: (pixel / 255 - mean) / std."""
    mean, std = np.asarray(config.mean, np.float32), np.asarray(config.std, np.float32)
    return (image.astype(np.float32) / np.float32(255) - mean) / std
