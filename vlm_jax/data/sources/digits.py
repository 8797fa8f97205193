"""The 1,797 scans of handwritten digits that scikit-learn ships (UCI, E. Alpaydin and C. Kaynak), with captions.

Real data that needs no download: enough to show that training works, not to compare methods.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from vlm_jax.data.sources.base import Record, SourceConfig
from vlm_jax.data.sources.texts import fill_templates, template_problems

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT = 5  # every fifth scan of each digit, in the file's order, belongs to the test split


@dataclasses.dataclass(frozen=True)
class DigitsConfig(SourceConfig):
    """Scans of 8x8 pixels, captioned from templates."""

    # which scans: 80 % to train, 20 % held out (the same share of each digit), or all
    split: Literal["train", "test", "all"] = "train"
    # captions of a scan; {} stands for the digit's word
    templates: tuple[str, ...] = (
        "a photo of the digit {}.",
        "a handwritten {}.",
        'the number "{}".',
        "a scan of the digit {}.",
        "someone wrote the number {}.",
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        """Templates that can't make a caption."""
        yield from template_problems(self.templates, "the digit's word")

    def build(self, cache_dir: str) -> "DigitsSource":
        """The scans of the split; needs no files."""
        return DigitsSource(self)


class DigitsSource:
    """uint8 [8, 8, 3] grey scans with their label and captions."""

    class_names = WORDS

    def __init__(self, config: DigitsConfig):
        self.templates = config.templates
        images, labels = _scans()
        rank = np.zeros(len(labels), np.int64)  # how many earlier scans show the same digit
        for digit in range(10):
            rank[labels == digit] = np.arange(np.sum(labels == digit))
        held_out = rank % HELD_OUT == HELD_OUT - 1
        chosen = {"train": ~held_out, "test": held_out, "all": np.ones_like(held_out)}[config.split]
        self.numbers = np.flatnonzero(chosen)
        self.images, self.labels = images[chosen], labels[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        """The scan, its label, and every template filled with its word."""
        return {
            "image": np.repeat(self.images[index, :, :, None], 3, axis=-1),
            "texts": self.texts(index),
            "label": int(self.labels[index]),
            "key": f"{self.numbers[index]:04d}",
            "where": "digits",
        }

    def texts(self, index: int) -> tuple[str, ...]:
        """Every template filled with the word of the digit."""
        return fill_templates(self.templates, WORDS[self.labels[index]])


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [1797, 8, 8], int64 [1797]); the file stores 0..16 per pixel."""
    from sklearn.datasets import load_digits  # 0.5 s to import, and only this source needs it

    data: Any = load_digits()
    return np.rint(data["images"] * (255 / 16)).astype(np.uint8), np.asarray(data["target"], np.int64)
