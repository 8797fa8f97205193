"""Random changes of colour, RandAugment and random erasing: pure functions of an image and the example's generator.

All take and give uint8 RGB, as batches travel. The crop and the flip, which come first, are in `images`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_LEVELS = 10.0  # the magnitude at which the ranges below end


@dataclasses.dataclass(frozen=True)
class Blur:
    """A Gaussian blur over 9 x 9 pixels, as in DINO and DINOv2."""

    # probability of an image to be blurred; 0: off
    probability: float = 0.0
    # deviation in pixels: least and most
    sigma: tuple[float, float] = (0.1, 2.0)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values outside of their range."""
        if not _probability(self.probability):
            yield "probability", f"= {self.probability} must lie in 0..1"
        if not 0 < self.sigma[0] <= self.sigma[1]:
            yield "sigma", f"= {self.sigma} must satisfy 0 < least <= most"


def _probability(value: float) -> bool:
    return 0 <= value <= 1


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue, in random order, as torchvision's `ColorJitter`; all zeros: off."""

    # probability of any change
    probability: float = 1.0
    # factor is drawn from 1 - this (0 at least) to 1 + this
    brightness: float = 0.0
    # as brightness; towards and away from the mean grey of the image
    contrast: float = 0.0
    # as brightness; towards and away from the grey image
    saturation: float = 0.0
    # shift is drawn from - this to this; 1 is a full turn of the colour circle
    hue: float = 0.0

    @property
    def on(self) -> bool:
        """Whether it can change anything."""
        return self.probability > 0 and max(self.brightness, self.contrast, self.saturation, self.hue) > 0

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values outside of their range."""
        if not _probability(self.probability):
            yield "probability", f"= {self.probability} must lie in 0..1"
        for key in ("brightness", "contrast", "saturation"):
            if getattr(self, key) < 0:
                yield key, f"= {getattr(self, key)} must not be negative; 0 leaves it alone"
        if not 0 <= self.hue <= 0.5:
            yield "hue", f"= {self.hue} must lie in 0..0.5, half a turn to either side"


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Operations drawn at random (Cubuk et al. 2020) in timm's form, by which MAE, BEiT and others fine-tune.

    The defaults with layers = 2 are its `rand-m9-mstd0.5-inc1`.
    """

    # operations drawn for each image, with replacement; 0: off
    layers: int = 0
    # strength of the operations, 0 to 10
    magnitude: float = 9.0
    # standard deviation of the magnitude, which is drawn anew for each operation and cut to 0..10
    magnitude_std: float = 0.5
    # probability of each drawn operation to be done
    probability: float = 0.5
    # colour (0..255) of the ground that geometric operations uncover
    fill: tuple[int, int, int] = (128, 128, 128)
    # names of the operations that are drawn from, "identity" may be among them; empty: timm's set
    operations: tuple[str, ...] = ()

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values outside of their range."""
        unknown = [name for name in self.operations if name not in {"identity", *OPERATIONS}]
        if unknown:
            yield "operations", f"has {unknown[0]!r}, which is none of identity, {', '.join(OPERATIONS)}"
        if self.layers < 0:
            yield "layers", f"= {self.layers} must not be negative; 0 switches it off"
        if not 0 <= self.magnitude <= _LEVELS:
            yield "magnitude", f"= {self.magnitude} must lie in 0..10"
        if self.magnitude_std < 0:
            yield "magnitude_std", f"= {self.magnitude_std} must not be negative"
        if not _probability(self.probability):
            yield "probability", f"= {self.probability} must lie in 0..1"
        if not all(0 <= value <= 255 for value in self.fill):
            yield "fill", f"= {self.fill} must lie in 0..255"


@dataclasses.dataclass(frozen=True)
class Erasing:
    """A rectangle replaced by noise or a colour (Zhong et al. 2020), as in timm."""

    # probability of an image to be changed; 0: off
    probability: float = 0.0
    # share of the image's area that the rectangle covers: least and most
    area: tuple[float, float] = (0.02, 1 / 3)
    # least height over width; the most is its inverse
    ratio: float = 0.3
    # pixel: normal noise in every pixel and channel; rand: one normal colour; const: the mean colour
    mode: Literal["pixel", "rand", "const"] = "pixel"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values outside of their range."""
        if not _probability(self.probability):
            yield "probability", f"= {self.probability} must lie in 0..1"
        if not 0 < self.area[0] <= self.area[1] <= 1:
            yield "area", f"= {self.area} must satisfy 0 < least <= most <= 1"
        if not 0 < self.ratio <= 1:
            yield "ratio", f"= {self.ratio} must lie in (0, 1]"


def color_jitter(image: Image.Image, rng: np.random.Generator, config: ColorJitter) -> Image.Image:
    """The four changes, each by its own random amount, in random order."""
    if rng.random() >= config.probability:
        return image
    for which in rng.permutation(4):
        if which == 3:
            if config.hue:
                image = shift_hue(image, rng.uniform(-config.hue, config.hue))
            continue
        spread = (config.brightness, config.contrast, config.saturation)[which]
        if spread:
            factor = rng.uniform(max(0.0, 1 - spread), 1 + spread)
            image = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[which](image).enhance(factor)
    return image


def shift_hue(image: Image.Image, turn: float) -> Image.Image:
    """The hue moved along the colour circle, in steps of 1/255 as in torchvision on Pillow images."""
    hue, saturation, value = image.convert("HSV").split()
    moved = np.asarray(hue) + np.int32(turn * 255).astype(np.uint8)  # wraps around
    return Image.merge("HSV", (Image.fromarray(moved), saturation, value)).convert("RGB")


def grey(image: Image.Image) -> Image.Image:
    """Luma (ITU-R 601) in all three channels."""
    return image.convert("L").convert("RGB")


def blur(image: np.ndarray, rng: np.random.Generator, config: Blur) -> np.ndarray:
    """A blur of a random strength; uint8 [H, W, 3] to the same, mirrored at the edges."""
    if rng.random() >= config.probability:
        return image
    return cv2.GaussianBlur(image, (9, 9), rng.uniform(*config.sigma), borderType=cv2.BORDER_REFLECT_101)


def solarize(image: np.ndarray) -> np.ndarray:
    """Values from 128 on inverted; uint8."""
    return np.where(image < 128, image, 255 - image)


def rand_augment(image: Image.Image, rng: np.random.Generator, config: RandAugment) -> Image.Image:
    """`layers` operations, each done with its probability."""
    names = config.operations or tuple(OPERATIONS)
    for which in rng.integers(len(names), size=config.layers):
        if rng.random() >= config.probability:
            continue
        level = config.magnitude
        if config.magnitude_std:
            level = float(np.clip(rng.normal(level, config.magnitude_std), 0, _LEVELS))
        sign = 1 if rng.random() < 0.5 else -1
        if names[which] != "identity":
            image = OPERATIONS[names[which]](image, level / _LEVELS, sign, config.fill)
    return image


def erase(
    image: np.ndarray, rng: np.random.Generator, config: Erasing, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """One rectangle, of an area and a ratio that fit (ten tries), filled by `mode`; uint8 [H, W, 3] to the same.

    timm fills after the normalisation, with normal numbers or zeros. Here the image is not normalised yet, so the fill
    is what normalises to those: mean + std * normal in 0..255, cut off at both ends (beyond about two deviations for
    ImageNet's numbers), or the mean.
    """
    if rng.random() >= config.probability:
        return image
    height, width = image.shape[:2]
    for _ in range(10):
        area = rng.uniform(*config.area) * height * width
        ratio = math.exp(rng.uniform(math.log(config.ratio), -math.log(config.ratio)))
        tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if tall < height and wide < width:
            top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
            shape = {"pixel": (tall, wide, 3), "rand": (1, 1, 3), "const": (1, 1, 3)}[config.mode]
            normal = np.zeros(shape) if config.mode == "const" else rng.standard_normal(shape)
            fill = np.rint((normal * np.asarray(std) + np.asarray(mean)) * 255)
            image = image.copy()
            image[top : top + tall, left : left + wide] = np.clip(fill, 0, 255).astype(np.uint8)
            return image
    return image


Fill = tuple[int, int, int]
Operation = Callable[[Image.Image, float, int, Fill], Image.Image]


def _enhance(kind: Any) -> Operation:
    def operation(image: Image.Image, strength: float, sign: int, fill: Fill) -> Image.Image:
        return kind(image).enhance(max(0.1, 1 + sign * 0.9 * strength))

    return operation


def _affine(matrix: Callable[[float, Image.Image], Sequence[float]], most: float) -> Operation:
    """`matrix`: (amount, image) -> the six numbers of Pillow's affine transform, output to input."""

    def operation(image: Image.Image, strength: float, sign: int, fill: Fill) -> Image.Image:
        numbers = tuple(matrix(sign * most * strength, image))
        return image.transform(image.size, Image.Transform.AFFINE, numbers, Image.Resampling.BICUBIC, fillcolor=fill)

    return operation


def _rotate(image: Image.Image, strength: float, sign: int, fill: Fill) -> Image.Image:
    return image.rotate(sign * 30 * strength, Image.Resampling.BICUBIC, fillcolor=fill)


def _posterize(image: Image.Image, strength: float, sign: int, fill: Fill) -> Image.Image:
    return ImageOps.posterize(image, max(1, 4 - int(4 * strength)))  # Pillow refuses to keep no bit at all


def _solarize(image: Image.Image, strength: float, sign: int, fill: Fill) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(256 * strength))


def _solarize_add(image: Image.Image, strength: float, sign: int, fill: Fill) -> Image.Image:
    added = int(110 * strength)
    return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda image, strength, sign, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign, fill: ImageOps.equalize(image),
    "invert": lambda image, strength, sign, fill: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _affine(lambda amount, image: (1, amount, 0, 0, 1, 0), 0.3),
    "shear_y": _affine(lambda amount, image: (1, 0, 0, amount, 1, 0), 0.3),
    "translate_x": _affine(lambda amount, image: (1, 0, amount * image.width, 0, 1, 0), 0.45),
    "translate_y": _affine(lambda amount, image: (1, 0, 0, 0, 1, amount * image.height), 0.45),
}
"""timm's set of increasing strength: (image, strength in 0..1, sign, fill of uncovered ground) -> image."""
