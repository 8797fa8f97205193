"""Records to examples: the arrays of one row of a batch. Runs in worker processes, so nothing here needs JAX."""

import zlib
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from vlm_jax.data import images
from vlm_jax.data.block_masks import BlockMasks
from vlm_jax.data.images import AugmentConfig, PreprocessConfig
from vlm_jax.data.sources.base import BadRecord, Record
from vlm_jax.data.text import Tokenizer

Example = dict[str, np.ndarray]


class MakeExample(Protocol):
    """What turns a record into a row. All rows have the same keys, shapes and dtypes."""

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """The row; `rng` is None in evaluation, where nothing is random. Raises `BadRecord`."""
        ...


class Views:
    """The image of a record as the model sees it: a random view in training, else the evaluation view."""

    def __init__(self, size: int, preprocess: PreprocessConfig, augment: AugmentConfig | None):
        self.size, self.preprocess, self.augment = size, preprocess, augment

    def __call__(self, record: Record, rng: np.random.Generator | None) -> np.ndarray:
        """uint8 [size, size, 3]; raises `BadRecord` when the image can't be decoded."""
        image = decoded(record)
        if rng is None or self.augment is None:
            return images.preprocess(image, self.preprocess, self.size)
        return images.training_view(image, rng, self.augment, self.preprocess, self.size)


def decoded(record: Record) -> np.ndarray:
    """The image of a record, uint8 [H, W, 3]; raises `BadRecord` when it can't be decoded."""
    try:
        return images.decode(record["image"])
    except ValueError as error:
        raise BadRecord(record["where"], record["key"], str(error)) from error


def draw_caption(record: Record, rng: np.random.Generator | None) -> str:
    """One of the captions: at random by their weights (evenly where they have none), or the first without `rng`.

    Raises:
        BadRecord: the record has no caption, or none that can be read.
    """
    texts = record["texts"]
    if not texts:
        raise BadRecord(record["where"], record["key"], record.get("no_caption", "it has no caption"))
    if rng is None:
        return texts[0]
    if "text_weights" not in record:
        return texts[rng.integers(len(texts))]
    place = np.searchsorted(np.cumsum(record["text_weights"]), rng.random(), side="right")
    return texts[min(int(place), len(texts) - 1)]  # the weights' sum may miss 1 by a rounding


class ClipExamples:
    """`image` uint8 [size, size, 3] and `text` int32 [length]: one caption, random in training, else the first.

    Args:
        tokenizer: gives the ids and their length.
        size: width and height of the model's images in pixels.
        preprocess: the evaluation view.
        augment: the random view of training; None trains on the evaluation view.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, preprocess: PreprocessConfig, augment: AugmentConfig | None):
        self.tokenizer, self.views = tokenizer, Views(size, preprocess, augment)

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """One row; raises `BadRecord`."""
        chosen = draw_caption(record, rng)
        return {"image": self.views(record, rng), "text": self.tokenizer([chosen])[0]}


class PairExamples:
    """As `ClipExamples`, and `identity` int32 [2]: equal numbers for one image, and for one caption, wherever they are.

    They are hashes of 31 bits: two different images pass for one with probability 5e-10.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, preprocess: PreprocessConfig, augment: AugmentConfig | None):
        self.pairs = ClipExamples(tokenizer, size, preprocess, augment)

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """One row; raises `BadRecord`."""
        row = self.pairs(record, rng)
        image = record.get("image_id", f"{record['where']}\n{record['key']}")
        hashes = [zlib.crc32(image.encode("utf-8", "surrogatepass")), zlib.crc32(row["text"].tobytes())]
        return row | {"identity": np.asarray([value & 0x7FFFFFFF for value in hashes], np.int32)}


class TextExamples:
    """`text` int32 [length]: one of the texts of a record, random in training, else the first."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """One row; raises `BadRecord`."""
        return {"text": self.tokenizer([draw_caption(record, rng)])[0]}


class ImageExamples:
    """`image` uint8 [size, size, 3]: a random view in training, else the evaluation view."""

    def __init__(self, size: int, preprocess: PreprocessConfig, augment: AugmentConfig | None):
        self.views = Views(size, preprocess, augment)

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """One row; raises `BadRecord`."""
        return {"image": self.views(record, rng)}


class MaskedImages:
    """What a masked image model with a visual tokenizer learns from.

    `image` uint8 [size, size, 3], `code_image` uint8 [code_size, code_size, 3], the same crop for the tokenizer, and
    `masked` bool [patches], which patches are hidden, in raster order. In evaluation the views are those of the
    evaluation and the mask is one and the same.

    Args:
        size: of the model's images in pixels.
        code_size: of the tokenizer's.
        grid: (rows, columns) of patches.
        masks: how they are drawn.
        preprocess: the evaluation view.
        augment: the random view of training; None trains on the evaluation view.
    """

    def __init__(
        self,
        size: int,
        code_size: int,
        grid: tuple[int, int],
        masks: BlockMasks,
        preprocess: PreprocessConfig,
        augment: AugmentConfig | None,
    ):
        self.sizes, self.grid, self.masks = (size, code_size), grid, masks
        self.augment, self.filters = augment, (preprocess, replace(preprocess, interpolation="lanczos"))

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """One row; raises `BadRecord`."""
        image = decoded(record)
        if rng is None or self.augment is None:
            view, code = (images.preprocess(image, f, s) for f, s in zip(self.filters, self.sizes, strict=True))
        else:
            view, code = images.two_views(image, rng, self.augment, *self.sizes)
        mask = self.masks.draw(self.grid, np.random.default_rng(0) if rng is None else rng)
        return {"image": view, "code_image": code, "masked": mask.reshape(-1)}


class LabelledImages:
    """`image` uint8 [size, size, 3] and `label` int32 [], of sources whose records have labels."""

    def __init__(self, size: int, preprocess: PreprocessConfig, augment: AugmentConfig | None = None):
        self.views = Views(size, preprocess, augment)

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """One row; raises `BadRecord` when the record has no label."""
        label = single_label(record)
        return {"image": self.views(record, rng), "label": label}


def single_label(record: Record) -> np.ndarray:
    """The class of a record, int32 []; raises `BadRecord` when it has none or several."""
    label: Any = record.get("label")
    if label is None:
        raise BadRecord(record["where"], record["key"], "it has no label")
    if isinstance(label, tuple):
        raise BadRecord(record["where"], record["key"], f"it has {len(label)} labels, and one is wanted")
    return np.asarray(label, np.int32)


class LabelledPairs:
    """`image` uint8 [size, size, 3], or of several [count, size, size, 3], `text` int32 [length] and `label` int32 [].

    Args:
        tokenizer: gives the ids and their length.
        size: width and height of the model's images in pixels.
        count: images beside a text; more than one are the record's `images`.
        preprocess: the evaluation view.
        augment: the random view of training, drawn for each image; None trains on the evaluation view.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        size: int,
        count: int,
        preprocess: PreprocessConfig,
        augment: AugmentConfig | None,
    ):
        self.tokenizer, self.count, self.views = tokenizer, count, Views(size, preprocess, augment)

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """One row; raises `BadRecord`."""
        label, text = single_label(record), self.tokenizer([draw_caption(record, rng)])[0]
        shown = record.get("images", (record["image"],))
        if len(shown) != self.count:
            raise BadRecord(
                record["where"], record["key"], f"it shows {len(shown)} images, and {self.count} are wanted"
            )
        views = [self.views({**record, "image": image}, rng) for image in shown]
        return {"image": views[0] if self.count == 1 else np.stack(views), "text": text, "label": label}
