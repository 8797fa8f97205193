"""Pictures for people: retrieval results, rows of images, maps over images. Draws what it is given, ranks nothing."""

import dataclasses
import textwrap
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle

CANDIDATES = 5

_INK, _QUIET, _RIGHT, _WRONG, _MARGIN = "#1f2328", "#6e7781", "#1a7f37", "#d0d7de", "#f6f8fa"
_CELL_INCHES, _CAPTION_INCHES, _DPI = 1.25, 2.5, 110


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An image that was found: uint8 [H, W, 3], its cosine similarity, and whether it is the query's own."""

    image: np.ndarray
    score: float
    is_own: bool


@dataclasses.dataclass(frozen=True)
class Query:
    """A caption, the images nearest to it (nearest first, at most `CANDIDATES`), its own image and that one's rank."""

    caption: str
    candidates: tuple[Candidate, ...]
    own: Candidate
    own_rank: int


def retrieval_picture(best: Sequence[Query], worst: Sequence[Query], title: str) -> np.ndarray:
    """Draws queries, a row each: the caption, its nearest images with scores, and its own image apart from them.

    The own image has a thick green frame wherever it stands. Images of any size are shown at one size, small ones
    with their pixels visible.

    Returns:
        uint8 [H, W, 3].
    """
    sections = [(name, rows) for name, rows in (("Best", best), ("Worst", worst)) if rows]
    heights = [0.45, *(0.5 + len(rows) * (_CELL_INCHES + 0.4) for _, rows in sections)]
    width = _CAPTION_INCHES + (CANDIDATES + 1) * (_CELL_INCHES + 0.15) + 0.4
    figure = _figure(width, sum(heights))
    parts = np.atleast_1d(np.asarray(figure.subfigures(len(heights), 1, height_ratios=heights)))
    _draw_title(parts[0], title)
    for part, (name, rows) in zip(parts[1:], sections, strict=True):
        _draw_section(part, name, rows)
    return _rendered(figure)


def image_rows(columns: Mapping[str, np.ndarray], title: str) -> np.ndarray:
    """Draws images in rows under the names of their columns.

    Args:
        columns: name -> uint8 [N, H, W, 3], the same N in all.
        title: above them.

    Returns:
        uint8 [H, W, 3].
    """
    count, side = len(next(iter(columns.values()))), 1.5 * _CELL_INCHES
    heights = [0.45, count * (side + 0.1) + 0.35]
    figure = _figure(len(columns) * (side + 0.1) + 0.2, sum(heights))
    parts = np.atleast_1d(np.asarray(figure.subfigures(2, 1, height_ratios=heights)))
    _draw_title(parts[0], title)
    frame = {"left": 0.02, "right": 0.98, "top": 1 - 0.3 / heights[1], "bottom": 0.01, "wspace": 0.06, "hspace": 0.06}
    grid = parts[1].add_gridspec(count, len(columns), **frame)
    for place, (name, images) in enumerate(columns.items()):
        for row, image in enumerate(images):
            ax = parts[1].add_subplot(grid[row, place])
            _draw_image(ax, image)
            ax.set_axis_off()
            if row == 0:
                ax.set_title(name, fontsize=9.5, color=_QUIET, loc="left", weight="bold")
    return _rendered(figure)


@dataclasses.dataclass(frozen=True)
class Grounded:
    """A phrase, an image uint8 [H, W, 3], a map of its pixels [H, W], and the true box: left, top, width, height."""

    phrase: str
    image: np.ndarray
    map_HxW: np.ndarray  # noqa: N815
    box: tuple[float, float, float, float]


def grounding_picture(rows: Sequence[Grounded], title: str) -> np.ndarray:
    """Draws a row for each phrase: the phrase, the image with the true box, and the map laid over the image.

    A map has its own range of colours, from its least value to its largest.

    Returns:
        uint8 [H, W, 3].
    """
    side = 1.5 * _CELL_INCHES
    heights = [0.45, len(rows) * (side + 0.1) + 0.1]
    figure = _figure(_CAPTION_INCHES + 2 * (side + 0.1) + 0.2, sum(heights))
    parts = np.atleast_1d(np.asarray(figure.subfigures(2, 1, height_ratios=heights)))
    _draw_title(parts[0], title)
    ratios = [_CAPTION_INCHES / side, 1, 1]
    frame = {"left": 0.02, "right": 0.98, "top": 0.99, "bottom": 0.01, "wspace": 0.06, "hspace": 0.06}
    grid = parts[1].add_gridspec(len(rows), 3, width_ratios=ratios, **frame)
    for row, found in enumerate(rows):
        axes = [parts[1].add_subplot(grid[row, column]) for column in range(3)]
        for ax in axes:
            ax.set_axis_off()
        phrase = "\n".join(textwrap.wrap(found.phrase, 30, max_lines=5, placeholder=" …"))
        axes[0].text(0, 0.5, phrase, fontsize=9.5, color=_INK, va="center", parse_math=False)
        for ax in axes[1:]:
            _draw_image(ax, found.image)
        left, top, width, height = found.box
        axes[1].add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=_RIGHT, linewidth=2))
        axes[2].imshow(found.map_HxW, cmap="jet", alpha=0.5)
    return _rendered(figure)


def _figure(width: float, height: float) -> Figure:
    """Not through pyplot: that would choose a display for the whole process and keep every figure alive."""
    return Figure(figsize=(width, height), dpi=_DPI, facecolor="white")


def _draw_title(figure: SubFigure, title: str) -> None:
    figure.text(0.02, 0.4, title, fontsize=13, weight="bold", color=_INK, va="center", parse_math=False)


def _rendered(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # A caption in a script that the font lacks is drawn as boxes; a warning for each character helps nobody.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        canvas.draw()
    return np.array(np.asarray(canvas.buffer_rgba())[..., :3])


def _draw_section(figure: SubFigure, name: str, rows: Sequence[Query]) -> None:
    ratios = [_CAPTION_INCHES / _CELL_INCHES, *[1] * CANDIDATES, 0.15, 1]
    header = 0.5 / (0.5 + len(rows) * (_CELL_INCHES + 0.4))
    grid = figure.add_gridspec(
        len(rows),
        len(ratios),
        width_ratios=ratios,
        left=0.02,
        right=0.985,
        top=1 - header,
        bottom=0.0,
        wspace=0.1,
        hspace=0.0,
    )
    for row, query in enumerate(rows):
        axes = [figure.add_subplot(grid[row, column]) for column in range(len(ratios))]
        for ax in axes:
            ax.set_axis_off()
        if row == 0:
            _column_titles(axes, name)
        axes[0].set_box_aspect(_CELL_INCHES / _CAPTION_INCHES)
        caption = "\n".join(textwrap.wrap(query.caption, 30, max_lines=5, placeholder=" …"))
        axes[0].text(0, 0.5, caption, fontsize=9.5, color=_INK, va="center", parse_math=False)
        for ax, candidate in zip(axes[1:], query.candidates, strict=False):
            _draw_candidate(ax, candidate, f"{candidate.score:.3f}")
        _draw_candidate(axes[-1], query.own, f"{query.own.score:.3f}   rank {query.own_rank:,}")


def _column_titles(axes: Sequence, name: str) -> None:
    for ax, text, color in (
        (axes[0], name, _INK),
        (axes[1], "Found, nearest first", _QUIET),
        (axes[-1], "Its own image", _QUIET),
    ):
        ax.set_title(text, fontsize=11 if ax is axes[0] else 9.5, color=color, loc="left", weight="bold")


def _draw_candidate(ax, candidate: Candidate, label: str) -> None:
    ax.set_axis_on()
    _draw_image(ax, candidate.image)
    color, thickness = (_RIGHT, 3.0) if candidate.is_own else (_WRONG, 1.0)
    for spine in ax.spines.values():
        spine.set(color=color, linewidth=thickness)
    ax.set_xlabel(label, fontsize=8.5, color=color if candidate.is_own else _QUIET, labelpad=4)


def _draw_image(ax, image: np.ndarray) -> None:
    # Few pixels are shown as they are: smoothing would turn an 8 x 8 digit into a blur.
    smoothing = "nearest" if max(image.shape[:2]) <= 64 else "antialiased"
    ax.imshow(image, interpolation=smoothing)
    # A square cell whatever the image's shape, so that rows and labels stay in line.
    height, width = image.shape[:2]
    margin_x, margin_y = (max(height, width) - width) / 2, (max(height, width) - height) / 2
    ax.set_xlim(-0.5 - margin_x, width - 0.5 + margin_x)
    ax.set_ylim(height - 0.5 + margin_y, -0.5 - margin_y)
    ax.set_facecolor(_MARGIN)
    ax.set_xticks([])
    ax.set_yticks([])
