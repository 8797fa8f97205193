"""Pictures of texts for people: answers beside the images that they are about, and rows with what is learned in them.

Draws what it is given, word by word; `pictures` draws what is made of images alone.
"""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH = 960
THUMBNAIL = 176
MOST_IMAGES, MOST_CHARACTERS = 3, 1500
INK, QUIET, RIGHT, LEARNED, WHITE = "#1f2328", "#6e7781", "#1a7f37", "#c6efce", "#ffffff"
_SIZE, _LINE, _GAP = 15, 22, 12


class Span(NamedTuple):
    """A piece of a text: what it says, its colour, and the colour of the ground under it."""

    text: str
    ink: str = INK
    ground: str = WHITE


class Sample(NamedTuple):
    """What was asked and answered.

    Attributes:
        images: uint8 [H, W, 3] of any sizes, perhaps none.
        question: what was asked.
        answer: what the model says.
        references: the known answers, perhaps none.
        right: whether the answer is one of them.
    """

    images: Sequence[np.ndarray]
    question: str
    answer: str
    references: Sequence[str]
    right: bool


def sample_rows(samples: Sequence[Sample], title: str) -> np.ndarray:
    """Draws samples, a row each: the images, then question, answer (green where it is right) and reference.

    Returns:
        uint8 [H, W, 3].
    """
    rows = []
    for sample in samples:
        texts = [Span("Question  ", QUIET), Span(sample.question), Span("\n")]
        texts += [Span("Answer  ", QUIET), Span(sample.answer or "(nothing)", RIGHT if sample.right else INK)]
        if sample.references:
            texts += [Span("\n"), Span("Reference  ", QUIET), Span(" | ".join(dict.fromkeys(sample.references)))]
        shown = [_thumbnail(image) for image in sample.images[:MOST_IMAGES]]
        if len(sample.images) > MOST_IMAGES:
            texts.insert(0, Span(f"({MOST_IMAGES} of {len(sample.images)} images)\n", QUIET))
        used = sum(image.shape[1] + _GAP for image in shown)
        rows.append(_beside([*shown, paragraph(texts, WIDTH - used - 2 * _GAP)]))
    return _below(rows, title)


def supervised_rows(rows: Sequence[Sequence[tuple[str, bool]]], title: str) -> np.ndarray:
    """Draws rows of training as the model reads them, what is learned on green ground.

    Args:
        rows: each its pieces in turn, (text, whether it is learned).
        title: above them.

    Returns:
        uint8 [H, W, 3].
    """
    drawn = [
        [span for text, learned in row for span in (Span(text, INK, LEARNED if learned else WHITE), Span(" "))]
        for row in rows
    ]
    return _below([paragraph(spans, WIDTH - 2 * _GAP) for spans in drawn], title)


def paragraph(spans: Sequence[Span], width: int) -> np.ndarray:
    """Spans as lines of `width` pixels, uint8 [H, width, 3]; texts beyond `MOST_CHARACTERS` are cut."""
    placed, x, y = [], 0.0, 0
    for word, span in _words(spans, width):
        length = 0.0 if word == "\n" else _font().getlength(word)
        if word == "\n" or (x and x + length > width):
            x, y = 0.0, y + _LINE
        if word != "\n" and (x or not word.isspace()):
            placed.append((x, y, length, word, span))
            x += length
    canvas = Image.new("RGB", (width, y + _LINE), WHITE)
    draw = ImageDraw.Draw(canvas)
    for x, y, length, _, span in placed:
        if span.ground != WHITE:
            draw.rectangle((x, y + 1, x + length - 1, y + _LINE - 3), fill=span.ground)
    for x, y, _, word, span in placed:
        draw.text((x, y + 1), word, fill=span.ink, font=_font())
    return np.asarray(canvas)


def _words(spans: Sequence[Span], width: int) -> Iterator[tuple[str, Span]]:
    """Words, spaces and line feeds of spans; what is wider than a line in pieces that fit."""
    left = MOST_CHARACTERS
    for span in spans:
        text = span.text if len(span.text) <= left else span.text[:left] + " …"
        left -= len(span.text)
        for word in re.findall(r"\n|[^\S\n]+|\S+", text):
            while len(word) > 1 and _font().getlength(word) > width:
                fits = max(1, int(len(word) * width / _font().getlength(word)) - 1)
                yield word[:fits], span
                word = word[fits:]
            yield word, span
        if left <= 0:
            return


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    # Pillow's own font has Latin letters alone. The other layout engine refuses control characters.
    path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, _SIZE, layout_engine=ImageFont.Layout.BASIC)


def _thumbnail(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    scale = THUMBNAIL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Few pixels are shown as they are: smoothing would make a blur of them.
    few = Image.Resampling.NEAREST if max(height, width) <= 64 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize(size, few))


def _beside(parts: Sequence[np.ndarray]) -> np.ndarray:
    height = max(part.shape[0] for part in parts)
    padded = [np.pad(p, ((0, height - len(p)), (0, _GAP), (0, 0)), constant_values=255) for p in parts]
    return np.concatenate(padded, axis=1)


def _below(rows: Sequence[np.ndarray], title: str) -> np.ndarray:
    margin, parts = ((_GAP, _GAP), (_GAP, 0), (0, 0)), [paragraph([Span(title)], WIDTH - 2 * _GAP), *rows]
    framed = [np.pad(part, margin, constant_values=255) for part in parts]
    return np.concatenate([np.pad(p, ((0, 0), (0, WIDTH - p.shape[1]), (0, 0)), constant_values=255) for p in framed])


__all__ = ["Sample", "Span", "paragraph", "sample_rows", "supervised_rows"]
