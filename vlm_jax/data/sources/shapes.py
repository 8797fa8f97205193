"""Drawn scenes of coloured shapes with captions that say all there is to see. They need no files.

A record is a pure function of (seed, split, index). Its `scene` lists the objects; `shapes_chat` makes conversations
about them. This is a test bed with known truth, not a benchmark.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from vlm_jax.data.order import example_rng, subseed
from vlm_jax.data.sources import shapes_chat
from vlm_jax.data.sources.base import Record, SourceConfig
from vlm_jax.data.sources.chats import DrawnImage, StoredImage, message_texts
from vlm_jax.data.sources.shapes_chat import Conversation, Kind, Scene

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLORS = {
    "red": (214, 39, 40),
    "green": (44, 140, 44),
    "blue": (40, 70, 200),
    "yellow": (240, 210, 30),
    "purple": (140, 60, 170),
    "orange": (250, 130, 20),
    "brown": (110, 65, 40),
    "black": (20, 20, 20),
}
SIZES = {"small": 0.075, "large": 0.145}  # radius over image width; a cell of the 3x3 grid is 0.33 wide
POSITIONS = (
    "top left", "top centre", "top right",
    "middle left", "centre", "middle right",
    "bottom left", "bottom centre", "bottom right",
)  # fmt: skip
_SUPERSAMPLING = 4
# A scene, and all that one object in it can become where it is.
_MOST_VARIANTS = len(SHAPES) + len(COLORS) + len(SIZES) - 2
_SPLIT_STREAMS = {"train": 0, "test": 1}


@dataclasses.dataclass(frozen=True)
class ShapesConfig(SourceConfig):
    """Scenes on a plain ground, one object at most in each cell of a 3x3 grid, or close-ups of one object."""

    # the test scenes are drawn from the same distribution by another random stream
    split: Literal["train", "test"] = "train"
    # number of records
    count: int = 10000
    # width and height of the images in pixels
    image_size: int = 64
    # objects in a scene: from this many ...
    min_objects: int = 1
    # ... to this many
    max_objects: int = 3
    # records in a row that show one scene, all but the first with one word of one object changed
    variants: int = 1
    # places for objects: 9, the grid, or 1, the whole image, whose object is three times as large
    cells: Literal[1, 9] = 9
    # spread of the noise in each pixel and channel, as a part of the range from black to white
    noise: float = 0.0
    # seed of the scenes; not the run's seed, which orders them
    seed: int = 0
    # kinds of conversations about the scenes, each as often as it stands here; empty: captions without conversation
    conversations: tuple[Kind, ...] = ()
    # questions in a conversation about one scene: from 1 to this many
    max_rounds: int = 1
    # whether records also name objects, and tell where these are
    named_objects: bool = False
    # what captions tell: the whole scene, or only one object that they name, as referring expressions do
    captions: Literal["scene", "object"] = "scene"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Sizes and counts that can't be drawn."""
        if self.count < 1:
            yield "count", f"= {self.count} leaves no record; use 1 or more"
        if self.image_size < 16:
            yield "image_size", f"= {self.image_size} is too small to tell the shapes apart; use 16 or more"
        if not 0 <= self.noise <= 1:
            yield "noise", f"= {self.noise} must be from 0, none, to 1"
        if not 1 <= self.variants <= _MOST_VARIANTS:
            yield "variants", f"= {self.variants} must be from 1, unrelated scenes, to {_MOST_VARIANTS}"
        if self.max_rounds < 1:
            yield "max_rounds", f"= {self.max_rounds} leaves no question; use 1 or more"
        if "more" in self.conversations and self.min_objects == self.max_objects:
            yield "conversations", "holds 'more', but all scenes have as many objects; raise max_objects"
        if self.conversations and self.named_objects:
            yield "named_objects", "is true, but conversations name no objects apart; leave conversations empty"
        if self.conversations and self.cells == 1:
            yield "conversations", "asks for places, which close-ups (cells = 1) don't have; set cells = 9"
        if not 1 <= self.min_objects <= self.max_objects <= self.cells:
            yield (
                "min_objects",
                (
                    f"= {self.min_objects} and max_objects = {self.max_objects} must satisfy "
                    f"1 <= min_objects <= max_objects <= {self.cells}, the cells"
                ),
            )

    def build(self, cache_dir: str) -> "ShapesSource":
        """The drawn scenes; needs no files."""
        return ShapesSource(self)


class ShapesSource:
    """uint8 [image_size, image_size, 3] scenes with two captions and the list of objects.

    Scenes of one object each are labelled too, by its colour and shape: 48 classes such as "red circle".
    """

    def __init__(self, config: ShapesConfig):
        self.config = config
        names = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
        self.class_names: tuple[str, ...] = names if config.max_objects == 1 and not config.conversations else ()

    def __len__(self) -> int:
        return self.config.count

    def __getitem__(self, index: int) -> Record:
        """The scene; `scene` is a list of dicts with `shape`, `color`, `size`, `position`, in reading order.

        `label` is there in scenes of one object. With `named_objects` it has `phrases`, as "a large red circle", for
        each object that size, colour and shape tell from the others, and their `boxes`, float32 [n, 4] of left, top,
        width and height in pixels. With `conversations` it has `turns`, `images`, `answer` and `kind` instead, and
        images are drawn when they are needed.
        """
        if self.config.conversations:
            return self._chat(index)
        rng, scene = self._scene(index)
        image, boxes = self._draw(scene, rng)
        record: Record = {
            "image": image,
            "texts": self._texts(scene),
            "scene": scene,
            "key": f"{self.config.split}-{index:06d}",
            "where": "shapes",
        }
        if self.class_names:
            record["label"] = self.class_names.index(f"{scene[0]['color']} {scene[0]['shape']}")
        if self.config.named_objects:
            named = _named(scene)
            record |= {"phrases": tuple(phrase for _, phrase in named), "boxes": boxes[[place for place, _ in named]]}
        return record

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions, or the messages, without drawing."""
        if self.config.conversations:
            return message_texts(self._conversation(index).turns)
        return self._texts(self._scene(index)[1])

    def _texts(self, scene: Scene) -> tuple[str, ...]:
        names = [phrase for _, phrase in _named(scene)] if self.config.captions == "object" else []
        return tuple(names) or _captions(scene)

    def fingerprint(self) -> str:
        """Of the config: it is all there is."""
        return repr(self.config)

    def picture(self, index: int) -> np.ndarray:
        """The image of a record, uint8 [image_size, image_size, 3]."""
        rng, scene = self._scene(index)
        return self._draw(scene, rng)[0]

    def _chat(self, index: int) -> Record:
        conversation, size = self._conversation(index), self.config.image_size
        if conversation.others:
            images: list[StoredImage] = [
                DrawnImage(functools.partial(self._draw_other, scene, index, number), size, size)
                for number, scene in enumerate(conversation.others)
            ]
        else:
            images = [DrawnImage(functools.partial(self.picture, index), size, size)] * conversation.needs_image
        return {
            "turns": conversation.turns,
            "images": tuple(images),
            "texts": message_texts(conversation.turns),
            "answer": conversation.turns[-1].text,
            "kind": conversation.kind,
            "key": f"{self.config.split}-{index:06d}",
            "where": "shapes",
        }

    def _conversation(self, index: int) -> Conversation:
        _, scene = self._scene(index)
        config = self.config
        rng = self._rng(index, 1)
        kind = config.conversations[int(rng.integers(len(config.conversations)))]
        if kind == "caption":
            return shapes_chat.caption(_captions(scene)[0], rng)
        if kind == "text":
            return shapes_chat.text_only(rng)
        if kind == "more":
            return shapes_chat.more(rng, config.min_objects, config.max_objects, _random_scene)
        if kind == "compare":
            return shapes_chat.compare(rng, config.min_objects, config.max_objects, _random_scene)
        if kind == "described":
            return shapes_chat.described(rng, scene, _captions(scene)[0], config.max_rounds)
        return shapes_chat.questions(rng, scene, kind, config.max_rounds)

    def _draw_other(self, scene: Scene, index: int, number: int) -> np.ndarray:
        return self._draw(scene, self._rng(index, 2 + number))[0]

    def _draw(self, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(image, boxes of its objects)."""
        config = self.config
        image, boxes = _draw(scene, config.image_size, 3.0 if config.cells == 1 else 1.0, rng)
        if config.noise:
            noise = rng.normal(scale=255 * config.noise, size=image.shape)
            image = np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)
        return image, boxes

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        """Further randomness of a record; stream 0 is that of its scene."""
        seed = subseed(self.config.seed, stream) if stream else self.config.seed
        return example_rng(seed, 2 * index + _SPLIT_STREAMS[self.config.split])

    def _scene(self, index: int) -> tuple[np.random.Generator, Scene]:
        if not 0 <= index < self.config.count:
            raise IndexError(f"shapes has {self.config.count} records, no record {index}")
        config = self.config
        number = index % config.variants
        rng = self._rng(index - number, 0)
        scene = _random_scene(rng, int(rng.integers(config.min_objects, config.max_objects + 1)), config.cells)
        if number == 0:
            return rng, scene
        changes = _changes(scene, config.cells)
        return self._rng(index, 0), changes[rng.permutation(len(changes))[number - 1]]


def _random_scene(rng: np.random.Generator, count: int, places: int = len(POSITIONS)) -> Scene:
    positions = POSITIONS if places == len(POSITIONS) else ("centre",)
    cells = sorted(rng.choice(len(positions), size=count, replace=False))
    return [
        {
            "shape": SHAPES[rng.integers(len(SHAPES))],
            "color": tuple(COLORS)[rng.integers(len(COLORS))],
            "size": tuple(SIZES)[rng.integers(len(SIZES))],
            "position": positions[cell],
        }
        for cell in cells
    ]


def _changes(scene: Scene, places: int) -> list[Scene]:
    """Every scene that differs in one word: the colour, shape, size or place of one object."""
    taken = {item["position"] for item in scene}
    words = {"shape": SHAPES, "color": COLORS, "size": SIZES, "position": POSITIONS if places == len(POSITIONS) else ()}
    changed = []
    for number, item in enumerate(scene):
        for name, choices in words.items():
            for word in choices:
                if word != item[name] and not (name == "position" and word in taken):
                    objects = [*scene[:number], item | {name: word}, *scene[number + 1 :]]
                    changed.append(sorted(objects, key=lambda one: POSITIONS.index(one["position"])))
    return changed


def _named(scene: Scene) -> list[tuple[int, str]]:
    """(place in the scene, phrase) of each object that size, colour and shape tell from the others."""
    phrases = [f"a {item['size']} {item['color']} {item['shape']}" for item in scene]
    return [(place, phrase) for place, phrase in enumerate(phrases) if phrases.count(phrase) == 1]


def _captions(scene: Scene) -> tuple[str, ...]:
    """The whole scene in words, from the first object to the last and in the opposite order."""
    phrases = [f"a {o['size']} {o['color']} {o['shape']} in the {o['position']}" for o in scene]
    return tuple(dict.fromkeys((" and ".join(phrases), " and ".join(reversed(phrases)))))


def _draw(scene: Scene, size: int, zoom: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(image, float32 [n, 4]: left, top, width and height of each object in pixels).

    Ground, colours and places vary a little from scene to scene, so that pixels alone don't name a caption.
    """
    wide = size * _SUPERSAMPLING
    image = Image.new("RGB", (wide, wide), tuple(int(v) for v in rng.integers(215, 256, size=3)))
    canvas, boxes = ImageDraw.Draw(image), np.zeros((len(scene), 4), np.float32)
    for item, box in zip(scene, boxes, strict=True):
        row, column = divmod(POSITIONS.index(item["position"]), 3)
        jitter_x, jitter_y = zoom * rng.uniform(-0.015, 0.015, size=2)
        centre = ((column + 0.5) / 3 + jitter_x) * wide, ((row + 0.5) / 3 + jitter_y) * wide
        color = np.clip(np.asarray(COLORS[item["color"]]) + rng.integers(-12, 13, size=3), 0, 255)
        radius = zoom * SIZES[item["size"]] * wide
        low, high = _draw_object(canvas, item["shape"], centre, radius, tuple(int(v) for v in color))
        box[:] = *(low / _SUPERSAMPLING), *((high - low) / _SUPERSAMPLING)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX)), boxes


def _draw_object(
    canvas: Any, shape: str, centre: tuple[float, float], radius: float, color: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Draws it, and tells the least and the largest (x, y) of its outline."""
    x, y = centre
    points = [(x - radius, y - radius), (x + radius, y + radius)]
    if shape == "circle":
        canvas.ellipse((*points[0], *points[1]), fill=color)
    elif shape == "square":
        side = 0.85 * radius
        points = [(x - side, y - side), (x + side, y + side)]
        canvas.rectangle((*points[0], *points[1]), fill=color)
    elif shape == "cross":
        arm = 0.3 * radius
        canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill=color)
        canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill=color)
    else:
        corners, depth = {"triangle": (3, 1.0), "diamond": (4, 1.0), "star": (5, 0.4)}[shape]
        points = []
        for step in range(2 * corners):
            if step % 2 and depth == 1.0:
                continue  # a convex shape has no inner corners
            length = radius * (depth if step % 2 else 1.0)
            angle = math.pi * step / corners - math.pi / 2
            points.append((x + length * math.cos(angle), y + length * math.sin(angle)))
        canvas.polygon(points, fill=color)
    outline = np.asarray(points, np.float32)
    return outline.min(axis=0), outline.max(axis=0)
