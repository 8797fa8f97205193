"""Statements about drawn scenes that follow from them or don't: entailment and pairs of images, without files."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from vlm_jax.data.order import subseed
from vlm_jax.data.sources.base import Record, SourceConfig
from vlm_jax.data.sources.shapes import COLORS, SHAPES, ShapesConfig, ShapesSource
from vlm_jax.data.sources.shapes_chat import Scene

# in the order of the authors' numbers
ENTAILMENT, TRUTH = ("contradiction", "neutral", "entailment"), ("False", "True")
_UNSEEN = ("is made of wood", "is heavy", "was drawn yesterday")  # what no scene tells
_SIDES = ("left", "right")


@dataclasses.dataclass(frozen=True)
class ShapesStatementsConfig(SourceConfig):
    """Scenes as those of `shapes`, each with a statement and its class; all classes are as likely.

    Of one image "there is a red circle" is entailed, contradicted, or, with something that can't be seen, neither. Of
    two "the left image has a red circle" is true or false; what is false is true of the other one.
    """

    # the test scenes are drawn from the same distribution by another random stream
    split: Literal["train", "test"] = "train"
    # number of records
    count: int = 10000
    # width and height of the images in pixels
    image_size: int = 64
    # objects in a scene at most
    max_objects: int = 2
    # images beside a statement
    images: Literal[1, 2] = 1
    # seed of the scenes and statements
    seed: int = 0

    def problems(self) -> Iterator[tuple[str, str]]:
        """Sizes and counts that can't be drawn."""
        yield from self.scenes.problems()

    @property
    def scenes(self) -> ShapesConfig:
        """The scenes; those of one record lie beside each other."""
        count = self.images * self.count
        return ShapesConfig(self.split, count, self.image_size, max_objects=self.max_objects, seed=self.seed)

    def build(self, cache_dir: str) -> "ShapesStatements":
        """The drawn scenes; needs no files."""
        return ShapesStatements(self)


class ShapesStatements:
    """One statement a record, `label` counts in `class_names`; two images are `images`, and `image` the first."""

    def __init__(self, config: ShapesStatementsConfig):
        self.config, self._scenes = config, ShapesSource(config.scenes)
        self.class_names: tuple[str, ...] = ENTAILMENT if config.images == 1 else TRUTH

    def __len__(self) -> int:
        return self.config.count

    def __getitem__(self, index: int) -> Record:
        """The images, the statement and its class."""
        shown, text, label = self._stated(index)
        images = tuple(record["image"] for record in shown)
        record: Record = {"image": images[0], "texts": (text,), "label": label}
        record |= {"key": f"{self.config.split}-{index:06d}", "where": "shapes_statements"}
        return record | ({"images": images} if len(images) > 1 else {})

    def texts(self, index: int) -> tuple[str, ...]:
        """The statement."""
        return (self._stated(index)[1],)

    def fingerprint(self) -> str:
        """Of the config: it is all there is."""
        return repr(self.config)

    def _stated(self, index: int) -> tuple[list[Record], str, int]:
        if not 0 <= index < self.config.count:
            raise IndexError(f"shapes_statements has {self.config.count} records, no record {index}")
        count, scenes = self.config.images, self._scenes
        shown = [scenes[count * index + place] for place in range(count)]
        rng = np.random.default_rng((subseed(self.config.seed, 1), index, self.config.split == "test"))
        label = int(rng.integers(len(self.class_names)))
        stated = [record["scene"] for record in shown]
        text = _of_one(stated[0], label, rng) if count == 1 else _of_two(stated, bool(label), rng)
        return shown, text, label


def _of_one(scene: Scene, label: int, rng: np.random.Generator) -> str:
    name = _random_name(rng, but=_names(scene)) if ENTAILMENT[label] == "contradiction" else _chosen(scene, rng)
    return f"the {name} {rng.choice(_UNSEEN)}" if ENTAILMENT[label] == "neutral" else f"there is a {name}"


def _of_two(scenes: list[Scene], true: bool, rng: np.random.Generator) -> str:
    side = int(rng.integers(2))
    if true:
        return f"the {_SIDES[side]} image has a {_chosen(scenes[side], rng)}"
    here, other = _names(scenes[side]), sorted(_names(scenes[1 - side]))
    wrong = [name for name in other if name not in here]
    name = wrong[int(rng.integers(len(wrong)))] if wrong else _random_name(rng, but=here)
    return f"the {_SIDES[side]} image has a {name}"


def _names(scene: Scene) -> set[str]:
    return {f"{item['color']} {item['shape']}" for item in scene}


def _chosen(scene: Scene, rng: np.random.Generator) -> str:
    item: Any = scene[int(rng.integers(len(scene)))]
    return f"{item['color']} {item['shape']}"


def _random_name(rng: np.random.Generator, but: set[str]) -> str:
    names = [name for color in COLORS for shape in SHAPES if (name := f"{color} {shape}") not in but]
    return names[int(rng.integers(len(names)))]


__all__ = ["ShapesStatements", "ShapesStatementsConfig"]
