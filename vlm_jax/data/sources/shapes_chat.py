"""Conversations about drawn scenes: captions, questions with one right answer, two scenes compared, and text alone.

A scene that is `described` is told in words, and asked about without an image: what a language model can learn before
it sees.

Every answer to a first question is one of a few words, all of them equally likely whatever the question says: without
the image no rule does better than chance, which is 1 in 8 for colours, 6 for shapes, 9 for places, 3 for "more", and
1 in as many as there are counts. (A question further on in a conversation may be helped by those before it.)
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from vlm_jax.data.sources.chats import Turn

Kind = Literal["caption", "color", "shape", "count", "position", "more", "compare", "described", "text"]
Scene = list[dict[str, str]]
RandomScene = Callable[[np.random.Generator, int], Scene]

KINDS: tuple[Kind, ...] = ("caption", "color", "shape", "count", "position", "more", "compare", "described", "text")
"""All kinds: a caption; a question on the colour or shape at a place, on the number of objects, on the place of an
object; which of two scenes has more objects; the colour at a place in one of two scenes; such questions about a scene
that is told in words, and sums, without image."""
ABOUT_ONE: tuple[Kind, ...] = ("color", "shape", "count", "position")
"""Questions about one scene."""
QUESTIONS: tuple[Kind, ...] = (*ABOUT_ONE, "more", "compare")
"""Kinds whose answers need the images and can be compared word for word."""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_CAPTION_REQUESTS = ("Describe the picture.", "What does the picture show?", "Give a full caption of the picture.")
_PLACEHOLDER = "<image>"


class Conversation(NamedTuple):
    """Turns, and what they are about."""

    turns: tuple[Turn, ...]
    kind: Kind
    needs_image: bool
    """Whether the scene of the record belongs to it."""
    others: tuple[Scene, ...] = ()
    """Scenes that take its place."""


def _rounds(pairs: Sequence[tuple[str, str]], images: int, front: str = "") -> tuple[Turn, ...]:
    front = f"{_PLACEHOLDER}\n" * images + front
    turns: list[Turn] = []
    for number, (question, answer) in enumerate(pairs):
        turns += [Turn("user", question if number else front + question), Turn("assistant", answer)]
    return tuple(turns)


def caption(text: str, rng: np.random.Generator) -> Conversation:
    """The caption of a scene, asked for in one of several ways."""
    request = _CAPTION_REQUESTS[int(rng.integers(len(_CAPTION_REQUESTS)))]
    return Conversation(_rounds([(request, text)], 1), "caption", True)


def questions(rng: np.random.Generator, scene: Scene, kind: Kind, max_rounds: int) -> Conversation:
    """From 1 to `max_rounds` questions about a scene, the last of them of `kind`, none twice."""
    return Conversation(_rounds(_asked(rng, scene, kind, max_rounds), 1), kind, True)


def described(rng: np.random.Generator, scene: Scene, text: str, max_rounds: int) -> Conversation:
    """As `questions`, the last of any kind, about a scene that is told in words."""
    kind = ABOUT_ONE[int(rng.integers(len(ABOUT_ONE)))]
    return Conversation(_rounds(_asked(rng, scene, kind, max_rounds), 0, f"There is {text}.\n"), "described", False)


def _asked(rng: np.random.Generator, scene: Scene, last: Kind, max_rounds: int) -> list[tuple[str, str]]:
    final = _question(rng, scene, last)
    others = [pair for kind in ABOUT_ONE for pair in _all_questions(scene, kind) if pair != final]
    count = min(int(rng.integers(max_rounds)), len(others))
    return [*(others[i] for i in rng.permutation(len(others))[:count]), final]


def _question(rng: np.random.Generator, scene: Scene, kind: Kind) -> tuple[str, str]:
    # Objects that all look alike can't be asked for by name; how many there are can always be asked.
    pairs = _all_questions(scene, kind) or _all_questions(scene, "count")
    return pairs[int(rng.integers(len(pairs)))]


def _all_questions(scene: Scene, kind: Kind) -> list[tuple[str, str]]:
    """Every question of a kind about one scene, with its answer."""
    if kind == "count":
        return [("How many objects are there?", NUMBERS[len(scene)])]
    if kind == "color":
        return [(f"What colour is the object in the {item['position']}?", item["color"]) for item in scene]
    if kind == "shape":
        return [(f"What shape is the object in the {item['position']}?", item["shape"]) for item in scene]
    names = [_name(item) for item in scene]
    return [
        (f"Where is the {name}?", item["position"])
        for item, name in zip(scene, names, strict=True)
        if names.count(name) == 1
    ]


def _name(item: dict[str, str]) -> str:
    return f"{item['color']} {item['shape']}"


def more(rng: np.random.Generator, least: int, most: int, random_scene: RandomScene) -> Conversation:
    """Which of two scenes has more objects; "first", "second" and "same" are equally likely."""
    answer = ("first", "second", "same")[int(rng.integers(3))]
    larger = int(rng.integers(least + 1, most + 1))
    smaller = int(rng.integers(least, larger))
    counts = {"first": (larger, smaller), "second": (smaller, larger), "same": (larger, larger)}[answer]
    scenes = tuple(random_scene(rng, count) for count in counts)
    question = "Which picture has more objects, the first or the second? Say same if neither has."
    return Conversation(_rounds([(question, answer)], 2), "more", True, scenes)


def compare(rng: np.random.Generator, least: int, most: int, random_scene: RandomScene) -> Conversation:
    """The colour at a place in one of two scenes, which both have an object there."""
    scenes = [random_scene(rng, int(rng.integers(least, most + 1))) for _ in range(2)]
    which = int(rng.integers(2))
    item = scenes[which][int(rng.integers(len(scenes[which])))]
    places = [other["position"] for other in scenes[1 - which]]
    if item["position"] not in places:  # else that picture could be told by its empty place
        scenes[1 - which][int(rng.integers(len(places)))]["position"] = item["position"]
    picture = ("first", "second")[which]
    question = f"In the {picture} picture, what colour is the object in the {item['position']}?"
    return Conversation(_rounds([(question, item["color"])], 2), "compare", True, tuple(scenes))


def text_only(rng: np.random.Generator) -> Conversation:
    """A sum, without an image."""
    total = int(rng.integers(1, len(NUMBERS)))
    first = int(rng.integers(0, total + 1))
    question = f"What is {NUMBERS[first]} plus {NUMBERS[total - first]}?"
    return Conversation(_rounds([(question, NUMBERS[total])], 0), "text", False)
